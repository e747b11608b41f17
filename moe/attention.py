"""Attention that routes: which regions a query looks at, and which heads a token takes part in.

``BiLevelRoutingAttention`` (BiFormer, arXiv:2303.08810): the image is cut into R = S * S regions; each region's queries
attend to the tokens of the K regions that are nearest to it in mean key.

    q, k, v = x W_qkv + b                                  [HW, C] each
    q_r, k_r = mean of q, k over region r, no gradient
    I_r = the K largest of q_r k^T                         the same for all heads; the own region is not forced in
    out = softmax(scale * q K_g^T) V_g  over the K * HW / R tokens of the regions I_r
    y = (out + depthwise convolution of v) W_o + b_o

The released scale is C^-1/2, not the width of a head^-1/2: ``scale="dim"``. Nothing trains the routing: queries and
keys learn through the token attention alone. Held to a case that the released code computed.

``RoutedHeadAttention`` (Union of Experts, arXiv:2503.02495, section on attention): experts are heads. Any ``Router``
over ``num_heads`` ids says which heads a token takes part in; a head attends among its own tokens only.

    out_t = sum over the heads h of t of  w_th * softmax(q_th K_h^T / sqrt(d_h)) V_h W_o^h

With every head on and weight 1 it is multi-head attention. What the released code does besides is not here: positions
that count inside the selection, and a memory of earlier segments.

``ModalityAttention`` (Mixture-of-Transformers, arXiv:2411.04996): every weight is a modality's own, the attention is
over all tokens together. Nothing is chosen; with equal weights in every modality it is multi-head attention.

    q_t, k_t, v_t = W_qkv[m_t] x_t;     y_t = W_o[m_t] attention(q, K, V)_t

The ``modality`` router makes the feed-forward that goes with it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.grouped_gemm import grouped_gemm
from ..kernels.permute import permute, sort_by_expert
from ..routers.base import Router, Routing, TokenContext
from ..routers.selection import known_ids


class BiLevelRoutingAttention(nn.Module):
    """``y, regions = attention(x_BLD, grid)``; y [B, L, D], regions [B, R, K] the regions that each region looks at.

    Args:
        dim: token width, C.
        num_heads: of the token attention; they share the regions.
        regions: S, regions a side.
        top_k: K, regions a region looks at; at most S * S.
        scale: of the token attention: "dim" (C^-1/2, as released) or "head" (width of a head^-1/2).
        local_kernel: side of the depthwise convolution of v; 0 = none.
        mask_padding: where S does not divide the image it is padded; keys there get no attention. The released code
            lets them in, as zeros: False.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        regions: int = 7,
        top_k: int = 4,
        scale: Literal["dim", "head"] = "dim",
        local_kernel: int = 5,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if regions < 1 or not 1 <= top_k <= regions**2:
            raise ValueError(f"top_k={top_k}, regions={regions}: choose 1 to regions^2={regions**2}")
        if scale not in ("dim", "head"):
            raise ValueError(f'scale="{scale}": choose "dim" or "head"')
        if local_kernel < 0 or local_kernel and local_kernel % 2 == 0:
            raise ValueError(f"local_kernel={local_kernel}: choose an odd size, or 0 for none")
        self.num_heads, self.regions, self.top_k, self.mask_padding = num_heads, regions, top_k, mask_padding
        self.scale = (dim if scale == "dim" else dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.local = None
        if local_kernel:
            self.local = nn.Conv2d(dim, dim, local_kernel, padding=local_kernel // 2, groups=dim)

    def forward(self, x_BLD: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """
        Args:
            grid: (H, W) with H * W = L.

        Raises:
            ValueError: a grid of another number of cells.
        """
        batch, length, dim = x_BLD.shape
        if math.prod(grid) != length:
            raise ValueError(f"grid={grid} has {math.prod(grid)} cells: expected the {length} tokens of x")
        q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        real_RN = self._to_regions(x_BLD.new_ones(1, length, 1), grid)[0, :, :, 0]
        count_R1 = real_RN.sum(1, keepdim=True)
        query, key, value = (self._to_regions(part, grid) for part in (q, k, v))
        mean_q, mean_k = (part.detach().sum(2) / count_R1.clamp(min=1) for part in (query, key))
        affinity_BRR = mean_q @ mean_k.transpose(1, 2)
        # a region of padding alone is not worth a look
        affinity_BRR = affinity_BRR.masked_fill(count_R1.view(1, 1, -1) == 0, -torch.inf)
        chosen_BRK = affinity_BRR.topk(self.top_k, dim=-1).indices

        sample = torch.arange(batch, device=x_BLD.device)[:, None, None]
        key, value = (part[sample, chosen_BRK].flatten(2, 3) for part in (key, value))
        mask = None
        if self.mask_padding and length < real_RN.numel():
            mask = (real_RN > 0)[chosen_BRK].flatten(2, 3).flatten(0, 1)[:, None, None, :]
        heads = (part.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.scale)
        out_BLD = self._to_tokens(out.transpose(1, 2).flatten(2).unflatten(0, (batch, -1)), grid)
        if self.local is not None:
            image = v.transpose(1, 2).unflatten(2, grid)
            out_BLD = out_BLD + self.local(image).flatten(2).transpose(1, 2)
        return self.out(out_BLD), chosen_BRK

    def _padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(-(-side // self.regions) * self.regions for side in grid)

    def _to_regions(self, x_BLC: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H * W, C] -> [B, R, tokens of a region, C], zeros where the image ends."""
        (height, width), s = self._padded(grid), self.regions
        x = F.pad(x_BLC.unflatten(1, grid), (0, 0, 0, width - grid[1], 0, height - grid[0]))
        return x.view(len(x), s, height // s, s, width // s, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _to_tokens(self, x_BRNC: Tensor, grid: tuple[int, int]) -> Tensor:
        (height, width), s = self._padded(grid), self.regions
        x = x_BRNC.view(len(x_BRNC), s, s, height // s, width // s, -1).transpose(2, 3)
        return x.reshape(len(x), height, width, -1)[:, : grid[0], : grid[1]].flatten(1, 2)


class RoutedHeadAttention(nn.Module):
    """``y, routing = attention(x_BLD, context)``: each token takes part in the heads that its router chooses.

    A head costs (c / L)^2 of its full attention, c the most tokens that any head has in any sample.

    Args:
        router: over ``num_heads`` routed ids, whatever chooses: ``union`` as published, ``topk``, ...
        dim: token width, D.
        num_heads: H.
        causal: whether a token attends to earlier ones only.
        bias: of the four linear maps.

    Raises:
        ValueError: heads that do not divide the width, or a router over other ids; when called, ``context.causal``
            without ``causal``.
    """

    def __init__(self, router: Router, *, dim: int, num_heads: int, causal: bool = False, bias: bool = False) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if router.expert_kinds != ("routed",) * num_heads:
            raise ValueError(
                f"the router addresses {router.bank_size} experts, {router.expert_kinds.count('routed')} of them "
                f"routed: expected {num_heads} routed ones, one a head"
            )
        self.router, self.num_heads, self.causal = router, num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x_BLD: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        context = TokenContext.for_tokens(x_BLD, causal=self.causal) if context is None else context
        _check_causal(self, context)
        x_BLD = _without_padding(x_BLD, context)
        batch, length, _ = x_BLD.shape
        routing = self.router(x_BLD.flatten(0, 1), context)
        token, head, weight = routing.as_list()
        weight_TH = weight.new_zeros(batch * length, self.num_heads).index_put((token, head), weight)
        taken_TH = torch.zeros_like(weight_TH, dtype=torch.bool).index_put((token, head), torch.ones_like(token) > 0)
        taken_BHL, weight_BHL = (part.view(batch, length, -1).transpose(1, 2) for part in (taken_TH, weight_TH))

        # the tokens of each head first, in their order, so that a causal mask stays a triangle
        size = int(taken_BHL.sum(-1).max()) if taken_BHL.numel() else 0
        order_BHC = (~taken_BHL).long().argsort(dim=-1, stable=True)[..., :size]
        real_BHC = taken_BHL.gather(-1, order_BHC)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x_BLD).chunk(3, dim=-1)
        )
        at = order_BHC[..., None].expand(-1, -1, -1, q.shape[-1])
        mask = real_BHC[:, :, None, :]
        if self.causal:
            mask = mask & torch.ones(size, size, dtype=torch.bool, device=x_BLD.device).tril()
        # the row of a token that the head does not have may be all False: its result is not used
        mask = mask | ~real_BHC[..., None]
        out = F.scaled_dot_product_attention(*(part.gather(2, at) for part in (q, k, v)), attn_mask=mask)
        out = out * (weight_BHL.gather(-1, order_BHC) * real_BHC)[..., None].to(out.dtype)
        out_BLD = torch.zeros_like(q).scatter_add(2, at, out).transpose(1, 2).flatten(2)
        return self.out(out_BLD), routing


class ModalityLinear(nn.Module):
    """``y_t = W[m_t] x_t``: a linear map without bias for every modality. x [T, D_in], modality [T] -> [T, D_out]"""

    def __init__(self, num_modalities: int, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_modalities, dim_out, dim_in))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, x_TD: Tensor, modality_T: Tensor) -> Tensor:
        order, counts, _ = sort_by_expert(modality_T, len(self.weight))
        rows = grouped_gemm(permute(x_TD, order), self.weight, counts)
        return torch.empty_like(rows).index_copy(0, order, rows)


class ModalityAttention(nn.Module):
    """``y = attention(x_BLD, context)``; reads ``context.modality`` and, where there is one, ``context.padding_mask``.

    Args:
        dim: token width, D.
        num_heads: H.
        num_modalities: M.
        causal: whether a token attends to earlier ones only.

    Raises:
        ValueError: heads that do not divide the width, or a context without modalities.
    """

    def __init__(self, *, dim: int, num_heads: int, num_modalities: int, causal: bool = False) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if num_modalities < 1:
            raise ValueError(f"num_modalities={num_modalities}: choose at least 1")
        self.num_heads, self.causal = num_heads, causal
        self.qkv = ModalityLinear(num_modalities, dim, 3 * dim)
        self.out = ModalityLinear(num_modalities, dim, dim)

    def forward(self, x_BLD: Tensor, context: TokenContext, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            mask: [B, L, L] bool, True = query i may look at key j; besides the causal one and the padding.

        Raises:
            ValueError: a context without modalities, or of a model that decodes left to right, where neither ``causal``
                nor a mask keeps tokens from looking at later ones.
            RuntimeError: a real token's modality is not 0 to num_modalities - 1.
        """
        if context.modality is None:
            raise ValueError("context.modality is missing: give TokenContext.for_tokens(x, modality=...), [B, L] ids")
        if mask is None:
            _check_causal(self, context)
        x_BLD = _without_padding(x_BLD, context)
        batch, length, _ = x_BLD.shape
        count = len(self.qkv.weight)
        modality_T = known_ids(context.modality, count, context.real_T, "context.modality", "num_modalities")
        qkv = self.qkv(x_BLD.flatten(0, 1), modality_T).view(batch, length, 3, self.num_heads, -1)
        allowed = None if mask is None else mask[:, None]
        if context.padding_mask is not None:
            keys = context.padding_mask[:, None, None, :]
            allowed = keys if allowed is None else allowed & keys
        if self.causal and allowed is not None:
            allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=x_BLD.device).tril()
        out = F.scaled_dot_product_attention(
            *qkv.permute(2, 0, 3, 1, 4), attn_mask=allowed, is_causal=self.causal and allowed is None
        )
        out_TD = out.transpose(1, 2).reshape(batch * length, -1)
        return self.out(out_TD, modality_T).view_as(x_BLD)


def _check_causal(attention: RoutedHeadAttention | ModalityAttention, context: TokenContext) -> None:
    if context.causal and not attention.causal:
        raise ValueError(
            f"{type(attention).__name__} was made with causal=False, so that a token looks at later ones, and "
            "context.causal says that the model decodes left to right: make it with causal=True"
        )


def _without_padding(x_BLD: Tensor, context: TokenContext) -> Tensor:
    """0 at padded tokens, which may hold anything: 0 * NaN would reach who looks at them with weight 0."""
    return x_BLD if context.padding_mask is None else x_BLD.masked_fill(~context.padding_mask[..., None], 0)


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads={num_heads}: choose a divisor of dim={dim}")
