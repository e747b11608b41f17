"""What a checkpoint is and what a plan would leave of it, from headers alone: bytes on the disk, in memory, on a GPU.

    saved = sum over layers of (N - M) * (bytes of one expert, scales and biases included + its rows of the router)

`inspect` answers before anything is collected, `dry_run` for a plan. Nothing but headers and `config.json` is read, so
both take seconds whatever the size.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, readable_size
from .families import text_config
from .layout import EXPERT, Layout
from .run_folder import is_run_folder
from .target import Target

if TYPE_CHECKING:
    from .plan import Plan

# Bytes of a number of the rotary table, by the configuration's dtype.
_WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Sizes:
    """Bytes before or after.

    Attributes:
        files: of the safetensors files, headers included.
        tensors: of the tensors as they are stored, which is what they take in memory.
        experts: of `tensors`, the routed experts' share.
        gpu: number of GPUs -> bytes on the fullest, split by tensor parallelism: matrices divide, vectors and routers
            are on all, and so is the rotary table that engines keep (positions x rotary width); an estimate, without
            activations and key-value cache.
        expert_parallel: the same with whole experts spread over the GPUs.
    """

    files: int
    tensors: int
    experts: int
    gpu: dict[int, int]
    expert_parallel: dict[int, int]


@dataclass(frozen=True)
class Report:
    """What `inspect` and `dry_run` say.

    Attributes:
        experts_before, experts_after: of a layer; equal where nothing is pruned.
        notes: what a user ought to know or to choose.
        target: what would be written, None where nothing is pruned.
    """

    checkpoint: Checkpoint
    layout: Layout
    experts_before: int
    experts_after: int
    top_k: int | None
    before: Sizes
    after: Sizes
    notes: tuple[str, ...]
    target: Target | None = None

    @property
    def bytes_before(self) -> int:
        return self.before.files

    @property
    def bytes_after(self) -> int:
        return self.after.files

    def __str__(self) -> str:
        layout = self.layout
        found = "known family" if layout.family.known else "family without an entry, found by its shapes"
        lines = [
            f"{self.checkpoint.folder.name}: {layout.family.model_type} ({found})",
            f"experts       {len(layout.layers)} MoE layers of {self.experts_before}, {self.top_k or '?'} a token",
            f"groups        {_groups(layout)}",
            f"MTP           {_mtp(layout)}",
            f"quantisation  {quantisation(self.checkpoint)}",
            "",
        ]
        if self.target is None:
            rows = [("", "now"), *((name, readable_size(size)) for name, size in _rows(self.before))]
        else:
            rows = [("", f"{self.experts_before} experts", f"{self.experts_after} experts", "")]
            for (name, before), (_, after) in zip(_rows(self.before), _rows(self.after), strict=True):
                rows.append((name, readable_size(before), readable_size(after), f"{after / before - 1:+.1%}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def inspect(
    model: str | os.PathLike, *, keep: float | int | None = None, tensor_parallel: Sequence[int] = (1,)
) -> Report:
    """A checkpoint's experts, groups, MTP layers and quantisation, and what keeping some experts would leave.

    Args:
        keep: a share of the experts (0.5; rounded up, and to a multiple of the groups) or their number.
        tensor_parallel: numbers of GPUs to work sizes out for.

    Raises:
        ValueError: it cannot be pruned, or not to that count; with the reason.
        FileNotFoundError: no such folder, or a part of it is missing.
    """
    checkpoint = Checkpoint.open(model)
    layout = Layout.of(checkpoint)
    _check_sizes(tensor_parallel)
    before = _before(checkpoint, layout, tensor_parallel)
    notes = _left_out(checkpoint)
    if keep is None:
        N = layout.num_experts
        return Report(checkpoint, layout, N, N, layout.top_k, before, before, tuple(notes))
    count = _count(layout, keep)
    plan = _first(checkpoint, layout, count)
    target = Target.of(checkpoint, layout, plan)
    notes += _parallel_notes(count, tensor_parallel)
    if layout.num_groups > 1:
        notes.append(_policies(layout, count))
    if layout.mtp_layers:
        notes.append("the MTP layers are taken as stripped; they can be pruned instead")
    after = _after(target, layout, count, tensor_parallel)
    return Report(checkpoint, layout, layout.num_experts, count, layout.top_k, before, after, tuple(notes), target)


def dry_run(plan: "Plan", model: str | os.PathLike, *, tensor_parallel: Sequence[int] = (1,)) -> Report:
    """What `apply` would write; no tensor is read, nothing is written.

    Raises:
        ValueError: the plan does not fit the model.
        FileNotFoundError: no such folder, or a part of it is missing.
    """
    checkpoint = Checkpoint.open(model)
    layout = Layout.of(checkpoint)
    _check_sizes(tensor_parallel)
    target = Target.of(checkpoint, layout, plan)
    notes = [*target.warnings, *_left_out(checkpoint), *_parallel_notes(plan.count, tensor_parallel)]
    return Report(
        checkpoint,
        layout,
        layout.num_experts,
        plan.count,
        plan.top_k,
        _before(checkpoint, layout, tensor_parallel),
        _after(target, layout, plan.count, tensor_parallel),
        tuple(notes),
        target,
    )


def bytes_at_count(model: str | os.PathLike, description: Mapping) -> Callable[[int], int]:
    """How many bytes of weights a checkpoint has at a uniform count of experts, MTP layers stripped.

    Args:
        model: the checkpoint's folder, whose headers are read once.
        description: the model's in statistics or a plan, which the folder has to fit.

    Raises:
        ValueError: it is another model.
    """
    if is_run_folder(model):
        from . import runs

        return lambda count: runs.inspect(model, keep=count)["bytes_after"]
    checkpoint = Checkpoint.open(model)
    layout = Layout.of(checkpoint)
    N = layout.num_experts
    if (description["num_experts"], description["layers"]) != (N, [layer.index for layer in layout.layers]):
        raise ValueError(
            f"the statistics are of another model than {model}: {description['num_experts']} experts in "
            f"{len(description['layers'])} layers there, {N} in {len(layout.layers)} here"
        )
    stripped = set(layout.mtp_tensors) if layout.mtp_layers else set()
    all_experts = sum(_expert_bytes(checkpoint, layout).values())
    whole = checkpoint.file_bytes - sum(checkpoint.tensors[name].nbytes for name in stripped)
    # Headers shrink too, by less than a thousandth of what is saved: taken as they are, so that a size is kept to.
    return lambda count: whole - all_experts * (N - count) // N


def predicted_and_real(plan: "Plan", model: str | os.PathLike, pruned: str | os.PathLike | None) -> dict[str, int]:
    """Bytes of weights `before` and, predicted, `after` a plan; `real` where the pruned folder is there."""
    if is_run_folder(model):
        from . import runs

        found = runs.dry_run(plan, model)
        sizes = {"before": found["bytes_before"], "after": found["bytes_after"]}
    else:
        report = dry_run(plan, model)
        sizes = {"before": report.bytes_before, "after": report.bytes_after}
    if pruned is not None:
        files = sorted(Path(pruned).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(2, "there is no safetensors file: name the pruned checkpoint's folder", str(pruned))
        # a run's sizes are those of its tensors, without the headers of files
        sizes["real"] = sum(
            file.stat().st_size - (_header_bytes(file) if is_run_folder(model) else 0) for file in files
        )
    return sizes


def _header_bytes(file: Path) -> int:
    with open(file, "rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def quantisation(checkpoint: Checkpoint) -> str:
    """How the weights are stored, in a few words."""
    config = checkpoint.config
    said = config.get("quantization_config") or text_config(config).get("quantization_config") or {}
    types = Counter()
    for entry in checkpoint.tensors.values():
        types[entry.dtype] += entry.nbytes
    total = sum(types.values()) or 1
    stored = ", ".join(f"{dtype} {size / total:.0%}" for dtype, size in types.most_common() if size >= total / 100)
    if not said:
        return f"none ({stored})"
    method = said.get("quant_method", "of an unnamed method")
    block = said.get("weight_block_size")
    return f"{method}{f', blocks of {block[0]} x {block[1]}' if block else ''} ({stored})"


# ----------------------------------------------------------------------------------------------------------- reckoning


def _before(checkpoint: Checkpoint, layout: Layout, parallel: Sequence[int]) -> Sizes:
    tensors = [(entry.name, entry.shape, entry.nbytes) for entry in checkpoint.tensors.values()]
    return _sizes(checkpoint, layout, tensors, checkpoint.file_bytes, layout.num_experts, parallel)


def _after(target: Target, layout: Layout, count: int, parallel: Sequence[int]) -> Sizes:
    tensors = [(tensor.name, tensor.shape, tensor.nbytes) for shard in target.shards for tensor in shard.tensors]
    return _sizes(target.checkpoint, layout, tensors, target.weight_bytes, count, parallel)


def _sizes(
    checkpoint: Checkpoint,
    layout: Layout,
    tensors: Sequence[tuple[str, tuple[int, ...], int]],
    files: int,
    count: int,
    parallel: Sequence[int],
) -> Sizes:
    layers = (*layout.layers, *layout.mtp_layers)
    blocks = {layer.prefix for layer in layers}
    fused = {name for layer in layers for name in layer.fused_tensors}
    routers = {name for layer in layers for name, _ in layer.router_tensors}
    experts = replicated = 0
    for name, shape, size in tensors:
        match = EXPERT.fullmatch(name)
        if name in fused or (match and match["block"] in blocks):
            experts += size
        elif name in routers or sum(length > 1 for length in shape) < 2:
            replicated += size
    total = sum(size for _, _, size in tensors)
    table = _rotary_table(text_config(checkpoint.config))
    rest = total - experts - replicated
    return Sizes(
        files,
        total,
        experts,
        {size: replicated + table + math.ceil((rest + experts) / size) for size in parallel},
        {
            size: replicated + table + math.ceil(rest / size) + experts * math.ceil(count / size) // count
            for size in parallel
        },
    )


def _rotary_table(text: Mapping) -> int:
    """Bytes of the cosines and sines that engines work out once: positions x rotary width."""
    positions, width = text.get("max_position_embeddings"), text.get("qk_rope_head_dim") or text.get("head_dim")
    if width is None and text.get("hidden_size") and text.get("num_attention_heads"):
        width = text["hidden_size"] // text["num_attention_heads"]
    if not positions or not width:
        return 0
    share = text.get("partial_rotary_factor") or 1
    return int(positions * width * share) * _WIDTH.get(text.get("dtype") or text.get("torch_dtype"), 2)


def _expert_bytes(checkpoint: Checkpoint, layout: Layout) -> dict[str, int]:
    """Bytes of all experts and of their router rows, by MoE block; a router's further rows are left out."""
    sizes = {}
    for layer in layout.layers:
        names = [*(name for expert in layer.expert_tensors for name in expert), *layer.fused_tensors]
        sizes[layer.prefix] = sum(checkpoint.tensors[name].nbytes for name in names)
        for name, axis in layer.router_tensors:
            entry = checkpoint.tensors[name]
            sizes[layer.prefix] += entry.nbytes * layout.num_experts // entry.shape[axis]
    return sizes


def _count(layout: Layout, keep: float | int) -> int:
    N = layout.num_experts
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}: give a share above 0 and up to 1.0, or a number of experts")
        # the small part undone: 0.3 * 10 is above 3 in floating point
        keep = math.ceil(N * keep - 1e-9)
        return min(N, math.ceil(keep / layout.num_groups) * layout.num_groups)
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= N:
        raise ValueError(f"keep is {keep!r}: give a number of experts from 1 to {N}, or a share up to 1.0")
    return keep


def _first(checkpoint: Checkpoint, layout: Layout, count: int) -> "Plan":
    """A plan that keeps the first experts: any others have the same sizes."""
    from .plan import Plan

    ids = tuple(range(count))
    return Plan(
        model=layout.describe(checkpoint),
        criterion="random",
        domains={},
        policy="slice",
        keep={layer.index: ids for layer in layout.layers},
        top_k=layout.top_k,
        mtp="strip" if layout.mtp_layers else "none",
    )


# -------------------------------------------------------------------------------------------------------------- words


def _groups(layout: Layout) -> str:
    if layout.num_groups == 1:
        return "none"
    size = layout.num_experts // layout.num_groups
    return f"{layout.num_groups} of {size}, a token uses {layout.topk_group} of them"


def _policies(layout: Layout, count: int) -> str:
    each = count // layout.num_groups
    fits = count % layout.num_groups == 0 and each >= layout.family.group_score
    if fits and (layout.top_k or 1) <= layout.topk_group * each:
        return (
            f"slice-equal-groups keeps {each} of each group, and its routing is exactly the masked model's; slice "
            f"keeps any {count} and drops the groups"
        )
    step = max(layout.family.group_score, math.ceil((layout.top_k or 1) / layout.topk_group)) * layout.num_groups
    return (
        f"{count} experts do not fill {layout.num_groups} groups that the router can score: slice drops the groups; "
        f"for slice-equal-groups keep a multiple of {layout.num_groups} from {step}"
    )


def _mtp(layout: Layout) -> str:
    if layout.mtp_layers:
        indices = ", ".join(str(layer.index) for layer in layout.mtp_layers)
        return f"layer {indices} with experts: stripped, or pruned to ids of its own"
    return "without experts: carried" if layout.mtp_tensors else "none"


def _left_out(checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.left_out:
        return []
    names = ", ".join(checkpoint.left_out[:3]) + (", ..." if len(checkpoint.left_out) > 3 else "")
    return [f"not carried, for they hold weights of the old size: {names}"]


def _parallel_notes(count: int, parallel: Sequence[int]) -> list[str]:
    uneven = [size for size in parallel if count % size]
    if not uneven:
        return []
    return [f"{count} experts do not divide by {uneven[0]} GPUs: engines refuse that under expert parallelism, or pad"]


def _rows(sizes: Sizes) -> list[tuple[str, int]]:
    rows = [("files of weights", sizes.files), ("in memory", sizes.tensors), ("  routed experts", sizes.experts)]
    for size in sizes.gpu:
        if size == 1:
            rows.append(("one GPU", sizes.gpu[1]))
            continue
        rows.append((f"each of {size} GPUs, tensor parallel", sizes.gpu[size]))
        rows.append((f"each of {size} GPUs, expert parallel", sizes.expert_parallel[size]))
    return rows


def _check_sizes(parallel: Sequence[int]) -> None:
    for size in parallel:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"a number of GPUs is {size!r}: give whole numbers from 1")
