"""DiffMoE: experts choose among the tokens of the whole batch, and a predictor learns how many each takes at inference.

    scores = softmax over the experts of W x;  prediction = MLP(x without gradient) [T, E]
    training    expert e takes its k highest scores of the pool, the T tokens of this micro-batch; weight = score
                k = max(1, int(T / E * top_k))
                loss capacity = predictor_weight * BCE(prediction, taken)
                after the step  tau_e <- decay * tau_e + (1 - decay) * q_e
                q_e the k-th largest sigmoid(prediction) of column e, its mean over the step's pools
    inference   n_e = #{t : sigmoid(prediction_te) > tau_e}
                "pool"   expert e takes its n_e highest scores: the released rule, by which a sample's result depends
                         on the rest of the batch
                "token"  expert e takes those n_e tokens: batch-independent

Source: DiffMoE, arXiv:2503.14487, and the released code, whose softmax is not in the paper's eq. 5. "token" is ours.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, apply_linear, register_router, router_dtype
from .selection import check_mean_top_k, check_not_negative, experts_take, tokens_per_expert


@register_router("diffmoe")
class DiffMoERouter(Router):
    evidence = "code"
    paper = "DiffMoE, arXiv:2503.14487"
    selection = "expert"
    loss_names = ("capacity",)
    state_names = ("threshold",)
    reductions = {"quantile": "sum", "pools": "sum"}

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: float = 1.0,
        predictor_weight: float = 1.0,
        threshold_decay: float = 0.95,
        inference: Literal["pool", "token"] = "pool",
        init_std: float = 0.006,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token on average in training (the capacity).
            predictor_weight: of the loss ``capacity`` (1 in the released configuration).
            threshold_decay: of the running thresholds.
            inference: the rule outside training.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_not_negative(predictor_weight=predictor_weight, init_std=init_std)
        check_mean_top_k(top_k, num_experts)
        if not 0 <= threshold_decay < 1:
            raise ValueError(f"threshold_decay={threshold_decay}: choose 0 to less than 1")
        if inference not in ("pool", "token"):
            raise ValueError(f'inference="{inference}": choose "pool" or "token"')
        self.top_k, self.predictor_weight, self.threshold_decay, self.inference = (
            top_k,
            predictor_weight,
            threshold_decay,
            inference,
        )
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))
        self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, num_experts))
        self.register_buffer("threshold", torch.zeros(num_experts))

    @property
    def batch_independent(self) -> bool:
        return not self.training and self.inference == "token"

    @property
    def causal(self) -> bool:
        return self.batch_independent

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype, real_T = router_dtype(x_TD), context.real_T
        x_TD = x_TD.to(dtype)
        if real_T is None:
            real_T = torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)
        logits_TE = F.linear(x_TD, self.weight.to(dtype))
        scores_TE = logits_TE.softmax(-1)
        hidden, activation, out = self.predictor
        prediction_TE = apply_linear(out, activation(apply_linear(hidden, x_TD.detach())))
        chance_TE = prediction_TE.detach().sigmoid()

        losses, stats = {}, {}
        if self.training:
            k_1 = tokens_per_expert(real_T.sum().view(1), self.num_experts, self.top_k)
            taken_TE = experts_take(scores_TE[None], k_1[:, None].expand(1, self.num_experts), real_T[None])[0]
            error_TE = F.binary_cross_entropy_with_logits(prediction_TE, taken_TE.to(dtype), reduction="none")
            error = error_TE.masked_fill(~real_T[:, None], 0).sum() / (real_T.sum() * self.num_experts).clamp(min=1)
            losses["capacity"] = self.predictor_weight * error
            ranked_TE = chance_TE.masked_fill(~real_T[:, None], -torch.inf).sort(dim=0, descending=True).values
            # summed instead of indexed, so that a pool without tokens adds 0
            is_kth_T = torch.arange(len(x_TD), device=x_TD.device) == k_1 - 1
            stats["quantile"] = ranked_TE.where(is_kth_T[:, None], 0).sum(0)
            stats["pools"] = (k_1 > 0).to(dtype)
        else:
            above_TE = (chance_TE > self.threshold.to(dtype)) & real_T[:, None]
            taken_TE = above_TE
            if self.inference == "pool":
                taken_TE = experts_take(scores_TE[None], above_TE.sum(0)[None], real_T[None])[0]
        return Routing.from_mask(
            taken_TE,
            scores_TE,
            logits=logits_TE,
            scores=scores_TE,
            prediction=prediction_TE,
            losses=losses,
            stats=stats,
        )

    def update(self, stats: dict[str, Tensor]) -> None:
        quantile_E = (stats["quantile"] / stats["pools"].clamp(min=1)).to(self.threshold.dtype)
        moves = (stats["pools"] > 0).to(self.threshold.dtype)
        self.threshold.lerp_(quantile_E, (1 - self.threshold_decay) * moves)
