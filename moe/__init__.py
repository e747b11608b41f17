"""The layer: experts, dispatch, expert parallelism.

The names below are imported when they are first used (PEP 562), so that `moe.files`, which the tools without torch
write with, costs no torch either.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dispatch import DispatchPlan
    from .experts import ExpertSpec, FeedForward, GroupedExperts
    from .layer import MoELayer, finish_step, moe_layers
    from .parallel import ExpertParallel
    from .record import Recorder
    from .segment import SegmentFeedForward, SegmentMoELayer
    from .upcycling import FeedForwardWeights, merge_experts, split_feed_forward, upcycle

__all__ = [
    "DispatchPlan",
    "ExpertParallel",
    "ExpertSpec",
    "FeedForward",
    "FeedForwardWeights",
    "GroupedExperts",
    "MoELayer",
    "Recorder",
    "SegmentFeedForward",
    "SegmentMoELayer",
    "finish_step",
    "merge_experts",
    "moe_layers",
    "split_feed_forward",
    "upcycle",
]

_HOME = {
    **dict.fromkeys(("DispatchPlan",), ".dispatch"),
    **dict.fromkeys(
        (
            "ExpertSpec",
            "FeedForward",
            "GroupedExperts",
        ),
        ".experts",
    ),
    **dict.fromkeys(
        (
            "MoELayer",
            "finish_step",
            "moe_layers",
        ),
        ".layer",
    ),
    **dict.fromkeys(("ExpertParallel",), ".parallel"),
    **dict.fromkeys(("Recorder",), ".record"),
    **dict.fromkeys(
        (
            "SegmentFeedForward",
            "SegmentMoELayer",
        ),
        ".segment",
    ),
    **dict.fromkeys(
        (
            "FeedForwardWeights",
            "merge_experts",
            "split_feed_forward",
            "upcycle",
        ),
        ".upcycling",
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
