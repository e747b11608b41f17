"""What a check is, how it fails, and what a report of many says."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"


class Violation(Exception):
    """A property does not hold.

    Args:
        on: the input that shows it.
        expected, got: what should be, and what is.
        advice: what to do.
    """

    def __init__(self, *, on: str, expected: str, got: str, advice: str) -> None:
        self.on, self.expected, self.got, self.advice = on, expected, got, advice
        super().__init__(f"on: {on}\nexpected: {expected}\ngot: {got}\ndo: {advice}")


class NotChecked(Exception):
    """A property that this router or this machine gives no way to look at; the text is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A named property and the function that looks for a violation of it."""

    name: str
    run: Callable[[Any], None]

    @property
    def states(self) -> str:
        """The property, in words."""
        return inspect.getdoc(self.run) or ""


CHECKS: dict[str, Check] = {}


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Decorator: the function becomes the check of its name; its docstring is the property."""
    CHECKS[function.__name__] = Check(name=function.__name__, run=function)
    return function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one check found.

    Attributes:
        check: its name.
        status: "passed", "failed" or "not checked".
        message: the violation, or why it was not checked.
        notes: parts of it that were not checked, each with the reason.
        seconds: that it took.
    """

    check: str
    status: str
    message: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.status:11}  {self.check}" + (f": {self.message}" if self.status == NOT_CHECKED else "")]
        if self.status == FAILED:
            lines += ["  property: " + _flow(CHECKS[self.check].states, 12), textwrap.indent(self.message, "  ")]
        return "\n".join([*lines, *(f"             not checked of it: {note}" for note in self.notes)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What every check found of one router; ``str(report)`` is for reading."""

    router: str
    results: tuple[Result, ...]

    @property
    def failures(self) -> tuple[Result, ...]:
        return self._of(FAILED)

    @property
    def not_checked(self) -> tuple[Result, ...]:
        return self._of(NOT_CHECKED)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def __getitem__(self, check: str) -> Result:
        return next(result for result in self.results if result.check == check)

    @property
    def summary(self) -> str:
        counts = [f"{len(some)} {status}" for status in (PASSED, FAILED, NOT_CHECKED) if (some := self._of(status))]
        return f"{', '.join(counts) or 'nothing to check'} in {sum(result.seconds for result in self.results):.1f} s"

    def __str__(self) -> str:
        return "\n".join([self.router, *map(str, self.results), self.summary])

    def _of(self, status: str) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status == status)


class ConformanceError(AssertionError):
    """A router breaks its contract. ``report`` holds every result; the text names each failed property, the input that
    shows it, what was expected, what came, and what to do."""

    def __init__(self, report: Report) -> None:
        self.report = report
        failed = report.failures
        head = f"{report.router}: {len(failed)} of {len(report.results)} properties do not hold"
        super().__init__("\n".join([head, *map(str, failed)]))


def chosen(only: Iterable[str] | None) -> list[Check]:
    """The checks of these names, in their order; every check for None.

    Raises:
        ValueError: no check has the name; the message offers the close matches.
    """
    from ...routers.base import _suggest

    if only is None:
        return list(CHECKS.values())
    names = [only] if isinstance(only, str) else list(only)
    for name in names:
        if name not in CHECKS:
            raise ValueError(f'unknown check "{name}"{_suggest(name, list(CHECKS))}')
    return [check for name, check in CHECKS.items() if name in names]


def _flow(text: str, indent: int) -> str:
    return textwrap.fill(" ".join(text.split()), 110, subsequent_indent=" " * indent)
