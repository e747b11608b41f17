"""Checks of what a decision may depend on: fields, later tokens, other samples, padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ...routers.base import Router
from ..layer import MoELayer
from .observe import difference, everything, gradients, per_token, whole
from .probe import Probe
from .registry import Violation, check
from .subject import Subject, mode, needs, run


@check
def requires_is_true(subject: Subject) -> None:
    """The router decides with exactly the TokenContext fields that it declares in `requires`, and without one of them
    raises a ValueError that names it."""
    for training in (True, False):
        router = subject.router(training)
        declared = frozenset(router.requires)
        probe = subject.probe(names=declared)
        where = f"{mode(router)}, {probe}, a context with no optional field but {sorted(declared) or 'none'}"
        try:
            run(router, probe)
        except Exception as error:
            raise Violation(
                on=where,
                expected=f"a decision: requires={router.requires}",
                got=f"{type(error).__name__}: {error}",
                advice="add the field that forward reads to `requires` (a property may depend on self.training), or do "
                "without where it is None",
            ) from error
        if not declared and not probe.fields:
            router(probe.x)  # without any context
        for field in router.requires:
            missing = subject.probe(names=declared - {field})
            try:
                run(router, missing)
            except ValueError as error:
                if field in str(error):
                    continue
                got = f"ValueError: {error}"
            except Exception as error:
                got = f"{type(error).__name__}: {error}"
            else:
                got = "a decision"
            raise Violation(
                on=f"{mode(router)}, {missing}, context.{field} missing",
                expected=f"a ValueError that names {field}",
                got=got,
                advice="call the router, not its forward; leave Router.__call__ as it is; drop what is not needed",
            )


@check
def causal_is_true(subject: Subject) -> None:
    """Where the router says `causal`, changing later tokens of a sample never changes the decision of earlier ones;
    where it does not, a model that decodes left to right refuses it unless allow_noncausal."""
    for training in (True, False):
        router = subject.router(training)
        if router.causal:
            found = looks_ahead(subject, router)
            if found:
                on, got = found
                raise Violation(
                    on=on,
                    expected="the decision of earlier tokens as before, since `causal` is True",
                    got=got,
                    advice="set `causal = False`, or let a token's decision depend on earlier tokens only",
                )
        _refusal(subject, router)


def _refusal(subject: Subject, router: Router) -> None:
    probe = subject.probe().with_fields(causal=True)
    where = f"{mode(router)}, {probe}, context.causal=True, causal={router.causal}"
    router.allow_noncausal = False
    try:
        run(router, probe)
        refused = None
    except ValueError as error:
        refused = str(error)
    if router.causal and refused:
        raise Violation(
            on=where, expected="a decision", got=f"ValueError: {refused}", advice="allow what `causal` promises"
        )
    if not router.causal and (refused is None or "allow_noncausal" not in refused):
        raise Violation(
            on=where,
            expected="a ValueError that names allow_noncausal",
            got=refused or "a decision",
            advice="leave Router.__call__ as it is",
        )
    router.allow_noncausal = True
    run(router, probe)


@check
def batch_independent_is_true(subject: Subject) -> None:
    """Where the router says `batch_independent`, changing the other samples of the batch never changes a sample's
    decision."""
    for training in (True, False):
        router = subject.router(training)
        if not router.batch_independent:
            continue
        found = looks_around(subject, router)
        if found:
            on, got = found
            raise Violation(
                on=on,
                expected="the sample's decision as before, since `batch_independent` is True",
                got=got,
                advice="set `batch_independent = False`, or decide within the sample",
            )


def looks_ahead(subject: Subject, router: Router) -> tuple[str, str] | None:
    """The input on which a decision depends on later tokens of its sample, and how; None where none was found."""
    for seed in range(12 if subject.long else 4):
        x = subject.probe(3, 12, seed=seed)
        other = subject.probe(3, 12, seed=seed + 100, scale=3.0)
        before = subject.decide(router, x)
        for sample in range(3):
            for cut in (1, 5, 11):
                later = torch.zeros(3, 12, dtype=torch.bool)
                later[sample, cut:] = True
                changed = x.mixed(other, later, f"then tokens {cut} to 11 of sample {sample} changed")
                early = slice(sample * 12, sample * 12 + cut)
                after = {name: value[early] for name, value in subject.decide(router, changed).items()}
                found = difference(after, {name: value[early] for name, value in before.items()}, 1e-5, 12)
                if found:
                    return f"{mode(router)}, {changed}", found.replace("of sample 0", f"of sample {sample}")
    return None


def looks_around(subject: Subject, router: Router) -> tuple[str, str] | None:
    """The input on which a sample's decision depends on other samples, and how; None where none was found."""
    for seed in range(12 if subject.long else 6):
        x = subject.probe(3, 12, seed=seed)
        other, before = subject.probe(3, 12, seed=seed + 100, scale=3.0), subject.decide(router, x)
        for sample in range(3):
            others = (torch.arange(3) != sample)[:, None].expand(3, 12)
            changed = x.mixed(other, others, f"then every sample but number {sample} changed")
            after = subject.decide(router, changed)
            own = {name: value.unflatten(0, (3, 12))[sample] for name, value in before.items()}
            found = difference({n: v.unflatten(0, (3, 12))[sample] for n, v in after.items()}, own, 1e-5, 12)
            if found:
                return f"{mode(router)}, {changed}", found.replace("of sample 0", f"of sample {sample}")
    return None


@check
def padding_is_absent(subject: Subject) -> None:
    """A batch with padded tokens gives what the batch without them gives, in float64: decision, losses, statistics,
    loads, gradients, and the layer's output; a padded token has no assignment, output 0 and no gradient."""
    needs("grid" not in subject.fields, "it needs a grid, and a grid has no padding")
    for training in (True, False):
        router = subject.router(training, torch.float64)
        for length in (5, 4) if subject.long else (5,):
            short = subject.probe(3, length, dtype=torch.float64)
            padded = _with_garbage(subject.probe(3, 9, lengths=(length,) * 3, dtype=torch.float64))
            real = padded.real_T
            expected, expected_grads = gradients(router, short)
            actual, grads = gradients(router, padded)
            where = f"{mode(router)}, {padded}, held to the same without padding"
            advice = (
                "leave padded tokens (context.real_T False) out of sums, means, counts, capacities and softmaxes over "
                "tokens; selection.drop_padding takes their assignments away"
            )

            def wrong(got: str, expected: str = "what the batch without padding gives", where=where, advice=advice):
                return Violation(on=where, expected=expected, got=got, advice=advice)

            decided = per_token(actual, padded)
            stray = {name: value[~real] for name, value in decided.items()}
            if any((~v.isnan()).any() if n in ("weights", "rows") else (v != 0).any() for n, v in stray.items()):
                raise wrong("an assignment of a padded token", "no assignment of padded tokens")
            found = difference({n: v[real] for n, v in decided.items()}, per_token(expected, short), 1e-12, length)
            found = found or difference(whole(actual), whole(expected), 1e-12)
            if found:
                raise wrong(found)
            if grads["tokens"] is not None:
                if not (grads["tokens"][~real] == 0).all():
                    raise wrong("a gradient at padded tokens", "gradient 0 at padded tokens")
                grads["tokens"] = grads["tokens"][real]
            found = difference(grads, expected_grads, 1e-10)
            if found:
                raise wrong(f"gradient of {found}")
            layer = subject.layer(router).double()
            y, seen = _through_a_layer(layer, padded, real)
            found = difference(seen, _through_a_layer(layer, short, short.real_T)[1], 1e-10)
            if found or (y[~real] != 0).any():
                raise wrong(f"in a layer {found or 'an output at padded tokens'}")


def _through_a_layer(layer: MoELayer, probe: Probe, real_T: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The layer's output, and what it is of the real tokens, with the gradient of every parameter."""
    layer.zero_grad()
    y, routing = layer(probe.x, probe.context)
    (y[real_T].square().sum() + routing.loss).backward()
    grads = {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    seen = {"output": y.detach()[real_T]} | grads
    return y.detach(), {name: None if value is None else value.clone() for name, value in seen.items()}


@check
def padding_may_hold_anything(subject: Subject) -> None:
    """NaN and infinities in padded tokens reach nothing, in samples of any number of real tokens, 0 included."""
    for training in (True, False):
        router = subject.router(training)
        clean = subject.probe(4, 8, lengths=(8, 1, 0, 5))
        clean = clean.with_x(clean.x.masked_fill(~clean.real_T[:, None], 0), "padded with zeros")
        dirty = _with_garbage(clean)
        expected, expected_grads = gradients(router, clean)
        actual, grads = gradients(router, dirty)
        found = difference(everything(actual, dirty), everything(expected, clean), length=8)
        found = found or difference(grads, expected_grads)
        if not found and any(g is not None and not g.isfinite().all() for g in grads.values()):
            found = "a gradient that is not finite"
        if found:
            raise Violation(
                on=f"{mode(router)}, {dirty}",
                expected="what padding with zeros gives",
                got=found,
                advice="do not undo the zeros that Router.__call__ puts at padded tokens, nor read them elsewhere",
            )


def _with_garbage(probe: Probe) -> Probe:
    x = probe.x.clone()
    padded = (~probe.real_T).nonzero()[:, 0]
    x[padded[::2]], x[padded[1::2]] = torch.nan, torch.inf
    return probe.with_x(x, "NaN and inf in the padding")


@check
def wrong_shapes_are_refused(subject: Subject) -> None:
    """Tokens that do not fit the context are refused by a ValueError that names both shapes."""
    router, probe = subject.router(), subject.probe(2, 3)
    for x in (probe.x[:5], probe.x.view(2, 3, -1)):
        try:
            router(x, probe.context)
        except ValueError as error:
            if "x has shape" in str(error):
                continue
            got = f"ValueError: {error}"
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        else:
            got = "a decision"
        raise Violation(
            on=f"x {list(x.shape)} with a context of batch_size=2, length=3",
            expected="a ValueError that begins with the shape of x",
            got=got,
            advice="leave Router.__call__ as it is",
        )
