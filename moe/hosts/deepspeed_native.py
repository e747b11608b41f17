"""What stands between a user and ``engine.load_checkpoint``, DeepSpeed's own.

Before it reads anything, a checkpoint is refused that

* is not DeepSpeed's, or in which a file is more than tensors, numbers and text: DeepSpeed unpickles what it loads,
  which runs whatever code a stranger put there. Every file is first loaded the restricted way (``weights_only=True``),
  with the few harmless classes allowed that DeepSpeed itself stores;
* was saved at another expert parallelism, with the optimizer's state: at ZeRO-1 and 2, DeepSpeed 0.19.8 loads it
  without an error and with wrong optimizer state. Weights alone (``load_module_only=True``) load rightly at ZeRO-0 to
  2, and are let through;
* is universal: buffers are not loaded, so routers begin anew, and at ZeRO-3 all parts of the weights share one counter
  of Adam's steps, which then counts each part's (0.19.8).

``save_checkpoint`` and ``load_checkpoint`` of this package fit every layout and hold no pickle.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from .checkpoint_files import MANIFEST
from .ranks import agree, rank, world

INSTEAD = "use save_checkpoint and load_checkpoint of gatewright.moe.hosts.deepspeed, which fit every layout"


def _stage(cls: Any, name: Any) -> ZeroStageEnum:
    """What stands for ``getattr`` while a file is checked: Python before 3.11.4 pickles an enumeration's member as
    ``getattr(cls, name)``, and of anything else an attribute may be code."""
    if cls is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise ValueError(f"getattr({cls!r}, {name!r})")
    return ZeroStageEnum[name]


# what DeepSpeed 0.19.8 stores beside tensors and plain values: numbers in a class, no code
ALLOWED = [fragment_address, LossScaler, ZeroStageEnum, (_stage, "getattr"), (_stage, "builtins.getattr")]
_MODEL_STATES = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def check_native_checkpoint(
    engine: Any, layers: list[Any], folder: Path, *, weights_only: bool, universal: bool
) -> None:
    """Refuses a checkpoint that DeepSpeed would load wrongly, or that could run code. Collective.

    Args:
        folder: of one checkpoint, with its tag.
        weights_only: whether only the weights are to be loaded.
        universal: whether it is read as a universal one.

    Raises:
        ValueError: why it is not loaded.
    """
    error = None
    try:
        _check(engine, layers, folder, weights_only, universal)
    except ValueError as problem:
        error = problem
    agree(error, ValueError, "nothing was loaded")


def _check(engine: Any, layers: list[Any], folder: Path, weights_only: bool, universal: bool) -> None:
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is a checkpoint of gatewright's: load it by load_checkpoint(engine, path)")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: expected a DeepSpeed checkpoint")
    if universal:
        raise ValueError(
            f"{folder} as a universal checkpoint: DeepSpeed 0.19.8 leaves out buffers, which are the routers' state, "
            f"and at ZeRO-3 counts Adam's step wrongly; {INSTEAD}"
        )
    check_pickles(folder, rank(), world())
    for record in _records(folder):
        _check_record(record, layers, engine, folder, weights_only)


def check_pickles(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Checks that each ``parts``-th pickled file holds only what loads without running code.

    Raises:
        ValueError: the first file that does not.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in PICKLED)
    for file in files[part::parts]:
        _restricted(file)


def _restricted(file: Path) -> Any:
    try:
        # mapped, so that a large file is not held in memory
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings(action="ignore"):
            return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} does not load with weights_only=True ({reason}): it is damaged, or holds more than tensors and "
            "could run code when loaded; only load checkpoints that DeepSpeed wrote"
        ) from None


def _records(folder: Path) -> list[dict[str, Any]]:
    """What the checkpoint says about each MoE layer."""
    files = sorted(file for file in folder.glob("*.pt") if _MODEL_STATES.fullmatch(file.name))
    if not files:
        raise ValueError(f"{folder} holds no mp_rank_*_model_states.pt: it is no DeepSpeed checkpoint")
    state = _restricted(files[0])
    layers = state.get("ds_autoep_layers")
    if not layers:
        raise ValueError(f"{files[0]} does not say how its experts are laid out (ds_autoep_layers)")
    return layers


def _check_record(record: dict[str, Any], layers: list[Any], engine: Any, folder: Path, weights_only: bool) -> None:
    name = record["module_path"]
    layer = dict(engine.module.named_modules()).get(name)
    if layer not in layers:
        raise ValueError(f"{folder} has a MoE layer {name!r}, this model has none there")
    if record["num_experts"] != layer.num_experts:
        raise ValueError(
            f"{folder}: layer {name!r} has {record['num_experts']} experts there and {layer.num_experts} here"
        )
    exact = not weights_only or engine.zero_optimization_stage() == 3
    if record["ep_size"] != layer.ep_size and exact:
        raise ValueError(
            f"{folder} was saved at expert parallelism {record['ep_size']}, this run has {layer.ep_size}: DeepSpeed "
            f"0.19.8 would load it with wrong optimizer state; {INSTEAD}"
        )
