"""Autonomy of experts: no router; each expert begins to compute, and those with the largest activations go on.

    z_te   = A_e x_t                  [r], every expert's, r much smaller than D
    chosen = the K largest |z_te|_2   weight = softmax over the experts of |z_te|_2, divided by the sum of the chosen
    y_t    = sum over the chosen of  weight_te * FFN_e(B_e z_te)

The z of the chosen are not lost: they go on as the expert's input, ``Routing.rows`` [N, D], so A and B learn from what
the expert makes of them.

What the paper factorises is the gate projection of a gated expert, W_g = B_e A_e with B_e [H, r]: there the other
projection sees x. A router hands an expert one input of width D, so B_e is [D, r] here, and everything that the expert
sees has passed through A_e. Without a gate, act(W_1 B_e z) differs from the paper's act(B_e z) only in that its B_e is
the product W_1 B_e; a gated expert is of rank r in both projections here, and in the paper in the gate's alone.

A and B are the router's, so every rank holds all of them (2 E D r numbers). z [T, E, r] is computed for every expert on
the token's own rank, T E D r multiply-adds, and kept for the backward, 4 T E r bytes in float32: 268 MB for 8,192
tokens, 64 experts and r = 128.

Source: arXiv:2501.13074 and the released code, trestad/Autonomy-of-Experts: moe.py (``AoE``), read and run (same ids,
weights and loss), and AoE.py for megablocks, read, which does not renormalise. The paper's d_low is r. The released
balance loss is K times ``balance``, whose value at balance is 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.grouped_gemm import grouped_gemm
from ..kernels.permute import sort_by_expert
from .base import Router, Routing, TokenContext, count_experts, register_router, router_dtype
from .losses import balance_loss
from .selection import check_not_negative, check_top_k


@register_router("aoe")
class AoERouter(Router):
    evidence = "code"
    paper = "Autonomy-of-Experts, arXiv:2501.13074"
    loss_names = ("balance",)
    causal = True
    batch_independent = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        rank: int | None = None,
        renormalise: bool = True,
        balance_weight: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token that go on, K.
            rank: width of z, r; None is a quarter of ``dim``.
            renormalise: divide the K weights by their sum: a softmax over the chosen norms.
            balance_weight: of the loss ``balance``.
            init_std: deviation of the initial A; B begins so that rows are as large as tokens.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        check_not_negative(balance_weight=balance_weight, init_std=init_std)
        rank = max(1, dim // 4) if rank is None else rank
        if not 1 <= rank <= dim:
            raise ValueError(f"rank={rank} of tokens of width {dim}: choose 1 to {dim}, or None for a quarter of it")
        if init_std <= 0:
            raise ValueError(f"init_std={init_std}: choose above 0, or all norms are 0 and have no gradient")
        self.top_k, self.rank, self.renormalise, self.balance_weight = top_k, rank, renormalise, balance_weight
        self.down = nn.Parameter(torch.empty(num_experts, rank, dim).normal_(0, init_std))
        self.up = nn.Parameter(torch.empty(num_experts, dim, rank).normal_(0, 1 / (init_std * (rank * dim) ** 0.5)))

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype, real_T = router_dtype(x_TD), context.real_T
        z_TER = F.linear(x_TD.to(dtype), self.down.to(dtype).flatten(0, 1)).unflatten(1, (self.bank_size, self.rank))
        norm_TE = torch.linalg.vector_norm(z_TER, dim=2)  # its gradient at 0 is 0
        scores_TE = norm_TE.softmax(1)
        weight_TK, index_TK = scores_TE.topk(self.top_k)
        if self.renormalise:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        token, expert, weight = self._list(index_TK, weight_TK, real_T)
        losses = {}
        if self.balance_weight:
            load_E = count_experts(expert, self.bank_size)
            losses["balance"] = self.balance_weight * balance_loss(scores_TE, load_E, real_T)
        return Routing(
            num_tokens=len(x_TD),
            bank_size=self.bank_size,
            token=token,
            expert=expert,
            weight=weight,
            rows=self._go_on(z_TER.flatten(0, 1).index_select(0, token * self.bank_size + expert), expert),
            logits=norm_TE,
            scores=scores_TE,
            losses=losses,
        )

    def _list(self, index_TK: Tensor, weight_TK: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """token, expert and weight [N] of real tokens."""
        tokens, slots = index_TK.shape
        token = torch.arange(tokens, device=index_TK.device).repeat_interleave(slots, output_size=tokens * slots)
        parts = token, index_TK.flatten(), weight_TK.flatten()
        return parts if real_T is None else tuple(part[real_T[token]] for part in parts)

    def _go_on(self, z_NR: Tensor, expert_N: Tensor) -> Tensor:
        """B_e z of each assignment: [N, r] -> [N, D]"""
        order, counts_E, _ = sort_by_expert(expert_N, self.bank_size)
        rows_ND = grouped_gemm(z_NR.index_select(0, order), self.up.to(z_NR.dtype), counts_E)
        return rows_ND.index_select(0, order.argsort())

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        return options | {"rank": 4}, context
