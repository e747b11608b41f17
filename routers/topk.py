"""Top-k token choice: each token goes to the K experts that score highest for it.

    logits = W x              score = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
    chosen = the K highest of  score + bias       (inside the best groups, where there are groups)
    weight = scale * score / (sum of the chosen scores where ``renormalise``)

``softmax_after`` takes the softmax over the K chosen logits instead of over all. The bias is in the choice only, never
in the weight; after each optimizer step  bias_e += bias_rate * sign(mean load - load_e)  (loss-free balancing).

Sources: Shazeer et al., arXiv:1701.06538; Switch, arXiv:2101.03961 (K = 1, capacity, balance loss, jitter); ST-MoE,
arXiv:2202.08906 (z-loss); DeepSeek-V3, arXiv:2412.19437 (sigmoid, bias, groups, scale), and its inference code;
loss-free balancing, arXiv:2408.15664; capacity and drop policies as in Megatron-Core's
``apply_router_token_dropping`` ("choice": flaxformer's order), square-root softplus as in its ``sqrtsoftplus``.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GatedRouter, Routing, TokenContext, count_experts, register_preset, register_router, router_dtype
from .losses import balance_loss, z_loss
from .selection import (
    check_drop,
    check_jitter,
    check_not_negative,
    check_top_k,
    drop_padding,
    jittered,
    keep_within_capacity,
)

NEARLY_ZERO = 1e-20  # DeepSeek-V3's; sigmoids of very low logits may all be 0
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


@register_router("topk")
class TopKRouter(GatedRouter):
    evidence = "code"
    paper = "Shazeer et al., arXiv:1701.06538"
    requires_by_option = ("noise",)
    loss_names = ("balance", "z")
    state_names = ("bias",)
    reductions = {"load": "sum"}
    causal_option = 'drop_policy="position"'

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax",
        softmax_after: bool = False,
        renormalise: bool = False,
        scale: float = 1.0,
        capacity_factor: float | None = None,
        drop_policy: Literal["position", "probability", "choice"] = "position",
        jitter: float = 0.0,
        balance_weight: float = 0.0,
        z_weight: float = 0.0,
        bias_rate: float = 0.0,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: Literal["max", "top2_sum"] = "max",
        linear_bias: bool = False,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token, K.
            score: of an expert for a token.
            softmax_after: softmax over the K chosen logits; needs ``score="softmax"``.
            renormalise: divide the K weights by their sum.
            scale: factor of the weights (DeepSeek-V3: 2.5).
            capacity_factor: an expert keeps at most ceil(capacity_factor * K * T / E) assignments; None drops nothing.
            drop_policy: which assignments a full expert keeps: the first, those of highest weight, or every token's
                first choice before any second one.
            jitter: in training the router's input is multiplied by U(1 - jitter, 1 + jitter), elementwise.
            balance_weight, z_weight: of the losses ``balance`` and ``z``.
            bias_rate: step of the selection bias (1e-3 in the papers); 0 = no bias.
            num_groups, top_groups: experts form groups of neighbours; only the ``top_groups`` best may be chosen from.
            group_score: of a group: its best expert (DeepSeek-V2), or the sum of its two best (DeepSeek-V3).
            linear_bias: a learned bias of the logits, from 0 (GPT-OSS); not the selection bias.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range, or options that exclude each other.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        if score not in SCORES:
            raise ValueError(f'score="{score}": choose one of {SCORES}')
        if softmax_after and (score != "softmax" or bias_rate):
            raise ValueError(
                'softmax_after needs score="softmax" and no bias_rate: the softmax is over the chosen logits'
            )
        if group_score not in ("max", "top2_sum"):
            raise ValueError(f'group_score="{group_score}": choose "max" or "top2_sum"')
        if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
            raise ValueError(
                f"num_groups={num_groups}, top_groups={top_groups}: groups must divide {num_experts} experts, and "
                "top_groups be 1 to num_groups"
            )
        if top_k > (open_experts := num_experts // num_groups * top_groups):
            raise ValueError(
                f"top_k={top_k}: the {top_groups} best of {num_groups} groups hold {open_experts} experts; "
                "take more groups"
            )
        check_jitter(jitter)
        check_drop(capacity_factor, drop_policy)
        check_not_negative(
            scale=scale, balance_weight=balance_weight, z_weight=z_weight, bias_rate=bias_rate, init_std=init_std
        )
        self.top_k, self.score, self.softmax_after = top_k, score, softmax_after
        self.renormalise, self.scale, self.jitter = renormalise, scale, jitter
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy
        self.balance_weight, self.z_weight, self.bias_rate = balance_weight, z_weight, bias_rate
        self.num_groups, self.top_groups, self.group_score = num_groups, top_groups, group_score
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))
        self.linear_bias = nn.Parameter(torch.zeros(num_experts)) if linear_bias else None
        if bias_rate:
            self.register_buffer("bias", torch.zeros(num_experts))

    @property
    def requires(self) -> tuple[str, ...]:
        return ("noise",) if self.jitter and self.training else ()

    @property
    def without_gradient(self) -> tuple[str, ...]:
        # one weight divided by itself is 1 whatever the token is
        one = self.top_k == 1 and (self.renormalise or self.softmax_after)
        parameters = () if self.linear_bias is None else ("linear_bias",)
        return ("tokens", "weight", *parameters) if one and not (self.balance_weight or self.z_weight) else ()

    @property
    def causal(self) -> bool:
        return self.capacity_factor is None or self.drop_policy == "position"

    @property
    def batch_independent(self) -> bool:
        return self.capacity_factor is None

    @property
    def stateful(self) -> bool:
        return self.bias_rate != 0

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        dtype = router_dtype(x_TD)
        x_TD = x_TD.to(dtype)
        if self.jitter and self.training:
            x_TD = jittered(x_TD, self.jitter, context)
        bias_E = None if self.linear_bias is None else self.linear_bias.to(dtype)
        return F.linear(x_TD, self.weight.to(dtype), bias_E)

    def scores(self, logits_TE: Tensor) -> Tensor:
        if self.score == "softmax":
            return logits_TE.softmax(-1)
        if self.score == "sigmoid":
            return logits_TE.sigmoid()
        # a floor, because the square root of 0 has no gradient
        return F.softplus(logits_TE).clamp(min=torch.finfo(logits_TE.dtype).tiny).sqrt()

    def logits_of(self, scores_TE: Tensor) -> Tensor:
        if self.score == "softmax":
            return super().logits_of(scores_TE)
        if self.score == "sigmoid":
            return scores_TE.logit(torch.finfo(scores_TE.dtype).eps)
        softplus_TE = scores_TE.square().clamp(min=torch.finfo(scores_TE.dtype).tiny)
        return softplus_TE + (-torch.expm1(-softplus_TE)).log()

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        real_T = context.real_T
        index_TK = self._choose(scores_TE.detach())
        index_TK, weight_TK = drop_padding(index_TK, self._weights(logits_TE, scores_TE, index_TK), real_T)
        requested = None
        if self.capacity_factor is not None:
            requested, keep_TK = index_TK, self._within_capacity(index_TK, weight_TK, real_T)
            index_TK, weight_TK = index_TK.masked_fill(~keep_TK, -1), weight_TK.masked_fill(~keep_TK, 0)

        shares_TE = self._shares(scores_TE)
        load_E = count_experts(index_TK if requested is None else requested, self.bank_size)
        losses = {}
        if self.balance_weight:
            losses["balance"] = self.balance_weight * balance_loss(shares_TE, load_E, real_T)
        if self.z_weight:
            losses["z"] = self.z_weight * z_loss(logits_TE, real_T)
        return Routing.from_topk(
            index_TK,
            weight_TK,
            bank_size=self.bank_size,
            logits=logits_TE,
            scores=shares_TE,
            requested=requested,
            losses=losses,
            stats={"load": load_E} if self.bias_rate else {},
        )

    def _choose(self, scores_TE: Tensor) -> Tensor:
        """Scores [T, E] -> ids [T, K], the best first."""
        if self.bias_rate:
            scores_TE = scores_TE + self.bias.to(scores_TE.dtype)
        if self.num_groups > 1:
            grouped = scores_TE.unflatten(1, (self.num_groups, -1))
            best = 1 if self.group_score == "max" else min(2, grouped.shape[-1])
            group_TG = grouped.topk(best, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1, sorted=False).indices
            open_TG = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, group_TG, True)
            scores_TE = grouped.masked_fill(~open_TG[..., None], -torch.inf).flatten(1)
        return scores_TE.topk(self.top_k, dim=-1).indices

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, index_TK: Tensor) -> Tensor:
        """Of the chosen experts. [T, K]"""
        if self.softmax_after:
            weight_TK = logits_TE.gather(1, index_TK).softmax(-1)
        else:
            weight_TK = scores_TE.gather(1, index_TK)
        if self.renormalise:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + NEARLY_ZERO)
        return weight_TK * self.scale

    def _shares(self, scores_TE: Tensor) -> Tensor:
        """Scores whose rows sum to 1. [T, E]"""
        return scores_TE if self.score == "softmax" else scores_TE / (scores_TE.sum(-1, keepdim=True) + NEARLY_ZERO)

    def _within_capacity(self, index_TK: Tensor, weight_TK: Tensor, real_T: Tensor | None) -> Tensor:
        tokens = len(index_TK) if real_T is None else real_T.sum().double()
        capacity = self.capacity_factor * self.top_k * tokens / self.num_experts
        return keep_within_capacity(index_TK, weight_TK, self.num_experts, capacity, self.drop_policy)

    def update(self, stats: dict[str, Tensor]) -> None:
        load_E = stats["load"].double()  # exact: float32 has no odd counts beyond 2^24, and a sign knows no rounding
        self.bias += self.bias_rate * (load_E.mean() - load_E).sign()


register_preset(
    "switch", "topk", paper="Switch, arXiv:2101.03961", top_k=1, capacity_factor=1.25, balance_weight=0.01, jitter=0.01
)
# the 671B model has num_groups=8 and top_groups=4 besides, which is the model's to say: groups must divide the experts
register_preset(
    "deepseek_v3",
    "topk",
    paper="DeepSeek-V3, arXiv:2412.19437",
    score="sigmoid",
    renormalise=True,
    scale=2.5,
    bias_rate=1e-3,
    group_score="top2_sum",
)
register_preset(
    "ernie4_5", "topk", paper="ERNIE 4.5; transformers modeling_ernie4_5_moe", renormalise=True, bias_rate=1e-3
)
# its experts run beside one that is always on, behind a sigmoid gate: moe.segment.SegmentFeedForward(spec, 1).
# 0.04: the released loss is 0.02 times a sum over both slots
register_preset("time_moe", "topk", paper="Time-MoE, arXiv:2409.16040", top_k=2, balance_weight=0.04)
