"""`gatewright prune report PLAN --stats STATS --out report.html`: a plan as one HTML file that opens anywhere.

Drawn by the dashboard's module and ``page.js`` beside this file. What statistics, an evaluation or a checkpoint would
add and was not given is said on the page, not left out in silence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...moe.files import write_bytes
from ..dashboard.shell import shell
from . import selection
from .criteria import CRITERIA, score
from .plan import Plan
from .run_folder import is_run_folder
from .sizes import dry_run, predicted_and_real
from .statistics import Statistics, check_format, is_own

PAGE = Path(__file__).parent / "page.js"
EVALUATION = "gatewright pruning evaluation"
GPUS = (1, 2, 4, 8)  # whose share of the weights is shown

_KEYS = ("name", "formula", "text", "range", "null", "reduction")
_SUMS = "Sums over all demonstrations' tokens of the domain, in float64."
# name: (name, formula, what it says, range, what chance gives, how it was reduced)
DEFINITIONS: dict[str, tuple[str, str, str, str, str, str]] = {
    "score": (
        "Score",
        "score_i = 1/n_i^d · Σ_t g^a |u|^b s^c",
        "What an expert is worth to the domain by the plan's criterion: g is the router's coefficient, |u| the norm of "
        "the expert's output, s how much the routed output turns the residual stream, n the number of routed tokens. "
        "EASY-EP is (1, 1, 1, 0), REAP (1, 1, 0, 1), frequency (0, 0, 0, 0). Shown as a multiple of the layer's mean.",
        "0 (never used) to E",
        "1 where all experts are worth the same",
        _SUMS,
    ),
    "mass": (
        "Kept score mass",
        "Σ_{i kept} score_i / Σ_i score_i",
        "How much of a domain's score the kept experts hold. It says what the criterion thinks is lost, not what the "
        "loss will be: measure that with `gatewright prune evaluate`.",
        "0 to 1",
        "the share of experts that is kept",
        _SUMS,
    ),
    "margin": (
        "Margin at the cut",
        "(score of the worst kept − score of the best pruned) / score of the worst kept",
        "How clearly the layer's last place was decided. Near 0 the two experts could as well change places, and other "
        "demonstrations may make them.",
        "0 (a tie) to 1",
        "small: neighbours of a ranking are close",
        "From the scores that were ranked, of all demonstrations; with groups, the smallest of the groups'.",
    ),
    "stability": (
        "Agreement of halves",
        "mean over random halves A, B of |S_A ∩ S_B| / M",
        "How many kept experts are shared by the plans that two halves of the demonstrations would make. Below 0.9 "
        "more demonstrations are worth collecting.",
        "0 to 1",
        "the share of experts that is kept",
        "Mean over layers and ten random divisions of the demonstrations.",
    ),
    "shots": (
        "Choice from few demonstrations",
        "|S_n ∩ S| / M",
        "How many of the experts kept would also be kept if only n random demonstrations had been collected.",
        "0 to 1",
        "the share of experts that is kept",
        "Mean over layers and ten random choices of n demonstrations.",
    ),
    "overlap": (
        "Overlap of choices",
        "|S_A ∩ S_B| / M",
        "How many kept experts two choices share, at the plan's count in every layer: of two domains, or of two "
        "criteria.",
        "0 to 1",
        "the share of experts that is kept",
        "Mean over layers.",
    ),
    "loss": (
        "Loss",
        "mean of −ln p(token | before); of a diffusion model, its training objective",
        "What the masked model loses on a domain's or class's held-out data; its difference to the whole model's is "
        "what pruning costs. Measured by mask, before a file is written.",
        "0 to ∞",
        "ln(size of the vocabulary) for a language model",
        "Mean over the tokens that are predicted, or over held-out images at fixed noise and times.",
    ),
    "rerouted": (
        "Re-routed pairs",
        "share of the whole model's (token, expert) pairs whose expert is pruned",
        "How much of the held-out text's routing has to move to other experts.",
        "0 to 1",
        "the share of experts that is pruned",
        "Over all routed pairs of the held-out text.",
    ),
    "size": (
        "Size",
        "Σ bytes of all tensors",
        "The checkpoint's weights. Predicted from the headers of its files and the plan, before anything is written; "
        "real where a pruned checkpoint is there.",
        "0 to the whole model's",
        "–",
        "Exact, from the headers.",
    ),
}


def page_data(
    plan: Plan,
    statistics: Statistics | None = None,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    sizes: Mapping[str, Any] | None = None,
    *,
    title: str = "",
) -> dict[str, Any]:
    """All that ``mountPlan`` of ``page.js`` needs, as JSON.

    Args:
        statistics: those that the plan was made from.
        evaluations: what ``gatewright prune evaluate`` wrote, by the name of the file.
        sizes: ``before``, ``after``, and ``real`` where a pruned checkpoint is there, in bytes.

    Raises:
        ValueError: the parts are of different models.
    """
    for what, other in (("statistics", statistics), *(evaluations or {}).items()):
        if other is not None:
            _same_model(plan, other.model if isinstance(other, Statistics) else other.get("model", {}), what)
    counts = list(plan.counts.values())
    data = {
        "format": 1,
        "library": f"gatewright {__version__}",
        "title": title or plan.model["name"],
        "definitions": {name: dict(zip(_KEYS, entry, strict=True)) for name, entry in DEFINITIONS.items()},
        "model": {name: plan.model[name] for name in ("name", "model_type", "num_experts", "top_k", "num_groups")},
        "layers": plan.model["layers"],
        "experts": plan.model["experts_per_layer"],
        "plan": {
            "criterion": plan.criterion,
            "domains": dict(plan.domains),
            "mixture": plan.mixture,
            "policy": plan.policy,
            "budget": plan.budget.get("kind", ""),
            "top_k": plan.top_k,
            "num_groups": plan.num_groups,
            "mtp": plan.mtp,
            "notes": list(plan.notes),
            "hash": plan.hash,
            "version": plan.version,
            "counts": counts,
            "keep": [list(ids) for ids in plan.keep.values()],
        },
        "unit": "units of the training objective" if is_own(plan.model) else "nats a token",
        "kept_mass": {
            "measure": plan.kept_mass.get("measure", ""),
            "domains": {
                name: list(held["layers"].values()) for name, held in plan.kept_mass.get("domains", {}).items()
            },
        },
        "margins": list(plan.margins.values()) or None,
        "stability": _stability(plan),
        "scores": None if statistics is None else _scores(plan, statistics),
        "overlaps": None if statistics is None else _overlaps(plan, statistics),
        "evaluations": [_evaluation(name, content) for name, content in (evaluations or {}).items()],
        "sizes": sizes,
    }
    return data


def _same_model(plan: Plan, other: Mapping[str, Any], what: str) -> None:
    for name in ("model_type", "config_sha256", "header_hash", "num_experts"):
        if other.get(name) != plan.model[name]:
            raise ValueError(
                f"{what}: {name} is {other.get(name)!r}, the plan's {plan.model[name]!r}: they are of different models"
            )


def _stability(plan: Plan) -> dict[str, Any]:
    held = plan.stability
    if "split_half" not in held:
        return {"reason": held.get("reason", "the plan does not say")}
    return {
        "split_half": held["split_half"],
        "layers": list(held["split_half_layers"].values()),
        "shots": {int(n): value for n, value in held["shots"].items()},
        "demos": held["demos"],
        "chance": held["chance"],
    }


def _scores(plan: Plan, statistics: Statistics) -> dict[str, Any]:
    """Multiples of their layer's mean, of each domain and as they were ranked; and what other counts would keep."""
    domains = [name for name in plan.domains if name in statistics.domains]
    shares = {}
    for name in domains:
        shares[name] = selection.normalised(score(statistics, name, plan.criterion, seed=plan.seed))
    if not shares:
        return {"ranked": None, "domains": {}, "curves": {}, "demos": {}, "tokens": {}}
    total = sum(plan.domains[name] for name in domains)
    ranked = sum(plan.domains[name] / total * shares[name] for name in domains)
    sizes = np.array(statistics.model["experts_per_layer"])
    curves = {}
    for name in domains:
        curves[name] = [
            _short(selection.kept_mass(shares[name], selection.top(ranked, np.minimum(count, sizes))).mean())
            for count in range(1, statistics.model["num_experts"] + 1)
        ]
    return {
        "ranked": _matrix(ranked * sizes[:, None]),
        "domains": {name: _matrix(shares[name] * sizes[:, None]) for name in domains} if len(domains) > 1 else {},
        "curves": curves,
        "demos": {name: statistics.domains[name].demos for name in domains},
        "tokens": {name: statistics.domains[name].tokens for name in domains},
    }


def _overlaps(plan: Plan, statistics: Statistics) -> dict[str, Any]:
    """What the choices of each domain alone, and of each criterion, have in common at the plan's counts."""
    counts = np.array(list(plan.counts.values()))
    groups = plan.num_groups if plan.policy == "slice-equal-groups" else 1

    def chosen(names: Sequence[str], criterion: str) -> np.ndarray:
        weights = {name: plan.domains.get(name, 1.0) for name in names}
        total = sum(weights.values())
        mixed = sum(
            weight / total * selection.normalised(score(statistics, name, criterion, seed=plan.seed))
            for name, weight in weights.items()
        )
        return selection.top(mixed, counts, groups)

    alone = {name: chosen([name], plan.criterion) for name in statistics.domains}
    domains = {"plan": plan.mask} | alone if len(alone) > 1 else {}
    criteria = {"plan": plan.mask}
    names = [name for name in plan.domains if name in statistics.domains] or list(statistics.domains)
    for name in CRITERIA:
        if name != plan.criterion and names:
            try:
                criteria[name] = chosen(names, name)
            except ValueError:  # the statistics do not hold what it needs
                continue
    return {
        "domains": _pairs(domains),
        "criteria": _pairs(criteria) if len(criteria) > 1 else None,
        "chance": _short((counts / statistics.model["experts_per_layer"]).mean()),
    }


def _pairs(masks: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    if not masks:
        return None
    by_layer = [[selection.overlap(first, second) for second in masks.values()] for first in masks.values()]
    return {
        "names": list(masks),
        "mean": [[_short(one.mean()) for one in row] for row in by_layer],
        "first": [[_short(value) for value in one] for one in by_layer[0]],
    }


def _evaluation(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    cases = [
        {
            field: case.get(field)
            for field in ("criterion", "keep", "count", "mode", "policy", "plan_hash", "loss", "delta", "rerouted")
        }
        | {
            "domains": list(case.get("domains") or ()),
            "layers": {
                domain: list(shares.values()) for domain, shares in (case.get("rerouted_per_layer") or {}).items()
            },
        }
        for case in content["cases"]
    ]
    return {"name": name, "data": content["data"], "loss": content["full"]["loss"], "cases": cases}


def read_evaluation(file: Path) -> dict[str, Any]:
    """What ``gatewright prune evaluate`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or of a newer gatewright.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        content = None
    if not isinstance(content, dict) or content.get("kind") != EVALUATION:
        raise ValueError(f"{file} is not an evaluation: `gatewright prune evaluate` makes one")
    check_format(file, content, 1)
    missing = {"model", "data", "full", "cases"} - content.keys()
    if missing:
        raise ValueError(f"{file} is not a whole evaluation: it lacks {', '.join(sorted(missing))}")
    return content


def report(data: Mapping[str, Any]) -> str:
    """The whole page as text."""
    return shell(dict(data), kind="pruning plan", more=[PAGE], mount="mountPlan")


def _sizes(plan: Plan, model: Path, pruned: Path | None) -> dict[str, Any]:
    """Bytes of the checkpoint's files before and after, as predicted and as they are, and on each of several GPUs."""
    found = predicted_and_real(plan, model, pruned)
    if not is_run_folder(model):
        gpus = dry_run(plan, model, tensor_parallel=GPUS)
        found["parallel"] = [{"gpus": n, "before": gpus.before.gpu[n], "after": gpus.after.gpu[n]} for n in GPUS]
    return found


def _matrix(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else _short(value) for value in row] for row in values]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="what `gatewright prune plan` wrote")
    parser.add_argument("--stats", metavar="STATS", help="the statistics that it was made from: scores and overlaps")
    parser.add_argument(
        "--evaluation", nargs="+", default=[], metavar="FILE", help="what `gatewright prune evaluate` wrote: losses"
    )
    parser.add_argument("--model", metavar="FOLDER", help="the checkpoint: its size, and the predicted one")
    parser.add_argument("--pruned", metavar="FOLDER", help="the pruned checkpoint: its real size (with --model)")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="where to write it (default: %(default)s)")
    parser.add_argument("--title", default="", help="what to call it (default: the model's name)")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out}: name a file in a folder that exists")
    if args.pruned and not args.model:
        raise ValueError("--pruned is compared with the checkpoint before: name it with --model")
    plan = Plan.load(args.plan)
    statistics = None if args.stats is None else Statistics.load(args.stats)
    if statistics is not None and plan.statistics_sha256 and statistics.sha256 != plan.statistics_sha256:
        raise ValueError(
            f"{args.plan} was made from other statistics than {args.stats}: name those, or make the plan again"
        )
    evaluations = {Path(file).name: read_evaluation(Path(file)) for file in args.evaluation}
    sizes = None if args.model is None else _sizes(plan, Path(args.model), args.pruned and Path(args.pruned))
    page = report(page_data(plan, statistics, evaluations, sizes, title=args.title)).encode()
    write_bytes(out, page)
    print(f"wrote {out} ({len(page) / 1e6:.2f} MB): open it in a browser, it needs no network")
    return 0
