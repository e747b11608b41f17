"""Local checkpoints of transformers as models and tokenizers. Nothing is ever fetched from a hub, and no code that lies
in a checkpoint is run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .checkpoint import Checkpoint

DTYPES = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# block-scaled formats that transformers turns into plain numbers while it loads, whatever the device
DEQUANTISED = ("fp8", "mxfp4")


def checkpoint_folder(folder: str | Path) -> Path:
    """The folder, checked to be one of a checkpoint.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds no ``config.json``, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            2,
            "there is no such folder, and nothing is fetched from a hub: download the checkpoint first "
            "(hf download ORGANISATION/NAME --local-dir FOLDER)",
            str(folder),
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json: it is not a checkpoint of transformers") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} names no model_type: it is not a checkpoint of transformers")
    return folder


def load_config(folder: str | Path) -> Any:
    """The checkpoint's configuration.

    Raises:
        ValueError: the installed transformers does not know the model.
    """
    folder = checkpoint_folder(folder)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError) as error:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        raise ValueError(
            f'{folder}: transformers {transformers.__version__} does not load model_type "{kind}": {_first_line(error)}'
        ) from None


def load_model(folder: str | Path, *, dtype: str = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """The checkpoint's model (``model_class``) in evaluation mode, whole on one device.

    Args:
        dtype: one of ``DTYPES``; "auto" is as stored. FP8 and MXFP4 weights become plain numbers on the way.

    Raises:
        ValueError: it cannot be loaded; with the reason.
    """
    config = load_config(folder)
    Checkpoint.open(folder)  # says what is wrong with its files
    options = loading_options(config, dtype)
    if transformers.utils.is_accelerate_available():  # straight to the device, not through as much memory of the host
        options["device_map"] = {"": torch.device(device)}
    try:
        with quiet():
            model = model_class(config).from_pretrained(folder, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise ValueError(f"{folder} does not fit on {device}: collect and evaluate take --layerwise") from None
    except (ValueError, ImportError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder} cannot be loaded: {_first_line(error)}") from None
    return model.to(device).eval()


def model_class(config: Any) -> type[nn.Module]:
    """The class that the checkpoint's configuration names, or else transformers' causal language model of its kind."""
    for name in getattr(config, "architectures", None) or ():
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"{config.model_type}: transformers has no causal language model of it")
    return mapping[type(config)]


def loading_options(config: Any, dtype: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told beside the folder."""
    if dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is not one of {", ".join(DTYPES)}')
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "local_files_only": True, "config": config}
    if options["dtype"] == torch.float64:  # grouped products of matrices stop at float32
        options["experts_implementation"] = "eager"
    stored = quantisation(config)
    if stored.get("quant_method") in DEQUANTISED:
        from transformers.quantizers.auto import AutoQuantizationConfig

        options["quantization_config"] = AutoQuantizationConfig.from_dict({**stored, "dequantize": True})
    return options


def quantisation(config: Any) -> dict[str, Any]:
    """The checkpoint's ``quantization_config``; empty where its weights are plain numbers."""
    text = config.get_text_config(decoder=True)
    stored = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None) or {}
    return dict(stored if isinstance(stored, dict) else stored.to_dict())


def load_tokenizer(folder: str | Path) -> Any | None:
    """The checkpoint's tokenizer; None where it has none.

    Raises:
        ValueError: it has one that cannot be loaded.
    """
    folder = checkpoint_folder(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).exists() for name in names):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raise what they like
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {_first_line(error)}") from None


def vocabulary(config: Any) -> int:
    """Rows of the embedding."""
    return int(config.get_text_config(decoder=True).vocab_size)


def context_length(config: Any) -> int | None:
    """Most tokens that the model takes; None where its configuration sets no limit."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is this process's GPU where there is one.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f'device "{name}" cannot be used: {_first_line(error)}') from None
    return device


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode: no dropout, no jitter of routers; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
