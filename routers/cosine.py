"""Cosine routing of X-MoE: experts are directions in a small space, so that no expert wins by the length of its vector.

    h_t  = W x_t + b                                      [P], P = 256
    L_te = exp(min(s, ln 100)) * cos(h_t, v_e)            s learned, from ln(1 / temperature)
    p    = softmax(L);  the K highest;  weight p, or p / sum of the K where ``renormalise``

A logit is at most exp(s) in size, 2 at the start, so that the first choices are nearly even; above s = ln 100 the
scale has no gradient. Neither the length of a token nor that of an expert's vector matters.

Sources: X-MoE, arXiv:2204.09179; projection, scale, its bound and the initial deviations as in Tutel's
``gates/cosine_top.py``, to which it was held. Tutel divides by the sum of the K for K > 1: ``renormalise``.
"""

import math

import torch
from torch import Tensor, nn

from ..kernels.cosine import cosine
from .base import GatedRouter, Routing, TokenContext, apply_linear, count_experts, register_router, router_dtype
from .losses import balance_loss
from .selection import check_not_negative, check_top_k, drop_padding

MAX_LOG_SCALE = math.log(100)


@register_router("cosine")
class CosineRouter(GatedRouter):
    evidence = "code"
    paper = "X-MoE, arXiv:2204.09179"
    loss_names = ("balance",)
    causal = True
    batch_independent = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        projection_dim: int = 256,
        temperature: float = 0.5,
        renormalise: bool = False,
        balance_weight: float = 0.0,
        init_std: float = 0.01,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token, K.
            projection_dim: width of the space in which angles are taken, P.
            temperature: initial one; the logits are cosines divided by it. It is learned.
            renormalise: divide the K weights by their sum.
            balance_weight: of the loss ``balance``.
            init_std: deviation of the experts' initial vectors; their directions do not depend on it.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        check_not_negative(balance_weight=balance_weight, init_std=init_std)
        if projection_dim < 1:
            raise ValueError(f"projection_dim={projection_dim}: choose at least 1")
        if not math.exp(-MAX_LOG_SCALE) <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: choose at least 0.01, below which the scale has no gradient")
        if not init_std > 0:
            raise ValueError(f"init_std={init_std}: choose above 0, since a vector of length 0 has no direction")
        self.top_k, self.renormalise, self.balance_weight = top_k, renormalise, balance_weight
        self.projection = nn.Linear(dim, projection_dim)
        self.directions = nn.Parameter(torch.empty(num_experts, projection_dim).normal_(0, init_std))
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    @property
    def without_gradient(self) -> tuple[str, ...]:
        # one weight divided by itself is 1 whatever the token is
        one = self.top_k == 1 and self.renormalise and not self.balance_weight
        return ("tokens", "projection", "directions", "log_scale") if one else ()

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        h_TP = apply_linear(self.projection, x_TD.to(router_dtype(x_TD)))
        scale = self.log_scale.to(h_TP.dtype).clamp(max=MAX_LOG_SCALE).exp()
        return scale * cosine(h_TP, self.directions.to(h_TP.dtype))

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        weight_TK, index_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.renormalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        index_TK, weight_TK = drop_padding(index_TK, weight_TK, context.real_T)
        losses = {}
        if self.balance_weight:
            load_E = count_experts(index_TK, self.bank_size)
            losses["balance"] = self.balance_weight * balance_loss(scores_TE, load_E, context.real_T)
        return Routing.from_topk(
            index_TK, weight_TK, bank_size=self.bank_size, logits=logits_TE, scores=scores_TE, losses=losses
        )
