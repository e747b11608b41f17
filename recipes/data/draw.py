"""Random numbers that belong to a sample of a global batch, whichever process asks for them.

    generator(seed, purpose, step, position) = Philox(key=(seed, hash(purpose)), counter=(0, 0, position, step))

A counter-based generator has no state to carry along: the same four values always give the same numbers, so flips,
latent samples and a recipe's own noise are equal on any number of ranks, in any micro-batches, and after a resume.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def bit_generator(seed: int, purpose: str, *, step: int, position: int) -> np.random.Philox:
    """The stream of one sample (``position``) or, for an epoch's order, of one epoch (as ``position``)."""
    stream = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, position, step], dtype=np.uint64))


@dataclass(frozen=True)
class Draw:
    """The random numbers of the samples at some positions of the global batch of one optimizer step.

    Attributes:
        seed: the run's.
        step: the optimizer step.
        positions: where each of the B samples stands in the global batch.
    """

    seed: int
    step: int
    positions: tuple[int, ...]

    def uniform(self, purpose: str) -> Tensor:
        """One float32 number in [0, 1) a sample. ``purpose`` names the stream: another name, other numbers. -> [B]"""
        # 24 bits, as many as a float32 fraction holds: rounding never reaches 1
        return torch.tensor([int(g.random_raw()) >> 40 for g in self._generators(purpose)], dtype=torch.float32) / 2**24

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 numbers of ``shape`` for each sample. -> [B, *shape]"""
        noise = np.empty((len(self.positions), *shape), dtype=np.float32)
        for row, generator in zip(noise, self._generators(purpose), strict=True):
            row[...] = np.random.Generator(generator).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(noise)

    def _generators(self, purpose: str):
        return (bit_generator(self.seed, purpose, step=self.step, position=p) for p in self.positions)
