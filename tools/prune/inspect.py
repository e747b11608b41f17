"""`gatewright prune inspect`: whether and how a checkpoint can be pruned, before anything is collected."""

import argparse
from pathlib import Path

from .plan import parse_keep
from .run_folder import is_run_folder
from .sizes import inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="the checkpoint's folder")
    parser.add_argument("--keep", help="experts that would stay in a layer: a count (64) or a share (0.5)")
    parser.add_argument(
        "--tensor-parallel", type=int, nargs="+", default=[1, 8], metavar="GPUS", help="numbers of GPUs (default: 1 8)"
    )


def run(args: argparse.Namespace) -> int:
    keep = None if args.keep is None else parse_keep(args.keep)
    if isinstance(keep, str):
        raise ValueError(f"--keep {keep}: give a count (64) or a share (0.5); `gatewright prune plan` takes sizes")
    if is_run_folder(args.model):
        from . import runs

        print("\n".join(runs.size_table(runs.inspect(args.model, keep=keep))))
        return 0
    print(inspect(args.model, keep=keep, tensor_parallel=args.tensor_parallel))
    return 0
