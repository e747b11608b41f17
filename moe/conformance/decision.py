"""Checks of what a decision is, and of what a router says of itself."""

from __future__ import annotations

import dataclasses
import random

import numpy
import torch
from torch import Tensor

from ...routers.base import (
    EVIDENCE,
    EXPERT_KINDS,
    REDUCTIONS,
    SELECTIONS,
    GatedRouter,
    Router,
    Routing,
    TokenContext,
)
from .observe import difference, everything, per_token, state_of
from .probe import Probe
from .registry import NotChecked, Violation, check
from .subject import Subject, mode, needs, run, seeded

FIELDS = {field.name for field in dataclasses.fields(TokenContext)} - {
    "batch_size",
    "length",
    "seed",
    "step",
    "sample_id",
}
FIELDS |= {"noise"}


def _probes(subject: Subject) -> list[Probe]:
    """The example's shape, another one, and one with padding."""
    probes = [subject.probe(), subject.probe(3, 7, seed=2, scale=3.0), subject.probe(3, 6, seed=3, lengths=(6, 0, 2))]
    if subject.long:
        probes += [subject.probe(batch, length, seed=batch + length) for batch in (1, 4) for length in (1, 2, 5, 16)]
    return probes


@check
def declarations(subject: Subject) -> None:
    """What the router says of itself is valid: evidence, selection, the fields it requires, one kind for each of
    bank_size expert ids, reductions for every statistic, losses in loss_names; every parameter has a dimension."""
    cls, where = subject.cls, "the class, training and evaluation"

    def wrong(what: str, got: object, allowed: object, advice: str) -> Violation:
        return Violation(on=where, expected=f"{what} {allowed}", got=repr(got), advice=advice)

    if getattr(cls, "evidence", None) not in EVIDENCE:
        raise wrong(
            "evidence one of", getattr(cls, "evidence", None), EVIDENCE, 'set `evidence = "paper"` in the class'
        )
    if cls.selection not in SELECTIONS:
        # a constructor may keep an option of that name on the instance: the class is asked
        raise wrong("selection one of", cls.selection, SELECTIONS, "set `selection` in the class")
    for training in (True, False):
        router = subject.router(training)
        unknown = [field for field in router.requires if field not in FIELDS]
        if unknown:
            raise wrong(
                "fields of TokenContext in requires,", unknown, sorted(FIELDS), "correct the names in `requires`"
            )
        if len(router.expert_kinds) != router.bank_size or set(router.expert_kinds) - set(EXPERT_KINDS):
            raise Violation(
                on=mode(router),
                expected=f"expert_kinds: one of {EXPERT_KINDS} for each of bank_size={router.bank_size} ids",
                got=f"{len(router.expert_kinds)} kinds {router.expert_kinds}",
                advice="give Router.__init__ num_experts and, where there are other kinds, expert_kinds; set bank_size "
                "nowhere else",
            )
        if scalars := [name for name, parameter in router.named_parameters() if not parameter.dim()]:
            raise Violation(
                on=where,
                expected="parameters of at least one dimension: DeepSpeed's engine cannot broadcast others",
                got=f"{', '.join(scalars)} of shape []",
                advice="make it a vector of one: nn.Parameter(torch.ones(1))",
            )
        if bad := {name: how for name, how in router.reductions.items() if how not in REDUCTIONS}:
            raise wrong("reductions each one of", bad, REDUCTIONS, "correct `reductions`")
        for probe in _probes(subject):
            routing = run(router, probe)
            if undeclared := sorted(set(routing.losses) - set(router.loss_names)):
                raise wrong("every loss named in loss_names,", undeclared, router.loss_names, "add it to `loss_names`")
            if undeclared := sorted(set(routing.stats) - set(router.reductions)):
                raise wrong(
                    "a reduction for every statistic, declared",
                    undeclared,
                    dict(router.reductions),
                    'add it to `reductions`, with "sum", "mean" or "max"',
                )
    missing = [name for name in subject.cls.unused_options if name not in subject.options]
    if missing:
        raise wrong("unused_options that are options,", missing, sorted(subject.options), "correct `unused_options`")


@check
def decision_is_well_formed(subject: Subject) -> None:
    """Every decision has the shapes, ids and dtypes of its layout: ids in range, each (token, expert) pair at most
    once, finite float32 weights, rows of scores that sum to 1, finite scalar losses, detached statistics."""
    for training in (True, False):
        router = subject.router(training)
        for probe in _probes(subject):
            routing = run(router, probe)
            wrong = _malformed(routing, router, probe)
            if wrong:
                expected, got, advice = wrong
                raise Violation(on=f"{mode(router)}, {probe}", expected=expected, got=got, advice=advice)


def _malformed(routing: Routing, router: Router, probe: Probe) -> tuple[str, str, str] | None:
    tokens, experts = len(probe.x), router.bank_size
    if not isinstance(routing, Routing):
        return "a Routing", type(routing).__name__, "return Routing.from_topk(...) or Routing.from_mask(...)"
    if (routing.num_tokens, routing.bank_size) != (tokens, experts):
        return (
            f"a decision of {tokens} tokens over bank_size={experts} expert ids",
            f"{routing.num_tokens} tokens over {routing.bank_size}",
            "give the Routing bank_size=self.bank_size, and make expert_kinds name every id",
        )
    found = (
        _malformed_slots(routing, router, probe) if routing.dispatch is not None else _malformed_pairs(routing, probe)
    )
    if found:
        return found
    for name in ("logits", "scores"):
        value = getattr(routing, name)
        if value is not None and value.shape != (tokens, experts):
            return f"{name} of shape {[tokens, experts]}", str(list(value.shape)), f"return {name} [T, E], or none"
        if value is not None and value.dtype != torch.float32:
            return f"{name} in float32", str(value.dtype), "compute in router_dtype(x)"
    if routing.scores is not None:
        sums = routing.scores.detach()[probe.real_T].sum(1)
        if sums.numel() and not (sums - 1).abs().max() <= 1e-4:
            worst = (sums - 1).abs().nan_to_num(torch.inf).argmax()
            return (
                "rows of scores that sum to 1",
                f"a row that sums to {float(sums[worst]):.6g}",
                "divide the scores that you return by their sum (the weights need not be)",
            )
    for name, loss in routing.losses.items():
        if loss.dim() or not loss.isfinite() or not (loss.requires_grad or not _has_gradient(router)):
            return (
                f'loss "{name}": a finite scalar with gradient',
                f"shape {list(loss.shape)}, values {loss.tolist()}, gradient {loss.requires_grad}",
                "return losses as scalars, not detached",
            )
    for name, value in routing.stats.items():
        if value.requires_grad:
            return f'statistic "{name}" without gradient', "one with gradient", "detach it"
    return None


def _has_gradient(router: Router) -> bool:
    return any(parameter.requires_grad for parameter in router.parameters())


def _malformed_slots(routing: Routing, router: Router, probe: Probe) -> tuple[str, str, str] | None:
    shape = (probe.batch_size, probe.length)
    for name in ("dispatch", "combine"):
        value = getattr(routing, name)
        if value is None or value.dim() != 3 or value.shape[:2] != shape or value.shape[2] % router.bank_size:
            got = "None" if value is None else str(list(value.shape))
            return f"{name} [B, L, S] with S a multiple of {router.bank_size} experts", got, "return both matrices"
        if not value.isfinite().all():
            return f"a finite {name}", "NaN or inf", "look for a softmax over no real token"
        if (value[~probe.real_T.view(shape)] != 0).any():
            return f"{name} of 0 at padded tokens", "another value", "mask the padded tokens out of the softmax"
    return None


def _malformed_pairs(routing: Routing, probe: Probe) -> tuple[str, str, str] | None:
    tokens, experts = routing.num_tokens, routing.bank_size
    if routing.index is not None and (routing.index.shape != routing.weight.shape or len(routing.index) != tokens):
        got = f"index {list(routing.index.shape)}, weight {list(routing.weight.shape)}"
        return f"index and weight of one shape [{tokens}, K]", got, "use Routing.from_topk"
    if routing.index is not None and ((routing.index < -1) | (routing.index >= experts)).any():
        got = f"{int(routing.index.min())} to {int(routing.index.max())}"
        return f"expert ids of 0 to {experts - 1}, or -1 for none", got, "check what the ids count"
    token, expert, weight = routing.as_list()
    if not (token.shape == expert.shape == weight.shape and token.dim() == 1):
        got = f"{list(token.shape)}, {list(expert.shape)}, {list(weight.shape)}"
        return "token, expert and weight of one shape [N]", got, "use Routing.from_mask"
    if ((expert < 0) | (expert >= experts)).any():
        return f"expert ids of 0 to {experts - 1}", f"{int(expert.min())} to {int(expert.max())}", "check the ids"
    if ((token < 0) | (token >= tokens)).any() or (token.diff() < 0).any():
        return "tokens in order, 0 to T - 1", "others", "sort the list by (token, slot)"
    pairs = token * experts + expert
    if len(pairs.unique()) < len(pairs):
        twice = pairs[(pairs[:, None] == pairs).sum(1) > 1][0]
        got = f"token {int(twice) // experts} has expert {int(twice) % experts} twice"
        return (
            "each (token, expert) pair at most once",
            got,
            "choose without repetition, or add the weights of the pair",
        )
    if weight.dtype != torch.float32:
        return "weights in float32", str(weight.dtype), "compute in router_dtype(x)"
    if not weight.isfinite().all():
        worst = int((~weight.isfinite()).nonzero()[0])
        got = f"{float(weight[worst])} for token {int(token[worst])}, expert {int(expert[worst])}"
        return "finite weights", got, "look for a division by a sum that may be 0, or a softmax over nothing"
    if not probe.real_T[token].all():
        return "no assignment of padded tokens", f"{int((~probe.real_T[token]).sum())}", "selection.drop_padding"
    if routing.rows is not None and routing.rows.shape != (len(token), probe.x.shape[1]):
        got = str(list(routing.rows.shape))
        return f"rows [{len(token)}, {probe.x.shape[1]}], one for each assignment", got, "build rows from the list"
    if routing.selected is not None:
        if routing.selected.shape != (tokens, experts) or routing.selected.dtype != torch.bool:
            return "selected [T, E] bool", f"{list(routing.selected.shape)} {routing.selected.dtype}", "return a mask"
        given = torch.zeros(tokens, experts, dtype=torch.bool).index_put((token, expert), torch.tensor(True))
        if (routing.selected & ~given).any():
            return "selected pairs that are assigned", "one that is not", "select among the assignments"
    return None


@check
def dropped_tokens_have_no_weight(subject: Subject) -> None:
    """An assignment that was dropped, or a slot that holds none, has expert id -1 and weight 0; what is assigned was
    requested, and no expert has more load than requests."""
    for training in (True, False):
        router = subject.router(training)
        for probe in [*_probes(subject), subject.probe(2, 32, seed=5, scale=3.0)]:
            routing = run(router, probe)
            if routing.dispatch is not None:
                raise NotChecked("soft slots drop nothing")
            where = f"{mode(router)}, {probe}"
            if routing.index is not None:
                stray = (routing.index < 0) & (routing.weight != 0)
                if stray.any():
                    token, slot = stray.nonzero()[0].tolist()
                    raise Violation(
                        on=where,
                        expected="weight 0 wherever the expert id is -1",
                        got=f"weight {float(routing.weight[token, slot]):.6g} for token {token}, slot {slot}",
                        advice="mask the weights with the ids: weight.masked_fill(index < 0, 0)",
                    )
            load, requested = routing.load_E(), routing.requested_E()
            if routing.requested is None or routing.index is None or routing.requested.shape != routing.index.shape:
                wrong = (requested < load).nonzero()
            else:
                wrong = ((routing.index >= 0) & (routing.index != routing.requested)).nonzero()
                wrong = wrong if len(wrong) else (requested < load).nonzero()
            if len(wrong):
                raise Violation(
                    on=where,
                    expected="every assignment among the requested ones, load at most what was requested",
                    got=f"load {load.tolist()} of requested {requested.tolist()}",
                    advice="`requested` holds the expert ids before capacity dropped some, slot by slot",
                )


@check
def forward_is_pure(subject: Subject) -> None:
    """A decision changes nothing: no parameter, no buffer, no attribute of the router, so that deciding again (an
    evaluation, a recomputation) gives the same decision, losses and statistics."""
    for training in (True, False):
        router = subject.router(training)
        for probe in _probes(subject)[: 3 if subject.long else 2]:
            where = f"{mode(router)}, {probe}, decided twice"
            before, state, x = _attributes(router), state_of(router), probe.x.clone()
            first = everything(run(router, probe), probe)
            moved = difference(state_of(router), state)
            after = _attributes(router)
            changed = [name for name in after if name not in before or not _equal(after[name], before[name])]
            advice = "move state in update(stats), from statistics that forward returns"
            if difference({"": probe.x}, {"": x}):
                raise Violation(
                    on=where,
                    expected="tokens as before",
                    got="x was changed in place, and with it what the experts see",
                    advice="compute out of place: x * 2, not x.mul_(2)",
                )
            if moved:
                raise Violation(on=where, expected="buffers as before", got=f"buffer {moved}", advice=advice)
            if changed:
                raise Violation(
                    on=where, expected="attributes as before", got=f"{', '.join(changed)} changed", advice=advice
                )
            again = difference(everything(run(router, probe), probe), first, length=probe.length)
            if again:
                raise Violation(
                    on=where,
                    expected="the same decision",
                    got=f"the second time {again}",
                    advice="draw random numbers with context.noise only, and keep no state outside buffers",
                )


def _attributes(router: Router) -> dict[str, object]:
    """Everything that the modules hold besides parameters and buffers and can be compared."""
    found = {}
    for prefix, module in router.named_modules():
        for name, value in vars(module).items():
            if not name.startswith(("_parameters", "_buffers", "_modules")) and "_hooks" not in name:
                held = _held(value)
                if held is not None:
                    found[f"{prefix}.{name}" if prefix else name] = held
    return found


def _held(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (bool, int, float, str)):
        return (value,)
    if isinstance(value, (list, tuple)):
        return [_held(item) for item in value]
    if isinstance(value, dict):
        return {key: _held(item) for key, item in value.items()}
    return None


def _equal(left: object, right: object) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        both = isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape
        return both and difference({"": left}, {"": right}) is None
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return left == right


@check
def randomness_is_keyed(subject: Subject) -> None:
    """Random numbers come from context.noise alone, which depends on seed, step, sample and layer: no global random
    state is read or moved, the draw follows its sample into any batch, and another seed or step draws anew."""
    for training in (True, False):
        router = subject.router(training)
        probe = subject.probe(4, 6)
        decisions = []
        for seed in (0, 1):
            with seeded(seed):
                numpy_state, python_state = numpy.random.get_state(), random.getstate()
                try:
                    numpy.random.seed(seed)
                    random.seed(seed)
                    states = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
                    decisions.append(everything(run(router, probe), probe))
                    moved = [
                        name
                        for name, same in {
                            "torch": torch.equal(torch.get_rng_state(), states[0]),
                            "numpy": numpy.random.get_state()[1].tolist() == states[1],
                            "random": random.getstate() == states[2],
                        }.items()
                        if not same
                    ]
                finally:
                    numpy.random.set_state(numpy_state)
                    random.setstate(python_state)
            where = f"{mode(router)}, {probe}"
            advice = (
                'draw with context.noise(T, ...) and let `requires` name "noise" in the mode that draws: every rank, '
                "micro-batch and recomputation then draws the same"
            )
            if moved:
                raise Violation(
                    on=where,
                    expected="no global random state moved",
                    got=f"that of {' and '.join(moved)} moved",
                    advice=advice,
                )
        changed = difference(decisions[1], decisions[0], length=probe.length)
        if changed:
            raise Violation(
                on=f"{where}, under two global seeds", expected="the same decision", got=changed, advice=advice
            )
        if "noise" in router.requires:
            _draws_follow_the_key(subject, router, advice)


def _draws_follow_the_key(subject: Subject, router: Router, advice: str) -> None:
    for field in ("seed", "step"):
        seen = []
        for value in (0, 1):
            probes = [subject.probe(4, 6, seed=s).with_fields(**{field: value}) for s in range(3)]
            seen.append([everything(run(router, probe), probe) for probe in probes])
        if all(difference(*pair) is None for pair in zip(*seen, strict=True)):
            raise Violation(
                on=f"{mode(router)}, three batches with {field}=0 and {field}=1",
                expected='another draw, since `requires` names "noise"',
                got="the same decisions, losses and statistics",
                advice='use context.noise, or leave "noise" out of `requires` in this mode',
            )
    if not router.batch_independent:
        return
    batch = subject.probe(samples=(0, 1, 2, 3), length=6)
    expected = {name: value.unflatten(0, (4, 6)) for name, value in subject.decide(router, batch).items()}
    for samples in ((2, 0, 3, 1), (1,), (3, 2)):
        probe = subject.probe(samples=samples, length=6)
        part = {name: value[list(samples)].flatten(0, 1) for name, value in expected.items()}
        found = difference(subject.decide(router, probe), part, 1e-5, length=6)
        if found:
            raise Violation(
                on=f"{mode(router)}, {probe}, and the same samples in a batch of ids [0, 1, 2, 3]",
                expected="each sample's draw as in any batch",
                got=found,
                advice=advice,
            )


@check
def gated_steps(subject: Subject) -> None:
    """A GatedRouter's forward is its three steps: assign(logits, scores(logits), context); scores are [T, E] as logits
    are, not negative, and scores(logits_of(scores)) gives them back."""
    needs(issubclass(subject.cls, GatedRouter), "it is no GatedRouter, whose score others may average over tokens")
    for training in (True, False):
        router = subject.router(training, torch.float64)
        probe = subject.probe(3, 6, lengths=(6, 2, 5), dtype=torch.float64)
        context = probe.context
        x = probe.x.masked_fill(~probe.real_T[:, None], 0)
        with torch.no_grad():
            logits = router.logits(x, context)
            scores = router.scores(logits)
            steps = per_token(router.assign(logits, scores, context), probe)
            back = router.scores(router.logits_of(scores))
        where = f"{mode(router)}, {probe}"
        shape = [len(x), logits.shape[-1]]
        if list(scores.shape) != shape or not (scores >= 0).all():
            raise Violation(
                on=where,
                expected=f"scores {shape} of at least 0",
                got=f"{list(scores.shape)}, lowest {float(scores.min()):.6g}",
                advice="return from scores(logits) what may be averaged over tokens",
            )
        found = difference(steps, subject.decide(router, probe), 1e-12, probe.length)
        if found:
            raise Violation(
                on=where,
                expected="forward to be assign(logits, scores(logits), context)",
                got=f"by steps {found}",
                advice="leave forward as GatedRouter has it, or derive from Router",
            )
        ratio = difference(
            {"scores": back / back.sum(-1, keepdim=True)}, {"scores": scores / scores.sum(-1, keepdim=True)}, 1e-6
        )
        if ratio:
            raise Violation(
                on=where,
                expected="scores(logits_of(scores)) in the same proportions as scores",
                got=ratio,
                advice="define logits_of as the inverse of scores",
            )
