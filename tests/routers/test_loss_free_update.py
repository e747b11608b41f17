"""The loss-free update of ``topk``'s selection bias, as algebra: it reads counts, and only who is above their mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.routers import create_router

D = 8
counts = st.lists(st.integers(0, 10_000), min_size=1, max_size=12)
rates = st.sampled_from([1e-3, 0.05, 2.0])


def moved(load, rate):
    """How an update with these counts moves a bias from 0."""
    router = create_router("topk", dim=D, num_experts=len(load), top_k=1, score="sigmoid", bias_rate=rate)
    router.update({"load": torch.tensor(load)})
    return router.bias


@given(counts, rates)
@settings(max_examples=60, deadline=None)
def test_every_bias_moves_by_the_rate_towards_the_mean_or_stays(load, rate):
    bias = moved(load, rate)
    mean = sum(load) / len(load)
    for expert, count in enumerate(load):
        # as integers, so that a count at the mean is at it
        side = (sum(load) > count * len(load)) - (sum(load) < count * len(load))
        assert bias[expert].item() == pytest.approx(side * rate, rel=1e-6), (count, mean)


@given(st.integers(0, 10_000), st.integers(1, 12), rates)
@settings(max_examples=20, deadline=None)
def test_an_even_load_moves_nothing(count, experts, rate):
    assert (moved([count] * experts, rate) == 0).all()


def test_counts_that_float32_does_not_know():
    assert (moved([2**24 + 1, 2**24, 2**24], 0.05) * 20).tolist() == pytest.approx([-1, 1, 1])


@given(counts, st.integers(2, 9), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_only_proportions_matter_and_no_expert_is_special(load, times, random):
    bias = moved(load, 0.05)
    assert torch.equal(moved([times * count for count in load], 0.05), bias)
    order = list(range(len(load)))
    random.shuffle(order)
    assert torch.equal(moved([load[i] for i in order], 0.05), bias[order])


def test_counts_are_all_that_matters():
    """Neither tokens nor scores nor the order of updates: equal counts give equal biases."""
    torch.manual_seed(0)
    first = create_router("topk", dim=D, num_experts=4, top_k=2, score="sigmoid", bias_rate=0.01)
    second = create_router("topk", dim=D, num_experts=4, top_k=2, score="sqrtsoftplus", bias_rate=0.01)
    loads = [torch.tensor(load) for load in ([5, 1, 1, 1], [0, 0, 8, 0], [2, 2, 2, 2], [1, 3, 0, 4])]
    for load in loads:
        first.update({"load": load})
    for load in reversed(loads):
        second.update({"load": load})
    torch.testing.assert_close(first.bias, second.bias)
    assert first.bias.tolist() == pytest.approx([0.01 * (-1 + 1 + 0 + 1), 0.01 * (1 + 1 + 0 - 1), 0.01, 0.01])


def test_micro_batches_add_up_before_the_sign():
    """Two halves that lean to opposite sides are a balanced batch, and one update, not two."""
    router = create_router("topk", dim=4, num_experts=4, top_k=1, score="sigmoid", bias_rate=0.1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.eye(4)
    halves = [router(x[[0, 0, 1, 1]]).stats["load"], router(x[[2, 2, 3, 3]]).stats["load"]]
    router.update({"load": sum(halves)})
    assert (router.bias == 0).all()
    router.update({"load": halves[0]})
    assert router.bias.tolist() == pytest.approx([-0.1, -0.1, 0.1, 0.1])


def test_a_common_part_of_the_bias_changes_nothing():
    torch.manual_seed(0)
    router = create_router("topk", dim=D, num_experts=6, top_k=2, score="sigmoid", bias_rate=0.1, init_std=1.0).double()
    x = torch.randn(50, D, dtype=torch.float64)
    router.bias.normal_(std=0.2)
    before = router(x)
    router.bias += 0.7
    assert torch.equal(router(x).index, before.index) and torch.equal(router(x).weight, before.weight)
