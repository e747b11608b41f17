"""Sums and means over segments: rows that share an id.

    segment_sum    out[s] = sum of values[n] with segment[n] = s
    segment_mean   out[s] = segment_sum[s] / max(1, number of n with segment[n] = s)

Ids come in any order; an id without rows gets 0. Half types are summed in float32 and the result has the values'
dtype. Differentiable in the values, float64 too. There are three ways:

    sorted          sorts the ids, then gathers and sums each segment's rows in one pass. CPU, floating point
    scattered       adds row by row (``index_add``). Any device, any dtype
    torch_scatter   the same by the package torch-scatter

``gatewright bench`` measures them: on a CPU ``sorted`` is the fastest, most of all in half types, whose rows the
others copy to float32 first (rows of 256 to 768 numbers, 8 to 8,192 segments); torch-scatter never was, so that it runs
only where it is asked for. By itself ``sorted`` is taken where it can be, ``scattered`` elsewhere.
"""

import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor

from .backend import accumulation_dtype
from .cpu import order_by_token, sum_by_token

Implementation = Literal["sorted", "scattered", "torch_scatter"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def segment_sum(
    values: Tensor, segment_N: Tensor, num_segments: int, *, implementation: Implementation | None = None
) -> Tensor:
    """[N, ...] -> [num_segments, ...]

    Args:
        values: one row an entry.
        segment_N: int64 ids in [0, num_segments).
        num_segments: rows of the result.
        implementation: forces one; None chooses.

    Raises:
        ValueError: ids that are not one a row, or an implementation that is unknown, not installed or not for these
            values.
    """
    if segment_N.shape != values.shape[:1]:
        raise ValueError(
            f"segment has shape {tuple(segment_N.shape)}: expected ({len(values)},), one id a row of values"
        )
    sortable = values.device.type == "cpu" and values.is_floating_point()
    if implementation is None:
        implementation = "sorted" if sortable else "scattered"
    if implementation == "sorted" and sortable:
        rows_NM = values.reshape(len(values), values.shape[1:].numel())
        return _SortedSum.apply(rows_NM, segment_N, num_segments).view(num_segments, *values.shape[1:])
    rows = values.to(accumulation_dtype(values.dtype))
    if implementation == "scattered":
        total = rows.new_zeros(num_segments, *rows.shape[1:]).index_add(0, segment_N, rows)
    elif implementation == "torch_scatter" and importlib.util.find_spec("torch_scatter"):
        from torch_scatter import scatter_add

        total = scatter_add(rows, segment_N, dim=0, dim_size=num_segments)
    else:
        choices = '"sorted" (floating point on a CPU), "scattered", or "torch_scatter" where that package is installed'
        raise ValueError(f'implementation="{implementation}" is not available: choose {choices}')
    return total.to(values.dtype)


def segment_mean(
    values: Tensor, segment_N: Tensor, num_segments: int, *, implementation: Implementation | None = None
) -> Tensor:
    """[N, ...] -> [num_segments, ...]; otherwise as ``segment_sum``."""
    rows = values.to(accumulation_dtype(values.dtype))
    total = segment_sum(rows, segment_N, num_segments, implementation=implementation)
    count_S = rows.new_zeros(num_segments).index_add(0, segment_N, rows.new_ones(len(rows)))
    mean = total / count_S.clamp_min(1).view(-1, *(1 for _ in values.shape[1:]))
    return mean.to(values.dtype)


class _SortedSum(torch.autograd.Function):
    """rows [N, M] -> [S, M]. Backward gathers: torch's own, of an embedding bag, would scatter."""

    @staticmethod
    def forward(ctx, rows_NM: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
        ctx.save_for_backward(segment_N)
        return sum_by_token(rows_NM, segment_N, order_by_token(segment_N), num_segments, None)

    @staticmethod
    def backward(ctx, gradient_SM: Tensor) -> tuple[Tensor, None, None]:
        (segment_N,) = ctx.saved_tensors
        return gradient_SM.index_select(0, segment_N), None, None
