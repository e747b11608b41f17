"""OpenMoE's router: softmax top-2 with raw weights, experts of limited capacity, first choices before second ones.

    p = softmax(W x)                      float32, no bias, W ~ N(0, 0.02)
    chosen = the K highest of p           weight = p, not renormalised

Tokens form groups of S neighbours, in which an expert keeps at most C assignments:

    flaxformer   C = max(4, round(f S / E))                              S at most 4096; K does not enter
    colossalai   C = max(4, floor(K f S / E) made even upwards)          S = all tokens of the call

with f = 1.25 in training and 2.0 in evaluation. Every token's first choice comes before any second one, each in token
order; the first C that ask for an expert get it. A dropped choice adds nothing, and the token's other choice keeps its
raw weight. So with flaxformer's rule and K = 2 at least 37.5 % of the choices are dropped in training, and what is
dropped lies towards the end of a group; the second choice of an early token depends on later tokens.

    balance = mean over groups of  E^2 mean_e(m_e P_e)     m_e: share of tokens that chose e, before capacity
    z       = mean_t (logsumexp_e logits_te)^2             balance is K where all is even, z is (ln E)^2

Source: OpenMoE, arXiv:2402.01739, equations 1 and 2, and both code bases, read: ``XueFuzhao/flaxformer``
architectures/moe/routing.py and moe_layers.py (it trained the models); ``Orion-Zheng/ColossalAI`` branch my_openmoe,
colossalai/moe/routers.py (the port behind the released analyses, which draws W ~ N(0, sqrt(0.1 / D))). The port's
Top2Router was run beside this one: it keeps the same pairs, with weights and losses equal to 1e-6 in float32.

Three things differ here. flaxformer also wants the number of groups to be a multiple of the experts' copies, and
shrinks the groups until it is; here groups are of ``group_size`` tokens, the last one of what is left, and the mean
over groups counts tokens, which is the same where the groups are equal. The models trained with padding taking
capacity; here it takes none. ColossalAI's jitter of the logits (never used) is left out.

What the model around it brings: every block with this layer also has a dense feed-forward, sequential and with a norm
of its own in the code (x + MoE(norm1 x), then x + FFN(norm2 x)), parallel in the paper's equation 4. A feed-forward
there has four matrices: W_down((a * silu(b)) * W_up x) with [a, b] = W_gate x.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.segment import segment_sum
from .base import GatedRouter, Routing, TokenContext, count_experts, register_router, router_dtype
from .losses import z_loss
from .selection import check_jitter, check_not_negative, check_top_k, drop_padding, jittered, keep_within_capacity

FLAXFORMER_GROUP = 4096


@register_router("openmoe")
class OpenMoERouter(GatedRouter):
    evidence = "code"
    paper = "OpenMoE, arXiv:2402.01739"
    requires_by_option = ("noise",)
    loss_names = ("balance", "z")
    causal_option = "capacity=None"

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        capacity: Literal["flaxformer", "colossalai"] | None = "flaxformer",
        train_capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        min_capacity: int = 4,
        group_size: int | None = None,
        jitter: float = 0.0,
        balance_weight: float = 0.01,
        z_weight: float = 1e-4,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token, K.
            capacity: the rule for C; None drops nothing.
            train_capacity_factor, eval_capacity_factor: f.
            min_capacity: C is at least this.
            group_size: S; None = 4096 with "flaxformer" (8192 for the 34B model), else all tokens of the call.
            jitter: in training the router's input is multiplied by U(1 - jitter, 1 + jitter), elementwise.
            balance_weight, z_weight: of the losses ``balance`` and ``z``.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        if capacity not in ("flaxformer", "colossalai", None):
            raise ValueError(f'capacity="{capacity}": choose "flaxformer", "colossalai" or None, to drop nothing')
        for name, factor in (("train", train_capacity_factor), ("eval", eval_capacity_factor)):
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(
                    f"{name}_capacity_factor={factor}: choose a positive number, or capacity=None to drop nothing"
                )
        if min_capacity < 1:
            raise ValueError(f"min_capacity={min_capacity}: choose at least 1")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size={group_size}: choose at least 1, or None")
        check_jitter(jitter)
        check_not_negative(balance_weight=balance_weight, z_weight=z_weight, init_std=init_std)
        self.top_k, self.capacity, self.min_capacity = top_k, capacity, min_capacity
        self.train_capacity_factor, self.eval_capacity_factor = train_capacity_factor, eval_capacity_factor
        self.group_size = group_size or (FLAXFORMER_GROUP if capacity == "flaxformer" else None)
        self.jitter, self.balance_weight, self.z_weight = jitter, balance_weight, z_weight
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))

    @property
    def requires(self) -> tuple[str, ...]:
        return ("noise",) if self.jitter and self.training else ()

    @property
    def causal(self) -> bool:
        # later tokens' first choices come before an earlier token's second
        return self.capacity is None or self.top_k == 1

    @property
    def batch_independent(self) -> bool:
        return self.capacity is None

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        dtype = router_dtype(x_TD)
        x_TD = x_TD.to(dtype)
        if self.jitter and self.training:
            x_TD = jittered(x_TD, self.jitter, context)
        return F.linear(x_TD, self.weight.to(dtype))

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        real_T = context.real_T
        index_TK = scores_TE.detach().topk(self.top_k, dim=-1).indices
        index_TK, weight_TK = drop_padding(index_TK, scores_TE.gather(1, index_TK), real_T)
        group_T, tokens_G = self._groups(len(index_TK), real_T, index_TK.device)
        # an expert is another one in every group
        cell_TK = torch.where(index_TK < 0, -1, group_T[:, None] * self.bank_size + index_TK)
        losses = {}
        if self.balance_weight:
            chosen_GE = count_experts(cell_TK, len(tokens_G) * self.bank_size).view(-1, self.bank_size)
            losses["balance"] = self.balance_weight * _balance(scores_TE, chosen_GE, group_T, tokens_G, real_T)
        if self.z_weight:
            losses["z"] = self.z_weight * z_loss(logits_TE, real_T)
        requested = None
        if self.capacity is not None:
            requested, capacity_GE = (
                index_TK,
                self._capacity(tokens_G).repeat_interleave(self.bank_size, output_size=len(tokens_G) * self.bank_size),
            )
            keep_TK = keep_within_capacity(cell_TK, weight_TK, len(capacity_GE), capacity_GE, "choice")
            index_TK, weight_TK = index_TK.masked_fill(~keep_TK, -1), weight_TK.masked_fill(~keep_TK, 0)
        return Routing.from_topk(
            index_TK,
            weight_TK,
            bank_size=self.bank_size,
            logits=logits_TE,
            scores=scores_TE,
            requested=requested,
            losses=losses,
        )

    def _groups(self, tokens: int, real_T: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """The group of each token [T], and how many real tokens each group has [G]."""
        size = self.group_size or max(tokens, 1)
        first_G = torch.arange(0, max(tokens, 1), size, device=device)
        if real_T is None:
            return torch.arange(tokens, device=device) // size, (tokens - first_G).clamp(0, size)
        return (real_T.cumsum(0) - 1).clamp(min=0) // size, (real_T.sum() - first_G).clamp(0, size)

    def _capacity(self, tokens_G: Tensor) -> Tensor:
        """C of each group."""
        factor, tokens_G = self.train_capacity_factor if self.training else self.eval_capacity_factor, tokens_G.double()
        if self.capacity == "flaxformer":
            capacity_G = (factor * tokens_G / self.num_experts).round()
        else:
            capacity_G = (self.top_k * factor * tokens_G / self.num_experts).floor()
            capacity_G = capacity_G + capacity_G % 2
        return capacity_G.clamp(min=self.min_capacity)


def _balance(scores_TE: Tensor, chosen_GE: Tensor, group_T: Tensor, tokens_G: Tensor, real_T: Tensor | None) -> Tensor:
    """``E^2 mean_e(m_e P_e)`` of each group, and of those the mean over tokens."""
    if real_T is not None:
        scores_TE = scores_TE.masked_fill(~real_T[:, None], 0)
    together_G = (chosen_GE.to(scores_TE.dtype) * segment_sum(scores_TE, group_T, len(tokens_G))).sum(1)
    return scores_TE.shape[1] * (together_G / tokens_G.clamp(min=1)).sum() / tokens_G.sum().clamp(min=1)
