"""Noisy top-k: noise on the logits in training, and two losses that balance the experts.

    form "shazeer"    H = x W_g + N(0, 1) * (softplus(x W_n) + 0.01)      weight = softmax over the K highest of H
    form "vmoe"       H = x W_g + N(0, 1) / E                             weight = softmax(H), the K highest, raw

    importance = CV^2_e( sum_t G_te )    G: "shazeer": the weights, 0 where not chosen; "vmoe": softmax(x W_g), no noise
    load       = CV^2_e( sum_t P_te )    P_te = Phi( (x W_g - threshold)_te / deviation_te )

CV^2 is the squared coefficient of variation. P_te is the probability that e is among the K of token t if its noise
alone were drawn again: the smooth load, through which the balance reaches the gate. The threshold is what e must
exceed, for "shazeer" the K-th highest of H_t without e, for "vmoe" the K-th highest of H_t. There is no load loss in
evaluation, without noise, or where K = E. ``noise_std`` multiplies the noise.

With "shazeer" and K = 1 the one weight is 1 and the gate learns from the load loss alone. W_g and W_n start from 0, as
the paper has it, so that the load starts even; "vmoe" starts from N(0, 1 / sqrt(D)).

It is not made of the three steps of a ``GatedRouter``: its losses need the logits without noise besides.

Sources, both code files read: ``tensorflow/tensor2tensor`` tensor2tensor/utils/expert_utils.py for Shazeer et al.,
arXiv:1701.06538, equations 3 to 11 (the 0.01 in the noise is the code's); ``google-research/vmoe`` vmoe/nn/routing.py
for V-MoE, arXiv:2106.05974, appendix A.2 (without its capacity and batch priority; the losses are those of one group,
the call). V-MoE's configurations weigh each loss by 0.005.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, register_router, router_dtype
from .losses import squared_variation
from .selection import check_not_negative, check_top_k, drop_padding

FORMS = ("shazeer", "vmoe")
LEAST_DEVIATION = 1e-2  # tensor2tensor's noise_epsilon


@register_router("noisy_topk")
class NoisyTopKRouter(Router):
    evidence = "code"
    paper = "Shazeer et al., arXiv:1701.06538; V-MoE, arXiv:2106.05974"
    requires_by_option = ("noise",)
    loss_names = ("importance", "load")
    causal = True
    batch_independent = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        form: Literal["shazeer", "vmoe"] = "shazeer",
        noise_std: float = 1.0,
        importance_weight: float = 0.01,
        load_weight: float = 0.01,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token, K.
            form: whose noise and weights.
            noise_std: multiplies the noise; 0 = none.
            importance_weight, load_weight: of the losses ``importance`` and ``load``.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        check_not_negative(noise_std=noise_std, importance_weight=importance_weight, load_weight=load_weight)
        if form not in FORMS:
            raise ValueError(f'form="{form}": choose one of {FORMS}')
        self.top_k, self.form, self.noise_std = top_k, form, noise_std
        self.importance_weight, self.load_weight = importance_weight, load_weight
        if form == "shazeer":
            self.weight = nn.Parameter(torch.zeros(num_experts, dim))
            self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim)) if noise_std else None
        else:
            self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, dim**-0.5))

    @property
    def draws(self) -> bool:
        """Whether there is noise in this mode."""
        return self.training and self.noise_std > 0 and self.num_experts > 1

    @property
    def requires(self) -> tuple[str, ...]:
        return ("noise",) if self.draws else ()

    @property
    def without_gradient(self) -> tuple[str, ...]:
        if self.form == "vmoe":
            return ()
        if self.top_k > 1 or (self.draws and self.load_weight):
            return () if self.draws else ("noise_weight",)
        # the softmax over one expert is 1 whatever the token is
        return ("tokens", "weight", "noise_weight")

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype, real_T, deviation = router_dtype(x_TD), context.real_T, None
        x_TD = x_TD.to(dtype)
        clean_TE = logits_TE = F.linear(x_TD, self.weight.to(dtype))
        if self.draws:
            deviation = self._deviation(x_TD)
            logits_TE = clean_TE + context.noise(*clean_TE.shape).to(dtype) * deviation
        scores_TE = logits_TE.softmax(-1)
        index_TK = logits_TE.detach().topk(self.top_k, dim=-1).indices
        if self.form == "shazeer":
            weight_TK = logits_TE.gather(1, index_TK).softmax(-1)
            gates_TE = torch.zeros_like(scores_TE).scatter(1, index_TK, weight_TK)
        else:
            weight_TK = scores_TE.gather(1, index_TK)
            gates_TE = clean_TE.softmax(-1)
        losses = {}
        if self.importance_weight:
            losses["importance"] = self.importance_weight * squared_variation(_total(gates_TE, real_T))
        if self.load_weight and self.draws and self.top_k < self.num_experts:
            load_E = _total(self._chance(logits_TE, clean_TE, deviation), real_T)
            losses["load"] = self.load_weight * squared_variation(load_E)
        index_TK, weight_TK = drop_padding(index_TK, weight_TK, real_T)
        return Routing.from_topk(
            index_TK, weight_TK, bank_size=self.bank_size, logits=logits_TE, scores=scores_TE, losses=losses
        )

    def _deviation(self, x_TD: Tensor) -> Tensor | float:
        """Of the noise, [T, E] or one for all."""
        if self.form == "vmoe":
            return self.noise_std / self.num_experts
        return self.noise_std * (F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype))) + LEAST_DEVIATION)

    def _chance(self, noisy_TE: Tensor, clean_TE: Tensor, deviation: Tensor | float) -> Tensor:
        """P: the probability to be among the K if one's own noise were drawn again. [T, E]"""
        kth_T1, next_T1 = noisy_TE.topk(self.top_k + 1, dim=-1).values[:, -2:].split(1, dim=-1)
        threshold = kth_T1
        if self.form == "shazeer":
            # without one of the K, the next best becomes the K-th
            threshold = torch.where(noisy_TE > next_T1, next_T1, kth_T1)
        return torch.special.ndtr((clean_TE - threshold) / deviation)


def _total(values_TE: Tensor, real_T: Tensor | None) -> Tensor:
    """The sum over real tokens. [T, E] -> [E]"""
    return (values_TE if real_T is None else values_TE.masked_fill(~real_T[:, None], 0)).sum(0)
