"""Writes the pruned checkpoint: byte ranges of the source, copied file by file with bounded memory.

    gatewright prune apply plan.json --model MODEL --out DIR

No tensor is ever interpreted, so every type that safetensors can hold goes through, and no torch is imported. Files are
made in a folder `.DIR.pruning` beside the output: each is written under another name, put on the disk, renamed, and
noted in a journal, while the next is being written. A run that was killed, or that found the disk full, goes on where
it stopped when it is started again; only when everything is there does the folder get its name. The source is only ever
read.
"""

import argparse
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...moe.files import flush_to_disk, write_text
from .checkpoint import Checkpoint, readable_size
from .journal import Finished, Journal, crc32
from .layout import Layout
from .run_folder import is_run_folder
from .target import PLAN, Target, TargetShard

if TYPE_CHECKING:
    from .plan import Plan

SMALL = 1 << 20  # ranges below this are gathered in memory, longer ones are copied by the kernel
GATHERED = 4 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[str, int, int], None]  # file, bytes on the disk so far, bytes in all


@dataclass(frozen=True)
class Applied:
    """What `apply` did.

    Attributes:
        target: what was written.
        reused: files that an earlier run had finished.
    """

    target: Target
    reused: tuple[str, ...]


def apply(
    plan: "Plan", model: str | os.PathLike, out: str | os.PathLike, *, progress: Progress | None = None
) -> Applied:
    """Writes `out`, which is there whole or not at all.

    Args:
        plan: which experts stay.
        model: the checkpoint's folder; it is not changed.
        out: a new or empty folder.
        progress: called after each file of weights.

    Raises:
        ValueError: the plan does not fit the model; `out` holds something or lies where the model is; the disk has too
            little room; an unfinished rewriting of something else is in the way. Nothing was written.
        OSError: the disk became full, or a file cannot be read or written; running it again goes on.
    """
    model, out = Path(model), Path(out)
    if out.is_symlink():
        out = out.resolve()
    checkpoint = Checkpoint.open(model)
    target = Target.of(checkpoint, Layout.of(checkpoint), plan)
    work = workplace(out)
    files = work / "files"
    identity = _identity(target, plan)
    if _is_finished(work, out, model, target):
        # An earlier run was killed while it removed what was left over.
        if (work / "journal").exists():
            Journal.open(work / "journal", identity).close()
        _remove(work)
        return Applied(target, tuple(shard.file for shard in target.shards))
    check_out(model, out)
    check_room(target, out, files)
    files.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(work / "journal", identity)
    try:
        reused = []
        done = 0
        with _resumable(work, journal, len(target.shards)):
            with _Finisher(files, journal) as finisher:
                for shard in target.shards:
                    if journal.is_good(files, shard.file):
                        reused.append(shard.file)
                    else:
                        write_shard(shard, checkpoint.folder, files)
                        finisher.add(shard)
                    done += shard.size
                    if progress is not None:
                        progress(shard.file, done, target.weight_bytes)
            _write_others(target, files)
        if _identity(target, plan) != identity:
            raise ValueError(f"{model} was changed while it was read: remove {work} and start again")
        os.replace(files, out)
        flush_to_disk(out.parent)
    finally:
        journal.close()
    _remove(work)
    return Applied(target, tuple(reused))


def workplace(out: Path) -> Path:
    """Where the files of `out` are made."""
    out = out.absolute()
    return out.with_name(f".{out.name}.pruning")


def _is_finished(work: Path, out: Path, model: Path, target: Target) -> bool:
    """Whether everything was written and renamed, and only the workplace is left over."""
    if not work.is_dir() or (work / "files").exists() or not (out / PLAN).is_file() or out.resolve() == model.resolve():
        return False
    return (out / PLAN).read_bytes() == target.texts[PLAN].encode()


def _remove(work: Path) -> None:
    (work / "journal").unlink(missing_ok=True)
    work.rmdir()


def check_out(model: Path, out: Path) -> None:
    """
    Raises:
        ValueError: `out` is the model, lies in it or around it, is a file or holds something.
    """
    here, there = out.resolve(), model.resolve()
    if here == there:
        raise ValueError(f"{out} is the model itself, which is never overwritten: choose another folder")
    if here.is_relative_to(there):
        raise ValueError(f"{out} lies in the model's folder {model}: choose one outside of it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder, or empty it")
    if os.path.ismount(out):
        raise ValueError(f"{out} is a mount point, which nothing can be renamed to: name a new folder in it")


def check_room(target: Target, out: Path, files: Path) -> None:
    """
    Raises:
        ValueError: the disk has less room than what is still to write.
    """
    there = {path.name: path.stat().st_size for path in files.iterdir()} if files.is_dir() else {}
    written = sum(shard.size for shard in target.shards if there.get(shard.file) == shard.size)
    # Half a file of an earlier run is written over.
    rest = sum(size for name, size in there.items() if name.startswith("."))
    needed = target.total_bytes - written - rest
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{out} needs {readable_size(needed)} and its disk has {readable_size(free)} left: make room, or choose a "
            "folder on another disk"
        )


def write_shard(shard: TargetShard, source: Path, folder: Path) -> None:
    """Writes one file of weights into `folder`, under another name (`_unfinished`) and not yet on the disk."""
    path, beside = source / shard.file, _unfinished(folder, shard)
    reader = os.open(path, os.O_RDONLY)
    try:
        # Unbuffered: what the kernel copies and what is gathered go through one file position.
        with open(beside, "wb", buffering=0) as stream:
            to = stream.fileno()
            gathered = bytearray(shard.header)
            for start, end in (pair for tensor in shard.tensors for pair in tensor.ranges()):
                if end - start < SMALL:
                    gathered += _read(reader, start, end - start, path)
                if end - start >= SMALL or len(gathered) >= GATHERED:
                    _write(to, gathered)
                    gathered.clear()
                if end - start >= SMALL:
                    _copy(reader, to, start, end, path)
            _write(to, gathered)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(reader)


def finish_shard(shard: TargetShard, folder: Path) -> Finished:
    """Puts a file that `write_shard` wrote on the disk, and only then gives it its name."""
    beside = _unfinished(folder, shard)
    try:
        flush_to_disk(beside)
        checksum = crc32(beside)
        size = beside.stat().st_size
        if size != shard.size:
            raise RuntimeError(f"{beside} became {size} bytes long and not {shard.size}")
        os.replace(beside, folder / shard.file)
        flush_to_disk(folder)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return Finished(size, checksum)


def _unfinished(folder: Path, shard: TargetShard) -> Path:
    return folder / f".{shard.file}.new"


class _Finisher:
    """Finishes a file while the next one is written: waiting for the disk and summing up cost no time of their own."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[TargetShard, Future[Finished]] | None = None

    def add(self, shard: TargetShard) -> None:
        self._wait()
        self._pending = shard, self._thread.submit(finish_shard, shard, self._folder)

    def _wait(self) -> None:
        if self._pending is not None:
            (shard, finished), self._pending = self._pending, None
            self._journal.note(shard.file, finished.result())

    def __enter__(self) -> "_Finisher":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait()  # also where the next file failed
        finally:
            self._thread.shutdown()


def _read(reader: int, start: int, length: int, path: Path) -> bytes:
    content = os.pread(reader, length, start)
    if len(content) != length:
        raise OSError(errno.EIO, "it became shorter while it was read", str(path))
    return content


def _write(to: int, content: bytearray) -> None:
    with memoryview(content) as view:
        written = 0
        while written < len(view):
            written += os.write(to, view[written:])


def _copy(reader: int, to: int, start: int, end: int, path: Path) -> None:
    """Appends source bytes to a file, without bringing them into this process where the system can."""
    copy = _copy_in_kernel
    while start < end:
        try:
            copied = copy(reader, to, start, end - start)
        except OSError as error:
            if copy is _copy_in_kernel and error.errno in (
                errno.EXDEV,
                errno.ENOSYS,
                errno.EINVAL,
                errno.EOPNOTSUPP,
                errno.ENOTSOCK,
            ):
                copy = _copy_through_memory
                continue
            raise
        if copied == 0:
            raise OSError(errno.EIO, "it became shorter while it was read", str(path))
        start += copied


def _copy_in_kernel(reader: int, to: int, start: int, length: int) -> int:
    return os.sendfile(to, reader, start, length)


def _copy_through_memory(reader: int, to: int, start: int, length: int) -> int:
    content = os.pread(reader, min(length, GATHERED), start)
    _write(to, bytearray(content))
    return len(content)


def _write_others(target: Target, files: Path) -> None:
    expected = {*target.texts, *target.copied, *(shard.file for shard in target.shards)}
    for file in target.copied:
        path = files / file
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        shutil.copyfile(target.checkpoint.folder / file, beside)
        shutil.copymode(target.checkpoint.folder / file, beside)
        flush_to_disk(beside)
        os.replace(beside, path)
    for file, text in target.texts.items():
        path = files / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    for path in files.rglob("*"):  # halves that a killed run left
        if path.is_file() and path.relative_to(files).as_posix() not in expected:
            path.unlink()
    for folder in {files, *(path for path in files.rglob("*") if path.is_dir())}:
        flush_to_disk(folder)


@contextmanager
def _resumable(work: Path, journal: Journal, files: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full after {len(journal.finished)} of {files} files of weights; make room and run the same "
            "command again, which goes on where this one stopped",
            str(work),
        ) from None


def _stamps(checkpoint: Checkpoint) -> dict[str, list]:
    stamps = {}
    for file in (*checkpoint.shards, "config.json", *checkpoint.others):
        stat = (checkpoint.folder / file).stat()
        stamps[file] = [stat.st_size, stat.st_mtime_ns]
    return stamps


def _identity(target: Target, plan: "Plan") -> dict:
    """What makes two runs the same work: the source's files, the plan, and where every output byte comes from."""
    return {"target": target.digest, "plan": plan.hash, "source": _stamps(target.checkpoint)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="what `gatewright prune plan` wrote")
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="the checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")


def run(args: argparse.Namespace) -> int:
    from .plan import Plan

    plan = Plan.load(args.plan)
    if is_run_folder(args.model):
        from . import runs

        runs.apply(plan, args.model, args.out)
        print(f"{args.out}: written")
        return 0
    began = time.monotonic()

    def progress(file: str, done: int, total: int) -> None:
        speed = readable_size(int(done / max(time.monotonic() - began, 1e-9)))
        print(f"{file}  {readable_size(done)} of {readable_size(total)}, {speed}/s", file=sys.stderr)

    applied = apply(plan, args.model, args.out, progress=progress)
    target = applied.target
    for warning in target.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if applied.reused:
        print(f"{len(applied.reused)} of {len(target.shards)} files were there from an earlier run")
    if target.checkpoint.left_out:
        print(f"not carried, for they hold weights of the old size: {', '.join(target.checkpoint.left_out)}")
    print(
        f"{args.out}: {readable_size(target.checkpoint.file_bytes)} -> {readable_size(target.weight_bytes)} of weights "
        f"in {len(target.shards)} file{'s' if len(target.shards) > 1 else ''}; `gatewright prune verify` proves them"
    )
    return 0
