"""segment_sum and segment_mean against a loop over segments."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.kernels.segment import segment_mean, segment_sum

IMPLEMENTATIONS = [
    None,
    "sorted",
    "scattered",
    pytest.param(
        "torch_scatter",
        marks=pytest.mark.skipif(not importlib.util.find_spec("torch_scatter"), reason="torch_scatter not installed"),
    ),
]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 5), max_size=30), shape=st.sampled_from([(), (3,), (2, 3)]))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_loop(implementation, dtype, ids, shape):
    values = torch.randn(len(ids), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    segment = torch.tensor(ids, dtype=torch.int64)
    total = segment_sum(values, segment, 7, implementation=implementation)
    mean = segment_mean(values, segment, 7, implementation=implementation)
    assert total.dtype == mean.dtype == dtype
    for s in range(7):
        rows = values[segment == s].double()
        expected = rows.sum(0), rows.mean(0) if len(rows) else rows.sum(0)
        torch.testing.assert_close((total[s], mean[s]), tuple(value.to(dtype) for value in expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduce", [segment_sum, segment_mean])
def test_gradients_are_those_of_differences(reduce, implementation):
    values = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segment = torch.tensor([3, 0, 3, 3, 1, 0])
    call = lambda values: reduce(values, segment, 5, implementation=implementation)  # noqa: E731
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype, implementation):
    values = torch.ones(300, 1, dtype=dtype)
    segment = torch.zeros(300, dtype=torch.int64)
    assert segment_sum(values, segment, 1, implementation=implementation).item() == 300


def test_whole_numbers_are_summed_too():
    values = torch.tensor([[2**53 + 1], [1], [5]])
    assert segment_sum(values, torch.tensor([1, 1, 0]), 2).tolist() == [[5], [2**53 + 2]]
    with pytest.raises(ValueError, match="floating point on a CPU"):
        segment_sum(values, torch.tensor([1, 1, 0]), 2, implementation="sorted")


def test_it_compiles():
    """As one graph: what the sum does inside may not read an id on the host."""
    compiled = torch.compile(lambda v, s: segment_sum(v, s, 4), fullgraph=True, backend="aot_eager")
    values, segment = torch.randn(6, 3, requires_grad=True), torch.tensor([3, 0, 3, 3, 1, 0])
    torch.testing.assert_close(compiled(values, segment), segment_sum(values, segment, 4))


@pytest.mark.parametrize("reduce", [segment_sum, segment_mean])
def test_says_what_is_wrong(reduce):
    with pytest.raises(ValueError, match="one id a row"):
        reduce(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match='implementation="sort" is not available: choose "sorted"'):
        reduce(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2, implementation="sort")
