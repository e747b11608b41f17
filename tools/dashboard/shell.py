"""The one HTML file around a page of figures: opens from disk, asks the network for nothing, and says so in its
Content-Security-Policy."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)


def shell(data: dict[str, Any], *, kind: str, more: Sequence[Path] = (), mount: str = "mount") -> str:
    """The page that shows the data; names in it are data, never markup.

    Args:
        data: JSON with ``title`` and ``library``.
        kind: what stands behind the title in the browser's tab.
        more: scripts that go on where ``page/dashboard.js`` ends, in its scope.
        mount: the function that draws the data into an element.
    """
    module = "\n".join(file.read_text(encoding="utf-8") for file in (PAGE / "dashboard.js", *more))
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
<title>{html.escape(data["title"])}: {kind}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<div id="gatewright"><noscript>This report draws itself with JavaScript, which is switched off here.</noscript></div>
<script type="application/json" id="gatewright-data">{content}</script>
<script type="module">
{module}
{mount}(document.getElementById("gatewright"), JSON.parse(document.getElementById("gatewright-data").textContent));
</script>
</body>
</html>
"""
