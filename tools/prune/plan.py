"""Chooses the experts that stay: `make_plan`, and `gatewright prune plan`.

A score for every expert (``criteria``), a set of them in every layer (``selection``), and how sure that choice is: the
score mass that each domain keeps, the margin at the cut, and what other demonstrations would have chosen. What a plan
says, and what its file looks like, stands in ``plan_file``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import selection
from .criteria import CRITERIA, criterion_of, score
from .plan_file import MIXTURES, POLICIES, Plan, least_in_groups, one_of
from .statistics import DomainStatistics, Statistics, is_own

BUDGETS = ("uniform", "equal-groups", "global")
SHOTS = (1, 5, 10, 25)  # numbers of demonstrations whose choice is compared with the whole one's
DRAWS = 10  # random halves, and random demonstrations of each number
AGREEMENT = 0.9  # of halves; below it more demonstrations are asked for (arXiv 2504.06792: 0.93 between 10 and 25)

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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
    counts = _counts(model, keep, groups, least if groups == 1 else least_in_groups(model, top_k), bytes_at)
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
    one_of("mixture", mixture, MIXTURES)
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
    one_of("policy", policy, POLICIES)
    if budget is None:
        budget = "equal-groups" if policy == "slice-equal-groups" else "uniform"
    one_of("budget", budget, BUDGETS)
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


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _by_layer(layers: Sequence[int], row: np.ndarray) -> dict[str, float]:
    return {str(layer): _rounded(value) for layer, value in zip(layers, row, strict=True)}


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
