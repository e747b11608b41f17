"""Models that the recipes share: the diffusion transformer, its objectives, the way to and from released weights."""

from .diffusion import create_objective, draw_samples, validation_loss
from .dit import DiT, ParameterCount, count_parameters
from .dit_config import DiTConfig, dit_config
from .objective import DiffusionLoss, Objective

__all__ = [
    "DiT",
    "DiTConfig",
    "DiffusionLoss",
    "Objective",
    "ParameterCount",
    "count_parameters",
    "create_objective",
    "dit_config",
    "draw_samples",
    "validation_loss",
]
