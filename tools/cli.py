"""The console command: `gatewright COMMAND ...`.

Each command is a module of this package with two functions, `add_arguments(parser)` and `run(args) -> int` (the exit
status), and one row in `COMMANDS`. The module is imported only when its command runs, so that `gatewright --help` needs
no torch. What a user got wrong (a ValueError, a file that is not there or cannot be read or written) becomes one line
and exit status 2; anything else is our mistake and keeps its traceback.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from .. import __version__

# name: (module, what it does in one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("gatewright.tools.bench", "time a MoE layer and its parts against every peer that is installed"),
    "bench-routers": ("gatewright.tools.bench_routers", "time each router's decision against plain softmax top-k"),
    "check-gpu": ("gatewright.tools.check_gpu", "check the kernels on this machine's GPU, and time them there"),
    "check-router": (
        "gatewright.tools.check_router",
        "say whether a router, yours or a listed one, keeps its contract",
    ),
    "dashboard": (
        "gatewright.tools.dashboard.command",
        "draw the routing of recorded runs as one HTML file",
    ),
    "export": ("gatewright.tools.export", "turn a training run into safetensors weights and a JSON configuration"),
    "import-routing": (
        "gatewright.tools.dashboard.importers",
        "make a routing log of counts, of Megatron-LM's routing trace or of router logits",
    ),
    "prune": ("gatewright.tools.prune.command", "prune a trained MoE checkpoint to a domain, step by step"),
    "routers": ("gatewright.tools.routers", "list the routers, or show one with its options"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        argv: what follows `gatewright` on the command line; by default this process's own.
    """
    parser = _parser()
    chosen = parser.parse_args(argv)
    if chosen.command is None:
        parser.print_help(sys.stderr)
        return 2
    if chosen.command not in COMMANDS:
        return _fail(_unknown(chosen.command))
    module_name, summary = COMMANDS[chosen.command]
    module = importlib.import_module(module_name)
    command_parser = argparse.ArgumentParser(prog=f"gatewright {chosen.command}", description=f"{summary}.")
    module.add_arguments(command_parser)
    args = command_parser.parse_args(chosen.arguments)
    try:
        return module.run(args)
    except ValueError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in sorted(COMMANDS.items()))
    parser = argparse.ArgumentParser(
        prog="gatewright",
        description="Tools for Mixture-of-Experts models trained with gatewright.",
        epilog=f"commands:\n{rows}\n\n`gatewright COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gatewright {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what the command takes")
    return parser


def _unknown(command: str) -> str:
    close = difflib.get_close_matches(command, COMMANDS)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(sorted(COMMANDS))}"
    return f'unknown command "{command}": {hint}'


def _fail(message: str) -> int:
    print(f"gatewright: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
