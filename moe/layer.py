"""The mixture-of-experts layer: a router, a bank of experts, and what always runs.

    y_t = shared(x_t) + sum over the routing's assignments (t, e, w) of  w * expert_e(x_t)

``expert_e`` by kind: "routed" a feed-forward of the bank, sharded over expert-parallel ranks; "local" a feed-forward
that every rank holds; "zero" 0; "copy" x_t; "constant" a learned vector. The layer knows no router's class: it reads
the ``Routing``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.segment import segment_sum
from ..routers.base import EXPERT_KINDS, REDUCTIONS, Router, Routing, TokenContext, router_dtype
from . import dispatch
from .dispatch import DispatchPlan
from .experts import ExpertSpec, GroupedExperts
from .parallel import ExpertParallel

UNREAD_STEPS = 256


def is_recomputing() -> bool:
    """Whether this forward is the recomputation of one, inside a backward (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


class MoELayerCode:
    """What a MoE layer is, without a constructor of its own: a host's layer class inherits it beside the host's.

    Attributes:
        routed_counts_E: rows that the last forward gave each routed expert of the whole bank, of this rank's tokens.
    """

    router: Router
    experts: GroupedExperts
    local_experts: GroupedExperts | None
    routed_counts_E: Tensor | None

    def build(
        self,
        router: Router,
        spec: ExpertSpec,
        *,
        shared: nn.Module | None = None,
        parallel: ExpertParallel | None = None,
        seed: int = 0,
        layer: int = 0,
        backend: str | None = None,
        allow_noncausal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = getattr(router, "options", {}).get("dim")
        if width not in (None, spec.dim):
            raise ValueError(f"the router was made for tokens of width dim={width}, the experts for dim={spec.dim}")
        self.spec, self.parallel, self.layer, self.backend = spec, parallel or ExpertParallel(), layer, backend
        self.router, self.shared = router, shared
        router.allow_noncausal = router.allow_noncausal or allow_noncausal
        self._ids = {kind: [i for i, k in enumerate(router.expert_kinds) if k == kind] for kind in EXPERT_KINDS}
        self._runs = {kind: _runs(ids) for kind, ids in self._ids.items()}
        mine = self.parallel.local_experts(len(self._ids["routed"]))
        factory = {"seed": seed, "layer": layer, "device": device, "dtype": dtype}
        self.experts = GroupedExperts(spec, [self._ids["routed"][i] for i in mine], **factory)
        self.local_experts = self.constants = None
        if self._ids["local"]:
            self.local_experts = GroupedExperts(spec, self._ids["local"], **factory)
        if self._ids["constant"]:
            self.constants = nn.Parameter(torch.zeros(len(self._ids["constant"]), spec.dim, device=device, dtype=dtype))
        self._tag_expert_parameters()
        self.routed_counts_E = None
        self._accumulated: dict[str, tuple[Tensor, int]] = {}
        self._forwards = 0

    def _tag_expert_parameters(self) -> None:
        for parameter in self.experts.parameters():
            parameter.allreduce = self.parallel.size == 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoELayerCode:
        # leaving the meta device makes new parameters, which do not carry the tag
        super()._apply(fn, recurse)
        self._tag_expert_parameters()
        return self

    def __deepcopy__(self, memo: dict) -> MoELayerCode:
        # a copied parameter does not carry the tag either
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._tag_expert_parameters()
        return twin

    def forward(self, x: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        """x [B, L, D] or [T, D] -> y of the same shape, 0 at padded tokens, and the decision.

        Args:
            context: what the router may know besides; built from x where it is not given.

        Raises:
            ValueError: a context of another shape, or one that lacks a field that the router requires.
            RuntimeError: reentrant activation checkpointing.
        """
        context = TokenContext.for_tokens(x) if context is None else context
        shapes = [[context.batch_size, context.length, self.spec.dim], [context.num_tokens, self.spec.dim]]
        if list(x.shape) not in shapes:
            expected = f"{shapes[0]} or {shapes[1]}, from the context and the experts' width"
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {expected}")
        context = context if context.layer == self.layer else context.replace(layer=self.layer)
        x_TD = x.reshape(-1, self.spec.dim)
        if context.real_T is not None:
            # padding may hold anything, and 0 * NaN in a backward would reach every parameter
            padded_T1 = ~context.real_T[:, None]
            x_TD = x_TD.masked_fill(padded_T1, 0)
        routing = self.router(x_TD, context)
        if routing.num_tokens != context.num_tokens or routing.bank_size != self.router.bank_size:
            raise ValueError(
                f'router "{type(self.router).__name__}" returned a routing of {routing.num_tokens} tokens over '
                f"{routing.bank_size} experts: expected {context.num_tokens} over {self.router.bank_size}"
            )
        self._record(routing)
        y_TD = self._combine(x_TD, routing, context)
        if context.real_T is not None:
            y_TD = y_TD.masked_fill(padded_T1, 0)
        return y_TD.reshape(x.shape), routing

    def _combine(self, x_TD: Tensor, routing: Routing, context: TokenContext) -> Tensor:
        x_BLD = x_TD.view(context.batch_size, context.length, self.spec.dim)

        def shared() -> Tensor | None:
            return None if self.shared is None else self.shared(x_BLD, context).reshape(x_TD.shape)

        if routing.dispatch is not None:
            slots_BSD = torch.einsum("bls,bld->bsd", routing.dispatch.to(x_TD.dtype), x_BLD)
            slot = torch.arange(slots_BSD.shape[0] * slots_BSD.shape[1], device=x_TD.device)
            expert = slot % slots_BSD.shape[1] * self.router.bank_size // slots_BSD.shape[1]
            out, shared_TD = self._run_experts(slots_BSD.flatten(0, 1), slot, expert, None, shared)
            out_BSD = out.view(slots_BSD.shape)
            y_TD = torch.einsum("bls,bsd->bld", routing.combine.to(out.dtype), out_BSD).reshape(x_TD.shape)
        elif routing.rows is not None:
            token, expert, weight = routing.as_list()
            row = torch.arange(len(token), device=x_TD.device)
            out, shared_TD = self._run_experts(routing.rows.to(x_TD.dtype), row, expert, weight, shared)
            y_TD = segment_sum(out, token, len(x_TD))
        else:
            y_TD, shared_TD = self._run_experts(x_TD, *_assignments(routing), shared)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _run_experts(
        self, x_RD: Tensor, source: Tensor, expert: Tensor, weight: Tensor | None, shared: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Every assignment of a row to an expert of any kind, summed at the row; and what ``shared`` returned."""

        def plan(kind: str, parallel: ExpertParallel) -> DispatchPlan:
            return DispatchPlan.build(
                num_rows=len(x_RD),
                source=source,
                expert=self._place(expert, kind),
                weight=weight,
                num_experts=len(self._ids[kind]),
                parallel=parallel,
            )

        def here() -> tuple[Tensor | None, tuple[Tensor, Tensor] | None, list[Tensor]]:
            """What needs no other rank's rows, so that it runs while they travel."""
            parts, local = [], None
            if self.local_experts is not None:
                at = plan("local", ExpertParallel())
                # few rows have a local expert: where the plan holds those alone, adding them spares two passes over all
                few = dispatch.counts_are_at_hand(x_RD)
                own = self.local_experts(
                    x_RD, at.counts_E, token=at.source, weight=at.weight, combine=not few, backend=self.backend
                )
                if few:
                    local = at.source, own
                else:
                    parts.append(own)
            for kind in ("copy", "constant"):
                if self._ids[kind]:
                    parts.append(self._without_computation(kind, x_RD, source, expert, weight))
            return shared(), local, parts

        bank = partial(self.experts, backend=self.backend)
        routed = plan("routed", self.parallel)
        self.routed_counts_E = routed.counts_E
        out_RD, (shared_TD, local, parts) = routed.run(x_RD, bank, here)
        if local is not None:
            out_RD = out_RD.index_add_(0, *local)
        # under autocast the bank answers in less than x's precision, and the output has its dtype whatever the kinds
        return sum((part.to(out_RD.dtype) for part in parts), out_RD), shared_TD

    def _place(self, expert: Tensor, kind: str) -> Tensor:
        """Each id's place among those of its kind; -1 for every other, and for no assignment."""
        if len(self._ids[kind]) == self.router.bank_size:
            return expert
        place, count = torch.full_like(expert, -1), 0
        for first, last in self._runs[kind]:
            place = torch.where((first <= expert) & (expert <= last), expert - first + count, place)
            count += last - first + 1
        return place

    def _without_computation(self, kind: str, x_RD, source, expert, weight) -> Tensor:
        """What "copy" and "constant" experts add to each row."""
        place, count = self._place(expert, kind), len(self._ids[kind])
        weight = torch.ones_like(source, dtype=router_dtype(x_RD)) if weight is None else weight
        cell = torch.where(place < 0, 0, source * count + place)
        weight_RC = weight.new_zeros(len(x_RD) * count).index_add(0, cell, weight * (place >= 0)).view(-1, count)
        if kind == "copy":
            return (weight_RC.sum(1, keepdim=True) * x_RD).to(x_RD.dtype)
        return (weight_RC @ self.constants.to(weight.dtype)).to(x_RD.dtype)

    @torch.compiler.disable
    def _record(self, routing: Routing) -> None:
        """Adds up the router's statistics until ``finish_step``."""
        if not (self.training and torch.is_grad_enabled()):
            return
        if is_recomputing():
            if self._forwards == 0:
                raise RuntimeError(
                    "this layer runs under reentrant activation checkpointing, which cuts the gradient of every "
                    "auxiliary loss: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            return
        self._forwards += 1
        if not self.router.stateful:
            return
        if self._forwards == UNREAD_STEPS:
            warnings.warn(
                f'router "{self.router.name}" of layer {self.layer} has state that moves with training, and '
                f"{UNREAD_STEPS} training forwards passed without finish_step(model): call it after every optimizer "
                "step that was applied",
                stacklevel=3,
            )
        for name, value in routing.stats.items():
            value = value.detach()
            if name in self._accumulated:
                before, count = self._accumulated[name]
                how = self.router.reductions[name]
                self._accumulated[name] = (torch.maximum(before, value) if how == "max" else before + value, count + 1)
            else:
                self._accumulated[name] = (value, 1)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, expert_parallel={self.parallel.size}, backend={self.backend}"


class MoELayer(MoELayerCode, nn.Module):
    """``layer = MoELayer(router, ExpertSpec(dim, hidden)); y, routing = layer(x, context)``

    Args:
        router: decides; its ``expert_kinds`` say what experts the layer makes.
        spec: the shape of one expert.
        shared: runs on every token, called as ``shared(x_BLD, context)``.
        parallel: where the routed experts live; by default all here.
        seed, layer: with the global expert id, the key of an expert's initial draw.
        backend: of the kernels; None chooses by device and shape.
        allow_noncausal: let a router that looks at later tokens decide in a model that decodes left to right.
        device, dtype: of the experts.

    Raises:
        ValueError: the routed experts do not divide over ``parallel.size``.
    """

    def __init__(self, router: Router, spec: ExpertSpec, **options: Any) -> None:
        super().__init__()
        self.build(router, spec, **options)


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    """Rising ids as (first, last) of each stretch without a gap."""
    runs = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs


def _assignments(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """token, expert, weight of every slot, those of -1 included, so that their number needs no look at the data."""
    if routing.index is None:
        return routing.as_list()
    slots = routing.index.shape[1]
    size = routing.num_tokens * slots
    token = torch.arange(routing.num_tokens, device=routing.index.device).repeat_interleave(slots, output_size=size)
    return token, routing.index.flatten(), routing.weight.flatten()


def moe_layers(model: nn.Module) -> list[MoELayerCode]:
    """Every MoE layer of the model, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayerCode)]


@torch.no_grad()
def finish_step(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Reduces the routers' statistics over micro-batches and ranks, lets every router ``update``, and starts anew.

    Call it once after every optimizer step that was applied. Collective where ``torch.distributed`` is initialised.

    Args:
        group: the ranks that share the batch; by default all.

    Raises:
        ValueError: a statistic whose reduction is not declared.
    """
    layers = [layer for layer in moe_layers(model) if layer._accumulated]
    entries = [(layer, name, *layer._accumulated[name]) for layer in layers for name in sorted(layer._accumulated)]
    reduced: dict[tuple[int, str], Tensor] = {}
    for how in REDUCTIONS:
        chosen = [entry for entry in entries if _reduction(entry[0].router, entry[1]) == how]
        if not chosen:
            continue
        flat = torch.cat([value.double().flatten() for _, _, value, _ in chosen])
        counts = torch.tensor([count for *_, count in chosen], dtype=torch.float64, device=flat.device)
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(flat, op=dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=group)
            dist.all_reduce(counts, group=group)
        for (layer, name, value, _), part, count in zip(
            chosen, flat.split([v.numel() for _, _, v, _ in chosen]), counts, strict=True
        ):
            if how == "mean":
                part = part / count
            # the mean of integers is none
            dtype = value.dtype if value.is_floating_point() or how != "mean" else torch.float32
            reduced[id(layer), name] = part.view(value.shape).to(dtype)
    for layer in layers:
        layer.router.update({name: reduced[id(layer), name] for name in layer._accumulated})
    for layer in moe_layers(model):
        layer._accumulated.clear()
        layer._forwards = 0


def _reduction(router: Router, name: str) -> str:
    how = router.reductions.get(name)
    if how not in REDUCTIONS:
        given = f'{type(router).__name__}.reductions["{name}"]={how!r}'
        raise ValueError(f"{given}: choose one of {REDUCTIONS} for every entry of Routing.stats")
    return how
