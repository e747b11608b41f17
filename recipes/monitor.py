"""What the routers of a recipe's run do: recorded into RUN/routing, and told in the recipe's log lines.

    monitor = RoutingMonitor(model, run, every=20)
    monitor.step(step, totals);  ...;  report = monitor.collect()      collective: every rank calls them

``gatewright.moe.record`` counts and ``gatewright.moe.metrics`` measures; a dense model is let be.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.moe import moe_layers
from gatewright.moe.record import Recorder, measures
from gatewright.recipes.data.draw import Draw
from gatewright.recipes.models import Objective

PROBE_IMAGES = 128


@dataclasses.dataclass(frozen=True)
class RoutingReport:
    """One entry a MoE layer, in order.

    Attributes:
        entropy: collapse-aware, 0 to 1.
        max_violation: 0 = even.
        dropped: share of the requested assignments that capacity dropped.
        losses: the mean over micro-batches of each auxiliary loss, as weighted.
    """

    entropy: list[float] = dataclasses.field(default_factory=list)
    max_violation: list[float] = dataclasses.field(default_factory=list)
    dropped: list[float] = dataclasses.field(default_factory=list)
    losses: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def line(self) -> str:
        """Entropy and MaxVio over the layers, in a few words."""
        if not self.entropy:
            return "no routers"
        mean, least, worst = sum(self.entropy) / len(self.entropy), min(self.entropy), max(self.max_violation)
        return f"entropy {mean:.3f} (least {least:.3f}) MaxVio {worst:.2f}"

    def total_losses(self) -> dict[str, float]:
        """Each auxiliary loss, summed over the layers."""
        names = dict.fromkeys(name for layer in self.losses for name in layer)
        return {name: sum(layer.get(name, 0.0) for layer in self.losses) for name in names}


class RoutingMonitor:
    """
    Args:
        model: the engine's module.
        run: the run's folder.
        every: optimizer steps a window.
    """

    def __init__(self, model: torch.nn.Module, run: Path, *, every: int) -> None:
        self.recorder = Recorder(model, run, every=every) if moe_layers(model) else None

    def step(self, step: int, totals: dict[str, float]) -> None:
        """Ends an optimizer step; ``totals`` stand beside the routing in the log."""
        if self.recorder is not None:
            self.recorder.step(step, **totals)

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.recorder is not None:
            self.recorder.log(step, **values)

    def collect(self) -> RoutingReport:
        """The report of the last window, which ends here."""
        window = None if self.recorder is None else self.recorder.flush()
        if window is None:
            return RoutingReport()
        layers = self.recorder.layers
        measured = measures(window, layers)
        return RoutingReport(
            losses=[
                {name: float(values[place]) for name, values in window.losses.items()} for place in range(len(layers))
            ],
            **{name: measured[name].tolist() for name in ("entropy", "max_violation", "dropped")},
        )

    def probe(self, step: int, objective: Objective, model: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
        """Records every decision for the first held-out images, at noise and times that never change."""
        if self.recorder is not None:
            count = min(PROBE_IMAGES, len(images))
            device = next(model.parameters()).device
            batch: tuple[Any, ...] = (images[:count].to(device), labels[:count].to(device))
            # latents are no pictures
            show = images[:count] if images.shape[1] in (1, 3) else None
            with self.recorder.probing(step, {"class": labels[:count]}, show):
                objective.score(model, *batch, Draw(0, 0, tuple(range(count))))

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
