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

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...moe.files import write_text
from .criteria import criterion_of
from .families import FAMILIES
from .statistics import Statistics, check_format, checked_model, is_own

FORMAT = 1
KIND = "gatewright pruning plan"
POLICIES = ("slice", "slice-equal-groups", "slice-regroup", "keep-rows")
MIXTURES = ("weighted", "max-min")


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
        one_of("policy", self.policy, POLICIES)
        one_of("mtp", self.mtp, ("none", "strip", "prune"))
        one_of("mixture", self.mixture, MIXTURES)
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
        fits = least_in_groups(self.model, self.top_k)
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
        from .plan import make_plan

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


def least_in_groups(model: Mapping[str, Any], top_k: float) -> int:
    """The fewest experts with which a grouped router, its groups kept, finds a token's ``top_k``."""
    family = FAMILIES.get(model["model_type"])
    scored = 2 if family is None else family.group_score  # two serve every rule that is known
    return max(scored, math.ceil(top_k / model["topk_group"])) * model["num_groups"]


def one_of(what: str, given: object, allowed: Sequence[str]) -> None:
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
