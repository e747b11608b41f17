"""How long a MoE layer takes, against a dense feed-forward of the same activated FLOPs and a loop over its experts.

    moe      ``MoELayer`` with ProMoE's router: E routed experts of hidden width 2 D, one a token; 10 % of the samples
             unconditional, with an expert of their own; a shared expert of hidden width 2 D
    dense    one feed-forward of hidden width 4 D
    loop     the same router, weights and result as ``moe``, expert after expert in Python: tokens gathered by a mask,
             products added by ``index_add_``, as the papers' code does it

Each round makes new tokens, so that the experts' counts change as in training, and times forward plus backward of all
three (gradients of parameters and tokens), one after the other, in an order that rotates. Ratios are taken inside a
round; reported are their median and quartiles. Then the layer's parts, each alone, as shares of the dense time, and
memory from the profiler's record of allocations.

    gatewright bench --shapes tiny S B --dtypes fp32 bf16 --rounds 20 --threads 2
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.activation import activate
from ..moe import DispatchPlan, ExpertParallel, ExpertSpec, FeedForward, MoELayer
from ..moe.files import write_text
from ..routers import Routing, TokenContext, create_router
from .measure import clock, describe_machine, markdown, peak_bytes, spread

ACTIVATION = "gelu_tanh"
NULL_SHARE = 0.1
WARMUP = 3
PARTS = ("router", "sort", "experts", "unconditional", "shared", "sums")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The feed-forward of a MoE block: ``batch`` samples of ``length`` tokens, of width ``dim``; the routed experts."""

    dim: int
    experts: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


# the diffusion transformers tiny, S and B of recipes/models/dit_config.py
SHAPES = {
    "tiny": Shape(dim=96, experts=6, length=49, batch=128),
    "S": Shape(dim=384, experts=12, length=256, batch=16),
    "B": Shape(dim=768, experts=12, length=256, batch=16),
}


class LoopOverExperts:
    """What ``layer`` computes, expert after expert. Each one's weights are leaves of their own, as in a module list."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        banks = [layer.experts, layer.local_experts]
        self.experts = [
            [tensor[e].detach().requires_grad_() for tensor in (bank.w_in, bank.b_in, bank.w_out, bank.b_out)]
            for bank in banks
            for e in range(len(bank.ids))
        ]

    def __call__(self, x_BLD: Tensor, context: TokenContext) -> tuple[Tensor, Routing]:
        x_TD = x_BLD.flatten(0, 1)
        routing = self.layer.router(x_TD, context)
        out_TD = torch.zeros_like(x_TD)
        for e, (w_in, b_in, w_out, b_out) in enumerate(self.experts):
            token, slot = torch.where(routing.index == e)
            if len(token):
                a = activate(nn.functional.linear(x_TD[token], w_in, b_in), ACTIVATION)
                y = nn.functional.linear(a, w_out, b_out) * routing.weight[token, slot, None]
                out_TD.index_add_(0, token, y.to(out_TD.dtype))
        return out_TD.view_as(x_BLD) + self.layer.shared(x_BLD), routing


class Bench:
    """The three contestants at one shape and dtype, and the inputs of a round.

    Args:
        seed: of the weights and of every round's tokens.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)
        spec = ExpertSpec(shape.dim, 2 * shape.dim, ACTIVATION, bias=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = create_router("promoe", dim=shape.dim, num_experts=shape.experts)
            shared = FeedForward(spec)
            self.dense = FeedForward(ExpertSpec(shape.dim, 4 * shape.dim, ACTIVATION, bias=True)).to(dtype)
        self.layer = MoELayer(router, spec, shared=shared).to(dtype)
        self.loop = LoopOverExperts(self.layer)
        self.contestants: dict[str, Callable[[Tensor, TokenContext], tuple[Tensor, Routing | None]]] = {
            "moe": self.layer,
            "dense": lambda x, context: (self.dense(x), None),
            "loop": self.loop,
        }

    def inputs(self) -> tuple[Tensor, TokenContext, Tensor]:
        """New tokens [B, L, D], which samples are unconditional, and the gradient that comes back."""
        shape = self.shape
        x, grad = (
            torch.randn(shape.batch, shape.length, shape.dim, generator=self.generator).to(self.dtype) for _ in range(2)
        )
        null_mask = torch.zeros(shape.batch, dtype=torch.bool)
        null_mask[torch.randperm(shape.batch, generator=self.generator)[: round(NULL_SHARE * shape.batch)]] = True
        return x, TokenContext.for_tokens(x, null_mask=null_mask), grad

    def clear(self) -> None:
        """Drops all gradients, as an optimizer does between steps."""
        for parameter in [*self.layer.parameters(), *self.dense.parameters(), *sum(self.loop.experts, [])]:
            parameter.grad = None

    def step(self, name: str, x: Tensor, context: TokenContext, grad: Tensor) -> Routing | None:
        """Forward and backward of one contestant."""
        y, routing = self.contestants[name](x.detach().requires_grad_(), context)
        backward(y, grad, routing)
        return routing


def backward(y: Tensor, grad: Tensor, routing: Routing | None = None) -> None:
    if routing is None:
        torch.autograd.backward([y], [grad])
    else:
        torch.autograd.backward([y, routing.loss], [grad, None])


def compare(bench: Bench, *, rounds: int) -> dict[str, Any]:
    """Times of the contestants in ms, ratios inside a round, and the rows that experts got."""
    times: dict[str, list[float]] = {name: [] for name in bench.contestants}
    loads = []
    for round_ in range(-WARMUP, rounds):
        x, context, grad = bench.inputs()
        names = list(times)
        for name in names[round_ % 3 :] + names[: round_ % 3]:
            milliseconds = clock(lambda name=name, inputs=(x, context, grad): bench.step(name, *inputs))
            bench.clear()
            if round_ >= 0:
                times[name].append(milliseconds)
        if round_ >= 0:
            loads.append(bench.layer.router(x.flatten(0, 1), context).load_E()[: bench.shape.experts])
    load_RE = torch.stack(loads).double()
    ratios = {
        f"{one}/{other}": spread([a / b for a, b in zip(times[one], times[other], strict=True)])
        for one, other in (("moe", "dense"), ("loop", "dense"), ("moe", "loop"))
    }
    return {
        "milliseconds": {name: spread(values) for name, values in times.items()},
        "ratio": ratios,
        "rows_per_expert": {
            "least": int(load_RE.min()), "mean": float(load_RE.mean()), "most": int(load_RE.max()),
        },
    }  # fmt: skip


def time_parts(bench: Bench, *, rounds: int) -> dict[str, dict[str, float]]:
    """Forward plus backward of each part of the layer alone, and of the whole layer and the dense feed-forward, in ms.

    "experts" and "unconditional" include gathering their rows and summing the weighted results at the tokens; "sums"
    adds the three results. "rest" is what the layer takes beyond its parts.
    """
    times: dict[str, list[float]] = {name: [] for name in (*PARTS, "layer", "dense")}
    for round_ in range(-WARMUP, rounds):
        parts = Parts(bench, *bench.inputs())
        for name, values in times.items():
            milliseconds = clock(getattr(parts, name))
            bench.clear()
            if round_ >= 0:
                values.append(milliseconds)
    rest = [whole - sum(own) for whole, *own in zip(times["layer"], *(times[name] for name in PARTS), strict=True)]
    return {name: spread(values) for name, values in (times | {"rest": rest}).items()}


class Parts:
    """The parts of the layer on one round's inputs: each method is forward plus backward of one."""

    def __init__(self, bench: Bench, x: Tensor, context: TokenContext, grad: Tensor) -> None:
        self.bench, self.x, self.context, self.grad = bench, x, context, grad
        self.x_TD, self.grad_TD = x.flatten(0, 1), grad.flatten(0, 1)
        with torch.no_grad():
            self.routing = bench.layer.router(self.x_TD, context)
        index_T = self.routing.index[:, 0]
        self.routed_T = torch.where(index_T < bench.shape.experts, index_T, -1)
        self.local_T = torch.where(index_T == bench.shape.experts, 0, -1)
        self.plans = self.sort()
        self.results = [torch.randn_like(self.x_TD).requires_grad_() for _ in range(3)]

    def router(self) -> None:
        routing = self.bench.layer.router(self.x_TD.detach().requires_grad_(), self.context)
        backward(routing.weight, torch.ones_like(routing.weight), routing)

    def sort(self) -> list[DispatchPlan]:
        tokens = self.bench.shape.tokens
        return [
            DispatchPlan.build(
                num_rows=tokens, source=torch.arange(tokens), expert=expert_T, weight=self.routing.weight[:, 0],
                num_experts=count, parallel=ExpertParallel(),
            )
            for expert_T, count in ((self.routed_T, self.bench.shape.experts), (self.local_T, 1))
        ]  # fmt: skip

    def experts(self) -> None:
        self._bank(self.bench.layer.experts, self.plans[0])

    def unconditional(self) -> None:
        self._bank(self.bench.layer.local_experts, self.plans[1])

    def _bank(self, bank: nn.Module, plan: DispatchPlan) -> None:
        weight = plan.weight.detach().requires_grad_()
        x_TD = self.x_TD.detach().requires_grad_()
        y_TD = bank(x_TD, plan.counts_E, token=plan.source, weight=weight, combine=True)
        backward(y_TD, self.grad_TD)

    def shared(self) -> None:
        backward(self.bench.layer.shared(self.x.detach().requires_grad_()), self.grad)

    def sums(self) -> None:
        backward(self.results[0] + (self.results[1] + self.results[2]), self.grad_TD)

    def layer(self) -> None:
        self.bench.step("moe", self.x, self.context, self.grad)

    def dense(self) -> None:
        self.bench.step("dense", self.x, self.context, self.grad)


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Peak bytes of one forward plus backward of each contestant, and what dispatch needs beyond results.

    "dispatch" is the routed experts' alone: the peak beyond what is returned or kept for backward (forward: the output
    and the pre-activations; backward: the gradients), over the bytes of the gathered tokens. Where a kernel goes expert
    by expert, one expert's activations are in it.
    """
    inputs = bench.inputs()
    peaks = {}
    for name in bench.contestants:
        peaks[name] = peak_bytes(lambda name=name: bench.step(name, *inputs))[0]
        bench.clear()

    parts = Parts(bench, *inputs)
    plan, bank = parts.plans[0], bench.layer.experts
    x_TD, weight = parts.x_TD.detach().requires_grad_(), plan.weight.detach().requires_grad_()
    out: list[Tensor] = []
    forward_peak, kept = peak_bytes(
        lambda: out.append(bank(x_TD, plan.counts_E, token=plan.source, weight=weight, combine=True))
    )
    backward_peak, _ = peak_bytes(lambda: backward(out[0], parts.grad_TD))
    results = sum(leaf.grad.nbytes for leaf in (x_TD, weight, *bank.parameters()))
    bench.clear()
    gathered = len(plan.source) * x_TD.shape[1] * x_TD.element_size()
    return {
        "peak_bytes": peaks,
        "gathered_bytes": gathered,
        "dispatch": {"forward": (forward_peak - kept) / gathered, "backward": (backward_peak - results) / gathered},
    }


def report(results: dict[str, Any]) -> str:
    """The results as markdown tables."""
    machine, blocks = results["machine"], results["blocks"]
    load = "" if machine["load_average"] is None else f", load average before {machine['load_average']:.1f}"
    speed, parts, memory = [], [], []
    for block in blocks:
        shape, rows, ms = block["shape"], block["rows_per_expert"], block["milliseconds"]
        name = [block["block"], block["dtype"]]
        speed.append([
            *name, f"{shape['batch'] * shape['length']} x {shape['dim']}",
            f"{rows['least']} to {rows['most']} of {shape['experts']}",
            *(f"{ms[one]['median']:.2f}" for one in ("dense", "moe", "loop")),
            *(f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" for ratio in block["ratio"].values()),
        ])  # fmt: skip
        dense = block["parts"]["dense"]["median"]
        shares = [100 * block["parts"][part]["median"] / dense for part in (*PARTS, "rest", "layer")]
        parts.append([*name, *(f"{share:.1f}" for share in shares)])
        peaks, dispatch = block["memory"]["peak_bytes"], block["memory"]["dispatch"]
        memory.append([
            *name, *(f"{peaks[one] / 2**20:.1f}" for one in ("dense", "moe", "loop")),
            *(f"{dispatch[way]:.2f}" for way in ("forward", "backward")),
        ])  # fmt: skip
    names = ["block", "dtype"]
    columns = [
        "tokens x D",
        "rows of an expert",
        "dense ms",
        "moe ms",
        "loop ms",
        "moe/dense",
        "loop/dense",
        "moe/loop",
    ]
    return "\n".join([
        f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads, torch {machine['torch']}{load}; "
        f"{results['rounds']} rounds, medians, quartiles in brackets.", "",
        *markdown([*names, *columns], speed), "",
        "Parts, each alone, in % of the dense time (half of its width on every token would be 50):", "",
        *markdown([*names, *PARTS, "rest", "layer"], parts), "",
        "Memory: peak of forward plus backward in MiB; dispatch beyond results, in gathered tokens:", "",
        *markdown([*names, "dense", "moe", "loop", "dispatch forward", "dispatch backward"], memory),
    ])  # fmt: skip


def measure(shapes: dict[str, Shape], dtypes: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Everything, for each shape and dtype, as JSON can hold it."""
    results: dict[str, Any] = {"machine": describe_machine(), "rounds": rounds, "blocks": []}
    for name, shape in shapes.items():
        for dtype in dtypes:
            bench = Bench(shape, DTYPES[dtype])
            results["blocks"].append(
                {"block": name, "dtype": dtype, "shape": dataclasses.asdict(shape)}
                | compare(bench, rounds=rounds)
                | {"parts": time_parts(bench, rounds=rounds), "memory": measure_memory(bench)}
            )
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of each shape and dtype (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write every number into this JSON file")


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1 or args.threads < 1:
        raise ValueError(f"--rounds {args.rounds} --threads {args.threads}: both must be at least 1")
    torch.set_num_threads(args.threads)
    results = measure({name: SHAPES[name] for name in args.shapes}, args.dtypes, rounds=args.rounds)
    print(report(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(results, indent=1) + "\n")
    return 0
