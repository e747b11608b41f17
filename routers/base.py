"""The contract of a router: what it may know, what it decides, how it is found.

    routing = router(x_TD, context)

A ``Router`` sees tokens ``x [T, D]`` and a ``TokenContext``; it returns a ``Routing``: which experts each token goes to
and with which weight, the auxiliary losses, and statistics. It never sees the experts, and the layer never looks at
its class.

Shape letters, here and in every router: B samples, L tokens a sample, T = B * L tokens (row-major), D width,
E expert ids, K slots a token, N assignments.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import math
import numbers
import pkgutil
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

EXPERT_KINDS = ("routed", "local", "zero", "copy", "constant")
EVIDENCE = ("code", "paper", "reconstruction")
REDUCTIONS = ("sum", "mean", "max")
SELECTIONS = ("token", "segment", "sample", "expert", "pool", "slot")
ENTRY_POINTS = "gatewright.routers"


def router_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a router computes: float64 where x is, else float32, whatever autocast says."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of x, whatever its parameters were cast to."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


class Attention(Protocol):
    """The attention before the layer, as a router may use it: self-attention over the layer's tokens, under the same
    padding and documents. ``kernels.attention.AttentionWeights`` is one, made of q and k.

    Attributes:
        causal: whether a token sees no later one.
    """

    causal: bool

    def apply(self, values: Tensor) -> Tensor:
        """Applies the weights of every head to values [B, S, C] -> [B, heads, L, C], without an L x S matrix. S = L,
        unless the model decodes incrementally: then the L tokens are the last of S."""

    def head_contributions(self) -> Tensor:
        """What each head added to the token: [B, heads, L, D]; their sum is the attention's output."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenContext:
    """What a router may know besides the tokens. Every field but the shape is optional.

    Attributes:
        batch_size: B.
        length: L; the tokens are x [B * L, D], row-major.
        padding_mask: [B, L] bool, True = a real token.
        null_mask: [B] bool, True = an unconditional sample (no label, no prompt).
        token_ids: [B, L] int64.
        position: [B, L] int64, the place in the document.
        document: [B, L] int64, which packed document a token belongs to.
        modality: [B, L] int64.
        grid: (H, W) with H * W = L, of image tokens.
        timestep: [B] float, the diffusion time.
        attention: the attention before the layer (``Attention``).
        previous_logits: [T, E] router logits of the MoE layer before.
        causal: whether the model decodes left to right.
        layer: index of the MoE layer; part of the noise's key.
        cache: the caller's store for incremental decoding.
        seed, step, sample_id: the key of ``noise``; sample_id [B] int64 names a sample whatever rank holds it.
    """

    batch_size: int
    length: int
    padding_mask: Tensor | None = None
    null_mask: Tensor | None = None
    token_ids: Tensor | None = None
    position: Tensor | None = None
    document: Tensor | None = None
    modality: Tensor | None = None
    grid: tuple[int, int] | None = None
    timestep: Tensor | None = None
    attention: Any = None
    previous_logits: Tensor | None = None
    causal: bool = False
    layer: int = 0
    cache: Any = None
    seed: int | None = None
    step: int | None = None
    sample_id: Tensor | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 0 or self.length < 0:
            raise ValueError(f"batch_size={self.batch_size}, length={self.length}: both must be at least 0")
        masks, ids = ("padding_mask", "null_mask"), ("token_ids", "position", "document", "modality", "sample_id")
        for name in (*masks, *ids, "timestep"):
            value = getattr(self, name)
            if value is None:
                continue
            per_sample = name in ("null_mask", "timestep", "sample_id")
            shape = (self.batch_size,) if per_sample else (self.batch_size, self.length)
            if tuple(value.shape) != shape:
                given = f"context.{name} has shape {tuple(value.shape)}"
                raise ValueError(f"{given}: expected {shape}, from batch_size and length")
            if name in masks and value.dtype != torch.bool:
                # ~mask of an integer mask is -1 and -2, all of them true
                raise ValueError(f"context.{name} is {value.dtype}: expected torch.bool, give {name}.bool()")
            if name in ids and (value.is_floating_point() or value.dtype == torch.bool):
                raise ValueError(f"context.{name} is {value.dtype}: expected integers")
        if self.grid is not None and math.prod(self.grid) != self.length:
            cells = f"context.grid={self.grid} has {math.prod(self.grid)} cells"
            raise ValueError(f"{cells}: expected length={self.length}")
        if self.previous_logits is not None and self.previous_logits.shape[:-1] != (self.num_tokens,):
            given = f"context.previous_logits has shape {tuple(self.previous_logits.shape)}"
            raise ValueError(f"{given}: expected [{self.num_tokens}, E], from batch_size and length")

    @classmethod
    def for_tokens(cls, x: Tensor, **fields: Any) -> TokenContext:
        """The context of x [B, L, D], or of x [T, D] as one sample."""
        batch_size, length = x.shape[:2] if x.dim() == 3 else (1, x.shape[0])
        return cls(batch_size=batch_size, length=length, **fields)

    def replace(self, **fields: Any) -> TokenContext:
        return dataclasses.replace(self, **fields)

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def real_T(self) -> Tensor | None:
        """[T] bool, True = a real token; None when every token is."""
        return None if self.padding_mask is None else self.padding_mask.flatten()

    @property
    def null_T(self) -> Tensor | None:
        """[T] bool, True = a token of an unconditional sample; None without a null mask."""
        if self.null_mask is None:
            return None
        return self.null_mask.repeat_interleave(self.length, output_size=self.num_tokens)

    def has(self, field: str) -> bool:
        """Whether the field is there; ``"noise"`` stands for its whole key."""
        names = ("seed", "step", "sample_id") if field == "noise" else (field,)
        return all(getattr(self, name) is not None for name in names)

    def noise(self, *shape: int, distribution: str = "normal", stream: int = 0) -> Tensor:
        """Random numbers that depend on (seed, step, sample id, layer, stream) and on the place inside the sample, so
        that every rank layout, every micro-batching and every recomputation draws the same.

        Args:
            shape: [T, ...] or [B, ...]: the first dimension counts tokens or samples.
            distribution: "normal" (mean 0, deviation 1) or "uniform" (in the open interval 0 to 1).
            stream: tells apart several draws of one router.

        Returns:
            float32, shape as asked, on the device of ``sample_id``.
        """
        if not self.has("noise"):
            raise ValueError(
                "context.noise needs seed, step and sample_id: whoever builds the TokenContext supplies them"
            )
        if shape[0] not in (self.num_tokens, self.batch_size):
            first = f"{self.num_tokens} tokens or {self.batch_size} samples"
            raise ValueError(f"noise of shape {shape}: the first dimension must be {first}")
        if distribution not in ("normal", "uniform"):
            raise ValueError(f'distribution="{distribution}": choose "normal" or "uniform"')
        key_B = _mix(self.sample_id.long() + _constant(self.seed, self.step, self.layer, stream))
        per_sample = math.prod(shape[1:]) * (self.length if shape[0] == self.num_tokens else 1)
        counter = torch.arange(per_sample, device=key_B.device)
        bits = _mix(key_B[:, None] + _mix(counter)[None, :])
        # 23 bits, centred in their cells: exact in float32, also when doubled, so never 0 or 1
        uniform = ((bits & 0x7FFFFF).to(torch.float32) + 0.5) / 2**23
        value = uniform if distribution == "uniform" else torch.erfinv(2 * uniform - 1) * math.sqrt(2)
        return value.view(shape)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 tensors: every input bit reaches every output bit."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _constant(*values: int) -> int:
    """One signed 64-bit number from several."""
    state = 0
    for value in values:
        state = int(_mix(torch.tensor(state ^ (int(value) & (2**63 - 1)), device="cpu")))
    return state


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """What a router decided, in one of two layouts, each derived from the other when asked.

    * fixed k: ``index [T, K]`` (-1 = no assignment) and ``weight [T, K]``;
    * a list: ``token [N]``, ``expert [N]``, ``weight [N]``, sorted by (token, slot), each pair once.

    Weights are float32 (float64 where x is) and keep their graph.

    Attributes:
        num_tokens: T.
        bank_size: E, the expert ids addressed.
        logits, scores: [T, E] with their graph; -inf and 0 where not eligible; each row of scores sums to 1, for
            telemetry.
        selected: [T, E] bool, which pairs count as load, where that is not every assignment.
        requested: [T, K] ids before capacity dropped some; None where nothing can be dropped.
        rows: [N, D] expert inputs that replace x[token], in the order of the list.
        dispatch, combine: [B, L, S] soft slots: slot inputs are dispatch^T x, outputs combine @ slots; the expert of
            slot s is s * E // S. They stand in place of assignments.
        prediction: what a regulariser of the recipe needs.
        losses: scalars, weighted, with gradient.
        stats: detached tensors of fixed shape; ``Router.reductions`` says how each adds up.
    """

    num_tokens: int
    bank_size: int
    index: Tensor | None = None
    token: Tensor | None = None
    expert: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    selected: Tensor | None = None
    requested: Tensor | None = None
    rows: Tensor | None = None
    dispatch: Tensor | None = None
    combine: Tensor | None = None
    prediction: Any = None
    losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    stats: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_topk(cls, index: Tensor, weight: Tensor, *, bank_size: int, **fields: Any) -> Routing:
        """From ids [T, K] (-1 = none) and weights [T, K]."""
        if index.shape != weight.shape or index.dim() != 2:
            raise ValueError(f"index {tuple(index.shape)} and weight {tuple(weight.shape)}: both must be [T, K]")
        return cls(num_tokens=index.shape[0], bank_size=bank_size, index=index, weight=weight, **fields)

    @classmethod
    def from_mask(cls, mask: Tensor, weight: Tensor, **fields: Any) -> Routing:
        """From a choice [T, E] bool and weights [T, E], of which the chosen are taken."""
        if mask.shape != weight.shape or mask.dim() != 2:
            raise ValueError(f"mask {tuple(mask.shape)} and weight {tuple(weight.shape)}: both must be [T, E]")
        token, expert = mask.nonzero(as_tuple=True)
        return cls(
            num_tokens=mask.shape[0],
            bank_size=mask.shape[1],
            token=token,
            expert=expert,
            weight=weight[token, expert],
            **fields,
        )

    def replace(self, **fields: Any) -> Routing:
        return dataclasses.replace(self, **fields)

    def _check_assigned(self) -> None:
        if self.index is None and (self.token is None or self.expert is None):
            soft = " (it holds soft slots)" if self.dispatch is not None else ""
            raise ValueError(
                f"this routing holds no assignments{soft}: give index and weight, or token, expert and weight"
            )

    def as_list(self) -> tuple[Tensor, Tensor, Tensor]:
        """token [N], expert [N], weight [N]: every assignment, sorted by (token, slot)."""
        self._check_assigned()
        if self.index is None:
            return self.token, self.expert, self.weight
        token, slot = (self.index >= 0).nonzero(as_tuple=True)
        return token, self.index[token, slot], self.weight[token, slot]

    def as_topk(self) -> tuple[Tensor, Tensor]:
        """index [T, K] and weight [T, K], K the most assignments of any token; -1 and 0 fill up."""
        self._check_assigned()
        if self.index is not None:
            return self.index, self.weight
        per_token_T = torch.bincount(self.token, minlength=self.num_tokens)
        first_T = per_token_T.cumsum(0) - per_token_T
        slot = torch.arange(len(self.token), device=self.token.device) - first_T[self.token]
        shape = (self.num_tokens, int(per_token_T.max()) if self.num_tokens else 0)
        index = torch.full(shape, -1, dtype=self.expert.dtype, device=self.expert.device).index_put(
            (self.token, slot), self.expert
        )
        return index, self.weight.new_zeros(shape).index_put((self.token, slot), self.weight)

    @property
    def loss(self) -> Tensor:
        """The sum of the auxiliary losses; a zero where there is none."""
        if not self.losses:
            reference = self.weight if self.weight is not None else self.combine
            return reference.new_zeros(())
        return torch.stack([value.reshape(()) for value in self.losses.values()]).sum()

    def load_E(self) -> Tensor:
        """[E] int64: how many tokens count as load of each expert, after capacity; with soft slots, how many of its
        slots hold any token. It never waits for the device."""
        if self.selected is not None:
            return self.selected.sum(0)
        if self.dispatch is not None:
            held_S = (self.dispatch.detach().sum(1) > 0).sum(0)
            slot_S = torch.arange(len(held_S), device=held_S.device)
            return held_S.new_zeros(self.bank_size).index_add(0, slot_S * self.bank_size // len(held_S), held_S)
        self._check_assigned()
        return count_experts(self.expert if self.index is None else self.index, self.bank_size)

    def requested_E(self) -> Tensor:
        """[E] int64: the same before capacity dropped some."""
        return self.load_E() if self.requested is None else count_experts(self.requested, self.bank_size)


def count_experts(ids: Tensor, bank_size: int) -> Tensor:
    """How often each id 0..E-1 occurs: [E] int64; -1 is not counted. It never waits for the device."""
    count = torch.zeros(bank_size + 1, dtype=torch.int64, device=ids.device)
    count.scatter_add_(
        0, torch.where(ids < 0, bank_size, ids).flatten(), torch.ones_like(ids, dtype=torch.int64).flatten()
    )
    return count[:bank_size]


pytree.register_dataclass(Routing)


class Router(nn.Module):
    """Decides which experts a token goes to. One abstract method: ``forward(x_TD, context) -> Routing``.

    ``forward`` changes nothing; state that moves with training moves in ``update``. ``requires``, ``causal`` and
    ``batch_independent`` may be properties that depend on options and on ``self.training``.

    Attributes:
        name: the registered name.
        bank_size: E, the expert ids it addresses.
        expert_kinds: one a id: "routed", "local", "zero", "copy" or "constant".
        evidence: "code", "paper" or "reconstruction": what it was built from.
        paper: where it was published, for tables: "Switch, arXiv:2101.03961".
        selection: who chooses: each "token" its experts, each "segment" or "sample" for all its tokens, each "expert"
            its tokens, one "pool" of all pairs, or soft "slot" mixtures.
        requires: the ``TokenContext`` fields that it needs ("noise" for the key of the noise).
        requires_by_option: fields that only some options need.
        loss_names: the auxiliary losses that some option adds.
        state_names: the buffers that ``update`` moves under some option.
        causal: whether a decision never depends on what later tokens of the sample are. How many tokens the call has
            may enter where experts have a capacity, so that a prefix alone may keep others.
        batch_independent: whether a decision never depends on other samples.
        causal_option: the options that make it causal where it is not, as one writes them: "causal=True".
        allow_noncausal: let it decide in a model that decodes left to right although it is not causal.
        without_gradient: what the weights and losses of a decision give no gradient, on purpose: names of parameters or
            of submodules (a head that only the recipe's own loss trains), "tokens", or "weights" for all of them.
        unused_options: options that are there for the sake of one signature and change nothing.
        reductions: how each entry of ``Routing.stats`` adds up over micro-batches and ranks.
        options: what it was created with, defaults included: ``create_router(name, **options)`` makes it again.
    """

    name: ClassVar[str] = ""
    evidence: ClassVar[str]
    paper: ClassVar[str] = ""
    selection: ClassVar[str] = "token"
    requires: tuple[str, ...] = ()
    requires_by_option: ClassVar[tuple[str, ...]] = ()
    loss_names: ClassVar[tuple[str, ...]] = ()
    state_names: ClassVar[tuple[str, ...]] = ()
    causal: bool = False
    causal_option: str = ""
    batch_independent: bool = False
    allow_noncausal: bool = False
    without_gradient: tuple[str, ...] = ()
    unused_options: ClassVar[tuple[str, ...]] = ()
    reductions: Mapping[str, str] = {}
    options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Router:
        router = super().__new__(cls)
        if kwargs and not args:
            bound = inspect.signature(cls.__init__).bind(None, **kwargs)
            bound.apply_defaults()
            router.__dict__["options"] = dict(list(bound.arguments.items())[1:])
            _check_types(cls, router.__dict__["options"])
        return router

    def __init__(self, *, num_experts: int, expert_kinds: tuple[str, ...] | None = None) -> None:
        """
        Args:
            num_experts: how many routed experts there are.
            expert_kinds: the kind of every id; by default ``num_experts`` routed ones.
        """
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}: choose at least 1")
        self.expert_kinds = tuple(expert_kinds or ()) or ("routed",) * num_experts
        unknown = sorted(set(self.expert_kinds) - set(EXPERT_KINDS))
        if unknown or self.expert_kinds.count("routed") != num_experts:
            raise ValueError(
                f"expert_kinds={self.expert_kinds}: choose from {EXPERT_KINDS}, {num_experts} of them routed"
            )
        self.num_experts = num_experts
        self.bank_size = len(self.expert_kinds)

    def __call__(self, x: Tensor, context: TokenContext | None = None) -> Routing:
        context = TokenContext.for_tokens(x) if context is None else context
        if x.dim() != 2 or x.shape[0] != context.num_tokens:
            expected = f"[{context.num_tokens}, D], from the context's batch_size and length"
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {expected}")
        width = getattr(self, "options", {}).get("dim")
        if width not in (None, x.shape[1]):
            given = f"x has shape {tuple(x.shape)}"
            raise ValueError(f"{given}: expected [{x.shape[0]}, {width}], since the router was made with dim={width}")
        for field in self.requires:
            if not context.has(field):
                argument = "seed=..., step=..., sample_id=..." if field == "noise" else f"{field}=..."
                raise ValueError(
                    f'router "{self.name or type(self).__name__}" needs context.{field}, which is missing: the model '
                    f"that calls the layer supplies it, layer(x, TokenContext.for_tokens(x, {argument}))"
                )
        if context.causal and not (self.causal or self.allow_noncausal):
            mode = "training" if self.training else "evaluation"
            choose = f"Make it with {self.causal_option}, choose" if self.causal_option else "Choose"
            raise ValueError(
                f'router "{self.name or type(self).__name__}" is not causal in {mode} with these options: its decision '
                "for a token may depend on later ones, and context.causal says that the model decodes left to right. "
                f"{choose} a causal router, or allow it: MoELayer(..., allow_noncausal=True)"
            )
        if context.real_T is not None:
            # padding may hold anything, and 0 * NaN in a backward would reach every parameter
            x = x.masked_fill(~context.real_T[:, None], 0)
        with torch.autocast(x.device.type, enabled=False):
            routing = super().__call__(x, context)
        if not isinstance(routing, Routing):
            raise ValueError(
                f'router "{self.name or type(self).__name__}" returned {type(routing).__name__}: forward must return a '
                "Routing, from Routing.from_topk(index, weight, ...) or Routing.from_mask(mask, weight, ...)"
            )
        return routing

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x [T, D], 0 at padded tokens -> the decision. Pure: no attribute, buffer or random state changes."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, context) -> Routing")

    def update(self, stats: dict[str, Tensor]) -> None:
        """Moves biases and thresholds by the statistics of one optimizer step, already reduced over micro-batches and
        ranks. A router without such state leaves it as it is here."""

    @property
    def stateful(self) -> bool:
        """Whether ``update`` must be called for training to be right."""
        return type(self).update is not Router.update

    @classmethod
    def example(cls) -> tuple[dict[str, Any], TokenContext]:
        """Small options and a context, noise included: how tests and documentation run it."""
        context = TokenContext(batch_size=2, length=8, seed=0, step=0, sample_id=torch.arange(2))
        return {"dim": 16, "num_experts": 4, "top_k": 2}, context

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves and casts like any module, but keeps state (buffers) in at least float32: a bias that moves by 1e-3 a
        step would stand still in bfloat16."""
        before = {
            name: buffer for name, buffer in self._buffers.items() if buffer is not None and buffer.is_floating_point()
        }
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class GatedRouter(Router):
    """A router in three steps, so that others can change one and keep the rest:

        logits [T, E] = logits(x, context)      scores [T, E] = scores(logits)      assign(logits, scores, context)

    ``similarity_aware`` and ``attention_aware`` average the scores of such a router over tokens before it assigns.
    """

    def logits(self, x: Tensor, context: TokenContext) -> Tensor:
        """x [T, D] -> [T, E], in ``router_dtype(x)``."""
        raise NotImplementedError(f"{type(self).__name__} must define logits(x, context) -> [T, E]")

    def scores(self, logits: Tensor) -> Tensor:
        """What is not negative and may be averaged over tokens: by default the softmax over the experts. [T, E]"""
        return logits.softmax(-1)

    def logits_of(self, scores: Tensor) -> Tensor:
        """Logits that have these scores, up to what ``assign`` ignores: the inverse of ``scores``. [T, E]"""
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()

    def assign(self, logits: Tensor, scores: Tensor, context: TokenContext) -> Routing:
        """The decision. Ranks by ``scores``; padded tokens get no assignment."""
        raise NotImplementedError(f"{type(self).__name__} must define assign(logits, scores, context) -> Routing")

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        logits = self.logits(x, context)
        return self.assign(logits, self.scores(logits), context)


_routers: dict[str, type[Router]] = {}
_presets: dict[str, tuple[str, dict[str, Any]]] = {}
_preset_papers: dict[str, str] = {}
_discovered = False


def register_router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: makes the router known as ``name``.

    Raises:
        ValueError: the name is taken by another class, the class states no valid ``evidence`` or ``selection``, or its
            constructor takes more than named, keyword-only options.
    """

    def register(cls: type[Router]) -> type[Router]:
        taken = _routers.get(name)
        if name in _presets or (
            taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__)
        ):
            raise ValueError(f'router name "{name}" is taken by {taken or _presets[name]}: choose another')
        if getattr(cls, "evidence", None) not in EVIDENCE:
            raise ValueError(f"{cls.__name__}.evidence={getattr(cls, 'evidence', None)!r}: choose one of {EVIDENCE}")
        if cls.selection not in SELECTIONS:
            raise ValueError(f"{cls.__name__}.selection={cls.selection!r}: choose one of {SELECTIONS}")
        loose = [p.name for p in _option_parameters(cls) if p.kind is not p.KEYWORD_ONLY]
        if loose:
            # *args or **kwargs would swallow misspelt options, and positional ones escape Router.options
            raise ValueError(
                f"{cls.__name__}.__init__ takes {', '.join(loose)}: make every option keyword-only, by name"
            )
        cls.name = name
        _routers[name] = cls
        return cls

    return register


def register_preset(name: str, router: str, /, *, paper: str = "", **options: Any) -> None:
    """Makes ``name`` stand for the router with these options set, for a strategy that is another one with options.

    Args:
        paper: where the strategy was published, if not where the router was.
    """
    if name in _routers or name in _presets and _presets[name] != (router, options):
        raise ValueError(f'router name "{name}" is taken: choose another')
    _presets[name] = (router, options)
    _preset_papers[name] = paper


def router_paper(name: str) -> str:
    """Where the router or preset was published."""
    return _preset_papers.get(name) or router_class(name)[0].paper


def list_routers() -> dict[str, str]:
    """Every known name, presets included, with its evidence, sorted."""
    _discover()
    names = {name: cls.evidence for name, cls in _routers.items()}
    names |= {name: _routers[router].evidence for name, (router, _) in _presets.items()}
    return dict(sorted(names.items()))


def router_class(name: str) -> tuple[type[Router], dict[str, Any]]:
    """The class behind a name, and the options that the name presets.

    Raises:
        ValueError: nobody registered the name; the message offers the close matches.
    """
    _discover()
    target, options = _presets.get(name, (name, {}))
    if target not in _routers:
        raise ValueError(f'unknown router "{name}"{_suggest(name, [*_routers, *_presets])}')
    return _routers[target], options


def router_options(name: str) -> dict[str, Any]:
    """Every option of the router or preset with its default, in order; ``...`` where it must be given."""
    cls, preset = router_class(name)
    defaults = {p.name: ... if p.default is p.empty else p.default for p in _option_parameters(cls)}
    return {option: preset.get(option, default) for option, default in defaults.items()}


def create_router(name: str, /, **options: Any) -> Router:
    """``create_router("promoe", dim=384, num_experts=12, top_k=1)``; ``num_experts`` counts the routed ones.

    Raises:
        ValueError: an unknown name or option (the message offers the close matches), a missing one, or a bad value.
    """
    cls, preset = router_class(name)
    known = router_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f'router "{name}" has no option "{option}"{_suggest(option, list(known))}')
    given = preset | options
    missing = [option for option, default in known.items() if default is ... and option not in given]
    if missing:
        raise ValueError(f'router "{name}" needs the option{"s" if len(missing) > 1 else ""} {", ".join(missing)}')
    return cls(**given)


def _option_parameters(cls: type[Router]) -> list[inspect.Parameter]:
    return list(inspect.signature(cls.__init__).parameters.values())[1:]


# an annotation, what it asks for, and what is that; True is no number, although Python has it as 1
_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str)),
    dict: ("a dict", lambda value: isinstance(value, dict)),
    type(None): ("None", lambda value: value is None),
}


def _check_types(cls: type[Router], options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is not what the constructor's annotation says, or a width ``dim`` below 1.
    Annotations of other types than ``_TYPES`` are the class's own matter."""
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):  # annotations that only a type checker understands
        return
    for name, value in options.items():
        kinds = _kinds(hints.get(name, Any))
        if all(kind in _TYPES for kind in kinds) and not any(_TYPES[kind][1](value) for kind in kinds):
            raise ValueError(f"{name}={value!r}: choose {' or '.join(_TYPES[kind][0] for kind in kinds)}")
        if name == "dim" and isinstance(value, int) and value < 1:
            raise ValueError(f"dim={value}: choose at least 1, the width of the tokens")


def _kinds(hint: Any) -> list[Any]:
    """The types that an annotation allows."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if origin is typing.Literal:
        return list(dict.fromkeys(type(value) for value in typing.get_args(hint)))
    return [origin or hint]


def _suggest(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(close)}?" if close else ":"
    return f"{hint} Known: {', '.join(sorted(known))}"


def _discover() -> None:
    """Imports every file of this folder and every entry point, once. What another package breaks is a warning, so that
    it costs that package's routers only."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            cls = entry.load()
            if isinstance(cls, type) and issubclass(cls, Router) and _routers.get(entry.name) is not cls:
                register_router(entry.name)(cls)
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unnamed distribution"
            warnings.warn(f'router "{entry.name}" of {package} is left out: {error!r}', stacklevel=2)
