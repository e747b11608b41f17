"""cosine against its definition."""

import pytest
import torch

from gatewright.kernels.cosine import cosine, cosine_reference


def make(rows: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=generator, dtype=dtype)
    if rows > 3:
        x[1] = 0
        x[2] *= 1e-13  # shorter than what lengths are held to
        x[3] *= 1e6
    directions = torch.randn(3, 5, generator=generator, dtype=dtype)
    return x.requires_grad_(), directions.requires_grad_()


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference(rows, dtype):
    x, directions = make(rows, dtype)
    weight = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    results = []
    for compute in (cosine, cosine_reference):
        z = compute(x, directions)
        results.append((z.detach(), *torch.autograd.grad((z * weight).sum(), (x, directions))))
    torch.testing.assert_close(*results)


def test_gradients_are_those_of_differences_twice():
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 2))
    assert torch.autograd.gradcheck(cosine, inputs)
    assert torch.autograd.gradgradcheck(cosine, inputs)


@pytest.mark.parametrize("which", [0, 1])
def test_one_side_without_gradient(which):
    inputs = make(7)
    inputs[which].requires_grad_(False)
    z = cosine(*inputs)
    (gradient,) = torch.autograd.grad(z.sum(), inputs[1 - which])
    (expected,) = torch.autograd.grad(cosine_reference(*inputs).sum(), inputs[1 - which])
    torch.testing.assert_close(gradient, expected)


def test_compiles_without_a_break():
    x, directions = make(7)
    compiled = torch.compile(cosine, backend="aot_eager", fullgraph=True)
    z, expected = compiled(x, directions), cosine(x, directions)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x), torch.autograd.grad(expected.sum(), x))
