"""Checks of gradients, of ties, of what is not a number, of dtypes, and of batches with nothing in them."""

from __future__ import annotations

import copy

import torch

from .observe import difference, everything, gradients, per_token, state_of
from .registry import NotChecked, Violation, check
from .subject import Subject, draw_parameters, mode, run

SMALLEST = 1e-13


@check
def gradient_reaches_every_parameter(subject: Subject) -> None:
    """In training a finite gradient reaches the tokens and every parameter through the weights and the losses, unless
    `without_gradient` names them; nothing that it names is reached."""
    reached: dict[str, float] = {}
    connected, where = False, ""
    for seed in range(8 if subject.long else 4):
        router = subject.router(dtype=torch.float64, seed=seed)
        probe = subject.probe(max(subject.example.batch_size, 2), seed=seed, dtype=torch.float64)
        where = f"training, {probe}"
        routing, grads = gradients(router, probe)
        weights = routing.weight if routing.dispatch is None else routing.combine
        connected |= weights.requires_grad
        for name, grad in grads.items():
            if grad is not None and not grad.isfinite().all():
                raise Violation(
                    on=where,
                    expected=f"a finite gradient of {_called(name)}",
                    got=f"{int((~grad.isfinite()).sum())} of {grad.numel()} entries are NaN or inf",
                    advice="look for sqrt or norm at 0, a log of 0, or a row of -inf in a softmax",
                )
            reached[name] = max(reached.get(name, 0.0), 0.0 if grad is None else float(grad.abs().max()))
    declared = subject.router(dtype=torch.float64)
    frozen = {name for name, parameter in declared.named_parameters() if not parameter.requires_grad}
    where += ", and other seeds; objective: the weights, each by a factor of its own, plus the losses"
    if not subject.several_experts or sum(kind == "routed" for kind in declared.expert_kinds) == 1:
        subject.note("with one routed expert a weight may be constant: only that gradients are finite")
        return
    if not connected and not subject.without_gradient(declared, "weights"):
        raise Violation(
            on=where,
            expected="weights that carry a graph",
            got="weights without gradient: no parameter learns from the task",
            advice="do not detach the weights; take the ids, and not the weights, from detached scores. If the paper "
            'means it so, declare without_gradient = ("weights", ...)',
        )
    for name, largest in reached.items():
        spared = name in frozen or subject.without_gradient(declared, name)
        if largest <= SMALLEST and not spared:
            raise Violation(
                on=where,
                expected=f"a gradient of {_called(name)}",
                got="none" if largest == 0 else f"at most {largest:.1e}, which is rounding",
                advice="look for a detach, a hard choice, or a ratio that is constant, between it and the weights or "
                f'losses. If it is meant so, declare without_gradient = ("{name}",)',
            )
        if largest > SMALLEST and subject.without_gradient(declared, name):
            raise Violation(
                on=where,
                expected=f"no gradient of {_called(name)}: without_gradient={declared.without_gradient}",
                got=f"one of {largest:.3g}",
                advice="take it out of `without_gradient`",
            )


def _called(name: str) -> str:
    return "the tokens" if name == "tokens" else f'parameter "{name}"'


@check
def equal_scores(subject: Subject) -> None:
    """Where all scores are equal (parameters 0, tokens 0 or not), a token's experts still differ, and weights, losses
    and gradients are finite."""
    for training in (True, False):
        router = subject.router(training)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.zero_()
        probe = subject.probe()
        for equal in (probe.with_x(torch.zeros_like(probe.x), "all 0"), probe):
            where = f"{mode(router)}, {equal}, every parameter 0"
            routing, grads = gradients(router, equal)
            advice = "look for 0 / 0, a norm or a root at 0, or a log of 0, also in the backward"
            if routing.dispatch is None:
                token, expert, weight = routing.as_list()
                if len((token * router.bank_size + expert).unique()) < len(token):
                    raise Violation(
                        on=where,
                        expected="different experts for each token",
                        got="an expert twice",
                        advice="break ties by the id: topk and sort do",
                    )
            else:
                weight = torch.stack([routing.dispatch.sum(), routing.combine.sum()])
            if not (weight.isfinite().all() and routing.loss.isfinite()):
                bad = [name for name, loss in routing.losses.items() if not loss.isfinite()]
                got = f"loss {', '.join(bad)} is not finite" if bad else "a weight that is NaN or inf"
                raise Violation(on=where, expected="finite weights and losses", got=got, advice=advice)
            for name, grad in grads.items():
                if grad is not None and not grad.isfinite().all():
                    raise Violation(
                        on=where,
                        expected=f"a finite gradient of {_called(name)}",
                        got="NaN or inf",
                        advice=advice,
                    )


@check
def nonfinite_tokens(subject: Subject) -> None:
    """Tokens of NaN or infinities (a diverged model) give NaN or -inf logits: the router still returns ids in range,
    each pair once, and disturbs no other sample where it is batch-independent, and no earlier token where causal."""
    for training in (True, False):
        router = subject.router(training)
        clean = subject.probe(3, 8)
        expected = subject.decide(router, clean)
        for value in (torch.nan, torch.inf, -torch.inf):
            x = clean.x.clone()
            x[8 + 4] = value
            x[8 + 5, ::2] = value
            probe = clean.with_x(x, f"{value} in tokens 4 and 5 of sample 1")
            where = f"{mode(router)}, {probe}"
            try:
                routing = run(router, probe)
            except Exception as error:
                raise Violation(
                    on=where,
                    expected="a decision",
                    got=f"{type(error).__name__}: {error}",
                    advice="do not rely on comparisons of the scores to count or to index",
                ) from error
            if routing.dispatch is None:
                token, expert, _ = routing.as_list()
                index = expert if routing.index is None else routing.index
                lowest = 0 if routing.index is None else -1
                if index.numel() and not (lowest <= int(index.min()) and int(index.max()) < router.bank_size):
                    got = f"ids {int(index.min())} to {int(index.max())}"
                    raise Violation(
                        on=where, expected="ids in range", got=got, advice="use topk or sort, which are safe"
                    )
                if len((token * router.bank_size + expert).unique()) < len(token):
                    raise Violation(
                        on=where,
                        expected="each (token, expert) pair once",
                        got="one twice",
                        advice="use topk or sort over the experts, which stay permutations",
                    )
            # without gradient, as what was expected: some routers decide for all experts where gradient is wanted
            decided = subject.decide(router, probe)
            safe = torch.zeros(3, 8, dtype=torch.bool)
            if router.batch_independent:
                safe[[0, 2]] = True
            if router.causal:
                safe[1, :4] = True
                safe[0] = True
            safe = safe.flatten()
            found = difference(
                {n: v[safe] for n, v in decided.items()}, {n: v[safe] for n, v in expected.items()}, 1e-5
            )
            if found:
                raise Violation(
                    on=f"{where}, looking at tokens that may not depend on them",
                    expected="the decision as without them",
                    got=found,
                    advice="keep sums over tokens out of a token's decision, or do not declare independence",
                )


@check
def nothing_to_route(subject: Subject) -> None:
    """A batch without a real token (none at all, or all padded) gives no assignment, losses and gradients of 0, and
    statistics that move no state."""
    shapes = {"no sample": (0, 8, None), "no token": (2, 0, None), "all padded": (2, 4, (0, 0))}
    for training in (True, False):
        router = subject.router(training)
        for name, (batch_size, length, lengths) in shapes.items():
            probe = subject.probe(batch_size, length, lengths=lengths)
            probe = probe.with_x(torch.full_like(probe.x, torch.nan), name)
            where = f"{mode(router)}, {probe}"
            advice = "clamp the number of tokens to at least 1 where you divide by it"
            routing, grads = gradients(router, probe)
            stray = routing.load_E().sum() if routing.dispatch is None else (routing.combine != 0).sum()
            if stray:
                raise Violation(
                    on=where, expected="no assignment", got=f"{int(stray)} of them", advice="selection.drop_padding"
                )
            if bad := {n: float(v) for n, v in routing.losses.items() if v != 0}:
                raise Violation(on=where, expected="losses of 0", got=str(bad), advice=advice)
            for parameter, grad in grads.items():
                if grad is not None and not (grad == 0).all():
                    raise Violation(
                        on=where, expected=f"gradient 0 of {_called(parameter)}", got="another, or NaN", advice=advice
                    )
            if training and routing.stats:
                before = state_of(router)
                with torch.no_grad():
                    router.update(routing.stats)
                found = difference(state_of(router), before)
                if found:
                    raise Violation(
                        on=f"{where}, then update(stats)",
                        expected="state as before",
                        got=f"buffer {found}",
                        advice="report how many tokens or batches a statistic is of, and skip the update at 0",
                    )


@check
def one_expert(subject: Subject) -> None:
    """With one expert the router decides, forward and backward, with finite weights, losses and gradients."""
    if "num_experts" not in subject.options:
        raise NotChecked("it has no option num_experts")
    one = {"num_experts": 1}
    if "top_k" in subject.options:
        one["top_k"] = type(subject.options["top_k"])(1)
    try:
        router = subject.variant(subject.options | one)
    except (ValueError, TypeError) as error:
        raise NotChecked(f"its options do not go with one expert: {error}") from error
    draw_parameters(router)
    for training in (True, False):
        router.train(training)
        probe = subject.around(router).probe()
        if probe.fields.get("modality") is not None:
            # whose ids may be those of experts
            probe = probe.with_fields(modality=torch.zeros_like(probe.fields["modality"]))
        where = f"{mode(router)}, {probe}, options {one}"
        routing, grads = gradients(router, probe)
        values = [routing.loss, *grads.values(), *per_token(routing, probe).values()]
        if routing.dispatch is None:
            values = [routing.loss, *grads.values(), routing.as_list()[2]]
        if not all(value is None or value.isfinite().all() for value in values):
            raise Violation(
                on=where,
                expected="finite weights, losses and gradients",
                got="NaN or inf",
                advice="look for log(E) = 0 or E - 1 = 0 in a divisor",
            )


@check
def dtypes(subject: Subject) -> None:
    """The router computes in at least float32: bfloat16 tokens decide as the same values in float32, autocast changes
    nothing, float64 gives float64; parameters may be bfloat16, and state stays in at least float32."""
    for training in (True, False):
        router = subject.router(training)
        half = subject.probe().to(torch.bfloat16)
        single = half.to(torch.float32)
        advice = "cast tokens and parameters to router_dtype(x) where they are used (apply_linear does)"
        expected = everything(run(router, single), single)

        def same(probe, got, what, router=router, expected=expected, advice=advice) -> None:
            found = difference(got, expected, 1e-6, probe.length)
            if found:
                raise Violation(
                    on=f"{mode(router)}, {probe}{what}", expected="what float32 gives", got=found, advice=advice
                )

        same(half, everything(run(router, half), single), "")
        context = single.context
        with torch.autocast("cpu", torch.bfloat16):
            under = router(single.x, context)
        same(single, everything(under, single), " under bfloat16 autocast")

        double = single.to(torch.float64)
        routing = run(copy.deepcopy(router).double(), double)
        _expect_dtype(routing, torch.float64, f"{mode(router)}, {double}, parameters in float64", advice)

        cast = copy.deepcopy(router).bfloat16()
        low = [name for name, b in cast.named_buffers() if b.is_floating_point() and b.dtype != torch.float32]
        if low:
            raise Violation(
                on=f"{mode(router)}, router.bfloat16()",
                expected="buffers in float32",
                got=f"{', '.join(low)} in another",
                advice="leave Router._apply as it is",
            )
        routing = run(cast, half)
        _expect_dtype(routing, torch.float32, f"{mode(router)}, {half}, parameters in bfloat16", advice)


def _expect_dtype(routing, dtype: torch.dtype, where: str, advice: str) -> None:
    weights = {"weights": routing.weight} if routing.dispatch is None else {"combine": routing.combine}
    for name, value in (weights | {"logits": routing.logits, "scores": routing.scores}).items():
        if value is not None and value.dtype != dtype:
            raise Violation(on=where, expected=f"{name} in {dtype}", got=str(value.dtype), advice=advice)
        if value is not None and name != "logits" and not value.isfinite().all():
            raise Violation(on=where, expected=f"finite {name}", got="NaN or inf", advice=advice)
