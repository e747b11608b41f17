"""The definition of every grouped kernel: a loop over experts in plain differentiable operations.

Rows are sorted by expert; expert e has ``counts[e]`` of them. Slow, short, any device, any dtype: what every other
backend is held to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activate
from .backend import accumulation_dtype


def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]^T. -> [N, M]"""
    blocks = x_NK.split(counts_E.tolist())
    return torch.cat([block @ w_MK.T for block, w_MK in zip(blocks, w_EMK.unbind(0), strict=True)])


def grouped_gemm_input_grad(g_NM: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]. -> [N, K]"""
    blocks = g_NM.split(counts_E.tolist())
    return torch.cat([block @ w_MK for block, w_MK in zip(blocks, w_EMK.unbind(0), strict=True)])


def grouped_gemm_weight_grad(g_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e of g, transposed, times row block e of x. -> [E, M, K]"""
    counts = counts_E.tolist()
    return torch.stack([g.T @ x for g, x in zip(g_NM.split(counts), x_NK.split(counts), strict=True)])


def expert_mlp(
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts_E: Tensor,
    token_N: Tensor | None,
    weight_N: Tensor | None,
    combine: bool,
    activation: str,
) -> Tensor:
    """As ``expert_mlp.expert_mlp``. -> [T, D] where ``combine``, else [N, D]"""
    x_ND = x_TD if token_N is None else x_TD[token_N]
    counts = counts_E.tolist()
    nobody = len(x_ND) - sum(counts)
    blocks = []
    for e, x in enumerate(x_ND.split([*counts, nobody])[:-1]):
        h = F.linear(x, w_in.unbind(0)[e], None if b_in is None else b_in.unbind(0)[e])
        a = activate(h, activation)
        blocks.append(F.linear(a, w_out.unbind(0)[e], None if b_out is None else b_out.unbind(0)[e]))
    blocks.append(x_ND.new_zeros(nobody, x_TD.shape[1]))
    y_ND = torch.cat(blocks).to(accumulation_dtype(x_TD.dtype))
    if weight_N is not None:
        y_ND = y_ND * weight_N[:, None]
    if combine:
        y_ND = torch.zeros(x_TD.shape, dtype=y_ND.dtype, device=x_TD.device).index_add(0, token_N, y_ND)
    return y_ND.to(x_TD.dtype)
