"""A plan: which experts of each layer stay, what the router becomes, and how sure the choice is.

    PLAN (JSON)
        {"format": 1, "kind": "gatewright pruning plan", "model": {...}, "criterion": "easy-ep", "domains": {"code": 1},
         "policy": "slice", "num_experts": 128, "top_k": 8, "num_groups": 1, "topk_group": 1,
         "keep": {"0": [1, 4, ...], ...}, "mtp": "none", "mtp_keep": {}, "budget": {...}, "kept_mass": {...},
         "margins": {...}, "stability": {...}, "notes": [...], "seed": 0, "statistics_sha256": ..., "version": ...}

What happens to the router is the policy:

    slice               its rows and biases of pruned experts go; a grouped router becomes an ungrouped one
    slice-equal-groups  the same number of experts stays in every group, and the groups stay: exactly the masked model
    slice-regroup       the groups are cut anew from the survivors: loads everywhere, but is not the masked model
    keep-rows           the router keeps all rows beside a map of ids: only an engine that reads the map can run it, as
                        the layers of this library do
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...moe.files import write_text
from . import selection
from .criteria import CRITERIA, criterion_of, score
from .families import FAMILIES
from .statistics import DomainStatistics, Statistics, check_format, checked_model, is_own

FORMAT = 1
KIND = "gatewright pruning plan"
POLICIES = ("slice", "slice-equal-groups", "slice-regroup", "keep-rows")
BUDGETS = ("uniform", "equal-groups", "global")
MIXTURES = ("weighted", "max-min")
SHOTS = (1, 5, 10, 25)  # numbers of demonstrations whose choice is compared with the whole one's
DRAWS = 10  # random halves, and random demonstrations of each number
AGREEMENT = 0.9  # of halves; below it more demonstrations are asked for (arXiv 2504.06792: 0.93 between 10 and 25)

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What stays. Every field is checked when it is made, whoever wrote it.

    Attributes:
        model: the description that the statistics carry, and ``source``, what the folder was called.
        criterion: by which experts were scored.
        domains: the weight of each domain.
        policy: one of ``POLICIES``.
        keep: ascending ids of the experts that stay, by absolute layer index.
        top_k: experts a token of the pruned model.
        num_groups, topk_group: of the pruned model's router; 1 where it is not grouped.
        mtp: what becomes of the layers for multi-token prediction: ``"none"`` where there are none, ``"strip"``,
            ``"prune"`` (to ``mtp_keep``).
        mixture: how several domains became one choice.
        budget, kept_mass, margins, stability, notes: how the choice was made and how good it looks.
        seed: of what was random.
        statistics_sha256: of the file of statistics; empty for a plan made by hand.
        version: of the gatewright that made it.
    """

    model: Mapping[str, Any]
    criterion: str
    domains: Mapping[str, float]
    policy: str
    keep: Mapping[int, tuple[int, ...]]
    top_k: float
    num_groups: int = 1
    topk_group: int = 1
    mtp: str = "none"
    mtp_keep: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    mixture: str = "weighted"
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept_mass: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    margins: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stability: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int = 0
    statistics_sha256: str = ""
    version: str = __version__

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("model", "domains", "budget", "kept_mass", "margins", "stability"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} is {getattr(self, name)!r}, not an object")
        if not all(isinstance(weight, int | float) and weight > 0 for weight in self.domains.values()):
            raise ValueError(f"domains is {dict(self.domains)}: the weight of each is a number above 0")
        if not isinstance(self.notes, list | tuple) or not all(isinstance(note, str) for note in self.notes):
            raise ValueError(f"notes is {self.notes!r}, not a list of sentences")
        put("model", checked_model(self.model))
        criterion_of(self.criterion)
        _one_of("policy", self.policy, POLICIES)
        _one_of("mtp", self.mtp, ("none", "strip", "prune"))
        _one_of("mixture", self.mixture, MIXTURES)
        sizes = dict(zip(self.model["layers"], self.model["experts_per_layer"], strict=True))
        put("keep", _checked_keep("keep", self.keep, sizes))
        mtp_layers = self.model["mtp_layers"]
        put("mtp_keep", _checked_keep("mtp_keep", self.mtp_keep, dict.fromkeys(mtp_layers, self.num_experts)))
        put("notes", tuple(self.notes))
        if not isinstance(self.top_k, int | float) or isinstance(self.top_k, bool) or self.top_k <= 0:
            raise ValueError(f"top_k is {self.top_k!r}, not a number of experts a token")
        if not is_own(self.model) and not isinstance(self.top_k, int):
            raise ValueError(f"top_k is {self.top_k!r}, not a whole number of experts a token")
        least = min(self.counts.values())
        if math.ceil(self.top_k) > least:
            raise ValueError(
                f"{self.top_k:g} experts a token of {least} that stay: keep {math.ceil(self.top_k)} or more in every "
                f"layer, or lower it with top_k={least} (--top-k {least}), which changes what the model computes"
            )
        self._check_counts()
        self._check_groups()
        self._check_mtp()

    def _check_counts(self) -> None:
        if len(set(self.counts.values())) > 1 and not is_own(self.model):
            raise ValueError(
                f"layers keep {min(self.counts.values())} to {max(self.counts.values())} experts, but "
                f"{self.model['model_type']} has one count for all layers: engines would refuse the files, or fill the "
                "layers that do not fit at random. Use a uniform budget; layers may differ in runs of this library"
            )

    def _check_groups(self) -> None:
        groups, chosen, N = self.num_groups, self.topk_group, self.num_experts
        before = (self.model["num_groups"], self.model["topk_group"])
        expected = (1, 1) if self.policy == "slice" else before
        if (groups, chosen) != expected:
            raise ValueError(
                f"num_groups {groups} and topk_group {chosen}: policy {self.policy} makes them {expected[0]} and "
                f"{expected[1]}"
            )
        if before[0] == 1 and self.policy in ("slice-equal-groups", "slice-regroup"):
            raise ValueError(f"policy {self.policy}: the router has no groups, so use slice")
        if groups == 1 or self.policy == "keep-rows":
            return
        count = len(next(iter(self.keep.values())))
        fits = _least_in_groups(self.model, self.top_k)
        if count % groups or count < fits:
            up = max(fits, math.ceil(count / groups) * groups)
            raise ValueError(
                f"{count} experts in {groups} groups, {chosen} of which serve a token's {self.top_k}: keep a multiple "
                f"of {groups} from {fits} (the next is {up}), or drop the groups with policy slice"
            )
        if self.policy == "slice-equal-groups":
            size = N // groups
            for layer, ids in self.keep.items():
                found = [sum(one // size == group for one in ids) for group in range(groups)]
                if len(set(found)) > 1:
                    raise ValueError(
                        f"layer {layer} keeps {found} experts of its groups, and policy slice-equal-groups wants "
                        f"{count // groups} of each: use budget equal-groups, or policy slice"
                    )

    def _check_mtp(self) -> None:
        layers = self.model["mtp_layers"]
        if not layers and (self.mtp != "none" or self.mtp_keep):
            raise ValueError(f'mtp is "{self.mtp}", but the model has no layer for multi-token prediction: use "none"')
        if layers and self.mtp == "none":
            raise ValueError(
                f"layers {layers} predict further tokens and cannot stay at {self.num_experts} experts: strip them, or "
                "give the ids that they keep"
            )
        if self.mtp == "strip" and self.mtp_keep:
            raise ValueError("mtp_keep names experts of layers that are stripped")
        if self.mtp == "prune":
            wrong = [layer for layer in layers if len(self.mtp_keep.get(layer, ())) != min(self.counts.values())]
            if wrong:
                raise ValueError(
                    f"mtp_keep must name {min(self.counts.values())} experts for each of the layers {layers}, as many "
                    f"as the others keep; layer {wrong[0]} has {len(self.mtp_keep.get(wrong[0], ()))}"
                )

    @property
    def num_experts(self) -> int:
        """Experts of a layer before; of the largest where layers differ."""
        return self.model["num_experts"]

    @property
    def counts(self) -> dict[int, int]:
        """Experts that stay, by layer."""
        return {layer: len(ids) for layer, ids in self.keep.items()}

    @property
    def count(self) -> int:
        """Experts that stay in every layer.

        Raises:
            ValueError: layers keep different numbers.
        """
        if len(set(self.counts.values())) > 1:
            raise ValueError("layers keep different numbers of experts: see counts")
        return next(iter(self.counts.values()))

    @property
    def mask(self) -> np.ndarray:
        """[L, E] bool: what stays."""
        kept = np.zeros((len(self.keep), self.num_experts), dtype=bool)
        for row, ids in enumerate(self.keep.values()):
            kept[row, list(ids)] = True
        return kept

    @property
    def hash(self) -> str:
        """sha256 of what decides the pruned files: two plans with one hash make the same model."""
        model = {name: self.model[name] for name in ("config_sha256", "header_hash", "num_experts", "layers")}
        router = [self.policy, self.top_k, self.num_groups, self.topk_group, self.mtp]
        ids = [{str(layer): list(ids) for layer, ids in keep.items()} for keep in (self.keep, self.mtp_keep)]
        return hashlib.sha256(json.dumps([model, router, ids], sort_keys=True).encode()).hexdigest()

    def save(self, file: str | Path) -> None:
        """Writes the plan as JSON that a person can read, atomically.

        Raises:
            OSError: it cannot be written there.
        """
        write_text(Path(file), self.text())

    def text(self) -> str:
        """The file's content."""
        content = {"format": FORMAT, "kind": KIND}
        for field in dataclasses.fields(self):
            content[field.name] = getattr(self, field.name)
            if field.name == "policy":
                content["num_experts"] = self.num_experts
        for name in ("keep", "mtp_keep"):
            content[name] = {str(layer): list(ids) for layer, ids in content[name].items()}
        return _readable(content) + "\n"

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Reads and checks a plan.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no plan, of a newer gatewright, or says something impossible.
        """
        file = Path(file)
        if not file.exists():
            raise FileNotFoundError(2, "there is no such file: make a plan first", str(file))
        if file.is_dir():
            raise ValueError(f"{file} is a folder, not a plan")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a pruning plan: it is no JSON ({error})") from None
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{file} is not a pruning plan: `gatewright prune plan` makes one")
        check_format(file, content, FORMAT)
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = content.keys() - fields - {"format", "kind", "num_experts"}
        if unknown:
            raise ValueError(f"{file}: a plan has no field {', '.join(sorted(unknown))}")
        try:
            plan = cls(**{name: content[name] for name in fields & content.keys()})
        except TypeError as error:
            raise ValueError(f"{file} is not a whole plan: {error}") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if content.get("num_experts", plan.num_experts) != plan.num_experts:
            raise ValueError(f"{file}: num_experts is {content['num_experts']}, the model's {plan.num_experts}")
        return plan

    def replay(self, statistics: Statistics) -> Plan:
        """The plan that the same request makes of these statistics: from the same ones, it has the same hash.

        Raises:
            ValueError: the plan was made by hand, or these statistics do not hold what it was made from.
        """
        if "kind" not in self.budget or "keep" not in self.budget:
            raise ValueError(
                "the plan does not say what was asked for, so it cannot be made again: it was made by hand"
            )
        keep = self.budget["count"] if isinstance(self.budget["keep"], str) else self.budget["keep"]
        return make_plan(
            statistics,
            keep=keep,
            criterion=self.criterion,
            domains=self.domains,
            mixture=self.mixture,
            budget=self.budget["kind"],
            floor=self.budget.get("floor"),
            policy=self.policy,
            top_k=self.top_k,
            mtp_keep=self.mtp_keep,
            seed=self.seed,
            source=self.model.get("source", ""),
        )

    def summary(self) -> str:
        """What a person wants to know, as lines."""
        counts = sorted(set(self.counts.values()))
        sizes = sorted(set(self.model["experts_per_layer"]))
        many = " to ".join(str(one) for one in (counts if len(counts) < 3 else (counts[0], counts[-1])))
        of = " or ".join(str(one) for one in sizes)
        L = len(self.keep)
        where = "its one MoE layer" if L == 1 else f"each of {L} MoE layers"
        lines = [f"{self.model['name']} ({self.model['model_type']}): keeps {many} of {of} experts in {where}"]
        total = sum(self.domains.values()) or 1
        shares = ", ".join(
            name if len(self.domains) == 1 else f"{name} {weight / total:.0%}" for name, weight in self.domains.items()
        )
        mixed = "" if len(self.domains) < 2 else f", {self.mixture}"
        lines.append(f"chosen by        {self.criterion} on {shares}{mixed}; budget {self.budget.get('kind', '?')}")
        router = f"{self.policy}, {self.top_k:g} experts a token"
        if self.top_k != self.model["top_k"]:
            router += f" (before: {self.model['top_k']:g})"
        if self.model["num_groups"] > 1:
            router += (
                f", {self.num_groups if self.num_groups > 1 else 'no'} groups (before: {self.model['num_groups']})"
            )
        lines.append(f"router           {router}")
        for name, mass in self.kept_mass.get("domains", {}).items():
            row = mass["layers"]
            layer = min(row, key=row.get)
            share = f"{mass['mean']:.1%} of {self.kept_mass['measure']}, least {row[layer]:.1%} in layer {layer}"
            lines.append(f"kept score mass  {name}: {share}")
        if self.margins:
            values = sorted(self.margins.values())
            layer = min(self.margins, key=self.margins.get)
            lines.append(
                f"margin at cut    {values[len(values) // 2]:.1%} of the last kept expert's score (median), least "
                f"{values[0]:.2%} in layer {layer}"
            )
        if "split_half" in self.stability:
            held = self.stability
            lines.append(
                f"stability        halves of the demonstrations agree on {held['split_half']:.1%} of the experts kept "
                f"(chance {held['chance']:.0%})"
            )
            if held["shots"]:
                shots = ", ".join(
                    f"{n} demo{'s' if n != '1' else ''} {value:.1%}" for n, value in held["shots"].items()
                )
                lines.append(f"                 shared with the choice from all: {shots}")
        elif self.stability:
            lines.append(f"stability        not known: {self.stability['reason']}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def make_plan(
    statistics: Statistics,
    *,
    keep: int | float | str,
    criterion: str = "easy-ep",
    domains: Sequence[str] | Mapping[str, float] | None = None,
    mixture: str = "weighted",
    budget: str | None = None,
    floor: int | None = None,
    policy: str | None = None,
    top_k: int | None = None,
    mtp_keep: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
    bytes_at: Callable[[int], int] | None = None,
    source: str = "",
) -> Plan:
    """Chooses the experts that stay.

    Args:
        statistics: of the model.
        keep: how many a layer: a count, a share (0.5; rounded up to what the policy allows), or the size that the
            checkpoint may have, like ``"30GiB"`` (needs ``bytes_at``).
        criterion: a name in ``criteria.CRITERIA`` or exponents ``"a,b,c,d"``.
        domains: which count, with weights if a mapping; by default all alike.
        mixture: of several domains: ``"weighted"``, the weighted mean of each layer's normalised scores, or
            ``"max-min"``, the set whose least kept mass is largest (``selection.max_min``).
        budget: ``"uniform"`` (default), ``"equal-groups"`` (default for a grouped router), or ``"global"``: all layers'
            normalised scores ranked together with at least ``floor`` a layer, in runs of this library alone.
        floor: of ``"global"``; by default, and at least, ``top_k``.
        policy: what the router becomes, one of ``POLICIES``; by default ``"slice"``, or ``"slice-equal-groups"`` for a
            grouped router.
        top_k: experts a token afterwards; by default as before.
        mtp_keep: ids for the layers for multi-token prediction, which statistics say nothing about: without them these
            layers are stripped.
        seed: of the criterion ``random`` and of the halves that stability is measured on.
        bytes_at: the checkpoint's size at a count.
        source: what the model's folder is called.

    Raises:
        ValueError: the request cannot be met; says what can.
    """
    model = statistics.model
    chosen = criterion_of(criterion)
    weights = _weights(statistics, domains, mixture)
    policy, budget = _policy(model, policy, budget)
    if budget == "global" and mixture == "max-min" and len(weights) > 1:
        raise ValueError("max-min fixes the count of every layer, a global budget does not: use uniform, or weighted")
    top_k = model["top_k"] if top_k is None else top_k
    if not 0 < top_k <= model["top_k"]:
        raise ValueError(f"top_k is {top_k}: from 1 to the {model['top_k']:g} experts a token that the model has")
    least = max(1, math.ceil(top_k))
    groups = model["num_groups"] if policy in ("slice-equal-groups", "slice-regroup") else 1
    counts = _counts(model, keep, groups, least if groups == 1 else _least_in_groups(model, top_k), bytes_at)
    if floor is not None and budget != "global":
        raise ValueError("floor is the least of a layer in a global budget: leave it out, or use budget global")
    if floor is not None and floor < least:
        raise ValueError(f"floor is {floor}: at least the {least} experts that a token uses")
    if floor is not None and floor * len(counts) > counts.sum():
        raise ValueError(
            f"floor is {floor}, but {counts.sum()} experts in {len(counts)} layers are to stay: keep more, or lower it "
            f"to {counts.sum() // len(counts)}"
        )
    choice = _Choice(
        criterion=chosen.name,
        weights=weights,
        mixture=mixture if len(weights) > 1 else "weighted",
        counts=counts,
        groups=groups if policy == "slice-equal-groups" else 1,
        floor=None if budget != "global" else floor or least,
        seed=seed,
    )
    if counts.min() >= least and not (counts % choice.groups).any():
        kept, bound = choice.kept(statistics)
    else:  # refused below by the plan itself, in its words
        kept, bound = selection.top(np.zeros_like(statistics.experts, dtype=float), counts), None
    layers = model["layers"]
    requested = {"kind": budget, "keep": int(keep) if isinstance(keep, np.integer) else keep}
    if isinstance(keep, str):
        requested |= {"count": int(counts.max()), "bytes": bytes_at(int(counts.max()))}
    if budget == "global":
        requested |= {"floor": choice.floor, "total": int(counts.sum())}
    plan = Plan(
        model=model | {"source": source},
        criterion=chosen.name,
        domains=weights,
        policy=policy,
        keep={layer: tuple(np.flatnonzero(row).tolist()) for layer, row in zip(layers, kept, strict=True)},
        top_k=top_k,
        num_groups=1 if policy == "slice" else model["num_groups"],
        topk_group=1 if policy == "slice" else model["topk_group"],
        mtp="none" if not model["mtp_layers"] else "prune" if mtp_keep else "strip",
        mtp_keep=mtp_keep or {},
        mixture=choice.mixture,
        budget=requested,
        seed=seed,
        statistics_sha256=statistics.sha256,
    )
    described = _describe(statistics, choice, kept)
    notes = _notes(statistics, plan, choice, kept, bound, described["stability"])
    return dataclasses.replace(plan, **described, notes=tuple(notes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Choice:
    """How a mask follows from statistics: done once for the plan, and again on parts of the demonstrations."""

    criterion: str
    weights: Mapping[str, float]
    mixture: str
    counts: np.ndarray
    groups: int
    floor: int | None
    seed: int

    def scores(self, statistics: Statistics) -> np.ndarray:
        """What is ranked, [L, E]: the one domain's scores, or the weighted mean of the normalised ones."""
        each = {name: score(statistics, name, self.criterion, seed=self.seed) for name in self.weights}
        if len(each) == 1 and self.floor is None:
            return next(iter(each.values()))
        total = sum(self.weights.values())
        return sum(weight / total * selection.normalised(each[name]) for name, weight in self.weights.items())

    def kept(self, statistics: Statistics) -> tuple[np.ndarray, np.ndarray | None]:
        """The mask [L, E], and for max-min the bound [L] on the least kept mass."""
        if self.mixture == "max-min":
            shares = np.stack(
                [selection.normalised(score(statistics, name, self.criterion, seed=self.seed)) for name in self.weights]
            )
            return selection.max_min(shares, self.counts, self.groups)
        scores = self.scores(statistics)
        counts = self.counts
        if self.floor is not None:
            counts = selection.global_counts(scores, int(counts.sum()), self.floor)
        return selection.top(scores, counts, self.groups), None


def _weights(
    statistics: Statistics, domains: Sequence[str] | Mapping[str, float] | None, mixture: str
) -> dict[str, float]:
    _one_of("mixture", mixture, MIXTURES)
    names = list(statistics.domains) if domains is None else list(domains)
    if not names:
        raise ValueError("name at least one domain")
    weights = {name: float(domains[name]) if isinstance(domains, Mapping) else 1.0 for name in names}
    for name, weight in weights.items():
        if name not in statistics.domains:
            close = difflib.get_close_matches(name, statistics.domains)
            raise ValueError(
                f'there is no domain "{name}" in these statistics: '
                + (f"did you mean {' or '.join(close)}?" if close else f"they hold {', '.join(statistics.domains)}")
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f'the weight of domain "{name}" is {weight}: give a number above 0, or leave the domain out'
            )
    if mixture == "max-min" and len(set(weights.values())) > 1:
        raise ValueError("max-min serves the domain that loses most, whatever its weight: leave the weights out")
    return weights


def _policy(model: Mapping[str, Any], policy: str | None, budget: str | None) -> tuple[str, str]:
    grouped = model["num_groups"] > 1
    if policy is None:
        policy = "slice-equal-groups" if grouped and budget in (None, "equal-groups") else "slice"
    _one_of("policy", policy, POLICIES)
    if budget is None:
        budget = "equal-groups" if policy == "slice-equal-groups" else "uniform"
    _one_of("budget", budget, BUDGETS)
    if budget == "equal-groups" and not grouped:
        raise ValueError("budget equal-groups: the router has no groups, so use uniform")
    if (policy == "slice-equal-groups") != (budget == "equal-groups"):
        raise ValueError(
            f"budget {budget} does not go with policy {policy}: equal-groups goes with slice-equal-groups, the others "
            "with slice, slice-regroup or keep-rows"
        )
    if budget == "global" and not is_own(model):
        raise ValueError(
            f"a global budget keeps different numbers of experts in different layers, and a {model['model_type']} "
            "configuration has one count for all layers: no stock engine could load the result. Use budget uniform; a "
            "global one is for runs of this library"
        )
    return policy, budget


def _counts(
    model: Mapping[str, Any], keep: int | float | str, groups: int, least: int, bytes_at: Callable[[int], int] | None
) -> np.ndarray:
    """How many each layer keeps, [L], if all keep the same share or number."""
    sizes = np.array(model["experts_per_layer"])
    if isinstance(keep, str):
        return np.minimum(_count_within(model, keep, groups, least, bytes_at), sizes)
    if isinstance(keep, int | np.integer) and not isinstance(keep, bool):
        if not 1 <= keep <= sizes.min():
            raise ValueError(
                f"keep {keep} of {sizes.min()} experts: give a count from 1 to {sizes.min()}, or a share below 1"
            )
        return np.full(len(sizes), int(keep))
    if not isinstance(keep, float) or not 0 < keep <= 1:
        raise ValueError(f"keep is {keep!r}: give a count, a share up to 1.0, or a size like 30GiB")
    # the small part undone: 0.3 * 10 is above 3 in floating point
    wanted = np.ceil(sizes * keep - 1e-9).astype(int)
    return np.minimum(np.ceil(wanted / groups).astype(int) * groups, sizes)


def _count_within(
    model: Mapping[str, Any], keep: str, groups: int, least: int, bytes_at: Callable[[int], int] | None
) -> int:
    limit = parse_size(keep)
    if bytes_at is None:
        raise ValueError(f"keep {keep} is a size, for which the checkpoint's is needed: give its folder with --model")
    allowed = range(math.ceil(least / groups) * groups, model["num_experts"] + 1, groups)
    fitting = [count for count in allowed if bytes_at(count) <= limit]
    if not fitting:
        raise ValueError(
            f"no pruned checkpoint fits {keep}: with {allowed[0]} experts a layer, the fewest that its router can "
            f"choose from, it has {_size(bytes_at(allowed[0]))}"
        )
    return fitting[-1]


def _least_in_groups(model: Mapping[str, Any], top_k: float) -> int:
    """The fewest experts with which a grouped router, its groups kept, finds a token's ``top_k``."""
    family = FAMILIES.get(model["model_type"])
    scored = 2 if family is None else family.group_score  # two serve every rule that is known
    return max(scored, math.ceil(top_k / model["topk_group"])) * model["num_groups"]


def _size(count: int) -> str:
    for unit in ("GiB", "MiB"):
        if count >= _UNITS[unit.upper()]:
            return f"{count / _UNITS[unit.upper()]:.2f} {unit}"
    return f"{count:,} bytes"


def parse_size(text: str) -> int:
    """Bytes of ``"30GiB"``, ``"500MB"``.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f'"{text}" is no size: write one like 30GiB, 64GB or 500MiB')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_keep(text: str) -> int | float | str:
    """What ``--keep`` says: a count, a share (with a point), or a size.

    Raises:
        ValueError: it is none of them.
    """
    if re.fullmatch(r"\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        parse_size(text)
        return text


# ------------------------------------------------------------------------------------------------- how good it looks


def _describe(statistics: Statistics, choice: _Choice, kept: np.ndarray) -> dict[str, Any]:
    layers = statistics.model["layers"]
    measure = choice.criterion if criterion_of(choice.criterion).needs_data else "easy-ep"
    masses = {}
    for name in choice.weights:
        try:
            scores = score(statistics, name, measure, seed=choice.seed)
        except ValueError:  # a choice that needs no data, from statistics without EASY-EP's sum
            continue
        row = selection.kept_mass(scores, kept)
        masses[name] = {"mean": _rounded(row.mean()), "layers": _by_layer(layers, row)}
    described = {"kept_mass": {"measure": measure, "domains": masses} if masses else {}}
    if choice.mixture != "max-min":
        row = selection.margins(choice.scores(statistics), kept, choice.groups)
        described["margins"] = _by_layer(layers, row)
    described["stability"] = _stability(statistics, choice, kept)
    return described


def _stability(statistics: Statistics, choice: _Choice, kept: np.ndarray) -> dict[str, Any]:
    """How much of the choice other demonstrations would repeat: random halves, and a few of them against all."""
    criterion = criterion_of(choice.criterion)
    domains = {name: statistics.domains[name] for name in choice.weights}
    if not criterion.needs_data:
        return {"reason": f"{criterion.name} does not look at demonstrations"}
    if not criterion.sums or any(set(criterion.sums) - domain.per_demo.keys() for domain in domains.values()):
        return {"reason": f"the statistics hold what {criterion.name} needs of all demonstrations together only"}
    most = min(domain.demos for domain in domains.values())
    if most < 2:
        return {"reason": "there is one demonstration only"}
    draw = np.random.default_rng(choice.seed)

    def of(rows: Mapping[str, np.ndarray]) -> np.ndarray:
        parts: dict[str, DomainStatistics] = {name: domains[name].subset(rows[name]) for name in domains}
        return choice.kept(dataclasses.replace(statistics, domains=parts))[0]

    halves = []
    shots = {n: [] for n in SHOTS if n < most}
    for _ in range(DRAWS):
        orders = {name: draw.permutation(domain.demos) for name, domain in domains.items()}
        first = of({name: order[: len(order) // 2] for name, order in orders.items()})
        second = of({name: order[len(order) // 2 :] for name, order in orders.items()})
        halves.append(selection.overlap(first, second))
        for n, found in shots.items():
            found.append(selection.overlap(of({name: order[:n] for name, order in orders.items()}), kept).mean())
    by_layer = np.mean(halves, axis=0)
    return {
        "split_half": _rounded(by_layer.mean()),
        "split_half_layers": _by_layer(statistics.model["layers"], by_layer),
        "shots": {str(n): _rounded(np.mean(found)) for n, found in shots.items()},
        "demos": {name: domain.demos for name, domain in domains.items()},
        "draws": DRAWS,
        "chance": _rounded((kept.sum(-1) / statistics.model["experts_per_layer"]).mean()),
    }


def _notes(
    statistics: Statistics,
    plan: Plan,
    choice: _Choice,
    kept: np.ndarray,
    bound: np.ndarray | None,
    stability: Mapping[str, Any],
) -> list[str]:
    notes = []
    if kept.sum() == statistics.experts.sum():
        notes.append("every expert stays: nothing is pruned")
    if plan.top_k != plan.model["top_k"]:
        notes.append(
            f"a token uses {plan.top_k:g} experts, not {plan.model['top_k']:g}: what the model computes changes"
        )
    if plan.policy == "slice" and plan.model["num_groups"] > 1:
        notes.append(
            f"the router chose {plan.model['topk_group']} of {plan.model['num_groups']} groups first and no longer "
            "does: it chooses as the masked model does without groups, not as the model does with them"
        )
    if plan.policy == "slice-regroup":
        notes.append(
            "groups are cut anew from the survivors, so other experts are chosen than by the masked model: check with "
            "evaluate, or use slice-equal-groups"
        )
    if plan.policy == "keep-rows" and not is_own(plan.model):
        notes.append(
            "the router keeps its rows: stock engines cannot load the result, only one that reads the map of ids"
        )
    if plan.mtp == "strip":
        notes.append(
            f"the layers for multi-token prediction ({', '.join(map(str, plan.model['mtp_layers']))}) are stripped: no "
            "pass through transformers observes them"
        )
    if bound is not None:
        least = np.min(
            [
                selection.kept_mass(
                    selection.normalised(score(statistics, name, choice.criterion, seed=choice.seed)), kept
                )
                for name in choice.weights
            ],
            axis=0,
        )
        notes.append(
            f"max-min: the least kept mass is {least.mean():.4f} on average, and no set exceeds {bound.mean():.4f}"
        )
    if "split_half" in stability and stability["split_half"] < AGREEMENT:
        notes.append(
            f"halves of the demonstrations agree on {stability['split_half']:.0%} only ({AGREEMENT:.0%} is wanted): "
            "collect more demonstrations"
        )
    notes.extend(_unseen(statistics, choice, kept))
    return notes


def _unseen(statistics: Statistics, choice: _Choice, kept: np.ndarray) -> list[str]:
    if not criterion_of(choice.criterion).needs_data:
        return []
    scores = sum(score(statistics, name, choice.criterion, seed=choice.seed) for name in choice.weights)
    idle = (kept & ~(scores > 0)).sum(-1)
    if not idle.any():
        return []
    return [
        f"{int(idle.sum())} of the experts kept scored nothing ({int((idle > 0).sum())} layers), so their ids decided: "
        "the demonstrations need fewer experts than are kept"
    ]


# ------------------------------------------------------------------------------------------------------------- pieces


def _one_of(what: str, given: object, allowed: Sequence[str]) -> None:
    if given not in allowed:
        close = difflib.get_close_matches(str(given), allowed)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(allowed)}"
        raise ValueError(f'{what} "{given}" is not known: {hint}')


def _checked_keep(what: str, keep: Mapping[Any, Sequence[int]], sizes: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    if not isinstance(keep, Mapping):
        raise ValueError(f"{what} is not a mapping of layers to ids")
    found: dict[int, tuple[int, ...]] = {}
    for layer, ids in keep.items():
        if not re.fullmatch(r"\d+", str(layer)) or int(layer) not in sizes:
            raise ValueError(f"{what} names layer {layer}: the layers are {', '.join(map(str, sizes)) or 'none'}")
        if not isinstance(ids, list | tuple) or not all(
            isinstance(one, int | np.integer) and not isinstance(one, bool) for one in ids
        ):
            raise ValueError(f"{what} of layer {layer} is not a list of expert ids")
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= sizes[int(layer)]:
            raise ValueError(
                f"{what} of layer {layer} must be ascending ids below {sizes[int(layer)]}, each once, at least one"
            )
        found[int(layer)] = tuple(map(int, ids))
    if found and found.keys() != sizes.keys() or (what == "keep" and not found):
        missing = sorted(sizes.keys() - found.keys())
        raise ValueError(f"{what} lacks layer {', '.join(map(str, missing))}")
    return {layer: found[layer] for layer in sizes if layer in found}


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _by_layer(layers: Sequence[int], row: np.ndarray) -> dict[str, float]:
    return {str(layer): _rounded(value) for layer, value in zip(layers, row, strict=True)}


def _readable(value: Any, indent: str = "") -> str:
    """JSON with one line for what fits on one, and for every list of numbers."""
    short = json.dumps(value, ensure_ascii=False, allow_nan=False)
    numbers = isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in value)
    if numbers or not isinstance(value, Mapping | list | tuple) or len(indent) + len(short) <= 110:
        return short
    inner = indent + " "
    if isinstance(value, Mapping):
        rows = [
            f"{inner}{json.dumps(str(name), ensure_ascii=False)}: {_readable(one, inner)}"
            for name, one in value.items()
        ]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    return "[\n" + ",\n".join(f"{inner}{_readable(one, inner)}" for one in value) + f"\n{indent}]"


# ------------------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("statistics", metavar="STATS", help="what `gatewright prune collect` wrote")
    parser.add_argument(
        "--keep", required=True, help="experts that stay in a layer: a count (64), a share (0.5), or a size (30GiB)"
    )
    parser.add_argument("--out", required=True, metavar="PLAN", help="where to write the plan")
    parser.add_argument(
        "--criterion",
        default="easy-ep",
        help=f"one of {', '.join(CRITERIA)}, or exponents a,b,c,d (default: %(default)s)",
    )
    parser.add_argument("--domain", action="append", metavar="NAME", help="a domain that counts (default: all; repeat)")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=WEIGHT", help="domains that count, with weights"
    )
    parser.add_argument(
        "--mixture",
        default="weighted",
        help="several domains by the weighted mean of their scores, or max-min: the worst served one as well as can be",
    )
    parser.add_argument(
        "--budget", help=f"{', '.join(BUDGETS)} (default: uniform, or equal-groups for a grouped router)"
    )
    parser.add_argument(
        "--floor", type=int, metavar="COUNT", help="least of a layer in a global budget (default: top-k)"
    )
    parser.add_argument("--policy", help=f"what becomes of the router: {', '.join(POLICIES)}")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts a token afterwards (default: as before)")
    parser.add_argument("--model", metavar="FOLDER", help="the checkpoint: for a size in --keep, and to say the size")
    parser.add_argument(
        "--mtp-keep",
        metavar="FILE",
        help='JSON {"layer": [ids]} for layers for multi-token prediction (default: strip)',
    )
    parser.add_argument("--seed", type=int, default=0, help="of the criterion random and of the halves compared")


def run(args: argparse.Namespace) -> int:
    keep = parse_keep(args.keep)
    if args.domain and args.weights:
        raise ValueError("--weights names the domains that count: leave --domain out")
    domains: Sequence[str] | Mapping[str, float] | None = args.domain
    if args.weights:
        domains = _parse_weights(args.weights)
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: name a file in a folder that exists")
    statistics = Statistics.load(args.statistics)
    bytes_at = None
    if args.model is not None:
        from .sizes import bytes_at_count

        bytes_at = bytes_at_count(args.model, statistics.model)
    plan = make_plan(
        statistics,
        keep=keep,
        criterion=args.criterion,
        domains=domains,
        mixture=args.mixture,
        budget=args.budget,
        floor=args.floor,
        policy=args.policy,
        top_k=args.top_k,
        mtp_keep=None if args.mtp_keep is None else _read_ids(Path(args.mtp_keep)),
        seed=args.seed,
        bytes_at=bytes_at,
        source=args.model or statistics.model.get("source", ""),
    )
    sizes = None
    if args.model is not None:
        from .sizes import predicted_and_real

        sizes = predicted_and_real(plan, args.model, None)  # refuses a plan that does not fit, before it is written
    plan.save(out)
    print(plan.summary())
    if sizes is not None:
        before, after = sizes["before"], sizes["after"]
        print(f"weights          {_size(before)} before, {_size(after)} after ({after / before - 1:+.1%})")
    print(f"wrote {out} ({plan.hash[:12]})")
    return 0


def _parse_weights(given: Sequence[str]) -> dict[str, float]:
    weights = {}
    for one in given:
        name, separator, value = one.rpartition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise ValueError(f'--weights "{one}": write NAME=WEIGHT, like code=2')
    if len(weights) != len(given):
        raise ValueError("--weights names a domain twice")
    return weights


def _read_ids(file: Path) -> dict[int, list[int]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f'{file} is no JSON like {{"61": [0, 3]}}') from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{file} holds no ids by layer: write JSON like {{"61": [0, 3]}}')
    return content
