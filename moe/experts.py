"""Experts: the shape of one, a bank of many, and the plain feed-forward.

    ungated   y = w_out act(w_in x + b_in) + b_out
    gated     [g, u] = w_in x + b_in ;   y = w_out (act(g) * u) + b_out

A bank holds exactly three 3-D parameters, in the names and the layout that DeepSpeed's engine and checkpoints want:

    w1 [E, H, D]          [E, 2H, D] gated, gate rows first
    w2 [E, D, H]
    w3 [E, 1, H + D]      [E, 1, 2H + D] gated: b_in, then b_out

Without biases w3 is a [E, 1, 1] that nothing reads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.activation import GATED, activate, check_activation
from ..kernels.expert_mlp import expert_mlp


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """The shape of one expert.

    Attributes:
        dim: token width, D.
        hidden: width inside, H.
        activation: "gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu" or "geglu"; the last two are gated.
        bias: whether both linear maps have one.
        init_std: weights are drawn from N(0, init_std^2); None draws Xavier-uniform. Biases start at 0.
    """

    dim: int
    hidden: int
    activation: str = "swiglu"
    bias: bool = False
    init_std: float | None = None

    def __post_init__(self) -> None:
        if self.dim < 1 or self.hidden < 1:
            raise ValueError(f"dim={self.dim}, hidden={self.hidden}: both must be at least 1")
        check_activation(self.activation)

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def rows_in(self) -> int:
        """Rows of w_in: H, or 2H where gated."""
        return 2 * self.hidden if self.gated else self.hidden

    @property
    def num_parameters(self) -> int:
        """Weights and biases of one expert."""
        return self.rows_in * self.dim + self.dim * self.hidden + self.bias * (self.rows_in + self.dim)

    def draw(self, *key: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """w_in and w_out of the expert that ``key`` names: the same on every rank, whatever else was drawn before."""
        generator = torch.Generator("cpu").manual_seed(_seed(*key))
        shapes = ((self.rows_in, self.dim), (self.dim, self.hidden))
        # always float32 on the CPU, so that neither a default dtype nor a default device changes the draw
        weights = [torch.empty(*shape, dtype=torch.float32, device="cpu") for shape in shapes]
        w_in, w_out = (self.fill(weight, generator).to(device=device, dtype=dtype) for weight in weights)
        return w_in, w_out

    def fill(self, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws a weight of this expert, in place: N(0, init_std^2), or Xavier-uniform."""
        if self.init_std is not None:
            return weight.normal_(0, self.init_std, generator=generator)
        # each half of a gated w_in is a linear layer of its own, so the bound is the same for all
        bound = math.sqrt(6 / (self.dim + self.hidden))
        return weight.uniform_(-bound, bound, generator=generator)


def _seed(*key: int) -> int:
    """One 63-bit seed from several numbers (FNV-1a over their bytes)."""
    state = 0xCBF29CE484222325
    for byte in b"".join(int(part).to_bytes(8, "little", signed=True) for part in key):
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    return state >> 1


class GroupedExperts(nn.Module):
    """A bank of experts, computed together by grouped matrix multiplication.

    Args:
        spec: the shape of one.
        ids: the global ids that this bank holds, in order: they name the experts in the initial draw.
        seed, layer: with the id, the key of the draw.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        ids: range | list[int],
        *,
        seed: int = 0,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.ids, self.seed, self.layer = spec, list(ids), seed, layer
        count = len(self.ids)
        biases = spec.rows_in + spec.dim if spec.bias else 1
        factory = {"device": device, "dtype": dtype}
        self.w1 = nn.Parameter(torch.empty(count, spec.rows_in, spec.dim, **factory))
        self.w2 = nn.Parameter(torch.empty(count, spec.dim, spec.hidden, **factory))
        self.w3 = nn.Parameter(torch.empty(count, 1, biases, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.w1.is_meta:
            return
        for row, expert in enumerate(self.ids):
            w_in, w_out = self.spec.draw(self.seed, self.layer, expert, dtype=self.w1.dtype, device=self.w1.device)
            self.w1[row].copy_(w_in)
            self.w2[row].copy_(w_out)
        self.w3.zero_()

    @property
    def w_in(self) -> Tensor:
        """[E, H, D]; [E, 2H, D] gated."""
        return self.w1

    @property
    def w_out(self) -> Tensor:
        """[E, D, H]"""
        return self.w2

    @property
    def b_in(self) -> Tensor | None:
        """[E, H] or [E, 2H]: a view of w3."""
        return self.w3[:, 0, : self.spec.rows_in] if self.spec.bias else None

    @property
    def b_out(self) -> Tensor | None:
        """[E, D]: a view of w3."""
        return self.w3[:, 0, self.spec.rows_in :] if self.spec.bias else None

    def forward(
        self,
        x: Tensor,
        counts_E: Tensor,
        *,
        token: Tensor | None = None,
        weight: Tensor | None = None,
        combine: bool = False,
        backend: str | None = None,
    ) -> Tensor:
        """Rows sorted by expert, ``counts_E`` of each. See ``kernels.expert_mlp``."""
        return expert_mlp(
            x, self.w_in, self.w_out, self.b_in, self.b_out, counts_E,
            token=token, weight=weight, combine=combine, activation=self.spec.activation, backend=backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{len(self.ids)} experts, {self.spec}"


class FeedForward(nn.Module):
    """A plain feed-forward: the dense layer, and the shared expert of a ``MoELayer``.

    Called as ``feed_forward(x)``; a ``MoELayer`` calls its shared one as ``shared(x, context)``, x [B, L, D].
    """

    def __init__(
        self, spec: ExpertSpec, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.up = nn.Linear(spec.dim, spec.rows_in, bias=spec.bias, device=device, dtype=dtype)
        self.down = nn.Linear(spec.hidden, spec.dim, bias=spec.bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in (self.up, self.down):
            self.spec.fill(linear.weight)
            if linear.bias is not None:
                linear.bias.zero_()

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return self.down(activate(self.up(x), self.spec.activation))
