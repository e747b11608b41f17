"""Grouped kernels on torch.nn.functional.grouped_mm: one call for all experts, and no wait for the device.

grouped_mm wants int32 offsets (the end of each expert's rows), row strides that are multiples of 16 bytes and
gradients that are not expanded, and it leaves rows beyond the last offset uninitialised: the caller sees to widths
(``backend.choose_backend``), and rows of nobody are left out here before anything is made of them. It takes no bias: in
half types a bias is added to products that are rounded already.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from .activation import activate_into, activation_backward_into
from .backend import accumulation_dtype


def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]^T. -> [N, M]"""
    return grouped_mm(x_NK, w_EMK.mT, offs=_ends(counts_E))


def grouped_gemm_input_grad(g_NM: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]. -> [N, K]"""
    return grouped_mm(g_NM, w_EMK, offs=_ends(counts_E))


def grouped_gemm_weight_grad(g_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e of g, transposed, times row block e of x. -> [E, M, K]"""
    return grouped_mm(g_NM.T, x_NK, offs=_ends(counts_E))


def _ends(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0, dtype=torch.int32)


def expert_mlp_forward(
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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the result, [T, D] or [N, D]; h [N, H'], empty unless ``keep``; an empty tensor (no order is needed)"""
    x_ND = x_TD if token_N is None else x_TD[token_N]
    expert_N = _expert_of_rows(counts_E, len(x_ND))
    h_NH = grouped_gemm(x_ND, w_in, counts_E)
    if b_in is not None:
        h_NH += b_in[expert_N]
    a_NH = x_TD.new_empty(len(h_NH), w_out.shape[2])
    activate_into(h_NH, a_NH, activation)
    y_ND = grouped_gemm(a_NH, w_out, counts_E)
    if b_out is not None:
        y_ND += b_out[expert_N]
    nobody_N = _of_nobody(counts_E, len(x_ND))
    if combine:
        y = _sum_by_token(y_ND, token_N.masked_fill(nobody_N, len(x_TD)), weight_N, len(x_TD))
    else:
        y = y_ND if weight_N is None else (y_ND * weight_N[:, None]).to(x_TD.dtype)
        y.masked_fill_(nobody_N[:, None], 0)
    return y, h_NH if keep else x_TD.new_empty(0), counts_E.new_empty(0)


def expert_mlp_backward(
    dy: Tensor,
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts_E: Tensor,
    token_N: Tensor | None,
    weight_N: Tensor | None,
    h_NH: Tensor,
    order_N: Tensor,
    combine: bool,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w_in, w_out, b_in, b_out, weight, as far as ``needs`` asks; empty tensors for the others"""
    need_x, need_w_in, need_w_out, need_b_in, need_b_out, need_weight = needs
    dx, dw_in, dw_out, db_in, db_out, dweight_N = (x_TD.new_empty(0) for _ in needs)
    nobody_N = _of_nobody(counts_E, len(h_NH))
    dy_ND = dy[token_N] if combine else dy
    da_NH = grouped_gemm_input_grad(dy_ND, w_out, counts_E)
    a_NH, dh_NH = torch.empty_like(da_NH), torch.empty_like(h_NH)
    if need_weight:
        activate_into(h_NH, a_NH, activation)
        # <dY, a W_out^T> = <dY W_out, a>: the routing weight's gradient without the expert's output
        dweight_N = (a_NH * da_NH.to(weight_N.dtype)).sum(-1)
        if b_out is not None:
            dweight_N += (dy_ND * b_out.to(weight_N.dtype)[_expert_of_rows(counts_E, len(dy_ND))]).sum(-1)
        dweight_N.masked_fill_(nobody_N, 0)
    if weight_N is not None:
        da_NH.mul_(weight_N[:, None])
        dy_ND = (dy_ND * weight_N[:, None]).to(dy.dtype)
    activation_backward_into(h_NH, da_NH, a_NH, dh_NH, activation)
    if need_w_out:
        dw_out = grouped_gemm_weight_grad(dy_ND, a_NH, counts_E)
    if need_b_out:
        db_out = _sum_by_expert(dy_ND, counts_E)
    if need_b_in:
        db_in = _sum_by_expert(dh_NH, counts_E)
    if need_w_in:
        dw_in = grouped_gemm_weight_grad(dh_NH, x_TD if token_N is None else x_TD[token_N], counts_E)
    if need_x:
        dx = grouped_gemm_input_grad(dh_NH, w_in, counts_E)
        if token_N is None:
            dx.masked_fill_(nobody_N[:, None], 0)
        else:
            dx = _sum_by_token(dx, token_N.masked_fill(nobody_N, len(x_TD)), None, len(x_TD))
    return dx, dw_in, dw_out, db_in, db_out, dweight_N


def _expert_of_rows(counts_E: Tensor, num_rows: int) -> Tensor:
    """The expert of each row; of nobody's rows, the last. -> [N]"""
    rows_N = torch.arange(num_rows, device=counts_E.device)
    return torch.searchsorted(counts_E.cumsum(0), rows_N, right=True).clamp_(max=len(counts_E) - 1)


def _of_nobody(counts_E: Tensor, num_rows: int) -> Tensor:
    """Which rows lie beyond the counts: grouped_mm leaves them uninitialised. -> [N] bool"""
    return torch.arange(num_rows, device=counts_E.device) >= counts_E.sum()


def _sum_by_token(rows_ND: Tensor, token_N: Tensor, weight_N: Tensor | None, num_tokens: int) -> Tensor:
    """Sums the rows of each token, times their weights where given, in at least float32; those of token T are left
    out. -> [T, D]"""
    rows = rows_ND.to(accumulation_dtype(rows_ND.dtype))
    if weight_N is not None:
        rows = rows * weight_N[:, None]
    total = rows.new_zeros(num_tokens + 1, rows.shape[1]).index_add_(0, token_N, rows)
    return total[:num_tokens].to(rows_ND.dtype, copy=True)  # results of an operator are no views


def _sum_by_expert(rows_NM: Tensor, counts_E: Tensor) -> Tensor:
    """Sums the rows of each expert. -> [E, M]; as a product with ones, which unlike atomic adds is deterministic"""
    ones = rows_NM.new_ones(len(rows_NM), 16 // rows_NM.element_size())
    return grouped_gemm_weight_grad(ones, rows_NM, counts_E)[:, 0].contiguous()
