"""Which samples a rank sees in an optimizer step, as a function of (seed, step) alone.

Samples are dealt from a deck that is shuffled anew each epoch. With N samples and a global batch of G, position p of
step s is card g = s * G + p of the deal:

    sample(s, p) = order_e[g mod N],  e = g div N,  order_e = argsort of N numbers drawn for (seed, e)

So each sample comes once per epoch, none is dropped, and a batch may reach into the next epoch. Nothing is remembered
between steps: a run resumes at step s by asking for step s. A rank takes a contiguous slice of the global batch, and
micro-batches are contiguous slices of that: R ranks with M micro-batches see the same R * M pieces as one process
with R * M micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .draw import Draw, bit_generator
from .split import Split


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of B samples.

    Attributes:
        images: [B, C, H, W].
        labels: [B].
        ids: [B] int64, their indices in the split.
        draw: the random numbers of these samples in this step, for the recipe's own needs (noise, timesteps).
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    draw: Draw


def batches(
    split: Split,
    *,
    global_batch: int,
    seed: int,
    step: int,
    rank: int = 0,
    ranks: int = 1,
    micro_batches: int = 1,
) -> Iterator[Batch]:
    """The micro-batches of one rank in one optimizer step, in order; each is read when it is asked for.

    Args:
        split: what to draw from.
        global_batch: samples an optimizer step, over all ranks and micro-batches.
        seed: of the order and of every sample's random numbers.
        step: the optimizer step, counted from 0.
        rank, ranks: which of how many data-parallel processes asks.
        micro_batches: into how many pieces a rank's share is cut.

    Raises:
        ValueError: an empty split, a negative seed or step, a rank outside its range, or a global batch that
            ranks * micro_batches does not divide.
    """
    if ranks < 1 or not 0 <= rank < ranks:
        raise ValueError(f"rank={rank} of ranks={ranks}: rank must be 0 to ranks - 1")
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: choose 1 or more")
    pieces = ranks * micro_batches
    if global_batch % pieces:
        raise ValueError(
            f"global_batch={global_batch} does not divide over {ranks} rank(s) with {micro_batches} "
            f"micro-batch(es) each: choose a multiple of {pieces}"
        )
    ids = sample_ids(len(split), global_batch=global_batch, seed=seed, step=step)
    size = global_batch // pieces

    def read() -> Iterator[Batch]:
        for piece in range(rank * micro_batches, (rank + 1) * micro_batches):
            positions = range(piece * size, (piece + 1) * size)
            chosen = ids[positions.start : positions.stop]
            draw = Draw(seed, step, tuple(positions))
            yield Batch(split.images(chosen, draw), split.labels[chosen], chosen, draw)

    return read()


def sample_ids(num_samples: int, *, global_batch: int, seed: int, step: int) -> Tensor:
    """The sample at each position of the global batch of ``step``. -> [G] int64"""
    if num_samples < 1:
        raise ValueError("the split has no samples to draw from")
    if global_batch < 1:
        raise ValueError(f"global_batch={global_batch}: choose 1 or more")
    if not 0 <= seed < 2**64 or step < 0:
        raise ValueError(f"seed={seed}, step={step}: neither may be negative, and a seed must be below 2**64")
    deal = np.arange(step * global_batch, (step + 1) * global_batch)
    epochs, cards = np.divmod(deal, num_samples)
    ids = np.empty(global_batch, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        ids[here] = _order(num_samples, seed, epoch)[cards[here]]
    return torch.from_numpy(ids)


@lru_cache(maxsize=4)  # a step needs one epoch's order, or two; train and validation may alternate
def _order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # raw bits, because NumPy promises their values in every version, and those of its permutations not
    return bit_generator(seed, "order", step=0, position=epoch).random_raw(num_samples).argsort(kind="stable")
