"""What each router's decision costs, forward and backward, against plain softmax top-k.

A decision is all that the router computes: scores, choice, weights, losses, expert inputs that it makes itself. The
backward goes from all of these to the tokens and the parameters, and to the attention's queries and keys where the
router reads it. The experts' work is not in it, nor that of making the soft slots that a router describes.

Each round makes new tokens and times the router and top-k on them, one after the other, in turns of who is first.
Ratios are taken inside a round; reported are their median and quartiles. Routers are in training mode and as they were
drawn; options are their defaults, or in ``OPTIONS``. Memory is the profiler's: the peak of one forward plus backward.

    gatewright bench-routers --out routers.json
    gatewright bench-routers hash sinkhorn --rounds 20 --batch 8 --length 1024 --dim 512 --experts 64
"""

import argparse
import dataclasses
import inspect
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import AttentionWeights
from ..moe.files import write_text
from ..routers import Router, Routing, TokenContext, create_router, list_routers, router_class
from .measure import clock, describe_machine, markdown, peak_bytes, spread

REFERENCE = "topk"
VOCABULARY = 256
HEAD_WIDTH = 64
WARMUP = 2
FEWEST_ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """``batch`` samples of ``length`` tokens of width ``dim``; ``experts`` routed ones, ``top_k`` a token."""

    batch: int = 8
    length: int = 1024
    dim: int = 512
    experts: int = 64
    top_k: int = 2

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def heads(self) -> int:
        return max(1, self.dim // HEAD_WIDTH)


# what a router needs beside the shape; soft slots as many as top-k has assignments
OPTIONS: dict[str, Any] = {
    "centroid": lambda shape: {"seed": 0},
    "segment": lambda shape: {"segment_size": 4},
    "soft_moe": lambda shape: {"slots": max(1, shape.length * shape.top_k // shape.experts)},
}


def router_options(name: str, shape: Shape) -> dict[str, Any]:
    """The shape's numbers where the router knows them, ``OPTIONS``, and for what else it must have its example's."""
    cls, preset = router_class(name)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    numbers = {"dim": shape.dim, "num_experts": shape.experts, "top_k": shape.top_k, "vocabulary": VOCABULARY}
    own = OPTIONS[name](shape) if name in OPTIONS else {}
    example = cls.example()[0]
    options = {}
    for parameter in parameters:
        option = parameter.name
        if option in preset:
            continue
        if option in own:
            options[option] = own[option]
        elif option in numbers:
            options[option] = numbers[option]
        elif parameter.default is parameter.empty:
            options[option] = example[option]
    return options


def router_context(router: Router, shape: Shape, generator: torch.Generator, step: int) -> TokenContext:
    """A context with what the router requires, drawn anew.

    Raises:
        ValueError: it requires a field that is not known here.
    """
    per_token = (shape.batch, shape.length)

    def attention() -> AttentionWeights:
        shape_BHLC = (shape.batch, shape.heads, shape.length, shape.dim // shape.heads)
        q, k, v = (torch.randn(shape_BHLC, generator=generator).requires_grad_() for _ in range(3))
        w_out = torch.randn(shape.dim, shape.heads * shape_BHLC[3], generator=generator) / shape.dim**0.5
        return AttentionWeights(q, k, causal=False, v=v, w_out=w_out.requires_grad_())

    makers = {
        "token_ids": lambda: torch.randint(VOCABULARY, per_token, generator=generator),
        "position": lambda: torch.arange(shape.length).expand(per_token),
        "document": lambda: torch.zeros(per_token, dtype=torch.int64),
        "modality": lambda: torch.randint(min(2, shape.experts), per_token, generator=generator),
        "null_mask": lambda: torch.arange(shape.batch) % 10 == 0,
        "padding_mask": lambda: torch.ones(per_token, dtype=torch.bool),
        "timestep": lambda: torch.rand(shape.batch, generator=generator),
        "attention": attention,
        "previous_logits": lambda: torch.randn(shape.tokens, router.bank_size, generator=generator),
    }
    fields: dict[str, Any] = {"seed": 0, "step": step, "sample_id": torch.arange(shape.batch)}
    for field in router.requires:
        if field in makers:
            fields[field] = makers[field]()
        elif field not in ("noise", *fields):
            raise ValueError(f'router "{router.name}" needs context.{field}, which this benchmark does not make')
    return TokenContext(batch_size=shape.batch, length=shape.length, **fields)


def decide(router: Router, x_TD: Tensor, context: TokenContext) -> Routing:
    """Forward and backward of one decision. The gradients are left on the tokens and the parameters."""
    x_TD = x_TD.detach().requires_grad_()
    routing = router(x_TD, context)
    results = [routing.weight, routing.rows, routing.dispatch, routing.combine]
    results = [result for result in results if result is not None and result.requires_grad]
    losses = [loss for loss in routing.losses.values() if loss.requires_grad]
    if results or losses:
        torch.autograd.backward([*results, *losses], [*map(torch.ones_like, results), *[None] * len(losses)])
    return routing


def compare(name: str, shape: Shape, *, rounds: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """The times of a router and of top-k in ms, their ratio inside a round, and the peak memory of each.

    Args:
        rounds: timed ones, fewer where ``seconds`` are over, but at least three.
    """
    generator = torch.Generator().manual_seed(seed)
    routers = {}
    with torch.random.fork_rng(devices=[]):
        for role, which in (("router", name), ("reference", REFERENCE)):
            torch.manual_seed(seed)
            routers[role] = create_router(which, **router_options(which, shape)).train()
    times: dict[str, list[float]] = {role: [] for role in routers}
    peaks, start = {}, time.perf_counter()
    for round_ in range(-WARMUP, rounds):
        if round_ >= min(rounds, FEWEST_ROUNDS) and time.perf_counter() - start > seconds:
            break
        x_TD = torch.randn(shape.tokens, shape.dim, generator=generator)
        for role in sorted(routers, reverse=round_ % 2 == 0):
            router = routers[role]
            context = router_context(router, shape, generator, step=round_ + WARMUP)
            milliseconds = clock(lambda router=router, x=x_TD, context=context: decide(router, x, context))
            router.zero_grad()
            if round_ >= 0:
                times[role].append(milliseconds)
    for role, router in routers.items():
        context = router_context(router, shape, generator, step=0)
        peaks[role], _ = peak_bytes(lambda router=router, x=x_TD, context=context: decide(router, x, context))
        router.zero_grad()
    ratios = [own / other for own, other in zip(times["router"], times["reference"], strict=True)]
    return {
        "options": router_options(name, shape),
        "selection": router_class(name)[0].selection,
        "milliseconds": {role: spread(values) for role, values in times.items()},
        "ratio": spread(ratios),
        "rounds": len(ratios),
        "peak_bytes": peaks,
    }


def measure(names: Sequence[str], shape: Shape, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Everything, for each router, as JSON can hold it."""
    results: dict[str, Any] = {"machine": describe_machine(), "shape": dataclasses.asdict(shape), "routers": {}}
    for name in names:
        results["routers"][name] = compare(name, shape, rounds=rounds, seconds=seconds)
    return results


def report(results: dict[str, Any]) -> str:
    """The results as a markdown table."""
    machine, shape = results["machine"], Shape(**results["shape"])
    load = "" if machine["load_average"] is None else f", load average before {machine['load_average']:.1f}"
    rows = []
    for name, router in results["routers"].items():
        ratio, peaks = router["ratio"], router["peak_bytes"]
        rows.append([
            name, router["selection"], f"{router['milliseconds']['router']['median']:.1f}",
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
            f"{peaks['router'] / 2**20:.0f}", f"{peaks['router'] / peaks['reference']:.2f}", f"{router['rounds']}",
        ])  # fmt: skip
    head = ["router", "chooses", "ms", f"time / {REFERENCE}", "peak MiB", f"peak / {REFERENCE}", "rounds"]
    return "\n".join([
        f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads, torch {machine['torch']}{load}; "
        f"T = {shape.tokens} ({shape.batch} x {shape.length}), D = {shape.dim}, E = {shape.experts}, "
        f"K = {shape.top_k}; forward plus backward, medians, quartiles in brackets.", "",
        *markdown(head, rows),
    ])  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("routers", nargs="*", metavar="ROUTER", help="names (default: all that are listed)")
    parser.add_argument("--batch", type=int, default=8, help="samples (default: 8)")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sample (default: 1024)")
    parser.add_argument("--dim", type=int, default=512, help="token width (default: 512)")
    parser.add_argument("--experts", type=int, default=64, help="routed experts (default: 64)")
    parser.add_argument("--top_k", type=int, default=2, help="experts a token (default: 2)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of each router (default: 20)")
    parser.add_argument("--seconds", type=float, default=20, help="after which a router gets no more than three rounds "
                        "(default: 20)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write every number into this JSON file")


def run(args: argparse.Namespace) -> int:
    numbers = ("batch", "length", "dim", "experts", "top_k", "rounds", "threads")
    if bad := [f"--{name} {getattr(args, name)}" for name in numbers if getattr(args, name) < 1]:
        raise ValueError(f"{' '.join(bad)}: must be at least 1")
    for name in args.routers:
        router_class(name)  # an unknown name is told of the close ones before anything is timed
    torch.set_num_threads(args.threads)
    shape = Shape(batch=args.batch, length=args.length, dim=args.dim, experts=args.experts, top_k=args.top_k)
    results = measure(args.routers or list(list_routers()), shape, rounds=args.rounds, seconds=args.seconds)
    print(report(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(results, indent=1) + "\n")
    return 0
