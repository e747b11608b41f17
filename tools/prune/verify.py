"""Proves a pruned checkpoint: its bytes are the source's, it loads, it computes what the masked model does.

    V0  every output tensor equals its slice of the source byte for byte; names, types, shapes and index are exact;
        config.json differs from the source's in its counts alone; every other file is carried; experts are numbered
        from 0 and are as many as router rows and as config.json says, by which engines build their models
    V1  transformers loads it with no missing, unexpected or mismatched key
    V2  its logits equal those of the full model held to the kept experts, bit for bit on the CPU
    V3  the plan in the folder is the one given, and replaying it gives the same headers, texts and files

V0 works each tensor's slice out once more from the names, on its own: a mistake in `target` is found here, not
repeated. V0 and V3 read files in chunks and import no torch; V1 and V2 are in `verify_model`.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import BITS, CONFIG, INDEX, Checkpoint, TensorEntry, readable_size
from .families import COUNT_KEYS, COUPLED_KEYS, text_config_path
from .layout import EXPERT, Layout
from .run_folder import is_run_folder
from .target import EXPERT_MAP, PLAN, Target

if TYPE_CHECKING:
    from .plan import Plan

CHUNK = 4 << 20
SHOWN = 10  # problems of one kind that are listed one by one

LEVELS = ("V0", "V1", "V2", "V3")


@dataclass(frozen=True)
class Check:
    """The outcome of one level.

    Attributes:
        level: "V0", ...
        summary: what was compared, in one line.
        problems: what is wrong; empty if `passed`.
    """

    level: str
    passed: bool
    summary: str
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = [f"    {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            shown.append(f"    and {len(self.problems) - SHOWN} more")
        return "\n".join([f"{self.level}  {'passed' if self.passed else 'FAILED'}  {self.summary}", *shown])


def verify(
    plan: "Plan", model: str | os.PathLike, pruned: str | os.PathLike, *, levels: Sequence[str] = LEVELS
) -> tuple[Check, ...]:
    """Holds the folder `pruned` to the plan and the source.

    Raises:
        ValueError: an unknown level; a source that cannot be pruned by this plan.
        FileNotFoundError: a folder is not there.
    """
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise ValueError(f'there is no level "{unknown[0]}": choose from {", ".join(LEVELS)}')
    model, pruned = Path(model), Path(pruned)
    if not pruned.is_dir():
        raise FileNotFoundError(f"{pruned} is not a folder: name what `gatewright prune apply` wrote")
    checks = []
    for level in LEVELS:
        if level not in levels:
            continue
        if level == "V0":
            checks.append(check_bytes(plan, model, pruned))
        elif level == "V3":
            checks.append(check_replay(plan, model, pruned))
        else:
            from . import verify_model

            if level == "V1":
                checks.append(verify_model.check_loads(pruned))
            else:
                checks.append(verify_model.check_logits(plan, model, pruned))
    return tuple(checks)


# -------------------------------------------------------------------------------------------------------------- bytes


def check_bytes(plan: "Plan", model: Path, pruned: Path) -> Check:
    """V0. `passed` means that every byte of every file was read and is what it has to be."""
    source = Checkpoint.open(model)
    layout = Layout.of(source)
    try:
        output = Checkpoint.open(pruned)
    except (ValueError, FileNotFoundError) as error:
        return Check("V0", False, "the folder cannot be read", (str(error),))
    expected = dict(_expected(source, layout, plan))
    problems = [f"{name} is missing" for name in expected.keys() - output.tensors.keys()]
    problems += [f"{name} should not be there" for name in output.tensors.keys() - expected.keys()]
    compared = 0
    with _Files(source) as before, _Files(output) as after:
        for name, (entry, axis, rows) in expected.items():
            found = output.tensors.get(name)
            if found is None:
                continue
            shape = entry.shape if rows is None else (*entry.shape[:axis], len(rows), *entry.shape[axis + 1 :])
            if (found.dtype, found.shape) != (entry.dtype, shape):
                problems.append(
                    f"{name} is {found.dtype} {list(found.shape)} and not {entry.dtype} {list(shape)}, as {entry.name}"
                )
            elif not _same(before, entry, axis, rows, after, found):
                part = "" if rows is None else f" at {len(rows)} of its rows"
                problems.append(f"{name} differs from {entry.name}{part}")
            compared += found.nbytes
    problems += _compare_config(source, output, layout, plan)
    problems += _check_counts(output, plan)
    problems += _compare_others(source, output)
    summary = f"{len(expected)} tensors, {readable_size(compared)}, compared byte for byte with the source"
    return Check("V0", not problems, summary, tuple(problems))


def _expected(
    source: Checkpoint, layout: Layout, plan: "Plan"
) -> Iterator[tuple[str, tuple[TensorEntry, int, tuple[int, ...] | None]]]:
    """The name of each output tensor -> the source tensor, and the rows along an axis that it is."""
    keep = {layer.prefix: plan.keep[layer.index] for layer in layout.layers}
    gone: tuple[str, ...] = ()
    if plan.mtp == "prune":
        keep |= {layer.prefix: plan.mtp_keep[layer.index] for layer in layout.mtp_layers}
    elif plan.mtp == "strip":
        gone = layout.mtp_tensors
    routers = {name: (axis, layer.prefix) for layer in layout.layers for name, axis in layer.router_tensors}
    routers |= {name: (axis, layer.prefix) for layer in layout.mtp_layers for name, axis in layer.router_tensors}
    fused = {name: layer.prefix for layer in (*layout.layers, *layout.mtp_layers) for name in layer.fused_tensors}
    for name in source.tensors.keys() - set(gone):
        entry = source.tensors[name]
        match = EXPERT.fullmatch(name)
        if name in routers and plan.policy != "keep-rows":
            axis, prefix = routers[name]
            extra = range(layout.num_experts, entry.shape[axis])
            yield name, (entry, axis, (*keep[prefix], *extra))
        elif name in fused:
            yield name, (entry, 0, keep[fused[name]])
        elif match is None or match["block"] not in keep:
            yield name, (entry, 0, None)
        elif int(match["expert"]) in keep[match["block"]]:
            place = keep[match["block"]].index(int(match["expert"]))
            yield f"{match['block']}.experts.{place}.{match['rest']}", (entry, 0, None)


class _Files:
    """A checkpoint's files, opened when they are first read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._open: dict[str, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, file: str, start: int, length: int) -> bytes:
        if file not in self._open:
            self._open[file] = os.open(self._folder / file, os.O_RDONLY)
        return os.pread(self._open[file], length, start)


def _same(
    before: _Files, entry: TensorEntry, axis: int, rows: tuple[int, ...] | None, after: _Files, found: TensorEntry
) -> bool:
    at = found.start
    for start, end in _pieces(entry, axis, rows):
        for here in range(start, end, CHUNK):
            length = min(CHUNK, end - here)
            if before.read(entry.file, here, length) != after.read(found.file, at, length):
                return False
            at += length
    return at == found.end


def _pieces(entry: TensorEntry, axis: int, rows: tuple[int, ...] | None) -> Iterator[tuple[int, int]]:
    if rows is None:
        yield entry.start, entry.end
        return
    row = math.prod(entry.shape[axis + 1 :]) * BITS[entry.dtype] // 8
    block = entry.shape[axis] * row
    for start in range(entry.start, entry.end, block):
        for index in rows:
            yield start + index * row, start + (index + 1) * row


def _compare_config(source: Checkpoint, output: Checkpoint, layout: Layout, plan: "Plan") -> list[str]:
    """config.json says the new counts, and differs in nothing that has to do with something else."""
    problems = []
    text = output.config
    for key in text_config_path(source.config):
        text = text.get(key, {})
    wanted = [
        (COUNT_KEYS, plan.count, layout.num_experts),
        (layout.family.top_k_keys, plan.top_k, layout.top_k),
        (layout.family.group_keys, plan.num_groups, layout.num_groups),
        (layout.family.topk_group_keys, plan.topk_group, layout.topk_group),
    ]
    for keys, after, before in wanted:
        said = {key: text[key] for key in keys if text.get(key) is not None}
        for key, value in said.items():
            if value != after and value != [after] * (len(value) if isinstance(value, list) else 0):
                problems.append(f"{CONFIG}: {key} is {value} and not {after}")
        if not said and after != before:
            problems.append(f"{CONFIG} does not say {keys[0]} = {after}")
    if plan.mtp == "strip":
        problems += [f"{CONFIG}: {key} is {text[key]} and not 0" for key in layout.family.mtp_keys if text.get(key)]
    changed = {
        *COUNT_KEYS,
        *COUPLED_KEYS,
        *layout.family.top_k_keys,
        *layout.family.group_keys,
        *layout.family.topk_group_keys,
        *layout.family.mtp_keys,
    }
    problems += _compare_values(source.config, output.config, "", changed)
    return problems


def _check_counts(output: Checkpoint, plan: "Plan") -> list[str]:
    """What every engine builds its model by: one count in config.json, that many experts from 0 on and router rows."""
    if plan.policy == "keep-rows":
        return []
    try:
        layout = Layout.of(output)
    except ValueError as error:
        return [str(error)]
    said = (layout.num_experts, layout.top_k, layout.num_groups, layout.topk_group)
    wanted = (plan.count, plan.top_k, plan.num_groups, plan.topk_group)
    return [] if said == wanted else [f"experts, top-k, groups and chosen groups are {said} and not {wanted}"]


def _compare_values(before: dict, after: dict, place: str, changed: set[str]) -> Iterator[str]:
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if key in changed or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _compare_values(old, new, f"{place}{key}.", changed)
        elif "experts." not in json.dumps(old):  # lists that name experts one by one are held to the plan by V3
            yield f"{CONFIG}: {place}{key} was changed"


def _compare_others(source: Checkpoint, output: Checkpoint) -> list[str]:
    problems = []
    for file in source.others:
        if file in (PLAN, EXPERT_MAP):
            continue
        if not (output.folder / file).is_file():
            problems.append(f"{file} was not carried")
            continue
        old, new = (folder / file for folder in (source.folder, output.folder))
        if not _same_files(old, new) and not (file.endswith(".json") and "experts." in old.read_text(errors="replace")):
            problems.append(f"{file} differs from the source's")
    extra = set(output.others) - set(source.others) - {PLAN, EXPERT_MAP}
    problems += [f"{file} was not in the source" for file in sorted(extra)]
    if output.index is not None:
        said = (output.index.get("metadata") or {}).get("total_size")
        if said != output.data_bytes:
            problems.append(f"{INDEX} says a total_size of {said} and not {output.data_bytes}")
    return problems


def _same_files(first: Path, second: Path) -> bool:
    if first.stat().st_size != second.stat().st_size:
        return False
    with open(first, "rb") as one, open(second, "rb") as other:
        while chunk := one.read(CHUNK):
            if chunk != other.read(CHUNK):
                return False
    return True


# ------------------------------------------------------------------------------------------------------------- replay


def check_replay(plan: "Plan", model: Path, pruned: Path) -> Check:
    """V3. What the plan gives today, byte for byte but for the weights' data, which is V0's."""
    from .plan import Plan

    problems = []
    if not (pruned / PLAN).is_file():
        problems.append(f"{PLAN} is missing")
    else:
        try:
            carried = Plan.load(pruned / PLAN)
        except ValueError as error:
            problems.append(str(error))
        else:
            if carried.hash != plan.hash:
                problems.append(f"{PLAN} has the hash {carried.hash[:12]} and the plan given {plan.hash[:12]}")
    source = Checkpoint.open(model)
    target = Target.of(source, Layout.of(source), plan)
    for shard in target.shards:
        path = pruned / shard.file
        if not path.is_file():
            problems.append(f"{shard.file} is missing")
            continue
        with open(path, "rb") as stream:
            header = stream.read(len(shard.header))
        if header != shard.header:
            problems.append(f"{shard.file} has another header")
        elif path.stat().st_size != shard.size:
            problems.append(f"{shard.file} has {path.stat().st_size} bytes and not {shard.size}")
    for file, text in target.texts.items():
        path = pruned / file
        if file != PLAN and (not path.is_file() or path.read_bytes() != text.encode()):
            problems.append(f"{file} is missing" if not path.is_file() else f"{file} has another content")
    summary = f"the plan {plan.hash[:12]} gives these {len(target.shards)} headers and {len(target.texts)} files again"
    return Check("V3", not problems, summary, tuple(problems))


# ------------------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="what `gatewright prune plan` wrote")
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="the checkpoint that was pruned")
    parser.add_argument("--pruned", type=Path, required=True, metavar="DIR", help="what `gatewright prune apply` wrote")
    parser.add_argument(
        "--levels",
        nargs="+",
        default=list(LEVELS),
        choices=LEVELS,
        help="V0: bytes; V1: loads; V2: logits equal the masked model's; V3: the plan replays (default: all; V0 and V3 "
        "need neither torch nor memory)",
    )


def run(args: argparse.Namespace) -> int:
    from .plan import Plan

    plan = Plan.load(args.plan)
    if is_run_folder(args.model):
        from . import runs

        outcome = runs.verify(plan, args.model, args.pruned)
        for level, passed in outcome.items():
            print(f"{level}  {'passed' if passed else 'FAILED'}")
        return 0 if all(outcome.values()) else 1
    checks = verify(plan, args.model, args.pruned, levels=args.levels)
    for check in checks:
        print(check)
    return 0 if all(check.passed for check in checks) else 1
