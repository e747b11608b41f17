"""Triton's kernels against the float64 reference, in its interpreter or on a GPU: see ``test_kernels_triton.py``.

The interpreter truncates to bfloat16 where a GPU rounds to the nearest, so there bfloat16 has twice the error.
"""

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from kernels_fixtures import accuracy_cases, poisoned  # noqa: F401
from test_kernels_grouped_gemm import FORMS, operands, value_and_gradients
from torch.utils.checkpoint import checkpoint

from gatewright.kernels import triton_mlp, triton_tuning
from gatewright.kernels.activation import ACTIVATIONS
from gatewright.tools.expert_case import ExpertCase as Case
from gatewright.tools.expert_case import relative_error, too_far

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}
OF_THE_REFERENCE = {torch.float32: 1.5, torch.float16: 1.5, torch.bfloat16: 4 if INTERPRETED else 1.5}

pytestmark = pytest.mark.usefixtures("poisoned")


def check(case, dtype=torch.float32):
    for name, (error, of_reference) in case.errors(dtype, "triton", device=DEVICE).items():
        assert error <= max(TOLERANCE[dtype], OF_THE_REFERENCE[dtype] * of_reference), (name, error, case, dtype)


@settings(max_examples=4 if INTERPRETED else 40, deadline=None, derandomize=True)
@given(case=accuracy_cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED))
def test_accuracy(case, dtype):
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:  # larger tiles take fewer steps
            patch.setattr(triton_tuning, "candidates", lambda *_: (triton_tuning.Config(64, 64, 64, 4, 1),))
        assert not too_far(case.errors(dtype, "triton", device=DEVICE), dtype), case


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
def test_every_activation(activation, variant):
    check(Case([9, 0, 33], 12, 19, 35, activation, variant=variant))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
def test_every_operand(bias, weighted, variant):
    check(Case([0, 17, 5], 7, 20, 33, "silu", bias, weighted, variant))


@pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
def test_rows_of_nobody_count_as_zero(variant):
    check(Case([0, 17, 5], 7, 20, 33, variant=variant, nobody=20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "hidden"),
    [(32, 64), (24, 40), (19, 13)],
    ids=["descriptors", "descriptors that reach over edges", "no descriptors"],
)
@pytest.mark.parametrize("activation", ["geglu", "relu2"])
def test_half_types(dtype, dim, hidden, activation):
    check(Case([5, 0, 21], 9, dim, hidden, activation, nobody=2), dtype)


@pytest.mark.parametrize(
    ("counts", "num_tokens"),
    [([0, 0, 0], 5), ([0], 1), ([1], 1), ([0, 1, 0], 1), ([40], 40), ([16, 32, 0, 15, 17], 6), ([1] * 33, 3)],
    ids=["no rows", "no rows, one expert", "one row", "one busy expert", "one expert", "around the tiles", "many"],
)
def test_edges(counts, num_tokens):
    check(Case(counts, num_tokens, 8, 16, "silu"))


def test_no_tokens_at_all():
    for variant in ("rows", "gather", "combine"):
        check(Case([0, 0], 0, variant=variant))


def test_only_assignments_to_nobody():
    for variant in ("rows", "gather", "combine"):
        check(Case([0, 0], 4, variant=variant, nobody=20))


def test_a_token_with_more_rows_than_are_summed_together():
    check(Case([30, 12], 2, 8, 16))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("pieces", [2, 4])
def test_a_tile_worked_off_in_pieces(activation, pieces, monkeypatch):
    config = triton_tuning.Config(16, 64, 16, warps=1, stages=1)
    monkeypatch.setattr(triton_tuning, "candidates", lambda *_: (config,))
    monkeypatch.setattr(triton_mlp, "PIECE", config.m * config.n // 32 // pieces)
    check(Case([9, 0, 33], 12, 19, 75, activation))


@pytest.mark.parametrize("wanted", ["x", "w_in", "w_out", "b_in", "b_out", "weight"])
def test_one_gradient_alone(wanted):
    case = Case([9, 0, 20])
    every = case.run(torch.float32, "triton", device=DEVICE)
    alone = case.run(torch.float32, "triton", device=DEVICE, wanted=(wanted,))
    assert alone.keys() == {"out", wanted}
    assert torch.equal(alone[wanted], every[wanted])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_token_that_is_not_finite_reaches_only_its_expert(activation):
    for dtype, where in itertools.product((torch.float32, torch.bfloat16), (0, -1)):
        case = Case([17, 21], 38, 16, 24, activation, variant="rows")
        leaves, token, dy = case.tensors(dtype, DEVICE)
        leaves[0][where] = float("nan")
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = case.call(leaves, token, "triton")
        out.backward(dy)
        other = 1 if where == 0 else 0
        for result in (out.split(case.counts)[other], *(leaf.grad[other] for leaf in leaves[1:5])):
            assert result.isfinite().all()


def test_the_same_every_time():
    case = Case([9, 0, 33], 5, 19, 35)
    once, again = (case.run(torch.float32, "triton", device=DEVICE) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_keeps_tokens_and_pre_activations_only():
    case = Case([20, 0, 13], 16, 8, 16)
    leaves, token, _ = case.tensors(torch.bfloat16, DEVICE)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.call(leaves, token, "triton")
    parameters = {id(leaf) for leaf in leaves[1:]}
    sizes = [tensor.nbytes for tensor in kept if id(tensor) not in parameters and tensor.is_floating_point()]
    assert sum(sizes) <= 2 * (16 * 8 + 33 * 32)
    assert sum(tensor.nbytes for tensor in kept if not tensor.is_floating_point()) <= 8 * (2 * 33 + 3)


@pytest.mark.parametrize("variant", ["rows", "combine"])
def test_compiles_whole(variant):
    case = Case([9, 0, 20], variant=variant, nobody=3)
    eager = case.run(torch.float32, "triton", device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    leaves, token, dy = case.tensors(torch.float32, DEVICE)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = compiled(leaves, token, "triton")
    out.backward(dy)
    for value, expected in zip([out.detach(), *(leaf.grad for leaf in leaves)], eager.values(), strict=True):
        assert torch.equal(value, expected)


def test_recomputation_changes_nothing():
    case = Case([9, 0, 20])
    plain = case.run(torch.float32, "triton", device=DEVICE)
    leaves, token, dy = case.tensors(torch.float32, DEVICE)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = checkpoint(lambda *leaves: case.call(leaves, token, "triton"), *leaves, use_reentrant=False)
    out.backward(dy)
    for value, expected in zip([out.detach(), *(leaf.grad for leaf in leaves)], plain.values(), strict=True):
        assert torch.equal(value, expected)


def test_expanded_gradients_and_strided_inputs():
    case = Case([9, 0, 20])
    results = []
    for strided in (False, True):
        leaves, token, _ = case.tensors(torch.float32, DEVICE)
        if strided:
            leaves = [leaf.mT.contiguous().mT if leaf.dim() > 1 else leaf for leaf in leaves]
            leaves[5] = torch.stack([leaves[5], leaves[5]], 1)[:, 0]
            token = torch.stack([token, token], 1)[:, 0]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = case.call(leaves, token, "triton")
        out.sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "k"), [(19, 35), (16, 32)])
def test_grouped_gemm_and_its_gradients(form, m, k):
    counts = [17, 0, 3]
    tensors = [tensor.to(DEVICE) for tensor in operands(form, counts, m, k, torch.float32)]
    fast = value_and_gradients(form, tensors, counts, "triton")
    exact = value_and_gradients(form, [tensor.double() for tensor in tensors], counts, "reference")
    for value, expected in zip(fast, exact, strict=True):
        assert relative_error(value, expected) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_grouped_gemm_without_rows(form):
    tensors = [tensor.to(DEVICE) for tensor in operands(form, [0, 0], 4, 8, torch.float32)]
    for value in value_and_gradients(form, tensors, [0, 0], "triton"):
        assert not value.any()
