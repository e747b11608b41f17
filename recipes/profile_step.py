"""Where the time of one training step of ``promoe_dit.py`` goes, and how much of it is outside matrix products.

    python recipes/profile_step.py --size S --batch 16 --threads 2

The step is the recipe's own: the same engine, loss and optimizer, on made-up latents. Time is that of torch's
profiler, which sees an operator's own time, and what an operator calls beneath it:

    experts' products     matrix products inside the experts' operator
    experts' kernel       the rest of that operator: gathering, activations, sums; where it is native, all of it
    other products        linear layers, the router's logits
    attention             scaled dot products
    moving rows           sorting, gathering, scattering, summing by id
    elementwise           activations, norms, losses, copies
    optimizer             AdamW and the averaged weights
    outside operators     Python

A native kernel does its products inside: they are counted from their operations, at the rate of a large product that
is measured in the same run, which is the least they can take.
"""

import collections
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from gatewright.moe import finish_step
from gatewright.moe.files import write_text
from gatewright.moe.hosts.deepspeed_ema import EMA
from gatewright.moe.layer import moe_layers
from gatewright.recipes import promoe_dit
from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.recipes.data.draw import Draw
from gatewright.recipes.models import create_objective, dit_config
from gatewright.tools.measure import describe_machine, markdown, measure_rates

PROGRAM = "profile_step"
WARMUP = 2
LARGEST = 3  # operators named for each kind
STEP, OPTIMIZER, EXPERTS = "training step", "optimizer and average", "gatewright::expert_mlp"
PRODUCTS = {
    f"aten::{name}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "mkldnn_convolution", "convolution_backward")
}
MOVES = (
    *("sort", "index", "gather", "scatter", "take", "embedding_bag", "embedding", "topk", "bincount", "cumsum"),
    *("nonzero", "repeat_interleave", "searchsorted"),
)
KINDS = (
    *("experts' products", "experts' kernel", "other products", "attention", "moving rows", "elementwise"),
    *("optimizer", "outside operators"),
)


def kind_of(event: FunctionEvent) -> str:
    """Which row of the table an event's own time belongs to."""
    ancestors = []
    parent = event
    while parent is not None:
        ancestors.append(parent.name)
        parent = parent.cpu_parent
    experts = any(name.startswith(EXPERTS) for name in ancestors)
    if event.name in PRODUCTS:
        return "experts' products" if experts else "other products"
    if experts:
        return "experts' kernel"
    if OPTIMIZER in ancestors:
        return "optimizer"
    if "scaled_dot_product" in event.name:
        return "attention"
    if not event.name.startswith(("aten::", "gatewright::")):
        return "outside operators"
    plain = event.name.partition("::")[2].strip("_")
    return "moving rows" if plain.startswith(MOVES) else "elementwise"


def profile(args: Any) -> dict[str, Any]:
    """Milliseconds of a step by kind, and how many of them the experts' products take at least."""
    options = ["--size", args.size, "--router", args.router, "--batch", str(args.batch), "--dtype", args.dtype]
    options = promoe_dit.parse([*options, "--zero", str(args.zero)])
    config = dit_config(args.size, args.router)
    promoe_dit.start_process_group()
    engine = promoe_dit.make_engine(options, config)
    model, objective, ema = engine.module, create_objective("flow", config), EMA(engine, decay=options.ema)
    rows = [0]
    for layer in moe_layers(model):
        layer.register_forward_hook(lambda layer, _, out: rows.append(_expert_work(layer, out[1])))

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(args.batch, *config.input_shape, generator=generator)
        labels = torch.randint(config.num_classes, (args.batch,), generator=generator)
        draw = Draw(seed=0, step=number, positions=range(args.batch))
        engine.backward(objective.loss(engine, images, labels, draw).total)
        with torch.profiler.record_function(OPTIMIZER):
            engine.step()
            finish_step(model)
            ema.update(number + 1)

    for number in range(WARMUP):
        step(number)
    found: list[dict[str, dict[str, float]]] = []
    for number in range(WARMUP, WARMUP + args.steps):
        rows.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            with torch.profiler.record_function(STEP):
                step(number)
        found.append(by_operator(profiler.events()))
    flops = sum(rows)
    rates = measure_rates(getattr(torch, args.dtype), torch.device("cpu"))
    middle = sorted(found, key=lambda own: sum(map(sum, map(dict.values, own.values()))))[len(found) // 2]
    return {
        "milliseconds": {kind: sum(own.values()) for kind, own in middle.items()}, "operators": middle,
        "expert_flops": flops, "expert_products_at_least": 1e3 * flops / rates.flops, "rate": rates.flops,
    }  # fmt: skip


def _expert_work(layer: Any, routing: Any) -> int:
    """Operations of a layer's routed and local experts in a step: forward, and twice as many backward."""
    token, _, _ = routing.as_list()
    return 3 * 2 * len(token) * layer.spec.dim * (layer.spec.rows_in + layer.spec.hidden)


def by_operator(events: Any) -> dict[str, dict[str, float]]:
    """Milliseconds of each operator's own time within the step, by kind."""
    own: dict[str, dict[str, float]] = {kind: collections.defaultdict(float) for kind in KINDS}
    for event in events:
        own[kind_of(event)][event.name] += event.self_cpu_time_total / 1e3
    return own


def report(results: dict[str, Any]) -> str:
    ms, machine = results["milliseconds"], results["machine"]
    total = sum(ms.values())
    rows = []
    for kind in KINDS:
        largest = sorted(results["operators"][kind].items(), key=lambda item: -item[1])[:LARGEST]
        named = ", ".join(f"{name.removeprefix('aten::')} {own:.1f}" for name, own in largest if own > 0)
        rows.append([kind, f"{ms[kind]:.1f}", f"{100 * ms[kind] / total:.1f} %", named])
    others = ms["other products"] + ms["experts' products"]
    native = ms["experts' products"] == 0
    least = results["expert_products_at_least"] if native else 0
    outside = [total - others - (ms["experts' kernel"] if native else 0), total - others - least]
    share = sorted({f"{100 * part / total:.1f} %" for part in outside}, key=lambda text: float(text.split()[0]))
    meaning = (
        " (the native kernel counted as products whole, and only for what they take at the rate of a large product, "
        f"{least:.1f} ms)"
        if native
        else ""
    )
    return "\n".join([
        f"One step of promoe_dit.py --size {results['size']}, batch {results['batch']}, {results['dtype']}, "
        f"{machine['threads']} threads, {machine['cpu']}, torch {machine['torch']}: {total:.0f} ms.", "",
        *markdown(["part", "ms", "share", "largest operators, ms"], rows), "",
        f"Outside matrix products: {' to '.join(share)}{meaning}; attention's are not counted as such.",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="S", help="tiny, S, B, L or XL")
    parser.add_argument("--router", default="promoe")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--zero", type=int, default=1, help="DeepSpeed's ZeRO stage")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps; the one of median length is shown")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, help="also write every number into this JSON file")
    args = parser.parse_args(argv)
    if min(args.batch, args.steps, args.threads) < 1:
        parser.error(f"--batch {args.batch} --steps {args.steps} --threads {args.threads}: choose at least 1 of each")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    try:
        results = profile(args) | {"size": args.size, "batch": args.batch, "dtype": args.dtype}
        results["machine"] = describe_machine()
        print(report(results))
        if args.out is not None:
            write_text(args.out, json.dumps(results, indent=1) + "\n")
    except MISTAKES as error:
        fail(PROGRAM, describe(error))


if __name__ == "__main__":
    main()
