"""Grouped kernels in Triton: gathers, biases, activations and routing weights inside the products.

    forward     h, a = f(x[token] W_in^T)      y = weight * (a W_out^T)      out[t] = sum of t's rows of y
    backward    dh, weight * a, dweight from dY[token] W_out and h
                dW_in = dh^T x[token]     dW_out = dY[token]^T (weight * a)     dx[t] = sum of t's rows of dh W_in

Kept for backward are x, h and the order of rows by token, as in SonicMoE (arXiv:2512.14080): no gathered copy of x or
dY exists, forward or backward. Sums by token gather too, so that nothing is added atomically: results are the same
every time, as long as the tile sizes are (``triton_tuning``).

Counts stay on the device. Grids depend on the number of rows, widths and experts only, so what runs can be captured in
a CUDA graph, and no operation here has a result whose shape depends on data. Rows beyond the counts belong to nobody:
they cost nothing, and count as 0.

Imported only where this backend is chosen: Triton decides at its import whether it interprets (TRITON_INTERPRET=1).
"""

import contextlib
import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_kernels as kernels
from .activation import GATED
from .triton_tuning import Config, choose, interpreted

_GATE = {"swiglu": "silu", "geglu": "gelu"}
_SMALL = {"num_warps": 4, "enable_fp_fusion": True}  # how kernels without products are started
PIECE = 32  # numbers of a tile that a thread works off at a time in an epilogue with many operands
_ALIGNMENT = 16  # bytes, of the rows that Hopper's tensor memory accelerator loads


def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]^T. -> [N, M]"""
    return _grouped_product(x_NK, w_EMK, counts_E, transposed=True)


def grouped_gemm_input_grad(g_NM: Tensor, w_EMK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e times w[e]. -> [N, K]"""
    return _grouped_product(g_NM, w_EMK, counts_E, transposed=False)


def grouped_gemm_weight_grad(g_NM: Tensor, x_NK: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e of g, transposed, times row block e of x. -> [E, M, K]"""
    with _on(g_NM):
        return _weight_grad(_Rows(counts_E, len(g_NM)), g_NM.contiguous(), x_NK.contiguous())


def _grouped_product(x_NK: Tensor, w: Tensor, counts_E: Tensor, *, transposed: bool) -> Tensor:
    y = x_NK.new_zeros(len(x_NK), w.shape[1 if transposed else 2])
    with _on(x_NK):
        _product(_Rows(counts_E, len(x_NK)), x_NK.contiguous(), w.contiguous(), y, transposed=transposed)
    return y


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
    w_in, w_out, b_in, b_out, token_N, weight_N = _contiguous(w_in, w_out, b_in, b_out, token_N, weight_N)
    rows = _Rows(counts_E, len(x_TD) if token_N is None else len(token_N))
    h_NH = x_TD.new_empty(rows.num, w_in.shape[1]) if keep else x_TD.new_empty(0)
    a_NH = x_TD.new_empty(rows.num, w_out.shape[2])
    # without a sum over tokens, rows of nobody are part of the result
    y = (x_TD.new_empty if combine else x_TD.new_zeros)(rows.num, x_TD.shape[1])
    order_N = starts_T1 = counts_E.new_empty(0)
    with _on(x_TD):
        keep_h = h_NH if keep else None
        _product(rows, x_TD, w_in, a_NH, transposed=True, token_N=token_N, bias=b_in, activation=activation, h=keep_h)
        _product(rows, a_NH, w_out, y, transposed=True, bias=b_out, weight_N=weight_N)
        del a_NH
        if token_N is not None and (combine or keep):
            order_N, starts_T1 = rows.by_token(token_N, len(x_TD))
        if combine:
            y = _sum_tokens(y, order_N, starts_T1)
    return y, h_NH, order_N if keep else counts_E.new_empty(0)


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
    w_in, w_out, b_in, b_out, token_N, weight_N = _contiguous(w_in, w_out, b_in, b_out, token_N, weight_N)
    need_x, need_w_in, need_w_out, need_b_in, need_b_out, need_weight = needs
    dx, dw_in, dw_out, db_in, db_out, dweight_N = (x_TD.new_empty(0) for _ in needs)
    rows = _Rows(counts_E, len(h_NH))
    dy_token_N = token_N if combine else None
    with _on(x_TD):
        # a comes times its routing weight, which dW_out then need not apply to the wider side
        dh_NH, a_NH, shares_N = _hidden_grad(rows, dy, w_out, h_NH, dy_token_N, weight_N, activation, need_weight)
        if need_weight:
            dweight_N = shares_N if b_out is None else shares_N + _row_products(rows, dy, b_out, dy_token_N)
        if need_w_out:
            dw_out = _weight_grad(rows, dy, a_NH, g_token_N=dy_token_N)
        if need_b_out:
            db_out = _sum_experts(rows, dy, dy_token_N, weight_N)
        del a_NH
        if need_w_in:
            dw_in = _weight_grad(rows, dh_NH, x_TD, x_token_N=token_N)
        if need_b_in:
            db_in = _sum_experts(rows, dh_NH)
        if need_x:
            dx = (x_TD.new_zeros if token_N is None else x_TD.new_empty)(rows.num, x_TD.shape[1])
            _product(rows, dh_NH, w_in, dx, transposed=False)
            del dh_NH
            if token_N is not None:
                dx = _sum_tokens(dx, order_N, rows.starts(token_N, order_N, len(x_TD)))
    return dx, dw_in, dw_out, db_in, db_out, dweight_N


class _Rows:
    """Where each expert's rows lie: known on the device only.

    Attributes:
        num: N, rows; the counts add up to at most that.
    """

    def __init__(self, counts_E: Tensor, num_rows: int) -> None:
        self.counts_E, self.num = counts_E.contiguous(), num_rows
        self._tiles: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def tiles(self, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For tiles of m rows: where experts end [E], each tile's expert and first row [most], how many there are."""
        if m not in self._tiles:
            counts_E = self.counts_E
            ends_E, expert, row, number = (
                torch.empty(size, dtype=torch.int32, device=counts_E.device)
                for size in (len(counts_E), self.most_tiles(m), self.most_tiles(m), 1)
            )
            experts = triton.next_power_of_2(len(counts_E))
            at_once = max(2, min(64, 8192 // experts))  # each is compared with every expert, in registers
            kernels.tiles[(triton.cdiv(self.most_tiles(m), at_once),)](
                counts_E, ends_E, expert, row, number, len(counts_E),
                BM=m, BE=experts, BT=at_once, **_SMALL,
            )  # fmt: skip
            self._tiles[m] = ends_E, expert, row, number
        return self._tiles[m]

    def ends(self) -> Tensor:
        """Where each expert's rows end. [E]"""
        return (next(iter(self._tiles.values())) if self._tiles else self.tiles(128))[0]

    def most_tiles(self, m: int) -> int:
        """Full tiles, and one that is not full for each expert that has rows."""
        return self.num // m + min(len(self.counts_E), self.num)

    def by_token(self, token_N: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The rows in the order of their tokens, stable, nobody's last; where each token's begin. [N], [T + 1]"""
        sorted_N, order_N = self._keys(token_N, num_tokens).sort(stable=True)
        return order_N, self._starts(sorted_N, num_tokens)

    def starts(self, token_N: Tensor, order_N: Tensor, num_tokens: int) -> Tensor:
        """Where each token's rows begin in the order. [T + 1]"""
        return self._starts(self._keys(token_N, num_tokens)[order_N], num_tokens)

    def _keys(self, token_N: Tensor, num_tokens: int) -> Tensor:
        nobody_N = torch.arange(self.num, device=token_N.device) >= self.counts_E.sum()
        # the sort goes digit by digit: half as wide keys take half the passes
        return token_N.masked_fill(nobody_N, num_tokens).int()

    @staticmethod
    def _starts(sorted_N: Tensor, num_tokens: int) -> Tensor:
        tokens = torch.arange(num_tokens + 1, dtype=torch.int32, device=sorted_N.device)
        return torch.searchsorted(sorted_N, tokens, out_int32=True)


def _product(
    rows: _Rows,
    x: Tensor,
    w: Tensor,
    y_NM: Tensor,
    *,
    transposed: bool,
    token_N: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    h: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> None:
    """Writes weight * f(x[token] w[e]^T + bias[e]) into ``y_NM`` and what f is applied to into ``h``; w[e] is not
    transposed where it is stored so."""
    if not rows.num:
        return
    gated, width, depth = activation in GATED, y_NM.shape[1], x.shape[1]
    precision = _precision(x)

    def run(config: Config) -> None:
        tiles = rows.tiles(config.m)
        x_tma = token_N is None and _tma(x)
        w_tma = _tma(w)
        # a block of a gated matrix holds a tile of either half
        halves = w.unflatten(1, (2, -1)).flatten(0, 1) if gated else w
        block = (1 + gated, config.n, config.k) if transposed else (1, config.k, config.n)
        kernels.rows[_grid(rows, config, width, x)](
            _descriptor(x, config.m, config.k) if x_tma else x,
            x if token_N is None else token_N,
            _descriptor(halves, *block) if w_tma else w,
            x if bias is None else bias,
            x if weight_N is None else weight_N,
            y_NM if h is None else h,
            y_NM,
            *tiles,
            K=depth,
            N=width,
            GATHER=token_N is not None,
            TRANSPOSED=transposed,
            BIAS=bias is not None,
            ACTIVATION=_GATE.get(activation, activation),
            GATED=gated,
            KEEP=h is not None,
            WEIGHTED=weight_N is not None,
            X_TMA=x_tma,
            W_TMA=w_tma,
            PRECISION=precision,
            UPCAST=interpreted(),
            GROUP=config.group,
            FLATTEN=config.flatten,
            **config.options,
        )

    name = "rows gated" if gated else "rows"
    sizes = (depth, width, w.shape[0], int(transposed), int(token_N is not None), int(h is not None))
    run(choose(name, x.dtype, precision, sizes, rows.num, run))


def _hidden_grad(
    rows: _Rows,
    dy: Tensor,
    w_out: Tensor,
    h_NH: Tensor,
    token_N: Tensor | None,
    weight_N: Tensor | None,
    activation: str,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [N, H'], weight * a [N, H], and the gradient of the routing weight but for the bias [N]."""
    num_experts, depth, width = w_out.shape
    dh_NH, a_NH = torch.empty_like(h_NH), h_NH.new_empty(rows.num, width)
    if not rows.num:
        return dh_NH, a_NH, h_NH.new_empty(0, dtype=torch.float32)
    precision = _precision(dy)
    shares: dict[int, Tensor] = {}  # by the number of tiles of columns, each of which writes a row

    def run(config: Config) -> None:
        tiles = rows.tiles(config.m)
        parts = triton.cdiv(width, config.n)
        if parts not in shares:
            # rows of nobody are part of the result
            shares[parts] = dy.new_zeros(parts if need_weight else 0, rows.num, dtype=torch.float32)
        dy_tma = token_N is None and _tma(dy)
        w_tma = _tma(w_out)
        kernels.hidden_grad[_grid(rows, config, width, dy)](
            _descriptor(dy, config.m, config.k) if dy_tma else dy,
            dy if token_N is None else token_N,
            _descriptor(w_out, 1, config.k, config.n) if w_tma else w_out,
            dy if weight_N is None else weight_N,
            h_NH,
            a_NH,
            dh_NH,
            shares[parts],
            rows.num,
            *tiles,
            K=depth,
            N=width,
            GATHER=token_N is not None,
            ACTIVATION=_GATE.get(activation, activation),
            GATED=activation in GATED,
            WEIGHTED=weight_N is not None,
            NEED_WEIGHT=need_weight,
            X_TMA=dy_tma,
            W_TMA=w_tma,
            PRECISION=precision,
            UPCAST=interpreted(),
            GROUP=config.group,
            FLATTEN=config.flatten,
            PIECES=min(4, max(1, config.m * config.n // (config.warps * 32 * PIECE))),
            **config.options,
        )

    sizes = (depth, width, num_experts, int(activation in GATED), int(token_N is not None))
    config = choose("hidden_grad", dy.dtype, precision, sizes, rows.num, run)
    run(config)
    return dh_NH, a_NH, shares[triton.cdiv(width, config.n)].sum(0)


def _weight_grad(
    rows: _Rows, g: Tensor, x: Tensor, *, g_token_N: Tensor | None = None, x_token_N: Tensor | None = None
) -> Tensor:
    """g[rows of e]^T x[rows of e], either gathered by token. -> [E, M, K]"""
    num_experts, depth, width = len(rows.counts_E), g.shape[1], x.shape[1]
    dw = g.new_empty(num_experts, depth, width)
    if not rows.num:
        return dw.zero_()
    token_N = g_token_N if x_token_N is None else x_token_N
    precision = _precision(x)

    def run(config: Config) -> None:
        kernels.weight_grad[(num_experts * triton.cdiv(depth, config.m) * triton.cdiv(width, config.n),)](
            g, x, g if token_N is None else token_N, dw, rows.ends(),
            M=depth, N=width, GATHER_G=g_token_N is not None, GATHER_X=x_token_N is not None,
            PRECISION=precision, UPCAST=interpreted(), GROUP=config.group,
            # where rows are gathered, every other stage holds which ones the next gathers
            **config.options | {"num_stages": config.stages if token_N is None else 2 * config.stages - 1},
        )  # fmt: skip

    sizes = (depth, width, num_experts, int(g_token_N is not None), int(x_token_N is not None))
    run(choose("weight_grad", x.dtype, precision, sizes, rows.num, run))
    return dw


def _row_products(rows: _Rows, dy: Tensor, bias_ED: Tensor, token_N: Tensor | None) -> Tensor:
    """<dY[source n], bias of n's expert>, float32, 0 for rows of nobody. [N]"""
    product_N = dy.new_zeros(rows.num, dtype=torch.float32)
    m, n = _block(32, 128)
    if rows.num:
        kernels.row_products[(rows.most_tiles(m),)](
            dy, dy if token_N is None else token_N, bias_ED, product_N, *rows.tiles(m),
            N=dy.shape[1], GATHER=token_N is not None, BM=m, BN=n, **_SMALL,
        )  # fmt: skip
    return product_N


def _sum_tokens(rows_ND: Tensor, order_N: Tensor, starts_T1: Tensor) -> Tensor:
    """The sum of each token's rows. [T, D]"""
    num_tokens, width = len(starts_T1) - 1, rows_ND.shape[1]
    if not len(rows_ND):
        return rows_ND.new_zeros(num_tokens, width)
    out_TD = rows_ND.new_empty(num_tokens, width)
    # 16 bytes a thread
    n = min(triton.next_power_of_2(width), 128 * _ALIGNMENT // rows_ND.element_size())
    together = min(8, triton.next_power_of_2(triton.cdiv(len(rows_ND), max(1, num_tokens))))
    if num_tokens:
        kernels.sum_tokens[(num_tokens, triton.cdiv(width, n))](
            rows_ND, order_N, starts_T1, out_TD, N=width, BN=n, TOGETHER=together, **_SMALL
        )
    return out_TD


def _sum_experts(rows: _Rows, x: Tensor, token_N: Tensor | None = None, weight_N: Tensor | None = None) -> Tensor:
    """The sum of each expert's rows, gathered by token and times their weights where given. [E, M]"""
    out_EM = x.new_zeros(len(rows.counts_E), x.shape[1])
    r, n = _block(64, 64)
    if rows.num:
        kernels.sum_experts[(len(out_EM), triton.cdiv(x.shape[1], n))](
            x, x if token_N is None else token_N, x if weight_N is None else weight_N, out_EM, rows.ends(),
            N=x.shape[1], GATHER=token_N is not None, WEIGHTED=weight_N is not None, BR=r, BN=n, **_SMALL,
        )  # fmt: skip
    return out_EM


def _grid(rows: _Rows, config: Config, width: int, x: Tensor) -> tuple[int]:
    """As many programs as the GPU holds at once, or as there can be tiles."""
    most = rows.most_tiles(config.m) * triton.cdiv(width, config.n)
    return (min(most, _multiprocessors(x.device) * config.programs),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # in the interpreter: few enough that a program takes several tiles
    return 2 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_tma(device: torch.device) -> bool:
    if interpreted():
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _tma(x: Tensor) -> bool:
    """Whether tiles of it are loaded by the tensor memory accelerator: half types, rows of a multiple of 16 bytes. What
    is multiplied without tensor cores goes through registers anyway."""
    aligned = x.shape[-1] * x.element_size() % _ALIGNMENT == 0 and x.data_ptr() % _ALIGNMENT == 0
    return x.element_size() == 2 and aligned and _has_tma(x.device)


def _descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """For blocks of this shape; what they reach over an edge is 0."""
    return TensorDescriptor(x, x.shape, x.stride(), list(block))


def _precision(x: Tensor) -> str:
    """What torch's own products of this dtype have: in float32, tf32 where it was asked for."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _block(rows: int, columns: int) -> tuple[int, int]:
    # small in the interpreter, so that small cases have several
    return (16, 16) if interpreted() else (rows, columns)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _on(x: Tensor):
    """Kernels start on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
