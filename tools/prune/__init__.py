"""Prune a trained MoE to a domain: collect statistics, plan, look at the sizes, rewrite the files, verify, evaluate.

The names below are imported when they are first used (PEP 562): what reads a plan or rewrites files imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .criteria import score
    from .plan import Plan, make_plan
    from .statistics import DomainStatistics, Statistics

_HOME = {
    **dict.fromkeys(("DomainStatistics", "Statistics"), ".statistics"),
    "score": ".criteria",
    **dict.fromkeys(("Plan", "make_plan"), ".plan"),
}

__all__ = ["DomainStatistics", "Plan", "Statistics", "make_plan", "score"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
