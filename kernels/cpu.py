"""Grouped kernels on a CPU: each expert's products are written into a slice of one preallocated result.

An expert's rows are gathered, multiplied, activated and multiplied again while they are in cache; only the
pre-activation h is kept. The results come back to their tokens in one pass that gathers and sums (``sum_by_token``).

In bfloat16, oneDNN builds a primitive for every new shape, and routing changes the counts every step: row counts are
rounded up to a multiple of ``_BUCKET``. The extra rows are written behind the expert's own, where the next expert's
rows overwrite them; where rows are summed over (weight gradients) they are zero.

A whole expert feed-forward in float32 or bfloat16 is the compiled kernel's where there is one (``native.why_not``): the
code here is for other types, for machines without it, and for single grouped products.
"""

import torch
from torch import Tensor

from . import native
from .activation import activate_into, activation_backward_into

_BUCKET = 32


def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]^T. -> [N, M]"""
    return _times_each(x_NK, w_EMK.mT, counts_E)


def grouped_gemm_input_grad(g_NM: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]. -> [N, K]"""
    return _times_each(g_NM, w_EMK, counts_E)


def grouped_gemm_weight_grad(g_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e of g, transposed, times row block e of x. -> [E, M, K]"""
    blocks = _Blocks(counts_E, g_NM)
    w_EMK = g_NM.new_empty(len(counts_E), g_NM.shape[1], x_NK.shape[1])
    g_buffer, x_buffer = blocks.scratch(g_NM.shape[1]), blocks.scratch(x_NK.shape[1])
    for e, low, high, padded in blocks.busy:
        g = _padded_rows(g_NM, low, high, padded, g_buffer)
        x = _padded_rows(x_NK, low, high, padded, x_buffer)
        torch.mm(g.T, x, out=w_EMK[e])
    blocks.zero_empty(w_EMK)
    return w_EMK


def _times_each(x_NK: Tensor, w_EKM: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]. -> [N, M]"""
    blocks = _Blocks(counts_E, x_NK)
    y = blocks.rows(w_EKM.shape[2])
    buffer = blocks.scratch(x_NK.shape[1])
    for e, low, high, padded in blocks.busy:
        torch.mm(_readable_rows(x_NK, low, high, padded, buffer), w_EKM[e], out=y[low : low + padded])
    return y[: len(x_NK)]


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
    """-> the result, [T, D] or [N, D]; h [N, H'], and the order of rows by token [N], each empty unless ``keep``"""
    if native.why_not(x_TD.dtype) is None:
        return native.expert_mlp_forward(
            x_TD, w_in, w_out, b_in, b_out, counts_E, token_N, weight_N, combine, activation, keep
        )
    dim, hidden = w_out.shape[1:]
    blocks = _Blocks(counts_E, x_TD if token_N is None else token_N, x_TD.dtype)
    y_ND = blocks.rows(dim)
    h_NH = blocks.rows(w_in.shape[1]) if keep else blocks.scratch(w_in.shape[1])
    x_buffer, a_buffer = blocks.scratch(dim), blocks.scratch(hidden)
    w_in_T, w_out_T = w_in.mT.unbind(0), w_out.mT.unbind(0)
    for e, low, high, padded in blocks.busy:
        x = _take_rows(x_TD, token_N, low, high, padded, x_buffer)
        h = h_NH[low : low + padded] if keep else h_NH[:padded]
        y = y_ND[low : low + padded]
        a = a_buffer[:padded]
        _linear_into(x, w_in_T[e], None if b_in is None else b_in[e], h)
        activate_into(h, a, activation)
        _linear_into(a, w_out_T[e], None if b_out is None else b_out[e], y)
        if weight_N is not None and not combine:
            y_ND[low:high].mul_(weight_N[low:high, None])
    y_ND = y_ND[: blocks.total]
    order_N = order_by_token(token_N) if token_N is not None and (combine or keep) else counts_E.new_empty(0)
    if combine:
        y_ND = sum_by_token(y_ND, token_N, order_N, len(x_TD), weight_N)
    h_NH = h_NH[: blocks.total] if keep else x_TD.new_empty(0)
    return y_ND, h_NH, order_N if keep else counts_E.new_empty(0)


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
    if native.why_not(x_TD.dtype) is None:
        return native.expert_mlp_backward(
            dy, x_TD, w_in, w_out, b_in, b_out, counts_E, token_N, weight_N, h_NH, order_N, combine, activation, needs
        )
    need_x, need_w_in, need_w_out, need_b_in, need_b_out, need_weight = needs
    dim, hidden = w_out.shape[1:]
    blocks = _Blocks(counts_E, h_NH)
    dx_ND = blocks.rows(dim if need_x else 0)
    dw_in, dw_out, db_in, db_out, dweight_N = (
        torch.empty(tensor.shape, dtype=tensor.dtype) if need else x_TD.new_empty(0)
        for tensor, need in zip((w_in, w_out, b_in, b_out, weight_N), needs[1:], strict=True)
    )
    x_buffer, dy_buffer = blocks.scratch(dim), blocks.scratch(dim)
    a_buffer, da_buffer, dh_buffer = (blocks.scratch(width) for width in (hidden, hidden, h_NH.shape[1]))
    weight_N1 = None if weight_N is None else weight_N[:, None]

    for e, low, high, padded in blocks.busy:
        n = high - low
        dy_rows = _take_rows(dy, token_N if combine else None, low, high, padded, dy_buffer, clean=True)
        da, a, dh = da_buffer[:padded], a_buffer[:padded], dh_buffer[:padded]
        # da and dh lack the routing weight: it comes in where rows are D wide, which is the narrower side
        torch.mm(dy_rows, w_out[e], out=da)
        activation_backward_into(h_NH[low:high], da[:n], a[:n], dh[:n], activation)
        if padded > n:
            a[n:].zero_()
            dh[n:].zero_()
        if need_weight:
            # <dY, a W_out^T> = <dY W_out, a>: the routing weight's gradient without the expert's output
            torch.sum(da[:n].mul_(a[:n]), -1, dtype=weight_N.dtype, out=dweight_N[low:high])
            if b_out is not None:
                dweight_N[low:high].add_(torch.mv(dy_rows[:n], b_out[e]))
        if need_w_out or need_b_out:
            dy_rows = _weighted(dy_rows, weight_N1, low, high, dy_buffer)
        if need_w_out:
            torch.mm(dy_rows.T, a, out=dw_out[e])
        if need_b_out:
            torch.sum(dy_rows, 0, out=db_out[e])
        if need_x:
            torch.mm(dh, w_in[e], out=dx_ND[low : low + padded])
        if need_w_in:
            x = _take_rows(x_TD, token_N, low, high, padded, x_buffer, clean=True)
            torch.mm(dh.T, _weighted(x, weight_N1, low, high, x_buffer), out=dw_in[e])
        if need_b_in:
            torch.sum(_weighted(dh, weight_N1, low, high, dh_buffer), 0, out=db_in[e])

    for gradient, need in zip((dw_in, dw_out, db_in, db_out), needs[1:], strict=False):
        if need:
            blocks.zero_empty(gradient)
    dx = dx_ND[: blocks.total]
    if need_x and token_N is not None:
        dx = sum_by_token(dx, token_N, order_N, len(x_TD), weight_N)
    elif need_x and weight_N is not None:
        dx.mul_(weight_N1)
    return dx, dw_in, dw_out, db_in, db_out, dweight_N


def order_by_token(token_N: Tensor) -> Tensor:
    """The rows in the order of their tokens, stable. -> [N]"""
    return token_N.argsort(stable=True)


def sum_by_token(rows_ND: Tensor, token_N: Tensor, order_N: Tensor, num_tokens: int, weight_N: Tensor | None) -> Tensor:
    """Sums the rows of each token, times their weights where given; tokens without a row get 0. -> [T, D]"""
    # bincount would read the largest id to size its result
    count_T = torch.zeros(num_tokens, dtype=torch.int64).scatter_add_(0, token_N, torch.ones_like(token_N))
    start_T = count_T.cumsum(0) - count_T
    weight = None if weight_N is None else weight_N[order_N].to(rows_ND.dtype)
    # a bag is a token: one pass that gathers, weighs and sums in float32, where index_add_ goes row by row
    return torch.embedding_bag(rows_ND, order_N, start_T, mode=0, per_sample_weights=weight)[0]


class _Blocks:
    """Where each expert's rows lie, and buffers that have room for the rows that bucketing adds.

    ``busy`` lists (expert, low, high, padded row count) of the experts that have rows.
    """

    def __init__(self, counts_E: Tensor, sorted_rows: Tensor, dtype: torch.dtype | None = None) -> None:
        counts = counts_E.tolist()
        self.total = sum(counts)
        if self.total != len(sorted_rows) or min(counts, default=0) < 0:
            raise ValueError(f"counts {counts} add up to {self.total}: expected {len(sorted_rows)}, one an expert row")
        self.dtype = dtype or sorted_rows.dtype
        bucket = _BUCKET if self.dtype == torch.bfloat16 else 1
        self.spare = bucket - 1
        self.empty, self.busy, low = [], [], 0
        for e, count in enumerate(counts):
            if count:
                self.busy.append((e, low, low + count, -(-count // bucket) * bucket))
            else:
                self.empty.append(e)
            low += count
        self.most = max((padded for *_, padded in self.busy), default=0)

    def rows(self, width: int) -> Tensor:
        """Uninitialised rows for all experts and the last one's padding. [N + spare, width]"""
        return torch.empty(self.total + self.spare, width, dtype=self.dtype)

    def scratch(self, width: int) -> Tensor:
        """Uninitialised rows for any one expert with its padding."""
        return torch.empty(self.most, width, dtype=self.dtype)

    def zero_empty(self, gradient_E: Tensor) -> None:
        """Zeroes the gradient of the experts that have no rows."""
        for e in self.empty:
            gradient_E[e].zero_()


def _take_rows(
    x: Tensor, token_N: Tensor | None, low: int, high: int, padded: int, buffer: Tensor, *, clean: bool = False
) -> Tensor:
    """An expert's rows of x: those of its tokens, or ``low`` to ``high`` where x is sorted. -> [padded, width]

    The rows beyond ``high - low`` are 0 where ``clean``, else anything.
    """
    if token_N is None:
        take = _padded_rows if clean else _readable_rows
        return take(x, low, high, padded, buffer)
    torch.index_select(x, 0, token_N[low:high], out=buffer[: high - low])
    if clean and padded > high - low:
        buffer[high - low : padded].zero_()
    return buffer[:padded]


def _readable_rows(x_NK: Tensor, low: int, high: int, padded: int, buffer: Tensor) -> Tensor:
    """Rows ``low`` to ``high`` of x and any others up to ``padded``, without a copy where x reaches so far."""
    if low + padded <= len(x_NK):
        return x_NK[low : low + padded]
    buffer[: high - low].copy_(x_NK[low:high])
    return buffer[:padded]


def _padded_rows(x_NK: Tensor, low: int, high: int, padded: int, buffer: Tensor) -> Tensor:
    """Rows ``low`` to ``high`` of x and zeros up to ``padded``, without a copy where nothing is added."""
    if padded == high - low:
        return x_NK[low:high]
    buffer[: high - low].copy_(x_NK[low:high])
    buffer[high - low : padded].zero_()
    return buffer[:padded]


def _weighted(rows: Tensor, weight_N1: Tensor | None, low: int, high: int, buffer: Tensor) -> Tensor:
    """An expert's rows (with their zero padding) times their weights, in ``buffer``."""
    if weight_N1 is None:
        return rows
    n = high - low
    torch.mul(rows[:n], weight_N1[low:high], out=buffer[:n])
    return buffer[: len(rows)]


def _linear_into(x: Tensor, w_KM: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes x w + bias into ``y``."""
    if bias is None:
        torch.mm(x, w_KM, out=y)
    else:
        torch.addmm(bias, x, w_KM, out=y)
