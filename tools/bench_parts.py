"""The parts of a layer that move rows, in the ways that are at hand: sorting and gathering by expert, summing.

    dispatch   tokens [T, D] and a routing -> rows [N, D], sorted by expert
    combine    rows and their weights -> [T, D], the weighted sum of each token's rows
    segments   rows [N, D] summed by an id each: of T tokens, or of E experts (``kernels.segment``)

"torch" is written in plain torch as transformers has it; the others are functions of the packages they name. A mover
holds one routing; ``combine`` belongs to the ``dispatch`` that was run last.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.permute import permute, unpermute
from ..moe import DispatchPlan, ExpertParallel
from .peers import installed


class Mover:
    """Rows to the experts and back, in plain torch."""

    name: ClassVar[str] = "torch"
    package: ClassVar[str | None] = None
    order_N: Tensor  # the assignments in the order of the rows
    token_N: Tensor  # the token of each row

    def __init__(self, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> None:
        self.index_TK, self.weight_TK, self.num_experts = index_TK, weight_TK, num_experts

    def dispatch(self, x_TD: Tensor) -> Tensor:
        self.order_N = self.index_TK.flatten().argsort(stable=True)
        self.token_N = self.order_N // self.index_TK.shape[1]
        self.counts_E = torch.bincount(self.index_TK.flatten(), minlength=self.num_experts)
        return x_TD[self.token_N]

    def weights(self) -> Tensor:
        """The routing weights as ``combine`` wants them: one a row."""
        return self.weight_TK.flatten()[self.order_N]

    def combine(self, rows_ND: Tensor, weight_N: Tensor) -> Tensor:
        weighted_ND = rows_ND * weight_N[:, None]
        return self._sum(weighted_ND).to(rows_ND.dtype)

    def _sum(self, rows_ND: Tensor) -> Tensor:
        return rows_ND.new_zeros(len(self.index_TK), rows_ND.shape[1]).index_add(0, self.token_N, rows_ND)

    @classmethod
    def why_not(cls) -> str | None:
        """Why it cannot run, or None."""
        if cls.package is not None and not installed(cls.package):
            return f"{cls.package} is not installed"
        return None


class Gatewright(Mover):
    """``DispatchPlan.build``, ``kernels.permute``, ``kernels.unpermute``: how the layer moves rows between ranks.

    At one rank the experts' kernel gathers and sums itself.
    """

    name = "gatewright"

    def dispatch(self, x_TD: Tensor) -> Tensor:
        tokens, slots = self.index_TK.shape
        token = torch.arange(tokens, device=x_TD.device).repeat_interleave(slots, output_size=tokens * slots)
        self.plan = DispatchPlan.build(
            num_rows=tokens, source=token, expert=self.index_TK.flatten(), weight=self.weight_TK.flatten(),
            num_experts=self.num_experts, parallel=ExpertParallel(),
        )  # fmt: skip
        return permute(x_TD, self.plan.source)

    def weights(self) -> Tensor:
        return self.plan.weight

    def combine(self, rows_ND: Tensor, weight_N: Tensor) -> Tensor:
        return unpermute(rows_ND, self.plan.source, len(self.index_TK), weight_N)


class Scatter(Mover):
    """Plain torch, with the sum by torch-scatter."""

    name = "torch-scatter"
    package = "torch_scatter"

    def _sum(self, rows_ND: Tensor) -> Tensor:
        from torch_scatter import scatter_add

        return scatter_add(rows_ND, self.token_N, dim=0, dim_size=len(self.index_TK))


class AutoEP(Mover):
    """DeepSpeed AutoEP's restore: rows to their slots, weighted, summed over the slots."""

    name = "DeepSpeed AutoEP"
    package = "deepspeed"

    def weights(self) -> Tensor:
        return self.weight_TK

    def combine(self, rows_ND: Tensor, weight_TK: Tensor) -> Tensor:
        from deepspeed.module_inject.auto_ep_layer import combine_from_routed

        tokens, slots = weight_TK.shape
        shape = (1, tokens, rows_ND.shape[1])
        return combine_from_routed(rows_ND, weight_TK, self.order_N, slots, "post", "weighted_sum", shape)[0]


class Megatron(Mover):
    """Megatron-Core's ``permute`` and ``unpermute``, from its dense map [T, E]."""

    name = "Megatron-Core"
    package = "megatron.core"

    def __init__(self, index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> None:
        super().__init__(index_TK, weight_TK, num_experts)
        empty_TE = weight_TK.new_zeros(len(index_TK), num_experts)
        self.share_TE = empty_TE.scatter(1, index_TK, weight_TK)
        self.chosen_TE = empty_TE.bool().scatter(1, index_TK, True)

    def dispatch(self, x_TD: Tensor) -> Tensor:
        from megatron.core.transformer.moe.moe_utils import permute as megatron_permute

        rows_ND, _, self.token_N = megatron_permute(x_TD, self.chosen_TE, num_out_tokens=self.index_TK.numel())
        return rows_ND

    def weights(self) -> Tensor:
        return self.share_TE

    def combine(self, rows_ND: Tensor, share_TE: Tensor) -> Tensor:
        from megatron.core.transformer.moe.moe_utils import unpermute as megatron_unpermute

        shape = torch.Size([len(share_TE), rows_ND.shape[1]])
        return megatron_unpermute(rows_ND, self.token_N, shape, probs=share_TE, routing_map=self.chosen_TE)


MOVERS: dict[str, type[Mover]] = {mover.name: mover for mover in (Gatewright, Mover, Scatter, AutoEP, Megatron)}
