"""gatewright: train Mixture-of-Experts models whose routing is the thing under study.

The names below are imported when they are first used (PEP 562), so `import gatewright` imports no torch: the console
command answers at once, and a build can read the version.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .moe import (
        DispatchPlan,
        ExpertParallel,
        ExpertSpec,
        FeedForward,
        GroupedExperts,
        MoELayer,
        finish_step,
    )
    from .routers import Router, Routing, TokenContext, create_router, list_routers, register_router

__all__ = [
    "DispatchPlan",
    "ExpertParallel",
    "ExpertSpec",
    "FeedForward",
    "GroupedExperts",
    "MoELayer",
    "Router",
    "Routing",
    "TokenContext",
    "__version__",
    "create_router",
    "finish_step",
    "list_routers",
    "register_router",
]

_HOME = {
    **dict.fromkeys(
        ("Router", "Routing", "TokenContext", "create_router", "list_routers", "register_router"), ".routers"
    ),
    **dict.fromkeys(
        (
            "DispatchPlan",
            "ExpertParallel",
            "ExpertSpec",
            "FeedForward",
            "GroupedExperts",
            "MoELayer",
            "finish_step",
        ),
        ".moe",
    ),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
