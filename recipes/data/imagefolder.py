"""A folder of images, one sub-folder a class.

The images of a class are all files below its folder whose ending Pillow knows. An image is decoded when a batch asks
for it, brought to 8-bit RGB, and cropped as in ADM (Dhariwal and Nichol, arXiv:2105.05233, and since then DiT, DiffMoE
and ProMoE): halved with a box filter while its shorter side is at least twice the size asked for, scaled with a
bicubic filter so that the shorter side has that size, and cut to a square around the centre.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .draw import Draw
from .split import Data, Split, hold_out_paths, labels_of, mirror

try:
    from PIL import Image
except ImportError as error:
    raise ImportError(
        'images are read with Pillow, which is not installed: run pip install "gatewright[recipes]"'
    ) from error


@dataclass(frozen=True)
class ImageFolder:
    """What a folder holds.

    Attributes:
        root: the folder.
        class_names: its sub-folders, sorted.
        paths: of the images, relative to the folder, with "/"; sorted within each class, classes in order.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...]


def load_image_folder(root: Path, *, name: str, image_size: int | None, flip: bool, validation_fraction: float) -> Data:
    """Lists the folder and splits it; no image is opened yet.

    Raises:
        FileNotFoundError, ValueError: see ``list_images`` and ``hold_out_paths``; no ``image_size``.
    """
    if image_size is None:
        raise ValueError(f"{name} needs image_size, the side of the square that images are cropped to, such as 256")
    if image_size < 1:
        raise ValueError(f"image_size={image_size}: choose 1 or more")
    folder = list_images(root)
    labels = labels_of(folder.paths, folder.class_names)
    held = hold_out_paths(folder.paths, validation_fraction, name=name)
    train, validation = (
        FolderSplit(
            root,
            [path for path, chosen in zip(folder.paths, mask.tolist(), strict=True) if chosen],
            labels[mask],
            image_size=image_size,
            flip=flip,
        )
        for mask in (~held, held)
    )
    return Data(
        name=name,
        class_names=folder.class_names,
        shape=(3, image_size, image_size),
        train=train,
        validation=validation,
    )


class FolderSplit(Split):
    """Images that are decoded when asked for."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor, *, image_size: int, flip: bool) -> None:
        self.root, self.paths, self.labels, self.image_size, self.flip = root, paths, labels, image_size, flip

    def images(self, indices: Sequence[int] | Tensor, draw: Draw | None = None) -> Tensor:
        files = [self.root / self.paths[index] for index in torch.as_tensor(indices, dtype=torch.int64).tolist()]
        x = read_images(files, self.image_size)
        return mirror(x, draw) if self.flip else x


def list_images(root: Path) -> ImageFolder:
    """Finds the classes of a folder and their images. Names that start with a dot are left out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no sub-folders, or one of them without images.
    """
    layout = f"put the images of each class into a sub-folder of their own, as in {root / 'cat' / '1.png'}"
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: give the folder that holds one sub-folder a class")
    class_names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not class_names:
        raise ValueError(f"{root} has no sub-folders: {layout}")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for class_name in class_names:
        found = []
        for folder, folders, files in os.walk(root / class_name):
            folders[:] = [name for name in folders if name[0] != "."]
            below = Path(folder).relative_to(root).as_posix()
            found += [
                f"{below}/{file}" for file in files if file[0] != "." and os.path.splitext(file)[1].lower() in endings
            ]
        if not found:
            raise ValueError(
                f"{root / class_name} holds no image that Pillow reads: each sub-folder is a class, so {layout}, "
                "or remove the empty one"
            )
        paths += sorted(found)
    return ImageFolder(root, class_names, tuple(paths))


def read_images(files: Sequence[Path], image_size: int) -> Tensor:
    """Decodes and crops images. -> [B, 3, S, S] float32 in [-1, 1]

    Raises:
        FileNotFoundError, ValueError: a file is gone, or is no image that can be brought to 8-bit RGB; with its name.
    """
    if not files:
        return torch.empty(0, 3, image_size, image_size)
    # threads, because Pillow decodes outside the interpreter's lock
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        pixels = np.stack(list(pool.map(lambda file: read_image(file, image_size), files)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def read_image(file: Path, image_size: int) -> np.ndarray:
    """Decodes and crops one image. -> [S, S, 3] uint8"""
    try:
        with Image.open(file) as image:
            image.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} was there when the folder was listed and is gone: put it back") from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise ValueError(f"{file} cannot be read as an image ({error}): replace it, or remove it") from error
    if image.mode[0] in "IF":
        raise ValueError(
            f"{file} has more than 8 bits a channel (mode {image.mode}), which RGB would clip: "
            "convert it to 8 bits, or remove it"
        )
    return np.asarray(centre_crop(image.convert("RGB"), image_size))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
