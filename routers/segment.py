"""Segment routing (Seg-MoE): s neighbouring tokens of a sample share one decision.

    z_g = [x_gs, ..., x_gs+s-1]                    the segment's tokens side by side, [s * D]
    p_g = softmax(W z_g / temperature)             W [E, s * D], no bias
    every token of segment g goes to the K highest of p_g
    weight = p for K = 1,   p / max(sum of the K, 1e-6) for K > 1

    loss balance = balance_weight * E * sum_e f_e P_e      over segments: f_e the share of the K slots, P_e the mean p

A sample whose length s does not divide ends in zeros; so does one shorter than s, which is one segment. A padded token
is a zero in its place, also between real ones, and a segment without a real token counts nowhere. In training
``dropout`` scales probabilities by 0 or 1 / (1 - dropout) before the choice; weights and loss are of what is left.
With s = 1 this is token choice.

A decision sees the later tokens of its segment: not causal, unless ``shifted``, which decides for segment g by z_g-1,
and for the first by zeros: there every expert is equal, so that the same K take every first segment.

The experts here see single tokens, "position-wise"; ``moe.segment`` has the shared expert on the whole segment, and
experts on segments.

Source: Seg-MoE, arXiv:2601.21641, and its released code, segmoe_forecast/model/MoE.py (``MoESegment``) and
utils/LoadBalancingLoss.py. Until 28 June 2026 that code renormalised for K = 1 too, which cuts the router's gradient
from the task's loss; the published numbers have K = 1: ``renorm_top1=True`` is what they were trained with. The code
takes the balance loss over the segments of all layers together (``balance_loss_over_layers``); its first version
summed f over the slots, which is ``balance_weight=0.02 * K``. ``shifted`` is not in the paper.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, count_experts, register_router, router_dtype
from .losses import balance_loss
from .selection import check_not_negative, check_top_k, drop_padding


@register_router("segment")
class SegmentRouter(Router):
    evidence = "code"
    paper = "Seg-MoE, arXiv:2601.21641"
    selection = "segment"
    requires_by_option = ("noise",)
    loss_names = ("balance",)
    batch_independent = True
    causal_option = "shifted=True"

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        segment_size: int,
        top_k: int = 1,
        temperature: float = 1.0,
        renorm_top1: bool = False,
        dropout: float = 0.0,
        balance_weight: float = 0.02,
        shifted: bool = False,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            segment_size: tokens that share a decision, s. One size a router; ``segment_sizes`` gives each layer its.
            top_k: experts a segment, K.
            temperature: of the softmax.
            renorm_top1: with K = 1, weight 1 instead of p, as in the published runs: the task trains no router.
            dropout: of the probabilities, in training; needs the context's noise.
            balance_weight: of the loss ``balance``; 0 = no such loss.
            shifted: decide for a segment by the one before, which makes the decision causal.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        check_not_negative(balance_weight=balance_weight)
        check_segment_size(segment_size)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: choose a positive number")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: choose 0 (none) to less than 1")
        if renorm_top1 and top_k > 1:
            raise ValueError(f"renorm_top1=True with top_k={top_k}: more than one weight is always renormalised")
        self.segment_size, self.top_k, self.temperature, self.renorm_top1 = (
            segment_size,
            top_k,
            temperature,
            renorm_top1,
        )
        self.dropout, self.balance_weight, self.shifted = dropout, balance_weight, shifted
        self.weight = nn.Parameter(torch.empty(num_experts, segment_size * dim))
        nn.init.xavier_uniform_(self.weight)

    @property
    def requires(self) -> tuple[str, ...]:
        return ("noise",) if self.dropout and self.training else ()

    @property
    def causal(self) -> bool:
        return self.shifted or self.segment_size == 1

    @property
    def without_gradient(self) -> tuple[str, ...]:
        return ("tokens", "weight") if self.renorm_top1 and not self.balance_weight else ()

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype = router_dtype(x_TD)
        x_BLD = x_TD.to(dtype).view(context.batch_size, context.length, x_TD.shape[1])
        z_BGZ = fold_segments(x_BLD, self.segment_size)
        if self.shifted:
            z_BGZ = F.pad(z_BGZ, (0, 0, 1, 0))[:, :-1]
        logits_BGE = F.linear(z_BGZ, self.weight.to(dtype)) / self.temperature
        scores_BGE = logits_BGE.softmax(-1)
        kept_BGE = self._drop(scores_BGE, context)
        weight_BGK, index_BGK = kept_BGE.topk(self.top_k, dim=-1)
        if self.top_k > 1 or self.renorm_top1:
            weight_BGK = weight_BGK / weight_BGK.sum(-1, keepdim=True).clamp(min=1e-6)

        if context.padding_mask is not None:
            index_BGK = index_BGK.masked_fill(~real_segments(context.padding_mask, self.segment_size)[..., None], -1)
        segments = kept_BGE.flatten(0, 1), index_BGK.flatten(0, 1)
        losses = {"balance": self.balance_weight * _balance(*segments)} if self.balance_weight else {}
        index_TK, weight_TK, logits_TE, scores_TE = (
            unfold_segments(value.repeat(1, 1, self.segment_size), context.length, value.shape[-1]).flatten(0, 1)
            for value in (index_BGK, weight_BGK, logits_BGE, scores_BGE)
        )
        index_TK, weight_TK = drop_padding(index_TK, weight_TK, context.real_T)
        return Routing.from_topk(
            index_TK,
            weight_TK,
            bank_size=self.bank_size,
            logits=logits_TE,
            scores=scores_TE,
            prediction=segments,
            losses=losses,
        )

    def _drop(self, scores_BGE: Tensor, context: TokenContext) -> Tensor:
        if not (self.dropout and self.training):
            return scores_BGE
        kept_BGE = context.noise(*scores_BGE.shape, distribution="uniform") >= self.dropout
        return scores_BGE * kept_BGE / (1 - self.dropout)

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        return options | {"segment_size": 3, "top_k": 1}, context


def segment_sizes(sizes: int | Sequence[int], num_layers: int) -> list[int]:
    """One segment size a layer, for a model that makes a router for each (the paper's base model: [5, 5, 4, 4, 3, 3]):

        sizes = segment_sizes([5, 5, 4, 4, 3, 3], num_layers=6)
        routers = [create_router("segment", dim=256, num_experts=8, segment_size=size) for size in sizes]

    Args:
        sizes: one for all layers, or a list of one a layer.

    Raises:
        ValueError: a list of another length, or a size below 1.
    """
    sizes = [sizes] * num_layers if isinstance(sizes, int) else list(sizes)
    if len(sizes) != num_layers:
        raise ValueError(
            f"{len(sizes)} segment sizes {sizes} for {num_layers} layers: give one a layer, or one for all"
        )
    for size in sizes:
        check_segment_size(size)
    return sizes


def check_segment_size(segment_size: int) -> None:
    """Raises ValueError unless it is a whole number of at least 1."""
    if not isinstance(segment_size, int) or segment_size < 1:
        raise ValueError(f"segment_size={segment_size!r}: choose a whole number of at least 1")


def fold_segments(x_BLD: Tensor, segment_size: int) -> Tensor:
    """Tokens side by side: [B, L, D] -> [B, G, s * D], G = ceil(L / s); zeros fill the last segment."""
    batch, length, width = x_BLD.shape
    segments = -(-length // segment_size)
    padded = F.pad(x_BLD, (0, 0, 0, segments * segment_size - length))
    return padded.reshape(batch, segments, segment_size * width)


def unfold_segments(z_BGZ: Tensor, length: int, width: int) -> Tensor:
    """Back from ``fold_segments``: [B, G, s * D] -> [B, L, D]"""
    batch, segments, together = z_BGZ.shape
    return z_BGZ.reshape(batch, segments * (together // width), width)[:, :length]


def real_segments(padding_mask_BL: Tensor, segment_size: int) -> Tensor:
    """Which segments hold a real token: [B, L] bool -> [B, G] bool"""
    return fold_segments(padding_mask_BL[..., None], segment_size).any(-1)


def balance_loss_over_layers(routings: Sequence[Routing], weight: float = 0.02) -> Tensor:
    """The balance loss over the segments of all layers together, as the released code takes it: a layer of small
    segments has more of them and weighs more. It replaces the routers' own (``balance_weight=0``), and is equal to it
    for one layer.

    Args:
        routings: what the layers' ``segment`` routers decided; all have the same number of experts and the same K.
    """
    scores, index = zip(*(routing.prediction for routing in routings), strict=True)
    return weight * _balance(torch.cat(scores), torch.cat(index))


def _balance(scores_SE: Tensor, index_SK: Tensor) -> Tensor:
    """Over segments; those of ids -1 hold no real token."""
    return balance_loss(scores_SE, count_experts(index_SK, scores_SE.shape[1]), index_SK[:, 0] >= 0)
