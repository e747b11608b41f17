"""Quantile balancing: what an expert must be offered to be chosen is a quantile of what its tokens offer.

    chosen   = the K highest of  L_te - beta_e                          L the logits, whatever the score
    alpha_t  = the (K+1)-th highest of  L_te - beta_e                   what a token's next expert offers
    quantile = the (m + 1)-th highest over t of  L_te - alpha_t,  m = floor(T K / E)       of each expert
    beta     = ema * beta + (1 - ema) * mean of the quantiles over the step's micro-batches, then less its mean

At beta = quantile exactly m tokens would choose the expert if no alpha moved: coordinate descent on the dual of the
balanced assignment, one step an optimizer step, instead of the fixed steps of loss-free balancing. No loss; no
gradient through beta, which is in the choice only. Weights: the softmax over the K chosen logits
(``softmax_after``), or over all; sigmoid and square-root softplus are divided by their sum for K > 1.

Sources: J. Su, kexue.fm/archives/11619; Megatron-Core 0.19: ``qb_dual_update`` (``moe_utils.py``),
``TopKRouter.quantile_balancing`` (``router.py``), ``_update_router_qb_beta`` (``finalize_model_grads.py``), to which it
was held. It refuses a number of assignments that E does not divide and masks of padding; here m is rounded down and
only real tokens count. Its ranks average what each averaged; here every micro-batch counts once.
"""

from typing import Literal

import torch
from torch import Tensor

from .base import Routing, TokenContext, register_router
from .selection import drop_padding
from .topk import TopKRouter


@register_router("quantile")
class QuantileRouter(TopKRouter):
    evidence = "code"
    paper = "Quantile balancing, kexue.fm/archives/11619; Megatron-Core 0.19"
    requires_by_option = ()
    loss_names = ()
    state_names = ("beta",)
    reductions = {"quantile": "sum", "batches": "sum"}

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax",
        softmax_after: bool | None = None,
        scale: float = 1.0,
        ema: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token, K. At K = E there is nothing to balance, and beta stays 0.
            score: from which the weights are made.
            softmax_after: softmax over the K chosen logits; by default wherever it has a gradient, which is with
                ``score="softmax"`` and K > 1.
            scale: factor of the weights.
            ema: how much of beta stays in an update; 0 replaces it.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range, or options that exclude each other.
        """
        if softmax_after is None:
            softmax_after = score == "softmax" and top_k > 1
        if not 0 <= ema < 1:
            raise ValueError(f"ema={ema}: choose 0 (no memory) to less than 1")
        super().__init__(
            dim=dim,
            num_experts=num_experts,
            top_k=top_k,
            score=score,
            softmax_after=softmax_after,
            renormalise=score != "softmax" and top_k > 1,
            scale=scale,
            init_std=init_std,
        )
        if softmax_after and top_k == 1:
            raise ValueError("softmax_after with top_k=1: every weight would be 1, without a gradient to the router")
        self.ema = ema
        self.register_buffer("beta", torch.zeros(num_experts))

    @property
    def stateful(self) -> bool:
        return self.top_k < self.num_experts

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        offer_TE = logits_TE.detach() - self.beta.to(logits_TE.dtype)
        best = offer_TE.topk(min(self.top_k + 1, self.num_experts), dim=-1)
        index_TK = best.indices[:, : self.top_k]
        index_TK, weight_TK = drop_padding(index_TK, self._weights(logits_TE, scores_TE, index_TK), context.real_T)
        stats = {}
        if self.training and self.stateful:
            stats = self._quantile(logits_TE.detach() - best.values[:, -1:], context.real_T)
        return Routing.from_topk(
            index_TK,
            weight_TK,
            bank_size=self.bank_size,
            logits=logits_TE,
            scores=self._shares(scores_TE),
            stats=stats,
        )

    def _quantile(self, margin_TE: Tensor, real_T: Tensor | None) -> dict[str, Tensor]:
        """What the (floor(T K / E) + 1)-th best real token offers each expert beyond its alpha; 0 without a token."""
        tokens, experts = margin_TE.shape
        batches = torch.full((), int(tokens > 0), device=margin_TE.device)
        if tokens == 0:
            return {"quantile": margin_TE.new_zeros(experts), "batches": batches}
        most = tokens * self.top_k // experts
        if real_T is None:
            return {"quantile": margin_TE.topk(most + 1, dim=0).values[-1], "batches": batches}
        best = margin_TE.masked_fill(~real_T[:, None], -torch.inf).topk(most + 1, dim=0).values
        # how many are real is on the device; their place is not beyond that of all
        place = (real_T.sum() * self.top_k // experts).view(1)
        some = real_T.any()
        return {"quantile": best.index_select(0, place)[0].where(some, 0), "batches": batches * some}

    def update(self, stats: dict[str, Tensor]) -> None:
        batches = stats["batches"]
        quantile_E = stats["quantile"].to(self.beta.dtype) / batches.clamp(min=1)
        beta_E = self.ema * self.beta + (1 - self.ema) * quantile_E
        self.beta.copy_((beta_E - beta_E.mean()).where(batches > 0, self.beta))
