"""From a decision to rows in expert order, over ranks, and back.

    sort assignments by expert -> gather rows -> (all-to-all) -> grouped feed-forward -> (all-to-all) -> sum at tokens

One ``DispatchPlan`` holds the order, the counts and, with expert parallelism, who gets what. It knows nothing of
routers or experts. Memory beyond inputs, weights and expert activations: the gathered rows once each way, and only
where they travel. On a GPU nothing here waits for the device, but for the split sizes of the all-to-all, which the
collective wants on the host: one wait a layer with expert parallelism, none without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.permute import permute, sort_by_expert
from ..kernels.segment import segment_sum
from .parallel import Exchange, ExpertParallel, exchange_counts


def counts_are_at_hand(tensor: Tensor) -> bool:
    """Whether the host may read what this tensor's device counts: elsewhere than on a CPU it would wait for the device,
    so there kernels pass over what no count includes."""
    return tensor.device.type == "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DispatchPlan:
    """Who computes which row.

    Attributes:
        num_rows: R, rows of the input that may be gathered (the tokens, or the expert inputs that replace them).
        source: [N] which input row an assignment takes, in expert order. Assignments to nobody come last and are in no
            count; where ``counts_are_at_hand`` they are cut off.
        weight: [N] the factor of its output, in expert order; None = 1.
        counts_E: [E] assignments of every expert of the whole bank (all ranks).
        parallel: where the experts are.
    """

    num_rows: int
    source: Tensor
    weight: Tensor | None
    counts_E: Tensor
    parallel: ExpertParallel

    @classmethod
    def build(
        cls,
        *,
        num_rows: int,
        source: Tensor,
        expert: Tensor,
        weight: Tensor | None,
        num_experts: int,
        parallel: ExpertParallel,
    ) -> DispatchPlan:
        """
        Args:
            source, expert, weight: [N], one an assignment; an expert of -1 is no assignment.
            num_experts: E, of the whole bank.
        """
        # assignments to nobody sort to the end, as an expert more
        order, counts_E, _ = sort_by_expert(torch.where(expert < 0, num_experts, expert), num_experts + 1)
        counts_E = counts_E[:num_experts]
        if counts_are_at_hand(expert):
            order = order[: int(counts_E.sum())]
        return cls(
            num_rows=num_rows,
            source=source.index_select(0, order),
            weight=None if weight is None else weight.index_select(0, order),
            counts_E=counts_E,
            parallel=parallel,
        )

    def run(
        self, x_RD: Tensor, bank: Callable[..., Tensor], while_travelling: Callable[[], Any] = lambda: None
    ) -> tuple[Tensor, Any]:
        """Computes every assignment.

        Args:
            x_RD: input rows.
            bank: ``bank(x, counts, token=, weight=, combine=True)``, the experts of this rank.
            while_travelling: work that needs no other rank's rows; it runs while they are on their way.

        Returns:
            [R, D], each row the weighted sum of its assignments (0 where it has none), and what ``while_travelling``
            returned.
        """
        if self.parallel.size == 1:
            meanwhile = while_travelling()
            return bank(x_RD, self.counts_E, token=self.source, weight=self.weight, combine=True), meanwhile
        return self._run_parallel(x_RD, bank, while_travelling)

    def _run_parallel(self, x_RD, bank, while_travelling):
        ranks = self.parallel.size
        send_RE = self.counts_E.view(ranks, -1)
        receive_RE = exchange_counts(send_RE, self.parallel)
        # the collective needs its split sizes on the host: the one wait for the device
        send, receive = torch.stack([send_RE.sum(1), receive_RE.sum(1)]).tolist()
        source = self.source[: sum(send)]
        weight = x_RD.new_ones(len(source), dtype=torch.float32) if self.weight is None else self.weight[: sum(send)]

        there = Exchange(self.parallel, send, receive)
        rows_MD, weight_M = there.start(permute(x_RD, source), weight)
        meanwhile = while_travelling()
        there.finish()

        # rows arrive by rank, then by expert; the bank gathers them by expert and sums each at its place of arrival
        local = receive_RE.shape[1]
        arrived = (
            torch.arange(local, device=x_RD.device)
            .repeat(ranks)
            .repeat_interleave(receive_RE.flatten(), output_size=sum(receive))
        )
        order, counts_E, _ = sort_by_expert(arrived, local)
        out_MD = bank(rows_MD, counts_E, token=order, weight=weight_M[order], combine=True)

        back = there.reversed()
        (out_ND,) = back.start(out_MD)
        back.finish()
        return segment_sum(out_ND, source, self.num_rows), meanwhile
