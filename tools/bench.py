"""How long a MoE layer takes, against every peer that is installed, and what it is made of.

Every contestant (``tools.peers``) holds the same weights and gets the same tokens: softmax top-k, renormalised, SwiGLU
experts, nothing dropped. Each is first checked to compute what a float64 loop computes. Then, for each row and dtype:

    layer      forward (as in training: it keeps what backward needs) and backward, gradients of tokens and all weights
    parts      router; dispatch (sort and gather); experts on a given routing; combine; sums by token and by expert
    memory     the most that one forward and backward had at once, and what was kept for backward

All contestants run once in every round, in an order that rotates, and ratios are taken inside a round: reported are
the median and its 95 % interval. A contestant is "faster" or "slower" where the whole interval says so; else they tie.
``changing`` draws new tokens every round, so that the experts' counts change as in training; ``fixed`` keeps them.
The roofline is what no less time could do: counted operations and bytes (``tools.costs``) over the rates of a large
matrix product and a large copy, measured in the same run.

    gatewright bench                                    the rows of the README; a quarter of an hour on two cores
    gatewright bench --rows coarse --dtypes bf16 --peers "transformers grouped_mm" --minutes 1
    gatewright bench --row 4096,1024,512,32,4 --out here/bench.json                      also writes here/bench.md
    gatewright bench --rows --flagship S                only the flagship's training step (recipes/bench_flagship.py)
    gatewright bench --device cuda
"""

import argparse
import contextlib
import dataclasses
import difflib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import native
from ..kernels.segment import IMPLEMENTATIONS, segment_sum
from ..moe.files import write_text
from .bench_parts import MOVERS
from .costs import cost
from .measure import (
    CONFIDENCE,
    LiveStorage,
    Rates,
    describe_machine,
    markdown,
    measure_rates,
    now,
    paired_ratio,
    peak_memory,
    spread,
)
from .peers import CONTESTANTS, DTYPES, OURS, YARDSTICK, Contestant, Shape, check, choose, draw_tokens, draw_weights

ROWS = {
    "coarse": Shape(tokens=8192, dim=256, hidden=512, experts=8, top_k=2),
    "medium": Shape(tokens=4096, dim=512, hidden=1024, experts=16, top_k=2),
    "fine": Shape(tokens=2048, dim=768, hidden=768, experts=64, top_k=8),
    "few": Shape(tokens=128, dim=256, hidden=512, experts=8, top_k=2),
    "gpu_coarse": Shape(tokens=32768, dim=4096, hidden=4096, experts=8, top_k=2),
    "gpu_medium": Shape(tokens=32768, dim=2048, hidden=2048, experts=16, top_k=2),
    "gpu_fine": Shape(tokens=32768, dim=2048, hidden=768, experts=128, top_k=8),
}
USUAL_ROWS = {"cpu": ("coarse", "medium", "fine", "few"), "cuda": ("gpu_coarse", "gpu_medium", "gpu_fine")}
USUAL_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
COUNTS = ("changing", "fixed")
WAYS = ("forward", "backward")
LEAST = 6  # rounds: fewer have no 95 % interval
# after so many rounds a contestant leaves that takes so many times as long as ours: the time is the others'
LEAVE = {2: 12, 3: 4}
GOAL, GOAL_ROWS = 1.15, 64  # of the dense time, where an expert gets so many rows
# what a row and dtype spends its time on; the rest goes into checks and memory
SHARES = {"changing": 0.35, "fixed": 0.25, "both": 0.1, "router": 0.05, "experts": 0.2, "dispatch": 0.05}

Run = Callable[[Any], tuple[float, float]]


def race(
    entrants: dict[str, Run], draw: Callable[[], Any], *, seconds: float, rounds: int, first: str, warm: bool = False
) -> dict[str, Any]:
    """Runs all in turn, round after round, until ``seconds`` are over or there were ``rounds``, but at least ``LEAST``.

    Args:
        entrants: each runs once on what ``draw`` gave and returns the ms of forward and of backward.
        draw: the inputs of a round.
        first: the entrant that the others are compared with.
        warm: whether all have run before; else each runs once untimed.

    Returns:
        by entrant the ms of "forward", "backward" and "step", which is both, and the rounds; by other entrant the
        paired ratios first / other.
    """
    times: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in entrants}
    if not warm:
        inputs = draw()
        for run in entrants.values():
            run(inputs)
    begin, order = time.perf_counter(), list(entrants)
    for round_ in range(rounds):
        if round_ >= LEAST and time.perf_counter() - begin > seconds:
            break
        inputs = draw()
        at = round_ % len(order)
        for name in order[at:] + order[:at]:
            times[name][round_] = entrants[name](inputs)
        if round_ + 1 in LEAVE:
            pace = {name: spread([sum(both) for both in times[name].values()])["median"] for name in order}
            order = [name for name in order if pace[name] <= LEAVE[round_ + 1] * pace[first]]
    ways = {"forward": lambda both: both[0], "backward": lambda both: both[1], "step": sum}
    found = {
        name: {"rounds": len(own)} | {way: spread([pick(both) for both in own.values()]) for way, pick in ways.items()}
        for name, own in times.items()
    }
    ratios = {
        name: {
            way: paired_ratio([pick(times[first][r]) for r in own], [pick(both) for both in own.values()])
            for way, pick in ways.items()
        }
        for name, own in times.items()
        if name != first
    }
    return {"entrants": found, "ratios": ratios}


def forward_and_backward(
    work: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, clear: Callable[[], None]
) -> tuple[float, float]:
    """The ms of ``work(*inputs)`` and of its backward; floating-point inputs get gradients."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    device = leaves[0].device
    start = now(device)
    y = work(*leaves)
    middle = now(device)
    y.backward(grad.to(y.dtype))
    end = now(device)
    clear()
    return 1e3 * (middle - start), 1e3 * (end - middle)


class Cell:
    """One row at one dtype: the contestants that can run it, and its inputs.

    Args:
        names: of contestants; ours and the dense layer take part in any case.
        seed: of weights and tokens.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, names: Sequence[str], *, seed: int = 0
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.weights = draw_weights(shape, dtype, device, self.generator)
        self.grad_TD = torch.randn(shape.tokens, shape.dim, generator=self.generator, device=device).to(dtype)
        self.contestants: dict[str, Contestant] = {}
        self.skipped: dict[str, str] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.slow: set[str] = set()
        for name in dict.fromkeys([OURS.name, YARDSTICK.name, *names]):
            self._enter(CONTESTANTS[name])
        self.fixed_TD = self.draw()

    def _enter(self, kind: type[Contestant]) -> None:
        reason = kind.why_not(self.shape, self.dtype, self.device)
        if reason is not None:
            self.skipped[kind.name] = reason
            return
        with self._or_skip(kind.name):
            if kind is not YARDSTICK:
                self.errors[kind.name] = check(kind, self.shape, self.dtype, self.device)
            self.contestants[kind.name] = kind(self.shape, self.weights)

    @contextlib.contextmanager
    def _or_skip(self, name: str) -> Iterator[None]:
        """A peer that fails, whatever its reason, does not run; we do not get off so lightly."""
        try:
            yield
        except Exception as error:
            if name in (OURS.name, YARDSTICK.name):
                raise
            self.skipped[name] = " ".join(f"{type(error).__name__}: {error}".split())
            self.contestants.pop(name, None)

    def draw(self) -> Tensor:
        return draw_tokens(self.shape, self.weights, self.generator)

    def step(self, contestant: Contestant, x_TD: Tensor) -> tuple[float, float]:
        return forward_and_backward(contestant.layer, [x_TD], self.grad_TD, contestant.clear)

    def memories(self) -> dict[str, dict[str, int]]:
        """Of every contestant; who cannot run a whole step leaves."""
        found = {}
        for name, contestant in list(self.contestants.items()):
            with self._or_skip(name):
                found[name] = self.memory(contestant)
        return found

    def memory(self, contestant: Contestant) -> dict[str, int]:
        """Bytes: the most at once, what is kept for backward, the most that storages alone took, and ``scratch``.

        What the native kernel keeps between calls is let go first: all that a step needs is allocated in it, counted.
        """
        native.release()
        x_TD, y = self.fixed_TD.detach().requires_grad_(), []
        with LiveStorage() as live:
            forward = peak_memory(lambda: y.append(contestant.layer(x_TD)), self.device)
            scratch = native.kept_bytes()
            backward = peak_memory(lambda: y.pop().backward(self.grad_TD), self.device)
        contestant.clear()
        return {
            "peak": max(forward.peak, forward.left + backward.peak),
            "kept": forward.left - scratch,
            "scratch": scratch,
            "live_storage": live.peak,
        }

    def layer(self, *, seconds: float, rounds: int) -> dict[str, Any]:
        """The layer's races: counts that change, counts that do not, and ours on both in turn. After ``memories``."""
        runs = {
            name: lambda x_TD, contestant=contestant: self.step(contestant, x_TD)
            for name, contestant in self.contestants.items()
        }
        changing = race(
            runs, self.draw, seconds=SHARES["changing"] * seconds, rounds=rounds, first=OURS.name, warm=True
        )
        self.slow = {name for name, own in changing["entrants"].items() if own["rounds"] < LEAST}
        fixed = race(
            {name: run for name, run in runs.items() if name not in self.slow}, lambda: self.fixed_TD,
            seconds=SHARES["fixed"] * seconds, rounds=rounds, first=OURS.name, warm=True,
        )  # fmt: skip
        both = race(
            {"changing": runs[OURS.name], "fixed": lambda _: runs[OURS.name](self.fixed_TD)}, self.draw,
            seconds=SHARES["both"] * seconds, rounds=rounds, first="changing", warm=True,
        )  # fmt: skip
        return {"changing": changing, "fixed": fixed, "changing_over_fixed": both["ratios"]["fixed"]}

    def parts(self, *, seconds: float, rounds: int) -> dict[str, Any]:
        """A race for each part."""
        return {
            "router": self._router(seconds=SHARES["router"] * seconds, rounds=rounds),
            "experts": self._experts(seconds=SHARES["experts"] * seconds, rounds=rounds),
            **self._movers(seconds=SHARES["dispatch"] * seconds / 4, rounds=rounds),
        }

    def _able(self, part: str) -> dict[str, Contestant]:
        return {name: one for name, one in self.contestants.items() if part in one.parts}

    def _router(self, **limits: Any) -> dict[str, Any]:
        def run(contestant: Contestant) -> Run:
            grad_TK = torch.randn(self.shape.tokens, self.shape.top_k, device=self.device)

            def timed(x_TD: Tensor) -> tuple[float, float]:
                return forward_and_backward(contestant.route, [x_TD], grad_TK, contestant.clear)

            return timed

        runs = {name: run(contestant) for name, contestant in self._able("router").items()}
        return race(runs, self.draw, first=OURS.name, **limits)

    def _routed(self) -> tuple[Tensor, Tensor, Tensor]:
        """New tokens and their routing."""
        x_TD = self.draw()
        return x_TD, *choose(x_TD, self.weights.gate, self.shape.top_k)

    def _experts(self, **limits: Any) -> dict[str, Any]:
        def run(contestant: Contestant) -> Run:
            return lambda inputs: forward_and_backward(contestant.experts, inputs, self.grad_TD, contestant.clear)

        runs = {name: run(one) for name, one in self._able("experts").items() if name not in self.slow}
        return race(runs, self._routed, first=OURS.name, warm=True, **limits)

    def _movers(self, **limits: Any) -> dict[str, Any]:
        grad_ND = torch.randn(self.shape.rows, self.shape.dim, generator=self.generator, device=self.device)
        grad_ND = grad_ND.to(self.dtype)
        kinds = {name: mover for name, mover in MOVERS.items() if mover.why_not() is None}

        def draw() -> dict[str, Any]:
            x_TD, index_TK, weight_TK = self._routed()
            movers = {name: kind(index_TK, weight_TK, self.shape.experts) for name, kind in kinds.items()}
            ready = {name: (mover.dispatch(x_TD), mover.weights().detach()) for name, mover in movers.items()}
            return {"x": x_TD, "index": index_TK, "movers": movers, "ready": ready}

        def dispatch(name: str) -> Run:
            return lambda inputs: forward_and_backward(
                inputs["movers"][name].dispatch, [inputs["x"]], grad_ND, lambda: None
            )

        def combine(name: str) -> Run:
            return lambda inputs: forward_and_backward(
                inputs["movers"][name].combine, inputs["ready"][name], self.grad_TD, lambda: None
            )

        def sums(implementation: str, by: str) -> Run:
            count = self.shape.tokens if by == "token" else self.shape.experts

            def timed(inputs: dict[str, Any]) -> tuple[float, float]:
                index_N = inputs["index"].flatten()
                token_N = torch.arange(len(index_N), device=self.device) // self.shape.top_k
                ids_N = token_N[index_N.argsort(stable=True)] if by == "token" else index_N
                return forward_and_backward(
                    lambda rows_ND: segment_sum(rows_ND, ids_N, count, implementation=implementation),
                    inputs["ready"][OURS.name][:1], grad_ND[:count], lambda: None,
                )  # fmt: skip

            return timed

        away = {"torch_scatter"} - {name.replace("-", "_") for name in kinds}
        away |= {"sorted"} if self.device.type != "cpu" else set()
        there = [name for name in IMPLEMENTATIONS if name not in away]
        races = {
            "dispatch": {name: dispatch(name) for name in kinds if name != "torch-scatter"},
            "combine": {name: combine(name) for name in kinds},
            "sum by token": {name: sums(name, "token") for name in there},
            "sum by expert": {name: sums(name, "expert") for name in there},
        }
        return {name: race(runs, draw, first=next(iter(runs)), **limits) for name, runs in races.items()}


def measure_cell(row: str, cell: Cell, dtype: str, rates: Rates, *, seconds: float, rounds: int) -> dict[str, Any]:
    """Everything of one row and dtype, as JSON can hold it."""
    itemsize, times = cell.dtype.itemsize, [time.perf_counter()]
    memory = cell.memories()
    times.append(time.perf_counter())
    layer = cell.layer(seconds=seconds, rounds=rounds)
    times.append(time.perf_counter())
    parts = cell.parts(seconds=seconds, rounds=rounds)
    times.append(time.perf_counter())
    for name, found in [("layer", layer["changing"]), ("layer", layer["fixed"]), *parts.items()]:
        for entrant, own in found["entrants"].items():
            if not name.startswith("sum"):
                part = YARDSTICK.name if entrant == YARDSTICK.name else name
                own["roofline"] = _fractions(own, *cost(part, cell.shape, itemsize), rates)
    named = ("layer", "dense", *(name for name in parts if not name.startswith("sum")))
    return {
        "row": row, "shape": dataclasses.asdict(cell.shape), "dtype": dtype,
        "costs": {
            part: dict(zip(WAYS, (one._asdict() for one in cost(part, cell.shape, itemsize)), strict=True))
            for part in named
        },
        "errors": cell.errors, "skipped": cell.skipped, "memory": memory, "layer": layer, "parts": parts,
        "seconds": dict(zip(("memory", "layer", "parts"), (b - a for a, b in pairwise(times)), strict=True)),
    }  # fmt: skip


def _fractions(own: dict[str, Any], forward, backward, rates: Rates) -> dict[str, float]:
    least = {"forward": rates.milliseconds(*forward), "backward": rates.milliseconds(*backward)}
    least["step"] = sum(least.values())
    return {way: milliseconds / own[way]["median"] for way, milliseconds in least.items()}


def measure(
    rows: dict[str, Shape],
    dtypes: Sequence[str],
    names: Sequence[str],
    device: torch.device,
    *,
    minutes: float,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every row at every dtype.

    Args:
        names: of contestants.
        minutes: for all races together; short ones get at least ``LEAST`` rounds, whatever that takes.
        rounds: at most so many in a race.
        say: is told of every row that is done.
    """
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "machine": describe_machine(device) | {"native": native.why_not(torch.float32) or "compiled"},
        "rounds": rounds, "minutes": minutes, "rates": {}, "cells": [],
    }  # fmt: skip
    # float32 takes about three times as long as bfloat16
    weight = {
        (row, dtype): (1 + shape.rows * shape.dim * shape.hidden / 1e9) * (3 if dtype == "fp32" else 1)
        for row, shape in rows.items()
        for dtype in dtypes
    }
    for dtype in dtypes if rows else ():
        rates = measure_rates(DTYPES[dtype], device)
        results["rates"][dtype] = rates._asdict()
        for row, shape in rows.items():
            seconds = 60 * minutes * weight[row, dtype] / sum(weight.values())
            gc.collect()
            cell = Cell(shape, DTYPES[dtype], device, names)
            results["cells"].append(measure_cell(row, cell, dtype, rates, seconds=seconds, rounds=rounds))
            del cell
            say(f"{row} {shape} {dtype} done after {(time.perf_counter() - begin) / 60:.1f} minutes")
    results["seconds"] = time.perf_counter() - begin
    return results


def verdict(ratio: dict[str, float]) -> str:
    """Of ours over theirs: "faster", "slower" or "tied"."""
    return "faster" if ratio["high"] < 1 else "slower" if ratio["low"] > 1 else "tied"


def report(results: dict[str, Any]) -> str:
    """The results as markdown: what the README shows."""
    cells = results["cells"]
    names = [name for name in CONTESTANTS if any(name in cell["memory"] for cell in cells)]
    others = [name for name in names if name not in (OURS.name, YARDSTICK.name)]
    lines = [_describe(results), ""]
    for way, title in (("step", "Forward plus backward"), ("forward", "Forward (as in training)")):
        lines += [f"{title}: ms of the layer, its fraction of the roofline, its time over theirs:", ""]
        lines += [*_layer_table(cells, others, way), ""]
    lines += _verdicts(cells, others)
    lines += ["", "Memory of one forward plus backward, peak MiB (kept for backward):", ""]
    lines += markdown(
        ["row", "dtype", *names],
        [[cell["row"], cell["dtype"], *(_mib(cell["memory"].get(name)) for name in names)] for cell in cells],
    )
    lines += ["", "Parts, forward / backward in ms (fraction of the roofline):", "", *_parts_table(cells), ""]
    return "\n".join([*lines, *_notes(cells, names)])


def _describe(results: dict[str, Any]) -> str:
    machine = results["machine"]
    native_kernel = "with" if machine["native"] == "compiled" else f"without ({machine['native']})"
    cpu = (
        f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads, {native_kernel} the native kernel"
    )
    where = machine["gpu"] or cpu
    load = "" if machine["load_average"] is None else f", load average before {machine['load_average']:.1f}"
    rates = "; ".join(
        f"{dtype} {rate['flops'] / 1e9:.0f} GFLOP/s{_of_mm(rate)} and {rate['bytes'] / 1e9:.1f} GB/s"
        for dtype, rate in results["rates"].items()
    )
    return (
        f"{where}, torch {machine['torch']}{load}; measured at most: {rates}. Medians; in brackets the 95 % interval "
        f"of the paired ratio's median. {results['seconds'] / 60:.1f} minutes in all."
    )


def _of_mm(rate: dict[str, float | None]) -> str:
    """The dense layer and most peers multiply by ``torch.mm``, which need not be the fastest product at hand."""
    return "" if rate["mm"] is None else f" by oneDNN ({rate['mm'] / 1e9:.0f} by torch.mm)"


def _layer_table(cells: list[dict], others: list[str], way: str) -> list[str]:
    rows = []
    for cell in cells:
        shape = cell["shape"]
        numbers = tuple(shape[name] for name in ("tokens", "dim", "hidden", "experts", "top_k"))
        for counts in COUNTS:
            found = cell["layer"][counts]
            own = found["entrants"][OURS.name]
            rows.append([
                f"{cell['row']} {numbers}", cell["dtype"], counts, f"{own[way]['median']:.1f}",
                f"{own['roofline'][way]:.2f}",
                *(_ratio(found["ratios"].get(name, {}).get(way)) for name in (YARDSTICK.name, *others)),
            ])  # fmt: skip
    head = ["row (T, D, H, E, K)", "dtype", "counts", "ms", "roofline", "/ dense"]
    return markdown([*head, *(f"/ {name}" for name in others)], rows)


def _verdicts(cells: list[dict], others: list[str]) -> list[str]:
    """Ties and losses by name, the goal against the dense layer, and changing counts against fixed ones."""
    beaten, missed, changing = [], [], []
    for cell in cells:
        for counts in COUNTS:
            ratios = cell["layer"][counts]["ratios"]
            where = f"{cell['row']} {cell['dtype']} {counts}"
            said = {name: verdict(ratios[name]["step"]) for name in others if name in ratios}
            for what, words in (("tied", "tied with"), ("slower", "slower than")):
                if names := [name for name, found in said.items() if found == what]:
                    beaten.append(f"{where}: {words} {', '.join(names)}")
            dense = ratios[YARDSTICK.name]["step"]["median"]
            rows = cell["shape"]["tokens"] * cell["shape"]["top_k"] / cell["shape"]["experts"]
            if rows >= GOAL_ROWS and dense > GOAL:
                missed.append(f"{where} {dense:.2f}")
        changing.append(f"{cell['row']} {cell['dtype']} {_ratio(cell['layer']['changing_over_fixed']['step'])}")
    return [
        f"Forward plus backward, not faster than every peer: {'; '.join(beaten) or 'nowhere'}.",
        "",
        f"Forward plus backward over the dense layer's, above {GOAL} where experts get at least {GOAL_ROWS} rows: "
        f"{'; '.join(missed) or 'nowhere'}.",
        "",
        f"Counts that change every step over fixed ones, in turn: {'; '.join(changing)}.",
    ]


def _parts_table(cells: list[dict]) -> list[str]:
    rows = []
    for cell in cells:
        for part, found in cell["parts"].items():
            first, *rest = found["entrants"]
            for name in (first, *rest):
                own = found["entrants"][name]
                numbers = []
                for way in WAYS:
                    fraction = f" ({own['roofline'][way]:.2f})" if "roofline" in own else ""
                    numbers.append(f"{own[way]['median']:.2f}{fraction}")
                ratio = "" if name == first else _ratio(found["ratios"][name]["step"])
                rows.append([cell["row"], cell["dtype"], part, name, *numbers, ratio])
    return markdown(["row", "dtype", "part", "by", "forward", "backward", "first / it, both"], rows)


def _notes(cells: list[dict], names: list[str]) -> list[str]:
    notes = [f"- {name}: {CONTESTANTS[name].differs}." for name in names if CONTESTANTS[name].differs]
    skipped: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        for name, reason in cell["skipped"].items():
            skipped.setdefault(name, {}).setdefault(reason, []).append(f"{cell['row']} {cell['dtype']}")
    for name, reasons in skipped.items():
        for reason, where in reasons.items():
            at = "" if len(where) == len(cells) else f" ({', '.join(where)})"
            notes.append(f"- {name} did not run{at}: {reason}.")
    worst = {
        dtype: max(
            max(errors.values()) for cell in cells if cell["dtype"] == dtype for errors in cell["errors"].values()
        )
        for dtype in dict.fromkeys(cell["dtype"] for cell in cells)
    }
    listed = ", ".join(f"{error:.1e} in {dtype}" for dtype, error in worst.items())
    leave = " and ".join(f"after {count} rounds at more than {slow} times" for count, slow in LEAVE.items())
    return [
        *notes,
        f"- Every contestant's output and gradients were compared with a float64 loop's first: at most {listed} of "
        "the tensor's norm apart.",
        f"- A contestant leaves {leave} gatewright's time: its interval is then the extremes (*), and it runs neither "
        "with fixed counts nor its experts alone.",
        "- Memory is what the allocator gave out, the scratch of operators included. What gatewright's native kernel "
        "keeps between calls is in its peak.",
    ]


def _ratio(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return ""
    mark = "" if ratio["coverage"] >= CONFIDENCE else " *"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{mark}"


def _mib(memory: dict[str, int] | None) -> str:
    return "" if memory is None else f"{memory['peak'] / 2**20:.0f} ({memory['kept'] / 2**20:.0f})"


def _shape(text: str) -> Shape:
    try:
        tokens, dim, hidden, experts, top_k = (int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f'--row "{text}": write five whole numbers T,D,H,E,K, such as 4096,512,1024,16,2') from None
    return Shape(tokens=tokens, dim=dim, hidden=hidden, experts=experts, top_k=top_k)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: those of the device)")
    parser.add_argument("--row", action="append", default=[], metavar="T,D,H,E,K", help="a row of your own; repeatable")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="fp32, bf16 (default: both; on a GPU bf16)")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="default: all; a wrong name lists them")
    parser.add_argument("--minutes", type=float, default=10, help="for the timed rounds of all rows (default: 10)")
    parser.add_argument("--rounds", type=int, default=40, help="of a race, at most (default: 40; at least 6)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--flagship", metavar="SIZE", help="also its training step, end to end: tiny, S, B, L or XL")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="every number, and the tables in FILE.md beside it"
    )


def run(args: argparse.Namespace) -> int:
    if args.rounds < LEAST or args.threads < 1 or args.minutes <= 0:
        given = f"--rounds {args.rounds} --threads {args.threads} --minutes {args.minutes:g}"
        raise ValueError(f"{given}: choose at least {LEAST} rounds, one thread, and more than 0 minutes")
    device = _device(args.device)
    if args.flagship is None and args.rows == [] and not args.row:
        raise ValueError("--rows without a name: there is nothing to time; name rows, or give --row or --flagship")
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"--out {args.out}: name a file that ends in .json; the tables go beside it")
    own = {f"own {i}" if len(args.row) > 1 else "own": _shape(text) for i, text in enumerate(args.row, 1)}
    usual = () if own else USUAL_ROWS[device.type]
    rows = {name: ROWS[name] for name in _known("--rows", args.rows if args.rows is not None else usual, ROWS)} | own
    dtypes = _known("--dtypes", args.dtypes or USUAL_DTYPES[device.type], DTYPES)
    peers = [name for name in CONTESTANTS if name not in (OURS.name, YARDSTICK.name)]
    names = _known("--peers", peers if args.peers is None else args.peers, peers)
    torch.set_num_threads(args.threads)
    results = measure(
        rows, dtypes, names, device, minutes=args.minutes, rounds=args.rounds,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    tables = report(results) if rows else ""
    if args.flagship is not None:
        results["flagship"], printed = time_flagship(args.flagship, args.threads)
        tables = "\n\n".join(part for part in (tables, printed) if part)
    print(tables)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(results, indent=1) + "\n")
        write_text(args.out.with_suffix(".md"), tables + "\n")
    return 0


def time_flagship(size: str, threads: int) -> tuple[dict[str, Any], str]:
    """Runs ``recipes/bench_flagship.py`` as a program: what it found and what it printed.

    Raises:
        ValueError: it failed; the message is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "flagship.json"
        options = ["--size", size, "--threads", str(threads), "--out", str(out)]
        command = [sys.executable, "-m", "gatewright.recipes.bench_flagship", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "rror" in line] or ["it said nothing"]
            raise ValueError(f"--flagship {size} ended with status {done.returncode}: {said[-1]}")
        return json.loads(out.read_text()), done.stdout.strip()


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    raise ValueError(f"--device {name}: choose cpu{', or cuda' if torch.cuda.is_available() else ': no GPU is here'}")


def _known(option: str, given: Sequence[str], known: Sequence[str] | dict) -> list[str]:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=2)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f'{option} "{name}": {hint}Choose from {", ".join(known)}')
    return list(dict.fromkeys(given))
