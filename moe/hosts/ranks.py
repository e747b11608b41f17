"""Work that ranks do together and that may fail on one of them: it then fails on all, and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank. Collective."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def agree(error: Exception | None, kind: type[Exception], what: str) -> None:
    """Raises on every rank if there is an error on any: ``kind``, with the first rank's message. Collective.

    Args:
        error: this rank's; None where all is well.
        what: what it means, after the message.
    """
    messages = gather(None if error is None else str(error) or type(error).__name__)
    for number, message in enumerate(messages):
        if message is not None:
            raise kind(f"{message} (rank {number}): {what}") from error


def on_rank_0(action: Callable[[], Any], kind: type[Exception]) -> Any:
    """Runs on rank 0; every rank returns what it returned, or raises its error as ``kind``. Collective."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = str(error) or type(error).__name__
    if world() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise kind(outcome[1])
    return outcome[0]
