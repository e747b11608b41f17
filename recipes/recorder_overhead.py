"""What recording the routing costs: training steps with and without the recorder, in turn, in one process.

    promoe_dit     the diffusion transformer of ``promoe_dit.py`` on made-up images: forward, backward, AdamW
    language       a byte language model of 12 layers with 64 experts each, 8 a byte

Each pair is two steps on equal batches, one recorded and one not, in an order that alternates. Recorded steps include
their share of what happens once a window: the sum over ranks, the copy to the host, the entry in the log. Reported are
the ratio of the mean times minus 1, and the upper end of its 95 % interval (one-sided, by resampling pairs); the log's
bytes a window and a step.

    python recipes/recorder_overhead.py --pairs 400 --threads 2
    python recipes/recorder_overhead.py --device cuda --dtype bfloat16

On a GPU a step is timed to the end of its kernels, and ``torch.cuda.set_sync_debug_mode`` counts whether a recorded
step waits for the device where the same step without the recorder does not.
"""

import dataclasses
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.moe import finish_step
from gatewright.moe.files import write_text
from gatewright.moe.record import Recorder
from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.recipes.data.draw import Draw
from gatewright.recipes.models import DiT, create_objective, dit_config
from gatewright.recipes.models.byte_lm import ByteLM, ByteLMConfig
from gatewright.tools.measure import describe_machine, markdown

PROGRAM = "recorder_overhead"
WARMUP = 5
RESAMPLES = 2000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, and what one step of its training computes."""

    model: nn.Module
    loss: Callable[[int], Tensor]

    def step(self, number: int) -> None:
        self.loss(number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        finish_step(self.model)

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", torch.optim.AdamW(self.model.parameters(), lr=1e-4))


def promoe_dit(device: torch.device, dtype: torch.dtype, *, size: str, batch: int) -> Training:
    """Of the flagship's own model and loss; each batch is drawn from its number."""
    config = dit_config(size, "promoe", **({"input_shape": (1, 28, 28), "num_classes": 10} if size == "tiny" else {}))
    model, objective = DiT(config).to(device, dtype), create_objective("flow", config)

    def loss(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(batch, *config.input_shape, generator=generator).to(device, dtype)
        labels = torch.randint(config.num_classes, (batch,), generator=generator).to(device)
        draw = Draw(seed=0, step=number, positions=range(batch))
        return objective.loss(model, images, labels, draw).total

    return Training(model, loss)


def language(device: torch.device, dtype: torch.dtype, *, dim: int, batch: int, length: int) -> Training:
    options = {"num_experts": 64, "top_k": 8, "balance_weight": 0.01}
    config = ByteLMConfig(dim=dim, depth=12, heads=dim // 32, router="topk", router_options=options, expert_hidden=dim)
    model = ByteLM(config).to(device, dtype)

    def loss(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(256, (batch, length + 1), generator=generator).to(device)
        logits, routings = model(ids[:, :-1])
        routing = torch.stack([routing.loss for routing in routings]).sum()
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()) + routing

    return Training(model, loss)


def measure(training: Training, run: Path, *, pairs: int, every: int) -> dict[str, Any]:
    """Times of both kinds of steps in seconds, pair by pair, and the size of the log."""
    device = next(training.model.parameters()).device
    on, off = [], []
    with Recorder(training.model, run, every=every) as recorder:
        recorded = 0
        for number in range(-WARMUP, pairs):
            for kind in (True, False) if number % 2 else (False, True):
                begin = _now(device)
                if kind:
                    training.step(abs(number))
                    recorder.step(recorded)
                    recorded += 1
                else:
                    with recorder.paused():
                        training.step(abs(number))
                if number >= 0:
                    (on if kind else off).append(_now(device) - begin)
        waits = _waits(training, recorder, recorded) if device.type == "cuda" else None
    size = sum(part.stat().st_size for part in (run / "routing").glob("part-*"))
    return {"on": on, "off": off, "log_bytes": size, "steps": recorded, "waits": waits}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _waits(training: Training, recorder: Recorder, step: int) -> dict[str, int]:
    """How often a step waits for the device, without and with the recorder, the end of a window included."""
    found = {}
    for kind in ("off", "on"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            if kind == "on":
                for number in range(recorder.every):
                    training.step(number)
                    recorder.step(step + number)
            else:
                with recorder.paused():
                    for number in range(recorder.every):
                        training.step(number)
            torch.cuda.set_sync_debug_mode("default")
        found[kind] = sum("synchroniz" in str(warning.message) for warning in said)
    return found


def overhead(on: list[float], off: list[float]) -> dict[str, float]:
    """``mean on / mean off - 1``, its upper 95 % bound, and the median of the pairs' own ratios."""
    both = np.array([on, off])
    drawn = np.random.default_rng(0).integers(0, len(on), (RESAMPLES, len(on)))
    sums = both[:, drawn].sum(-1)
    return {
        "mean": float(both[0].sum() / both[1].sum() - 1),
        "upper": float(np.quantile(sums[0] / sums[1] - 1, 0.95)),
        "median": statistics.median(a / b - 1 for a, b in zip(on, off, strict=True)),
        "step_ms": 1e3 * statistics.median(off),
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=400, help="timed pairs of steps of each model")
    parser.add_argument("--every", type=int, default=10, help="steps a window")
    parser.add_argument("--models", nargs="+", default=["promoe_dit", "language"], help="promoe_dit, language")
    parser.add_argument("--size", default="tiny", help="of the diffusion transformer")
    parser.add_argument("--batch", type=int, default=32, help="its images a step")
    parser.add_argument("--dim", type=int, default=128, help="width of the language model")
    parser.add_argument("--windows", type=int, default=8, help="its windows of 256 bytes a step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, help="also write every number into this JSON file")
    args = parser.parse_args(argv)
    if min(args.pairs, args.every, args.batch, args.windows, args.threads) < 1 or args.dtype not in DTYPES:
        parser.error("choose at least 1 of everything that is counted, and --dtype float32 or bfloat16")
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    makers = {
        "promoe_dit": lambda: promoe_dit(device, dtype, size=args.size, batch=args.batch),
        "language": lambda: language(device, dtype, dim=args.dim, batch=args.windows, length=256),
    }
    unknown = set(args.models) - set(makers)
    if unknown:
        parser.error(f"unknown model {sorted(unknown)[0]}: choose from {', '.join(makers)}")
    rows, results = [], {"machine": describe_machine(), "pairs": args.pairs, "every": args.every}
    try:
        for name in args.models:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(makers[name](), Path(folder), pairs=args.pairs, every=args.every)
            found |= overhead(found["on"], found["off"])
            results[name] = found
            waits = found["waits"] and f"{found['waits']['on'] - found['waits']['off']}"
            rows.append([
                name, f"{found['step_ms']:.1f}", f"{100 * found['mean']:.2f} %", f"{100 * found['upper']:.2f} %",
                f"{100 * found['median']:.2f} %", f"{found['log_bytes'] / found['steps']:.0f}", waits or "-",
            ])  # fmt: skip
        if args.out is not None:
            write_text(args.out, json.dumps(results) + "\n")
    except MISTAKES as error:
        fail(PROGRAM, describe(error))
    head = ["model", "step ms", "overhead", "upper 95 %", "median", "log bytes a step", "waits of its own"]
    print("\n".join(markdown(head, rows)))


if __name__ == "__main__":
    main()
