"""Prunes a trained diffusion transformer to some of its classes: half the routed experts, three of ten digits.

    python recipes/prune_digits.py runs/promoe_dit-1                     digits 0, 1 and 2, as the demo's model has them
    python recipes/prune_digits.py RUN --classes 3,7 --keep 0.25 --out sevens

From 25 demonstrations of the kept classes (4 images each at 2 draws of noise and time) it collects statistics; plans by
EASY-EP (as many of each layer, or all layers ranked together), by its score without the token term, by frequency and at
random; and measures by mask, on held-out images at noise and times that never change, the objective on the kept classes
and on the others, before and after. Every plan is measured both ways: tokens choose anew among the kept experts
("slice"), or those of a removed expert get nothing from it ("keep-rows", which this library's layers run besides).
Everything is repeated with other demonstrations and draws (``--seeds``) and for every RUN given; the table has the
mean, the least and the most.

Then it writes the pruned model of the first run and seed, EASY-EP in the mode that keeps the kept classes best, holds
it to the mask, and draws the kept classes and as many others from the full and from the pruned model, from the same
noise: OUT/samples.png, full on the left, pruned on the right, a row a class. The demonstrations of the first seed stay
in OUT/demos.jsonl, for the steps of `gatewright prune`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gatewright.moe.files import write_text
from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.recipes.models import draw_samples
from gatewright.recipes.models.dit_pruning import Demonstration, DiTSubject, draw_demonstrations
from gatewright.recipes.picture import save_grid
from gatewright.tools.measure import markdown
from gatewright.tools.prune import runs
from gatewright.tools.prune.plan import Plan, make_plan, parse_keep
from gatewright.tools.weights import load_model

PROGRAM = "prune_digits"
DEMOS, IMAGES, DRAWS = 25, 4, 2
# how a plan is called: criterion, budget
PLANS = {
    "EASY-EP": ("easy-ep", "uniform"),
    "EASY-EP, global budget": ("easy-ep", "global"),
    "no token term": ("weighted-ean", "uniform"),
    "frequency": ("frequency", "uniform"),
    "random": ("random", "uniform"),
}
CHOSEN = "EASY-EP"
RANDOM_DRAWS = 3  # a seed
POLICIES = ("slice", "keep-rows")
KEPT, OTHERS = "kept", "others"


def measure(
    opened: runs.Opened, classes: Sequence[int], keep: int | float, *, seed: int, known: dict[Any, dict[str, float]]
) -> dict[str, Any]:
    """The losses of every plan from the demonstrations of one seed, and EASY-EP's plans by policy.

    Args:
        known: what was measured of this run before, by plan.
    """
    subject = opened.subject
    demos = demonstrations(opened, classes, seed)
    collected = runs.collect_from(opened, [(KEPT, demo) for demo in demos])
    if runs.FULL not in known:
        known[runs.FULL] = subject.losses()
    result: dict[str, Any] = {"run": str(opened.folder), "seed": seed, "full": known[runs.FULL], "plans": {}}
    chosen: dict[str, Plan] = {}

    def after(plan: Plan) -> dict[str, float]:
        # other demonstrations often choose the same experts
        key = (plan.policy, *plan.keep.items())
        if key not in known:
            with runs.masked_by(opened.model, plan):
                known[key] = subject.losses()
        return known[key]

    for policy in POLICIES:
        for name, (criterion, budget) in PLANS.items():
            # a random choice is worth a mean over several
            seeds = [RANDOM_DRAWS * seed + draw for draw in range(RANDOM_DRAWS)] if criterion == "random" else [0]
            drawn = []
            for own in seeds:
                plan = make_plan(collected, keep=keep, criterion=criterion, budget=budget, policy=policy, seed=own)
                drawn.append(after(plan))
            losses = {label: statistics.fmean(one[label] for one in drawn) for label in drawn[0]}
            ids = {str(layer): list(ids) for layer, ids in plan.keep.items()} if len(seeds) == 1 else None
            result["plans"][f"{name}, {policy}"] = {"losses": losses, "keep": ids}
            if name == CHOSEN:
                chosen[policy] = plan
                result.setdefault("stability", plan.stability)
    return result | {"chosen": chosen}


def demonstrations(opened: runs.Opened, classes: Sequence[int], seed: int) -> list[Demonstration]:
    return draw_demonstrations(opened.subject.data, classes, DEMOS, images=IMAGES, draws=DRAWS, seed=seed)


def means(losses: dict[str, float], kept: Sequence[str]) -> dict[str, float]:
    """Over the kept classes and over the others."""
    parts = {KEPT: [losses[label] for label in kept], OTHERS: [losses[label] for label in losses if label not in kept]}
    return {part: statistics.fmean(values) for part, values in parts.items() if values}


def table(results: Sequence[dict[str, Any]], kept: Sequence[str]) -> list[str]:
    parts = [part for part in (KEPT, OTHERS) if part in means(results[0]["full"], kept)]

    def cell(values: Sequence[float], sign: str = "") -> str:
        found = f"{statistics.fmean(values):{sign}.4f}"
        return found if len(values) == 1 else f"{found} ({min(values):{sign}.4f} to {max(values):{sign}.4f})"

    rows = [["all experts", *(cell([means(r["full"], kept)[part] for r in results]) for part in parts)]]
    rows[0] += [""] * len(parts)
    for name in results[0]["plans"]:
        after = [means(r["plans"][name]["losses"], kept) for r in results]
        before = [means(r["full"], kept) for r in results]
        rows.append(
            [
                name,
                *(cell([one[part] for one in after]) for part in parts),
                *(cell([one[part] - two[part] for one, two in zip(after, before, strict=True)], "+") for part in parts),
            ]
        )
    return markdown(["chosen by, policy", *(f"loss, {p}" for p in parts), *(f"change, {p}" for p in parts)], rows)


def draw_side_by_side(full: runs.Opened, pruned: Path, classes: Sequence[int], args: argparse.Namespace) -> None:
    """A row a class: ``--count`` samples of the full model, a gap, the same noise through the pruned one."""
    subject = full.subject
    model, written = load_model(pruned)
    labels = torch.tensor(classes).repeat_interleave(args.count)
    halves = [
        draw_samples(one.objective, one.model, labels, guidance=args.guidance, steps=args.steps, seed=0)
        for one in (subject, DiTSubject(model, written))
    ]
    left, right = (subject.data.to_pixels(half).unflatten(0, (len(classes), args.count)) for half in halves)
    gap = torch.full_like(left[:, :1], 255)
    both = torch.cat([left, gap, right], dim=1)
    save_grid(both.flatten(0, 1), args.out / "samples.png", columns=2 * args.count + 1)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs or exports, of pixels")
    parser.add_argument("--classes", default="0,1,2", metavar="A,B,..", help="the classes to keep")
    parser.add_argument("--keep", default="0.5", help="routed experts of a layer that stay: a count or a share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of demonstrations and random choices")
    parser.add_argument("--count", type=int, default=6, help="samples of a class from each model")
    parser.add_argument("--guidance", type=float, default=2.0, help="of the samples; 1 = none")
    parser.add_argument("--steps", type=int, default=50, help="forwards a sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/pruned_digits"), help="folder of results and pictures")
    args = parser.parse_args(argv)
    for name in ("count", "steps", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: choose at least 1")
    return args


def parse_classes(given: str, count: int) -> list[int]:
    """
    Raises:
        ValueError: a word that is no class.
    """
    words = [word.strip() for word in given.split(",")]
    if not all(word.isdecimal() and int(word) < count for word in words) or len(set(words)) < len(words):
        raise ValueError(f"--classes {given}: give numbers 0 to {count - 1}, each once")
    return [int(word) for word in words]


def prune(args: argparse.Namespace) -> None:
    """
    Raises:
        FileNotFoundError, ValueError: a run that cannot be pruned, or an option that does not fit it.
    """
    torch.set_num_threads(args.threads)
    keep = parse_keep(args.keep)
    if (args.out / "pruned").exists():
        raise ValueError(f"{args.out / 'pruned'} is there already: delete it, or choose another --out")
    opened = [runs.open_run(folder) for folder in args.runs]
    classes = parse_classes(args.classes, opened[0].model.config.num_classes)
    names = [opened[0].subject.data.class_names[label] for label in classes]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(demo.record() | {"domain": KEPT}) for demo in demonstrations(opened[0], classes, args.seeds[0])]
    write_text(args.out / "demos.jsonl", "\n".join(lines) + "\n")
    results = []
    for one in opened:
        known: dict[Any, dict[str, float]] = {}
        for seed in args.seeds:
            results.append(measure(one, classes, keep, seed=seed, known=known))
            print(f"{one.folder}, seed {seed}: done", flush=True)
    chosen = [result.pop("chosen") for result in results]

    first = results[0]
    best = min(POLICIES, key=lambda policy: means(first["plans"][f"{CHOSEN}, {policy}"]["losses"], names)[KEPT])
    plan, pruned = chosen[0][best], args.out / "pruned"
    runs.apply(plan, args.runs[0], pruned)
    verified = runs.verify(plan, args.runs[0], pruned)
    sizes = runs.dry_run(plan, args.runs[0])
    others = [label for label in range(opened[0].model.config.num_classes) if label not in classes]
    draw_side_by_side(opened[0], pruned, [*classes, *others[: len(classes)]], args)
    summary = {"classes": names, "keep": args.keep, "results": results, "policy": best, "verified": verified}
    write_text(args.out / "results.json", json.dumps(summary | {"sizes": sizes}, indent=1))

    print(f"Kept classes {', '.join(names)}; {len(results)} measurements: mean (least to most).")
    print("\n".join(table(results, names)))
    print("\n".join(runs.size_table(sizes)))
    print(f'{pruned}: EASY-EP, policy "{best}"; verified: {verified}')
    print(f"{args.out / 'samples.png'}: classes {', '.join(map(str, [*classes, *others[: len(classes)]]))}")


def main(argv: list[str] | None = None) -> None:
    try:
        prune(parse(argv))
    except MISTAKES as error:
        fail(PROGRAM, describe(error))


if __name__ == "__main__":
    main()
