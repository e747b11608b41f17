"""`gatewright prune dry-run`: what a plan would do to a checkpoint."""

import argparse
from pathlib import Path

from .plan import Plan
from .run_folder import is_run_folder
from .sizes import dry_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="what `gatewright prune plan` wrote")
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="the checkpoint's folder")
    parser.add_argument(
        "--tensor-parallel", type=int, nargs="+", default=[1, 8], metavar="GPUS", help="numbers of GPUs (default: 1 8)"
    )


def run(args: argparse.Namespace) -> int:
    plan = Plan.load(args.plan)
    if is_run_folder(args.model):
        from . import runs

        print("\n".join(runs.size_table(runs.dry_run(plan, args.model))))
        return 0
    print(dry_run(plan, args.model, tensor_parallel=args.tensor_parallel))
    return 0
