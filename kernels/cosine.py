"""Cosines of many rows with a few directions.

    z_te = <x_t, p_e> / (max(|x_t|, eps) max(|p_e|, eps))                                eps = 1e-12
    dx_t = (sum_e dz_te p_e - (sum_e dz_te z_te) x_t / |x_t|) / |x_t|                    for p_e of length 1

``cosine_reference``, the definition, writes normalised rows and differentiates through them: several passes over [T, D]
each way. ``cosine`` divides the products, which are [T, E], and its backward is one product and one scaled copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12  # that of F.normalize


def cosine(x_TD: Tensor, directions_ED: Tensor) -> Tensor:
    """Cosine of each row with each direction; differentiable in both, as often as one likes. -> [T, E]"""
    return _UnitRows.apply(x_TD, F.normalize(directions_ED, dim=-1))


def cosine_reference(x_TD: Tensor, directions_ED: Tensor) -> Tensor:
    """As ``cosine``. -> [T, E]"""
    return F.linear(F.normalize(x_TD, dim=-1), F.normalize(directions_ED, dim=-1))


class _UnitRows(torch.autograd.Function):
    """x w^T, each row divided by the length of x's row."""

    @staticmethod
    def forward(x_TD: Tensor, w_ED: Tensor) -> Tensor:
        return F.linear(x_TD, w_ED).div_(_length(x_TD).clamp_min(_EPS))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, dz_TE: Tensor):
        x_TD, w_ED, z_TE = ctx.saved_tensors
        length_T1 = _length(x_TD)
        dz_TE = dz_TE / length_T1.clamp_min(_EPS)
        dx_TD = dw_ED = None
        if ctx.needs_input_grad[0]:
            # what shortens or lengthens a row changes nothing, unless eps stands in for its length
            along_T1 = (dz_TE * z_TE).sum(1, keepdim=True) / length_T1.clamp_min(_EPS)
            dx_TD = (x_TD * -along_T1.masked_fill(length_T1 <= _EPS, 0)).addmm_(dz_TE, w_ED)
        if ctx.needs_input_grad[1]:
            dw_ED = dz_TE.T @ x_TD
        return dx_TD, dw_ED


def _length(x_TD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
