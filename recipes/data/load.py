"""From the value of ``--data`` to a data set."""

import difflib
from pathlib import Path

from .split import Data

KINDS = {
    "mnist5k": "mnist5k",
    "digits": "digits",
    "fashion-mnist": "fashion-mnist or fashion-mnist:DIR",
    "imagefolder": "imagefolder:DIR",
    "latents": "latents:DIR",
}
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it
VALIDATION_FRACTION = 0.05


def load_data(
    name: str,
    *,
    image_size: int | None = None,
    flip: bool | None = None,
    validation_fraction: float | None = None,
) -> Data:
    """Opens a data set.

    Args:
        name: "mnist5k", "digits", "fashion-mnist", "fashion-mnist:DIR", "imagefolder:DIR" or "latents:DIR".
        image_size: side in pixels. imagefolder needs it and crops to it; the others have a size of their own and
            refuse another.
        flip: whether training sees half of the images mirrored. By default photographs are (imagefolder, latents) and
            small pictures are not; digits cannot be.
        validation_fraction: of each class, for imagefolder and latents, 0.05 by default; the others have fixed splits.

    Raises:
        ValueError: an unknown name, an option that does not fit it, or data that is damaged or of another shape.
        FileNotFoundError: a folder or a file that is not there.
        ImportError: a package that is not installed.
    """
    kind, colon, folder = name.partition(":")
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=3)
        hint = f"did you mean {' or '.join(KINDS[match] for match in close)}? " if close else ""
        raise ValueError(f'unknown data "{name}": {hint}Choose from {", ".join(KINDS.values())}')
    if kind in ("mnist5k", "digits") and colon:
        raise ValueError(f'"{name}": {kind} comes inside a package and takes no folder; write {kind}')
    if (colon or kind in ("imagefolder", "latents")) and not folder:
        raise ValueError(f'"{name}" names no folder: write {KINDS[kind]}')
    in_folder = kind in ("imagefolder", "latents")
    if validation_fraction is None:
        validation_fraction = VALIDATION_FRACTION
    elif not in_folder:
        raise ValueError(f"validation_fraction={validation_fraction}: the splits of {kind} are fixed; leave it out")
    elif not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}: choose a number above 0 and below 1")
    if flip and kind in ("mnist5k", "digits"):
        raise ValueError(f"flip=True with {kind}: a mirrored digit is none; leave flip out")
    flip = in_folder if flip is None else flip
    path = Path(folder or FASHION_MNIST_FOLDER).expanduser()

    # imported here, so that each kind needs only its own packages
    if kind == "imagefolder":
        from .imagefolder import load_image_folder

        return load_image_folder(
            path, name=name, image_size=image_size, flip=flip, validation_fraction=validation_fraction
        )
    if kind == "latents":
        from .latent_folder import load_latents

        return load_latents(path, name=name, image_size=image_size, flip=flip, validation_fraction=validation_fraction)
    if kind == "fashion-mnist":
        from .fashion_mnist import load_fashion_mnist

        data = load_fashion_mnist(path, name=name, flip=flip)
    else:
        from . import digits

        data = digits.load_mnist5k() if kind == "mnist5k" else digits.load_digits()
    if image_size not in (None, data.shape[1]):
        raise ValueError(f"image_size={image_size}: {name} is {data.shape[1]} x {data.shape[2]}; leave image_size out")
    return data
