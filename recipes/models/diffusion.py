"""Training, validating and sampling a diffusion model, whatever its objective.

    objective = create_objective("flow", config)
    result = objective.loss(model, batch.images, batch.labels, batch.draw);  result.total.backward()
    held_out = validation_loss(objective, model, images, labels)             {"conditional": ..., "null": ...}
    images = draw_samples(objective, model, labels, guidance=2.0, steps=50, seed=0)

An objective is a file: ``flow.py``, ``ddpm.py``; what they share is ``objective.py``.
"""

import difflib
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatewright.recipes.data.draw import Draw

from .ddpm import DDPM
from .dit_config import DiTConfig
from .flow import Flow
from .objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Flow, DDPM)}
REPEATS = 4


def create_objective(name: str, config: DiTConfig, **options: Any) -> Objective:
    """
    Args:
        name: "flow" or "ddpm".
        config: of the models that it is for.
        options: of the objective, see its class.

    Raises:
        ValueError: an unknown name or option.
    """
    if name not in OBJECTIVES:
        close = difflib.get_close_matches(name, OBJECTIVES)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(OBJECTIVES)}"
        raise ValueError(f'unknown objective "{name}": {hint}')
    known = list(inspect.signature(OBJECTIVES[name].__init__).parameters)[2:]
    for option in options:
        if option not in known:
            raise ValueError(f'objective "{name}" takes no {option}: it has {", ".join(known)}')
    return OBJECTIVES[name](config, **options)


@torch.no_grad()
def validation_loss(
    objective: Objective,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 128,
    repeats: int = REPEATS,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, float]:
    """The loss on held-out images at noise and times that never change, with every label shown and with none.

    Collective where ``ranks`` > 1: ranks share the images, take the same number of forwards (expert parallelism needs
    that), and all get the same result.

    Args:
        images: [N, C, H, W], all of them on every rank.
        labels: [N].
        batch_size: images a forward.
        repeats: draws of noise and time for each image.
        rank, ranks: which of how many processes asks.

    Returns:
        "conditional" and "null", means over images and repeats.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for repeat in range(repeats):
        for first in range(0, len(images), batch_size * ranks):
            start = first + rank * batch_size
            # a rank without images of its own still takes part, with one that does not count
            chosen = list(range(start, min(start + batch_size, len(images))))
            positions = chosen or [0]
            x0 = images[positions].to(device)
            shown = labels[positions].to(device)
            draw = Draw(0, repeat, tuple(positions))
            for place, asked in enumerate((shown, torch.full_like(shown, objective.config.num_classes))):
                terms = objective.score(model, x0, asked, draw).terms
                totals[place] += sum(term.double().sum() for term in terms.values()) * bool(chosen)
    model.train(was_training)
    if ranks > 1:
        dist.all_reduce(totals)
    conditional, null = (totals / (repeats * len(images))).tolist()
    return {"conditional": conditional, "null": null}


@torch.no_grad()
def draw_samples(
    objective: Objective,
    model: nn.Module,
    labels: Tensor,
    *,
    guidance: float = 1.0,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """Images of the labels, from noise that belongs to the place in ``labels``: another batch size draws the same.

    Args:
        labels: [N] int64 classes; ``num_classes`` asks for none in particular.
        guidance: 1 = none.
        steps: forwards an image.

    Returns:
        [N, C, H, W] float32, on the model's device.

    Raises:
        ValueError: a label that is no class, or an option outside its range.
    """
    config = objective.config
    if labels.dim() != 1 or len(labels) == 0 or not ((labels >= 0) & (labels <= config.num_classes)).all():
        raise ValueError(
            f"labels={labels.tolist()}: give classes 0 to {config.num_classes - 1}, or {config.num_classes} for none"
        )
    if steps < 1 or batch_size < 1 or guidance < 0:
        raise ValueError(f"steps={steps}, batch_size={batch_size}, guidance={guidance}: at least 1, 1 and 0")
    device = next(model.parameters()).device
    like = torch.empty(0, device=device)
    was_training = model.training
    model.eval()
    images = []
    for first in range(0, len(labels), batch_size):
        asked = labels[first : first + batch_size].to(device)
        draw = Draw(seed, 0, tuple(range(first, first + len(asked))))
        images.append(objective.sample(model, asked, draw, guidance=guidance, steps=steps, like=like))
    model.train(was_training)
    return torch.cat(images)
