"""The layer: experts, dispatch, expert parallelism."""

from .dispatch import DispatchPlan
from .experts import ExpertSpec, FeedForward, GroupedExperts
from .layer import MoELayer, finish_step, moe_layers
from .parallel import ExpertParallel

__all__ = [
    "DispatchPlan",
    "ExpertParallel",
    "ExpertSpec",
    "FeedForward",
    "GroupedExperts",
    "MoELayer",
    "finish_step",
    "moe_layers",
]
