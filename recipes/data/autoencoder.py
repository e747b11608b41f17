"""A variational autoencoder from a folder in the layout of diffusers: config.json and safetensors weights."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Autoencoder:
    """
    Attributes:
        encode: images [N, 3, H, W] in [-1, 1] -> moments [N, 2C, h, w], mean and log-variance.
        decode: unscaled latents [N, C, h, w] -> images [N, 3, H, W], about [-1, 1].
        scale: by what a latent is multiplied before a diffusion model sees it.
        name: a hash of its configuration and weights.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    scale: float
    name: str


def load_autoencoder(folder: Path, *, device: str | torch.device = "cpu") -> Autoencoder:
    """Loads an AutoencoderKL in float32; nothing is fetched from anywhere, and nothing is unpickled.

    Raises:
        FileNotFoundError: no such folder, or one without a configuration or safetensors weights.
        ValueError: an autoencoder that shifts its latents too, which the scale alone would not undo.
        ImportError: diffusers is not installed.
    """
    config, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not weights:
        raise FileNotFoundError(
            f"{folder} is not the folder of an autoencoder: it must hold config.json and "
            "diffusion_pytorch_model.safetensors, as the folder vae of a Stable Diffusion model does"
        )
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(
            "the autoencoder is loaded with diffusers, which is not installed: run pip install diffusers"
        ) from error
    if json.loads(config.read_text()).get("shift_factor"):
        raise ValueError(f"{folder} shifts its latents (shift_factor in config.json): use one that only scales them")
    model = AutoencoderKL.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=False,  # what it does anyway, with a page of warnings, where accelerate is not installed
    )
    model = model.to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for file in (config, *weights):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Autoencoder(
        encode=lambda x: model.encode(x.to(device)).latent_dist.parameters,
        decode=lambda z: model.decode(z.to(device)).sample,
        scale=float(model.config.scaling_factor),
        name=f"AutoencoderKL sha256:{digest.hexdigest()}",
    )
