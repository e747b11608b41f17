"""What a recipe says on the command line: options with close matches, and one clear line where something is wrong."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch.distributed as dist

MISTAKES = (ValueError, OSError, ImportError)


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that answers a misspelt option with the close matches, once for all ranks."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        known = [option for action in self._actions for option in action.option_strings]
        given = sys.argv[1:] if args is None else list(args)
        for word in given:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                close = difflib.get_close_matches(option, known, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else "--help lists the options"
                self.error(f"unknown option {option}: {hint}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def fail(program: str, message: str) -> NoReturn:
    """Ends this rank with status 2, upon which the launcher ends the others. One of the ranks that fail says why."""
    if _may_speak():
        print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _may_speak() -> bool:
    """Before the ranks are joined all fail alike, and the first speaks; afterwards whoever fails first."""
    if not dist.is_initialized():
        return is_first_rank()
    rank = os.environ.get("RANK", "0")
    return dist.distributed_c10d._get_default_store().compare_set("gatewright/failed", "", rank).decode() == rank


def describe(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or error}"
    return str(error)
