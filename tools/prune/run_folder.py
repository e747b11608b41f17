"""Whether a folder is one of our own runs or exports, told without torch."""

from __future__ import annotations

import json
from pathlib import Path

RUN, EXPORT = "run.json", "config.json"
FIELDS = {"format", "model", "config", "options"}


def is_run_folder(folder: str | Path) -> bool:
    """True for a folder that a recipe, ``gatewright export`` or our pruning wrote; False for any other, a transformers
    checkpoint among them, whose ``config.json`` names a ``model_type``."""
    for name in (EXPORT, RUN):
        try:
            content = json.loads((Path(folder) / name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.keys() >= FIELDS and "model_type" not in content:
            return True
    return False
