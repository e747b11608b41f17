"""Centroid routing: distances one by one, the farthest as released, the nearest as in the textbook, and k-means."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import assert_same, dense

from gatewright.routers import TokenContext, create_router
from gatewright.routers.centroid import k_means

D, E = 6, 5
D64 = torch.float64


def make(mode="faithful", top_k=2, seed=0, **options):
    return create_router("centroid", dim=D, num_experts=E, top_k=top_k, mode=mode, seed=seed, **options)


def tokens(count=24, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=D64)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("mode", ["faithful", "nearest"])
def test_equals_its_definition(mode, top_k):
    router, x = make(mode, top_k), tokens().requires_grad_()
    routing = router(x)
    factor = torch.sin(torch.arange(24)[:, None] + 2.0 * torch.arange(E))
    (dense(routing).nan_to_num(0) * factor).sum().backward()
    grad, x.grad = x.grad, None

    rows = []
    for t in range(24):
        distance = torch.stack([((x[t] - centre) ** 2).sum().sqrt() for centre in router.centroids])
        logits = distance if mode == "faithful" else -distance
        chosen = sorted(range(E), key=lambda e: -logits[e].item())[:top_k]
        whole = sum(logits[e].exp() for e in chosen)
        rows.append(
            torch.stack([logits[e].exp() / whole if e in chosen else x.new_tensor(torch.nan) for e in range(E)])
        )
    expected = torch.stack(rows)
    assert_same(dense(routing), expected, "weights", 1e-12)
    (expected.nan_to_num(0) * factor).sum().backward()
    assert_same(grad, x.grad, "gradient of x", 1e-11)
    assert (grad.abs().max() > 1e-3) == (top_k > 1)
    assert router.without_gradient == (("tokens",) if top_k == 1 else ())


def test_faithful_takes_the_farthest_and_nearest_the_closest():
    x = tokens()
    faithful, nearest = make(), make("nearest")
    assert torch.equal(faithful.centroids, nearest.centroids)
    order = (x[:, None] - faithful.centroids).norm(dim=-1).argsort(1)
    assert torch.equal(faithful(x).index, order[:, [-1, -2]])
    assert torch.equal(nearest(x).index, order[:, :2])
    for routing in (faithful(x), nearest(x)):
        assert (routing.weight[:, 0] >= routing.weight[:, 1]).all()
        assert_same(routing.weight.sum(1), torch.ones(24, dtype=D64), "weights", 1e-14)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(1, 1000), mode=st.sampled_from(["faithful", "nearest"]))  # 0 draws the centroids themselves
def test_routing_is_a_function_of_the_token_alone(seed, mode):
    router, x = make(mode), tokens(seed=seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    whole = dense(router(x))
    assert_same(dense(router(x[order])), whole[order], "permuted", 1e-12)
    assert_same(dense(router(x[:1])), whole[:1], "alone", 1e-12)
    turn = torch.linalg.qr(tokens(D, seed=seed + 1)).Q
    turned = copy.deepcopy(router)
    turned.set_centroids(router.centroids @ turn)
    assert_same(dense(turned(x @ turn)), whole, "turned together with the centroids", 1e-12)


def test_nothing_trains_the_centroids():
    router, x = make(), tokens().float().requires_grad_()
    assert not list(router.parameters()) and router.centroids.dtype == D64 and not router.stateful
    routing = router(x)
    assert routing.losses == {} and routing.weight.dtype == torch.float32
    routing.weight.square().sum().backward()
    assert x.grad.abs().max() > 0 and not router.centroids.requires_grad
    before = router.centroids.clone()
    for dtype in (torch.bfloat16, torch.float16):
        assert_same(copy.deepcopy(router).to(dtype).centroids, before, "kept whole", 0)


def test_a_token_on_a_centroid():
    router = make("nearest")
    x = router.centroids.clone().requires_grad_()
    routing = router(x)
    assert routing.index[:, 0].tolist() == list(range(E))
    routing.weight[:, 0].sum().backward()
    assert x.grad.isfinite().all()


def test_far_tokens_rank_by_distance_where_scores_are_zero():
    router = make("nearest", top_k=3)
    router.set_centroids(1000.0 * torch.arange(E)[:, None].expand(E, D))
    routing = router(torch.zeros(1, D))
    assert (routing.scores[0, 1:] == 0).all()
    assert routing.index.tolist() == [[0, 1, 2]] and routing.weight.isfinite().all()


def test_without_centroids_it_refuses_to_decide():
    router = make(seed=None)
    with pytest.raises(ValueError, match=r'router "centroid" has no centroids: router.fit\(x\)'):
        router(tokens())
    again = make(seed=None)
    again.load_state_dict(router.state_dict())
    with pytest.raises(ValueError, match="has no centroids"):
        again(tokens())

    fitted = make(seed=None)
    fitted.fit(tokens())
    again.load_state_dict(fitted.state_dict())
    assert_same(dense(again(tokens())), dense(fitted(tokens())), "loaded", 0)
    with torch.no_grad():
        router.centroids.copy_(fitted.centroids)
    assert_same(dense(router(tokens())), dense(fitted(tokens())), "copied into the buffer", 0)
    assert torch.equal(make(seed=3).centroids, make(seed=3).centroids)
    assert not torch.equal(make(seed=3).centroids, make(seed=4).centroids)
    with torch.device("meta"):
        assert make(seed=3).centroids.is_meta


def test_set_centroids():
    router = make(seed=None)
    router.set_centroids(tokens(E).float())
    assert_same(router.centroids, tokens(E).float().double(), "set", 0)
    for wrong in (tokens(E + 1), tokens(E)[:, :3], tokens(E) * torch.inf):
        with pytest.raises(ValueError, match=r"centroids of shape .*: expected \(5, 6\) finite numbers"):
            router.set_centroids(wrong)
    for wrong in (tokens()[None], tokens()[:, :3], tokens() * torch.nan):
        with pytest.raises(ValueError, match=r"representations of shape .*: expected finite \[N, 6\]"):
            router.fit(wrong)
    with pytest.raises(ValueError, match='mode="far": choose "faithful" or "nearest"'):
        make("far")


def test_k_means_finds_separate_clusters():
    centres = 20 * torch.eye(E, D, dtype=D64)
    x = (centres[:, None] + 0.1 * tokens(E * 40).view(E, 40, D)).flatten(0, 1)
    found = k_means(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))], E)
    distance = torch.cdist(found, x.view(E, 40, D).mean(1))
    assert sorted(distance.argmin(1).tolist()) == list(range(E))
    assert distance.min(1).values.max() < 1e-12


@settings(max_examples=20, deadline=None)
@given(count=st.integers(E, 40), seed=st.integers(0, 100))
def test_k_means_is_a_fixed_point_and_repeats_itself(count, seed):
    x = tokens(count, seed)
    centre = k_means(x, E, seed=seed)
    assert torch.equal(k_means(x, E, seed=seed), centre)
    cluster = torch.cdist(x, centre).argmin(1)
    for e in cluster.unique().tolist():
        assert_same(centre[e], x[cluster == e].mean(0), "the mean of its rows", 1e-12)

    def spread(centre):
        return torch.cdist(x, centre).min(1).values.square().sum()

    assert spread(centre) <= spread(k_means(x, E, seed=seed, iterations=0)) + 1e-12


def test_k_means_step_by_step():
    """Also where a cluster loses every row, which happens for these, and keeps its centre."""
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(2023), dtype=D64)
    centre, emptied = k_means(x, 8, iterations=0), False
    for _ in range(20):
        rows = [[] for _ in range(8)]
        for row in x:
            rows[min(range(8), key=lambda e: (row - centre[e]).norm().item())].append(row)
        emptied |= [] in rows
        centre = torch.stack([torch.stack(own).mean(0) if own else centre[e] for e, own in enumerate(rows)])
    assert emptied
    assert_same(k_means(x, 8), centre, "centres", 1e-12)


def test_k_means_of_few_rows():
    x = tokens(E)
    found = k_means(x, E, seed=2)
    assert_same(found[found[:, 0].argsort()], x[x[:, 0].argsort()], "each row is its centre", 1e-14)
    with pytest.raises(ValueError, match="5 clusters of 3 different rows: give more representations"):
        k_means(x[:3].repeat(4, 1), E)
    with pytest.raises(ValueError, match="5 clusters of 0 different rows"):
        k_means(x[:0], E)


def test_the_released_rule():
    """Centroids cast to the tokens' dtype, cdist per sample, topk of distances, softmax in float32."""
    router = make()
    x = tokens(2 * 8).float().view(2, 8, D)
    distance = torch.cdist(x, router.centroids.float().expand(2, E, D)).flatten(0, 1)
    values, index = distance.topk(2)
    routing = router(x.flatten(0, 1), TokenContext.for_tokens(x))
    assert torch.equal(routing.index, index)
    assert_same(routing.weight, values.softmax(1), "weights", 1e-5)
