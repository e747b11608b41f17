"""The mixture-of-experts layer: a router, a bank of experts, and what always runs.

    y_t = shared(x_t) + sum over the routing's assignments (t, e, w) of  w * expert_e(x_t)

``expert_e`` by kind: "routed" a feed-forward of the bank, sharded over expert-parallel ranks; "local" a feed-forward that every
rank holds; "zero" 0; "copy" x_t; "constant" a learned vector. The layer knows no router's class: it reads the ``Routing``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..routers.base import REDUCTIONS, Router, Routing, TokenContext
from .dispatch import DispatchPlan
from .experts import ExpertSpec, GroupedExperts
from .parallel import ExpertParallel

UNREAD_STEPS = 256


def is_recomputing() -> bool:
    """Whether this forward is the recomputation of one, inside a backward (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


class MoELayerCode:
    """What a MoE layer is, without a constructor of its own, so that a host's layer class can inherit it beside the host's."""

    router: Router
    experts: GroupedExperts
    local_experts: GroupedExperts | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec, self.parallel, self.layer, self.backend = spec, parallel or ExpertParallel(), layer, backend
        self.router, self.shared = router, shared
        ids = {kind: [i for i, k in enumerate(router.expert_kinds) if k == kind] for kind in ("routed", "local", "copy", "constant")}
        mine = self.parallel.local_experts(len(ids["routed"]))
        factory = {"seed": seed, "layer": layer, "device": device, "dtype": dtype}
        self.experts = GroupedExperts(spec, [ids["routed"][i] for i in mine], **factory)
        self.local_experts = GroupedExperts(spec, ids["local"], **factory) if ids["local"] else None
        self.constants = nn.Parameter(torch.zeros(len(ids["constant"]), spec.dim, device=device, dtype=dtype)) if ids["constant"] else None
        for parameter in self.experts.parameters():
            parameter.allreduce = self.parallel.size == 1
        # place[kind][id] is the id's row among its kind, -1 elsewhere; only mixed banks need it
        self._ids = ids
        self._mixed = len(set(router.expert_kinds)) > 1
        if self._mixed:
            for kind, members in ids.items():
                place = torch.full((router.bank_size + 1,), -1)
                place[torch.tensor(members, dtype=torch.int64)] = torch.arange(len(members))
                self.register_buffer(f"_place_{kind}", place.to(device) if device != "meta" else place, persistent=False)
        self._accumulated: dict[str, tuple[Tensor, int]] = {}
        self._forwards = 0

    def forward(self, x: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        """x [B, L, D] or [T, D] -> y of the same shape, and the decision.

        Args:
            context: what the router may know besides; built from x where it is not given.

        Raises:
            ValueError: a context of another shape, or one that lacks a field that the router requires.
            RuntimeError: reentrant activation checkpointing.
        """
        context = TokenContext.for_tokens(x) if context is None else context
        if x.shape[-1] != self.spec.dim or x.numel() != context.num_tokens * self.spec.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected [{context.batch_size}, {context.length}, {self.spec.dim}] "
                f"or [{context.num_tokens}, {self.spec.dim}], from the context and the experts' width"
            )
        context = context if context.layer == self.layer else context.replace(layer=self.layer)
        x_TD = x.reshape(-1, self.spec.dim)
        routing = self.router(x_TD, context)
        if routing.num_tokens != context.num_tokens or routing.bank_size != self.router.bank_size:
            raise ValueError(
                f'router "{type(self.router).__name__}" returned a routing of {routing.num_tokens} tokens over {routing.bank_size} experts: '
                f"expected {context.num_tokens} over {self.router.bank_size}"
            )
        self._record(routing)
        y_TD = self._combine(x_TD, x, routing, context)
        if context.padding_mask is not None:
            y_TD = y_TD * context.real_T[:, None]
        return y_TD.view(x.shape), routing

    def _combine(self, x_TD: Tensor, x: Tensor, routing: Routing, context: TokenContext) -> Tensor:
        def always() -> Tensor | None:
            """What needs no other rank: the shared feed-forward, local experts, experts without computation."""
            x_BLD = x_TD.view(context.batch_size, context.length, -1)
            parts = [] if self.shared is None else [self.shared(x_BLD, context).view_as(x_TD)]
            if self._mixed:
                parts += self._beside_the_bank(x_TD, routing)
            return _sum(parts)

        if routing.dispatch is not None:
            return self._soft_slots(x_TD, routing, context, always)
        source, expert, weight = _assignments(routing)
        if routing.rows is not None:
            inputs_RD, source = routing.rows, torch.arange(len(routing.rows), device=x_TD.device)
        else:
            inputs_RD = x_TD
        plan = DispatchPlan.build(
            num_rows=len(inputs_RD),
            source=source,
            expert=self._among(expert, "routed"),
            weight=weight,
            num_experts=len(self._ids["routed"]),
            parallel=self.parallel,
        )
        routed_RD, beside_TD = plan.run(inputs_RD, self._bank, always)
        if routing.rows is not None:
            routed_RD = routed_RD.new_zeros(x_TD.shape).index_add(0, routing.as_list()[0], routed_RD)
        return routed_RD if beside_TD is None else routed_RD + beside_TD

    def _bank(self, x: Tensor, counts_E: Tensor, **how: Any) -> Tensor:
        return self.experts(x, counts_E, backend=self.backend, **how)

    def _among(self, expert: Tensor, kind: str) -> Tensor:
        """Ids among those of one kind; -1 for every other, and for no assignment."""
        return getattr(self, f"_place_{kind}")[expert] if self._mixed else expert

    def _beside_the_bank(self, x_TD: Tensor, routing: Routing) -> list[Tensor]:
        token, expert, weight = _assignments(routing)
        parts = []
        if self.local_experts is not None:
            plan = DispatchPlan.build(
                num_rows=len(x_TD),
                source=token,
                expert=self._among(expert, "local"),
                weight=weight,
                num_experts=len(self._ids["local"]),
                parallel=ExpertParallel(),
            )
            parts.append(
                self.local_experts(x_TD, plan.counts_E, token=plan.source, weight=plan.weight, combine=True, backend=self.backend)
            )
        for kind, vectors in (("copy", None), ("constant", self.constants)):
            if self._ids[kind]:
                place = self._among(expert, kind)
                count = len(self._ids[kind])
                cell = torch.where(place < 0, 0, token * count + place)
                weight_TC = weight.new_zeros(len(x_TD) * count).index_add(0, cell, weight * (place >= 0)).view(-1, count)
                parts.append((weight_TC.sum(1, keepdim=True) * x_TD if vectors is None else weight_TC @ vectors.to(weight.dtype)).to(x_TD.dtype))
        return parts

    def _soft_slots(self, x_TD: Tensor, routing: Routing, context: TokenContext, always) -> Tensor:
        """Each slot is a mixture of the sample's tokens; each token takes a mixture of the slots' outputs."""
        x_BLD = x_TD.view(context.batch_size, context.length, -1)
        slots_BSD = torch.einsum("bls,bld->bsd", routing.dispatch.to(x_TD.dtype), x_BLD)
        batch, num_slots, _ = slots_BSD.shape
        rows = torch.arange(batch * num_slots, device=x_TD.device)
        plan = DispatchPlan.build(
            num_rows=batch * num_slots,
            source=rows,
            expert=self._among(rows % num_slots * self.router.bank_size // num_slots, "routed"),
            weight=None,
            num_experts=len(self._ids["routed"]),
            parallel=self.parallel,
        )
        out_RD, beside_TD = plan.run(slots_BSD.reshape(-1, slots_BSD.shape[-1]), self._bank, always)
        y_TD = torch.einsum("bls,bsd->bld", routing.combine.to(out_RD.dtype), out_RD.view(batch, num_slots, -1)).reshape(x_TD.shape)
        return y_TD if beside_TD is None else y_TD + beside_TD

    @torch.compiler.disable
    def _record(self, routing: Routing) -> None:
        """Adds up the router's statistics until ``finish_step``."""
        if not (self.training and torch.is_grad_enabled()):
            return
        if is_recomputing():
            if self._forwards == 0:
                raise RuntimeError(
                    "this layer runs under reentrant activation checkpointing, which cuts the gradient of every auxiliary loss: "
                    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            return
        self._forwards += 1
        if not self.router.stateful:
            return
        if self._forwards == UNREAD_STEPS:
            warnings.warn(
                f'router "{self.router.name}" of layer {self.layer} has state that moves with training, and {UNREAD_STEPS} training '
                "forwards passed without finish_step(model): call it after every optimizer step that was applied",
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
        device, dtype: of the experts.

    Raises:
        ValueError: the routed experts do not divide over ``parallel.size``.
    """

    def __init__(self, router: Router, spec: ExpertSpec, **options: Any) -> None:
        super().__init__()
        self.build(router, spec, **options)


def _assignments(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """token, expert, weight of every slot, unsorted slots of -1 included, so that their number needs no look at the data."""
    if routing.index is None:
        return routing.token, routing.expert, routing.weight
    slots = routing.index.shape[1]
    token = torch.arange(routing.num_tokens, device=routing.index.device).repeat_interleave(slots, output_size=routing.num_tokens * slots)
    return token, routing.index.flatten(), routing.weight.flatten()


def _sum(parts: list[Tensor]) -> Tensor | None:
    total = None
    for part in parts:
        total = part if total is None else total + part
    return total


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
        for (layer, name, value, _), part, count in zip(chosen, flat.split([v.numel() for _, _, v, _ in chosen]), counts, strict=True):
            part = part / count if how == "mean" else part
            reduced[id(layer), name] = part.view(value.shape).to(value.dtype)
    for layer in layers:
        layer.router.update({name: reduced[id(layer), name] for name in layer._accumulated})
    for layer in moe_layers(model):
        layer._accumulated.clear()
        layer._forwards = 0


def _reduction(router: Router, name: str) -> str:
    how = router.reductions.get(name)
    if how not in REDUCTIONS:
        raise ValueError(f'{type(router).__name__}.reductions["{name}"]={how!r}: choose one of {REDUCTIONS} for every entry of Routing.stats')
    return how
