"""Similarity-aware routing: a token's choice is an average of the choices of the tokens like it.

    S_ij = softmax_j( (u_i W_s) . u_j / tau + mask_ij )        u = x / rms(x); j in the same sequence, itself included
    r~_i = sum_j S_ij r_j                                      r: the base gate's scores, which assigns by r~

A latent variable a token, "whose decision do I follow", couples the choices that a plain gate takes one by one.
W_s is the identity, A B^T of a low rank, or full; tau = sqrt(D) unless given. tau -> 0 follows the most similar token
(oneself, where W_s = 1), tau -> infinity takes the mean over the sequence. S R is attention with values R: it is
computed as such, and S is never written out; the time grows with L^2 times the larger of E and the width of W_s, so
a low rank is the cheap one.

The entropy of r~_i is at least the S-weighted mean of the entropies of the r_j: it need not fall. What holds is that
for a given S no change of scores is amplified: max_i |r~_i - r~'_i|_1 <= max_j |r_j - r'_j|_1.

Source: Nguyen et al., "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv:2505.00792. Its
abstract and section titles could be read, not its equations, and no code was published: a reconstruction, in which W_s,
tau, their initial values and the blend are choices of this file.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import AttentionWeights
from .base import TokenContext, register_router
from .smoothing import SmoothedRouter

SIMILARITIES = ("identity", "lowrank", "full")


@register_router("similarity_aware")
class SimilarityAwareRouter(SmoothedRouter):
    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int | None = None,
        base: str = "topk",
        base_options: dict[str, Any] | None = None,
        similarity: Literal["identity", "lowrank", "full"] = "identity",
        rank: int = 64,
        temperature: float | None = None,
        learn_temperature: bool = False,
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
            similarity: W_s: the identity; A B^T, at first A = B with expectation 1; or full, at first the identity.
            rank: of A and B, for ``similarity="lowrank"``.
            temperature: tau; None = sqrt(D).
            learn_temperature: make log tau a parameter.
            causal: only tokens up to i count for token i; a model that decodes left to right needs it.
            blend: r~ = (1 - blend) r + blend S r; at 0 the base gate alone decides.

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
        if similarity not in SIMILARITIES:
            raise ValueError(f'similarity="{similarity}": choose one of {SIMILARITIES}')
        if rank < 1:
            raise ValueError(f"rank={rank}: choose at least 1")
        temperature = math.sqrt(dim) if temperature is None else temperature
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature={temperature}: choose a positive number, or None for sqrt({dim})")
        self.w_query = self.w_key = None
        if similarity == "full":
            self.w_query = nn.Parameter(torch.eye(dim))
        elif similarity == "lowrank":
            self.w_query = nn.Parameter(torch.empty(dim, rank).normal_(0, rank**-0.5))
            self.w_key = nn.Parameter(self.w_query.detach().clone())
        self.temperature = temperature
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)])) if learn_temperature else None

    def average(self, x_TD: Tensor, scores_BLE: Tensor, context: TokenContext) -> Tensor:
        u_TD = F.rms_norm(x_TD.to(scores_BLE.dtype), x_TD.shape[1:])
        u_BLD = u_TD.masked_fill(~u_TD.isfinite(), 0).unflatten(0, scores_BLE.shape[:2])
        query_BLR = u_BLD if self.w_query is None else u_BLD @ self.w_query.to(u_BLD.dtype)
        key_BLR = u_BLD if self.w_key is None else u_BLD @ self.w_key.to(u_BLD.dtype)
        learned = self.log_temperature
        query_BLR = query_BLR / (self.temperature if learned is None else learned.to(u_BLD.dtype).exp())
        masks = {"padding_mask": context.padding_mask, "document": context.document}
        if context.cache is not None and context.padding_mask is None:
            masks["padding_mask"] = u_BLD.new_ones(u_BLD.shape[:2], dtype=torch.bool)
        masks = {name: mask_BL for name, mask_BL in masks.items() if mask_BL is not None}
        seen = self.with_past(context, scores=scores_BLE, key=key_BLR, **masks)
        similarity = AttentionWeights(
            query_BLR[:, None],
            seen["key"][:, None],
            causal=self.left_to_right,
            padding_mask=seen.get("padding_mask"),
            document=seen.get("document"),
            scale=1.0,
        )
        return similarity.apply(seen["scores"])[:, 0]
