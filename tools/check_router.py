"""Says whether a router keeps its contract: `gatewright.moe.conformance` on the command line.

    gatewright check-router promoe                       a registered name
    gatewright check-router my_package.gates:MyRouter    a class, or a function without arguments that makes one
    gatewright check-router gates.py:MyRouter            the same, in a file
    gatewright check-router gates.py:MyRouter --option num_experts=8 --only causal_is_true
    gatewright check-router --list                       the checks and the properties that they state

Exit status 0: every property that could be checked holds; 1: some does not; 2: there is no such router or check.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from ..moe.conformance import CHECKS, Result, check_router
from ..routers import Router, list_routers, router_class

WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "router",
        nargs="?",
        help="a registered name, module:Factory or file.py:Factory; a factory is a Router class or a "
        "function that returns a router",
    )
    parser.add_argument("--list", action="store_true", help="print the checks with the properties that they state")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="run these checks only")
    parser.add_argument("--long", action="store_true", help="more seeds, shapes, modes and layouts")
    parser.add_argument(
        "--option", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="an option of the router"
    )


def run(args: argparse.Namespace) -> int:
    if args.list:
        for name, check in CHECKS.items():
            print(name)
            print(textwrap.fill(" ".join(check.states.split()), WIDTH, initial_indent="    ", subsequent_indent="    "))
        return 0
    if args.router is None:
        raise ValueError(
            "say which router: a registered name, module:Factory or file.py:Factory; --list lists the checks"
        )
    options = dict(_option(text) for text in args.option)
    factory = find_factory(args.router)

    def show(result: Result) -> None:
        print(result, flush=True)

    report = check_router(factory, options=options, only=args.only, long=args.long, raise_on_failure=False, each=show)
    print(f"{report.router}: {report.summary}")
    return 0 if report.passed else 1


def find_factory(text: str) -> Any:
    """What ``name``, ``module:Factory`` or ``file.py:Factory`` stands for.

    Raises:
        ValueError: there is no such name, module, file or attribute, or importing it fails.
    """
    known = list_routers()
    where, colon, attribute = text.rpartition(":")
    if not colon:
        if text.endswith(".py") or text not in known and "." in text:
            raise ValueError(f'"{text}" says where, not what: give {text}:Factory')
        router_class(text)
        return text
    if not where or not attribute:
        raise ValueError(f'"{text}": give module:Factory or file.py:Factory')
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _import_file(Path(where)) if where.endswith(".py") else _import(where)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            close = difflib.get_close_matches(part, names)
            routers = [n for n in names if isinstance(vars(found)[n], type) and issubclass(vars(found)[n], Router)]
            hint = f"did you mean {' or '.join(close)}?" if close else f"routers there: {', '.join(routers) or 'none'}"
            raise ValueError(f"{where} has no {part}: {hint}")
        found = getattr(found, part)
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"there is no module {error.name}: looked in {Path.cwd()} and where Python's packages are; a file is "
                "given as path/to/file.py:Factory"
            ) from error
        raise ValueError(f"importing {name} failed: {error}") from error
    except Exception as error:
        raise ValueError(f"importing {name} failed: {type(error).__name__}: {error}") from error


def _import_file(file: Path) -> Any:
    """By its name, the folder on the path, so that other processes can import it too."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    file = file.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) and Path(module.__file__).resolve() == file:
            return module  # loaded already, maybe as part of a package: a second copy would have other classes
    folder, parts = file.parent, [file.stem]
    while (folder / "__init__.py").is_file():
        folder, parts = folder.parent, [folder.name, *parts]
    sys.path.insert(0, str(folder))
    module = _import(".".join(parts))
    if Path(module.__file__ or "").resolve() != file:
        raise ValueError(f"{file.name}: another module {'.'.join(parts)} is loaded already; give the file another name")
    return module


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f'--option "{text}": give NAME=VALUE')
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return name, read(value)
    return name, value
