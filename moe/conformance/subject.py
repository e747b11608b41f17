"""The router under test: how to make it again, and inputs for it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...routers.base import Router, Routing, TokenContext, create_router, router_class
from ..experts import ExpertSpec
from ..layer import MoELayer
from .observe import per_token
from .probe import Probe, draw_probe
from .registry import NotChecked

OPTIONAL = (
    "token_ids",
    "position",
    "document",
    "modality",
    "grid",
    "timestep",
    "null_mask",
    "cache",
    "attention",
    "previous_logits",
    "noise",
)
Factory = Callable[[], Router] | type[Router] | str


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global random state inside; the caller's is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Subject:
    """Makes the router, in any mode, dtype and state, and probes that fit it.

    Raises:
        ValueError: nothing that makes a router, or one whose token width is not known.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        options: Mapping[str, Any] | None = None,
        context: TokenContext | None = None,
        dim: int | None = None,
        variants: Sequence[Mapping[str, Any]] = (),
        long: bool = False,
        ranks: Any = None,
    ) -> None:
        self.long, self.ranks, self.notes = long, ranks, []
        self._create = _creator(factory, dict(options or {}))
        try:
            router = self.fresh()
        except Exception as error:
            raise ValueError(f"no router could be made: {type(error).__name__}: {error}") from error
        self.cls, self.options = type(router), dict(getattr(router, "options", {}))
        self.name = router.name or self.cls.__name__
        self.example = self.cls.example()[1] if context is None else context
        known = dim or self.options.get("dim") or _width(router)
        if known is None:
            raise ValueError(
                f"the width of the tokens of {self.cls.__name__} is not known: it has no option `dim`; say dim=..."
            )
        self.dim = int(known)
        self.variants = [self.options | dict(variant) for variant in variants]
        self._look_at(router)

    @property
    def example_options(self) -> dict[str, Any] | None:
        """Every option of the class's own example; None where it has none that works."""
        with contextlib.suppress(Exception):
            return dict(self.variant(self.cls.example()[0]).options)
        return None

    def around(self, router: Router) -> Subject:
        """The same, with inputs for another router of the class."""
        other = copy.copy(self)
        other._look_at(router)
        return other

    def _look_at(self, router: Router) -> None:
        """What a batch for this router must hold: what it requires in either mode, and what the example has."""
        modes = [(router.train(training).requires, router.causal) for training in (True, False)]
        present = {name for name in OPTIONAL if self.example.has(name)}
        self.options = dict(getattr(router, "options", {}))
        self.bank_size, self.fields = router.bank_size, frozenset(present).union(*(fields for fields, _ in modes))
        # as a model would: a causal attention for a router that was made for one, or is causal
        causal = self.options.get("causal", all(causal for _, causal in modes))
        self.attention = int(self.options.get("num_heads") or 2), bool(causal)
        router.train()

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.cls.__name__}({options})"

    # ---- routers

    def fresh(self, seed: int = 0) -> Router:
        """As its constructor leaves it, in training."""
        with seeded(seed):
            router = self._create()
        if not isinstance(router, Router):
            raise ValueError(
                f"the factory returned {type(router).__name__}: it must return a gatewright.routers.Router"
            )
        return router.train()

    def variant(self, options: Mapping[str, Any], seed: int = 0) -> Router:
        """Another router of the class."""
        with seeded(seed):
            return self.cls(**options).train()

    def router(
        self, training: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0, warm: bool = True
    ) -> Router:
        """With parameters drawn from N(0, 1), so that no two experts are nearly equal; outside training with state that
        two training steps moved, since thresholds that never moved may let everything pass."""
        router = draw_parameters(self.fresh(seed), seed)
        if warm and not training and router.stateful:
            with contextlib.suppress(Exception), torch.no_grad():  # a fault of `update` is for the checks of state
                for step in range(2):
                    probe = self.probe(seed=50 + step)
                    stats = router(probe.x, probe.context).stats
                    if stats:
                        router.update(stats)
        return router.train(training).to(dtype)

    def layer(self, router: Router, **options: Any) -> MoELayer:
        """The router before small experts with biases."""
        layer = MoELayer(router, ExpertSpec(self.dim, 6, bias=True), **options)
        with torch.no_grad():
            if layer.constants is not None:
                layer.constants.copy_(torch.linspace(-1, 1, layer.constants.numel()).view_as(layer.constants))
        return layer

    # ---- inputs

    def probe(
        self,
        batch_size: int | None = None,
        length: int | None = None,
        *,
        samples: Sequence[int] | None = None,
        seed: int = 1,
        lengths: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        names: frozenset[str] | None = None,
    ) -> Probe:
        """A batch; by default of the example's shape, with every field that the router requires or its example has."""
        if samples is None:
            samples = range(self.example.batch_size if batch_size is None else batch_size)
        probe = draw_probe(
            dim=self.dim,
            bank_size=self.bank_size,
            example=self.example,
            names=self.fields if names is None else names,
            samples=tuple(samples),
            length=self.example.length if length is None else length,
            seed=seed,
            lengths=None if lengths is None else tuple(lengths),
            dtype=dtype,
            scale=scale,
            attention=self.attention,
            vocabulary=int(self.options.get("vocab_size") or self.options.get("vocabulary") or 16),
        )
        return probe

    def decide(self, router: Router, probe: Probe) -> dict[str, torch.Tensor]:
        """The decision of every token, without graph."""
        with torch.no_grad():
            return per_token(router(probe.x, probe.context), probe)

    # ---- what is said of it

    def note(self, text: str) -> None:
        """A part of the running check that was not looked at, with the reason."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def several_experts(self) -> bool:
        return self.bank_size > 1

    def without_gradient(self, router: Router, name: str) -> bool:
        """Whether the router declares that the weights and losses do not reach this parameter, or "tokens" or
        "weights"."""
        return any(name == entry or name.startswith(entry + ".") for entry in router.without_gradient)


def draw_parameters(router: Router, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def run(router: Router, probe: Probe) -> Routing:
    return router(probe.x, probe.context)


def mode(router: nn.Module) -> str:
    return "training" if router.training else "evaluation"


def _creator(factory: Factory, options: dict[str, Any]) -> Callable[[], Router]:
    if isinstance(factory, str):
        cls, preset = router_class(factory)
        # what a preset sets is what makes it that strategy
        given = {k: v for k, v in cls.example()[0].items() if k not in preset} | options
        return lambda: create_router(factory, **given)
    if isinstance(factory, type):
        if not issubclass(factory, Router):
            raise ValueError(
                f"{factory.__name__} is no router: give a subclass of gatewright.routers.Router, a function without "
                "arguments that returns one, or a registered name"
            )
        given = factory.example()[0]
        if factory.example.__func__ is Router.example.__func__:
            known = list(inspect.signature(factory.__init__).parameters)
            given = {name: value for name, value in given.items() if name in known}
        return lambda: factory(**given | options)
    if isinstance(factory, Router) or not callable(factory):
        raise ValueError(
            f"{type(factory).__name__} makes no router: give a subclass of gatewright.routers.Router, a function "
            "without arguments that returns one, or a registered name"
        )
    needs = [
        p.name
        for p in inspect.signature(factory).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unmet = [name for name in needs if name not in options]
    if unmet:
        raise ValueError(
            f"{getattr(factory, '__name__', factory)} needs the argument{'s' * (len(unmet) > 1)} {', '.join(unmet)}: "
            "give options, or a function that needs none"
        )
    return lambda: factory(**options)


def _width(router: Router) -> int | None:
    """The width of the tokens, from the first matrix whose rows are experts."""
    for parameter in router.parameters():
        if parameter.dim() == 2 and parameter.shape[0] == router.bank_size:
            return parameter.shape[1]
    return None


def needs(condition: object, reason: str) -> None:
    if not condition:
        raise NotChecked(reason)
