"""Feed-forwards on segments, the s neighbouring tokens of a sample as one vector (Seg-MoE).

    z_g = [x_gs, ..., x_gs+s-1]     [s * D]; zeros at padding and after the last token; outputs there are 0

``SegmentFeedForward``, the shared expert:    h_g = FFN(z_g) * sigmoid(w^T z_g),     FFN: s D -> s H -> s D,  w [s D]

The paper's code has three layers; the first is the one that its models use:

    position-wise   MoELayer(create_router("segment", dim=D, segment_size=s, ...), ExpertSpec(D, H),
                             shared=SegmentFeedForward(ExpertSpec(D, H), s))
    concat          SegmentMoELayer(create_router("segment", dim=s * D, segment_size=1, ...), ExpertSpec(D, H),
                                    segment_size=s, variant="concat")
    projected       SegmentMoELayer(create_router("segment", dim=D, segment_size=1, ...), ExpertSpec(D, H),
                                    segment_size=s, variant="projected")

What works on a whole segment has s^2 as many weights (3 s^2 D H gated, 2 s^2 D H not), so that comparing segment sizes
compares capacities too. ``match_parameters`` gives it the hidden width H / s, and the weights of s = 1.

Tokens of a segment see each other, later ones too: a model that decodes left to right is refused.

Source: Seg-MoE, arXiv:2601.21641, and its released code, segmoe_forecast/model/MoE.py: ``MoESegment``,
``MoESegmentV0`` (concat; it stands where nothing reaches it) and ``MoESegmentV1`` (projected; not used). There the
activation is GELU, or SiLU(W_up x) * (W_gate x): "swiglu", whose gate rows are that W_up.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..routers.base import Router, Routing, TokenContext
from ..routers.segment import check_segment_size, fold_segments, real_segments, unfold_segments
from .experts import ExpertSpec, FeedForward
from .layer import MoELayer

VARIANTS = ("concat", "projected")


def segment_spec(spec: ExpertSpec, segment_size: int, match_parameters: bool = False) -> ExpertSpec:
    """From the feed-forward of a token that of a segment: s D -> s H -> s D, or s D -> H / s -> s D, rounded, which has
    the weights of the token's where s divides H."""
    check_segment_size(segment_size)
    hidden = segment_size * spec.hidden
    if match_parameters:
        hidden = max(1, round(spec.hidden / segment_size))
    return dataclasses.replace(spec, dim=segment_size * spec.dim, hidden=hidden)


class SegmentFeedForward(nn.Module):
    """The shared expert on the whole segment, always on, behind a sigmoid gate. With s = 1 that of Time-MoE.

    Called as ``shared(x, context)`` by a ``MoELayer``, x [B, L, D], 0 at padded tokens, as the layer hands it on.

    Args:
        spec: of the feed-forward of one token.
        segment_size: tokens a segment, s.
        match_parameters: hidden width H / s instead of s H: the weights of s = 1, but for the gate's s D.
        allow_noncausal: run in a model that decodes left to right although tokens see later ones of their segment.

    Raises:
        ValueError: a segment size below 1; when called, ``context.causal`` with s > 1.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        segment_size: int,
        *,
        match_parameters: bool = False,
        allow_noncausal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.segment_size, self.allow_noncausal = segment_size, allow_noncausal
        whole = segment_spec(spec, segment_size, match_parameters)
        self.feed_forward = FeedForward(whole, device=device, dtype=dtype)
        self.gate = nn.Linear(whole.dim, 1, bias=False, device=device, dtype=dtype)
        _draw(self.gate, spec)

    def forward(self, x: Tensor, context: TokenContext | None = None) -> Tensor:
        _check_causal(self, context)
        z_BGZ = fold_segments(x, self.segment_size)
        y_BGZ = self.feed_forward(z_BGZ) * self.gate(z_BGZ).sigmoid()
        return unfold_segments(y_BGZ, x.shape[1], x.shape[2])


class SegmentMoELayer(nn.Module):
    """A ``MoELayer`` whose tokens are segments. ``y, routing = layer(x, context)``; the routing, its load and its
    losses are of the B * ceil(L / s) segments.

        concat      z_g -> experts s D -> s H -> s D -> tokens
        projected   z_g -> W_in z_g, [D] -> experts D -> H -> D -> W_out y_g, [s D] -> tokens;  no W_in, W_out for s = 1

    The router gets the segments as tokens of width s D, or D, and a context without the fields of single tokens
    (``token_ids``, ``position``, ``document``, ``modality``, ``grid``, ``attention``, ``previous_logits``, ``cache``).

    Args:
        router: any router of that width; the paper's is ``segment`` with ``segment_size=1``.
        spec: of the feed-forward of one token.
        segment_size: tokens a segment, s.
        variant: "concat" or "projected".
        shared_expert: whether a ``SegmentFeedForward`` runs beside the routed experts, on what they get.
        match_parameters: of "concat": every feed-forward has hidden width H / s instead of s H.
        allow_noncausal: run in a model that decodes left to right although tokens see later ones of their segment.
        layer_class: what runs inside: ``MoELayer``, or a host's layer.
        options: further ones of that layer: ``parallel``, ``seed``, ``layer``, ``backend``.

    Raises:
        ValueError: an option outside its range, or a router of another width.
    """

    def __init__(
        self,
        router: Router,
        spec: ExpertSpec,
        *,
        segment_size: int,
        variant: Literal["concat", "projected"],
        shared_expert: bool = True,
        match_parameters: bool = False,
        allow_noncausal: bool = False,
        layer_class: type = MoELayer,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_segment_size(segment_size)
        if variant not in VARIANTS:
            raise ValueError(
                f'variant="{variant}": choose one of {VARIANTS}; position-wise is a MoELayer with the router "segment"'
            )
        if match_parameters and variant == "projected":
            raise ValueError('match_parameters=True with variant="projected": its experts have the width of a token')
        self.dim, self.segment_size, self.allow_noncausal = spec.dim, segment_size, allow_noncausal
        inner = segment_spec(spec, segment_size, match_parameters) if variant == "concat" else spec
        factory = {"device": device, "dtype": dtype}
        self.in_proj = self.out_proj = None
        if variant == "projected" and segment_size > 1:
            self.in_proj = nn.Linear(segment_size * spec.dim, spec.dim, bias=spec.bias, **factory)
            self.out_proj = nn.Linear(spec.dim, segment_size * spec.dim, bias=spec.bias, **factory)
            _draw(self.in_proj, spec)
            _draw(self.out_proj, spec)
        shared = SegmentFeedForward(inner, 1, **factory) if shared_expert else None
        self.moe = layer_class(router, inner, shared=shared, allow_noncausal=allow_noncausal, **factory, **options)

    def forward(self, x: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        """x [B, L, D] or [T, D] -> y of the same shape, 0 at padded tokens, and the decision for the segments."""
        context = TokenContext.for_tokens(x) if context is None else context
        _check_causal(self, context)
        shapes = [[context.batch_size, context.length, self.dim], [context.num_tokens, self.dim]]
        if list(x.shape) not in shapes:
            expected = f"{shapes[0]} or {shapes[1]}, from the context and the experts' width"
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {expected}")
        x_BLD = x.reshape(shapes[0])
        if context.padding_mask is not None:
            x_BLD = x_BLD.masked_fill(~context.padding_mask[..., None], 0)
        z_BGZ = fold_segments(x_BLD, self.segment_size)
        z_BGZ = z_BGZ if self.in_proj is None else self.in_proj(z_BGZ)
        y_BGZ, routing = self.moe(z_BGZ, self._context_of_segments(context, z_BGZ.shape[1]))
        y_BGZ = y_BGZ if self.out_proj is None else self.out_proj(y_BGZ)
        y_BLD = unfold_segments(y_BGZ, context.length, self.dim)
        if context.padding_mask is not None:
            y_BLD = y_BLD.masked_fill(~context.padding_mask[..., None], 0)
        return y_BLD.reshape(x.shape), routing

    def _context_of_segments(self, context: TokenContext, segments: int) -> TokenContext:
        mask = context.padding_mask
        return context.replace(
            length=segments,
            padding_mask=None if mask is None else real_segments(mask, self.segment_size),
            **dict.fromkeys(
                ("token_ids", "position", "document", "modality", "grid", "attention", "previous_logits", "cache")
            ),
        )


def _check_causal(module: SegmentFeedForward | SegmentMoELayer, context: TokenContext | None) -> None:
    if context is not None and context.causal and module.segment_size > 1 and not module.allow_noncausal:
        raise ValueError(
            f"{type(module).__name__} is not causal with segment_size={module.segment_size}: a token sees the later "
            "ones of its segment, and context.causal says that the model decodes left to right. Choose segment_size=1, "
            "or allow it: allow_noncausal=True"
        )


def _draw(linear: nn.Linear, spec: ExpertSpec) -> None:
    """The initial weight: Xavier-uniform, or as the experts' ``init_std`` says."""
    if spec.init_std is None:
        nn.init.xavier_uniform_(linear.weight)
    else:
        nn.init.normal_(linear.weight, 0, spec.init_std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
