"""One HTML file that shows runs' routing: opens from disk, asks the network for nothing, and says so in its
Content-Security-Policy."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...moe.files import write_bytes
from ...moe.record_log import RoutingLog
from .data import page_data

PAGE = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)


def report(logs: Sequence[RoutingLog], *, title: str = "") -> str:
    """The whole page as text."""
    return page_of(page_data(logs, title=title))


def page_of(data: dict[str, Any]) -> str:
    """The page that shows what ``page_data`` made; names in it are data, never markup."""
    module = (PAGE / "dashboard.js").read_text(encoding="utf-8")
    style = (PAGE / "dashboard.css").read_text(encoding="utf-8")
    # "<" occurs in JSON only inside strings, where its escape means the same and can end no script element.
    content = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="{html.escape(data["library"])}">
<title>{html.escape(data["title"])}: routing</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<div id="gatewright"><noscript>This report draws itself with JavaScript, which is switched off here.</noscript></div>
<script type="application/json" id="gatewright-data">{content}</script>
<script type="module">
{module}
mount(document.getElementById("gatewright"), JSON.parse(document.getElementById("gatewright-data").textContent));
</script>
</body>
</html>
"""


def write_report(logs: Sequence[RoutingLog], out: str | Path, *, title: str = "") -> int:
    """Writes the report and returns its size in bytes.

    Raises:
        OSError: it cannot be written there.
    """
    text = report(logs, title=title).encode()
    write_bytes(Path(out), text)
    return len(text)
