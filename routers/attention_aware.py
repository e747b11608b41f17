"""Attention-aware routing: a token's choice is an average of the choices of the tokens that it attends to.

    A^h  = softmax(q^h k^hT * scale + mask)      heads of the attention before the layer, before any dropout
    r~_i = sum_h rho_ih sum_j A^h_ij r_j         r: the base gate's scores, which assigns by r~;  sum_h rho_ih = 1

    mean        rho_ih = 1 / H
    learned     rho_ih = softmax(w)_h            H scalars, at first equal
    posterior   rho_ih = softmax_h( -d_ih / (2 s_i) )    d_ih = |a_i - H o_ih|^2,  s_i = mean_h d_ih (no gradient)

o_ih is what head h added to token i and a_i = sum_h o_ih: heads are components of a mixture, all as likely before, and
the nearer one alone comes to the sum the more it counts. s_i is the token's own, so that no decision depends on other
samples or on later tokens. A^h R is a second attention with values R: no matrix of tokens x tokens is written out.

Source: Nguyen et al., "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv:2505.00792. Its
abstract and section titles could be read, not its equations, and no code was published: a reconstruction, in which the
combinations of heads and the blend are choices of this file.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels.attention import AttentionWeights
from .base import Attention, TokenContext, register_router
from .smoothing import SmoothedRouter

COMBINATIONS = ("mean", "posterior", "learned")


@register_router("attention_aware")
class AttentionAwareRouter(SmoothedRouter):
    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int | None = None,
        base: str = "topk",
        base_options: dict[str, Any] | None = None,
        combine: Literal["mean", "posterior", "learned"] = "mean",
        num_heads: int | None = None,
        causal: bool = False,
        blend: float = 1.0,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token; None = the base gate's default.
            base: name of the gate whose scores are averaged and which assigns by them: any ``GatedRouter``.
            base_options: its other options, ``{"score": "sigmoid", "bias_rate": 1e-3}``.
            combine: of the heads.
            num_heads: H; needed by, and only by, ``combine="learned"``.
            causal: whether the attention is causal; one that is not as said is refused.
            blend: r~ = (1 - blend) r + blend A r; at 0 the base gate alone decides.

        Raises:
            ValueError: an option outside its range, or a base gate that does not work in three steps.
        """
        super().__init__(
            dim=dim,
            num_experts=num_experts,
            top_k=top_k,
            base=base,
            base_options=base_options,
            left_to_right=causal,
            blend=blend,
        )
        if combine not in COMBINATIONS:
            raise ValueError(f'combine="{combine}": choose one of {COMBINATIONS}')
        if (combine == "learned") != (num_heads is not None):
            raise ValueError(f'combine="{combine}" {"needs" if combine == "learned" else "takes no"} num_heads')
        if num_heads is not None and num_heads < 1:
            raise ValueError(f"num_heads={num_heads}: choose at least 1")
        self.combine = combine
        self.head_logits = None if num_heads is None else nn.Parameter(torch.zeros(num_heads))

    @property
    def requires(self) -> tuple[str, ...]:
        return ("attention", *self.base.requires)

    def average(self, x_TD: Tensor, scores_BLE: Tensor, context: TokenContext) -> Tensor:
        attention = context.attention
        if not hasattr(attention, "apply") or not hasattr(attention, "causal"):
            raise ValueError(
                f"context.attention is a {type(attention).__name__}: give what applies its weights, "
                "gatewright.kernels.attention.AttentionWeights(q, k, causal=...)"
            )
        if attention.causal != self.left_to_right:
            given = f"context.attention.causal is {attention.causal}"
            raise ValueError(
                f'{given}, and router "{self.name}" was made with causal={self.left_to_right}: make it with '
                f"causal={attention.causal}, or give it the attention that it was made for"
            )
        heads_BHLE = attention.apply(self.with_past(context, scores=scores_BLE)["scores"]).to(scores_BLE.dtype)
        if self.combine == "mean":
            return heads_BHLE.mean(1)
        if self.combine == "posterior":
            share_BHL = responsibility(attention).to(scores_BLE.dtype)
        else:
            heads = heads_BHLE.shape[1]
            if heads != len(self.head_logits):
                given = f"context.attention has {heads} heads"
                raise ValueError(
                    f'{given}, and router "{self.name}" was made for {len(self.head_logits)}: make it with '
                    f"num_heads={heads}"
                )
            share_BHL = self.head_logits.to(scores_BLE.dtype).softmax(0)[None, :, None]
        return (share_BHL[..., None] * heads_BHLE).sum(1)

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, context.batch_size, 2, context.length, 8, generator=generator)
        attention = AttentionWeights(
            q, k, causal=False, v=v, w_out=torch.randn(options["dim"], 16, generator=generator)
        )
        return options, context.replace(attention=attention)


def responsibility(attention: Attention) -> Tensor:
    """rho of ``combine="posterior"``: [B, H, L]"""
    part_BHLD = attention.head_contributions()
    whole_B1LD = part_BHLD.sum(1, keepdim=True)
    distance_BHL = (whole_B1LD - part_BHLD.shape[1] * part_BHLD).square().sum(-1)
    mean_B1L = distance_BHL.detach().mean(1, keepdim=True).clamp(min=torch.finfo(distance_BHL.dtype).tiny)
    return (-distance_BHL / (2 * mean_B1L)).softmax(1)
