"""Files that are there whole or not at all: a temporary name beside them, fsync, rename."""

import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Replaces a file's content as a whole, or leaves it as it was."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Replaces a file's content as a whole, or leaves it as it was.

    Raises:
        OSError: it cannot be written; the error names the file, and nothing is left beside it.
    """
    beside = file.with_name(f".{file.name}.new")
    try:
        with open(beside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from None
    flush_to_disk(file.parent)
