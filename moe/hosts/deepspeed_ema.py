"""An exponential moving average of the weights, kept where the optimizer keeps its state.

    ema <- d * ema + (1 - d) * weights          d = min(decay, (1 + step) / (10 + step))

The average is one entry more in the inner optimizer's state of each weight ("ema"), which torch's and DeepSpeed's Adam
leave alone. So it is float32 whatever the model is, split over the ranks as ZeRO splits the optimizer, and saved and
resharded with it. The ramp of d lets short runs average over what they trained, not over their initial weights.

    ema = EMA(engine, decay=0.9999)
    ...
    engine.step()
    if engine.was_step_applied():
        finish_step(engine.module)
        ema.update(engine.global_steps)
    ...
    with ema.applied():
        evaluate(engine)      # the average is in the model; afterwards the trained weights are back, bit for bit
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layer import moe_layers
from .deepspeed_state import EMA_KEY, MASTER, assemble, flats, inner_optimizer, kinds, prepare_state, publish, shares

CHUNK = 2**22


class EMA:
    """The moving average of an engine's weights. Frozen parameters are their own average.

    Args:
        engine: from ``deepspeed.initialize``. An average that ``load_checkpoint`` brought is kept; otherwise it starts
            at the weights.
        decay: d, the share that stays each step.

    Raises:
        ValueError: a decay outside 0 to 1.
    """

    def __init__(self, engine: Any, *, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: choose 0 (no averaging) or more, and less than 1")
        self.engine, self.decay = engine, decay
        prepare_state(engine)
        self._weights = flats(engine)
        state = inner_optimizer(engine).state
        for flat in self._weights:
            state[flat].setdefault(EMA_KEY, flat.detach().clone())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights in, once per optimizer step that was applied.

        Args:
            step: how many steps were applied, this one included.
        """
        refuse_averaged(self.engine, "ema.update")
        decay = min(self.decay, (1 + step) / (10 + step))
        state = inner_optimizer(self.engine).state
        averages = [state[flat][EMA_KEY] for flat in self._weights]
        torch._foreach_lerp_(averages, [flat.detach() for flat in self._weights], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average. Collective. For evaluation only: neither step nor save inside.

        Works at every stage: at ZeRO-3 the engine gathers the weights in forward, as ever. The average and the weights
        change places, so nothing is copied aside and nothing is lost.
        """
        refuse_averaged(self.engine, "ema.applied")
        self._exchange()
        self.engine._gatewright_average_applied = True
        try:
            yield
        finally:
            self.engine._gatewright_average_applied = False
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        state = inner_optimizer(self.engine).state
        for flat in self._weights:
            weights, average = flat.detach().view(-1), state[flat][EMA_KEY].view(-1)
            for start in range(0, weights.numel(), CHUNK):
                mine, other = weights[start : start + CHUNK], average[start : start + CHUNK]
                kept = mine.clone()
                mine.copy_(other)
                other.copy_(kept)
        publish(self.engine)


def refuse_averaged(engine: Any, what: str) -> None:
    if getattr(engine, "_gatewright_average_applied", False):
        raise RuntimeError(
            f"{what} inside `with ema.applied()`: the model holds the average there, leave the block first"
        )


def ema_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The average by parameter name, whole, experts of all ranks included, one at a time, on every rank. Collective.

    Raises:
        ValueError: the engine averages nothing.
    """
    if EMA_KEY not in kinds(engine):
        raise ValueError(
            "this engine keeps no average of its weights: make one by EMA(engine), or load a checkpoint that has one"
        )
    return _full_parameters(engine, EMA_KEY)


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The float32 weights by parameter name; see ``ema_parameters``. Collective."""
    return _full_parameters(engine, MASTER)


def _full_parameters(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    parallel = next((layer.parallel for layer in moe_layers(engine.module)), None)
    for name, share in shares(engine).items():
        whole = assemble(engine, share, kind if share.trainable else MASTER, everywhere=True).clone()
        if share.experts is not None and parallel.size > 1:
            banks = [torch.empty_like(whole) for _ in range(parallel.size)]
            dist.all_gather(banks, whole, group=parallel.group)
            whole = torch.cat(banks)
        yield name, whole
