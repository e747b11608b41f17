"""Fashion-MNIST, or anything else in its four files: gzipped idx, pixels and labels, ``train`` and ``t10k``.

An idx file is a magic number (0x0801: bytes in one dimension, 0x0803: in three), the size of each dimension, all as
big-endian 32-bit integers, and then the bytes. http://yann.lecun.com/exdb/mnist
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .split import ArraySplit, Data

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_fashion_mnist(folder: Path, *, name: str, flip: bool) -> Data:
    """Reads the four files of ``folder``; the split is theirs: ``train`` to train, ``t10k`` held out.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, or the four do not fit together.
    """
    kinds = ("images-idx3", "labels-idx1")
    files = [folder / f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in kinds]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name}: no {', '.join(missing)} in {folder}. Install Debian's package (apt install "
            "dataset-fashion-mnist), or name the folder that holds the four .gz files: fashion-mnist:DIR"
        )
    train_pixels, train_labels, held_pixels, held_labels = (
        read_idx(file, dimensions=dimensions) for file, dimensions in zip(files, (3, 1, 3, 1), strict=True)
    )
    if train_pixels.shape[1:] != held_pixels.shape[1:]:
        raise ValueError(
            f"{folder}: training images are {_size(train_pixels)}, held-out ones {_size(held_pixels)}: "
            "take all four files from the same data set"
        )
    return Data(
        name=name,
        class_names=CLASS_NAMES,
        shape=(1, *train_pixels.shape[1:]),
        train=_split(files[:2], train_pixels, train_labels, flip=flip),
        validation=_split(files[2:], held_pixels, held_labels, flip=flip),
    )


def read_idx(file: Path, *, dimensions: int) -> Tensor:
    """The bytes of a gzipped idx file, as a uint8 tensor with that many dimensions.

    Raises:
        ValueError: the file is no gzip file, is truncated, or is not an idx file of that kind and length.
    """
    replace = f"replace {file} by a whole copy"
    try:
        with gzip.open(file) as stream:
            content = stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is truncated or no gzip file ({error}): {replace}") from error
    header = 4 * (1 + dimensions)
    magic = int.from_bytes(content[:4], "big")
    if len(content) < header or magic != 0x0800 + dimensions:
        raise ValueError(
            f"{file} is no idx file of bytes in {dimensions} dimension(s): it starts with 0x{magic:08x} and not "
            f"0x{0x0800 + dimensions:08x}; {replace}"
        )
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{file} promises {' x '.join(map(str, shape))} = {math.prod(shape)} bytes and holds "
            f"{len(content) - header}: {replace}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def _split(files: list[Path], pixels: Tensor, labels: Tensor, *, flip: bool) -> ArraySplit:
    if not len(labels) or len(pixels) != len(labels):
        raise ValueError(
            f"{files[0]} holds {len(pixels)} images and {files[1].name} {len(labels)} labels: "
            "there must be as many of each, and at least one; take both from the same data set"
        )
    if int(labels.max()) >= len(CLASS_NAMES):
        raise ValueError(
            f"{files[1]} holds label {int(labels.max())}: labels must be 0 to {len(CLASS_NAMES) - 1}; "
            "replace it by Fashion-MNIST's"
        )
    return ArraySplit(pixels, labels.long(), top=255, flip=flip)


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[2]}"
