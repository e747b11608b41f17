"""Tokens that skip blocks.

``MixtureOfDepths`` (arXiv:2404.02258; abstract and an unofficial implementation read): of each sample only the C tokens
of highest score go through the block, among themselves.

    rho_i = w . x_i          C = round(capacity * L)
    x'_i  = x_i + rho_i * block(X_selected)_i  for the selected,  x_i for the others

Choosing the best of a sample looks at later tokens. A model that decodes left to right therefore trains rho itself to
say whether a token is among the best, by binary cross-entropy, and at inference takes every token with sigmoid(rho) >
1/2.

``GatedBlock`` and ``budget_loss`` (dynamic token routing, arXiv:2308.03409; a reconstruction from its abstract and
figure, no code was released): a gate a token passes it through the block or leaves it as it is, and a budget holds the
expected cost.

    a_i = MLP(LN x_i)        training  G = 1[sigmoid((a + logistic noise) / tau) > 1/2], straight-through gradient
                             inference G = 1[a > 0]
    x'  = G * (x + block(x)) + (1 - G) * x
    L_budget = weight * (sum over blocks of mean(G) * cost / sum of costs - target)^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routers.base import Routing, TokenContext, router_dtype
from ..routers.selection import experts_take

Block = Callable[[Tensor, TokenContext], Tensor]


def _select(x_BLD: Tensor, taken_BL: Tensor, context: TokenContext) -> tuple[Tensor, Tensor, TokenContext]:
    """The taken tokens of each sample in their order: places [B, C], tokens [B, C, D], and their context, in which
    what fills up is padding and ``position`` stays the original one."""
    batch, length, _ = x_BLD.shape
    size = int(taken_BL.sum(1).max()) if taken_BL.numel() else 0
    place_BC = (~taken_BL).long().argsort(dim=1, stable=True)[:, :size]

    def pick(value: Tensor) -> Tensor:
        return value.gather(1, place_BC)

    position = context.position
    if position is None:
        position = torch.arange(length, device=x_BLD.device).expand(batch, length)
    fields = {
        name: pick(value)
        for name in ("token_ids", "document", "modality")
        if (value := getattr(context, name)) is not None
    }
    chosen = context.replace(
        length=size, padding_mask=pick(taken_BL), position=pick(position), grid=None, attention=None, cache=None,
        previous_logits=None, **fields,
    )  # fmt: skip
    return place_BC, x_BLD.gather(1, place_BC[..., None].expand(-1, -1, x_BLD.shape[-1])), chosen


def _put_back(out_BCD: Tensor, place_BC: Tensor, real_BC: Tensor, length: int) -> Tensor:
    """Rows at their places in [B, L, D], 0 elsewhere."""
    out_BCD = out_BCD.masked_fill(~real_BC[..., None], 0)
    empty_BLD = out_BCD.new_zeros(len(out_BCD), length, out_BCD.shape[-1])
    return empty_BLD.scatter_add(1, place_BC[..., None].expand_as(out_BCD), out_BCD)


class MixtureOfDepths(nn.Module):
    """``y, routing = depth(x_BLD, context)``: the routing's one expert is the block; its weight is rho.

    Args:
        block: called as ``block(x [B, C, D], context)``; returns what it adds, without the residual. Its context has
            the original positions, and calls padding what fills up samples with fewer tokens.
        dim: token width, D.
        capacity: share of a sample's tokens that go through in training, 0 to 1 (12.5 % in the paper).
        predict_weight: of the loss ``depth``, the cross-entropy that makes rho say at inference who is selected; 0 =
            none, and then inference selects as training does, and the module is not causal.
        unit_weight: add the block's output as it is. The score then gets no gradient but that of ``depth``.

    Raises:
        ValueError: a capacity outside 0 to 1, or a causal model with ``predict_weight=0``.
    """

    def __init__(
        self,
        block: Block,
        *,
        dim: int,
        capacity: float = 0.125,
        predict_weight: float = 0.01,
        unit_weight: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= capacity <= 1:
            raise ValueError(f"capacity={capacity}: choose a share of the tokens, 0 to 1")
        if predict_weight < 0:
            raise ValueError(f"predict_weight={predict_weight}: choose 0 (no loss) or more")
        self.block, self.capacity, self.predict_weight = block, capacity, predict_weight
        self.unit_weight = unit_weight
        self.score = nn.Parameter(torch.empty(dim).normal_(0, 0.02))

    def forward(self, x_BLD: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        context = TokenContext.for_tokens(x_BLD) if context is None else context
        if context.causal and not self.predict_weight:
            raise ValueError(
                "predict_weight=0 selects the best tokens of a sample also at inference, which looks at later ones: "
                "give a positive predict_weight in a model that decodes left to right"
            )
        dtype, real_BL = router_dtype(x_BLD), context.padding_mask
        if real_BL is None:
            real_BL = x_BLD.new_ones(x_BLD.shape[:2], dtype=torch.bool)
        x_BLD = x_BLD.masked_fill(~real_BL[..., None], 0)
        rho_BL = (x_BLD.to(dtype) * self.score.to(dtype)).sum(-1)  # autocast would lower a product of matrices
        if self.training or not self.predict_weight:
            count_B1 = (self.capacity * real_BL.sum(1, keepdim=True)).round().long()
            taken_BL = experts_take(rho_BL[..., None], count_B1, real_BL)[..., 0]
        else:
            taken_BL = (rho_BL > 0) & real_BL
        place_BC, chosen_BCD, chosen = _select(x_BLD, taken_BL, context)
        weight_BL = torch.ones_like(rho_BL) if self.unit_weight else rho_BL
        y_BLD = x_BLD
        if chosen.length:
            added_BCD = self.block(chosen_BCD, chosen) * weight_BL.gather(1, place_BC)[..., None].to(x_BLD.dtype)
            y_BLD = x_BLD + _put_back(added_BCD, place_BC, chosen.padding_mask, x_BLD.shape[1])
        losses = {}
        if self.training and self.predict_weight:
            error_BL = F.binary_cross_entropy_with_logits(rho_BL, taken_BL.to(dtype), reduction="none")
            mean = error_BL.masked_fill(~real_BL, 0).sum() / real_BL.sum().clamp(min=1)
            losses["depth"] = self.predict_weight * mean
        rho_T1 = weight_BL.reshape(-1, 1)
        routing = Routing.from_mask(
            taken_BL.reshape(-1, 1), rho_T1, logits=rho_BL.reshape(-1, 1), scores=torch.ones_like(rho_T1), losses=losses
        )
        return y_BLD, routing


class GatedBlock(nn.Module):
    """``y, gate = gated(x_BLD, context)``; gate [B, L], exactly 0 or 1, with the gradient of its sigmoid in training.

    Training computes the block for every token, because the gate of a token that skips it needs to know what it would
    have become; a token that skips is no key for the others. Inference computes the block for open tokens only.

    Args:
        block: called as ``block(x [B, C, D], context)``; returns what it adds, without the residual, and takes
            ``context.padding_mask`` for who may be attended to.
        dim: token width, D.
        temperature: tau of the gate in training.
        initial_logit: bias of the gate's last layer; 2 starts with nearly all paths open.

    Raises:
        ValueError: a temperature that is not positive; in training a context without the key of the noise.
    """

    def __init__(self, block: Block, *, dim: int, temperature: float = 1.0, initial_logit: float = 2.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: choose a positive number")
        self.block, self.temperature = block, temperature
        hidden = max(dim // 4, 1)
        self.gate = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))
        nn.init.constant_(self.gate[-1].bias, initial_logit)

    def forward(self, x_BLD: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Tensor]:
        context = TokenContext.for_tokens(x_BLD) if context is None else context
        real_BL = context.padding_mask
        if real_BL is None:
            real_BL = x_BLD.new_ones(x_BLD.shape[:2], dtype=torch.bool)
        x_BLD = x_BLD.masked_fill(~real_BL[..., None], 0)
        with torch.autocast(x_BLD.device.type, enabled=False):
            logit_BL = self.gate(x_BLD.to(self.gate[1].weight.dtype))[..., 0].to(router_dtype(x_BLD))
        if not self.training:
            open_BL = (logit_BL > 0) & real_BL
            place_BC, chosen_BCD, chosen = _select(x_BLD, open_BL, context)
            y_BLD = x_BLD
            if chosen.length:
                added_BCD = self.block(chosen_BCD, chosen)
                y_BLD = x_BLD + _put_back(added_BCD, place_BC, chosen.padding_mask, x_BLD.shape[1])
            return y_BLD, open_BL.to(logit_BL.dtype)
        uniform_BL = context.noise(context.num_tokens, distribution="uniform").view_as(logit_BL).to(logit_BL.dtype)
        soft_BL = ((logit_BL + uniform_BL.logit()) / self.temperature).sigmoid().masked_fill(~real_BL, 0)
        open_BL = soft_BL > 0.5
        gate_BL = open_BL.to(soft_BL.dtype) + (soft_BL - soft_BL.detach())
        added_BLD = self.block(x_BLD, context.replace(padding_mask=open_BL)).masked_fill(~real_BL[..., None], 0)
        return x_BLD + gate_BL[..., None].to(added_BLD.dtype) * added_BLD, gate_BL


def budget_loss(
    gates: Sequence[Tensor], costs: Sequence[float], target: float, weight: float = 1.0, real_BL: Tensor | None = None
) -> Tensor:
    """``weight * (C / C_max - target)^2``, C = sum over blocks of mean(gate) * cost, C_max with all gates 1.

    C is linear in the gates, so the sign of the gradient is that of C / C_max - target.

    Args:
        gates: [B, L] of each block.
        costs: FLOPs of each block, or any unit.
        target: share of the cost, 0 to 1 (the papers of this kind use 0.5 to 0.8).
        real_BL: tokens that count; None = all.

    Raises:
        ValueError: other numbers of gates and costs, costs that are not positive, or a target outside 0 to 1.
    """
    if len(gates) != len(costs) or not gates or min(costs) <= 0:
        raise ValueError(f"{len(gates)} gates and costs={list(costs)}: give each block's gate and its positive cost")
    if not 0 <= target <= 1:
        raise ValueError(f"target={target}: choose a share of the cost, 0 to 1")

    def mean(gate_BL: Tensor) -> Tensor:
        return gate_BL.mean() if real_BL is None else (gate_BL * real_BL).sum() / real_BL.sum().clamp(min=1)

    spent = sum(mean(gate) * cost for gate, cost in zip(gates, costs, strict=True)) / sum(costs)
    return weight * (spent - target).square()
