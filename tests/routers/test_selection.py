"""Choices along other axes, against loops that say the same slowly."""

import math

import pytest
import torch

from gatewright.routers.selection import (
    check_drop,
    check_not_negative,
    experts_take,
    keep_within_capacity,
    known_ids,
    tokens_per_expert,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(4))
def test_experts_take_their_best(seed):
    scores = torch.randint(4, (3, 7, 5), generator=generator(seed)).float()  # with many ties
    eligible = torch.rand(3, 7, generator=generator(seed)) < 0.7
    k = torch.minimum(torch.randint(8, (3, 5), generator=generator(seed)), eligible.sum(1)[:, None])
    taken = experts_take(scores, k, eligible)
    for g in range(3):
        for e in range(5):
            among = [m for m in range(7) if eligible[g, m]]
            best = sorted(among, key=lambda m: (-scores[g, m, e].item(), m))[: k[g, e]]
            assert taken[g, :, e].nonzero().flatten().tolist() == sorted(best)


def test_experts_take_without_a_mask():
    scores = torch.rand(2, 6, 3, generator=generator())
    everyone = torch.ones(2, 6, dtype=torch.bool)
    k = torch.full((2, 3), 2)
    assert torch.equal(experts_take(scores, k), experts_take(scores, k, everyone))
    assert experts_take(torch.rand(2, 0, 3), torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 0, 3)


@pytest.mark.parametrize("experts", [1, 3, 4, 12])
@pytest.mark.parametrize("top_k", [0.3, 1.0, 1.1, 2.0])
def test_tokens_per_expert_is_the_papers_rule(experts, top_k):
    sizes = [*range(40), 256, 1024, 4097]
    expected = [max(1, min(int(size / experts * top_k), size)) if size else 0 for size in sizes]
    assert tokens_per_expert(torch.tensor(sizes), experts, top_k).tolist() == expected
    assert tokens_per_expert(torch.tensor([256]), 12, 1).tolist() == [21]


@pytest.mark.parametrize("policy", ["position", "probability", "choice"])
@pytest.mark.parametrize("capacity", [0.5, 1, 1.9, 2, 3.0001, 100])
@pytest.mark.parametrize("seed", range(3))
def test_capacity_against_a_loop(policy, capacity, seed):
    tokens, slots, experts = 9, 2, 4
    expert = torch.rand(tokens, experts, generator=generator(seed)).argsort(1)[:, :slots]
    expert[torch.rand(tokens, slots, generator=generator(seed)) < 0.2] = -1
    weight = torch.randint(5, (tokens, slots), generator=generator(seed)).float()  # with ties
    keep = keep_within_capacity(expert, weight, experts, capacity, policy)
    pairs = [(t, s) for t in range(tokens) for s in range(slots) if expert[t, s] >= 0]
    if policy == "probability":
        pairs.sort(key=lambda pair: -weight[pair].item())
    elif policy == "choice":
        pairs.sort(key=lambda pair: pair[1])
    room = [math.ceil(capacity)] * experts
    expected = torch.zeros(tokens, slots, dtype=torch.bool)
    for pair in pairs:
        if room[expert[pair]] > 0:
            room[expert[pair]] -= 1
            expected[pair] = True
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("policy", ["position", "probability", "choice"])
def test_capacity_of_each_expert(policy):
    """As if each expert were alone, with its own capacity."""
    expert = torch.rand(12, 4, generator=generator()).argsort(1)[:, :2]
    weight, capacity = torch.rand(12, 2, generator=generator()), torch.tensor([0.0, 2.5, 1.0, 9.0])
    keep = keep_within_capacity(expert, weight, 4, capacity, policy)
    for e in range(4):
        alone = keep_within_capacity(expert.masked_fill(expert != e, -1), weight, 4, capacity[e].item(), policy)
        assert torch.equal(keep & (expert == e), alone)


def test_drop_options_are_checked():
    check_drop(None, "position")
    for factor in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="choose a positive number, or None"):
            check_drop(factor, "position")
    with pytest.raises(ValueError, match='drop_policy="random"'):
        check_drop(1.0, "random")


def test_checks_name_the_option():
    check_not_negative(first=0, second=2.5)
    for value in (-1e-9, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"second={value}: choose a finite number of at least 0"):
            check_not_negative(first=0.0, second=value)


def test_known_ids():
    ids, real = torch.tensor([[0, 4], [-100, 99]]), torch.tensor([True, True, False, False])
    assert known_ids(ids, 5, real, "context.token_ids", "vocabulary").tolist() == [0, 4, 0, 0]
    for count, mask in ((4, real), (5, None)):
        expected = f"context.token_ids holds an id out of range: expected 0 to {count - 1}, from vocabulary={count}"
        with pytest.raises(RuntimeError, match=expected):
            known_ids(ids, count, mask, "context.token_ids", "vocabulary")
    assert known_ids(ids[:0], 5, None, "context.token_ids", "vocabulary").shape == (0,)
