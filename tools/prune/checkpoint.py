"""What a checkpoint folder holds, read from its headers: names, types, shapes and byte ranges, and no tensor.

A safetensors file is eight bytes (little-endian, the header's length), a JSON header (name -> dtype, shape,
data_offsets) and the tensors' bytes without gaps; several files come with an index that says which file holds which
tensor. Everything here is read and checked from those headers by the file's own rules, whatever types the tensors have,
and without torch: a checkpoint of hundreds of gigabytes opens in a second.

Source of the format: https://github.com/huggingface/safetensors (README, "Format").
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

# Bits of one element. Types below a byte fill whole bytes together.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
LARGEST_HEADER = 100_000_000  # the safetensors library's own limit

# Weights in other formats: read by nobody here, and of the old size, so never carried into a pruned folder.
OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".safetensors",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        name: as in the header.
        file: the shard that holds it, relative to the folder.
        dtype: safetensors' name of the type, "BF16", "F8_E4M3", ...
        shape: may be empty (a scalar).
        start, end: bytes counted from the beginning of the file, not of its data.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, its free metadata, its size in bytes."""

    file: str
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str] | None
    size: int
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and safetensors weights, its headers checked against each other.

    Attributes:
        folder: where it is.
        config: `config.json`, parsed; `config_text` is the file itself.
        shards: name of the file -> `Shard`, in the order of the files' names.
        index: the index without its `weight_map`, which `tensors` hold; None where there is one file only.
        others: every other file worth carrying (tokenizer, generation settings, remote code), relative to the folder.
        left_out: weights in other formats, and folders that hold such, which are not carried: they have the old size.
    """

    folder: Path
    config: dict
    config_text: str
    shards: dict[str, Shard]
    index: dict | None
    others: tuple[str, ...]
    left_out: tuple[str, ...]
    tensors: dict[str, TensorEntry] = field(repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Checkpoint":
        """Reads every header and checks it: sizes, offsets, names, the index.

        Raises:
            FileNotFoundError: no such folder, no `config.json`, a shard that the index names is missing.
            ValueError: pickled weights only; a truncated or malformed shard; an index that disagrees with the shards;
                a name that stands twice; several files without an index.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: name a checkpoint's folder, with its config.json")
        files = sorted(_files(folder))
        weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
        if not weights:
            _refuse_without_safetensors(folder, files)
        config_text, config = _read_config(folder)
        index = _read_json(folder / INDEX) if INDEX in files else None
        shards = {file: read_shard(folder, file) for file in _choose(folder, weights, index)}
        tensors: dict[str, TensorEntry] = {}
        for shard in shards.values():
            for entry in shard.tensors:
                if entry.name in tensors:
                    raise ValueError(
                        f"{folder}: {entry.name} stands in {tensors[entry.name].file} and again in {entry.file}: "
                        "which one a loader would take is chance, so remove one of the two"
                    )
                tensors[entry.name] = entry
        if index is not None:
            _check_index(folder, index, tensors)
            index = {key: value for key, value in index.items() if key != "weight_map"}
        weights_beside = [file for file in files if file.endswith(OTHER_WEIGHTS) and file not in shards]
        # A folder with weights of its own ("original", "metal") describes those in its other files.
        folders = tuple({f"{os.path.dirname(file)}/" for file in weights_beside if "/" in file})
        left_out = tuple(file for file in files if file in weights_beside or (folders and file.startswith(folders)))
        indices = tuple(file for file in files if file.endswith((".safetensors.index.json", ".bin.index.json")))
        others = tuple(file for file in files if file not in {*shards, *left_out, *indices, CONFIG})
        return cls(folder, config, config_text, shards, index, others, left_out, tensors)

    @cached_property
    def header_hash(self) -> str:
        """sha256 of all tensors' names, types and shapes: the same however they are spread over files."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        return digest.hexdigest()

    @cached_property
    def config_sha256(self) -> str:
        return hashlib.sha256(self.config_text.encode()).hexdigest()

    @property
    def data_bytes(self) -> int:
        """The tensors' bytes, which is what the weights take in memory as they are stored."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """The safetensors files' bytes: tensors and headers."""
        return sum(shard.size for shard in self.shards.values())


def read_shard(folder: Path, file: str) -> Shard:
    """Reads and checks one file's header.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no safetensors file, is truncated, or its header contradicts itself.
    """
    path = folder / file
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")
            if len(prefix) < 8 or length > size - 8:
                raise ValueError(
                    f"{path} is truncated: it has {size:,} bytes, its header alone would take {8 + length:,}; "
                    f"{_again(path)}"
                )
            if length > LARGEST_HEADER:
                raise ValueError(f"{path}: a header of {length:,} bytes is no safetensors file's; {_again(path)}")
            raw = stream.read(length)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, though the index names it; {_again(path)}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except _Twice as twice:
        raise ValueError(f"{path}: the header names {twice} twice; {_again(path)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: the header is not JSON ({error}); {_again(path)}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a JSON object; {_again(path)}")
    metadata = header.pop("__metadata__", None)
    entries = sorted(_entries(path, file, header, 8 + length), key=lambda entry: (entry.start, entry.end))
    at = 8 + length
    before = None
    for entry in entries:
        if entry.start < at:
            raise ValueError(
                f"{path}: {entry.name} and {before} share bytes: tied tensors cannot be pruned apart; save the "
                "checkpoint again with a copy for each"
            )
        if entry.start > at:
            raise ValueError(
                f"{path}: {entry.start - at:,} bytes before {entry.name} belong to no tensor; {_again(path)}"
            )
        at, before = entry.end, entry.name
    if at > size:
        raise ValueError(f"{path} is truncated: it has {size:,} bytes, its header announces {at:,}; {_again(path)}")
    if at < size:
        raise ValueError(f"{path}: {size - at:,} bytes after the last tensor belong to none; {_again(path)}")
    return Shard(file, tuple(entries), metadata, size, hashlib.sha256(raw).hexdigest())


def _entries(path: Path, file: str, header: dict, base: int) -> Iterator[TensorEntry]:
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for all of a kind: there may be 100,000 tensors
    for name, what in header.items():
        try:
            dtype, shape, (start, end) = what["dtype"], tuple(what["shape"]), what["data_offsets"]
            sound = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)) and start <= end
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"{path}: the header's entry of {name} is malformed; {_again(path)}")
        if dtype not in BITS:
            raise ValueError(f"{path}: {name} has the type {dtype}, which safetensors does not know; {_again(path)}")
        if math.prod(shape) * BITS[dtype] != 8 * (end - start):
            raise ValueError(
                f"{path}: {name} of shape {list(shape)} and type {dtype} does not take {end - start:,} bytes; "
                f"{_again(path)}"
            )
        yield TensorEntry(name, file, sys.intern(dtype), shapes.setdefault(shape, shape), base + start, base + end)


class _Twice(ValueError):
    """A JSON object names a key twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def _again(path: Path) -> str:
    return f"fetch {path.name} again"


def _files(folder: Path) -> Iterator[str]:
    """Every file below the folder, relative to it; hidden files and folders (.git, .cache) are not part of a model."""
    seen = set()  # a link to a folder around it leads nowhere new
    for where, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            if not name.startswith("."):
                yield (Path(where) / name).relative_to(folder).as_posix()


def readable_size(size: int) -> str:
    """Bytes in binary units, as a person reads them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except _Twice as twice:
        raise ValueError(f"{path} names {twice} twice; {_again(path)}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_again(path)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; {_again(path)}")
    return content


def _read_config(folder: Path) -> tuple[str, dict]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the model's family and its counts stand there")
    # newline="": the file's own line ends are kept when one value in it is changed.
    with open(path, encoding="utf-8", newline="") as stream:
        text = stream.read()
    return text, _read_json(path)


def _refuse_without_safetensors(folder: Path, files: list[str]) -> None:
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), which run code when they are read and cannot be cut by "
            'byte ranges. Convert them first: python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\" "
            "(and copy the tokenizer's files)"
        )
    raise FileNotFoundError(f"{folder} holds no safetensors weights: name a checkpoint's folder")


def _choose(folder: Path, weights: list[str], index: dict | None) -> list[str]:
    """The files that make up the checkpoint, by the rules of its loaders."""
    if index is None:
        if SINGLE in weights:
            chosen = [SINGLE]
        elif len(weights) == 1:
            chosen = weights
        else:
            raise ValueError(f"{folder} holds {len(weights)} safetensors files and no {INDEX}: fetch the index too")
        strays = [file for file in weights if file not in chosen and _looks_like_shard(file)]
    else:
        if SINGLE in weights and SINGLE not in set(_weight_map(folder, index).values()):
            raise ValueError(
                f"{folder} holds {SINGLE} and {INDEX}, two checkpoints in one folder: loaders take the first; "
                "remove the one that is not meant"
            )
        chosen = sorted(set(_weight_map(folder, index).values()))
        strays = [file for file in weights if file not in chosen and _looks_like_shard(file)]
    if strays:
        raise ValueError(
            f"{folder}: {strays[0]} belongs to no checkpoint of this folder: the index disagrees with its shards"
        )
    return chosen


def _looks_like_shard(file: str) -> bool:
    stem = file.removesuffix(".safetensors").split("-")
    return len(stem) >= 4 and stem[-2] == "of" and stem[-1].isdigit() and stem[-3].isdigit() and stem[0] == "model"


def _weight_map(folder: Path, index: dict) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise ValueError(f"{folder / INDEX} has no weight_map; {_again(folder / INDEX)}")
    for file in set(weight_map.values()):
        if Path(file).name != file:
            raise ValueError(f"{folder / INDEX} names {file}: a shard lies beside its index")
    return weight_map


def _check_index(folder: Path, index: dict, tensors: dict[str, TensorEntry]) -> None:
    weight_map = _weight_map(folder, index)
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(f"{folder}: the index disagrees with its shards: {file} does not hold {name}")
        if tensors[name].file != file:
            raise ValueError(
                f"{folder}: the index disagrees with its shards: {name} is in {tensors[name].file}, not in {file}"
            )
    for name, entry in tensors.items():
        if name not in weight_map:
            raise ValueError(f"{folder}: the index disagrees with its shards: it does not name {name} of {entry.file}")
