"""Specialisation, drops by position and change of routing: closed forms, random baselines, and the simulation that
shows why drops grow towards the end of a sequence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe.metrics import (
    drop_by_position,
    expert_distance,
    expert_information,
    expert_ratio,
    max_specialization_std,
    routing_change,
    specialization,
    specialization_std,
)
from gatewright.routers import Routing, TokenContext, create_router
from gatewright.routers.base import count_experts
from gatewright.routers.selection import keep_within_capacity

few = settings(max_examples=40, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_choice(tokens, experts, top_k, seed=0):
    """[T, K] uniformly random sets of different experts."""
    return torch.rand(tokens, experts, generator=generator(seed)).topk(top_k).indices


def by_label(labels, index, experts):
    """[V, E]: how often each expert was chosen for each label."""
    several = int(labels.max()) + 1
    return count_experts(labels[:, None] * experts + index, several * experts).view(several, experts)


# ---- specialisation


@pytest.mark.parametrize(
    ("experts", "top_k", "published", "digits"),
    [(32, 2, 0.121031, 6), (16, 2, 0.16536, 5), (8, 2, 0.21651, 5), (64, 8, 0.04134, 5)],
)
def test_the_highest_deviation_is_the_published_one(experts, top_k, published, digits):
    """OpenMoE's figures 13 and 14 start at 0.121031, since the first token is the same in every sequence."""
    highest = max_specialization_std(experts, top_k)
    assert round(highest, digits) == published
    assert highest == pytest.approx(math.sqrt(1 / (top_k * experts) - 1 / experts**2), rel=1e-12)
    same = torch.zeros(experts)
    same[:top_k] = 77
    assert specialization_std(same).item() == pytest.approx(highest, rel=1e-12)
    assert specialization(same, top_k).item() == pytest.approx(1)
    assert specialization_std(torch.full((experts,), 5)).item() == 0


@few
@given(st.data())
def test_deviation_lies_between_even_and_always_the_same(data):
    experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, experts))
    tokens = data.draw(st.integers(1, 20))
    index = random_choice(tokens, experts, top_k, data.draw(st.integers(0, 1000)))
    counts = count_experts(index, experts)
    ratio = expert_ratio(counts)
    assert ratio.sum().item() == pytest.approx(1) and ratio.max() <= 1 / top_k + 1e-12
    by_hand = math.sqrt(sum((c / (top_k * tokens) - 1 / experts) ** 2 for c in counts.tolist()) / experts)
    assert specialization_std(counts).item() == pytest.approx(by_hand, abs=1e-12)
    assert specialization_std(ratio).item() == pytest.approx(by_hand, abs=1e-12)
    assert -1e-12 <= specialization(counts, top_k) <= 1 + 1e-12


def test_routing_by_token_id_attains_the_highest_deviation_for_every_id():
    experts, top_k, vocabulary = 8, 2, 50
    ids = torch.randint(vocabulary, (4, 250), generator=generator())
    router = create_router("hash", num_experts=experts, top_k=top_k, vocabulary=vocabulary)
    routing = router(torch.zeros(1000, 4), TokenContext(batch_size=4, length=250, token_ids=ids))
    counts_VE = by_label(ids.flatten(), routing.index, experts)
    assert (counts_VE.sum(1) > 0).all()
    assert torch.allclose(specialization(counts_VE, top_k), torch.ones(vocabulary, dtype=torch.float64))
    counts_PE = by_label(torch.arange(250).repeat(4), routing.index, experts)
    assert specialization(counts_PE, top_k).mean() < 0.75, "position says less than the id"


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (32, 2), (6, 4)])
def test_random_choice_tends_to_even(experts, top_k):
    """Normalised, its root mean square over groups of n tokens is 1 / sqrt(n)."""
    for tokens in (25, 400):
        index = random_choice(300 * tokens, experts, top_k)
        counts = by_label(torch.arange(300).repeat_interleave(tokens), index, experts)
        root_mean_square = specialization(counts, top_k).square().mean().sqrt()
        assert root_mean_square.item() == pytest.approx(tokens**-0.5, rel=0.1)


def test_where_there_is_nothing_to_choose_or_nothing_chosen():
    assert max_specialization_std(4, 4) == 0
    assert specialization(torch.full((4,), 3), 4) == 0
    assert specialization_std(torch.zeros(4)).isnan() and specialization(torch.zeros(4), 2).isnan()
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k={top_k} with 4 experts: choose 1 to 4"):
            max_specialization_std(4, top_k)


# ---- what a label says of the expert


def test_information_of_a_table_by_hand():
    counts = torch.tensor([[3.0, 1.0], [0.0, 4.0], [0.0, 0.0]])
    joint = {(0, 0): 3 / 8, (0, 1): 1 / 8, (1, 1): 4 / 8}
    label, expert = {0: 0.5, 1: 0.5}, {0: 3 / 8, 1: 5 / 8}
    information = sum(p * math.log(p / (label[v] * expert[e])) for (v, e), p in joint.items())
    entropy = -sum(p * math.log(p) for p in expert.values())
    assert expert_information(counts).item() == pytest.approx(information / entropy, abs=1e-12)
    assert torch.allclose(expert_information(counts.expand(2, 3, 2)), expert_information(counts).expand(2))


def test_information_is_0_where_labels_say_nothing_and_1_where_they_say_all():
    assert expert_information(torch.tensor([[2, 4, 6], [1, 2, 3]])).item() == pytest.approx(0, abs=1e-12)
    assert expert_information(torch.diag(torch.tensor([5, 1, 2]))).item() == pytest.approx(1)
    pairs = torch.block_diag(torch.ones(1, 2), torch.ones(1, 2))  # each label a set of two experts
    assert expert_information(pairs).item() == pytest.approx(1 - math.log(2) / math.log(4))
    assert expert_information(torch.tensor([[3, 0], [4, 0]])).isnan()
    assert expert_information(torch.zeros(3, 4)).isnan()


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (8, 6)])
def test_information_of_a_choice_that_ignores_the_label(experts, top_k):
    labels, tokens = 40, 400
    values = []
    for seed in range(20):
        index = random_choice(labels * tokens, experts, top_k, seed)
        values.append(expert_information(by_label(torch.arange(labels).repeat(tokens), index, experts)).item())
    expected = (labels - 1) * (experts - top_k) / (2 * labels * tokens * top_k * math.log(experts))
    assert sum(values) / len(values) == pytest.approx(expected, rel=0.06)


# ---- distance of ratios


def test_distance_by_hand():
    distance = expert_distance(torch.tensor([3, 1]), torch.tensor([1, 1]))
    p, q, m = (0.75, 0.25), (0.5, 0.5), (0.625, 0.375)
    divergence = sum(a * math.log2(a / c) + b * math.log2(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2
    assert distance.item() == pytest.approx(math.sqrt(divergence), abs=1e-12)
    assert expert_distance(torch.tensor([3, 0]), torch.tensor([0, 9])).item() == pytest.approx(1)
    assert expert_distance(torch.tensor([1, 2, 3]), torch.tensor([2, 4, 6])).item() == pytest.approx(0, abs=1e-7)
    assert expert_distance(torch.zeros(2), torch.ones(2)).isnan()


@few
@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), min_size=3, max_size=3))
def test_distance_is_a_metric(counts):
    a, b, c = (torch.tensor(values) for values in counts)
    assert expert_distance(a, b).item() == pytest.approx(expert_distance(b, a).item(), abs=1e-12)
    assert 0 <= expert_distance(a, b) <= 1 + 1e-12
    assert expert_distance(a, c) <= expert_distance(a, b) + expert_distance(b, c) + 1e-7
    assert (expert_distance(a, b) < 1e-6) == torch.allclose(expert_ratio(a), expert_ratio(b))


def test_distance_of_two_random_samples():
    experts, top_k, tokens = 8, 2, (200, 500)
    samples = [
        by_label(torch.arange(300).repeat_interleave(n), random_choice(300 * n, experts, top_k, n), experts)
        for n in tokens
    ]
    expected = (experts - top_k) * sum(1 / n for n in tokens) / (8 * top_k * math.log(2))
    assert expert_distance(*samples).square().mean().item() == pytest.approx(expected, rel=0.1)


# ---- drops


def dropped(requested, capacity, experts, policy="choice"):
    """Every sequence [L, K] for itself."""
    keep = [keep_within_capacity(ids, ids.double(), experts, capacity, policy) for ids in requested]
    return requested.masked_fill(~torch.stack(keep), -1)


def test_drops_by_hand():
    requested = torch.tensor([[[0, 1], [0, 2], [1, 0]], [[2, 1], [0, 1], [-1, -1]]])
    dispatched = torch.tensor([[[0, 1], [-1, 2], [-1, -1]], [[2, -1], [0, 1], [-1, -1]]])
    assert drop_by_position(requested, dispatched).tolist() == [1 / 4, 1 / 4, 1.0]
    assert drop_by_position(requested[0], dispatched[0]).tolist() == [0, 1 / 2, 1]
    nobody = drop_by_position(requested[1], dispatched[1])
    assert nobody[:2].tolist() == [1 / 2, 0] and nobody[2].isnan()
    with pytest.raises(ValueError, match=r"requested \(2, 3, 2\), dispatched \(3, 2\): both must be ids \[..., L, K\]"):
        drop_by_position(requested, dispatched[0])


@few
@given(st.data())
def test_drops_never_grow_with_capacity(data):
    experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, experts))
    length = data.draw(st.integers(1, 15))
    index = random_choice(2 * length, experts, top_k, data.draw(st.integers(0, 1000))).view(2, length, top_k)
    policy = data.draw(st.sampled_from(["choice", "position"]))
    before = torch.ones(length, dtype=torch.float64)
    for capacity in range(length + 1):
        drop = drop_by_position(index, dropped(index, capacity, experts, policy))
        assert (drop <= before).all()
        before = drop
    assert (before == 0).all(), "an expert with room for every token drops none"
    assert (drop_by_position(index, dropped(index, 0, experts, policy)) == 1).all()


@few
@given(st.integers(1, 20), st.integers(0, 25))
def test_one_expert_drops_exactly_the_last_tokens(length, capacity):
    index = torch.zeros(1, length, 1, dtype=torch.int64)
    drop = drop_by_position(index, dropped(index, capacity, 1))
    assert drop.tolist() == [float(place >= capacity) for place in range(length)]


def test_drops_grow_towards_the_end_where_experts_follow_from_the_token():
    """Sequences of 2,048 tokens that are distributed like words, each with two experts of 32 of its own: the frequent
    ones fill their experts. In quarters of the sequence, in percent; OpenMoE's figure 12 has the same course."""
    vocabulary, experts, length, sequences, seeds = 30_000, 32, 2048, 8, 10
    frequency = 1 / torch.arange(1, vocabulary + 1).double() ** 1.1
    quarters = {}
    for rule in ("colossalai", "flaxformer"):
        router = create_router("openmoe", dim=experts, num_experts=experts, capacity=rule).eval()
        router.weight.data = torch.eye(experts)
        drops = []
        for seed in range(seeds):
            embedding = torch.randn(vocabulary, experts, generator=generator(seed))
            ids = frequency.multinomial(sequences * length, replacement=True, generator=generator(seed))
            routings = [router(embedding[part]) for part in ids.view(sequences, length)]
            requested = torch.stack([routing.requested for routing in routings])
            dispatched = torch.stack([routing.index for routing in routings])
            drops.append(drop_by_position(requested, dispatched).view(4, -1).mean(1) * 100)
        quarters[rule] = torch.stack(drops)
    generous, tight = quarters["colossalai"].mean(0), quarters["flaxformer"].mean(0)
    assert (tight.diff() > 3).all() and generous[3] > generous[2] > generous[:2].max()
    assert (quarters["colossalai"][:, 3] > 1.2 * quarters["colossalai"][:, :3].amax(1)).all()
    assert (quarters["flaxformer"].diff() > 0).all()
    assert (quarters["flaxformer"] > quarters["colossalai"]).all(), "half the capacity at K = 2"
    for actual, expected in ((generous, (1, 2, 7, 20)), (tight, (6, 18, 31, 40))):
        assert actual.tolist() == pytest.approx(expected, abs=4)


# ---- change


def test_change_by_hand():
    before = torch.tensor([[0, 1], [2, 3], [4, -1], [-1, -1], [0, 1]])
    after = torch.tensor([[1, 0], [2, 1], [4, -1], [-1, -1], [1, -1]])
    assert routing_change(before, before) == 0
    assert routing_change(before, after).item() == 2 / 4
    assert routing_change(before[:, :1], after[:, :1]).item() == 2 / 4
    assert routing_change(torch.stack([before, before]), torch.stack([after, before])).tolist() == [1 / 2, 0]
    assert routing_change(torch.full((3, 2), -1), torch.full((3, 2), -1)).isnan()
    # a token that lost all its experts changed
    assert routing_change(torch.tensor([[3]]), torch.tensor([[-1]])) == 1
    with pytest.raises(ValueError, match="both must be"):
        routing_change(before, after[:2])


def test_change_of_two_random_choices():
    experts, top_k = 6, 2
    change = routing_change(random_choice(20_000, experts, top_k, 1), random_choice(20_000, experts, top_k, 2))
    assert change.item() == pytest.approx(1 - 1 / math.comb(experts, top_k), abs=0.01)


@few
@given(st.integers(0, 1000), st.integers(1, 4))
def test_change_sees_sets_only(seed, top_k):
    one, two = random_choice(30, 5, top_k, seed), random_choice(30, 5, top_k, seed + 1)
    assert routing_change(one, one.flip(1)) == 0
    assert routing_change(one, two) == routing_change(two.flip(1), one)
    by_hand = sum(set(a) != set(b) for a, b in zip(one.tolist(), two.tolist(), strict=True)) / 30
    assert routing_change(one, two).item() == pytest.approx(by_hand)


def test_change_of_routings_in_any_layout():
    """A list, ids, and more pairs than count as load."""
    index = torch.tensor([[0, 2], [1, 3]])
    mask = torch.zeros(2, 4, dtype=torch.bool).scatter(1, index, True)
    ids = Routing.from_topk(index, torch.ones(2, 2), bank_size=4)
    pairs = Routing.from_mask(mask, torch.ones(2, 4))
    every = Routing.from_mask(torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4), selected=mask)
    other = Routing.from_topk(torch.tensor([[2], [1]]), torch.ones(2, 1), bank_size=4)
    for routing in (ids, pairs, every):
        assert routing_change(ids, routing) == 0
        assert routing_change(other, routing) == 1
    assert routing_change(other, Routing.from_topk(index[:, :1], torch.ones(2, 1), bank_size=4)).item() == 1 / 2
