"""LongCat-Flash: some of the experts return the token itself, so that a token takes as much computation as it needs.

    p      = softmax(W x) over N feed-forwards and Z identities
    chosen = the K highest of  p + b                             the bias is in the choice only
    y      = sum over chosen i of  scale * p_i * E_i(x)          E_i(x) = x for an identity; not divided by any sum

    b_i += rate * (K_e / (K N) - load_i / sum_j load_j)          for the feed-forwards; 0 for the identities, always

The update asks of each feed-forward an N-th of K_e assignments a token. Once all have that, the identities take the
other K - K_e together; how they share them is free, and needs no balance.

Sources: LongCat-Flash, arXiv:2509.01322. The gate was read, and is held to, in transformers' ``longcat_flash`` (which
does not train the bias). The update is the report's equation 2, read in published summaries of it, not in the report
itself; it calls this a PID controller, of which the bias is the integral part. The default rate is a guess; the report
lets it decay. Its device-level balance loss is not here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GatedRouter, Routing, TokenContext, count_experts, register_router, router_dtype
from .selection import check_not_negative, check_top_k, drop_padding


@register_router("longcat")
class LongCatRouter(GatedRouter):
    evidence = "code"
    paper = "LongCat-Flash, arXiv:2509.01322"
    state_names = ("bias",)
    causal = True
    batch_independent = True
    reductions = {"load": "sum"}

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        identity_experts: int | None = None,
        real_experts: float | None = None,
        scale: float = 6.0,
        bias_rate: float = 1e-3,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: feed-forwards, N.
            top_k: experts a token, K, identities among them.
            identity_experts: Z; by default half as many as feed-forwards, rounded up (the model has 512 and 256).
            real_experts: feed-forwards a token on average, K_e; by default K N / (N + Z), which is the model's 8 of 12.
            scale: factor of the weights.
            bias_rate: of the update; 0 leaves the bias where it is.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        if identity_experts is None:
            identity_experts = (num_experts + 1) // 2
        if identity_experts < 0:
            raise ValueError(f"identity_experts={identity_experts}: choose at least 0")
        kinds = ("routed",) * num_experts + ("copy",) * identity_experts
        super().__init__(num_experts=num_experts, expert_kinds=kinds)
        check_top_k(top_k, self.bank_size)
        check_not_negative(scale=scale, bias_rate=bias_rate, init_std=init_std)
        if real_experts is None:
            real_experts = top_k * num_experts / self.bank_size
        least, most = max(0, top_k - identity_experts), min(top_k, num_experts)
        if not least <= real_experts <= most:
            given = f"real_experts={real_experts} with top_k={top_k}, {num_experts} feed-forwards and"
            raise ValueError(f"{given} {identity_experts} identities: choose {least} to {most}")
        self.top_k, self.real_experts, self.scale, self.bias_rate = top_k, real_experts, scale, bias_rate
        self.weight = nn.Parameter(torch.empty(self.bank_size, dim).normal_(0, init_std))
        self.register_buffer("bias", torch.zeros(self.bank_size))

    @property
    def stateful(self) -> bool:
        # where every expert is chosen there is nothing to steer
        return self.bias_rate != 0 and self.top_k < self.bank_size

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        dtype = router_dtype(x_TD)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        index_TK = (scores_TE.detach() + self.bias.to(scores_TE.dtype)).topk(self.top_k, dim=-1).indices
        index_TK, weight_TK = drop_padding(index_TK, self.scale * scores_TE.gather(1, index_TK), context.real_T)
        return Routing.from_topk(
            index_TK,
            weight_TK,
            bank_size=self.bank_size,
            logits=logits_TE,
            scores=scores_TE,
            stats={"load": count_experts(index_TK, self.bank_size)} if self.stateful else {},
        )

    def update(self, stats: dict[str, Tensor]) -> None:
        load_E = stats["load"].to(self.bias.dtype)
        total = load_E.sum()
        share_N = load_E[: self.num_experts] / total.clamp(min=1)
        error_N = self.real_experts / (self.top_k * self.num_experts) - share_N
        self.bias[: self.num_experts] += self.bias_rate * error_N * (total > 0)
