"""sort_by_expert, permute, unpermute: a stable sort, and a round trip whose gradients are right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.kernels.permute import _sort_digits, permute, sort_by_expert, unpermute


@settings(max_examples=50, deadline=None, derandomize=True)
@given(expert=st.lists(st.integers(0, 6), max_size=40), spare=st.integers(0, 2))
def test_sort_is_stable_and_counts_every_expert(expert, spare):
    bank_size = 7 + spare
    order, counts, offsets = sort_by_expert(torch.tensor(expert, dtype=torch.int64), bank_size)
    assert order.tolist() == sorted(range(len(expert)), key=lambda n: expert[n])
    assert counts.tolist() == [expert.count(e) for e in range(bank_size)]
    assert offsets.tolist() == [sum(counts.tolist()[:e]) for e in range(bank_size)]
    assert order.dtype == counts.dtype == offsets.dtype == torch.int64


def test_sort_compiles_whole():
    """Nothing depends on values on the host, or this would break the graph."""
    expert = torch.tensor([2, 0, 2, 1], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: sort_by_expert(ids, 4), backend="aot_eager", fullgraph=True)(expert)
    for value, expected in zip(compiled, sort_by_expert(expert, 4), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_gradients_are_those_of_differences(num_rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(num_rows, generator=generator, dtype=torch.float64).requires_grad_()
    token = torch.randint(4, (num_rows,), generator=generator)
    assert torch.autograd.gradcheck(lambda x, weight: unpermute(permute(x, token), token, 4, weight), (x, weight))
    assert torch.autograd.gradcheck(lambda x: unpermute(permute(x, token), token, 4), x)


def test_tokens_without_a_row_get_zero_and_half_types_are_summed_in_float32():
    rows = torch.full((300, 2), 1.0, dtype=torch.bfloat16)
    out = unpermute(rows, torch.zeros(300, dtype=torch.int64), 2, torch.ones(300))
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[300.0, 300.0], [0.0, 0.0]]  # one by one in bfloat16, the sum would stay at 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sort_by_expert(torch.zeros(3), 2), "expected integer ids"),
        (lambda: sort_by_expert(torch.zeros(3, 1, dtype=torch.int64), 2), "expected integer ids"),
        (lambda: unpermute(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), 2), "token has shape"),
        (
            lambda: unpermute(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2, torch.ones(2)),
            "weight has shape",
        ),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("bank_size", "size"), [(4, 50), (1, 5), (6, 0), (0, 0), (40_000, 30)])
def test_the_sort_of_a_gpu_is_the_same(bank_size, size):
    expert = torch.randint(max(1, bank_size), (size,), generator=torch.Generator().manual_seed(0))
    order, counts, _ = sort_by_expert(expert, bank_size)
    for value, expected in zip(_sort_digits(expert, bank_size), (order, counts), strict=True):
        assert torch.equal(value, expected) and value.dtype == torch.int64
