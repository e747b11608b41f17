"""The layer: experts, dispatch, expert parallelism.

The names below are imported when they are first used (PEP 562), so that `moe.files`, which the tools without torch
write with, costs no torch either.
"""

from typing import TYPE_CHECKING

from .. import names_on_first_use

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

__getattr__, __dir__ = names_on_first_use(
    __name__,
    {
        ".dispatch": ("DispatchPlan",),
        ".experts": ("ExpertSpec", "FeedForward", "GroupedExperts"),
        ".layer": ("MoELayer", "finish_step", "moe_layers"),
        ".parallel": ("ExpertParallel",),
        ".record": ("Recorder",),
        ".segment": ("SegmentFeedForward", "SegmentMoELayer"),
        ".upcycling": ("FeedForwardWeights", "merge_experts", "split_feed_forward", "upcycle"),
    },
)
