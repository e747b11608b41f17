"""Measures of decisions, movement, structure and meaning: against hand-worked values, slow loops, and random choice."""

import itertools
import math

import numpy as np
import pytest
import torch

from gatewright.moe import metrics
from gatewright.moe.record_log import MARGIN_EDGES


def random_ids(tokens: int, experts: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(k).indices


def load(ids: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.bincount(ids[ids >= 0].flatten(), minlength=experts)


COLLAPSED = torch.tensor([6, 6, 0, 0, 0, 0, 0, 0])
EVEN = torch.full((8,), 3)


@pytest.mark.parametrize(
    ("measure", "even", "collapsed"),
    [
        (metrics.effective_experts, 8, 2),
        (metrics.imbalance, 1, 4),
        (metrics.min_violation, 0, 1),
        (metrics.dead_fraction, 0, 0.75),
        (metrics.coefficient_of_variation, 0, math.sqrt((2 * 4.5**2 + 6 * 1.5**2) / 7) / 1.5),
        (lambda c: metrics.coefficient_of_variation(c, ddof=0), 0, math.sqrt(3)),
        (lambda c: metrics.score_balance(c, c), 1, 4),
        (lambda c: metrics.drop_rate(c, 2 * c), 0.5, 0.5),
    ],
)
def test_balance_by_hand(measure, even, collapsed):
    """Single and stacked, of tensors and of arrays."""
    for counts, expected in ((EVEN, even), (COLLAPSED, collapsed)):
        assert measure(counts).item() == pytest.approx(expected)
        assert measure(counts.numpy()).item() == pytest.approx(expected)
    assert measure(torch.stack([EVEN, COLLAPSED])).tolist() == pytest.approx([even, collapsed])
    assert measure(torch.zeros(8)).isnan()


def test_one_expert_has_no_sample_deviation():
    assert metrics.coefficient_of_variation(torch.tensor([3])).isnan()
    assert metrics.coefficient_of_variation(torch.tensor([3]), ddof=0).item() == 0


def test_dead_is_relative_to_the_fair_share():
    """An even load over 256 experts has no dead one, though each has 0.4 % of it."""
    assert metrics.dead_fraction(torch.full((256,), 10)).item() == 0
    counts = torch.full((256,), 1000)
    counts[0], counts[1] = 49, 51
    assert metrics.dead_fraction(counts).item() == 1 / 256
    assert metrics.dead_fraction(counts, threshold=0).item() == 0


def test_information_tells_specialisation_from_collapse_and_indifference():
    experts, tokens = 4, 16
    sure = torch.eye(experts).repeat(tokens // experts, 1)
    indifferent = torch.full((tokens, experts), 1 / experts)
    collapsed = torch.eye(experts)[:1].repeat(tokens, 1)
    for scores, entropy, information in ((sure, 0, 1), (indifferent, 1, 0), (collapsed, 0, 0)):
        score_sum, entropy_sum = metrics.score_sums(scores)
        assert metrics.token_entropy(entropy_sum, tokens, experts).item() == pytest.approx(entropy)
        assert metrics.routing_information(score_sum, entropy_sum, tokens).item() == pytest.approx(
            information, abs=1e-9
        )


def test_information_ignores_columns_that_fill_up():
    scores = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    score_sum, entropy_sum = metrics.score_sums(scores)
    expected = metrics.routing_information(score_sum, entropy_sum, 9)
    padded = torch.cat([score_sum, torch.zeros(5)])
    assert torch.allclose(metrics.routing_information(padded, entropy_sum, 9, experts=3), expected)


def test_margins_token_by_token():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    index = logits.topk(2).indices
    index[3] = -1
    index[4, 1] = -1
    logits[5, 0] = -math.inf
    index[5] = logits[5].topk(2).indices
    actual = metrics.margins(logits, index)
    for t in range(20):
        chosen = [e for e in index[t].tolist() if e >= 0]
        z = logits[t].tolist()
        finite = [v for v in z if math.isfinite(v)]
        if not chosen:
            assert actual[t].isnan()
            continue
        expected = (min(z[e] for e in chosen) - max(z[e] for e in range(6) if e not in chosen)) / np.std(finite)
        assert actual[t].item() == pytest.approx(expected)
    assert metrics.margins(torch.zeros(1, 3), torch.tensor([[0]])).isnan().all()
    steered = metrics.margins(torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[0]]))
    assert steered.item() < 0


def test_margin_below_an_edge():
    histogram = np.zeros(32)
    histogram[[0, 10, 11, 31]] = 1, 2, 3, 4
    assert metrics.margin_below(histogram, MARGIN_EDGES).item() == pytest.approx(0.3)
    assert MARGIN_EDGES[11] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="limit=0.11 is no edge"):
        metrics.margin_below(histogram, MARGIN_EDGES, 0.11)


def test_sums_become_means():
    assert metrics.top_k_mass([3.0], [4]).item() == 0.75
    assert metrics.logit_rms([16.0], [4]).item() == 2
    assert metrics.z_loss([16.0], [4]).item() == 4
    assert metrics.mean_active(COLLAPSED, 6).item() == 2


def test_movement_by_hand():
    before, after = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 1]]), torch.tensor([[1, 0], [2, 4], [0, 1], [-1, -1]])
    assert metrics.saturation(before, after).item() == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics.saturation(after, after).item() == 1
    assert metrics.fluctuation(before[:3], after[:3]).item() == pytest.approx(2 / 3)
    assert metrics.load_drift(COLLAPSED, COLLAPSED.flip(0)).item() == 1
    assert metrics.load_drift(EVEN, EVEN * 3).item() == 0
    first = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    assert metrics.settled_at(first, share=0.5) == 1
    assert metrics.settled_at(first) == 3
    assert metrics.settled_at(first[:1]) == 0
    with pytest.raises(ValueError, match="of the same tokens"):
        metrics.saturation(before, after[:3])


def test_all_pairs_of_a_set_count():
    """Not only neighbours in rank: rows of the share sum to k - 1."""
    ids = random_ids(300, 6, 3)
    ids[0] = torch.tensor([2, -1, -1])
    slow = torch.zeros(6, 6, dtype=torch.int64)
    for chosen in ids.tolist():
        for i, j in itertools.product([e for e in chosen if e >= 0], repeat=2):
            slow[i, j] += 1
    pairs = metrics.coactivation(ids, 6)
    assert torch.equal(pairs, slow)
    sums = metrics.coactivation_share(metrics.coactivation(ids[1:], 6)).nansum(1)
    assert torch.allclose(sums, torch.full((6,), 2.0, dtype=torch.float64))
    lift = metrics.coactivation_lift(metrics.coactivation(random_ids(20000, 6, 3), 6))
    assert lift.diagonal().isnan().all()
    assert (lift[~torch.eye(6, dtype=torch.bool)] - 1).abs().max() < 0.05
    always = metrics.coactivation_lift(metrics.coactivation(torch.tensor([[0, 1], [2, 3]] * 5), 4))
    assert always[0, 1].item() == pytest.approx(3) and always[0, 2].item() == 0


def test_flow_takes_every_pair_of_the_two_sets():
    ids, following = random_ids(200, 5, 2), random_ids(200, 4, 3, seed=1)
    slow = torch.zeros(5, 4, dtype=torch.int64)
    for here, there in zip(ids.tolist(), following.tolist(), strict=True):
        for i, j in itertools.product(here, there):
            slow[i, j] += 1
    joint = metrics.flow(ids, following, 5, 4)
    assert torch.equal(joint, slow) and joint.sum() == 200 * 2 * 3
    assert torch.allclose(metrics.flow_lift(torch.ones(5, 4)), torch.ones(5, 4, dtype=torch.float64))
    assert metrics.flow_lift(torch.eye(3)).diagonal().tolist() == pytest.approx([3, 3, 3])


def test_mutual_information_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(5, (400,), generator=generator)
    expert = (label + torch.randint(3, (400,), generator=generator)) % 4
    joint = metrics.label_counts(expert[:, None], label, 4, 5)
    expected = sklearn.normalized_mutual_info_score(label.numpy(), expert.numpy())
    assert metrics.mutual_information(joint).item() == pytest.approx(expected)
    assert metrics.mutual_information(torch.eye(4)).item() == pytest.approx(1)
    assert metrics.mutual_information(torch.ones(3, 4)).item() == pytest.approx(0, abs=1e-12)
    assert metrics.mutual_information(torch.zeros(3, 4)).isnan()


def test_label_counts_and_shares():
    ids, labels = torch.tensor([[0, 2], [1, -1], [2, 0], [1, 2]]), torch.tensor([0, 0, 1, -1])
    counts = metrics.label_counts(ids, labels, 3, 2)
    assert counts.tolist() == [[1, 1, 1], [1, 0, 1]]
    assert metrics.label_share(counts, torch.tensor([2, 1])).tolist() == [[0.5, 0.5, 0.5], [1, 0, 1]]


def test_specialisation_is_held_against_shuffled_labels():
    labels = torch.arange(8).repeat_interleave(25)
    knows, ignores = (labels % 4)[:, None], random_ids(200, 4, 1)
    found = metrics.specialization_score(knows, labels, 4, 8)
    assert found.value == pytest.approx(2 * math.log(4) / (math.log(4) + math.log(8)))
    assert found.score == found.value - found.chance and found.chance > 0.02
    nothing = metrics.specialization_score(ignores, labels, 4, 8)
    assert abs(nothing.score) < 0.03
    assert nothing == metrics.specialization_score(ignores, labels, 4, 8), "the permutations follow from the seed"


def test_vocabulary_specialisation_leaves_rare_ids_out():
    ids = torch.cat([torch.arange(10).repeat_interleave(20), torch.arange(100, 150)])
    look_up = metrics.vocabulary_specialization(ids % 5, ids, 5)
    assert look_up.value == 1 and 0.2 < look_up.chance < 0.5
    counts = metrics.label_counts((ids % 5)[:, None], ids, 5, 150)
    assert metrics.context_dependence(counts).item() == pytest.approx(0, abs=1e-9)
    first = random_ids(len(ids), 5, 1)[:, 0]
    by_chance = metrics.vocabulary_specialization(first, ids, 5)
    assert abs(by_chance.score) < 0.1
    assert math.isnan(metrics.vocabulary_specialization(first[:5], ids[:5], 5).value)


def test_cosines():
    rows = torch.tensor([[1.0, 0], [2, 2], [0, 0]])
    expected = torch.tensor([[1, math.sqrt(0.5), 0], [math.sqrt(0.5), 1, 0], [0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(metrics.cosines(rows), expected)
    assert torch.allclose(metrics.cosines(rows, rows[:1]), expected[:, :1])


@pytest.mark.parametrize(("tokens", "experts", "k"), [(2048, 64, 8), (2000, 8, 1), (4096, 16, 2)])
def test_nulls_are_what_random_choice_gives(tokens, experts, k):
    counts = torch.stack([load(random_ids(tokens, experts, k, seed), experts) for seed in range(200)])
    entropy, violation = metrics.load_entropy(counts), metrics.max_violation(counts)
    mean_deficit = 1 - entropy.mean().item()
    assert 1 - metrics.null_load_entropy(tokens, experts, k).item() == pytest.approx(mean_deficit, rel=0.15)
    below = (entropy < metrics.null_load_entropy(tokens, experts, k, quantile=0.05)).double().mean().item()
    assert 0.01 <= below <= 0.11
    above = (violation > metrics.null_max_violation(tokens, experts, k, quantile=0.95)).double().mean().item()
    assert 0.01 <= above <= 0.11
    assert violation.mean() < metrics.null_max_violation(tokens, experts, k) < 1.6 * violation.mean()
    aware = metrics.collapse_aware_entropy(counts, k).mean().item()
    assert metrics.null_collapse_aware_entropy(tokens, experts, k).item() == pytest.approx(aware, abs=1e-4)
    ids, other = (random_ids(tokens, experts, k, seed) for seed in (1000, 1001))
    assert metrics.saturation(ids, other).item() == pytest.approx(k / experts, rel=0.15)
    assert metrics.fluctuation(ids, other).item() == pytest.approx(1 - 1 / experts, abs=0.05)
    drift = metrics.load_drift(counts[::2], counts[1::2]).mean().item()
    assert math.sqrt((experts - k) / (math.pi * tokens * k)) == pytest.approx(drift, rel=0.1)


def test_nothing_to_choose_by_chance():
    assert metrics.null_load_entropy(100, 1, 1).item() == 1
    assert metrics.null_load_entropy(100, 4, 4).item() == 1
    assert metrics.null_max_violation(100, 4, 4, quantile=0.99).item() == 0
    assert metrics.null_collapse_aware_entropy(100, 4, 4).item() == 1
