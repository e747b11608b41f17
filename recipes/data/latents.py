"""Writes the latents of an image folder, so that training needs neither the images nor the autoencoder.

    python -m gatewright.recipes.data.latents IMAGE_DIR --out DIR --vae VAE_DIR [--image-size 256]

The format is in ``latent_folder.py``. Each shard is written under another name, synced to the disk and renamed, and
only then entered in the index, which is replaced in the same way: after a kill at any point the command continues
with the shards that are missing, and one that was damaged since is found by its sha256 and written again. An image of
256 pixels takes 64 KiB with the usual autoencoder (2 x 8 x 32 x 32 float32): ImageNet takes 84 GB.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .imagefolder import ImageFolder, list_images, read_images
from .latent_folder import Index, Settings, Shard, open_shard, read_index, shard_name

SD_VAE_SCALE = 0.18215
logger = logging.getLogger(__name__)


def write_latents(
    image_dir: str | Path,
    out: str | Path,
    encode: Callable[[Tensor], Tensor],
    *,
    image_size: int,
    encoder: str,
    scale: float = SD_VAE_SCALE,
    shard_size: int = 1024,
    batch_size: int = 16,
) -> None:
    """Writes the moments of every image of a folder and of its mirror image, or those that ``out`` still lacks.

    Args:
        image_dir: one sub-folder a class.
        out: where to write; it may hold a part of the same latents.
        encode: images [N, 3, S, S] in [-1, 1] -> moments [N, 2C, h, w], mean and log-variance. Stored in its dtype.
        image_size: S, the side of the square that images are cropped to.
        encoder: a name for ``encode``, by which a folder refuses another one.
        scale: by what a recipe multiplies a sampled latent.
        shard_size: images a shard.
        batch_size: images that are encoded at once.

    Raises:
        FileNotFoundError: no image folder.
        ValueError: sizes below 1, an image that cannot be read, moments that are none, or an ``out`` that lies in the
            image folder, was written with other settings, or is being written to.
    """
    image_dir, out = Path(image_dir), Path(out)
    sizes = {"image_size": image_size, "shard_size": shard_size, "batch_size": batch_size}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: choose 1 or more")
    if out.resolve().is_relative_to(image_dir.resolve()):
        raise ValueError(f"{out} lies in {image_dir}, where it would be taken for a class: choose another --out")
    folder = list_images(image_dir)
    settings = Settings(
        image_size=image_size,
        shard_size=shard_size,
        scale=scale,
        encoder=encoder,
        images=len(folder.paths),
        images_sha256=_digest(folder),
    )
    out.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        index = _whole_part(out, Index(settings=settings, class_names=folder.class_names, moments=None, shards={}))
        _write_missing(out, index, folder, encode, batch_size=batch_size)


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    directory = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
        except BlockingIOError as error:
            raise ValueError(f"{out} is being written to by another process: wait, or choose another --out") from error
        yield
    finally:
        os.close(directory)


def _write_missing(
    out: Path, index: Index, folder: ImageFolder, encode: Callable[[Tensor], Tensor], *, batch_size: int
) -> None:
    _write_whole(out / "index.json", index.to_json().encode())
    shard_size, image_size = index.settings.shard_size, index.settings.image_size
    for number in range(index.num_shards):
        if number in index.shards:
            continue
        paths = folder.paths[number * shard_size : (number + 1) * shard_size]
        moments = _encode(encode, folder, paths, image_size=image_size, batch_size=batch_size)
        shape = tuple(moments.shape[2:])
        if index.moments not in (None, shape):
            raise ValueError(
                f"the encoder returned moments {shape} for {paths[0]} and {index.moments} for the shards before: "
                "give the encoder that they were written with, or another --out"
            )
        content = save({"moments": moments}, metadata={"paths": json.dumps(paths)})
        _write_whole(out / shard_name(number), content)
        shard = Shard(count=len(paths), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        index = replace(index, moments=shape, shards={**index.shards, number: shard})
        _write_whole(out / "index.json", index.to_json().encode())
        logger.info("%s: shard %d of %d, %d images", out, number + 1, index.num_shards, len(paths))
    _check_complete(out, index, folder)


def _whole_part(out: Path, fresh: Index) -> Index:
    """What ``out`` already holds of these latents: its index, without the shards that are missing or damaged."""
    if not (out / "index.json").exists():
        return fresh
    index = read_index(out)
    old, new = asdict(index.settings), asdict(fresh.settings)
    different = [f"{key} {old[key]!r}, now {new[key]!r}" for key in new if old[key] != new[key]]
    if different:
        raise ValueError(
            f"{out} was written with other settings ({'; '.join(different)}): use those again, or another --out"
        )
    whole = {number: shard for number, shard in index.shards.items() if _is_whole(out / shard_name(number), shard)}
    return replace(index, shards=whole)


def _is_whole(file: Path, shard: Shard) -> bool:
    if not file.is_file() or file.stat().st_size != shard.bytes:
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == shard.sha256


def _encode(
    encode: Callable[[Tensor], Tensor], folder: ImageFolder, paths: tuple[str, ...], *, image_size: int, batch_size: int
) -> Tensor:
    """-> [n, 2, 2C, h, w]: the moments of each image and of its mirror image"""
    parts = []
    for start in range(0, len(paths), batch_size):
        chosen = paths[start : start + batch_size]
        x = read_images([folder.root / path for path in chosen], image_size)
        with torch.inference_mode():
            sides = [encode(x).cpu(), encode(x.flip(-1)).cpu()]
        for moments in sides:
            if moments.dim() != 4 or len(moments) != len(x) or moments.shape[1] % 2 or not moments.is_floating_point():
                raise ValueError(
                    f"the encoder returned {moments.dtype} {tuple(moments.shape)} for {len(x)} images: expected floats "
                    f"({len(x)}, 2C, h, w), mean and log-variance"
                )
            bad = (~moments.isfinite()).flatten(1).any(1)
            if bad.any():
                image = folder.root / chosen[int(bad.int().argmax())]
                raise ValueError(f"the encoder returned a value that is not finite for {image}: run it in float32")
        parts.append(torch.stack(sides, dim=1))
    return torch.cat(parts)


def _write_whole(file: Path, content: bytes) -> None:
    """Writes a file so that under its name there is, at any time and after a crash, the old one or the new one."""
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name is on the disk only when the folder is
    finally:
        os.close(directory)


def _check_complete(out: Path, index: Index, folder: ImageFolder) -> None:
    written = [path for number in range(index.num_shards) for path in open_shard(out, number, index)[1]]
    if written != list(folder.paths):
        lacking = sorted(set(folder.paths) - set(written))
        raise ValueError(
            f"{out} lacks the latents of {len(lacking)} of {len(folder.paths)} images, or has them in another order "
            f"(such as {lacking[:1]}): delete it and write it again"
        )


def _digest(folder: ImageFolder) -> str:
    digest = hashlib.sha256()
    for path in folder.paths:
        digest.update(json.dumps([path, (folder.root / path).stat().st_size]).encode())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gatewright.recipes.data.latents",
        description="Writes the latents of an image folder (one sub-folder a class) for --data latents:DIR. "
        "Started again, it continues with what is missing.",
    )
    parser.add_argument("image_dir", type=Path, metavar="IMAGE_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the latents go")
    parser.add_argument("--vae", type=Path, required=True, metavar="VAE_DIR", help="a diffusers AutoencoderKL's folder")
    parser.add_argument("--image-size", type=int, default=256, help="side of the centre crop (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=1024, help="images a file (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images encoded at once (default: %(default)s)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the autoencoder runs (default here: %(default)s)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        from .autoencoder import load_autoencoder

        autoencoder = load_autoencoder(options.vae, device=options.device)
        write_latents(
            options.image_dir,
            options.out,
            autoencoder.encode,
            image_size=options.image_size,
            encoder=autoencoder.name,
            scale=autoencoder.scale,
            shard_size=options.shard_size,
            batch_size=options.batch_size,
        )
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"train with --data latents:{options.out}")


if __name__ == "__main__":
    main()
