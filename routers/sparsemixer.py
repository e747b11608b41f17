"""SparseMixer-v2: two experts, drawn one after the other, and the gradient of the draw estimated by Heun's method.

    candidates  the experts with  (max l - l_e) / max(|l_e|, max l) <= 2 jitter            l = W x
    p           softmax of l over the candidates
    chosen      evaluation: the highest; training: drawn from p, by the largest l_e + Gumbel noise
    weight      p of the chosen

    and again for the second expert, with the first at -inf, candidates and p anew.

In training, where the drawn expert is not the most probable one, the VALUE of its weight is a third of p with
probability 3/4, and the gradient stays that of p: the layer after it is differentiated at that point, which makes of
the expectation the third-order Heun estimate of the routing's gradient. The two weights do not sum to 1: each is near 1
where one expert stands out.

Sources: GRIN, arXiv:2409.12136; SparseMixer, arXiv:2310.00811; Hugging Face transformers, modeling_phimoe.py
``sparsemixer``, read and compared with: same ids, weights and gradients, also in training with the same random numbers.
As there, a third is 0.3333. The jitter of the layer's input, which PhiMoE has besides, is not here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, count_experts, register_router, router_dtype
from .losses import balance_loss
from .selection import check_not_negative, drop_padding

THIRD = 0.3333


@register_router("sparsemixer")
class SparseMixerRouter(Router):
    evidence = "code"
    paper = "SparseMixer-v2 (GRIN), arXiv:2409.12136"
    requires_by_option = ("noise",)
    unused_options = ("top_k",)  # it is 2
    loss_names = ("balance",)
    causal = True
    batch_independent = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        jitter: float = 0.01,
        balance_weight: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token; the method is for 2.
            jitter: half the relative distance from the highest logit within which an expert is a candidate. A lone
                candidate weighs 1, without gradient.
            balance_weight: of the loss ``balance``.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_not_negative(balance_weight=balance_weight, init_std=init_std)
        if top_k != 2 or num_experts < 2:
            raise ValueError(
                f"top_k={top_k} with {num_experts} experts: SparseMixer chooses 2 of at least 2; for others use topk"
            )
        if not 0 <= jitter < math.inf:
            raise ValueError(f"jitter={jitter}: choose a finite number of at least 0; 0 leaves ties only")
        self.jitter, self.balance_weight = jitter, balance_weight
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))

    @property
    def requires(self) -> tuple[str, ...]:
        return ("noise",) if self.training else ()

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype = router_dtype(x_TD)
        logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        first_T1, first_weight_T1 = self._draw(logits_TE, context, stream=0)
        rest_TE = logits_TE.scatter(1, first_T1, -torch.inf)
        second_T1, second_weight_T1 = self._draw(rest_TE, context, stream=2)
        index_TK, weight_TK = drop_padding(
            torch.cat([first_T1, second_T1], 1), torch.cat([first_weight_T1, second_weight_T1], 1), context.real_T
        )
        scores_TE = logits_TE.softmax(1)
        losses = {}
        if self.balance_weight:
            load_E = count_experts(index_TK, self.bank_size)
            losses["balance"] = self.balance_weight * balance_loss(scores_TE, load_E, context.real_T)
        return Routing.from_topk(
            index_TK, weight_TK, bank_size=self.bank_size, logits=logits_TE, scores=scores_TE, losses=losses
        )

    def _draw(self, logits_TE: Tensor, context: TokenContext, stream: int) -> tuple[Tensor, Tensor]:
        """One expert a token and its weight, both [T, 1]."""
        known_TE = logits_TE.detach()
        highest_T1, best_T1 = known_TE.max(1, keepdim=True)
        distance_TE = (highest_T1 - known_TE) / torch.maximum(known_TE.abs(), highest_T1)
        candidate_TE = logits_TE.masked_fill(distance_TE > 2 * self.jitter, -torch.inf)
        p_TE = candidate_TE.softmax(1)
        if not self.training:
            return best_T1, p_TE.gather(1, best_T1)
        uniform_TE = context.noise(*logits_TE.shape, distribution="uniform", stream=stream).to(logits_TE.dtype)
        drawn_T1 = (candidate_TE.detach() - (-uniform_TE.log()).log()).argmax(1, keepdim=True)
        weight_T1 = p_TE.gather(1, drawn_T1)
        uniform_T1 = context.noise(len(logits_TE), 1, distribution="uniform", stream=stream + 1)
        whole_T1 = (drawn_T1 == best_T1) | (uniform_T1 > 0.75)
        # the value of a third, the gradient of the whole
        return drawn_T1, torch.where(whole_T1, weight_T1, weight_T1 - ((1 - THIRD) * weight_T1).detach())

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        return options | {"jitter": 0.5}, context  # so that few tokens show draws, and weights other than 1
