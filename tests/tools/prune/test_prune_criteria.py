"""Criteria against sums over explicit tokens, written as the formulas read."""

import math

import numpy as np
import pytest
from made_up_statistics import made_up_statistics

from gatewright.tools.prune.criteria import CRITERIA, score
from gatewright.tools.prune.statistics import STANDARD, DomainStatistics, Statistics, exponents

L, E, T, K = 2, 6, 40, 2


@pytest.fixture(scope="module")
def tokens():
    """Per layer and token: the experts chosen (never the last), gates, norms, and the turn of the residual stream."""
    draw = np.random.default_rng(3)
    index = np.stack([np.stack([draw.permutation(E - 1)[:K] for _ in range(T)]) for _ in range(L)])
    return index, draw.random((L, T, K)), 5 * draw.random((L, T, K)), draw.random((L, T))


def pairs(tokens, layer: int, expert: int):
    index, gate, norm, turn = tokens
    for t in range(T):
        for slot in range(K):
            if index[layer, t, slot] == expert:
                yield gate[layer, t, slot], norm[layer, t, slot], turn[layer, t]


@pytest.fixture(scope="module")
def statistics(tokens):
    def total(function):
        return np.array(
            [[math.fsum(function(*p) for p in pairs(tokens, row, e)) for e in range(E)] for row in range(L)]
        )

    def power(a, b, c):
        return total(lambda g, u, s: g**a * u**b * s**c)

    sums = {name: power(*exponents(name)) for name in STANDARD}
    largest = np.array(
        [[max((u for _, u, _ in pairs(tokens, row, e)), default=0) for e in range(E)] for row in range(L)]
    )
    model = made_up_statistics(experts=E, layers=(0, 1)).model
    aimer = np.full((L, E), 0.75)
    return Statistics(
        model=model, domains={"code": DomainStatistics.of_demo(sums, largest, T)}, weights={"aimer": aimer}
    )


FORMULAS = {
    "easy-ep": lambda p: sum(g * u * s for g, u, s in p),
    "reap": lambda p: sum(g * u for g, u, s in p) / len(p),
    "gating": lambda p: sum(g for g, u, s in p),
    "frequency": lambda p: len(p),
    "ean": lambda p: sum(u for g, u, s in p),
    "weighted-ean": lambda p: sum(g * u for g, u, s in p),
    "man": lambda p: sum(u for g, u, s in p) / len(p),
    "max-norm": lambda p: max(u for g, u, s in p),
    "aimer": lambda p: 0.25,
    "0,1,1,0": lambda p: sum(u * s for g, u, s in p),
    "1,0,1,0.5": lambda p: sum(g * s for g, u, s in p) / len(p) ** 0.5,
    "2,2,0,1": lambda p: sum(g**2 * u**2 for g, u, s in p) / len(p),
}


@pytest.mark.parametrize("criterion", FORMULAS)
def test_formula(statistics, tokens, criterion):
    scores = score(statistics, "code", criterion)
    assert scores.shape == (L, E) and scores.dtype == np.float64
    for layer in range(L):
        for expert in range(E - 1):
            expected = FORMULAS[criterion](list(pairs(tokens, layer, expert)))
            assert scores[layer, expert] == pytest.approx(expected, rel=1e-12)
    if criterion != "aimer":
        assert (scores[:, E - 1] == 0).all()  # no token was routed to it


def test_every_criterion_has_a_test_and_says_where_it_comes_from():
    assert CRITERIA.keys() - FORMULAS.keys() == {"random"}
    for criterion in CRITERIA.values():
        assert any(source in criterion.function.__doc__ for source in ("arXiv", "AIMER", "REAP", "baseline"))
        assert criterion.exponents is None or len(criterion.exponents) == 4


def test_random_is_seeded_and_the_same_for_all_domains():
    made = made_up_statistics()
    first = score(made, "code", "random", seed=1)
    assert np.array_equal(first, score(made, "prose", "random", seed=1))
    assert not np.array_equal(first, score(made, "code", "random", seed=2))
    assert (0 <= first).all() and (first < 1).all()


def test_experts_that_are_not_there_are_nan():
    made = made_up_statistics(model_type="gatewright/dit", experts_per_layer=[16, 12, 16])
    for criterion in CRITERIA:
        assert np.isnan(score(made, "code", criterion)).sum(-1).tolist() == [0, 4, 0]


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        ("easyep", "did you mean easy-ep"),
        ("zzz", "choose one of easy-ep, reap"),
        ("1,1,1", "four exponents"),
        ("1,1,-1,0", "four exponents"),
        ("3,1,0,0", r"collect them again with --exponents 3,1,0 \(they hold 0,0,0 0,0,1"),
    ],
)
def test_unknown_and_uncollected_criteria(statistics, criterion, says):
    with pytest.raises(ValueError, match=says):
        score(statistics, "code", criterion)


def test_what_is_missing_is_said(statistics):
    with pytest.raises(ValueError, match='no domain "prose": choose one of code'):
        score(statistics, "prose")
    bare = Statistics(model=statistics.model, domains=statistics.domains)
    with pytest.raises(ValueError, match="before quantisation"):
        score(bare, "code", "aimer")
