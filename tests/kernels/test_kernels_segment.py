"""segment_sum and segment_mean against a loop over segments."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.kernels.segment import segment_mean, segment_sum

IMPLEMENTATIONS = [
    "native",
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


def test_half_types_are_summed_in_float32():
    values = torch.ones(300, 1, dtype=torch.bfloat16)
    assert segment_sum(values, torch.zeros(300, dtype=torch.int64), 1).item() == 300


@pytest.mark.parametrize("reduce", [segment_sum, segment_mean])
def test_says_what_is_wrong(reduce):
    with pytest.raises(ValueError, match="one id a row"):
        reduce(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match='choose "native"'):
        reduce(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2, implementation="nativ")
