"""Which files of a long rewriting are finished: one line of JSON each, on the disk before the next file begins.

    {"journal": 1, "identity": {...}}                                   what is being done; written whole or not at all
    {"file": "model-00001-of-00020.safetensors", "size": ..., "crc32": ...}

A line is appended once its file has its final name and is on the disk. A process that is killed leaves at worst half a
line, which is cut off; a file that was finished without its line is made again, to the same bytes.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...moe.files import write_text

FORMAT = 1
CHUNK = 1 << 20


@dataclass(frozen=True)
class Finished:
    """A file's size in bytes and the CRC-32 of its content."""

    size: int
    crc32: int


class Journal:
    """An open journal; nobody else can open it meanwhile.

    Attributes:
        finished: name of the file -> what was noted of it.
    """

    def __init__(self, stream: BinaryIO, finished: dict[str, Finished]) -> None:
        self._stream = stream
        self.finished = finished

    @classmethod
    def open(cls, file: Path, identity: Mapping) -> "Journal":
        """Opens the journal of this very work, or begins it.

        Args:
            file: where it is; its folder exists.
            identity: what is being done, as JSON.

        Raises:
            ValueError: another process writes it, or it is of other work.
        """
        begin = json.dumps({"journal": FORMAT, "identity": identity}, sort_keys=True)
        if not file.exists():
            write_text(file, begin + "\n")
        stream = open(file, "r+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise ValueError(
                f"another process is writing in {file.parent}: wait for it, or choose another folder"
            ) from None
        whole = stream.read()
        whole = whole[: whole.rfind(b"\n") + 1]  # half a line is no line
        first, *rest = whole.decode("utf-8", "replace").split("\n")[:-1] or [""]
        if first != begin:
            stream.close()
            raise ValueError(
                f"{file.parent} holds an unfinished rewriting by another plan or of another model, or the model "
                "changed since: finish that one, or remove the folder and start again"
            )
        stream.seek(len(whole))
        stream.truncate()
        lines = [json.loads(line) for line in rest]
        return cls(stream, {line["file"]: Finished(line["size"], line["crc32"]) for line in lines})

    def note(self, file: str, finished: Finished) -> None:
        """Notes a finished file, on the disk when this returns."""
        line = json.dumps({"file": file, "size": finished.size, "crc32": finished.crc32})
        self._stream.write(f"{line}\n".encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.finished[file] = finished

    def is_good(self, folder: Path, file: str) -> bool:
        """Whether a noted file is there with the bytes that were noted; reads all of it."""
        noted, path = self.finished.get(file), folder / file
        return noted is not None and path.is_file() and path.stat().st_size == noted.size and crc32(path) == noted.crc32

    def close(self) -> None:
        self._stream.close()


def crc32(path: Path) -> int:
    """The CRC-32 of a file, read in chunks."""
    value = 0
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as stream:
        while length := stream.readinto(buffer):
            value = zlib.crc32(view[:length], value)
    return value
