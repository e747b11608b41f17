"""Inputs: batches of any shape for any router, drawn so that a token is the same whatever batch it is in."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ...routers.base import TokenContext, router_dtype

PER_TOKEN = ("token_ids", "position", "document", "modality", "previous_logits")
PER_SAMPLE = ("null_mask", "timestep")


class ProbeAttention:
    """An attention that is a fixed function of the tokens: weights [B, heads, L, L], kept as a matrix.

    q, k = x W_q, x W_k;  weights = softmax(q k^T) over the real tokens, up to the own place where causal
    """

    def __init__(self, x_BLD: Tensor, padding_mask: Tensor | None, heads: int, causal: bool) -> None:
        self.causal = causal
        batch, length, dim = x_BLD.shape
        if padding_mask is not None:
            x_BLD = x_BLD.masked_fill(~padding_mask[..., None], 0)
        x_BLD = x_BLD.detach().to(router_dtype(x_BLD)).nan_to_num(0.0, 0.0, 0.0)
        maps = torch.randn(3, heads, dim, dim, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
        query, key, self.value = (torch.einsum("bld,hde->bhle", x_BLD, m.to(x_BLD) / dim**0.5) for m in maps)
        open_LL = torch.ones(length, length, dtype=torch.bool)
        open_LL = open_LL.tril() if causal else open_LL
        open_BLL = open_LL.expand(batch, -1, -1)
        if padding_mask is not None:
            # a padded token looks at itself, so that no row is empty
            open_BLL = open_BLL & padding_mask[:, None, :] | torch.eye(length, dtype=torch.bool)
        scores = query @ key.transpose(2, 3) / dim**0.5
        self.weights = scores.masked_fill(~open_BLL[:, None], -torch.inf).softmax(-1)

    def apply(self, values: Tensor) -> Tensor:
        return torch.einsum("bhlm,bmc->bhlc", self.weights.to(values.dtype), values)

    def head_contributions(self) -> Tensor:
        return self.weights @ self.value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Tokens with everything that a router may know of them. ``x [T, D]``, ``fields`` what the context holds besides.

    Attributes:
        samples: the ids of the samples; a token is drawn from (seed, sample id, place), so it is the same in any batch.
        lengths: of the samples, where the rest is padding.
        attention: heads, and whether it is causal; None = the context has none.
    """

    x: Tensor
    samples: tuple[int, ...]
    length: int
    seed: int
    lengths: tuple[int, ...] | None
    fields: dict[str, Any]
    attention: tuple[int, bool] | None
    change: str = ""

    @property
    def batch_size(self) -> int:
        return len(self.samples)

    @property
    def padding_mask(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.arange(self.length)[None] < torch.tensor(self.lengths, dtype=torch.int64)[:, None]

    @property
    def real_T(self) -> Tensor:
        """[T] bool, True = a real token."""
        mask = self.padding_mask
        return torch.ones(len(self.x), dtype=torch.bool) if mask is None else mask.flatten()

    @property
    def context(self) -> TokenContext:
        fields = dict(self.fields)
        if self.attention:
            x_BLD = self.x.view(self.batch_size, self.length, self.x.shape[1])
            fields["attention"] = ProbeAttention(x_BLD, self.padding_mask, *self.attention)
        return TokenContext(batch_size=self.batch_size, length=self.length, padding_mask=self.padding_mask, **fields)

    def with_x(self, x: Tensor, change: str) -> Probe:
        return dataclasses.replace(self, x=x, change=change)

    def with_fields(self, **fields: Any) -> Probe:
        return dataclasses.replace(self, fields=self.fields | fields)

    def to(self, dtype: torch.dtype) -> Probe:
        fields = dict(self.fields)
        if fields.get("previous_logits") is not None:
            # routers compute, and so hand on logits, in at least float32
            fields["previous_logits"] = fields["previous_logits"].to(
                torch.float64 if dtype == torch.float64 else torch.float32
            )
        return dataclasses.replace(self, x=self.x.to(dtype), fields=fields)

    def mixed(self, other: Probe, from_other_BL: Tensor, change: str) -> Probe:
        """The tokens of ``other`` where the mask says so, with all that is known of them; samples that are all of the
        other's bring what is known of a sample."""
        x = torch.where(from_other_BL.flatten()[:, None], other.x, self.x)
        fields = dict(self.fields)
        for name in (*PER_TOKEN, *PER_SAMPLE):
            if fields.get(name) is None:
                continue
            mask = from_other_BL.all(1) if name in PER_SAMPLE else from_other_BL
            mask = mask.flatten()[:, None] if name == "previous_logits" else mask
            fields[name] = torch.where(mask, other.fields[name], fields[name])
        return dataclasses.replace(self, x=x, fields=fields, change=change)

    def __str__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        text = f"x {list(self.x.shape)} {dtype}, batch_size={self.batch_size}, length={self.length}, seed {self.seed}"
        if self.samples != tuple(range(self.batch_size)):
            text += f", sample ids {list(self.samples)}"
        if self.lengths is not None:
            text += f", real tokens a sample {list(self.lengths)}"
        return text + (f", {self.change}" if self.change else "")


def draw_probe(
    *,
    dim: int,
    bank_size: int,
    example: TokenContext,
    names: frozenset[str],
    samples: tuple[int, ...],
    length: int,
    seed: int,
    lengths: tuple[int, ...] | None,
    dtype: torch.dtype,
    scale: float,
    vocabulary: int,
    attention: tuple[int, bool],
) -> Probe:
    """A batch whose context holds the fields ``names`` ("noise" for its key), in the ranges of the example's."""
    sample_id = torch.tensor(samples, dtype=torch.int64)
    key = TokenContext(batch_size=len(samples), length=length, seed=seed, step=90210, sample_id=sample_id)
    tokens, shape = len(samples) * length, (len(samples), length)

    def draw(*size: int, stream: int) -> Tensor:
        return key.noise(*size, distribution="uniform", stream=stream)

    def ids(name: str, stream: int, default: int) -> Tensor:
        value = getattr(example, name)
        low, high = (0, default - 1) if value is None or not value.numel() else (int(value.min()), int(value.max()))
        return (low + draw(tokens, stream=stream) * (high - low + 1)).long().view(shape)

    place_BL = torch.arange(length).expand(shape)
    fields: dict[str, Any] = {}
    if "token_ids" in names:
        fields["token_ids"] = ids("token_ids", 1, vocabulary)
    if "modality" in names:
        fields["modality"] = ids("modality", 2, 2)
    if "document" in names:
        fields["document"] = place_BL // 4
    if "position" in names:
        fields["position"] = place_BL % 4 if "document" in names else place_BL.clone()
    if "previous_logits" in names:
        fields["previous_logits"] = key.noise(tokens, bank_size, stream=3).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
    if "null_mask" in names:
        null = example.null_mask
        several = torch.tensor([False, True, False]) if null is None or not len(null) else null
        fields["null_mask"] = several[sample_id % len(several)]
    if "timestep" in names:
        highest = 1.0 if example.timestep is None or not len(example.timestep) else float(example.timestep.max())
        fields["timestep"] = highest * draw(len(samples), stream=4)
    if "grid" in names:
        height = next((h for h in range(math.isqrt(length), 0, -1) if length % h == 0), 0)
        fields["grid"] = (height, length // height if height else 0)
    if "cache" in names:
        fields["cache"] = example.cache
    if "noise" in names:
        fields |= {"seed": 0, "step": 0, "sample_id": sample_id}
    x = scale * key.noise(tokens, dim, stream=0).double()
    return Probe(
        x=x.to(dtype),
        samples=samples,
        length=length,
        seed=seed,
        lengths=lengths,
        fields=fields,
        attention=attention if "attention" in names else None,
    )
