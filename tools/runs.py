"""A run folder: what stands in ``run.json``, and how a tool finds the code that rebuilds the run's model.

    RUN/run.json        {"format": 1, "model": "dit", "config": {...}, "options": {...}, "versions": {...}}
    RUN/checkpoints/    written by ``moe.hosts.deepspeed_checkpoint``
    RUN/tensorboard/    the log

``model`` is a name, never a path of code: it is looked up among the entry points of the group ``gatewright.models``
and in ``MODELS``, so a stranger's folder cannot name what is run. What a name stands for is a function
``load(config: dict) -> nn.Module``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..moe.files import write_text

FORMAT = 1
FILE = "run.json"
ENTRY_POINTS = "gatewright.models"
MODELS = {"dit": "gatewright.recipes.models.dit:load"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What ``run.json`` says.

    Attributes:
        path: the folder.
        model: the name of the kind of model.
        config: what rebuilds the model.
        options: the recipe's, as given.
    """

    path: Path
    model: str
    config: dict[str, Any]
    options: dict[str, Any]

    def write(self, versions: dict[str, str]) -> None:
        """Makes the folder and writes ``run.json``, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / FILE, json.dumps(self.content() | {"versions": versions}, indent=1))

    def content(self) -> dict[str, Any]:
        """What tells another process what this is."""
        return {"format": FORMAT, "model": self.model, "config": self.config, "options": self.options}

    def make_model(self) -> nn.Module:
        """The model, newly initialised, in plain PyTorch on one process."""
        return model_loader(self.model)(self.config)


def read_run(path: Path) -> Run:
    """
    Raises:
        FileNotFoundError: there is no such folder, or no ``run.json`` in it.
        ValueError: ``run.json`` is not what a recipe writes, or of a newer format.
    """
    file = Path(path) / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no run: it has no {FILE}; give a folder that a recipe wrote")
    return read_run_file(file)[0]


def read_run_file(file: Path) -> tuple[Run, dict[str, Any]]:
    """A ``run.json`` by whatever name, and all that it holds.

    Raises:
        ValueError: it is not what a recipe writes, or of a newer format.
    """
    try:
        content = json.loads(file.read_text())
        given = content["format"]
        fields = {"model": content["model"], "config": dict(content["config"]), "options": dict(content["options"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): expected what a recipe writes"
        ) from None
    if given != FORMAT:
        raise ValueError(
            f"{file} has format {given}, and this gatewright reads {FORMAT}: use the version that wrote it"
        )
    return Run(path=file.parent, **fields), content


def model_loader(name: str) -> Callable[[dict[str, Any]], nn.Module]:
    """What makes the models of this name.

    Raises:
        ValueError: nobody offers such models; the message offers the close matches.
    """
    offered = MODELS | {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        close = difflib.get_close_matches(str(name), offered)
        hint = f"did you mean {' or '.join(close)}?" if close else "install the package that offers it"
        raise ValueError(f'nobody makes models called "{name}": {hint} Known: {", ".join(sorted(offered))}')
    module, _, function = offered[name].partition(":")
    return getattr(importlib.import_module(module), function)
