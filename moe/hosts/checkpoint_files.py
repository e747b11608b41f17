"""A checkpoint as files: a folder of safetensors and one JSON file that is whole or not there. No pickle anywhere.

    ROOT/
        latest                        the name of the newest checkpoint, one line
        step-00000100/
            checkpoint.json           what is in the others: sizes, checksums, which tensor is where; written last
            rank-00000-000.safetensors ...

How nothing is lost: everything is written into ``.saving-<name>``, every file is flushed to the disk, the folder is
renamed, then ``latest`` is replaced. A process killed in between leaves the last good checkpoint found, and leftovers
that the next save removes.
How nothing is trusted: sizes, checksums, names and the format's version are checked before a tensor is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import flush_to_disk, write_text

FORMAT, VERSION = "gatewright-checkpoint", 1
MANIFEST, LATEST = "checkpoint.json", "latest"
SAVING, REMOVING = ".saving-", ".removing-"
_STEP = re.compile(r"step-(\d+)(?:-(\d+))?")


class ShardWriter:
    """Writes tensors into safetensors files of bounded size, of which one is in memory at a time.

    A failed write does not raise at once, since other ranks would wait for this one for ever: it is kept in ``error``,
    and what comes after is dropped.
    """

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        self.files: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None
        self._shard: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, key: str, tensor: Tensor) -> None:
        if self.error is not None:
            return
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._bytes + size > self.shard_bytes:
            self._flush()
        self._shard[key] = tensor.detach().to("cpu", copy=True).contiguous()
        self._bytes += size

    def close(self) -> None:
        if self._shard and self.error is None:
            self._flush()

    def _flush(self) -> None:
        name = f"{self.prefix}-{len(self.files):03d}.safetensors"
        try:
            save_file(self._shard, self.folder / name)
            flush_to_disk(self.folder / name)
            self.files[name] = {
                "bytes": (self.folder / name).stat().st_size,
                "sha256": checksum(self.folder / name),
                "tensors": sorted(self._shard),
            }
        except Exception as error:
            self.error = error
        self._shard, self._bytes = {}, 0


def checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def begin(root: Path, step: int) -> tuple[str, Path]:
    """Makes the folder to write into; returns the checkpoint's name and that folder. Removes what killed runs left."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in [*root.glob(f"{SAVING}*"), *root.glob(f"{REMOVING}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    name, again = f"step-{step:08d}", 0
    while (root / name).exists():
        again += 1
        name = f"step-{step:08d}-{again}"
    saving = root / f"{SAVING}{name}"
    saving.mkdir()
    return name, saving


def complete(saving: Path, name: str, manifest: dict[str, Any], keep: int) -> Path:
    """Writes the manifest, gives the folder its name, points ``latest`` at it, and removes the oldest but ``keep``."""
    root = saving.parent
    manifest = {"format": FORMAT, "version": VERSION, **manifest}
    write_text(saving / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1, allow_nan=False))
    os.rename(saving, root / name)
    flush_to_disk(root)
    write_text(root / LATEST, name + "\n")
    kept = [folder for folder in _complete_folders(root) if folder.name != name]
    for old in kept[: max(0, len(kept) - keep + 1)]:
        # renamed first, so that a kill while removing leaves nothing that looks complete
        removing = root / f"{REMOVING}{old.name}"
        os.rename(old, removing)
        shutil.rmtree(removing, ignore_errors=True)
    return root / name


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _complete_folders(root: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = []
    for folder in root.iterdir() if root.is_dir() else []:
        match = _STEP.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            found.append(((int(match[1]), int(match[2] or 0)), folder))
    return [folder for _, folder in sorted(found)]


def find_latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder; None where there is none."""
    root = Path(root)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (root / LATEST).read_text(encoding="utf-8").strip()
        if _STEP.fullmatch(name) and (root / name / MANIFEST).is_file():
            return root / name
    folders = _complete_folders(root)
    return folders[-1] if folders else None


def locate(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest in it.

    Raises:
        ValueError: there is none; says what is there instead.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    found = find_latest(path)
    if found is not None:
        return found
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: name a checkpoint, or the folder that save_checkpoint wrote to")
    pickled = sorted(file for pattern in ("*.pt", "*.pth", "*.bin", "*.pkl", "*.ckpt") for file in path.rglob(pattern))
    if pickled:
        raise ValueError(
            f"{path} holds no {MANIFEST} but pickled files ({pickled[0].relative_to(path)}): not a checkpoint of "
            "gatewright's, and not read. One of DeepSpeed's own is loaded by engine.load_checkpoint"
        )
    raise ValueError(f"{path} holds no complete checkpoint: no folder step-* with a {MANIFEST}")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says about itself; its "extra" is what was given to ``save_checkpoint``.

    Raises:
        ValueError: it is damaged, of another format or of a newer version, or the folder holds files that it does not
            list.
    """
    folder = locate(path)
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged: expected a JSON object with a checksum ({error})") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f'{file} has format {manifest.get("format")!r}: expected "{FORMAT}"')
    if not isinstance(manifest.get("version"), int) or not 1 <= manifest["version"] <= VERSION:
        raise ValueError(
            f"{file} has version {manifest.get('version')!r}: this gatewright reads up to {VERSION}; use a newer one"
        )
    if digest != _digest(manifest):
        raise ValueError(f"{file} is damaged: its content does not fit its checksum")
    for name in manifest["files"]:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f'{file} lists a file "{name}": expected plain names that end in .safetensors')
    foreign = sorted({entry.name for entry in folder.iterdir()} - {MANIFEST, *manifest["files"]})
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]}, which no checkpoint of gatewright's has: remove it")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Checks that all files are there with the right sizes, and the checksum of each ``parts``-th one.

    Raises:
        ValueError: the first that is missing or damaged, and what was expected.
    """
    for index, (name, expected) in enumerate(sorted(manifest["files"].items())):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: expected {expected['bytes']} bytes")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{file} is damaged: it has {file.stat().st_size} bytes, expected {expected['bytes']}")
        if index % parts == part and (found := checksum(file)) != expected["sha256"]:
            raise ValueError(f"{file} is damaged: its sha256 is {found}, expected {expected['sha256']}")


class Reader:
    """Reads tensors, or parts of them, out of a checked checkpoint."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.file_of = {key: name for name, entry in manifest["files"].items() for key in entry["tensors"]}
        self._files: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.file_of

    def _open(self, key: str) -> Any:
        name = self.file_of[key]
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt")
        return self._files[name]

    def tensor(self, key: str) -> Tensor:
        return self._open(key).get_tensor(key)

    def elements(self, key: str, start: int, length: int) -> Tensor:
        """[length] elements of the flattened tensor; only the rows that hold them are read."""
        rows = self._open(key).get_slice(key)
        shape = rows.get_shape()
        if not shape:
            return self.tensor(key).view(-1)[start : start + length]
        row = max(1, math.prod(shape[1:]))
        first, last = start // row, -(-(start + length) // row)
        return rows[first:last].reshape(-1)[start - first * row :][:length]


def expert_key(kind: str, name: str, expert: int) -> str:
    return f"{kind}/{name}/expert-{expert}"


def checkpoint_parameters(path: str | Path, kind: str = "ema") -> Iterator[tuple[str, Tensor]]:
    """Parameters out of a checkpoint, whole, one at a time, without an engine or DeepSpeed: for sampling and export.

    Args:
        kind: "ema" for the average of the weights, "master" for the weights themselves. A frozen parameter has one
            value.

    Raises:
        ValueError: the checkpoint is damaged, or holds no such kind.
    """
    folder = locate(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if kind not in ("master", *manifest["kinds"]):
        raise ValueError(f'{folder} holds no "{kind}": choose one of {["master", *manifest["kinds"]]}')
    reader = Reader(folder, manifest)
    for name, entry in manifest["parameters"].items():
        of = kind if entry["trainable"] else "master"
        if entry["experts"] is None:
            yield name, reader.tensor(f"{of}/{name}")
        else:
            yield name, torch.stack([reader.tensor(expert_key(of, name, expert)) for expert in entry["experts"]])


def checkpoint_buffers(path: str | Path) -> dict[str, Tensor]:
    """The module's buffers out of a checkpoint: the routers' state."""
    folder = locate(path)
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest)
    return {name: reader.tensor(f"buffer/{name}") for name in manifest["model"]["buffers"]}
