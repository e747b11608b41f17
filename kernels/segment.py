"""Sums and means over segments: rows that share an id.

    segment_sum    out[s] = sum of values[n] with segment[n] = s
    segment_mean   out[s] = segment_sum[s] / max(1, number of n with segment[n] = s)

Ids come in any order; an id without rows gets 0. Half types are summed in float32 and the result has the values'
dtype. Differentiable in the values, float64 too.
"""

import importlib.util
from typing import Literal, get_args

from torch import Tensor

from .backend import accumulation_dtype

Implementation = Literal["native", "torch_scatter"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)


def segment_sum(
    values: Tensor, segment_N: Tensor, num_segments: int, *, implementation: Implementation = "native"
) -> Tensor:
    """[N, ...] -> [num_segments, ...]

    Args:
        values: one row an entry.
        segment_N: int64 ids in [0, num_segments).
        num_segments: rows of the result.
        implementation: "native", or "torch_scatter" where that package is installed.

    Raises:
        ValueError: ids that are not one a row, or an implementation that is unknown or not installed.
    """
    if segment_N.shape != values.shape[:1]:
        raise ValueError(
            f"segment has shape {tuple(segment_N.shape)}: expected ({len(values)},), one id a row of values"
        )
    rows = values.to(accumulation_dtype(values.dtype))
    if implementation == "native":
        total = rows.new_zeros(num_segments, *rows.shape[1:]).index_add(0, segment_N, rows)
    elif implementation == "torch_scatter" and importlib.util.find_spec("torch_scatter"):
        from torch_scatter import scatter_add

        total = scatter_add(rows, segment_N, dim=0, dim_size=num_segments)
    else:
        choices = '"native", or "torch_scatter" where that package is installed'
        raise ValueError(f'implementation="{implementation}" is not available: choose {choices}')
    return total.to(values.dtype)


def segment_mean(
    values: Tensor, segment_N: Tensor, num_segments: int, *, implementation: Implementation = "native"
) -> Tensor:
    """[N, ...] -> [num_segments, ...]; otherwise as ``segment_sum``."""
    rows = values.to(accumulation_dtype(values.dtype))
    total = segment_sum(rows, segment_N, num_segments, implementation=implementation)
    count_S = rows.new_zeros(num_segments).index_add(0, segment_N, rows.new_ones(len(rows)))
    mean = total / count_S.clamp_min(1).view(-1, *(1 for _ in values.shape[1:]))
    return mean.to(values.dtype)
