"""What pruning saves: throughput and memory of a pruned model against the full one, at equal batch, in one run.

    python recipes/prune_speed.py                                       an OLMoE with random weights, half its experts
    python recipes/prune_speed.py MODEL PRUNED                          two checkpoints of transformers, or two runs
    python recipes/prune_speed.py MODEL PRUNED --device cuda --dtype bfloat16

Without folders it makes a checkpoint of the sizes asked for, prunes it by the file rewriter to a random half, and opens
both as anybody would. The two take turns, forward by forward, and each pair gives a ratio: the table has the median
times and the median ratio with its quartiles. For a language model a forward is a prompt (batch x length tokens) or one
token of each sequence (few tokens then share the weights that are read); for a diffusion run, a batch of noisy images.

Memory: "held" is the storage of parameters and buffers; "in a forward" what is allocated besides at its peak; "process"
the resident set of a fresh process that opened the model and ran one forward, libraries included (CPU alone).
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatewright.moe.files import write_text
from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.tools.measure import describe_machine, markdown, peak_bytes, spread
from gatewright.tools.prune.run_folder import is_run_folder

PROGRAM = "prune_speed"
WARMUP = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"dim": 512, "hidden": 512, "layers": 4, "experts": 64, "top_k": 8}


def make_checkpoint(folder: Path, sizes: Mapping[str, int]) -> None:
    """An OLMoE of random weights."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["dim"] // 64 or 1,
        num_key_value_heads=sizes["dim"] // 64 or 1,
        num_experts=sizes["experts"],
        num_experts_per_tok=sizes["top_k"],
        norm_topk_prob=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).save_pretrained(folder)


def prune_at_random(folder: Path, out: Path, share: float) -> None:
    from gatewright.tools.prune.apply import apply
    from gatewright.tools.prune.checkpoint import Checkpoint
    from gatewright.tools.prune.layout import Layout
    from gatewright.tools.prune.plan import Plan

    checkpoint = Checkpoint.open(folder)
    model = Layout.of(checkpoint).describe(checkpoint)
    count, draw = max(model["top_k"], round(share * model["num_experts"])), np.random.default_rng(0)
    keep = {layer: sorted(draw.permutation(model["num_experts"])[:count].tolist()) for layer in model["layers"]}
    plan = Plan(model=model, criterion="random", domains={}, policy="slice", keep=keep, top_k=model["top_k"])
    apply(plan, folder, out)


def open_model(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if is_run_folder(folder):
        from gatewright.tools.weights import load_model

        return load_model(folder)[0].to(device, dtype)
    from gatewright.tools.prune.loading import load_model

    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    return load_model(folder, dtype=name, device=str(device)).eval()


def workloads(model: nn.Module, batch: int, length: int) -> dict[str, tuple[Callable[[nn.Module], Any], int]]:
    """What a forward is: by name, the call and how many tokens or images it handles."""
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "blocks"):
        config = model.config
        x = torch.randn(batch, *config.input_shape, generator=generator).to(weight)
        t = 1000 * torch.rand(batch, generator=generator).to(weight)
        labels = torch.randint(config.num_classes, (batch,), generator=generator).to(weight.device)
        key = {"sample_id": torch.arange(batch, device=weight.device), "seed": 0, "step": 0}
        return {f"{batch} images": (lambda model: model(x, t, labels, **key), batch)}
    vocabulary = model.get_input_embeddings().num_embeddings

    def ids(width: int) -> Tensor:
        return torch.randint(vocabulary, (batch, width), generator=generator).to(weight.device)

    prompt, token = ids(length), ids(1)
    return {
        f"prompt, {batch} x {length} tokens": (lambda model: model(prompt, use_cache=False).logits, batch * length),
        f"one token each of {batch}": (lambda model: model(token, use_cache=False).logits, batch),
    }


@torch.inference_mode()
def compare(full: nn.Module, pruned: nn.Module, call: Callable[[nn.Module], Any], rounds: int) -> dict[str, Any]:
    """Times in seconds, pair by pair; who goes first alternates."""
    device = next(full.parameters()).device
    times: dict[str, list[float]] = {"full": [], "pruned": []}
    for number in range(-WARMUP, rounds):
        for name in ("full", "pruned") if number % 2 else ("pruned", "full"):
            begin = _now(device)
            call(full if name == "full" else pruned)
            if number >= 0:
                times[name].append(_now(device) - begin)
    ratios = [a / b for a, b in zip(times["full"], times["pruned"], strict=True)]
    return times | {"speedup": spread(ratios)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_bytes(model: nn.Module) -> int:
    """Of the storages that parameters and buffers live in, each once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.inference_mode()
def forward_bytes(model: nn.Module, call: Callable[[nn.Module], Any]) -> int:
    """The most that one forward allocates at a time."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return peak_bytes(lambda: call(model))[0]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(model)
    return torch.cuda.max_memory_allocated(device) - before


def process_bytes(folder: Path, dtype: str, batch: int, length: int, threads: int) -> int:
    """The resident set of a fresh process that opened a model and ran one forward."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident, (folder, dtype, batch, length, threads))


def _resident(folder: Path, dtype: str, batch: int, length: int, threads: int) -> int:
    torch.set_num_threads(threads)
    model = open_model(folder, torch.device("cpu"), DTYPES[dtype])
    with torch.inference_mode():
        next(iter(workloads(model, batch, length).values()))[0](model)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folders: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    models = {name: open_model(folder, device, DTYPES[args.dtype]) for name, folder in folders.items()}
    calls = workloads(models["full"], args.batch, args.length)
    result: dict[str, Any] = {"machine": describe_machine(), "batch": args.batch, "dtype": args.dtype, "speed": {}}
    for name, (call, count) in calls.items():
        result["speed"][name] = {"count": count} | compare(models["full"], models["pruned"], call, args.rounds)
    first = next(iter(calls.values()))[0]
    result["memory"] = {
        name: {"held": held_bytes(model), "in a forward": forward_bytes(model, first)} for name, model in models.items()
    }
    if device.type == "cpu" and Path("/proc/self/statm").exists():
        models.clear()
        for name, folder in folders.items():
            added = process_bytes(folder, args.dtype, args.batch, args.length, args.threads)
            result["memory"][name]["process"] = added
    return result


def table(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, found in result["speed"].items():
        full, pruned = (spread(found[kind])["median"] for kind in ("full", "pruned"))
        ratio = found["speedup"]
        rows.append(
            [
                name,
                *(f"{1e3 * one:.1f}" for one in (full, pruned)),
                *(f"{found['count'] / one:.0f}" for one in (full, pruned)),
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            ]
        )
    lines = markdown(
        ["forward", "full, ms", "pruned, ms", "full, a second", "pruned, a second", "times as fast (quartiles)"], rows
    )
    memory = [
        [kind, *(f"{result['memory'][name][kind] / 1e6:.1f}" for name in ("full", "pruned"))]
        for kind in result["memory"]["full"]
    ]
    for row, kind in zip(memory, result["memory"]["full"], strict=True):
        row.append(f"{result['memory']['pruned'][kind] / result['memory']['full'][kind]:.2f}")
    return [*lines, "", *markdown(["memory, MB", "full", "pruned", "share"], memory)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="the full model's and the pruned one's")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="of the checkpoint that is made without folders")
    parser.add_argument("--keep", type=float, default=0.5, help="share of its experts that stay")
    parser.add_argument("--batch", type=int, default=8, help="sequences or images a forward")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of forwards of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="also write every number into this JSON file")
    args = parser.parse_args(argv)
    if len(args.folders) not in (0, 2):
        raise ValueError("give two folders, the full model's and the pruned one's, or none")
    for name in ("batch", "length", "rounds", "threads", *SIZES):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: choose at least 1")
    if not 0 < args.keep <= 1:
        raise ValueError(f"--keep {args.keep}: choose a share above 0, at most 1")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory() as workplace:
            folders = args.folders
            if not folders:
                folders = [Path(workplace) / name for name in ("full", "pruned")]
                make_checkpoint(folders[0], {name: getattr(args, name) for name in SIZES})
                prune_at_random(*folders, args.keep)
            result = measure(dict(zip(("full", "pruned"), folders, strict=True)), args)
        if args.out is not None:
            write_text(args.out, json.dumps(result, indent=1))
        print("\n".join(table(result)))
    except MISTAKES as error:
        fail(PROGRAM, describe(error))


if __name__ == "__main__":
    main()
