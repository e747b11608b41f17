"""One call of ``kernels.expert_mlp`` on drawn numbers, its value and gradients, and how far off they are.

The tests and ``gatewright check-gpu`` hold every backend to it. An error is |value - exact| / |exact|, norms of whole
tensors, exact in float64 from the same rounded operands. A fast backend's must be within ``TOLERANCE``, or at least not
above the reference's in the same dtype where that is not either; and never above ``OF_THE_REFERENCE`` times that.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.activation import GATED
from ..kernels.expert_mlp import expert_mlp

NAMES = ("out", "x", "w_in", "w_out", "b_in", "b_out", "weight")
VARIANTS = ("rows", "gather", "combine")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OF_THE_REFERENCE = 1.5
# both round so little here that their ratio says nothing
FLOOR = {torch.float64: 1e-15, torch.float32: 2e-7, torch.bfloat16: 5e-4, torch.float16: 1e-4}


@dataclasses.dataclass
class ExpertCase:
    """Sizes and variants of one call; ``run`` gives its value and gradients.

    Attributes:
        counts: rows of each expert.
        variant: "rows": sorted rows in and out; "gather": tokens in, rows out; "combine": tokens in and out.
        nobody: rows beyond the counts.
    """

    counts: Sequence[int]
    num_tokens: int = 12
    dim: int = 8
    hidden: int = 16
    activation: str = "swiglu"
    bias: bool = True
    weighted: bool = True
    variant: str = "combine"
    seed: int = 0
    nobody: int = 0

    def tensors(
        self, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[list[Tensor | None], Tensor | None, Tensor]:
        """x, w_in, w_out, b_in, b_out and weight; token; the gradient that comes back: the same draw for every dtype,
        rounded to it, but weights to at least float32."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        num_experts, num_rows = len(self.counts), sum(self.counts) + self.nobody
        width = 2 * self.hidden if self.activation in GATED else self.hidden
        x = draw(num_rows if self.variant == "rows" else self.num_tokens, self.dim)
        w_in = draw(num_experts, width, self.dim) * self.dim**-0.5
        w_out = draw(num_experts, self.dim, self.hidden) * self.hidden**-0.5
        b_in = draw(num_experts, width) if self.bias else None
        b_out = draw(num_experts, self.dim) if self.bias else None
        weight = draw(num_rows).abs() if self.weighted else None
        token = None
        if self.variant != "rows":
            token = torch.randint(max(1, self.num_tokens), (num_rows,), generator=generator).to(device)
        dy = draw(self.num_tokens if self.variant == "combine" else num_rows, self.dim)
        of_weight = torch.promote_types(dtype, torch.float32)
        leaves = [None if leaf is None else leaf.to(device, dtype) for leaf in (x, w_in, w_out, b_in, b_out)]
        leaves.append(None if weight is None else weight.to(device, of_weight))
        return leaves, token, dy.to(device, dtype)

    def call(self, leaves: Sequence[Tensor | None], token: Tensor | None, backend: str | None) -> Tensor:
        x, w_in, w_out, b_in, b_out, weight = leaves
        return expert_mlp(
            x, w_in, w_out, b_in, b_out, torch.tensor(self.counts, device=x.device), token=token, weight=weight,
            combine=self.variant == "combine", activation=self.activation, backend=backend,
        )  # fmt: skip

    def run(
        self,
        dtype: torch.dtype,
        backend: str | None,
        *,
        compute: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        wanted: Sequence[str] = NAMES,
    ) -> dict[str, Tensor]:
        """The value and the ``wanted`` gradients by name.

        Args:
            dtype: to which operands are rounded, and in which they are computed with unless ``compute`` says otherwise.
        """
        leaves, token, dy = self.tensors(dtype, device)
        if compute is not None:
            leaves, dy = [None if leaf is None else leaf.to(compute) for leaf in leaves], dy.to(compute)
        for name, leaf in zip(NAMES[1:], leaves, strict=True):
            if leaf is not None:
                leaf.requires_grad_(name in wanted)
        out = self.call(leaves, token, backend)
        out.backward(dy)
        results = [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]
        return {name: result for name, result in zip(NAMES, results, strict=True) if result is not None}

    def errors(
        self, dtype: torch.dtype, backend: str, *, device: torch.device | str = "cpu"
    ) -> dict[str, tuple[float, float]]:
        """By name, the error of ``backend`` and that of the reference in the same dtype."""
        exact = self.run(dtype, "reference", compute=torch.float64, device=device)
        same = self.run(dtype, "reference", device=device)
        fast = self.run(dtype, backend, device=device)
        if fast.keys() != exact.keys():
            raise AssertionError(f"{self}: {backend} gives {list(fast)}, the reference {list(exact)}")
        for name, value in fast.items():
            if value.shape != exact[name].shape or value.dtype != same[name].dtype:
                given = f"{name} is {tuple(value.shape)} {value.dtype} with {backend}"
                raise AssertionError(f"{self}: {given}, expected {tuple(exact[name].shape)} {same[name].dtype}")
        return {
            name: (relative_error(value, exact[name]), relative_error(same[name], exact[name]))
            for name, value in fast.items()
        }


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|; infinite where a value is NaN."""
    error = float((value.double() - exact).norm() / (exact.norm() + 1e-12))
    return error if error == error else float("inf")


def too_far(errors: dict[str, tuple[float, float]], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Those of ``ExpertCase.errors`` that are above what is allowed."""
    return {
        name: (error, reference)
        for name, (error, reference) in errors.items()
        if not error <= min(max(TOLERANCE[dtype], reference), OF_THE_REFERENCE * reference + FLOOR[dtype])
    }
