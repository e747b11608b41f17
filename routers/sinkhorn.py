"""Sinkhorn: the experts of a token are its best in a plan that gives all experts the same share of the tokens.

    logits = W x
    plan   = r_t exp(logits_te) c_e,   r and c by turns such that   sum_e plan_te = 1/T   and   sum_t plan_te = 1/E
    training     chosen = the K highest of the plan's row      (no gradient)
    evaluation   chosen = the K highest logits
    weight = sigmoid(logits) where K = 1, else softmax(logits) over all experts

Scaling starts at c = 1 and ends when c changes by at most 1e-4 in the mean. A row's factor r_t takes up any shift of
its logits, so each row is shifted to a maximum of 0 first: the plan is the same and nothing overflows. The end of the
scaling is a mask over a fixed number of rounds, so that no round makes the host wait for the device; on the CPU, where
a look costs nothing, the rounds that would change nothing are left out.
No loss, no state. In training a decision depends on the whole local batch; in evaluation on the token alone.

Source: ``sinkhorn`` and ``sinkhorn_load_balancing`` of Megatron-Core (NVIDIA/Megatron-LM,
megatron/core/transformer/moe/moe_utils.py and router.py), read. It adds 1e-8 to the sums that it divides by, which
leaves an expert whose column is that small short of its share; here only 0 is guarded against.
The idea is S-BASE's (Clark et al., arXiv:2202.01169), which was not read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GatedRouter, Routing, TokenContext, register_router, router_dtype
from .selection import check_not_negative, check_top_k, drop_padding

TOLERANCE = 1e-4


@register_router("sinkhorn")
class SinkhornRouter(GatedRouter):
    evidence = "code"
    paper = "Megatron-Core; S-BASE, arXiv:2202.01169"

    def __init__(
        self, *, dim: int, num_experts: int, top_k: int = 1, max_rounds: int = 100, init_std: float = 0.02
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token, K.
            max_rounds: the scaling ends after so many rounds at the latest.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        check_not_negative(init_std=init_std)
        if max_rounds < 1:
            raise ValueError(f"max_rounds={max_rounds}: choose at least 1")
        self.top_k, self.max_rounds = top_k, max_rounds
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))

    @property
    def causal(self) -> bool:
        return not self.training

    @property
    def batch_independent(self) -> bool:
        return not self.training

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        dtype = router_dtype(x_TD)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(-1)

    def logits_of(self, scores_TE: Tensor) -> Tensor:
        if self.top_k == 1:
            return scores_TE.logit(torch.finfo(scores_TE.dtype).eps)
        return super().logits_of(scores_TE)

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        rank_TE = logits_TE.detach()
        if self.training:
            rank_TE = sinkhorn(rank_TE, context.real_T, self.max_rounds)
        index_TK = rank_TE.topk(self.top_k, dim=-1).indices
        index_TK, weight_TK = drop_padding(index_TK, scores_TE.gather(1, index_TK), context.real_T)
        shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
        return Routing.from_topk(index_TK, weight_TK, bank_size=self.bank_size, logits=logits_TE, scores=shares_TE)


@torch.compiler.disable  # compiled, every round would be unrolled into the graph
@torch.no_grad()
def sinkhorn(logits_TE: Tensor, real_T: Tensor | None = None, max_rounds: int = 100) -> Tensor:
    """exp(logits) with rows and columns scaled by turns to sums of 1/T and 1/E: [T, E].

    Columns are scaled last, so their sums are exact and the rows' as good as the scaling got. Padded tokens (``real_T``
    False) have rows of 0 and no share.
    """
    tokens, experts = logits_TE.shape
    kernel_TE = (logits_TE - logits_TE.amax(1, keepdim=True)).exp()
    if real_T is not None:
        kernel_TE = kernel_TE * real_T[:, None]
        tokens = real_T.sum().clamp(min=1)
    smallest = torch.finfo(kernel_TE.dtype).tiny
    column_E, done = kernel_TE.new_ones(experts), torch.zeros((), dtype=torch.bool, device=kernel_TE.device)
    row_T = kernel_TE.new_zeros(len(kernel_TE))
    for _ in range(max_rounds):
        next_row_T = 1 / (tokens * (kernel_TE @ column_E).clamp(min=smallest))
        if real_T is not None:
            next_row_T = next_row_T * real_T
        next_column_E = 1 / (experts * (next_row_T @ kernel_TE).clamp(min=smallest))
        change = (next_column_E - column_E).abs().mean()
        row_T, column_E = torch.where(done, row_T, next_row_T), torch.where(done, column_E, next_column_E)
        done = done | (change <= TOLERANCE)
        if done.device.type == "cpu" and done:
            break
    return row_T[:, None] * kernel_TE * column_E
