"""gatewright: train Mixture-of-Experts models whose routing is the thing under study.

The names below are imported when they are first used (PEP 562), so `import gatewright` imports no torch: the console
command answers at once, and a build can read the version.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
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


def names_on_first_use(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names come from its modules when they are first used.

    Args:
        package: its ``__name__``.
        homes: the public names by the module that has them (".layer").
    """
    home = {name: module for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name], package), name)
        setattr(sys.modules[package], name, value)  # the next use does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return __getattr__, __dir__


__getattr__, __dir__ = names_on_first_use(
    __name__,
    {
        ".moe": (
            "DispatchPlan",
            "ExpertParallel",
            "ExpertSpec",
            "FeedForward",
            "GroupedExperts",
            "MoELayer",
            "finish_step",
        ),
        ".routers": ("Router", "Routing", "TokenContext", "create_router", "list_routers", "register_router"),
    },
)
