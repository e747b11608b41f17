"""What pruning costs, before any file is written: the loss of the masked model by domain, over a sweep.

    gatewright prune evaluate MODEL --stats STATS --data heldout.jsonl --keep 0.75 0.5 0.25 --criteria easy-ep random

For each domain of the data the mean loss of the next token in nats, and its exponential, the perplexity; of the whole
model and of each masked one (``mask``). Data are files like demonstrations; with an answer, its tokens alone are
predicted. The re-routing rate is the share of the whole model's routed pairs (token, expert) whose expert is pruned:
how much of the data's work has to move, or in mode ``no-reroute`` is lost.

Perplexity does not tell what generation is worth (arXiv:2510.13999, section 6): give ``evaluate`` a ``metric`` of your
own for that, any function of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...moe.files import write_text
from . import demos as demos_module
from .checkpoint import Checkpoint
from .collect import TOKENS_AT_ONCE, add_model_arguments, groups_of, load_demos, open_model, refuse_changed
from .criteria import criterion_of
from .demos import Demo, duration
from .layerwise import LayerwiseModel, backbone
from .loading import evaluating, pick_device
from .mask import MODES, masked_by
from .model import LayerObservation, moe_blocks, observe
from .plan import Plan, make_plan, parse_keep
from .run_folder import is_run_folder
from .statistics import Statistics

FORMAT = 1
KIND = "gatewright pruning evaluation"
_LOGITS_AT_ONCE = 1 << 27  # numbers, 512 MiB in float32

Metric = Callable[[nn.Module], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A masked model to measure.

    Attributes:
        plan: which experts stay.
        mode: "reroute" or "no-reroute".
        keep: what was asked for, a share or a count.
    """

    plan: Plan
    mode: str = "reroute"
    keep: int | float | str | None = None


def sweep(
    statistics: Statistics,
    *,
    keep: Sequence[int | float] = (0.75, 0.5, 0.25),
    criteria: Sequence[str] = ("easy-ep",),
    modes: Sequence[str] = ("reroute",),
    **options: Any,
) -> list[Case]:
    """The cases of a sweep: every criterion at every budget in every mode.

    Args:
        options: as in ``make_plan``.

    Raises:
        ValueError: a budget or criterion that ``make_plan`` refuses, a mode that there is not.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f'mode "{mode}" is not one of {", ".join(MODES)}')
    for criterion in criteria:
        criterion_of(criterion)
    cases = []
    for criterion in criteria:
        for budget in keep:
            plan = make_plan(statistics, keep=budget, criterion=criterion, **options)
            cases += [Case(plan, mode, budget) for mode in modes]
    return cases


def evaluate(
    model: nn.Module | LayerwiseModel,
    data: Sequence[Demo],
    cases: Sequence[Case],
    *,
    metric: Metric | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measures the whole model and each case.

    Args:
        model: of transformers, whole, or opened by ``LayerwiseModel.open``; as it was when this returns or raises.
        data: of all domains; may be empty where there is a metric.
        metric: called with the model in each case; what it returns is kept under "metric".
        tokens_at_once: layer by layer, how many tokens' hidden states are held.
        report: called with each finished row, the whole model's first.

    Returns:
        what ``--out`` holds: {"data", "full": row, "cases": [row, ...]}, a row with "loss" and "perplexity" by domain,
        a case's also with "delta", "rerouted", "rerouted_per_layer" and what was kept.

    Raises:
        ValueError: nothing to measure, a model or plan that cannot be masked, data that predicts nothing.
    """
    if not data and metric is None:
        raise ValueError("nothing to measure: give data or a metric")
    plain = model.model if isinstance(model, LayerwiseModel) else model
    if metric is not None and isinstance(model, LayerwiseModel):
        raise ValueError("a metric needs the whole model: it cannot be had layer by layer")
    for case in cases:  # refuses before hours are spent
        with masked_by(plain, case.plan, mode=case.mode):
            pass
    counts = _Counts(plain, data)
    with evaluating(plain), counts.observing(plain):
        full = _row(model, data, metric, tokens_at_once, counts)
    report(full)
    rows = []
    for case in cases:
        with evaluating(plain), masked_by(plain, case.plan, mode=case.mode):
            row = _row(model, data, metric, tokens_at_once)
        delta = {domain: row["loss"][domain] - full["loss"][domain] for domain in row["loss"]}
        rows.append({**_describe(case), **row, "delta": delta, **counts.rerouted(case.plan.keep)})
        report(rows[-1])
    domains = dict.fromkeys(demo.domain for demo in data)
    sizes = {
        domain: {
            "demos": sum(demo.domain == domain for demo in data),
            "tokens": sum(len(demo) - max(demo.answer_start, 1) for demo in data if demo.domain == domain),
        }
        for domain in domains
    }
    return {"data": sizes, "full": full, "cases": rows}


def next_token_losses(model: nn.Module, demo: Demo, output: Any) -> Tensor:
    """[T'] float64: -log p of each token that counts, the answer's, or all but the first.

    Args:
        output: what the model without its head gave for the demonstration.

    Raises:
        ValueError: the model does not predict tokens.
    """
    first = max(demo.answer_start, 1)
    device = output[0].device
    targets = torch.tensor(demo.input_ids[first:], device=device)
    places = torch.arange(first - 1, len(demo) - 1, device=device)
    ids = torch.tensor([demo.input_ids], device=device)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    some = "logits_to_keep" in inspect.signature(model.forward).parameters
    step = max(1, _LOGITS_AT_ONCE // vocabulary) if some else len(places)
    losses = []
    with _answering(backbone(model), output):
        for start in range(0, len(places), step):
            chosen = places[start : start + step]
            logits = model(ids, use_cache=False, **({"logits_to_keep": chosen} if some else {})).logits
            if logits.shape[-1] < vocabulary:
                raise ValueError(
                    f"{type(model).__name__} scores {logits.shape[-1]} labels, not the next of {vocabulary} tokens: it "
                    "has no such loss; measure it by a metric of your own"
                )
            logits = logits[0] if some else logits[0, chosen]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            losses.append(torch.nn.functional.cross_entropy(wide, targets[start : start + step], reduction="none"))
    return torch.cat(losses).double()


@contextlib.contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """The module gives this output, whatever it is called with: the head alone runs."""
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward


def _row(
    model: nn.Module | LayerwiseModel,
    data: Sequence[Demo],
    metric: Metric | None,
    tokens_at_once: int,
    counts: _Counts | None = None,
) -> dict[str, Any]:
    plain = model.model if isinstance(model, LayerwiseModel) else model
    total: dict[str, float] = {}
    tokens: dict[str, int] = {}
    with torch.no_grad():
        for demo, output in _outputs(model, data, tokens_at_once, counts):
            losses = next_token_losses(plain, demo, output)
            total[demo.domain] = total.get(demo.domain, 0.0) + losses.sum().item()
            tokens[demo.domain] = tokens.get(demo.domain, 0) + len(losses)
    loss = {domain: total[domain] / tokens[domain] for domain in total}
    row: dict[str, Any] = {"loss": loss, "perplexity": {domain: _exp(value) for domain, value in loss.items()}}
    if metric is not None:
        row["metric"] = {name: float(value) for name, value in metric(plain).items()}
    return row


def _outputs(
    model: nn.Module | LayerwiseModel, data: Sequence[Demo], tokens_at_once: int, counts: _Counts | None
) -> Iterator[tuple[Demo, Any]]:
    """What the model without its head gives for each demonstration."""
    if isinstance(model, LayerwiseModel):
        for group in groups_of(data, tokens_at_once):
            if counts is not None:
                counts.expect(group)
            for _ in model.run([demo.input_ids for demo in group]):
                pass
            yield from zip(group, model.outputs, strict=True)
        return
    for demo in data:
        if counts is not None:
            counts.expect([demo])
        yield demo, backbone(model)(torch.tensor([demo.input_ids], device=model.device), use_cache=False)


class _Counts:
    """How often the whole model routes the tokens that predict one that counts to each expert, by domain."""

    def __init__(self, model: nn.Module, data: Sequence[Demo]) -> None:
        self._blocks = {block.layer: block.num_experts for block in moe_blocks(model)}
        self._table = {
            domain: {layer: np.zeros(experts, dtype=np.int64) for layer, experts in self._blocks.items()}
            for domain in dict.fromkeys(demo.domain for demo in data)
        }
        self._group: Sequence[Demo] = ()
        self._turn: dict[int, int] = {}

    @contextlib.contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        def add(layer: LayerObservation) -> None:
            if self._turn.get(layer.layer, 0) >= len(self._group):
                return  # a metric's own forwards
            demo = self._group[self._turn.setdefault(layer.layer, 0)]
            self._turn[layer.layer] += 1
            index = layer.index[max(demo.answer_start, 1) - 1 : -1].cpu().numpy()
            self._table[demo.domain][layer.layer] += np.bincount(index[index >= 0], minlength=self._blocks[layer.layer])

        with observe(model, add):
            yield

    def expect(self, group: Sequence[Demo]) -> None:
        """These are next, each layer's in this order."""
        self._group, self._turn = group, {}

    def rerouted(self, keep: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        whole: dict[str, float] = {}
        per_layer: dict[str, dict[str, float]] = {}
        for domain, layers in self._table.items():
            pairs = {layer: int(counts.sum()) for layer, counts in layers.items()}
            lost = {
                layer: int(counts.sum() - counts[list(keep[layer])].sum()) if layer in keep else 0
                for layer, counts in layers.items()
            }
            whole[domain] = sum(lost.values()) / max(sum(pairs.values()), 1)
            per_layer[domain] = {str(layer): lost[layer] / max(pairs[layer], 1) for layer in layers}
        return {"rerouted": whole, "rerouted_per_layer": per_layer}


def _describe(case: Case) -> dict[str, Any]:
    plan = case.plan
    counts = set(plan.counts.values())
    return {
        "criterion": plan.criterion,
        "domains": dict(plan.domains),
        "keep": case.keep,
        "count": counts.pop() if len(counts) == 1 else sum(plan.counts.values()) / len(plan.counts),
        "policy": plan.policy,
        "mode": case.mode,
        "plan_hash": plan.hash,
    }


def _name(row: Mapping[str, Any]) -> str:
    mode = "" if row["mode"] == "reroute" else f" {row['mode']}"
    return f"{row['criterion']} {row['count']:g}{mode}"


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None


# the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint's folder, or a run of this library")
    chosen = parser.add_argument_group("what to mask")
    chosen.add_argument("--stats", type=Path, metavar="STATS", help="what `gatewright prune collect` wrote")
    chosen.add_argument("--keep", nargs="+", default=["0.75", "0.5", "0.25"], metavar="KEEP", help="shares or counts")
    chosen.add_argument("--criteria", nargs="+", default=["easy-ep"], metavar="NAME", help="as in `plan --criterion`")
    chosen.add_argument(
        "--choose-on", action="append", metavar="DOMAIN", help="a domain that the choice is for (default: all; repeat)"
    )
    chosen.add_argument("--policy", help="what becomes of the router, as in `plan --policy`")
    chosen.add_argument("--seed", type=int, default=0, help="of the criterion random")
    chosen.add_argument(
        "--plan", type=Path, action="append", default=[], metavar="PLAN", help="measure plans instead; may be repeated"
    )
    chosen.add_argument("--mode", nargs="+", choices=MODES, default=["reroute"], help="what the pruned picks become")
    demos_module.add_arguments(parser, "--data")
    demos_module.add_answer_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of all numbers")


def run(args: argparse.Namespace) -> int:
    if (args.stats is None) == (not args.plan):
        raise ValueError("give either --stats, to sweep, or --plan")
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f"{args.out.parent}, where --out should go, is no folder: make it first")
    own = is_run_folder(args.model)
    cases = _cases(args)
    about = dict(cases[0].plan.model)
    if own:
        found = _evaluate_own(args, cases)
    else:
        if not args.demos:
            raise ValueError("--data is needed: files like demonstrations, on which losses are measured")
        _check_same_model(args.model, cases)
        data, model = load_demos(args, lambda: open_model(args))
        table = _Table(list(dict.fromkeys(demo.domain for demo in data)))
        print(table.header(), flush=True)
        start = time.monotonic()

        def report(row: dict[str, Any]) -> None:
            print(table.row(row), flush=True)
            if "plan_hash" not in row:
                took = time.monotonic() - start
                about = f"the whole model took {duration(took)}; {len(cases)} masked ones need about "
                print(about + duration(took * len(cases)), file=sys.stderr, flush=True)

        found = evaluate(model, data, cases, tokens_at_once=args.tokens_at_once, report=report)
    if args.out is not None:
        write_text(args.out, json.dumps({"format": FORMAT, "kind": KIND, "model": about, **found}, indent=1) + "\n")
    return 0


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.plan:
        return [Case(plan, mode) for plan in map(Plan.load, args.plan) for mode in args.mode]
    return sweep(
        Statistics.load(args.stats),
        keep=[parse_keep(keep) for keep in args.keep],
        criteria=args.criteria,
        modes=args.mode,
        domains=args.choose_on,
        policy=args.policy,
        seed=args.seed,
    )


def _check_same_model(folder: Path, cases: Sequence[Case]) -> None:
    """
    Raises:
        ValueError: the plans are of another checkpoint.
    """
    found = Checkpoint.open(folder).header_hash
    for case in cases:
        made_for = case.plan.model.get("header_hash")
        if made_for and made_for != found:
            raise ValueError(
                f"{folder} is not the checkpoint that the statistics were collected from "
                f"({case.plan.model['name']}): their tensors differ"
            )


class _Table:
    """Rows for a terminal: what is masked, and each domain's perplexity, change of the loss and re-routed share."""

    def __init__(self, domains: Sequence[str]) -> None:
        self._domains = domains
        self._widths = [max(26, len(domain)) for domain in domains]

    def header(self) -> str:
        cells = [f"{domain:>{width}}" for domain, width in zip(self._domains, self._widths, strict=True)]
        explained = [f"{'perplexity   loss  re-routed':>{width}}" for width in self._widths]
        return f"{'':30}{'  '.join(['', *cells])}\n{'':30}{'  '.join(['', *explained])}"

    def row(self, row: Mapping[str, Any]) -> str:
        name = _name(row) if "plan_hash" in row else "whole model"
        cells = []
        for domain, width in zip(self._domains, self._widths, strict=True):
            perplexity = row["perplexity"][domain]
            shown = "inf" if perplexity is None else f"{perplexity:.4g}"
            if "delta" in row:
                shown += f" {row['delta'][domain]:+8.4f} {100 * row['rerouted'][domain]:8.1f} %"
            else:
                shown += f" {row['loss'][domain]:8.4f} {'':10}"
            cells.append(f"{shown:>{width}}")
        return f"{name:30}{'  '.join(['', *cells])}"


def _evaluate_own(args: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Any]:
    """Of a run of this library: its own held-out loss, by class."""
    from . import runs

    chosen = ("stats", "keep", "criteria", "choose_on", "policy", "seed", "plan", "mode", "device", "out")
    refuse_changed(args, add_arguments, [], chosen)
    # what such a plan's files do, whatever was asked for
    silent = [case for case in cases if case.plan.policy == runs.KEEP_ROWS]
    once = {case.plan.hash: dataclasses.replace(case, mode="no-reroute") for case in silent}
    cases = [*(case for case in cases if case.plan.policy != runs.KEEP_ROWS), *once.values()]
    names = [_name(_describe(case)) for case in cases]
    device, found = str(pick_device(args.device)), {}
    for mode in dict.fromkeys(case.mode for case in cases):
        plans = {str(place): case.plan for place, case in enumerate(cases) if case.mode == mode}
        found |= runs.evaluate(args.model, plans, mode=mode, device=device)
    full = found.pop(runs.FULL)
    losses = [found[str(place)] for place in range(len(cases))]
    print("\n".join(runs.loss_table({runs.FULL: full, **dict(zip(names, losses, strict=True))})))
    rows = [
        {**_describe(case), "loss": loss, "delta": {label: loss[label] - full[label] for label in loss}}
        for case, loss in zip(cases, losses, strict=True)
    ]
    return {"data": {label: {} for label in full}, "full": {"loss": full}, "cases": rows}
