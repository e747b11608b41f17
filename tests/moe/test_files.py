"""A file is replaced as a whole or not at all."""

import errno
import os

import pytest

from gatewright.moe.files import write_bytes, write_text


def test_a_file_is_replaced(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "one")
    write_text(file, "zwölf")
    assert file.read_text(encoding="utf-8") == "zwölf" and list(tmp_path.iterdir()) == [file]


def test_what_fails_leaves_what_was_there_and_names_the_file(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_text(file, "one")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*/a.txt'"):
        write_bytes(file, b"two")
    assert file.read_text() == "one" and list(tmp_path.iterdir()) == [file]
