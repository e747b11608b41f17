"""The choice of experts against plain loops and, for max-min, against every subset."""

import itertools

import numpy as np
import pytest

from gatewright.tools.prune import selection


def best_by_hand(scores, count):
    order = sorted((i for i, s in enumerate(scores) if s == s), key=lambda i: (-scores[i], i))
    return sorted(order[:count])


def test_top_and_its_ties():
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 5, (40, 12)).astype(float)  # many ties
    scores[::3, 9:] = np.nan
    counts = draw.integers(1, 10, 40)
    kept = selection.top(scores, counts)
    for row in range(40):
        assert np.flatnonzero(kept[row]).tolist() == best_by_hand(scores[row].tolist(), counts[row])
    assert np.flatnonzero(selection.top(np.ones((1, 8)), np.array([3]))[0]).tolist() == [0, 1, 2]


def test_top_by_group():
    scores = np.random.default_rng(1).random((5, 12))
    kept = selection.top(scores, np.full(5, 6), groups=3)
    for row, group in itertools.product(range(5), range(3)):
        chosen = np.flatnonzero(kept[row, 4 * group : 4 * group + 4]).tolist()
        assert chosen == best_by_hand(scores[row, 4 * group : 4 * group + 4].tolist(), 2)


def test_global_counts():
    draw = np.random.default_rng(2)
    shares = selection.normalised(draw.random((4, 10)) ** 6)
    for total, floor in ((20, 2), (9, 1), (8, 2), (40, 3)):
        counts = selection.global_counts(shares, total, floor)
        kept = {(layer, e) for layer in range(4) for e in best_by_hand(shares[layer].tolist(), floor)}
        rest = sorted(
            ((layer, e) for layer in range(4) for e in range(10) if (layer, e) not in kept),
            key=lambda place: (-shares[place], place),
        )
        kept |= set(rest[: total - len(kept)])
        assert counts.tolist() == [sum(layer == row for layer, _ in kept) for row in range(4)]
        assert counts.sum() == total and counts.min() >= floor


def test_normalised_and_mass():
    scores = np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 2.0, np.nan]])
    shares = selection.normalised(scores)
    np.testing.assert_array_equal(shares, [[0.25, 0.75, 0], [0, 0, 0], [0.5, 0.5, np.nan]])
    kept = np.array([[True, False, True], [True, False, False], [False, True, False]])
    np.testing.assert_array_equal(selection.kept_mass(scores, kept), [0.25, 1, 0.5])


def least_mass(shares, kept):
    return (shares * kept).sum(-1).min()


def test_max_min_against_every_subset():
    draw = np.random.default_rng(5)
    exact, ratios = 0, []
    for case in range(100):
        D, E = draw.integers(2, 4), int(draw.integers(4, 11))
        M = int(draw.integers(1, E))
        shares = selection.normalised(draw.random((D, 1, E)) ** draw.integers(1, 6))
        kept, bound = selection.max_min(shares, np.array([M]))
        assert kept.sum() == M
        best = max(least_mass(shares[:, 0], np.isin(np.arange(E), ids)) for ids in itertools.combinations(range(E), M))
        found = least_mass(shares[:, 0], kept[0])
        assert found <= best + 1e-12 <= bound[0] + 2e-12, case
        ratios.append(found / best)
        exact += found >= best - 1e-12
    # a search: it missed the best once when this was written, three domains and two of four experts, by 28 %
    assert exact >= 97, exact
    assert np.mean(ratios) > 0.99 and min(ratios) > 0.7, (np.mean(ratios), min(ratios))


def test_max_min_by_group_against_every_subset():
    draw = np.random.default_rng(6)
    for _ in range(40):
        shares = selection.normalised(draw.random((2, 1, 8)) ** 4)
        kept, bound = selection.max_min(shares, np.array([4]), groups=2)
        sets = [
            np.isin(np.arange(8), first + tuple(4 + e for e in second))
            for first in itertools.combinations(range(4), 2)
            for second in itertools.combinations(range(4), 2)
        ]
        best = max(least_mass(shares[:, 0], one) for one in sets)
        assert kept[0, :4].sum() == kept[0, 4:].sum() == 2
        assert 0.85 * best <= least_mass(shares[:, 0], kept[0]) <= best + 1e-12 <= bound[0] + 2e-12


def test_max_min_serves_the_domain_that_a_mean_forgets():
    # one domain lives in experts 0 and 1, two others share 2 and 3: a mean of two kept forgets the first
    shares = np.array([[0.4, 0.4, 0.1, 0.1], [0.0, 0.05, 0.6, 0.35], [0.0, 0.05, 0.55, 0.4]])[:, None]
    mean = selection.top(shares.mean(0), np.array([2]))
    kept, _ = selection.max_min(shares, np.array([2]))
    assert np.flatnonzero(mean[0]).tolist() == [2, 3]
    assert least_mass(shares[:, 0], mean[0]) == pytest.approx(0.2)
    assert least_mass(shares[:, 0], kept[0]) == pytest.approx(0.5)


def test_max_min_of_one_domain_is_top():
    shares = selection.normalised(np.random.default_rng(7).random((1, 6, 9)))
    kept, bound = selection.max_min(shares, np.full(6, 4))
    assert np.array_equal(kept, selection.top(shares[0], np.full(6, 4)))
    np.testing.assert_allclose(bound, selection.kept_mass(shares[0], kept))


def test_overlap_and_margins():
    first = np.array([[True, True, False, False], [True, False, False, False]])
    second = np.array([[True, False, True, False], [True, False, False, False]])
    assert selection.overlap(first, second).tolist() == [0.5, 1]
    scores = np.array([[4.0, 2.0, 1.0, 0.0], [1.0, 1.0, np.nan, np.nan]])
    kept = np.array([[True, True, False, False], [True, True, False, False]])
    assert selection.margins(scores, kept).tolist() == [0.5, 1]
    by_group = selection.margins(scores[:1], np.array([[True, False, True, False]]), groups=2)
    assert by_group.tolist() == [0.5]  # 1 - 2 / 4 in the first group, all of it in the second
