"""One HTML file that shows runs' routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...moe.files import write_bytes
from ...moe.record_log import RoutingLog
from .data import page_data
from .shell import shell


def report(logs: Sequence[RoutingLog], *, title: str = "") -> str:
    """The whole page as text."""
    return page_of(page_data(logs, title=title))


def page_of(data: dict[str, Any]) -> str:
    """The page that shows what ``page_data`` made."""
    return shell(data, kind="routing")


def write_report(logs: Sequence[RoutingLog], out: str | Path, *, title: str = "") -> int:
    """Writes the report and returns its size in bytes.

    Raises:
        OSError: it cannot be written there.
    """
    text = report(logs, title=title).encode()
    write_bytes(Path(out), text)
    return len(text)
