"""A bank of expert feed-forwards on the rows that routing gave them, from gather to weighted combine.

    y_n = weight_n * (f(x[token_n] W_in[e]^T + b_in[e]) W_out[e]^T + b_out[e])      for row n of expert e
    out_t = sum of the y_n with token_n = t                                         where ``combine``

For backward it keeps the tokens x, the pre-activation h and the routing, as SonicMoE (arXiv:2512.14080) does:
the activation a = f(h) is computed again, and the gradient of the routing weight is <a, dY W_out> + <b_out, dY>,
for which the expert's output is not needed. T*D + N*H' numbers a layer, however many experts share them.
"""

import torch
from torch import Tensor

from . import reference
from .activation import GATED, check_activation
from .backend import accumulation_dtype, autocast_dtype, backend_module, choose_backend

_ORDERED = ("cpu", "triton")  # keep the order of rows by token


def expert_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts: Tensor,
    *,
    token: Tensor | None = None,
    weight: Tensor | None = None,
    combine: bool = False,
    activation: str,
    backend: str | None = None,
) -> Tensor:
    """-> [T, D] where ``combine``, else [N, D].

    Under autocast x and the parameters are cast to its dtype, as for F.linear; otherwise they have one dtype. The
    result has that dtype. Routing weights stay float32 (float64 where x is) and so does their gradient; half types
    are summed over a token's rows in float32 (on ``cpu``, where rows are combined, each weight is rounded to the
    result's dtype first). Differentiable once; ``backend="reference"`` as often as one likes.

    Args:
        x: [T, D] tokens, or the sorted rows themselves where ``token`` is None (then N = T).
        w_in: [E, H, D], or [E, 2H, D] with the gate's rows first where the activation is gated.
        w_out: [E, D, H].
        b_in: [E, H] or [E, 2H], or None.
        b_out: [E, D], or None.
        counts: [E] int64 rows per expert; rows are sorted by expert. Rows beyond their sum are assignments to nobody:
            they count as 0. ``cpu``, which reads counts for nothing, takes none: there N is the sum.
        token: [N] int64, the row of x that each expert row takes.
        weight: [N] what multiplies each row of the result, b_out included; None is 1.
        combine: sum the rows at their tokens; needs ``token``. Tokens without a row get 0.
        activation: one of ``activation.ACTIVATIONS``.
        backend: forces one of ``backend.BACKENDS``.

    Raises:
        ValueError: an unknown activation, shapes or dtypes that do not belong together, or a forced backend that
            cannot take them.
    """
    check_activation(activation)
    _check_shapes(x, w_in, w_out, b_in, b_out, counts, token, weight, combine, activation)
    dtype = autocast_dtype(x)
    parameters = {"w_in": w_in, "w_out": w_out, "b_in": b_in, "b_out": b_out}
    if dtype == x.dtype:
        for name, parameter in parameters.items():
            if parameter is not None and parameter.dtype != dtype and autocast_dtype(parameter) != dtype:
                raise ValueError(
                    f"x is {x.dtype} and {name} {parameter.dtype}: give both one dtype, or call under torch.autocast"
                )
    if weight is not None:
        weight = weight.to(accumulation_dtype(dtype))
    widths = (w_in.shape[2], w_in.shape[1], w_out.shape[2])
    backend = choose_backend(backend, device=x.device, dtype=dtype, widths=widths)
    compute = torch.float32 if backend == "cpu" and dtype == torch.float16 else dtype
    x, w_in, w_out, b_in, b_out = (
        tensor if tensor is None else tensor.to(dtype).to(compute) for tensor in (x, w_in, w_out, b_in, b_out)
    )
    if backend == "reference":
        return reference.expert_mlp(x, w_in, w_out, b_in, b_out, counts, token, weight, combine, activation)
    keep = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, w_in, w_out, b_in, b_out, weight)
    )
    out, _, _ = _forward(x, w_in, w_out, b_in, b_out, counts, token, weight, combine, activation, keep, backend)
    return out.to(dtype)


def _check_shapes(x, w_in, w_out, b_in, b_out, counts, token, weight, combine, activation) -> None:
    if x.dim() != 2 or w_in.dim() != 3 or w_out.dim() != 3:
        given = f"x {tuple(x.shape)}, w_in {tuple(w_in.shape)}, w_out {tuple(w_out.shape)}"
        raise ValueError(f"{given}: expected [T, D], [E, H, D] (gated: [E, 2H, D]) and [E, D, H]")
    num_experts, dim, hidden = w_out.shape
    width = 2 * hidden if activation in GATED else hidden
    num_rows = len(x) if token is None else len(token)
    expected = {
        "x": (x, (len(x), dim)),
        "w_in": (w_in, (num_experts, width, dim)),
        "b_in": (b_in, (num_experts, width)),
        "b_out": (b_out, (num_experts, dim)),
        "counts": (counts, (num_experts,)),
        "token": (token, (num_rows,)),
        "weight": (weight, (num_rows,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {shape}, "
                f'from w_out {tuple(w_out.shape)}, {num_rows} rows and activation="{activation}"'
            )
    if combine and token is None:
        raise ValueError("combine=True without token: give the token of each row, or combine=False for the rows")


@torch.library.custom_op("gatewright::expert_mlp", mutates_args=())
def _forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    combine: bool,
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the result; for backward h [N, H'] and the order of rows by token (empty where not needed)."""
    return backend_module(backend).expert_mlp_forward(
        x.contiguous(), w_in, w_out, b_in, b_out, counts, token, weight, combine, activation, keep
    )


@_forward.register_fake
def _(x, w_in, w_out, b_in, b_out, counts, token, weight, combine, activation, keep, backend):
    num_rows = x.shape[0] if token is None else token.shape[0]
    out = x.new_empty(x.shape[0] if combine else num_rows, x.shape[1])
    h = x.new_empty(num_rows, w_in.shape[1]) if keep else x.new_empty(0)
    ordered = keep and token is not None and backend in _ORDERED
    return out, h, counts.new_empty(num_rows if ordered else 0)


@torch.library.custom_op("gatewright::expert_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    h: Tensor,
    order: Tensor,
    combine: bool,
    activation: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, w_in, w_out, b_in, b_out, weight; empty where ``needs`` does not ask for them."""
    # expanded gradients, as of a sum, make mm slow and grouped_mm fail
    return backend_module(backend).expert_mlp_backward(
        dy.contiguous(), x.contiguous(), w_in, w_out, b_in, b_out, counts, token, weight, h, order, combine,
        activation, needs,
    )  # fmt: skip


@_backward.register_fake
def _(dy, x, w_in, w_out, b_in, b_out, counts, token, weight, h, order, combine, activation, needs, backend):
    wanted = zip((x, w_in, w_out, b_in, b_out, weight), needs, strict=True)
    return tuple(tensor.new_empty(tensor.shape) if need else x.new_empty(0) for tensor, need in wanted)


def _save(ctx, inputs, output):
    x, w_in, w_out, b_in, b_out, counts, token, weight, ctx.combine, ctx.activation, _, ctx.backend = inputs
    _, h, order = output
    ctx.mark_non_differentiable(h, order)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_in, w_out, b_in, b_out, counts, token, weight, h, order)


def _differentiate(ctx, dy, _dh, _dorder):
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    x, w_in, w_out, b_in, b_out, counts, token, weight, h, order = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [*needed[:5], needed[7]]
    gradients = _backward(
        dy, x, w_in, w_out, b_in, b_out, counts, token, weight, h, order, ctx.combine, ctx.activation, needs,
        ctx.backend,
    )  # fmt: skip
    *of_parameters, of_weight = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return *of_parameters, None, None, of_weight, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
