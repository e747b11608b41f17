"""Grids of images as PNG files."""

import io
from pathlib import Path

import torch
from torch import Tensor

from gatewright.moe.files import write_bytes


def save_grid(pixels: Tensor, path: Path, *, columns: int, side: int = 64, gap: int = 2) -> None:
    """Writes images as one PNG, row by row, atomically.

    Args:
        pixels: [N, H, W, C] uint8, C 1 or 3.
        columns: images a row.
        side: small images are enlarged, by a whole factor, to about this side.
        gap: white pixels between images.
    """
    from PIL import Image

    pixels = pixels.cpu()
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(*pixels.shape[:-1], 3)
    factor = max(1, round(side / max(pixels.shape[1:3])))
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    grid = torch.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=torch.uint8)
    for place, image in enumerate(pixels):
        top, left = (gap + at * (size + gap) for at, size in zip(divmod(place, columns), (height, width), strict=True))
        grid[top : top + height, left : left + width] = image
    encoded = io.BytesIO()
    Image.fromarray(grid.numpy()).save(encoded, format="png")
    write_bytes(path, encoded.getvalue())
