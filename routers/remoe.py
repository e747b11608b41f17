"""ReMoE: a ReLU in place of top-k and softmax, so that the number of experts is each token's own and learned.

    r = relu(W x)          weight = r_e          active where r_e > 0: a token may have any number of experts, or none
    loss l1 = coefficient * E / (k T^2) * sum_e n_e sum_t r_te              n_e = active tokens of expert e

The weights are continuous where experts come and go, so no gradient is estimated. The loss is an L1 norm in which busy
experts weigh more; its coefficient steers the mean number of experts to k, after each optimizer step:

    coefficient <- coefficient * 1.2 where active pairs / (T E) > k / E, else / 1.2                  from 1e-8

At the start about half of all experts are active, and training costs accordingly until the coefficient has grown.
No token is dropped. ``scores`` are the shares r / sum r, and 1/E each for a token without an expert.

Source: arXiv:2412.14711 and the released code, thu-ml/ReMoE, megatron/core/transformer/moe/router.py ``ReLURouter`` and
megatron/training/training.py, read, and its loss function run: same values. There one coefficient follows the mean
density of all layers; here each router has its own, so every layer comes to k and not only their mean. Density is over
all pairs of the step's micro-batches and ranks together; there it is the mean of their densities, which is the same
where they are equally long.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GatedRouter, Routing, TokenContext, register_router, router_dtype
from .selection import check_mean_top_k, check_not_negative


@register_router("remoe")
class ReMoERouter(GatedRouter):
    evidence = "code"
    paper = "ReMoE, arXiv:2412.14711"
    loss_names = ("l1",)
    state_names = ("coefficient",)
    reductions = {"load": "sum", "tokens": "sum"}
    causal = True
    batch_independent = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: float = 2.0,
        coefficient: float = 1e-8,
        multiplier: float = 1.2,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token on average, k, to which the coefficient steers.
            coefficient: of the loss ``l1`` at the start.
            multiplier: by which the coefficient moves each step.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_not_negative(init_std=init_std)
        check_mean_top_k(top_k, num_experts)
        if not 0 < coefficient < math.inf:
            raise ValueError(f"coefficient={coefficient}: choose above 0, since it only moves by factors")
        if not 1 <= multiplier < math.inf:
            raise ValueError(f"multiplier={multiplier}: choose at least 1; 1 keeps the coefficient as it is")
        self.top_k, self.multiplier = top_k, multiplier
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))
        self.register_buffer("coefficient", torch.tensor(float(coefficient)))

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        dtype = router_dtype(x_TD)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.relu()

    def logits_of(self, scores_TE: Tensor) -> Tensor:
        return scores_TE

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        active_TE, real_T = scores_TE > 0, context.real_T
        tokens = torch.full((), len(scores_TE), device=scores_TE.device) if real_T is None else real_T.sum()
        if real_T is not None:
            active_TE = active_TE & real_T[:, None]
        load_E = active_TE.sum(0)
        norm = (load_E * scores_TE.masked_fill(~active_TE, 0).sum(0)).sum() / tokens.clamp(min=1).square()
        sum_T1 = scores_TE.sum(1, keepdim=True)
        return Routing.from_mask(
            active_TE,
            scores_TE,
            logits=logits_TE,
            scores=torch.where(sum_T1 > 0, scores_TE / sum_T1.masked_fill(sum_T1 <= 0, 1), 1 / self.bank_size),
            losses={"l1": self.coefficient.to(norm.dtype) * self.bank_size / self.top_k * norm},
            stats={"load": load_E, "tokens": tokens},
        )

    def update(self, stats: dict[str, Tensor]) -> None:
        active, wanted = stats["load"].sum().double(), self.top_k * stats["tokens"].double()
        direction = torch.where(active > wanted, 1.0, -1.0).masked_fill(wanted == 0, 0.0)
        self.coefficient *= (self.multiplier**direction).to(self.coefficient.dtype)
        limits = torch.finfo(self.coefficient.dtype)
        self.coefficient.clamp_(limits.tiny, limits.max)  # from 0 or infinity no factor leads back

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        return options | {"top_k": 1.0}, context  # an untrained router has E / 2 active: the coefficient rises
