"""What the pruned folder will hold, worked out from headers and a plan before anything is written.

`Target.of(checkpoint, layout, plan)` names every output tensor with the bytes of the source that it is, and the texts
of `config.json`, the index and whatever else names experts. The dry run adds its sizes up, `apply` writes it, `verify`
holds a folder to it.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .checkpoint import BITS, CONFIG, INDEX, Checkpoint, TensorEntry
from .families import COUPLED_KEYS, at, count_places
from .json_text import Path as JsonPath
from .json_text import replace_values
from .layout import EXPERT, Layout, MoeLayer

if TYPE_CHECKING:
    from .plan import Plan

PLAN = "pruning_plan.json"
EXPERT_MAP = "expert_map.json"
NAMED = re.compile(r"(?P<block>[\w.]*?)\.?\bexperts\.(?P<expert>\d+)(?P<rest>(?:\..*)?)")
# Longer ones are data, not settings.
LARGEST_JSON = 64 << 20


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """One tensor of the output: `source`, or its `rows` along `axis` where they are given."""

    name: str
    source: TensorEntry
    axis: int = 0
    rows: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.rows is None:
            return self.source.shape
        return (*self.source.shape[: self.axis], len(self.rows), *self.source.shape[self.axis + 1 :])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.source.dtype] // 8

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The source file's byte ranges that make up the tensor, in order, neighbours joined."""
        if self.rows is None:
            yield self.source.start, self.source.end
            return
        before, size = self.source.shape[: self.axis], self.source.shape[self.axis]
        row = self.source.nbytes // math.prod(before) // size
        start = end = self.source.start
        for block in range(math.prod(before)):
            for index in self.rows:
                here = self.source.start + (block * size + index) * row
                if here != end:
                    if end > start:
                        yield start, end
                    start = here
                end = here + row
        if end > start:
            yield start, end


@dataclass(frozen=True)
class TargetShard:
    """One output file."""

    file: str
    metadata: dict[str, str] | None
    tensors: tuple[TargetTensor, ...]

    @cached_property
    def header(self) -> bytes:
        """Length and header, padded so that the data begins at a multiple of eight."""
        header: dict[str, object] = {} if self.metadata is None else {"__metadata__": self.metadata}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.nbytes
            header[tensor.name] = {
                "dtype": tensor.source.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def size(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Target:
    """The pruned folder.

    Attributes:
        shards: in the order of the source's files; a file of which nothing stays is left out.
        texts: file -> content, of every file that is written anew.
        copied: files that are carried as they are.
        warnings: what the user ought to know, for the plan was followed all the same.
    """

    checkpoint: Checkpoint
    shards: tuple[TargetShard, ...]
    texts: dict[str, str]
    copied: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: Layout, plan: "Plan") -> "Target":
        """
        Raises:
            ValueError: the plan is of another model, or asks for what no configuration of this family can say.
        """
        warnings = check_plan(checkpoint, layout, plan)
        cut = Cut.of(checkpoint, layout, plan)
        shards = []
        for shard in checkpoint.shards.values():
            tensors = [tensor for entry in shard.tensors if (tensor := cut.tensor(entry)) is not None]
            # Wide types first, as safetensors writes them: what is dropped before a tensor never costs its alignment.
            tensors.sort(key=lambda tensor: -BITS[tensor.source.dtype])
            if tensors:
                shards.append(TargetShard(shard.file, shard.metadata, tuple(tensors)))
        texts = {CONFIG: pruned_config(checkpoint, layout, plan, cut)}
        if checkpoint.index is not None:
            texts[INDEX] = _index(checkpoint, shards)
        texts |= _renamed_files(checkpoint, cut)
        if plan.policy == "keep-rows":
            texts[EXPERT_MAP] = _expert_map(layout, plan)
            warnings.append(
                f"policy keep-rows: the routers keep {layout.num_experts} rows, and {EXPERT_MAP} says which expert a "
                "row became (-1: pruned); no stock engine loads this"
            )
        if plan.policy == "slice-regroup":
            warnings.append(
                "policy slice-regroup: the groups are cut anew from the experts that stay, so that tokens are routed "
                "differently from the masked model; use slice-equal-groups for the same routing"
            )
        texts[PLAN] = plan.text()
        copied = tuple(file for file in checkpoint.others if file not in texts)
        return cls(checkpoint, tuple(shards), texts, copied, tuple(warnings))

    @property
    def weight_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def data_bytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        copied = sum((self.checkpoint.folder / file).stat().st_size for file in self.copied)
        return self.weight_bytes + copied + sum(len(text.encode()) for text in self.texts.values())

    @cached_property
    def digest(self) -> str:
        """sha256 of everything but the weights' bytes: the same for the same plan and source, whenever it is made."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(json.dumps([shard.file, hashlib.sha256(shard.header).hexdigest()]).encode())
            for tensor in shard.tensors:
                digest.update(json.dumps([tensor.source.file, tensor.source.start, tensor.axis, tensor.rows]).encode())
        for file in sorted(self.texts):
            digest.update(json.dumps([file, self.texts[file]]).encode())
        digest.update(json.dumps(self.copied).encode())
        return digest.hexdigest()


def check_plan(checkpoint: Checkpoint, layout: Layout, plan: "Plan") -> list[str]:
    """Whether a plan fits a checkpoint.

    Returns:
        Warnings.

    Raises:
        ValueError: it does not.
    """
    model = plan.model
    found = {
        "model_type": layout.family.model_type,
        "num_experts": layout.num_experts,
        "layers": [layer.index for layer in layout.layers],
        "mtp_layers": [layer.index for layer in layout.mtp_layers],
        "num_groups": layout.num_groups,
        "topk_group": layout.topk_group,
    }
    if layout.top_k is not None:
        found["top_k"] = layout.top_k
    for key, value in found.items():
        if model[key] != value:
            raise ValueError(
                f"the plan was made for another model than {checkpoint.folder}: {key} is {model[key]} in the plan and "
                f"{value} here"
            )
    if len(set(map(len, plan.keep.values()))) > 1:
        raise ValueError(
            "the plan keeps different numbers of experts in different layers, which the configuration of "
            f'"{layout.family.model_type}" cannot say: it has one count for all, and loaders would fill the other '
            "layers with random numbers; plan with a uniform budget"
        )
    if plan.top_k > plan.count:
        raise ValueError(
            f"the plan keeps {plan.count} experts and sends a token to {plan.top_k}: keep more, or lower top-k"
        )
    if plan.policy in ("slice-equal-groups", "slice-regroup") and plan.num_groups > 1:
        each = plan.count // plan.num_groups
        if plan.count % plan.num_groups or each < layout.family.group_score or plan.top_k > plan.topk_group * each:
            raise ValueError(
                f"{plan.count} experts in {plan.num_groups} groups, {plan.topk_group} of them for a token's "
                f'{plan.top_k}: "{layout.family.model_type}" needs as many in each group, '
                f"{layout.family.group_score} or more, and enough for top-k; keep another count, or drop the groups "
                "with policy slice"
            )
    if model["header_hash"] != checkpoint.header_hash:
        return [
            "the plan was made from a checkpoint whose tensors have other names, types or shapes (another precision?); "
            "layers and counts are the same, so it is followed"
        ]
    return []


@dataclass(frozen=True)
class Cut:
    """What becomes of each tensor: gone, renamed, sliced, or as it was."""

    experts: dict[str, dict[int, int]]  # MoE block -> old id -> new id, of those that stay
    sliced: dict[str, tuple[int, tuple[int, ...]]]  # name -> axis, rows that stay
    stripped: frozenset[str]
    stripped_blocks: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: Layout, plan: "Plan") -> "Cut":
        layers = [(layer, plan.keep[layer.index]) for layer in layout.layers]
        strip = plan.mtp == "strip"
        if not strip:
            layers += [(layer, plan.mtp_keep[layer.index]) for layer in layout.mtp_layers]
        experts, sliced = {}, {}
        for layer, keep in layers:
            experts[layer.prefix] = {old: new for new, old in enumerate(keep)}
            for name in layer.fused_tensors:
                sliced[name] = (0, keep)
            for name, axis in layer.router_tensors if plan.policy != "keep-rows" else ():
                rows = checkpoint.tensors[name].shape[axis]
                sliced[name] = (axis, (*keep, *range(layout.num_experts, rows)))
        for name, (axis, _) in sliced.items():
            entry = checkpoint.tensors[name]
            if math.prod(entry.shape[axis + 1 :]) * BITS[entry.dtype] % 8:
                raise ValueError(f"{checkpoint.folder}: an expert of {name} does not fill whole bytes ({entry.dtype})")
        return cls(
            experts,
            sliced,
            frozenset(layout.mtp_tensors if strip else ()),
            frozenset(layer.prefix for layer in layout.mtp_layers) if strip else frozenset(),
        )

    def tensor(self, entry: TensorEntry) -> TargetTensor | None:
        if entry.name in self.stripped:
            return None
        if entry.name in self.sliced:
            axis, rows = self.sliced[entry.name]
            return TargetTensor(entry.name, entry, axis, rows)
        match = EXPERT.fullmatch(entry.name)
        if match is None or match["block"] not in self.experts:
            return TargetTensor(entry.name, entry)
        new = self.experts[match["block"]].get(int(match["expert"]))
        return None if new is None else TargetTensor(f"{match['block']}.experts.{new}.{match['rest']}", entry)

    @cached_property
    def _blocks(self) -> dict[str, str]:
        return {_from_layers_on(block): block for block in (*self.experts, *self.stripped_blocks)}

    def renamed(self, name: str, where: str) -> str | None:
        """A module's or tensor's name after the cut, None if it is gone; text that names no expert is returned as is.

        Raises:
            ValueError: it names an expert of no MoE block of this model.
        """
        match = NAMED.fullmatch(name)
        if match is None:
            return name
        block = self._blocks.get(_from_layers_on(match["block"]))
        if block is None:
            raise ValueError(f'{where} names "{name}", an expert of no MoE layer of this model')
        if block in self.stripped_blocks:
            return None
        new = self.experts[block].get(int(match["expert"]))
        return None if new is None else f"{match['block']}.experts.{new}{match['rest']}"

    def check_pattern(self, pattern: str, where: str) -> None:
        """A regular expression over module names must mean the same experts before and after.

        Raises:
            ValueError: it would not.
        """
        try:
            compiled = re.compile(pattern)
        except re.error:
            return
        for block, kept in self.experts.items():
            for old, new in kept.items():
                for rest in ("", ".gate_proj", ".w1"):
                    names = [f"{block}.experts.{number}{rest}" for number in (old, new)]
                    if len({bool(compiled.match(name)) for name in names}) > 1:
                        raise ValueError(
                            f'{where} holds the expression "{pattern}", which tells {names[0]} from its new name '
                            f"{names[1]}: write the names out instead"
                        )


def _from_layers_on(block: str) -> str:
    """A block's name without what wraps its layers ("model.", "language_model.model."): lists may leave that out."""
    match = re.search(r"(?:^|\.)((?:mtp\.)?(?:layers|blocks|block|h)\.\d+(?:\..*)?)$", block)
    return match[1] if match else block


# ---------------------------------------------------------------------------------------------------- config and index


def pruned_config(checkpoint: Checkpoint, layout: Layout, plan: "Plan", cut: Cut) -> str:
    """`config.json` with the counts changed where they stand, and nothing else."""
    config, family = checkpoint.config, layout.family
    edits: dict[JsonPath, object] = {}
    for number, place in enumerate(count_places(config)):
        here = at(config, place)
        for key in family.count_keys:
            _set(edits, here, (*place, key), layout.num_experts, plan.count)
        for key in COUPLED_KEYS:
            _set(edits, here, (*place, key), layout.num_experts, plan.count)
        changes = (
            (family.top_k_keys, layout.top_k, plan.top_k),
            (family.group_keys, layout.num_groups, plan.num_groups),
            (family.topk_group_keys, layout.topk_group, plan.topk_group),
        )
        for keys, old, new in changes:
            if old == new:
                continue
            present = [key for key in keys if here.get(key) is not None]
            for key in present:
                edits[(*place, key)] = [new] * len(here[key]) if isinstance(here[key], list) else new
            if not present and number == 0:
                edits[(*place, keys[0])] = new
    if plan.mtp == "strip":
        for place in {(), *count_places(config)}:
            for key in family.mtp_keys:
                if isinstance(at(config, place).get(key), int) and at(config, place)[key]:
                    edits[(*place, key)] = 0
    edits |= dict(_renamed_values(config, (), cut, CONFIG))
    return replace_values(checkpoint.config_text, edits)


def _set(edits: dict[JsonPath, object], holder: Mapping, path: JsonPath, old: int, new: int) -> None:
    value = holder.get(path[-1])
    if isinstance(value, list) and value and all(item == old for item in value):
        edits[path] = [new] * len(value)
    elif value == old and not isinstance(value, bool):
        edits[path] = new


def _renamed_values(value: object, path: JsonPath, cut: Cut, where: str) -> Iterator[tuple[JsonPath, object]]:
    """The lists and objects below a value that name experts one by one, with the names of those that stay."""
    if isinstance(value, Mapping):
        names = {key: cut.renamed(key, where) for key in value}
        if any(new != old for old, new in names.items()):
            yield path, {new: value[old] for old, new in names.items() if new is not None}
            return
        for key, inner in value.items():
            yield from _renamed_values(inner, (*path, key), cut, where)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, str) and item.startswith("re:"):
                cut.check_pattern(item.removeprefix("re:"), where)
        new = [cut.renamed(item, where) if isinstance(item, str) else item for item in value]
        if new != value:
            yield path, [item for item in new if item is not None]
            return
        for place, inner in enumerate(value):
            yield from _renamed_values(inner, (*path, place), cut, where)


def _renamed_files(checkpoint: Checkpoint, cut: Cut) -> dict[str, str]:
    """Other JSON files that name experts one by one: quantisers' own lists."""
    texts = {}
    for file in checkpoint.others:
        path = checkpoint.folder / file
        if not file.endswith(".json") or path.name.startswith("tokenizer") or path.stat().st_size > LARGEST_JSON:
            continue
        with open(path, encoding="utf-8", newline="") as stream:
            text = stream.read()
        if not re.search(r"experts\.\d", text):
            continue
        try:
            content = json.loads(text)
        except ValueError:
            continue
        if edits := dict(_renamed_values(content, (), cut, file)):
            texts[file] = replace_values(text, edits)
    return texts


def _index(checkpoint: Checkpoint, shards: Iterable[TargetShard]) -> str:
    shards = list(shards)
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    metadata = dict(checkpoint.index.get("metadata") or {})
    metadata["total_size"] = sum(shard.data_bytes for shard in shards)
    if isinstance(metadata.get("total_parameters"), int):
        before = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
        after = sum(math.prod(tensor.shape) for shard in shards for tensor in shard.tensors)
        metadata["total_parameters"] -= before - after
    content = checkpoint.index | {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


def _expert_map(layout: Layout, plan: "Plan") -> str:
    def row(layer: MoeLayer, keep: tuple[int, ...]) -> list[int]:
        new = {old: new for new, old in enumerate(keep)}
        return [new.get(old, -1) for old in range(layout.num_experts)]

    maps = {str(layer.index): row(layer, plan.keep[layer.index]) for layer in layout.layers}
    if plan.mtp == "prune":
        maps |= {str(layer.index): row(layer, plan.mtp_keep[layer.index]) for layer in layout.mtp_layers}
    return json.dumps(maps) + "\n"
