"""Checks of state that moves with training, and of the router inside a layer."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.activation import activate
from ...routers.base import Router, Routing
from ..layer import MoELayer, finish_step
from .observe import difference, everything, gradients, objective, state_of
from .probe import Probe
from .registry import Violation, check
from .subject import Subject, mode, needs, run


@check
def state_moves_by_update(subject: Subject) -> None:
    """A router with statistics has an `update` that moves state by them, and the other way round: training through a
    MoELayer and finish_step moves every buffer that it moves at all, evaluation none, and each is in `state_names`."""
    router = subject.router(warm=False)
    defines = subject.cls.update is not Router.update
    layer, initial = subject.layer(router), state_of(router)
    reported, moved, steps = set(), set(), 6
    for step in range(steps):
        probe = subject.probe(seed=step)
        _, routing = layer(probe.x, probe.context)
        reported |= set(routing.stats)
        finish_step(layer)
        # after every step: what moved may come back
        moved |= {name for name, value in state_of(router).items() if difference({"": value}, {"": initial[name]})}
    where = f"training, {steps} steps of forward and finish_step on batches like {probe}"
    if reported and not router.stateful:
        raise Violation(
            on=where,
            expected="an update for the statistics that forward returns",
            got=f"statistics {sorted(reported)} and no update: the layer never collects them, no state moves",
            advice="define update(stats) (and let `stateful` say True where options switch it on), or return no stats",
        )
    if router.stateful and not reported:
        raise Violation(
            on=where,
            expected="statistics for update",
            got="none: the layer calls update with statistics only, so state never moves",
            advice="return stats in training and declare each in `reductions`; `stateful` is False where no option "
            "asks for state",
        )
    if router.stateful and set(router.reductions) != reported:
        raise Violation(
            on=where,
            expected=f"the statistics that `reductions` declares, {sorted(router.reductions)}",
            got=f"{sorted(reported)}",
            advice="return each of them in every training forward",
        )
    if router.stateful and not moved:
        raise Violation(
            on=where,
            expected="state that moved",
            got=f"buffers {sorted(initial) or 'none'} as they were",
            advice="move registered buffers in update, in place",
        )
    if moved and not defines:
        raise Violation(
            on=where,
            expected="no state: the router defines no update",
            got=f"{', '.join(sorted(moved))} moved",
            advice="move state in update(stats)",
        )
    names = set(router.state_names)
    undeclared = sorted(name for name in moved if not {name, name.rsplit(".", 1)[-1]} & names)
    if undeclared:
        raise Violation(
            on=where,
            expected=f"the moved buffers in state_names={router.state_names}",
            got=", ".join(undeclared),
            advice="name them in `state_names`",
        )
    before = state_of(router)
    layer.eval()
    with torch.no_grad():
        layer(probe.x, probe.context)
    finish_step(layer)
    found = difference(state_of(router), before)
    if found:
        raise Violation(
            on=f"evaluation, {probe}, then finish_step",
            expected="state as before",
            got=f"buffer {found}",
            advice="return statistics in training only",
        )


@check
def micro_batches_add_up(subject: Subject) -> None:
    """Statistics of several micro-batches, added up by `reductions`, move the same state in any order, and an empty
    micro-batch beside others moves nothing; their shapes never depend on the batch."""
    needs(subject.router().stateful, "it has no state with these options")
    batches = [subject.probe(3, 6, seed=1), subject.probe(2, 8, seed=2), subject.probe(3, 6, seed=3, lengths=(6, 1, 0))]
    empty = subject.probe(2, 4, seed=4, lengths=(0, 0))

    def state_after(probes: list[Probe]) -> dict[str, Tensor]:
        layer = subject.layer(subject.router(warm=False))
        for probe in probes:
            layer(probe.x, probe.context)
        finish_step(layer)
        return state_of(layer.router)

    def shapes(probe: Probe) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in run(subject.router(), probe).stats.items()}

    first = shapes(batches[0])
    for probe in (*batches[1:], empty):
        if shapes(probe) != first:
            raise Violation(
                on=f"training, {batches[0]} and {probe}",
                expected=f"statistics of fixed shapes {first}",
                got=f"{shapes(probe)}",
                advice="reduce over tokens before returning them: they are summed over micro-batches and ranks",
            )
    expected = state_after(batches)
    for what, probes in {"in reverse order": batches[::-1], "with an empty one between": [*batches, empty]}.items():
        found = difference(state_after(probes), expected, 1e-5)
        if found:
            raise Violation(
                on=f"training, three micro-batches, {what}",
                expected="the same state after finish_step",
                got=f"buffer {found}",
                advice='report sums and counts with reduction "sum", and divide in update; a "mean" counts empty '
                "micro-batches too",
            )


@check
def layer_is_its_definition(subject: Subject) -> None:
    """Before experts, the decision gives y_t = sum over its assignments of weight * expert(x_t), computed one by one:
    with rows in place of x_t, with soft slots, with experts that copy, add a constant or nothing."""
    for training in (True, False):
        router = subject.router(training, torch.float64)
        layer = subject.layer(router).double()
        for probe in (
            subject.probe(2, 5, dtype=torch.float64),
            subject.probe(3, 5, lengths=(5, 0, 2), dtype=torch.float64),
        ):
            with torch.no_grad():
                y, _ = layer(probe.x, probe.context)
                expected = token_by_token(layer, run(router, probe), probe)
            found = difference({"output": y}, {"output": expected}, 1e-9)
            if found:
                raise Violation(
                    on=f"{mode(router)}, {probe}",
                    expected="the layer's output by its definition, one assignment after the other",
                    got=found,
                    advice="look at the ids, kinds and order of the decision: `Routing` says what each field means",
                )


def token_by_token(layer: MoELayer, routing: Routing, probe: Probe) -> Tensor:
    """The layer's output by its definition, without its shared part."""
    x_TD = probe.x.masked_fill(~probe.real_T[:, None], 0)
    y_TD = torch.zeros_like(x_TD)
    if routing.dispatch is not None:
        slots = routing.dispatch.shape[2]
        for b in range(probe.batch_size):
            rows = slice(b * probe.length, (b + 1) * probe.length)
            for s in range(slots):
                out = _expert(layer, s * layer.router.bank_size // slots, routing.dispatch[b, :, s] @ x_TD[rows])
                y_TD[rows] += routing.combine[b, :, s, None] * out
        return y_TD
    for n, (t, e, w) in enumerate(zip(*routing.as_list(), strict=True)):
        y_TD[t] += w * _expert(layer, int(e), x_TD[t] if routing.rows is None else routing.rows[n])
    return y_TD


def _expert(layer: MoELayer, expert: int, row: Tensor) -> Tensor:
    kind = layer.router.expert_kinds[expert]
    place = [i for i, other in enumerate(layer.router.expert_kinds) if other == kind].index(expert)
    if kind in ("zero", "copy", "constant"):
        return {"zero": torch.zeros_like(row), "copy": row}[kind] if kind != "constant" else layer.constants[place]
    bank = layer.experts if kind == "routed" else layer.local_experts
    hidden = activate(F.linear(row[None], bank.w_in[place], bank.b_in[place]), bank.spec.activation)
    return F.linear(hidden, bank.w_out[place], bank.b_out[place])[0]


@check
def recomputation_changes_nothing(subject: Subject) -> None:
    """Under torch.utils.checkpoint (use_reentrant=False), where the forward runs a second time inside the backward, a
    layer gives the same output, gradients and statistics, and its state moves once."""

    def train(recompute: bool) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
        layer = subject.layer(subject.router(warm=False))
        seen: dict[str, Tensor | None] = {}
        for step in range(2):
            probe = subject.probe(seed=step)
            context, x = probe.context, probe.x.clone().requires_grad_()

            def block(x, layer=layer, context=context):
                return layer(x * 1.5, context)

            layer.zero_grad()
            y, routing = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            (y.square().sum() + routing.loss).backward()
            grads = {"tokens": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
            seen |= {f"output of step {step}": y.detach()}
            seen |= {f"gradient of {name} in step {step}": g for name, g in grads.items()}
            seen |= {f"statistic {name}": value for name, (value, _) in layer._accumulated.items()}
        before = state_of(layer)
        finish_step(layer)
        return seen | {f"buffer {name} before finish_step": value for name, value in before.items()}, state_of(layer)

    expected, expected_state = train(False)
    actual, state = train(True)
    found = difference(state, expected_state, 1e-6) or difference(actual, expected, 1e-6)
    if found:
        raise Violation(
            on=f"training, two steps on batches like {subject.probe()}, with recomputation and without",
            expected="the same output, gradients, statistics and state",
            got=found,
            advice="forward must change nothing: move state in update(stats), draw with context.noise",
        )


@check
def compiled(subject: Subject) -> None:
    """torch.compile (backend aot_eager) gives the same decision, losses and gradients, forward and backward."""
    needs(hasattr(torch, "compile"), "this torch has no torch.compile")
    for training in (True, False) if subject.long else (True,):
        router, probe = subject.router(training), subject.probe()
        expected, expected_grads = gradients(router, probe)
        torch._dynamo.reset()
        function = torch.compile(router, backend="aot_eager")
        x = probe.x.clone().requires_grad_()
        router.zero_grad()
        log = logging.getLogger("torch._dynamo")
        level = log.level
        log.setLevel(logging.ERROR)  # a graph break is no fault
        try:
            routing = function(x, probe.context)
        finally:
            log.setLevel(level)
        value = objective(routing, probe)
        if value.requires_grad:
            value.backward()
        grads = {"tokens": x.grad} | {name: p.grad for name, p in router.named_parameters()}
        found = difference(everything(routing, probe), everything(expected, probe), 1e-5, probe.length)
        found = found or difference(grads, expected_grads, 1e-4)
        if found:
            raise Violation(
                on=f"{mode(router)}, {probe}, compiled with aot_eager",
                expected="what the router gives without torch.compile",
                got=found,
                advice="look for Python state or data-dependent Python in forward",
            )
