"""What a data set is to a recipe: labelled images in two splits, and the way back from numbers to a picture."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .draw import Draw


class Split(ABC):
    """N labelled images, read when asked for.

    Attributes:
        labels: [N] int64, the class of each image.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def images(self, indices: Sequence[int] | Tensor, draw: Draw | None = None) -> Tensor:
        """The images at ``indices``. -> [B, C, H, W] float32, pixels in [-1, 1] or scaled latents

        Args:
            indices: B positions in this split.
            draw: random numbers for what training varies (mirroring, sampling a latent). Without them an image is
                never mirrored and a latent is its distribution's mean, so that evaluation always sees the same.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    """A data set.

    Attributes:
        name: what ``load_data`` was asked for.
        class_names: one a class; a label is an index into it.
        shape: (C, H, W) of one image, or of one latent.
        train, validation: disjoint.
        latent_scale: by what latents were multiplied; None where the images are pixels.
    """

    name: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Split
    validation: Split
    latent_scale: float | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_pixels(self, x: Tensor, *, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Turns images, as a split gives or a model draws them, into a picture. [B, C, H, W] -> uint8 [B, H, W, C]

        Args:
            x: pixels in [-1, 1] (values outside are clipped), or scaled latents.
            decode: for latents, and only for them: unscaled latents [B, C, h, w] -> pixels [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: latents without ``decode``, or pixels with it.
        """
        if (self.latent_scale is not None) != (decode is not None):
            if decode is None:
                raise ValueError(
                    f"{self.name} holds latents, which are no pixels: give decode=, a function from latents to pixels, "
                    "such as load_autoencoder(FOLDER).decode of gatewright.recipes.data.autoencoder"
                )
            raise ValueError(f"{self.name} holds pixels, which need no decoding: leave decode out")
        if decode is not None:
            x = decode(x / self.latent_scale)
        pixels = (x.detach().float().clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class ArraySplit(Split):
    """Images that fit into memory, kept as the bytes they came in."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, top: int, flip: bool = False) -> None:
        """
        Args:
            pixels: [N, H, W] uint8.
            labels: [N] int64.
            top: the value of white: 0 becomes -1 and ``top`` becomes 1.
            flip: whether training sees half of the images mirrored.
        """
        self.pixels, self.labels, self.top, self.flip = pixels, labels, top, flip

    def images(self, indices: Sequence[int] | Tensor, draw: Draw | None = None) -> Tensor:
        x = self.pixels[torch.as_tensor(indices, dtype=torch.int64)].float().mul(2 / self.top).sub(1)[:, None]
        return mirror(x, draw) if self.flip else x


def mirror(x: Tensor, draw: Draw | None) -> Tensor:
    """Mirrors half of the images left to right. [B, C, H, W] -> [B, C, H, W]"""
    if draw is None:
        return x
    return torch.where((draw.uniform("flip") < 0.5)[:, None, None, None], x.flip(-1), x)


def hold_out(labels: Tensor, count: int) -> Tensor:
    """Chooses ``count`` samples to hold out, the same share of each class, spread evenly over its samples. -> [N] bool

    No seed enters: every run on the same data holds out the same samples. Shares that do not come out whole are
    rounded down and what is missing goes to the classes with the largest remainders.
    """
    sizes = torch.bincount(labels)
    quotas = sizes * count // len(labels)
    remainders = sizes * count % len(labels)
    quotas[remainders.argsort(descending=True, stable=True)[: count - int(quotas.sum())]] += 1
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, (size, quota) in enumerate(zip(sizes.tolist(), quotas.tolist(), strict=True)):
        rank = torch.arange(size)
        held[(labels == label).nonzero().flatten()] = (rank + 1) * quota // max(size, 1) > rank * quota // max(size, 1)
    return held


def labels_of(paths: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """The class of each image of a folder: the first part of its path. -> [N] int64"""
    number = {name: label for label, name in enumerate(class_names)}
    return torch.tensor([number[path.partition("/")[0]] for path in paths], dtype=torch.int64)


def hold_out_paths(paths: Sequence[str], fraction: float, *, name: str) -> Tensor:
    """Holds out ``fraction`` of each class of a folder: the images whose paths have the smallest hashes. -> [N] bool

    The number is rounded, but at least one image of each class is held out and at least one trained on; of a class
    with a single image none is held out. A class's choice depends on its own paths only.

    Raises:
        ValueError: no class has two images.
    """
    members: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        members.setdefault(path.partition("/")[0], []).append(index)
    held = torch.zeros(len(paths), dtype=torch.bool)
    for indices in members.values():
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        held[sorted(indices, key=lambda index: _path_hash(paths[index]))[:count]] = True
    if not held.any():
        raise ValueError(f"{name}: each class has one image, so none can be held out; add a second one to some class")
    return held


def _path_hash(path: str) -> bytes:
    return hashlib.blake2b(path.encode(errors="surrogateescape")).digest()  # a file's name need not be valid UTF-8
