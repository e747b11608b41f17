"""A folder of latents: what ``latents.py`` writes, and how a recipe reads it.

    index.json                 settings, classes, and of each whole shard its file, count, bytes and sha256
    shard-00000.safetensors    "moments" [n, 2, 2C, h, w]: of n images, each as it is and mirrored; in the header their
    shard-00001.safetensors    paths, relative to the image folder

Moments are what a variational autoencoder's encoder returns: mean and log-variance, C channels each. A training step
takes one of an image's two moments at random and samples it:

    latent = scale * (mean + exp(clamp(logvar, -30, 20) / 2) * noise)        noise ~ N(0, 1)

Shards are mapped into memory and read a row at a time, so a folder may be larger than RAM. Shard k holds images
k * shard_size to (k + 1) * shard_size - 1 of the sorted list. What the index does not name does not count.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .draw import Draw
from .split import Data, Split, hold_out_paths, labels_of

VERSION = 1
COMMAND = "python -m gatewright.recipes.data.latents IMAGE_DIR --out DIR --vae VAE_DIR"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be the same for all latents of a folder.

    Attributes:
        image_size: side of the square that images were cropped to.
        shard_size: images a shard; the last one may hold fewer.
        scale: by what a sampled latent is multiplied.
        encoder: what encoded, in words or as a hash.
        images: how many.
        images_sha256: over their paths and sizes in bytes.
    """

    image_size: int
    shard_size: int
    scale: float
    encoder: str
    images: int
    images_sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A whole shard: images in it, bytes and sha256 of its file."""

    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """The content of index.json.

    Attributes:
        settings: of all shards.
        class_names: the sub-folders of the image folder.
        moments: (2C, h, w); None before the first shard.
        shards: by number; those not in it are yet to be written.
    """

    settings: Settings
    class_names: tuple[str, ...]
    moments: tuple[int, int, int] | None
    shards: dict[int, Shard]

    @property
    def num_shards(self) -> int:
        return -(-self.settings.images // self.settings.shard_size)

    def to_json(self) -> str:
        shards = [{"file": shard_name(k), **asdict(shard)} for k, shard in sorted(self.shards.items())]
        return json.dumps({"version": VERSION, **asdict(self), "shards": shards}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Index":
        """
        Raises:
            ValueError, KeyError, TypeError: the text is not what ``to_json`` gives.
        """
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"it has version {content['version']}, and this gatewright reads version {VERSION}")
        # only the number is taken from a file's name, so that an index cannot point outside its folder
        shards = {int(shard.pop("file")[len("shard-") :].split(".")[0]): Shard(**shard) for shard in content["shards"]}
        index = cls(
            settings=Settings(**content["settings"]),
            class_names=tuple(content["class_names"]),
            moments=content["moments"] and tuple(content["moments"]),
            shards=shards,
        )
        if min(index.settings.images, index.settings.shard_size) < 1 or (shards and not index.moments):
            raise ValueError("it has no images, or shards without a shape")
        if any(not 0 <= number < index.num_shards for number in shards):
            raise ValueError(f"it names shards beyond the {index.num_shards} that its settings make")
        return index


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_index(folder: Path) -> Index:
    """
    Raises:
        FileNotFoundError: no folder, or no index in it.
        ValueError: the index is damaged or of another version.
    """
    file = folder / "index.json"
    if not file.is_file():
        what = "no index.json in" if folder.is_dir() else "no folder"
        raise FileNotFoundError(f"there is {what} {folder}: write the latents with {COMMAND}")
    try:
        return Index.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged or no index of latents ({type(error).__name__}: {error}): "
            f"delete it and write the latents again with {COMMAND}"
        ) from error


def open_shard(folder: Path, number: int, index: Index):
    """Opens a shard without reading its latents, and compares it with the index. -> (handle, paths)

    Raises:
        ValueError: the shard is missing, damaged, or not what the index says.
    """
    file, expected = folder / shard_name(number), index.shards[number]
    repair = f"delete it and run the command again, it writes what is missing: {COMMAND}"
    if not file.is_file():
        raise ValueError(f"{file} is missing: run the command again, it writes what is missing: {COMMAND}")
    size = file.stat().st_size
    if size != expected.bytes:
        raise ValueError(f"{file} is damaged: the index says {expected.bytes} bytes, it has {size}; {repair}")
    try:
        handle = safe_open(file, framework="pt")
        shape, paths = handle.get_slice("moments").get_shape(), json.loads((handle.metadata() or {})["paths"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged: expected a safetensors file with moments and paths ({error}); {repair}"
        ) from error
    wanted = [expected.count, 2, *index.moments]
    if shape != wanted or len(paths) != expected.count:
        raise ValueError(
            f"{file} is damaged: expected moments {wanted} and {expected.count} paths, "
            f"it has {shape} and {len(paths)}; {repair}"
        )
    return handle, paths


def load_latents(folder: Path, *, name: str, image_size: int | None, flip: bool, validation_fraction: float) -> Data:
    """Opens every shard, reads none, and splits the images as ``imagefolder`` does.

    Raises:
        FileNotFoundError: no folder, or no index in it.
        ValueError: latents that are unfinished, damaged, or of images of another size than asked for.
    """
    index = read_index(folder)
    settings = index.settings
    if len(index.shards) < index.num_shards:
        raise ValueError(
            f"{folder} is unfinished: it has {len(index.shards)} of {index.num_shards} shards. "
            f"Run the command again, it continues: {COMMAND}"
        )
    if image_size not in (None, settings.image_size):
        raise ValueError(
            f"image_size={image_size}: {folder} holds latents of images of {settings.image_size} pixels; "
            "leave image_size out, or write latents of that size to another folder"
        )
    opened = [open_shard(folder, number, index) for number in range(index.num_shards)]
    paths = [path for _, shard_paths in opened for path in shard_paths]
    counts = [len(shard_paths) for _, shard_paths in opened]
    full = [settings.shard_size] * (len(counts) - 1)
    if counts[:-1] != full or len(set(paths)) != settings.images:
        raise ValueError(
            f"{folder} does not hold each image once: expected {settings.images} images in shards of "
            f"{settings.shard_size}, found {len(set(paths))} in {sum(counts)} rows; delete it and write it again"
        )
    if not {path.partition("/")[0] for path in paths} <= set(index.class_names):
        raise ValueError(f"{folder}: a shard has a class that index.json lacks; delete the folder and write it again")
    labels = labels_of(paths, index.class_names)
    held = hold_out_paths(paths, validation_fraction, name=name)
    handles = [handle for handle, _ in opened]
    train, validation = (
        LatentSplit(handles, mask.nonzero().flatten(), labels[mask], settings=settings, flip=flip)
        for mask in (~held, held)
    )
    channels, height, width = index.moments
    return Data(
        name=name,
        class_names=index.class_names,
        shape=(channels // 2, height, width),
        train=train,
        validation=validation,
        latent_scale=settings.scale,
    )


class LatentSplit(Split):
    """Latents that are read and sampled when asked for."""

    def __init__(self, handles: list, members: Tensor, labels: Tensor, *, settings: Settings, flip: bool) -> None:
        """
        Args:
            handles: the open shards.
            members: [N] which of all images belong to this split.
            labels: [N].
            settings: of the folder.
            flip: whether training takes an image's mirrored moments half of the time.
        """
        self.handles, self.members, self.labels, self.settings, self.flip = handles, members, labels, settings, flip

    def images(self, indices: Sequence[int] | Tensor, draw: Draw | None = None) -> Tensor:
        members = self.members[torch.as_tensor(indices, dtype=torch.int64)].tolist()
        if not members:
            return torch.empty(0, *self._moments(0, 0).chunk(2)[0].shape)
        mirrored = (draw.uniform("flip") < 0.5).tolist() if self.flip and draw else [False] * len(members)
        moments = [self._moments(member, int(side)) for member, side in zip(members, mirrored, strict=True)]
        mean, logvar = torch.stack(moments).float().chunk(2, dim=1)
        if draw is None:
            return mean * self.settings.scale
        noise = draw.normal("latent", tuple(mean.shape[1:]))
        return (mean + (logvar.clamp(-30, 20) / 2).exp() * noise) * self.settings.scale

    def _moments(self, member: int, side: int) -> Tensor:
        shard, row = divmod(member, self.settings.shard_size)
        return self.handles[shard].get_slice("moments")[row, side]
