"""BASE layers: the assignment against scipy's, its balance, and the combination with what the token was."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import TokenContext, create_router
from gatewright.routers.base_layers import balanced_assignment

linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment

D, E, B, L = 6, 4, 2, 9


def create(**options):
    torch.manual_seed(0)
    router = create_router("base", **{"dim": D, "num_experts": E} | options).double()
    nn.init.normal_(router.centroids)
    return router, torch.randn(B * L, D, dtype=torch.float64)


def best_sum(scores):
    """By scipy: floor(T/E) places an expert that only tokens may take, and one more that spare rows of score 0 take."""
    tokens, experts = scores.shape
    floor, rest = divmod(tokens, experts)
    spare = experts - rest if rest else 0
    places = [(e, False) for e in range(experts) for _ in range(floor)] + [(e, True) for e in range(experts)] * bool(
        rest
    )
    table = np.full((tokens + spare, len(places)), -1e9)
    for column, (e, extra) in enumerate(places):
        table[:tokens, column] = scores[:, e]
        if extra:
            table[tokens:, column] = 0
    return table[linear_sum_assignment(table, maximize=True)].sum()


def draw(kind, tokens, experts, seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(tokens, experts))
    if kind == "one favourite":
        scores = 0.01 * scores + 5 * rng.normal(size=experts)
    elif kind == "ties":
        scores = rng.integers(0, 3, size=(tokens, experts)).astype(float)
    elif kind == "all equal":
        scores[:] = 1.5
    elif kind == "repeated tokens" and tokens:
        scores = scores[rng.integers(0, 1 + tokens // 8, size=tokens)]
    elif kind == "an outlier" and tokens:
        scores[0, 0] = 1e4
    return scores


KINDS = ["random", "one favourite", "ties", "all equal", "repeated tokens", "an outlier"]


@given(st.sampled_from(KINDS), st.integers(0, 70), st.integers(1, 9), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_the_assignment_is_the_best_balanced_one(kind, tokens, experts, seed):
    scores = draw(kind, tokens, experts, seed)
    expert = balanced_assignment(torch.tensor(scores)).numpy()
    count = np.bincount(expert, minlength=experts)
    assert expert.shape == (tokens,) and count.max() - count.min() <= 1 and count.sum() == tokens
    if tokens:
        assert scores[np.arange(tokens), expert].sum() == pytest.approx(best_sum(scores), rel=1e-10, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens, experts", [(480, 16), (333, 8), (20, 64)])
def test_larger_assignments(kind, tokens, experts):
    scores = draw(kind, tokens, experts, 0)
    expert = balanced_assignment(torch.tensor(scores)).numpy()
    count = np.bincount(expert, minlength=experts)
    assert count.max() - count.min() <= 1
    assert scores[np.arange(tokens), expert].sum() == pytest.approx(best_sum(scores), rel=1e-10, abs=1e-8)


@given(st.integers(0, 30), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_the_assignment_ignores_scales_shifts_and_dtypes(tokens, experts, seed):
    # integers, so that scaling rounds nothing
    scores = torch.tensor(draw("ties", tokens, experts, seed))
    expert = balanced_assignment(scores)
    for other in (scores * 4, scores + 8, scores.float(), scores.bfloat16()):
        assert torch.equal(balanced_assignment(other), expert)


def test_scores_that_are_not_finite_count_as_the_smallest():
    scores = torch.tensor(draw("random", 12, 3, 0))
    broken = scores.clone()
    broken[2, 1], broken[5, 0], broken[7] = torch.nan, torch.inf, -torch.inf
    smallest = broken[broken.isfinite()].min()
    expected = torch.where(broken.isfinite(), broken, smallest)
    assert torch.equal(balanced_assignment(broken), balanced_assignment(expected))
    assert balanced_assignment(torch.full((6, 3), torch.nan)).bincount().tolist() == [2, 2, 2]


def test_padded_tokens_take_no_part():
    scores, real = torch.tensor(draw("random", 21, 3, 0)), torch.arange(21) % 4 != 2
    expert = balanced_assignment(scores, real)
    assert (expert[~real] == -1).all()
    assert torch.equal(expert[real], balanced_assignment(scores[real]))


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_equals_its_definition(copy, training):
    router, x = create(copy=copy)
    layer = MoELayer(router, ExpertSpec(D, 5, bias=True)).double().train(training)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    x.requires_grad_()
    y, routing = layer(x)
    scores = x @ router.centroids.T
    expert = routing.index[:, 0]
    if training:
        assert sorted(routing.load_E().tolist())[-E:] == [4, 4, 5, 5]
        assert scores.gather(1, expert[:, None]).sum().item() == pytest.approx(best_sum(scores.detach().numpy()))
    else:
        assert torch.equal(expert, scores.argmax(1))
    rows = []
    for t in range(B * L):
        e = int(expert[t])
        gate, up = (layer.experts.w_in[e] @ x[t] + layer.experts.b_in[e]).chunk(2)
        f = layer.experts.w_out[e] @ (nn.functional.silu(gate) * up) + layer.experts.b_out[e]
        alpha = torch.sigmoid(x[t] @ router.centroids[e])
        rows.append(alpha * f + (1 - alpha) * x[t] if copy else alpha * f)
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, *router.parameters(), layer.experts.w1, layer.experts.w2, layer.experts.w3]
    for a, b in zip(*(torch.autograd.grad(v.sin().sum(), inputs) for v in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert routing.load_E().sum() == B * L and len(routing.load_E()) == E + copy
    assert routing.losses == {} and router.causal == router.batch_independent == (not training)


@pytest.mark.parametrize("tokens", [1, 3, 8, 11])
def test_loads_in_training_differ_by_at_most_one(tokens):
    router, _ = create()
    x = torch.randn(tokens, D, dtype=torch.float64) + 3  # all prefer one expert
    load = router(x, TokenContext(batch_size=1, length=tokens)).load_E()[:E]
    assert load.sum() == tokens and load.max() - load.min() <= 1
    assert (load == tokens // E).all() or tokens % E


def test_initial_centroids_are_orthogonal():
    router = create_router("base", dim=16, num_experts=4)
    gram = router.centroids @ router.centroids.T
    torch.testing.assert_close(gram, 0.01 * torch.eye(4), rtol=1e-5, atol=1e-7)


def test_a_causal_model_trains_only_when_told_to():
    router, x = create()
    causal = TokenContext(batch_size=B, length=L, causal=True)
    with pytest.raises(ValueError, match='router "base" is not causal in training .* allow_noncausal=True'):
        router(x, causal)
    router.eval()(x, causal)
