"""Expert parallelism: which rank holds which expert, and how tokens travel between ranks.

Expert e of E lives on rank ``e // (E / size)`` of its expert-parallel group: contiguous blocks. World ranks 0..size-1
form the first group, the next ``size`` ranks the second; ranks that hold the same experts form an expert-data group.

    gradient of a replicated parameter  = sum over the world / world
    gradient of an expert parameter     = sum over its expert-data group / world

so that training on any number of ranks at any size follows one process that accumulates the same micro-batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """A rank's place in the expert-parallel layout. The default is one process that holds every expert.

    Attributes:
        size: ranks that share the experts of a layer.
        rank: this rank's place among them.
        group: their process group; None where size is 1.
        data_group: the ranks that hold the same experts; None where there is one.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict) -> ExpertParallel:
        # a process group cannot be copied, and a copied model lives on the same ranks
        return self

    @classmethod
    def create(cls, size: int) -> ExpertParallel:
        """Builds the groups. Collective: every rank calls it, with the same size.

        Raises:
            ValueError: ``size`` is below 1 or does not divide the number of ranks.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_divides_world(size, world)
        if world == 1:
            return cls()
        rank = dist.get_rank()
        expert_groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        data_groups = [dist.new_group(list(range(place, world, size))) for place in range(size)]
        return cls(
            size=size,
            rank=rank % size,
            group=expert_groups[rank // size] if size > 1 else None,
            data_group=data_groups[rank % size] if world > size else None,
        )

    def local_experts(self, num_experts: int) -> range:
        """The global ids of the routed experts that this rank holds.

        Raises:
            ValueError: ``size`` does not divide the number of routed experts.
        """
        if num_experts % self.size:
            allowed = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
            raise ValueError(
                f"{num_experts} routed experts do not divide over expert parallelism {self.size}: choose one of "
                f"{allowed}, or another number of experts"
            )
        share = num_experts // self.size
        return range(self.rank * share, (self.rank + 1) * share)


def check_divides_world(size: int, world: int) -> None:
    if size < 1 or world % size:
        allowed = [s for s in range(1, world + 1) if world % s == 0]
        raise ValueError(
            f"expert parallelism {size} does not divide {world} rank{'s' * (world > 1)}: choose one of {allowed}"
        )


def exchange_counts(send_RE: Tensor, parallel: ExpertParallel) -> Tensor:
    """How many rows every rank sends to each expert: [ranks, local experts], row r what rank r sends to mine."""
    receive_RE = torch.empty_like(send_RE)
    dist.all_to_all_single(receive_RE, send_RE.contiguous(), group=parallel.group)
    return receive_RE


class Exchange:
    """Rows on their way between ranks: ``start`` sends, ``finish`` waits. In between, other work may run."""

    def __init__(self, parallel: ExpertParallel, send: list[int], receive: list[int]) -> None:
        """
        Args:
            send: how many rows go to each rank.
            receive: how many come from each.
        """
        self.parallel, self.send, self.receive = parallel, send, receive
        self._pending: list[dist.Work] = []

    def start(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Sends every tensor [sum(send), ...]; the results [sum(receive), ...] may be read after ``finish``."""
        # Whatever one rank's inputs require, every rank must take part in the backward exchange, or the others would
        # wait for ever.
        anchor = rows[0].new_zeros((), requires_grad=torch.is_grad_enabled())
        return _AllToAll.apply(self, anchor, *rows)

    def finish(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending.clear()

    def reversed(self) -> Exchange:
        return Exchange(self.parallel, self.receive, self.send)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, anchor: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        received, works = zip(
            *(_exchange(r, exchange.send, exchange.receive, exchange.parallel) for r in rows), strict=True
        )
        exchange._pending.extend(works)
        return received

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        results, works = zip(
            *(_exchange(g, exchange.receive, exchange.send, exchange.parallel) for g in grads), strict=True
        )
        for work in works:
            work.wait()
        return None, None, *results


def _exchange(rows: Tensor, send: list[int], receive: list[int], parallel: ExpertParallel) -> tuple[Tensor, dist.Work]:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    return out, dist.all_to_all_single(out, rows.contiguous(), receive, send, group=parallel.group, async_op=True)


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Whether the parameter is a shard of the routed experts: the tag that DeepSpeed and Megatron-Core use too."""
    return getattr(parameter, "allreduce", True) is False


def sync_gradients(model: nn.Module, parallel: ExpertParallel) -> None:
    """Averages the gradients over the ranks, for a plain PyTorch loop (an engine does this itself). Collective.

    Every parameter must have a gradient or have none on every rank alike.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    world = dist.get_world_size()
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        parameter.grad.div_(world)
        if not is_expert_parameter(parameter) or parallel.size == 1:
            dist.all_reduce(parameter.grad)
        elif parallel.data_group is not None:
            dist.all_reduce(parameter.grad, group=parallel.data_group)


def grad_norm(
    parameters: Iterable[nn.Parameter], parallel: ExpertParallel, grads: Iterable[Tensor | None] | None = None
) -> Tensor:
    """The 2-norm of the whole model's gradient, the experts of other ranks included. Collective where size > 1.

        sqrt( sum of squares of replicated gradients + that of expert gradients, summed over the expert-parallel group )

    Args:
        grads: the gradients, where they are not in ``parameter.grad``.
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters] if grads is None else list(grads)
    device = parameters[0].device
    replicated, expert = (
        torch.zeros((), dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            square = torch.linalg.vector_norm(grad.detach(), dtype=torch.float64).square()
            if is_expert_parameter(parameter) and parallel.size > 1:
                expert += square
            else:
                replicated += square
    if parallel.size > 1:
        dist.all_reduce(expert, group=parallel.group)
    return (replicated + expert).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, parallel: ExpertParallel) -> Tensor:
    """Scales the gradients so that the whole model's norm is at most ``max_norm``; returns the norm before. Collective
    where size > 1."""
    if not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"max_norm={max_norm}: choose a positive number")
    parameters = list(parameters)
    norm = grad_norm(parameters, parallel)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm
