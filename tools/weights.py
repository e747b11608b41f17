"""The weights of a trained model, out of a training run or an export of one, in plain PyTorch.

    model, run = load_model("runs/promoe_dit-1")              the averaged weights of the newest whole checkpoint
    state, run, source = read_weights("exports/digits")

    EXPORT/config.json          what ``run.json`` says, and "weights" and "step"
    EXPORT/model.safetensors    the model's state dict, all experts together

Nothing is unpickled, no engine is needed, and every name and shape is held to the model that the configuration makes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..moe.hosts.checkpoint_files import checkpoint_buffers, checkpoint_parameters, locate, read_manifest
from .runs import Run, read_run, read_run_file

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "model.safetensors", "checkpoints"
KINDS = {"ema": "ema", "model": "master"}  # what a user asks for: what a checkpoint calls it
NAMED = 6  # how many names an error lists


class Source(NamedTuple):
    """Where weights come from.

    Attributes:
        weights: "ema", the average, or "model", the trained weights themselves.
        step: after how many optimizer steps.
    """

    weights: str
    step: int


def load_model(path: str | Path, *, weights: str | None = None) -> tuple[nn.Module, Run]:
    """Opens a run or an export as a model in plain PyTorch, all experts on this process, in evaluation mode.

    Args:
        path: the folder.
        weights: "ema" or "model"; by default a run's "ema", and what an export holds.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: no whole checkpoint, a damaged file, weights that it does not hold, or another model's.
    """
    state, run, _ = read_weights(path, weights=weights)
    model = run.make_model()
    model.load_state_dict(state)
    return model.eval(), run


def read_weights(path: str | Path, *, weights: str | None = None) -> tuple[dict[str, Tensor], Run, Source]:
    """The checked state dict, what rebuilds its model, and where it is from. See ``load_model``."""
    path = Path(path)
    if weights not in (None, *KINDS):
        raise ValueError(f'weights="{weights}": choose one of {", ".join(KINDS)}')
    if (path / CONFIG).is_file():
        run, source, state = _read_export(path, weights)
    else:
        run = read_run(path)
        source, state = _read_checkpoint(path / CHECKPOINTS, weights or "ema")
    with torch.device("meta"):
        expected = run.make_model().state_dict()
    problems = differences(expected, state)
    if problems:
        raise ValueError(f'the weights in {path} are not those of its model "{run.model}": {problems}')
    return state, run, source


def read_description(path: str | Path) -> Run:
    """What a run or an export says about itself, its weights unread."""
    exported = Path(path) / CONFIG
    return read_run_file(exported)[0] if exported.is_file() else read_run(Path(path))


def _read_checkpoint(checkpoints: Path, weights: str) -> tuple[Source, dict[str, Tensor]]:
    folder = locate(checkpoints)
    manifest = read_manifest(folder)
    if weights == "ema" and KINDS[weights] not in manifest["kinds"]:
        raise ValueError(f'{folder} holds no average of the weights: ask for weights "model"')
    state = dict(checkpoint_parameters(folder, KINDS[weights])) | checkpoint_buffers(folder)
    return Source(weights, manifest["counters"]["global_steps"]), state


def _read_export(folder: Path, weights: str | None) -> tuple[Run, Source, dict[str, Tensor]]:
    run, content = read_run_file(folder / CONFIG)
    try:
        source = Source(str(content["weights"]), int(content["step"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'{folder / CONFIG} lacks "weights" or "step": expected what `export` writes') from None
    if weights not in (None, source.weights):
        raise ValueError(f'{folder} holds the weights "{source.weights}", not "{weights}": export the run again')
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no whole export: it has no {WEIGHTS}")
    try:
        return run, source, load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def description(run: Run, source: Source) -> str:
    """The content of an export's ``config.json``."""
    content: dict[str, Any] = run.content() | source._asdict()
    return json.dumps(content, indent=1, allow_nan=False)


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How the names and shapes of a state dict differ from those of a model, in words; empty where they do not."""
    problems = []
    for what, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            problems.append(f"{what}: {_listed(sorted(names))}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
    more = f"; {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return "; ".join(problems[:NAMED]) + more


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
