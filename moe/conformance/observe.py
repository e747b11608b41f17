"""What can be seen of a decision, and where two differ, in words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...routers.base import Router, Routing
from .probe import Probe


def per_token(routing: Routing, probe: Probe) -> dict[str, Tensor]:
    """All that a token's output depends on, besides the experts: name -> [T, ...].

    weights: [T, E], NaN where there is no assignment, so that a pair of weight 0 still differs from none. rows: the
    expert inputs [T, E, D] that replace x. Soft slots: combine and dispatch [T, S], and mixtures [T, S, D], each slot's
    input by the token's share in its output.
    """
    seen: dict[str, Tensor] = {}
    if routing.dispatch is not None:
        combine, dispatch = routing.combine.detach(), routing.dispatch.detach()
        seen["combine"], seen["dispatch"] = combine.flatten(0, 1), dispatch.flatten(0, 1)
        x_BLD = probe.x.detach().masked_fill(~probe.real_T[:, None], 0)
        x_BLD = x_BLD.view(probe.batch_size, probe.length, -1).to(dispatch.dtype)
        slots_BSD = torch.einsum("bls,bld->bsd", dispatch, x_BLD)
        seen["mixtures"] = torch.einsum("bls,bsd->blsd", combine, slots_BSD).flatten(0, 1)
        return seen
    token, expert, weight = (value.detach() for value in routing.as_list())
    seen["weights"] = weight.new_full((routing.num_tokens, routing.bank_size), torch.nan).index_put(
        (token, expert), weight
    )
    if routing.rows is not None:
        rows = routing.rows.detach()
        blank = rows.new_full((routing.num_tokens, routing.bank_size, rows.shape[-1]), torch.nan)
        seen["rows"] = blank.index_put((token, expert), rows)
    return seen


def whole(routing: Routing) -> dict[str, Tensor]:
    """What is of the batch and not of a token: losses, statistics, loads."""
    seen = {f"loss {name}": value.detach() for name, value in routing.losses.items()}
    seen |= {f"statistic {name}": value for name, value in routing.stats.items()}
    if routing.dispatch is None or routing.selected is not None:
        seen["load"] = routing.load_E()
        seen["requested load"] = routing.requested_E()
    return seen


def everything(routing: Routing, probe: Probe) -> dict[str, Tensor]:
    return per_token(routing, probe) | whole(routing)


def objective(routing: Routing, probe: Probe) -> Tensor:
    """A number that every weight and loss enters, each weight by a factor of its own; padding does not shift them."""
    place_T = probe.real_T.cumsum(0) - 1
    if routing.dispatch is not None:
        slot = torch.arange(routing.combine.shape[-1])
        factor_TS = torch.sin(1.0 + place_T[:, None] + 3 * slot)
        return ((routing.combine.flatten(0, 1) + 2 * routing.dispatch.flatten(0, 1)) * factor_TS).sum() + routing.loss
    token, expert, weight = routing.as_list()
    factor_N = torch.sin(1.0 + place_T[token] + 3 * expert)
    total = (weight * factor_N).sum() + routing.loss
    return total if routing.rows is None else total + (routing.rows.tanh() * factor_N[:, None]).sum()


def gradients(router: Router, probe: Probe) -> tuple[Routing, dict[str, Tensor | None]]:
    """The decision, and the gradient of ``objective`` in the tokens ("tokens") and every parameter."""
    x = probe.x.clone().requires_grad_()
    router.zero_grad()
    routing = router(x, probe.context)
    value = objective(routing, probe)
    if value.requires_grad:
        value.backward()
    grads = {"tokens": x.grad} | {name: parameter.grad for name, parameter in router.named_parameters()}
    return routing, {name: None if grad is None else grad.clone() for name, grad in grads.items()}


def state_of(router: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in router.named_buffers()}


def difference(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    tolerance: float = 0.0,
    length: int | None = None,
) -> str | None:
    """The first entry that differs by more than ``tolerance`` (absolute and relative), in words; None if none does.

    NaN equals NaN. A gradient of None equals zeros.

    Args:
        length: L, where the first dimension counts tokens, to say which token of which sample.
    """
    if actual.keys() != expected.keys():
        return f"{_names(actual)} instead of {_names(expected)}"
    for name, value in expected.items():
        other = actual[name]
        if value is None and other is None:
            continue
        value = torch.zeros_like(other) if value is None else value
        other = torch.zeros_like(value) if other is None else other
        if value.shape != other.shape:
            return f"{name} of shape {list(other.shape)} instead of {list(value.shape)}"
        a, b = other.detach().double(), value.detach().double()
        # a - b of equal infinities is NaN
        off = (a - b).abs() > tolerance * (1 + b.abs()) if tolerance else a != b
        off = (off | (a.isnan() != b.isnan()) | (a.isinf() != b.isinf())) & ~(a.isnan() & b.isnan()) & (a != b)
        if off.any():
            place = tuple(off.nonzero()[0].tolist())
            return (
                f"{name}{_place(name, place, length)} is {_say(a[place], name)} instead of {_say(b[place], name)}"
                + (f" ({int(off.sum())} of {off.numel()} entries differ)" if off.numel() > 1 else "")
            )
    return None


def _names(entries: Mapping[str, Tensor | None]) -> str:
    return "{" + ", ".join(entries) + "}"


def _place(name: str, place: tuple[int, ...], length: int | None) -> str:
    if not place:
        return ""
    if length and name in ("weights", "rows", "combine", "dispatch", "mixtures"):
        what = "expert" if name in ("weights", "rows") else "slot"
        return f" of token {place[0] % length} of sample {place[0] // length}, {what} {place[1]},"
    return f"[{', '.join(map(str, place))}]"


def _say(value: Tensor, name: str) -> str:
    if name in ("weights", "rows") and value.isnan():
        return "no assignment (or NaN)"
    return f"{float(value):.8g}"
