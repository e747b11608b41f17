"""Grouped matrix products: rows sorted by expert, each expert's block times the expert's own matrix.

    grouped_gemm               y[rows of e] = x[rows of e] w[e]^T         [N, K], [E, M, K] -> [N, M]
    grouped_gemm_input_grad    x[rows of e] = g[rows of e] w[e]           [N, M], [E, M, K] -> [N, K]
    grouped_gemm_weight_grad   w[e] = g[rows of e]^T x[rows of e]         [N, M], [N, K]    -> [E, M, K]

Expert e has ``counts[e]`` rows, which may be none; the counts add up to N. The three are each other's gradients, so
each is differentiable as often as one likes. Under autocast they compute in its dtype, as F.linear does; otherwise
both operands have one dtype, which is also the result's.
"""

import torch
from torch import Tensor

from . import reference
from .backend import autocast_dtype, backend_module, choose_backend


def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, counts_E: Tensor, *, backend: str | None = None) -> Tensor:
    """[N, K] x [E, M, K] -> [N, M]: row block e times w[e]^T.

    Args:
        x_NK: rows sorted by expert.
        w_EMK: a matrix an expert, in the orientation of a linear layer.
        counts_E: int64 rows per expert.
        backend: forces one of ``backend.BACKENDS``.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or a forced backend that cannot take them.
    """
    _check(x_NK, w_EMK, counts_E, "x", "w", rows_width=2)
    return _run("grouped_gemm", x_NK, w_EMK, counts_E, (w_EMK.shape[1], w_EMK.shape[2]), backend)


def grouped_gemm_input_grad(g_NM: Tensor, w_EMK: Tensor, counts_E: Tensor, *, backend: str | None = None) -> Tensor:
    """[N, M] x [E, M, K] -> [N, K]: row block e times w[e]. Otherwise as ``grouped_gemm``."""
    _check(g_NM, w_EMK, counts_E, "g", "w", rows_width=1)
    return _run("grouped_gemm_input_grad", g_NM, w_EMK, counts_E, (w_EMK.shape[1], w_EMK.shape[2]), backend)


def grouped_gemm_weight_grad(g_NM: Tensor, x_NK: Tensor, counts_E: Tensor, *, backend: str | None = None) -> Tensor:
    """[N, M], [N, K] -> [E, M, K]: row block e of g, transposed, times that of x. Otherwise as ``grouped_gemm``."""
    if g_NM.dim() != 2 or x_NK.dim() != 2 or len(g_NM) != len(x_NK):
        raise ValueError(f"g {tuple(g_NM.shape)} and x {tuple(x_NK.shape)}: expected [N, M] and [N, K]")
    return _run("grouped_gemm_weight_grad", g_NM, x_NK, counts_E, (g_NM.shape[1], x_NK.shape[1]), backend)


def _check(rows: Tensor, w_EMK: Tensor, counts_E: Tensor, rows_name: str, w_name: str, *, rows_width: int) -> None:
    if rows.dim() != 2 or w_EMK.dim() != 3 or rows.shape[1] != w_EMK.shape[rows_width]:
        wanted = "[N, K] and [E, M, K]" if rows_width == 2 else "[N, M] and [E, M, K]"
        raise ValueError(
            f"{rows_name} {tuple(rows.shape)} and {w_name} {tuple(w_EMK.shape)}: expected {wanted} with equal widths"
        )
    if counts_E.shape != w_EMK.shape[:1]:
        raise ValueError(f"counts has shape {tuple(counts_E.shape)}: expected ({len(w_EMK)},), one an expert")


def _run(
    name: str, left: Tensor, right: Tensor, counts_E: Tensor, widths: tuple[int, int], backend: str | None
) -> Tensor:
    """Casts for autocast, chooses the backend and calls it."""
    dtype = autocast_dtype(left)
    if dtype == left.dtype != right.dtype:
        raise ValueError(
            f"operands are {left.dtype} and {right.dtype}: give both one dtype, or call under torch.autocast"
        )
    left, right = left.to(dtype), right.to(dtype)
    backend = choose_backend(backend, device=left.device, dtype=dtype, widths=widths)
    if backend == "reference":
        return getattr(reference, name)(left, right, counts_E)
    if backend == "cpu" and dtype == torch.float16:
        return _OPS[name](left.float(), right.float(), counts_E, backend).to(dtype)
    return _OPS[name](left, right, counts_E, backend)


def _call(name: str, backend: str, left: Tensor, right: Tensor, counts_E: Tensor) -> Tensor:
    left = left.contiguous()  # expanded gradients make mm slow and grouped_mm fail
    return getattr(backend_module(backend), name)(left, right.contiguous(), counts_E)


@torch.library.custom_op("gatewright::grouped_gemm", mutates_args=())
def _grouped_gemm(x_NK: Tensor, w_EMK: Tensor, counts_E: Tensor, backend: str) -> Tensor:
    return _call("grouped_gemm", backend, x_NK, w_EMK, counts_E)


@torch.library.custom_op("gatewright::grouped_gemm_input_grad", mutates_args=())
def _input_grad(g_NM: Tensor, w_EMK: Tensor, counts_E: Tensor, backend: str) -> Tensor:
    return _call("grouped_gemm_input_grad", backend, g_NM, w_EMK, counts_E)


@torch.library.custom_op("gatewright::grouped_gemm_weight_grad", mutates_args=())
def _weight_grad(g_NM: Tensor, x_NK: Tensor, counts_E: Tensor, backend: str) -> Tensor:
    return _call("grouped_gemm_weight_grad", backend, g_NM, x_NK, counts_E)


_OPS = {
    "grouped_gemm": _grouped_gemm,
    "grouped_gemm_input_grad": _input_grad,
    "grouped_gemm_weight_grad": _weight_grad,
}


@_grouped_gemm.register_fake
def _(x_NK, w_EMK, counts_E, backend):
    return x_NK.new_empty(x_NK.shape[0], w_EMK.shape[1])


@_input_grad.register_fake
def _(g_NM, w_EMK, counts_E, backend):
    return g_NM.new_empty(g_NM.shape[0], w_EMK.shape[2])


@_weight_grad.register_fake
def _(g_NM, x_NK, counts_E, backend):
    return g_NM.new_empty(counts_E.shape[0], g_NM.shape[1], x_NK.shape[1])


def _save(ctx, inputs, output):
    left, right, counts_E, ctx.backend = inputs
    ctx.save_for_backward(left, right, counts_E)


def _grouped_gemm_backward(ctx, dy_NM):
    x_NK, w_EMK, counts_E = ctx.saved_tensors
    dx = _input_grad(dy_NM, w_EMK, counts_E, ctx.backend) if ctx.needs_input_grad[0] else None
    dw = _weight_grad(dy_NM, x_NK, counts_E, ctx.backend) if ctx.needs_input_grad[1] else None
    return dx, dw, None, None


def _input_grad_backward(ctx, dx_NK):
    g_NM, w_EMK, counts_E = ctx.saved_tensors
    dg = _grouped_gemm(dx_NK, w_EMK, counts_E, ctx.backend) if ctx.needs_input_grad[0] else None
    dw = _weight_grad(g_NM, dx_NK, counts_E, ctx.backend) if ctx.needs_input_grad[1] else None
    return dg, dw, None, None


def _weight_grad_backward(ctx, dw_EMK):
    g_NM, x_NK, counts_E = ctx.saved_tensors
    dg = _grouped_gemm(x_NK, dw_EMK, counts_E, ctx.backend) if ctx.needs_input_grad[0] else None
    dx = _input_grad(g_NM, dw_EMK, counts_E, ctx.backend) if ctx.needs_input_grad[1] else None
    return dg, dx, None, None


_grouped_gemm.register_autograd(_grouped_gemm_backward, setup_context=_save)
_input_grad.register_autograd(_input_grad_backward, setup_context=_save)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save)
