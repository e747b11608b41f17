"""Everything about the kernels that only a GPU can tell, in one command.

Checked: values and gradients of ``triton`` and ``torch`` against float64 (``tools.expert_case``), fresh memory filled
with NaN, with every tile size that the tuner may choose; that layers with a fixed number of experts a token never wait
for the device (``torch.cuda.set_sync_debug_mode``), forward and backward, and replay from a CUDA graph with other
counts; that other counts compile nothing; what is kept for backward; ``torch.compile`` and recomputation.

Timed, by ``tools.bench``: its rows for GPUs in bfloat16, against the dense layer and every peer that is installed, with
peak memory; above its tables stands what share of the rate of a large matrix product, measured in the same run, each
row reaches.

    gatewright check-gpu --out here/gpu.json            also writes here/gpu.md
    gatewright check-gpu --checks-only                  or --times-only
    gatewright check-gpu --interpret                    the checks of values, in Triton's interpreter, without a GPU

The exit status is 0 where every check passed, 1 where one did not, 2 where there is no GPU.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.activation import ACTIVATIONS
from ..moe import ExpertSpec, FeedForward, MoELayer
from ..moe.files import write_text
from ..routers import TokenContext, create_router
from .expert_case import TOLERANCE, VARIANTS, ExpertCase, relative_error, too_far
from .measure import describe_machine, markdown

INTERPRET = "TRITON_INTERPRET"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TF32_TOLERANCE = 2e-3
# fixed-k routers with every kind of expert between them
ROUTERS = {
    "topk": {"top_k": 2},
    "promoe": {"top_k": 1},
    "moe_plus_plus": {"top_k": 2},
}
OURS, YARDSTICK = "gatewright", "dense"
COARSE_EXPERTS, COARSE_SHARE = 16, 0.8
# what linkedin/Liger-Kernel#1294 reports of its Triton kernels at this shape on an H100, as published there
PUBLISHED = {"forward": 501e12, "both": 413e12}
PUBLISHED_SHAPE = {"tokens": 32768, "dim": 2048, "hidden": 768, "experts": 128, "top_k": 8}
Check = Callable[[torch.device], str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one check: what it found, or what went wrong."""

    name: str
    passed: bool
    detail: str
    seconds: float


def cases(interpreted: bool) -> Iterator[ExpertCase]:
    """Odd and aligned sizes, every activation, with and without each operand."""
    if interpreted:
        for i, activation in enumerate(ACTIVATIONS):
            yield ExpertCase([17, 0, 5], 8, 19, 20, activation, bias=i % 2 == 0, variant=VARIANTS[i % 3], nobody=i)
        return
    for i, activation in enumerate(ACTIVATIONS):
        for variant in VARIANTS if activation == "swiglu" else VARIANTS[i % 3 :][:1]:
            yield ExpertCase([300, 0, 70, 537, 64], 256, 96, 160, activation, variant=variant)
    for bias, weighted in itertools.product((False, True), repeat=2):
        yield ExpertCase([130, 1, 0, 255, 128], 200, 40, 104, "swiglu", bias, weighted, nobody=77)
    for dim, hidden in ((8, 16), (520, 264), (1024, 512)):
        yield ExpertCase([130, 1, 0, 255, 128], 200, dim, hidden, "swiglu", nobody=77)
    for counts in ([1], [0, 128], [2000], [0, 0, 0], [3] * 130):
        yield ExpertCase(counts, 17, 64, 96, "geglu", nobody=5)


def unaligned_cases() -> Iterator[ExpertCase]:
    """Widths whose rows are no multiple of 16 bytes: for ``triton`` alone."""
    for activation, (dim, hidden) in itertools.product(("gelu_tanh", "swiglu"), ((19, 37), (129, 65))):
        yield ExpertCase([300, 0, 71], 100, dim, hidden, activation)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, and no tile size is chosen by time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def only_candidate(number: int) -> Iterator[None]:
    """The tuner has but the ``number``-th of its candidates."""
    from ..kernels import triton_tuning

    every = triton_tuning.candidates

    def one(*args: Any) -> tuple:
        found = every(*args)
        return (found[number % len(found)],)

    triton_tuning.candidates = one
    try:
        yield
    finally:
        triton_tuning.candidates = every


def compare(backend: str, dtype: torch.dtype, chosen: Iterator[ExpertCase], device: torch.device) -> str:
    """Raises AssertionError where an error is above what is allowed. -> the largest"""
    worst, count = 0.0, 0
    for case in chosen:
        # relu's kink: a bias that is added to a rounded product, as grouped_mm's must be, can round across it
        if backend == "torch" and case.activation == "relu":
            case = dataclasses.replace(case, bias=False)
        errors = case.errors(dtype, backend, device=device)
        far = _few_rows(case, too_far(errors, dtype), dtype)
        assert not far, f"{case}: error and the reference's own: {far}"
        worst = max([worst, *(error for error, _ in errors.values())])
        count += 1
    return f"{count} cases, largest error {worst:.1e}"


def _few_rows(case: ExpertCase, far: dict, dtype: torch.dtype) -> dict:
    """Without what is still within four times the tolerance, where so few rows average no rounding out."""
    if sum(case.counts) >= 64:
        return far
    return {name: pair for name, pair in far.items() if not pair[0] <= 4 * TOLERANCE[dtype]}


def check_values(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    with poisoned():
        return compare(backend, dtype, cases(device.type == "cpu"), device)


def check_unaligned(dtype: torch.dtype, device: torch.device) -> str:
    with poisoned():
        return compare("triton", dtype, unaligned_cases(), device)


def check_candidates(dtype: torch.dtype, device: torch.device) -> str:
    found = []
    for number in range(5):
        with poisoned(), only_candidate(number):
            activations = ("swiglu", "gelu") if dtype == torch.bfloat16 else ("swiglu",)
            chosen = (ExpertCase([300, 0, 70, 537, 64], 256, 128, 320, name) for name in activations)
            found.append(compare("triton", dtype, chosen, device))
    return f"tile sizes by number: {'; '.join(found)}"


def check_tf32(device: torch.device) -> str:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        case = ExpertCase([300, 0, 70, 537, 64], 256, 256, 320)
        # the reference in float64 is not touched by it
        exact = case.run(torch.float32, "reference", compute=torch.float64, device=device)
        errors = {
            name: relative_error(value, exact[name])
            for name, value in case.run(torch.float32, "triton", device=device).items()
        }
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert max(errors.values()) <= TF32_TOLERANCE, errors
    assert max(errors.values()) > TOLERANCE[torch.float32], f"no product was in tf32: {errors}"
    return f"largest error {max(errors.values()):.1e}"


def check_compiled(device: torch.device) -> str:
    """torch.compile over the whole call, and recomputation: the same numbers."""
    case = ExpertCase([33, 0, 20], 16, 32, 48, nobody=3)
    plain = case.run(torch.float32, "triton", device=device)
    torch._dynamo.reset()
    calls: dict[str, Callable[..., Tensor]] = {
        "compiled": torch.compile(case.call, backend="aot_eager", fullgraph=True),
        "recomputed": lambda *inputs: checkpoint(case.call, *inputs, use_reentrant=False),
    }
    for how, call in calls.items():
        leaves, token, dy = case.tensors(torch.float32, device)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = call(leaves, token, "triton")
        out.backward(dy)
        values = [out.detach(), *(leaf.grad for leaf in leaves)]
        for (name, expected), value in zip(plain.items(), values, strict=True):
            assert torch.equal(value, expected), f"{name} differs when {how}"
    return "bitwise equal"


def check_kept(device: torch.device) -> str:
    """What is kept for backward: the tokens and the pre-activation, and the routing."""
    case = ExpertCase([150, 0, 70, 36], 128, 64, 96)
    leaves, token, _ = case.tensors(torch.bfloat16, device)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.call(leaves, token, "triton")
    parameters = {id(leaf) for leaf in leaves[1:]}
    size = sum(tensor.nbytes for tensor in kept if id(tensor) not in parameters and tensor.is_floating_point())
    least = 2 * (128 * 64 + 256 * 192)
    assert size == least, f"{size} bytes are kept, and 2 T D + 4 N H = {least}"
    return f"{size} bytes = 2 T D + 4 N H"


def make_layer(name: str, backend: str | None, device: torch.device) -> tuple[MoELayer, TokenContext, Tensor]:
    """A layer of every kind of expert that the router knows, with a shared one; 4 samples of 128 tokens."""
    torch.manual_seed(0)
    router = create_router(name, dim=64, num_experts=8, **ROUTERS[name])
    spec = ExpertSpec(64, 96, bias=True)
    layer = MoELayer(router, spec, shared=FeedForward(spec), backend=backend).to(device, torch.bfloat16).train()
    x = torch.randn(4, 128, 64, device=device, dtype=torch.bfloat16)
    null_mask = torch.tensor([False, True, False, True], device=device)
    return layer, TokenContext.for_tokens(x, null_mask=null_mask), x


def gradients(layer: MoELayer, context: TokenContext, x: Tensor) -> list[Tensor]:
    """The output, then the gradients of its product with x and of the losses, in x and in every parameter used."""
    y, routing = layer(x, context)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    loss = (y.float() * x.detach()).sum() + routing.loss
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [y.detach(), *(gradient for gradient in found if gradient is not None)]


def check_no_wait(backend: str, device: torch.device) -> str:
    for name in ROUTERS:
        layer, context, x = make_layer(name, backend, device)
        x.requires_grad_()
        gradients(layer, context, x)  # compiles and tunes
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(layer, context, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return f"forward and backward with {', '.join(ROUTERS)}"


def check_graph(backend: str, device: torch.device) -> str:
    """A layer captured once gives with other tokens, and so other counts, what it gives without a graph."""
    worst = 0.0
    for name in ROUTERS:
        layer, context, x = make_layer(name, backend, device)
        x.requires_grad_()
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(3):
                gradients(layer, context, x)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(layer, context, x)
        for seed in range(3):
            generator = torch.Generator(device).manual_seed(seed)
            with torch.no_grad():
                x.copy_(torch.randn(x.shape, generator=generator, device=device) + seed)
            graph.replay()
            expected = gradients(layer, context, x.detach().clone().requires_grad_())
            for value, one in zip(captured, expected, strict=True):
                worst = max(worst, relative_error(value, one.double()))
    assert worst <= TOLERANCE[torch.bfloat16], f"replayed and eager results are {worst:.1e} apart"
    return f"3 replays with {', '.join(ROUTERS)}, at most {worst:.1e} from eager"


def check_no_recompilation(device: torch.device) -> str:
    """Other counts, and other numbers of rows of the same magnitude, compile nothing and tune nothing."""
    from ..kernels import triton_kernels

    def compiled() -> int:
        every = (kernel for kernel in vars(triton_kernels).values() if hasattr(kernel, "device_caches"))
        return sum(len(caches[0]) for kernel in every for caches in kernel.device_caches.values())

    def run(counts: list[int]) -> None:
        ExpertCase(counts, 100, 64, 96).run(torch.bfloat16, "triton", device=device)

    run([300, 0, 300])
    before = compiled()
    assert before, "no kernel was compiled"
    for counts in ([600, 0, 0], [1, 2, 597], [200, 200, 201], [333, 333, 333]):
        run(counts)
    assert compiled() == before, f"{compiled() - before} kernels were compiled again"
    return f"{before} kernels"


def checks_of_values(dtypes: dict[str, torch.dtype], interpreted: bool) -> dict[str, Check]:
    found: dict[str, Check] = {}
    for (name, dtype), backend in itertools.product(dtypes.items(), ("triton", "torch")):
        if backend == "triton" or not interpreted:
            found[f"values, {backend}, {name}"] = lambda device, b=backend, d=dtype: check_values(b, d, device)
    found["compile and recompute, triton"] = check_compiled
    found["kept for backward, triton"] = check_kept
    return found


def checks_of_a_gpu() -> dict[str, Check]:
    found: dict[str, Check] = {
        f"every tile size, triton, {name}": lambda device, d=dtype: check_candidates(d, device)
        for name, dtype in DTYPES.items()
    }
    for name, dtype in DTYPES.items():
        found[f"rows of any width, triton, {name}"] = lambda device, d=dtype: check_unaligned(d, device)
    found["tf32 on request, triton"] = check_tf32
    found["no recompilation, triton"] = check_no_recompilation
    for backend in ("triton", "torch"):
        found[f"no wait for the device, {backend}"] = lambda device, b=backend: check_no_wait(b, device)
        found[f"CUDA graph, {backend}"] = lambda device, b=backend: check_graph(b, device)
    return found


def run_checks(checks: dict[str, Check], device: torch.device, say: Callable[[str], None]) -> list[Outcome]:
    outcomes = []
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            passed, detail = True, check(device)
        except Exception as error:  # whatever a GPU does: the other checks still tell something
            passed, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
        outcomes.append(Outcome(name, passed, detail, time.perf_counter() - start))
        say(f"{'passed' if passed else 'FAILED'}  {name}: {detail}")
    return outcomes


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    import triton

    found = describe_machine(device) | {"triton": triton.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def rates_table(results: dict[str, Any]) -> list[str]:
    """What each contestant reaches of the rate of a large matrix product, measured in the same run."""
    rows = []
    for cell in results["cells"]:
        product = results["rates"][cell["dtype"]]["flops"]
        for name, own in cell["layer"]["changing"]["entrants"].items():
            costs = cell["costs"]["dense" if name == "dense" else "layer"]
            flops = {way: costs[way]["flops"] for way in ("forward", "backward")}
            forward = flops["forward"] / own["forward"]["median"] * 1e3
            step = sum(flops.values()) / own["step"]["median"] * 1e3
            rows.append([
                cell["row"], cell["dtype"], name, f"{forward / 1e12:.0f}", f"{step / 1e12:.0f}",
                f"{forward / product:.2f}", f"{step / product:.2f}",
            ])  # fmt: skip
    head = ["row", "dtype", "layer", "forward TFLOP/s", "both TFLOP/s", "forward / product", "both / product"]
    return markdown(head, rows)


def goals_table(results: dict[str, Any]) -> list[str]:
    """What was aimed at, and what was found: against the product's rate, published figures and every peer."""
    rows = []
    for cell in results["cells"]:
        entrants, memory = cell["layer"]["changing"]["entrants"], cell["memory"]
        peers = [name for name in entrants if name not in (OURS, YARDSTICK)]
        costs, own = cell["costs"]["layer"], entrants[OURS]
        forward = costs["forward"]["flops"] / own["forward"]["median"] * 1e3
        both = (costs["forward"]["flops"] + costs["backward"]["flops"]) / own["step"]["median"] * 1e3
        share = both / results["rates"][cell["dtype"]]["flops"]
        found = []
        if cell["shape"]["experts"] <= COARSE_EXPERTS:
            found.append((f"both at {COARSE_SHARE} of the product's rate", f"{share:.2f}", share >= COARSE_SHARE))
        if cell["shape"] == PUBLISHED_SHAPE:
            fast = forward >= PUBLISHED["forward"] and both >= PUBLISHED["both"]
            aim = " and ".join(f"{way} at {rate / 1e12:.0f}" for way, rate in PUBLISHED.items())
            found.append((f"{aim} TFLOP/s", f"{forward / 1e12:.0f} and {both / 1e12:.0f}", fast))
        slower = [name for name in peers if cell["layer"]["changing"]["ratios"][name]["step"]["low"] > 1]
        found.append(("no slower than any peer", f"slower than {', '.join(slower) or 'none'}", not slower))
        less = [name for name in peers if memory[name]["peak"] < memory[OURS]["peak"]]
        found.append(("no more memory than any peer", f"more than {', '.join(less) or 'none'}", not less))
        rows += [[cell["row"], cell["dtype"], aim, value, "met" if met else "missed"] for aim, value, met in found]
    return markdown(["row", "dtype", "goal", "found", ""], rows)


def report(results: dict[str, Any]) -> str:
    """Everything as markdown."""
    machine = results["machine"]
    where = machine["gpu"] or f"Triton's interpreter on {machine['cpu']}"
    lines = [f"{where}, torch {machine['torch']}, triton {machine['triton']}, CUDA {machine['cuda']}.", ""]
    outcomes = [
        [one["name"], "passed" if one["passed"] else "FAILED", one["detail"].replace("|", "/"), f"{one['seconds']:.0f}"]
        for one in results["checks"]
    ]
    lines += markdown(["check", "outcome", "found", "s"], outcomes)
    if results["times"] is not None:
        from .bench import report as bench_report

        lines += ["", "Counted operations over the time, counts changing every step:", ""]
        lines += [*rates_table(results["times"]), "", *goals_table(results["times"]), ""]
        lines.append(bench_report(results["times"]))
    return "\n".join(lines)


def measure_times(device: torch.device, minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    from . import bench
    from .peers import CONTESTANTS

    rows = {name: bench.ROWS[name] for name in bench.USUAL_ROWS["cuda"]}
    names = [name for name in CONTESTANTS if name not in (bench.OURS.name, bench.YARDSTICK.name)]
    return bench.measure(rows, bench.USUAL_DTYPES["cuda"], names, device, minutes=minutes, rounds=1000, say=say)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything into this JSON file, and .md beside")
    parser.add_argument("--minutes", type=float, default=10, help="for the timed races (default: 10)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--checks-only", action="store_true", help="time nothing")
    only.add_argument("--times-only", action="store_true", help="check nothing")
    only.add_argument(
        "--interpret", action="store_true", help="check values on the CPU, in Triton's interpreter; time nothing"
    )


def run(args: argparse.Namespace) -> int:
    if args.out is not None and args.out.suffix != ".json":
        raise ValueError(f"--out {args.out}: name a file that ends in .json; the tables go beside it")
    if args.minutes <= 0:
        raise ValueError(f"--minutes {args.minutes:g}: choose more than 0")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.interpret:
        if os.environ.get(INTERPRET) != "1":
            # Triton decides at its import, and torch has imported it
            command = [sys.executable, "-m", "gatewright.tools.cli", "check-gpu", "--interpret"]
            command += ["--out", str(args.out)] if args.out is not None else []
            return subprocess.run(command, env=os.environ | {INTERPRET: "1"}).returncode
        device, checks = torch.device("cpu"), checks_of_values({name: DTYPES[name] for name in ("fp32", "fp16")}, True)
    else:
        if not torch.cuda.is_available():
            say("gatewright check-gpu: no GPU is here; --interpret checks values in Triton's interpreter")
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
        checks = {} if args.times_only else checks_of_values(DTYPES, False) | checks_of_a_gpu()
    outcomes = run_checks(checks, device, say)
    results = {
        "machine": describe(device), "checks": [dataclasses.asdict(outcome) for outcome in outcomes], "times": None,
    }  # fmt: skip
    _write(results, args.out)  # what was found so far, should timing break off
    if not args.interpret and not args.checks_only:
        results["times"] = measure_times(device, args.minutes, say)
        _write(results, args.out)
    print(report(results))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _write(results: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(results, indent=1) + "\n")
        write_text(out.with_suffix(".md"), report(results) + "\n")
