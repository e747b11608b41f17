"""Routers held to some of their experts: the files' way (``restrict``) and the whole model masked (``masked``).

    small = restrict(router, keep)                       a router of len(keep) routed experts
    with masked(model, {1: (0, 3), 3: (1, 2, 5)}):       ids as before, and only kept experts chosen
        y, routings = model(...)
    leave_out(router, keep)                              as before, but a removed expert adds nothing

``restrict`` makes the router again with fewer experts and slices its state. Which tensors have an expert axis is seen
in what the two constructions do not have in common, so that no tensor's name is listed. What the small router means:

    token or segment choice   logits of the kept experts alone, and then everything as before: the softmax is over them,
                              the K best of them are taken, weights are renormalised where they were
    expert choice             the kept experts take their tokens, top_k a token on average as before, so that each takes
                              more; learned thresholds stay each expert's own
    pool (Expert Race)        the threshold stays: a token may have fewer experts than before, or none
    ids that are not routed   local, zero, copy and constant experts stay, with their columns

``masked`` is what pruned files are held to, bit for bit: the bank is whole, and decisions are those of the restricted
router in the ids of the whole one. (Its logits are the kept columns of the whole router's up to rounding: a product
with fewer columns may add up in another order.) ``mode="no-reroute"`` leaves every decision as it is and takes away the
assignments to experts that are not kept, whatever the router.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...moe import moe_layers
from ...routers import Router, Routing, TokenContext

MODES = ("reroute", "no-reroute")
# routers whose experts cannot do each other's work, by registered name
FIXED = {
    "hash": "its table gives every token id its experts, and says nothing of who takes over",
    "modality": "every expert belongs to one modality",
    "soft_moe": "every expert works on mixtures of all tokens, and no token is routed to any",
}


def restrict(router: Router, keep: Sequence[int], *, ungroup: bool = False, top_k: float | None = None) -> Router:
    """A router that has the kept experts alone, renumbered in order.

    Args:
        router: of any family that can be restricted.
        keep: ascending places among its routed experts.
        ungroup: drop the router's groups of experts where it has some, so that any experts may be kept.
        top_k: experts a token from now on; None as before.

    Raises:
        ValueError: a router that cannot be restricted, by name with the reason; experts that it does not have; fewer
            than it gives a token; unequal numbers of them in its groups.
    """
    keep = checked_keep(keep, router.num_experts)
    name, options = router.name or type(router).__name__, _options(router)
    _refuse_fixed(router, name)
    if router.expert_kinds[: router.num_experts] != ("routed",) * router.num_experts:
        raise ValueError(f'router "{name}" has other experts before its routed ones: it cannot be restricted')
    changes = other_options(router, ungroup=ungroup, top_k=top_k)
    if "num_groups" not in changes:
        _check_groups(router, name, keep)
    options = {**options, "num_experts": len(keep), **changes}
    try:
        with torch.random.fork_rng(devices=[]):
            small = type(router)(**options)
    except ValueError as error:
        raise ValueError(f'router "{name}" cannot have the {len(keep)} kept experts alone: {error}') from None
    shapes = {entry: tensor.shape for entry, tensor in small.state_dict().items()}
    state = router.state_dict()
    if state.keys() != shapes.keys():
        raise ValueError(f'router "{name}" holds other tensors with {len(keep)} experts: it cannot be restricted')
    kept = {
        entry: slice_experts(tensor, shapes[entry], keep, router.num_experts, f'router "{name}", {entry}')
        for entry, tensor in state.items()
    }
    small.load_state_dict(kept, assign=True)
    for entry, parameter in small.named_parameters():
        parameter.requires_grad_(router.get_parameter(entry).requires_grad)
    small.allow_noncausal = router.allow_noncausal
    return small.train(router.training)


def other_options(router: Router, *, ungroup: bool = False, top_k: float | None = None) -> dict[str, float]:
    """What a restricted router's options differ in, besides ``num_experts``."""
    changes = {} if top_k is None else {"top_k": top_k}
    if ungroup and getattr(router, "num_groups", 1) > 1:
        changes |= {"num_groups": 1, "top_groups": 1}
    if "identity_experts" in router.options:
        # by default half as many as the routed ones
        changes["identity_experts"] = router.bank_size - router.num_experts
    return changes


def slice_experts(tensor: Tensor, shape: Sequence[int], keep: Sequence[int], experts: int, what: str) -> Tensor:
    """The tensor with the kept experts' entries along every axis on which it is longer than ``shape``; what lies behind
    the routed experts on such an axis stays.

    Raises:
        ValueError: an axis that is shorter by another number than that of removed experts.
    """
    for axis, (long, short) in enumerate(zip(tensor.shape, shape, strict=True)):
        if long == short:
            continue
        if long - short != experts - len(keep) or long < experts:
            raise ValueError(f"{what}: {long} becomes {short} where {experts} experts become {len(keep)}: refused")
        index = torch.tensor([*keep, *range(experts, long)], device=tensor.device)
        tensor = tensor.index_select(axis, index)
    return tensor.clone()


def checked_keep(keep: Sequence[int], experts: int) -> tuple[int, ...]:
    """
    Raises:
        ValueError: no experts, or not ascending places of some of the routed ones.
    """
    keep = tuple(int(place) for place in keep)
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= experts:
        raise ValueError(f"keep={list(keep)}: give ascending places of 0 to {experts - 1}, at least one, each once")
    return keep


@contextlib.contextmanager
def masked(
    model: nn.Module,
    keep: Mapping[int, Sequence[int]],
    mode: str = "reroute",
    *,
    ungroup: bool = False,
    top_k: float | None = None,
) -> Iterator[nn.Module]:
    """The model as if it had the kept experts alone; only routers are copied, and afterwards all is as before.

    Args:
        model: with MoE layers, all experts on this process.
        keep: by the layer's index (``MoELayer.layer``), ascending places among its routed experts; layers that are not
            named keep all.
        mode: "reroute": tokens choose among the kept experts. "no-reroute": they choose among all, and what a removed
            expert would add is missing.
        ungroup, top_k: see ``restrict``; of no effect without rerouting.

    Raises:
        ValueError: an unknown mode or layer, or a router that cannot be restricted.
    """
    if mode not in MODES:
        raise ValueError(f'mode="{mode}": choose one of {", ".join(MODES)}')
    layers = {layer.layer: layer for layer in moe_layers(model)}
    unknown = sorted(set(keep) - set(layers))
    if unknown:
        raise ValueError(f"layer {unknown[0]} has no experts: those that have are {', '.join(map(str, layers))}")
    replaced = []
    for index, kept in keep.items():
        router = layers[index].router
        try:
            kept = checked_keep(kept, router.num_experts)
            decide = (
                _restricted(router, restrict(router, kept, ungroup=ungroup, top_k=top_k), kept)
                if mode == "reroute"
                else _without_removed(router, kept)
            )
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None
        replaced.append((router, decide))
    try:
        for router, decide in replaced:
            router.forward = decide
        yield model
    finally:
        for router, _ in replaced:
            router.__dict__.pop("forward", None)


def _restricted(router: Router, small: Router, keep: tuple[int, ...]):
    columns = torch.tensor([*keep, *range(router.num_experts, router.bank_size)])

    def decide(x_TD: Tensor, context: TokenContext) -> Routing:
        return widen(small(x_TD, context), columns.to(x_TD.device), router.bank_size)

    return decide


def widen(routing: Routing, columns: Tensor, bank_size: int) -> Routing:
    """A decision over some experts, in the ids of the whole bank.

    Args:
        columns: [M] ascending, the id that each of the routing's has in the bank.
        bank_size: E.
    """

    def ids(index: Tensor | None) -> Tensor | None:
        return None if index is None else torch.where(index < 0, index, columns[index.clamp(min=0)])

    def spread(values_TM: Tensor | None, fill: float | bool) -> Tensor | None:
        if values_TM is None:
            return None
        return values_TM.new_full((len(values_TM), bank_size), fill).index_copy(1, columns, values_TM)

    return routing.replace(
        bank_size=bank_size,
        index=ids(routing.index),
        expert=ids(routing.expert),
        requested=ids(routing.requested),
        logits=spread(routing.logits, -torch.inf),
        scores=spread(routing.scores, 0.0),
        selected=spread(routing.selected, False),
        prediction=None,
        losses={},
        stats={},
    )


def _without_removed(router: Router, keep: tuple[int, ...]):
    forward = router.forward
    kept_E = torch.ones(router.bank_size, dtype=torch.bool)
    kept_E[: router.num_experts] = False
    kept_E[list(keep)] = True

    def decide(x_TD: Tensor, context: TokenContext) -> Routing:
        routing, here_E = forward(x_TD, context), kept_E.to(x_TD.device)
        if routing.dispatch is not None:
            raise ValueError(f'router "{router.name}" sends no token to an expert: nothing can be left out')
        if routing.index is not None:
            gone_TK = (routing.index < 0) | ~here_E[routing.index.clamp(min=0)]
            index_TK, weight_TK = routing.index.masked_fill(gone_TK, -1), routing.weight.masked_fill(gone_TK, 0)
            return routing.replace(index=index_TK, weight=weight_TK, losses={}, stats={})
        stays_N = here_E[routing.expert]
        rows = None if routing.rows is None else routing.rows[stays_N]
        return routing.replace(
            token=routing.token[stays_N],
            expert=routing.expert[stays_N],
            weight=routing.weight[stays_N],
            rows=rows,
            losses={},
            stats={},
        )

    return decide


def leave_out(router: Router, keep: Sequence[int]) -> Router:
    """Makes the removed experts' ids "zero" ones, in place: the router decides as before, and a token that goes there
    gets nothing. A ``MoELayer`` built on it has bank rows for the kept experts alone, and answers as the whole one
    masked with ``mode="no-reroute"``.

    Raises:
        ValueError: experts that it does not have, or a router that sends no token to an expert.
    """
    keep = set(checked_keep(keep, router.num_experts))
    if router.selection == "slot":
        raise ValueError(f'router "{router.name}" sends no token to an expert: nothing can be left out')
    kinds = enumerate(router.expert_kinds)
    router.expert_kinds = tuple("zero" if kind == "routed" and i not in keep else kind for i, kind in kinds)
    return router


def _options(router: Router) -> dict:
    options = getattr(router, "options", None)
    if options is None or "num_experts" not in options:
        raise ValueError(
            f'router "{router.name or type(router).__name__}" was not made by keyword options with num_experts: it '
            "cannot be made again with fewer experts"
        )
    return dict(options)


def _refuse_fixed(router: Router, name: str) -> None:
    if name in FIXED:
        raise ValueError(f'router "{name}" cannot be restricted to some experts: {FIXED[name]}')
    if getattr(router, "residual", False):
        raise ValueError(
            f'router "{name}" with residual=True cannot be restricted: it reads the logits of the layer before, whose '
            "experts are others"
        )


def _check_groups(router: Router, name: str, keep: tuple[int, ...]) -> None:
    for module in router.modules():
        groups = getattr(module, "num_groups", 1)
        if groups == 1:
            continue
        size = router.num_experts // groups
        counts = [sum(place // size == group for place in keep) for group in range(groups)]
        if len(set(counts)) > 1:
            raise ValueError(
                f'router "{name}" has {groups} groups, of which {counts} experts would be kept: keep as many of each '
                '(policy "slice-equal-groups"), or drop the groups (policy "slice")'
            )
