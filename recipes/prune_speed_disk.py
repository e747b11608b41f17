"""How fast a checkpoint is pruned on disk, in how much memory, and what is left of it when the process is killed.

A made-up checkpoint in the names and types of DeepSeek-V3 (FP8 experts with their block scales, BF16 attention, float32
correction biases) is pruned to half its experts by `gatewright prune apply`, and beside each run the pruned files are
copied and put on the disk, which no rewriting can avoid:

    ratio = seconds to copy and fsync the output's files / seconds to write them by pruning

in pairs, in an order that alternates, reported as their geometric mean. What either reads was read before and lies in
the page cache, and what was written before is on the disk: both are timed for the same thing, moving bytes to the disk.
Peak memory is the pruning process's own (VmHWM). Then a run is killed (SIGKILL) at random moments and started again
until it is done, and the result compared byte for byte with that of the runs that were left alone.

    python recipes/prune_speed_disk.py --gigabytes 8 --shards 20 --kills 10 --folder /data

It takes about three times the checkpoint's size on the disk while it runs, and removes everything afterwards.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gatewright.moe.files import flush_to_disk, write_text
from gatewright.recipes.console import MISTAKES, Parser, fail
from gatewright.tools.prune.checkpoint import BITS, Checkpoint
from gatewright.tools.prune.layout import Layout
from gatewright.tools.prune.plan import Plan
from gatewright.tools.prune.target import Target

PROGRAM = "prune_speed_disk"
EXPERTS, TOP_K, BLOCK = 32, 4, 128
READ = 1 << 22
POOL = 1 << 24  # random bytes that weights are cut from

# Runs the step, then says how long it took and the most memory that the process ever had.
CHILD = """
import re, sys, time
from gatewright.tools.prune.apply import apply
from gatewright.tools.prune.plan import Plan
plan, model, out = sys.argv[1:]
began = time.perf_counter()
apply(Plan.load(plan), model, out)
took = time.perf_counter() - began
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(took, peak, "torch" in sys.modules)
"""


def shapes(hidden: int, width: int, layers: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of every tensor, layer by layer."""

    def scaled(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))

    yield "model.embed_tokens.weight", "BF16", (1024, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{prefix}.self_attn.o_proj.weight", "BF16", (hidden, hidden)
        yield f"{prefix}.mlp.gate.weight", "BF16", (EXPERTS, hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
        for expert in range(EXPERTS):
            for name, rows, columns in (
                ("gate_proj", width, hidden),
                ("up_proj", width, hidden),
                ("down_proj", hidden, width),
            ):
                yield from scaled(f"{prefix}.mlp.experts.{expert}.{name}", rows, columns)
    yield "lm_head.weight", "BF16", (1024, hidden)


def make_checkpoint(folder: Path, gigabytes: float, shards: int, seed: int) -> None:
    """A folder of about this size; the numbers are random bytes."""
    target = gigabytes * 1e9
    hidden, width = (4096, 2048) if gigabytes >= 1 else (512, 256)
    layer = 3 * hidden * width * EXPERTS + 2 * hidden * hidden
    layers = max(1, -(-int(target) // layer))
    tensors = list(shapes(hidden, width, layers))
    total = sum(_nbytes(dtype, shape) for _, dtype, shape in tensors)
    chance = random.Random(seed)
    pool = memoryview(chance.randbytes(POOL))
    files: list[list[tuple[str, str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        files[min(shards - 1, done * shards // total)].append(tensor)
        done += _nbytes(*tensor[1:])
    weight_map = {}
    for number, held in enumerate(files):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        held.sort(key=lambda tensor: -BITS[tensor[1]])  # wide types first, as safetensors writes them
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, dtype, shape in held:
            start, end = end, end + _nbytes(dtype, shape)
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            weight_map[tensor] = name
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / name, "wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            while end:
                begin = chance.randrange(POOL // 2)
                end -= stream.write(pool[begin : begin + min(end, POOL // 2)])
            stream.flush()
            os.fsync(stream.fileno())
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "n_group": 1,
        "topk_group": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = BITS[dtype] // 8
    for length in shape:
        size *= length
    return size


def make_plan(model: Path, seed: int) -> Plan:
    """Half the experts of each layer, at random."""
    checkpoint = Checkpoint.open(model)
    description = Layout.of(checkpoint).describe(checkpoint)
    chance = random.Random(seed)
    keep = {layer: tuple(sorted(chance.sample(range(EXPERTS), EXPERTS // 2))) for layer in description["layers"]}
    return Plan(model=description, criterion="random", domains={}, policy="slice", keep=keep, top_k=TOP_K)


def prune(plan: Path, model: Path, out: Path) -> tuple[float, int, bool]:
    """Seconds, peak bytes, and whether torch was imported, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(plan), str(model), str(out)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, peak, torch_imported = done.stdout.split()
    return float(seconds), int(peak), torch_imported == "True"


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files and put them on the disk."""
    began = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        flush_to_disk(target / file.name)
    flush_to_disk(target)
    return time.perf_counter() - began


def settle(ranges: Iterable[tuple[Path, int, int]]) -> None:
    """Waits for the disk, and reads the parts of files (first byte, one behind the last) that are to be read next."""
    os.sync()
    for path, start, end in ranges:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(start)
            while start < end:
                start += len(stream.read(min(READ, end - start)))


def parts(model: Path, plan: Plan) -> list[tuple[Path, int, int]]:
    """Every part of the model's files that pruning copies."""
    checkpoint = Checkpoint.open(model)
    target = Target.of(checkpoint, Layout.of(checkpoint), plan)
    tensors = (tensor for shard in target.shards for tensor in shard.tensors)
    return [(model / tensor.source.file, *pair) for tensor in tensors for pair in tensor.ranges()]


def whole(folder: Path) -> list[tuple[Path, int, int]]:
    return [(file, 0, file.stat().st_size) for file in sorted(folder.iterdir())]


def kill_and_resume(plan: Path, model: Path, out: Path, *, kills: int, seconds: float, seed: int) -> dict[str, int]:
    """Writes `out` while the process is killed at random moments; a run that arrives too early begins anew."""
    chance = random.Random(seed)
    killed = runs = 0
    while True:
        runs += 1
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(plan), str(model), str(out)], stdout=subprocess.PIPE
        )
        try:
            # Far enough in for progress, early enough that many attempts are needed.
            process.wait(chance.uniform(0.02, 0.4) * seconds if killed < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        finally:
            process.stdout.close()
        if process.returncode:
            raise RuntimeError(f"a resumed run ended with status {process.returncode}")
        if killed >= kills:
            return {"kills": killed, "runs": runs}
        shutil.rmtree(out)


def different(first: Path, second: Path) -> list[str]:
    """Names of files that differ or are in one folder alone."""
    names = {file.name for folder in (first, second) for file in folder.iterdir()}
    return sorted(name for name in names if not _equal(first / name, second / name))


def _equal(first: Path, second: Path) -> bool:
    if not (first.exists() and second.exists()):
        return False
    with open(first, "rb") as one, open(second, "rb") as other:
        while True:
            chunk = one.read(READ)
            if chunk != other.read(READ):
                return False
            if not chunk:
                return True


def measure(
    parent: Path, *, gigabytes: float = 8.0, shards: int = 20, pairs: int = 4, kills: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Everything above in a folder of its own below `parent`, which is removed.

    Raises:
        ValueError: a number that makes no sense, or too little room on the disk.
    """
    if gigabytes <= 0 or shards < 1 or pairs < 2 or pairs % 2 or kills < 0:
        raise ValueError(
            "--gigabytes and --shards are above 0, --pairs is 2, 4, ... for both orders, --kills from 0 on"
        )
    needed, free = 3 * gigabytes * 1e9, shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"{parent} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} are needed: use --folder")
    with tempfile.TemporaryDirectory(prefix=PROGRAM, dir=parent) as name:
        folder = Path(name)
        model, out, plan_file = folder / "model", folder / "out", folder / "plan.json"
        model.mkdir()
        make_checkpoint(model, gigabytes, shards, seed)
        stamps = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
        plan = make_plan(model, seed)
        plan.save(plan_file)
        read_by_pruning = parts(model, plan)
        pruned, copied, peaks, torch_imported = [], [], [], False
        for pair in range(pairs):

            def by_pruning() -> None:
                nonlocal torch_imported
                shutil.rmtree(out, ignore_errors=True)
                settle(read_by_pruning)
                seconds, peak, imported = prune(plan_file, model, out)
                pruned.append(seconds)
                peaks.append(peak)
                torch_imported |= imported

            def by_copying() -> None:
                shutil.rmtree(folder / "copy", ignore_errors=True)
                settle(whole(out))
                copied.append(copy(out, folder / "copy"))

            # There is nothing to copy before the first run.
            for step in (by_pruning, by_copying) if pair % 2 == 0 else (by_copying, by_pruning):
                step()
        shutil.rmtree(folder / "copy")
        bytes_before, bytes_after = Checkpoint.open(model).file_bytes, Checkpoint.open(out).file_bytes
        resumed = kill_and_resume(
            plan_file, model, folder / "killed", kills=kills, seconds=statistics.median(pruned), seed=seed
        )
        return {
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
            "shards": shards,
            "seconds_pruning": pruned,
            "seconds_copying": copied,
            "ratios": [copying / pruning for copying, pruning in zip(copied, pruned, strict=True)],
            "ratio": statistics.geometric_mean(
                copying / pruning for copying, pruning in zip(copied, pruned, strict=True)
            ),
            "peak_bytes": max(peaks),
            "torch_imported": torch_imported,
            **resumed,
            "different_after_kills": different(out, folder / "killed"),
            "source_untouched": stamps == {file.name: file.stat().st_mtime_ns for file in model.iterdir()},
        }


def show(found: Mapping[str, Any]) -> str:
    size = found["bytes_after"] / 1e9
    pruning, copying = (statistics.median(found[f"seconds_{way}"]) for way in ("pruning", "copying"))
    return "\n".join(
        [
            f"{found['bytes_before'] / 1e9:.2f} GB in {found['shards']} files -> {size:.2f} GB",
            f"pruning  {pruning:6.2f} s  {size / pruning:5.2f} GB/s written",
            f"copying  {copying:6.2f} s  {size / copying:5.2f} GB/s written",
            f"speed    {found['ratio']:.2f} of copying (pairs: {', '.join(f'{one:.2f}' for one in found['ratios'])})",
            f"memory   {found['peak_bytes'] / 1e6:.0f} MB at most",
            f"killed   {found['kills']} times in {found['runs']} runs; files that differ: "
            f"{', '.join(found['different_after_kills']) or 'none'}",
        ]
    )


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Time pruning on disk against copying, and kill it on the way.")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=20, help="files that it is in (default: %(default)s)")
    parser.add_argument(
        "--pairs",
        type=int,
        default=4,
        help="times that both are timed, half of them in either order (default: %(default)s)",
    )
    parser.add_argument("--kills", type=int, default=10, help="times that a run is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers here as JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    options = {name: getattr(args, name) for name in ("gigabytes", "shards", "pairs", "kills", "seed")}
    try:
        found = measure(args.folder, **options)
        if args.out is not None:
            write_text(args.out, json.dumps(found, indent=2) + "\n")
    except MISTAKES as error:
        fail(PROGRAM, str(error))
    print(show(found))


if __name__ == "__main__":
    main()
