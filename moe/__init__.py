"""The layer: experts, dispatch, expert parallelism."""

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
