"""`gatewright prune STEP ...`: from a checkpoint and demonstrations of a domain to a smaller checkpoint.

Each step is a module of this package with `add_arguments(parser)` and `run(args) -> int`, imported only when it runs:
planning, looking at sizes and rewriting files need no torch. Errors are told by `gatewright.tools.cli`.
"""

import argparse
import difflib
import importlib

# name: (module, what it does in one line), in the order in which they are used
STEPS: dict[str, tuple[str, str]] = {
    "families": (".list_families", "list the model families that can be pruned, and why others cannot"),
    "inspect": (".inspect", "say what pruning would do to a checkpoint, from its headers alone"),
    "collect": (".collect", "run demonstrations through the model and keep statistics of its experts"),
    "plan": (".plan", "choose the experts that stay"),
    "evaluate": (".evaluate", "measure the pruned model's loss by mask, before any file is written"),
    "dry-run": (".dry_run", "say what a plan would do to a checkpoint, from its headers alone"),
    "apply": (".apply", "write the pruned checkpoint"),
    "verify": (".verify", "prove that a pruned checkpoint is the masked one"),
    "report": (".report", "draw a plan as one HTML file"),
}

EXTRA = ("tqdm", "transformers")  # what steps that run the model need beyond the core


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, STEPS))
    rows = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in STEPS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"steps:\n{rows}\n\n`gatewright prune STEP --help` explains one."
    parser.add_argument("step", metavar="STEP", help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the step takes")


def run(args: argparse.Namespace) -> int:
    if args.step not in STEPS:
        close = difflib.get_close_matches(args.step, STEPS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(STEPS)}"
        raise ValueError(f'unknown step "{args.step}" of prune: {hint}')
    module_name, summary = STEPS[args.step]
    parser = argparse.ArgumentParser(prog=f"gatewright prune {args.step}", description=f"{summary}.")
    try:
        module = importlib.import_module(module_name, __package__)
        module.add_arguments(parser)
        return module.run(parser.parse_args(args.arguments))
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ValueError(
            f'`gatewright prune {args.step}` needs {error.name}, which is not installed: pip install "gatewright[hf]"'
        ) from None
