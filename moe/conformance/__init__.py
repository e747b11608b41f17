"""A kit that says whether a router keeps its contract: yours, or any that is listed.

    from gatewright.moe.conformance import check_router

    check_router(MyRouter)                                  # by its example()
    check_router(lambda: MyRouter(dim=16, num_experts=4))   # any function that makes one
    check_router("promoe", options={"top_k": 2})            # a registered name

A failure raises ``ConformanceError``, whose text names each property that does not hold, the input that shows it, what
was expected, what came instead and what to do. On the command line: ``gatewright check-router my_module:MyRouter``.

Every check is a function of this package with the decorator ``check``; its docstring states the property. ``CHECKS``
holds them by name. Parameters are drawn from N(0, 1), tokens from a counter-based generator, so a failure repeats.
"""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...routers.base import TokenContext
from . import decision, gradient, independence, ranks, state  # noqa: F401  each brings its checks
from . import options as _options  # noqa: F401
from .ranks import TwoRanks
from .registry import (
    CHECKS,
    FAILED,
    NOT_CHECKED,
    PASSED,
    Check,
    ConformanceError,
    NotChecked,
    Report,
    Result,
    Violation,
    chosen,
)
from .subject import Factory, Subject, seeded

__all__ = [
    "CHECKS",
    "Check",
    "ConformanceError",
    "Report",
    "Result",
    "Subject",
    "TwoRanks",
    "check_router",
    "run_check",
]


def check_router(
    factory: Factory,
    *,
    options: Mapping[str, Any] | None = None,
    context: TokenContext | None = None,
    dim: int | None = None,
    variants: Sequence[Mapping[str, Any]] = (),
    only: Iterable[str] | None = None,
    long: bool = False,
    raise_on_failure: bool = True,
    each: Callable[[Result], None] | None = None,
) -> Report:
    """Runs every check on the router that ``factory`` makes.

    Args:
        factory: a Router class (created with the options of its ``example()``), a function without arguments that
            returns a router, or a registered name.
        options: for the class or the name, over those of its example; for a function, its arguments.
        context: what a batch of it looks like; by default that of the class's ``example()``.
        dim: width of the tokens, where the router has no option ``dim``.
        variants: other sets of options, over the first: what ``options_are_used`` looks at besides its own guesses, for
            options that it cannot guess or that only matter together.
        only: names of the checks to run; by default all. ``CHECKS`` lists them.
        long: more seeds, shapes, modes and layouts; minutes instead of seconds.
        raise_on_failure: raise ``ConformanceError``, which holds the report; otherwise return the report in any case.
        each: called with every result as it comes.

    Returns:
        The report. What could not be checked is in it with the reason.

    Raises:
        ConformanceError: some property does not hold.
        ValueError: the factory makes no router, an unknown check.
    """
    checks = chosen(only)
    subject = Subject(factory, options=options, context=context, dim=dim, variants=variants, long=long)
    results = []
    for one in checks:
        results.append(run_check(subject, one))
        if each is not None:
            each(results[-1])
    report = Report(router=str(subject), results=tuple(results))
    if raise_on_failure and not report.passed:
        raise ConformanceError(report)
    return report


def run_check(subject: Subject, one: Check) -> Result:
    """One check of one router. Torch's global random state is left as it was."""
    subject.notes.clear()
    began = time.perf_counter()
    status, message = PASSED, ""
    try:
        with seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            one.run(subject)
    except Violation as violation:
        status, message = FAILED, str(violation)
    except NotChecked as reason:
        status, message = NOT_CHECKED, str(reason)
    except Exception as error:
        status, message = FAILED, str(_crash(error))
    seconds = time.perf_counter() - began
    return Result(check=one.name, status=status, message=message, notes=tuple(subject.notes), seconds=seconds)


def _crash(error: Exception) -> Violation:
    """A violation from an error that no check expected: the router's own frames say where."""
    frames = traceback.extract_tb(error.__traceback__)
    kit, torchs = (str(Path(module).parent) + os.sep for module in (__file__, torch.__file__))
    own = [frame for frame in frames if not frame.filename.startswith((kit, torchs))]
    at = f"{own[-1].filename}:{own[-1].lineno}, in {own[-1].name}: {own[-1].line}" if own else "in the kit itself"
    within = next((frame.name for frame in reversed(frames) if frame.filename.startswith(kit)), "")
    return Violation(
        on=f"an input of this check (kit function {within})",
        expected="no error",
        got=f"{type(error).__name__}: {error}\n  at {at}",
        advice="run it alone, check_router(..., only=[name]), and read the place; an input that the router refuses on "
        "purpose needs a context=... that fits",
    )
