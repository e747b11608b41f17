"""What pruning asks about a diffusion transformer: its demonstrations, its losses by class, its configuration.

A demonstration is a class, images of it, and the seeds of noise and time, a line of JSON:

    {"class": 3, "images": [17, 250], "noise": 0, "time": 0, "draws": 4, "domain": "threes"}

``images`` are places in the training split of the run's data, ``draws`` how many pairs of noise and time each image is
seen at (1 by default), ``class`` null asks without a label. Every image and draw is one noisy image through the model,
scored by nothing: what counts is which experts it used. Noise and times are those of training, keyed by seed, draw and
image, so that the same line always shows the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gatewright.recipes.data import Data, load_data
from gatewright.recipes.data.draw import Draw
from gatewright.tools.prune.runs import Branch
from gatewright.tools.runs import Run

from .diffusion import REPEATS, create_objective
from .dit import DiT
from .dit_config import DiTConfig

FIELDS = {"class", "images", "noise", "time", "draws"}
TIME = "time"  # what the objectives call that stream


@dataclass(frozen=True)
class Demonstration:
    """
    Attributes:
        label: the class, or ``num_classes`` for none.
        images: places in the training split.
        noise, time: seeds.
        draws: noisy versions of each image.
    """

    label: int
    images: tuple[int, ...]
    noise: int = 0
    time: int = 0
    draws: int = 1

    def record(self) -> dict[str, Any]:
        """The line of JSON, for a class that has a label."""
        return {
            "class": self.label,
            "images": list(self.images),
            "noise": self.noise,
            "time": self.time,
            "draws": self.draws,
        }


@dataclass(frozen=True)
class _Draw(Draw):
    """A draw whose times have a seed of their own."""

    time_seed: int = 0

    def _generators(self, purpose: str):
        if purpose != TIME:
            return super()._generators(purpose)
        return Draw(self.time_seed, self.step, self.positions)._generators(purpose)


class DiTSubject:
    """
    Args:
        model: of a run.
        run: that run; its options say the objective and the data.
    """

    def __init__(self, model: DiT, run: Run) -> None:
        self.model, self.run = model, run
        self.objective = create_objective(run.options.get("objective", "flow"), model.config)

    @cached_property
    def data(self) -> Data:
        return load_data(self.run.options["data"], image_size=self.run.options.get("image_size"))

    def branch(self, layer: torch.nn.Module) -> Branch:
        block = self.model.blocks[layer.layer]
        return Branch(block.norm2, block.adaLN_modulation, lambda modulation: modulation.chunk(6, dim=-1)[5])

    def read_demo(self, record: Mapping[str, Any], where: str) -> Demonstration:
        """
        Raises:
            ValueError: fields that are missing or unknown, images that the data does not have or of another class.
        """
        unknown, missing = record.keys() - FIELDS, {"class", "images"} - record.keys()
        if unknown or missing:
            what = f"has {', '.join(sorted(unknown))}" if unknown else f"lacks {', '.join(sorted(missing))}"
            raise ValueError(
                f'{where} {what}: a demonstration for a diffusion run is {{"class": 3, "images": [17], "noise": 0, '
                '"time": 0, "draws": 1}'
            )
        classes, labels = self.model.config.num_classes, self.data.train.labels
        label = classes if record["class"] is None else record["class"]
        if not _whole(label) or not 0 <= label < classes + (record["class"] is None):
            raise ValueError(f'{where}: "class" is {record["class"]!r}: give 0 to {classes - 1}, or null for none')
        images = record["images"]
        if (
            not isinstance(images, list)
            or not images
            or not all(_whole(one) and 0 <= one < len(labels) for one in images)
        ):
            raise ValueError(
                f'{where}: "images" must be a list of places of 0 to {len(labels) - 1} in {self.data.name}'
            )
        others = [one for one in images if label != classes and int(labels[one]) != label]
        if others:
            raise ValueError(
                f"{where}: image {others[0]} of {self.data.name} is a {int(labels[others[0]])}, no {label}"
            )
        numbers = {name: record.get(name, default) for name, default in (("noise", 0), ("time", 0), ("draws", 1))}
        for name, value in numbers.items():
            if not _whole(value) or value < (name == "draws"):
                raise ValueError(f'{where}: "{name}" is {value!r}: give a whole number from {int(name == "draws")}')
        return Demonstration(label, tuple(images), **numbers)

    def run_demo(self, demo: Demonstration) -> int:
        device = next(self.model.parameters()).device
        x0 = self.data.train.images(demo.images).to(device)
        for draw in range(demo.draws):
            keyed = _Draw(demo.noise, draw, demo.images, time_seed=demo.time)
            self.objective.score(self.model, x0, torch.full((len(x0),), demo.label, device=device), keyed)
        return demo.draws * len(demo.images) * self.model.config.num_tokens

    @torch.no_grad()
    def losses(self, classes: Sequence[int] | None = None, *, repeats: int = REPEATS) -> dict[str, float]:
        """The objective on all held-out images of each class, labels shown, at noise and times that never change.

        Raises:
            ValueError: a class that the data does not have.
        """
        labels, device = self.data.validation.labels, next(self.model.parameters()).device
        found = {}
        for label in range(self.model.config.num_classes) if classes is None else classes:
            places = (labels == label).nonzero().flatten().tolist()
            if not places:
                raise ValueError(f"class {label}: {self.data.name} has no held-out image of it")
            x0 = self.data.validation.images(places).to(device)
            total = 0.0
            for repeat in range(repeats):
                shown = torch.full((len(x0),), label, device=device)
                terms = self.objective.score(self.model, x0, shown, Draw(0, repeat, tuple(places))).terms
                total += sum(float(term.double().sum()) for term in terms.values())
            found[self.data.class_names[label]] = total / (repeats * len(places))
        return found

    def answer(self) -> Tensor:
        """To four noisy images, one without a label."""
        config, device = self.model.config, next(self.model.parameters()).device
        draw = Draw(0, 0, (0, 1, 2, 3))
        labels = torch.tensor([0, 1 % config.num_classes, config.num_classes, 0], device=device)
        x = draw.normal("noise", config.input_shape).to(device)
        t = 1000 * draw.uniform(TIME).to(device)
        return self.model(x, t, labels, sample_id=torch.arange(4, device=device), seed=0, step=0)[0]

    @staticmethod
    def resized(
        config: Mapping[str, Any],
        keep: Sequence[Sequence[int]],
        *,
        reroute: bool,
        router_options: Mapping[str, Any],
        top_k: float | None,
    ) -> dict[str, Any]:
        if not reroute:
            values = {"kept_experts": [list(ids) for ids in keep]}
        else:
            values = {"num_experts": [len(ids) for ids in keep]}
        values["router_options"] = {**config["router_options"], **router_options}
        if top_k is not None:
            values["top_k"] = top_k
        return DiTConfig.from_dict({**config, **values}).as_dict()


def draw_demonstrations(
    data: Data, classes: Sequence[int], count: int, *, images: int = 1, draws: int = 1, seed: int = 0
) -> list[Demonstration]:
    """``count`` demonstrations, the classes in turn, of training images drawn without repetition.

    Raises:
        ValueError: a class without enough images.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = {}
    for label in classes:
        places = (data.train.labels == label).nonzero().flatten()
        pools[label] = places[torch.randperm(len(places), generator=generator)].tolist()
    found = []
    for place in range(count):
        label = classes[place % len(classes)]
        if len(pools[label]) < images:
            raise ValueError(f"{count} demonstrations of {images} images: {data.name} has too few of class {label}")
        chosen, pools[label] = pools[label][:images], pools[label][images:]
        found.append(Demonstration(label, tuple(chosen), noise=seed, time=seed, draws=draws))
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
