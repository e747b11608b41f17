"""Checks of options: the router comes back from them, and each is used."""

from __future__ import annotations

import copy
import io
import json
import pickle
import types
import typing
from collections.abc import Iterator
from typing import Any

import torch

from ...routers.base import Router
from .observe import difference, everything, gradients, state_of
from .registry import NotChecked, Violation, check
from .subject import Subject, draw_parameters


@check
def saves_and_loads(subject: Subject) -> None:
    """The router comes back from its options as JSON with its state_dict, from copy.deepcopy and from pickle: the same
    options, kinds and decisions; an option that it does not have is refused."""
    router, probe = subject.router(training=False), subject.probe()
    where = f"evaluation, {probe}"
    if not hasattr(router, "options"):
        raise Violation(
            on=f"{subject.cls.__name__} from the factory",
            expected="Router.options, which a run keeps to make its router again",
            got="none",
            advice="create it with keyword arguments only",
        )
    try:
        options = json.loads(json.dumps(router.options))
        again = subject.cls(**options).eval()
    except Exception as error:
        raise Violation(
            on=f"{subject.cls.__name__}(**json.loads(json.dumps(options))), options {router.options}",
            expected="the same router again",
            got=f"{type(error).__name__}: {error}",
            advice="take numbers, strings, lists and dictionaries as options, and keep what is built from them apart",
        ) from error
    if again.expert_kinds != router.expert_kinds or json.dumps(again.options) != json.dumps(router.options):
        raise Violation(
            on=f"options {options}",
            expected=f"the same kinds and options: {router.expert_kinds}",
            got=f"{again.expert_kinds}, options {again.options}",
            advice="do not change what was given in __init__",
        )
    held = io.BytesIO()
    torch.save(router.state_dict(), held)
    held.seek(0)
    twins = {}
    try:
        again.load_state_dict(torch.load(held, weights_only=True))
        twins["options and state_dict"] = again
        twins["copy.deepcopy"] = copy.deepcopy(router)
    except Exception as error:
        raise Violation(
            on=f"{subject.cls.__name__}",
            expected="a router from options and state_dict, and from copy.deepcopy",
            got=f"{type(error).__name__}: {error}",
            advice="register tensors as parameters or buffers; keep no process group, lambda or open file",
        ) from error
    try:
        twins["pickle"] = pickle.loads(pickle.dumps(router))
    except (pickle.PicklingError, AttributeError, ImportError) as error:
        subject.note(f"pickle: {error}")
    expected = subject.decide(router, probe)
    for how, twin in twins.items():
        found = difference(subject.decide(twin, probe), expected, length=probe.length)
        if found or twin.bank_size != router.bank_size:
            raise Violation(
                on=f"{where}, made again by {how}",
                expected="the same decision",
                got=found or f"bank_size {twin.bank_size}",
                advice="hold everything that a decision needs in options, parameters and persistent buffers",
            )
    name = "not_an_option_of_it"
    try:
        subject.cls(**options, **{name: 1})
    except (TypeError, ValueError):
        return
    raise Violation(
        on=f"{subject.cls.__name__}(..., {name}=1)",
        expected="an error",
        got="a router: **kwargs would swallow misspelt options",
        advice="make every option keyword-only, by name",
    )


@check
def options_are_used(subject: Subject) -> None:
    """Every option changes something: what is built, a decision, a loss, a gradient, a requirement, or how state moves,
    alone or beside a second option. An option of `unused_options` may change nothing."""
    if not subject.options:
        raise NotChecked("it has no options")
    seen: dict[str, _Seen | None] = {}

    def look(options: dict[str, Any]) -> _Seen | None:
        """What can be seen of the router with these options; None where it refuses them."""
        key = repr(sorted(options.items()))
        if key not in seen:
            seen[key] = _look(subject, options)
        return seen[key]

    # a preset, or options that leave others no room, may hide what the class's own example shows
    bases = [subject.options, *subject.variants]
    if subject.example_options is not None:
        bases.append(subject.example_options)
    bases = [base for base in bases if look(base) is not None]
    if not bases:
        raise NotChecked("it refuses its own options when it is created again, see saves_and_loads")
    for option in subject.options:
        if option in subject.cls.unused_options:
            continue
        tried: list[Any] = []
        if any(_matters(subject, option, base, look, tried) for base in bases):
            continue
        if not tried:
            subject.note(
                f"option {option}={subject.options[option]!r}: no other value that the router takes is known; give "
                f"check_router(..., variants=[{{{option!r}: ...}}])"
            )
            continue
        raise Violation(
            on=f"option {option}={subject.options[option]!r} and {', '.join(map(repr, tried))}, alone and beside "
            "every other option changed",
            expected="some difference in parameters, decisions, losses, gradients, requirements or state",
            got="none",
            advice="use the option or take it out; refuse it (ValueError) where it does not apply; if it is there for "
            f'one signature with other routers, declare unused_options = ("{option}",)',
        )


def _matters(subject: Subject, option: str, base: dict[str, Any], look, tried: list[Any]) -> bool:
    """Whether two values of the option, or more, show a difference: at these options, or with a second one changed."""
    values = _distinct([base[option], *_other_values(subject, option, base)])

    def differ(options: dict[str, Any]) -> bool:
        first = None
        for value in values:
            found = look(options | {option: value})
            if found is None:
                continue
            if first is not None:
                tried.extend([value] if repr(value) not in map(repr, tried) else [])
                if first.differs(found):
                    return True
            else:
                first = found
        return False

    if differ(base):
        return True
    for variant in subject.variants:
        # what can be changed only together with other options is used if the whole differs
        alone = look(base | {option: variant[option]})
        if variant[option] != base[option] and alone is None and (together := look(variant)) is not None:
            tried.append(variant[option])
            if look(base).differs(together):
                return True
    others = [name for name in base if name != option]
    return any(
        differ(base | {name: value}) for name in others for value in _distinct([*_other_values(subject, name, base)])
    )


def _distinct(values: list[Any]) -> list[Any]:
    """Each value once; 1, 1.0 and True are three."""
    return list({repr(value): value for value in values}.values())


class _Seen:
    """What a router with some options shows, in the order in which it is cheap to look."""

    def __init__(self, built: Any, behaviour: list[dict[str, Any]]) -> None:
        self.built, self.behaviour = built, behaviour

    def differs(self, other: _Seen) -> bool:
        if self.built[0] != other.built[0] or difference(other.built[1], self.built[1]):
            return True
        if len(self.behaviour) != len(other.behaviour):
            return True
        return any(difference(b, a) for a, b in zip(self.behaviour, other.behaviour, strict=True))


def _look(subject: Subject, options: dict[str, Any]) -> _Seen | None:
    try:
        router = subject.variant(options)
    except Exception:  # whatever a constructor says of a value, it does not take it
        return None
    said = [router.expert_kinds, dict(router.reductions)]
    for training in (True, False):
        router.train(training)
        said += [tuple(router.requires), router.causal, router.batch_independent, tuple(router.without_gradient)]
    initial = {name: value.detach().clone() for name, value in router.state_dict().items()}
    built = said, initial
    behaviour: list[dict[str, Any]] = []
    if options.get("dim", subject.dim) != subject.dim:
        # another width cannot be shown the same tokens: what is built must tell
        return _Seen(built, behaviour)
    draw_parameters(router)
    subject = subject.around(router)
    probes = [
        subject.probe(3, 12, seed=3),
        subject.probe(3, 10, seed=4, lengths=(10, 3, 6), scale=4.0),
        subject.probe(2, 24, seed=5, scale=0.3),
    ]
    try:
        for _turn in range(2):
            for training in (True, False):
                router.train(training)
                for probe in probes:
                    routing, grads = gradients(router, probe)
                    behaviour.append(everything(routing, probe) | grads)
                    if training and routing.stats and router.stateful:
                        with torch.no_grad():
                            router.update({name: value.clone() for name, value in routing.stats.items()})
            behaviour.append(state_of(router))
            if not router.stateful:
                break
    except Exception as error:
        behaviour.append({f"{type(error).__name__}: {error}": torch.zeros(())})
    return _Seen(built, behaviour)


def _other_values(subject: Subject, option: str, base: dict[str, Any]) -> Iterator[Any]:
    """Other values of an option, by its type and its value: those of the variants, then guesses. The class may refuse
    them."""
    value = base[option]
    for variant in subject.variants:
        if variant[option] != value:
            yield variant[option]
    kinds, literals = _annotated(subject.cls, option)
    for literal in literals:
        if literal != value:
            yield literal
    if isinstance(value, bool) or (value is None and bool in kinds):
        yield not value
        if value is None:
            yield False
    elif isinstance(value, int) or (value is None and int in kinds):
        number = value or 0
        guesses = (number + 1, number - 1, 2 * number, 2, 3, 4, 8)
        yield from (guess for guess in guesses if guess != value and guess >= 0)
        if float in kinds:
            yield number + 0.5
    elif isinstance(value, float) or (value is None and float in kinds):
        number = value or 0.0
        guesses = (number / 2, number * 2, number + 0.1, 0.5, 0.25, 1.0, 0.0, 2.0)
        yield from (guess for guess in guesses if guess != value)
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                for change in (1, -1):
                    yield type(value)([*value[:place], item + change, *value[place + 1 :]])
    if value is not None and type(None) in kinds:
        yield None


def _annotated(cls: type[Router], option: str) -> tuple[set[type], list[Any]]:
    """The types and the literal values that the constructor's annotation allows."""
    try:
        hint = typing.get_type_hints(cls.__init__).get(option)
    except (NameError, TypeError):  # an annotation that only a type checker understands
        return set(), []
    kinds: set[type] = set()
    literals: list[Any] = []
    todo = [hint]
    while todo:
        hint = todo.pop()
        origin = typing.get_origin(hint)
        if origin is typing.Literal:
            literals += typing.get_args(hint)
        elif origin in (typing.Union, types.UnionType):
            todo += reversed(typing.get_args(hint))
        elif isinstance(hint, type):
            kinds.add(hint)
    return kinds, literals
