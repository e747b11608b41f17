"""Turns a training run into what people exchange: safetensors weights and a JSON configuration.

    gatewright export runs/promoe_dit-1 --out digits

The averaged weights of the newest whole checkpoint, or with ``--weights model`` the trained ones; all experts together,
however they were spread. ``--out`` is there whole or not at all.
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..moe.files import flush_to_disk, write_text
from .runs import Run
from .weights import CONFIG, KINDS, WEIGHTS, Source, description, read_weights


def export(run: Path, out: Path, *, weights: str | None = None) -> Source:
    """Writes ``out``, a new or empty folder.

    Args:
        run: a run's folder, or an export's.
        weights: "ema" or "model", see ``weights.load_model``.

    Raises:
        ValueError: ``out`` holds something, or the run cannot be read (``weights.load_model``).
        OSError: ``out`` cannot be written; nothing stays of it.
    """
    check_free(out)
    state, found, source = read_weights(run, weights=weights)
    write_export(out, state, found, source)
    return source


def check_free(out: Path) -> None:
    """
    Raises:
        ValueError: ``out`` holds something.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder, or empty it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a new folder")


def write_export(
    out: Path, state: Mapping[str, Tensor], run: Run, source: Source, *, notes: Mapping[str, str] | None = None
) -> None:
    """Writes a checked state dict and what rebuilds its model; ``out`` is there whole or not at all.

    Args:
        notes: texts that go along, by file name.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial / WEIGHTS, {"format": "pt"})
        flush_to_disk(partial / WEIGHTS)
        write_text(partial / CONFIG, description(run, source))
        for name, text in (notes or {}).items():
            write_text(partial / name, text)
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors lets nobody else read what it writes
        os.replace(partial, out)
        flush_to_disk(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that a recipe wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--weights", choices=list(KINDS), help="ema, the average (default), or model")


def run(args: argparse.Namespace) -> int:
    source = export(args.run, args.out, weights=args.weights)
    size = (args.out / WEIGHTS).stat().st_size
    print(f'{args.out}: weights "{source.weights}" after {source.step} steps, {size / 1e6:.1f} MB')
    return 0
