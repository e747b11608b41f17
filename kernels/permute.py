"""Sorting assignments by expert, taking the rows there and bringing them back.

    order, counts, offsets = sort_by_expert(expert [N], E)    order[m]: the assignment that comes m-th
    permute     rows[m] = x[source[order[m]]]                 [T, D] -> [N, D], source: the token of each assignment
    unpermute   out[t] = sum over m with source[order[m]] = t of weight[m] * rows[m]

The sort is stable, so an expert's rows keep the order of their assignments. Nothing here waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import accumulation_dtype
from .segment import segment_sum


class SortedAssignments(NamedTuple):
    order_N: Tensor  # int64, the assignments in the order of their experts
    counts_E: Tensor  # int64, assignments per expert
    offsets_E: Tensor  # int64, the first row of each expert


def sort_by_expert(expert_N: Tensor, bank_size: int) -> SortedAssignments:
    """The stable order of assignments by expert, with each expert's count and first row.

    Args:
        expert_N: expert ids in [0, bank_size).
        bank_size: number of experts, E.

    Raises:
        ValueError: ``expert_N`` is not one-dimensional and integer, or ``bank_size`` is negative.
    """
    if expert_N.dim() != 1 or expert_N.is_floating_point() or expert_N.is_complex() or bank_size < 0:
        given = f"expert {tuple(expert_N.shape)} of {expert_N.dtype} with bank_size={bank_size}"
        raise ValueError(f"{given}: expected integer ids [N] and a bank_size of at least 0")
    if expert_N.device.type == "cpu":
        order_N = expert_N.argsort(stable=True)
        # bincount would read the largest id on the host to size its result
        counts_E = torch.zeros(bank_size, dtype=torch.int64)
        counts_E.scatter_add_(0, expert_N.long(), torch.ones_like(expert_N, dtype=torch.int64))
    else:
        order_N, counts_E = _sort_digits(expert_N, bank_size)
    return SortedAssignments(order_N, counts_E, counts_E.cumsum(0) - counts_E)


def _sort_digits(expert_N: Tensor, bank_size: int) -> tuple[Tensor, Tensor]:
    """Order and counts on a GPU, which sorts digit by digit: narrow ids take fewer passes. What is sorted is counted by
    looking for where each id begins; all rows adding to few counters would wait for one another."""
    ids = torch.int16 if bank_size <= torch.iinfo(torch.int16).max else torch.int64
    sorted_N, order_N = expert_N.to(ids).sort(stable=True)
    first_E1 = torch.searchsorted(sorted_N, torch.arange(bank_size + 1, dtype=ids, device=expert_N.device))
    return order_N, first_E1.diff()


def permute(x_TD: Tensor, token_N: Tensor) -> Tensor:
    """Row n is the row of x at ``token_N[n]``; differentiable in x. [T, D] -> [N, D]

    For assignments sorted by expert, ``token_N`` is ``source[order]``.
    """
    return x_TD.index_select(0, token_N)


def unpermute(rows_ND: Tensor, token_N: Tensor, num_tokens: int, weight_N: Tensor | None = None) -> Tensor:
    """Sums the rows at their tokens, times their weights; differentiable in rows and weights. [N, D] -> [T, D]

    Half types are summed in float32; the result has the rows' dtype. Tokens without a row get 0.

    Args:
        rows_ND: one row an assignment.
        token_N: the token of each row.
        num_tokens: T.
        weight_N: what multiplies each row; None is 1.

    Raises:
        ValueError: ``token_N`` or ``weight_N`` does not hold one entry a row.
    """
    for name, tensor in (("token", token_N), ("weight", weight_N)):
        if tensor is not None and tensor.shape != rows_ND.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected ({len(rows_ND)},), one entry a row")
    if weight_N is None:
        return segment_sum(rows_ND, token_N, num_tokens)
    weighted_ND = rows_ND.to(accumulation_dtype(rows_ND.dtype)) * weight_N[:, None]
    return segment_sum(weighted_ND, token_N, num_tokens).to(rows_ND.dtype)
