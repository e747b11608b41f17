"""Soft MoE: no token chooses and none is dropped; every expert computes a few mixtures of the sample's tokens.

    logits_ts  = scale * norm(x_t) . norm(mu_s)        norm(v) = v / sqrt(|v|^2 + 1e-6);  or x_t . mu_s without scale
    dispatch   = softmax of the logits over the tokens of the sample         slot input  = sum_t dispatch_ts x_t
    combine    = softmax of the logits over the slots                        output of t = sum_s combine_ts f(slot_s)

Expert e has the slots e * slots to (e + 1) * slots - 1, so a sample costs E * slots expert rows whatever its length:
as much as top-k choice with K = E * slots / L. A decision depends on every token of the sample: not causal.

For telemetry ``scores`` [T, E] are the combine weights summed over each expert's slots, and ``logits`` their logarithm
up to a constant of the row. The load counts slots that hold a token, which is the same number for every expert: what an
expert computes is balanced by construction, and whose slots tokens listen to is in ``scores``.

Source: Puigcerver et al., arXiv:2308.00951, and google-research/vmoe, projects/soft_moe/router.py, read (not run: it is
JAX): ``normalise`` is its rule, with ``scale`` learned from 1; without it this is the paper's Algorithm 1. The code can
derive ``slots`` from the length (round(L / E)) and add noise to the logits; here they are given, and there is no noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, register_router, router_dtype


@register_router("soft_moe")
class SoftMoERouter(Router):
    evidence = "code"
    paper = "Soft MoE, arXiv:2308.00951"
    selection = "slot"
    causal = False
    batch_independent = True

    def __init__(self, *, dim: int, num_experts: int, slots: int = 1, normalise: bool = True) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            slots: of each expert, a sample.
            normalise: cosines times a learned scale in place of products.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        if slots < 1:
            raise ValueError(
                f"slots={slots}: choose at least 1 an expert; L / E of them cost as much as one expert a token"
            )
        self.slots, self.normalise = slots, normalise
        self.mu = nn.Parameter(torch.empty(num_experts * slots, dim).normal_(0, dim**-0.5))
        self.scale = nn.Parameter(torch.ones(1)) if normalise else None

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype = router_dtype(x_TD)
        x_TD, mu_SD = x_TD.to(dtype), self.mu.to(dtype)
        if self.normalise:
            x_TD, mu_SD = _unit(x_TD), _unit(mu_SD) * self.scale.to(dtype)
        logits_TS = F.linear(x_TD, mu_SD)
        combine_TS = logits_TS.softmax(1)
        logits_TES, combine_TES = (v.unflatten(1, (self.num_experts, self.slots)) for v in (logits_TS, combine_TS))
        dispatch_BLS, combine_BLS = self._over_tokens(logits_TS, combine_TS, context)
        return Routing(
            num_tokens=len(x_TD),
            bank_size=self.bank_size,
            dispatch=dispatch_BLS,
            combine=combine_BLS,
            logits=logits_TES.logsumexp(2),
            scores=combine_TES.sum(2),
        )

    def _over_tokens(self, logits_TS: Tensor, combine_TS: Tensor, context: TokenContext) -> tuple[Tensor, Tensor]:
        """Both weights [B, L, S], 0 at padded tokens."""
        logits_BLS, combine_BLS = (
            v.unflatten(0, (context.batch_size, context.length)) for v in (logits_TS, combine_TS)
        )
        if context.padding_mask is None:
            return logits_BLS.softmax(1), combine_BLS
        padded_BL1 = ~context.padding_mask[:, :, None]
        # the lowest number and not -inf, which would make NaN of a sample that is all padding
        dispatch_BLS = logits_BLS.masked_fill(padded_BL1, torch.finfo(logits_BLS.dtype).min).softmax(1)
        return dispatch_BLS.masked_fill(padded_BL1, 0), combine_BLS.masked_fill(padded_BL1, 0)

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        return {"dim": options["dim"], "num_experts": options["num_experts"], "slots": 2}, context


def _unit(rows: Tensor) -> Tensor:
    return rows * (rows.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
