"""Small data, made for the tests of recipes/data: a folder of images, the four files of Fashion-MNIST, an encoder."""

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d


def make_images(root: Path, counts: dict[str, int], *, size: tuple[int, int] = (20, 16)) -> Path:
    """PNG files of random colours, ``counts`` of them a class; the same for the same names."""
    for class_name, count in counts.items():
        (root / class_name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([number, *class_name.encode()]).integers(0, 256, (*size[::-1], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / class_name / f"{number}.png")
    return root


def make_idx(file: Path, content: np.ndarray) -> None:
    header = (0x0800 + content.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in content.shape)
    file.write_bytes(gzip.compress(header + content.astype(np.uint8).tobytes()))


def make_fashion_mnist(folder: Path, *, train: int = 20, held_out: int = 10) -> Path:
    folder.mkdir(exist_ok=True)
    for part, count in (("train", train), ("t10k", held_out)):
        make_idx(folder / f"{part}-images-idx3-ubyte.gz", np.arange(count * 28 * 28).reshape(count, 28, 28) % 256)
        make_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


def encode(x: Tensor) -> Tensor:
    """Eight channels of moments at a quarter of the size. [N, 3, H, W] -> [N, 8, H/4, W/4]"""
    mean = avg_pool2d(x, 4)
    mean = torch.cat([mean, mean.mean(1, keepdim=True)], dim=1)
    return torch.cat([mean, mean - 2], dim=1)
