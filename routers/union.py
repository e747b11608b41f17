"""Union of Experts: a dense feed-forward cut into experts, of which patches of tokens, or whole samples, use some.

    g = softmax(W x + b)                      g is one a patch: logits are averaged over its ``patch`` tokens
    m = 1 for the K highest g of a patch, else 0
    "data"       g' = g m / (sum over the batch of g m at this place + 1e-8)
                 each expert takes in each sample its c patches of highest g'; a patch with m = 0 has g' = 0 and fills
                 up the quota; c by ``quota``, L patches in the sample:
                   "half"    floor(0.5 L)                            UoME_DS.py
                   "max"     the most patches that any expert was chosen by in any sample       SMHA_v3.py
                   "max_60"  the same, at most floor(0.6 L)          SMHA_v2.py
    "per_token"  each patch goes to the experts with m = 1
    "expert"     g = softmax(W flatten(X) + b) of a sample X [L, D]; its K highest take all its tokens
    weight       "faithful" 1       "ste" 1 + g - stop(g)       "weighted" n g_e / sum of g over the token's n experts

Experts are parts of one feed-forward (``moe.upcycling.split_feed_forward``): with all of them on and weights of 1 the
layer is that feed-forward. No loss and no state. In the released language model weights are 1, so the gate learns
nothing ("faithful"); "ste" gives it the gradient that the weight g would have had.

The ranking g' is over the batch and the sequence: "data" is neither causal nor independent of other samples. In a batch
of one sample all g' of chosen patches are 1 up to the 1e-8, so they rank nearly equal. Ties go to the earlier patch.
"per_token" with patches of one token is causal.

Source: Yang et al., arXiv:2503.02495; YujiaoYang-work/UoE, language_modeling/model/mlp/UoME_DS.py and UoME_ES.py and
model/attention/SMHA_v2.py and SMHA_v3.py, read; their gates and selections were run on random input, and "data" takes
the same tokens for all three quotas, up to which of equal ones fill up. Left out: a factor of g' that is the batch size
and ranks nothing otherwise.
Reconstructed: patches of more than one token (theirs are unused arguments), "per_token", "ste" and "weighted".
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GatedRouter, Routing, TokenContext, apply_linear, register_router, router_dtype
from .selection import check_top_k, drop_padding, experts_take

CHOICES = ("data", "per_token", "expert")
QUOTAS = ("half", "max", "max_60")
GATES = ("faithful", "ste", "weighted")
EPSILON = 1e-8


@register_router("union")
class UnionRouter(GatedRouter):
    evidence = "code"
    paper = "Union of Experts, arXiv:2503.02495"
    selection = "expert"
    causal_option = 'choice="per_token", patch=1'

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        choice: Literal["data", "per_token", "expert"] = "data",
        gate: Literal["faithful", "ste", "weighted"] = "faithful",
        quota: Literal["half", "max", "max_60"] = "half",
        patch: int = 1,
        length: int | None = None,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a patch asks for, or a sample with ``choice="expert"``.
            choice: "data": experts take their quota of patches; "per_token": patches go where they ask; "expert": a
                sample's experts take all of it.
            gate: of the weights.
            quota: how many patches an expert takes of a sample; for ``choice="data"``.
            patch: tokens a patch; the last one of a sample may be shorter.
            length: the longest sample, which the gate of ``choice="expert"`` is made for; a shorter one is filled up
                with zeros. Needed by, and only by, ``choice="expert"``.

        Raises:
            ValueError: an option outside its range, ``length`` missing or superfluous, or patches of samples.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        for name, value, allowed in (("choice", choice, CHOICES), ("gate", gate, GATES), ("quota", quota, QUOTAS)):
            if value not in allowed:
                raise ValueError(f'{name}="{value}": choose one of {allowed}')
        if patch < 1 or (patch > 1 and choice == "expert"):
            raise ValueError(f'patch={patch} with choice="{choice}": choose at least 1, and 1 for choice="expert"')
        if (length is not None) != (choice == "expert") or (length is not None and length < 1):
            raise ValueError(
                f'length={length} with choice="{choice}": choice="expert" needs the length of the longest sample, at '
                "least 1, and the others take none"
            )
        self.top_k, self.choice, self.gate, self.quota = top_k, choice, gate, quota
        self.patch, self.length = patch, length
        self.linear = nn.Linear(dim * (length or 1), num_experts)

    @property
    def causal(self) -> bool:
        return self.choice == "per_token" and self.patch == 1

    @property
    def batch_independent(self) -> bool:
        return self.choice != "data"

    @property
    def without_gradient(self) -> tuple[str, ...]:
        return ("weights", "tokens", "linear") if self.gate == "faithful" else ()

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        x_TD = x_TD.to(router_dtype(x_TD))
        if self.choice != "expert":
            logits_TE = apply_linear(self.linear, x_TD)
            return logits_TE if self.patch == 1 else self._spread(self._pool(logits_TE, context), context)
        if context.length > self.length:
            raise ValueError(
                f"samples of {context.length} tokens, and the gate is made for length={self.length}: make the router "
                "for the longest sample"
            )
        x_BLD = _to_front(x_TD.unflatten(0, (context.batch_size, context.length)), context)
        logits_BE = apply_linear(self.linear, F.pad(x_BLD, (0, 0, 0, self.length - context.length)).flatten(1))
        return logits_BE.repeat_interleave(context.length, 0, output_size=len(x_TD))

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        index_TK = scores_TE.detach().topk(self.top_k, dim=-1).indices
        fields = {"logits": logits_TE, "scores": scores_TE}
        if self.choice == "data":
            chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, index_TK, True)
            mask_TE = self._taken(scores_TE.detach(), chosen_TE, context)
            return Routing.from_mask(mask_TE, self._weights(scores_TE, mask_TE), **fields)
        weight_TK = self._weights(scores_TE.gather(1, index_TK))
        index_TK, weight_TK = drop_padding(index_TK, weight_TK, context.real_T)
        return Routing.from_topk(index_TK, weight_TK, bank_size=self.bank_size, **fields)

    def _taken(self, scores_TE: Tensor, chosen_TE: Tensor, context: TokenContext) -> Tensor:
        """Which tokens each expert takes, those that fill up its quota included: [T, E] bool."""
        asked_BME = self._pool(scores_TE * chosen_TE, context)
        real_BM = self._patch_sizes(context, scores_TE.device) > 0
        rank_BME = asked_BME / (asked_BME.sum(0) + EPSILON)
        patches_B = real_BM.sum(1)
        if self.quota == "half":
            quota_B = patches_B // 2
        else:
            asked_BE = (asked_BME > 0).sum(1)
            quota_B = F.pad(asked_BE.flatten(), (0, 1)).max().expand_as(patches_B)
            if self.quota == "max_60":
                quota_B = torch.minimum(quota_B, patches_B * 3 // 5)
        quota_BE = torch.minimum(quota_B, patches_B)[:, None].expand(-1, self.num_experts)
        taken_TE = self._spread(experts_take(rank_BME, quota_BE, real_BM), context)
        return taken_TE if context.real_T is None else taken_TE & context.real_T[:, None]

    def _weights(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of a token's experts, or of all with a mask of its own: the weights, in the same shape."""
        if self.gate == "faithful":
            return torch.ones_like(scores)
        if self.gate == "ste":
            return 1 + (scores - scores.detach())
        own = scores if mask is None else scores * mask
        count = scores.shape[1] if mask is None else mask.sum(1, keepdim=True)
        return count * own / own.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    def _patch_sizes(self, context: TokenContext, device: torch.device) -> Tensor:
        """How many real tokens each patch has, real tokens counted from 0 in their sample: [B, M]"""
        if context.padding_mask is None:
            real_B = torch.full((context.batch_size,), context.length, device=device)
        else:
            real_B = context.padding_mask.sum(1)
        first_M = torch.arange(0, context.length, self.patch, device=device)
        return (real_B[:, None] - first_M).clamp(0, self.patch)

    def _pool(self, values_TE: Tensor, context: TokenContext) -> Tensor:
        """The mean over each patch: [T, E] -> [B, M, E]; 0 where a patch has no real token."""
        values_BLE = _to_front(values_TE.unflatten(0, (context.batch_size, context.length)), context)
        values_BLE = F.pad(values_BLE, (0, 0, 0, -context.length % self.patch))
        sizes_BM = self._patch_sizes(context, values_TE.device)
        return values_BLE.unflatten(1, (sizes_BM.shape[1], self.patch)).sum(2) / sizes_BM.clamp(min=1)[..., None]

    def _spread(self, values_BME: Tensor, context: TokenContext) -> Tensor:
        """What each patch has, at its tokens: [B, M, E] -> [T, E]"""
        values_BLE = values_BME.repeat_interleave(self.patch, 1)[:, : context.length]
        if context.padding_mask is not None:
            place_BL = (context.padding_mask.cumsum(1) - 1).clamp(min=0)
            values_BLE = values_BLE.take_along_dim(place_BL[..., None], 1)
        return values_BLE.flatten(0, 1)

    @classmethod
    def example(cls) -> tuple[dict[str, Any], TokenContext]:
        return {"dim": 16, "num_experts": 4, "top_k": 2, "gate": "ste"}, super().example()[1]


def _to_front(values_BLC: Tensor, context: TokenContext) -> Tensor:
    """Each sample's real tokens first, in order, then zeros."""
    if context.padding_mask is None:
        return values_BLC
    order_BL = context.padding_mask.argsort(dim=1, descending=True, stable=True)
    real_BL = context.padding_mask.take_along_dim(order_BL, 1)
    return values_BLC.take_along_dim(order_BL[..., None], 1).masked_fill(~real_BL[..., None], 0)
