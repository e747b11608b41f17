"""What the routers did between two log lines: loads, losses and drops, added up over micro-batches and ranks.

    monitor.add(routings);  ...;  report = monitor.collect()      collective: every rank calls it

Counts are summed over ranks before any ratio is taken. Entropy and MaxVio are those of the routed experts: the others
are chosen by rule, not by load.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from gatewright.moe import moe_layers
from gatewright.moe.metrics import collapse_aware_entropy, max_violation
from gatewright.routers import Routing


@dataclasses.dataclass(frozen=True)
class RoutingReport:
    """One entry a MoE layer, in order.

    Attributes:
        shares: [E] of each layer's load that each routed expert took; sums to 1.
        entropy: collapse-aware, 0 to 1.
        max_violation: 0 = even.
        dropped: share of the requested assignments that capacity dropped.
        losses: the mean over micro-batches of each auxiliary loss, as weighted.
    """

    shares: list[list[float]]
    entropy: list[float]
    max_violation: list[float]
    dropped: list[float]
    losses: list[dict[str, float]]

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
        model: its MoE layers say which experts are routed.
        top_k: experts a token, on average.
    """

    def __init__(self, model: torch.nn.Module, top_k: float) -> None:
        self.layers, self.top_k = moe_layers(model), top_k
        self.routed = [
            [i for i, kind in enumerate(layer.router.expert_kinds) if kind == "routed"] for layer in self.layers
        ]
        self._sums: list[dict[str, Tensor]] = []
        self._micro_batches = 0

    def add(self, routings: list[Routing]) -> None:
        """Takes the decisions of one micro-batch, one a MoE layer. Waits for no device."""
        rows = [
            {"load": routing.load_E(), "requested": routing.requested_E()}
            | {f"loss/{name}": value.detach().double() for name, value in routing.losses.items()}
            for routing in routings
        ]
        self._sums = (
            rows if not self._sums else [{k: a[k] + b[k] for k in a} for a, b in zip(self._sums, rows, strict=True)]
        )
        self._micro_batches += 1

    def collect(self) -> RoutingReport:
        """The report since the last call; then starts anew."""
        reports = []
        for routed, sums in zip(self.routed, self._sums, strict=True):
            names = sorted(sums)
            flat = torch.cat(
                [sums[name].double().flatten() for name in names]
                + [torch.tensor([self._micro_batches]).to(sums["load"]).double()]
            )
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(flat)
            *parts, micro_batches = flat.cpu().split([sums[name].numel() for name in names] + [1])
            total = dict(zip(names, parts, strict=True))
            load, requested = total["load"][routed], total["requested"][routed]
            reports.append(
                {
                    "shares": (load / load.sum()).tolist(),
                    "entropy": collapse_aware_entropy(load, self.top_k).item(),
                    "max_violation": max_violation(load).item(),
                    "dropped": (1 - load.sum() / requested.sum()).item(),
                    "losses": {
                        n.removeprefix("loss/"): (total[n] / micro_batches).item()
                        for n in names
                        if n.startswith("loss/")
                    },
                }
            )
        self._sums, self._micro_batches = [], 0
        return RoutingReport(
            **{field.name: [r[field.name] for r in reports] for field in dataclasses.fields(RoutingReport)}
        )
