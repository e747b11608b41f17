"""What a training objective of a diffusion model is, and what all of them share.

    total = mean over the batch of the objective's loss
          + sum over MoE layers of the routers' losses
          + prediction_weight * sum over MoE layers of mean (router's prediction - target)^2      where routers predict

Noise, times and label dropout come from a ``Draw``, keyed by (seed, step, position in the global batch): every rank
layout and every micro-batching draws the same. Guidance runs both branches in one forward and acts on all channels:

    out = out_null + guidance * (out_label - out_null)
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewright.recipes.data.draw import Draw
from gatewright.routers import Routing

from .dit import patches
from .dit_config import DiTConfig

PREDICTION_WEIGHT = 0.1  # the paper's was not seen
Model = Callable[..., tuple[Tensor, list[Routing]]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionLoss:
    """
    Attributes:
        loss: the objective, a scalar with gradient, comparable over routers.
        parts: what it is the sum of, where that is more than one thing; detached.
        auxiliary: weighted losses besides it, by name, each summed over the MoE layers.
        routings: the decisions of the MoE layers, in order.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    auxiliary: dict[str, Tensor]
    routings: list[Routing]

    @property
    def total(self) -> Tensor:
        """What to minimise."""
        return self.loss + sum(self.auxiliary.values())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A model's answer held against what was asked, without a mean over the batch.

    Attributes:
        terms: [B] each; their sum is the objective.
        target: [B, C, H, W] what the first C channels should be.
        routings: the decisions of the MoE layers.
    """

    terms: dict[str, Tensor]
    target: Tensor
    routings: list[Routing]


class Objective(ABC):
    """An objective for models of one configuration.

    Args:
        config: the model's; classes, label dropout and whether routers predict the target are read from it.
        prediction_weight: of the mean squared error of the routers' predictions, where they predict.
    """

    name: ClassVar[str]

    def __init__(self, config: DiTConfig, *, prediction_weight: float = PREDICTION_WEIGHT) -> None:
        if prediction_weight < 0:
            raise ValueError(f"prediction_weight={prediction_weight}: choose 0 or more")
        self.config, self.prediction_weight = config, prediction_weight

    @abstractmethod
    def score(self, model: Model, x0: Tensor, labels: Tensor, draw: Draw) -> Scored:
        """Noises x0 [B, C, H, W] by ``draw``, asks the model with labels [B] as they are, and scores its answer."""

    @abstractmethod
    def sample(self, model: Model, labels: Tensor, draw: Draw, *, guidance: float, steps: int, like: Tensor) -> Tensor:
        """Images [B, C, H, W] of the labels [B], from ``draw``'s noise; on the device and in the dtype of ``like``."""

    def loss(self, model: Model, x0: Tensor, labels: Tensor, draw: Draw) -> DiffusionLoss:
        """The training loss of a micro-batch: hides labels, then scores.

        Args:
            model: called as ``DiT.forward``.
            x0: [B, C, H, W] clean images.
            labels: [B] their classes.
            draw: the random numbers of these samples in this step.
        """
        scored = self.score(model, x0, self.drop_labels(labels, draw), draw)
        parts = {name: value.mean() for name, value in scored.terms.items()}
        return DiffusionLoss(
            loss=torch.stack(list(parts.values())).sum(),
            parts={name: value.detach() for name, value in parts.items()} if len(parts) > 1 else {},
            auxiliary=self.auxiliary(scored.routings, scored.target),
            routings=scored.routings,
        )

    def drop_labels(self, labels: Tensor, draw: Draw) -> Tensor:
        """Each label becomes the null label with probability ``config.label_dropout``. [B] -> [B]"""
        hidden = draw.uniform("hide label").to(labels.device) < self.config.label_dropout
        return torch.where(hidden, self.config.num_classes, labels)

    def auxiliary(self, routings: list[Routing], target: Tensor) -> dict[str, Tensor]:
        """The routers' losses by name, summed over layers, and that of their predictions."""
        losses: dict[str, Tensor] = {}
        for routing in routings:
            for name, value in routing.losses.items():
                losses[name] = losses[name] + value if name in losses else value
        if self.config.predicts_target and self.prediction_weight:
            losses["prediction"] = self.prediction_weight * prediction_loss(routings, target, self.config.patch)
        return losses

    def ask(self, model: Model, x: Tensor, t: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, list[Routing]]:
        """The model's answer, in x's dtype, with the key of the routers' noise."""
        sample_id = torch.tensor(draw.positions, device=x.device)
        out, routings = model(x, t, labels, sample_id=sample_id, seed=draw.seed, step=draw.step)
        return out.to(x.dtype), routings

    def guide(self, model: Model, x: Tensor, t: Tensor, labels: Tensor, guidance: float) -> Tensor:
        """The guided answer. ``guidance=1`` asks for the label alone."""
        if guidance == 1:
            return model(x, t, labels)[0].to(x.dtype)
        both = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        out = model(torch.cat([x, x]), torch.cat([t, t]), both)[0].to(x.dtype)
        conditional, null = out.chunk(2)
        return null + guidance * (conditional - null)


def prediction_loss(routings: list[Routing], target: Tensor, patch: int) -> Tensor:
    """Each router's prediction [T, patch * patch * C] against the target [B, C, H, W]: mean squares, added up.

    Per-layer regularisation of Expert Race, arXiv:2503.16057, figure 12: shallow routers see what the model is for.
    """
    target_TP = patches(target, patch).flatten(0, 1)
    return torch.stack([F.mse_loss(routing.prediction.to(target.dtype), target_TP) for routing in routings]).sum()
