"""Segment routing against its definition, segment by segment, and what follows from deciding once for s tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import assert_same, dense

from gatewright.routers import TokenContext, create_router
from gatewright.routers.segment import (
    balance_loss_over_layers,
    fold_segments,
    real_segments,
    segment_sizes,
    unfold_segments,
)

D, E = 5, 4
D64 = torch.float64


def make(segment_size=3, dtype=D64, **options):
    torch.manual_seed(0)
    router = create_router("segment", dim=D, num_experts=E, segment_size=segment_size, **options).to(dtype)
    with torch.no_grad():
        router.weight.normal_()
    return router


def tokens(batch_size=2, length=8, seed=1, dtype=D64):
    return torch.randn(batch_size, length, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def route(router, x_BLD, **fields):
    return router(x_BLD.flatten(0, 1), TokenContext.for_tokens(x_BLD, **fields))


def segment_by_segment(router, x_BLD, mask_BL):
    """Weights [T, E] (0 where not assigned) and the balance loss, from the formulas alone."""
    s, batch, length = router.segment_size, *x_BLD.shape[:2]
    weights = {}
    counts, probabilities = [0] * E, []
    for b in range(batch):
        zs = []
        for start in range(0, length, s):
            place = range(start, start + s)
            zs.append([x_BLD[b, t] if t < length and mask_BL[b, t] else x_BLD.new_zeros(D) for t in place])
        if router.shifted:
            zs = [[x_BLD.new_zeros(D)] * s, *zs[:-1]]
        for g, z in enumerate(zs):
            real = [t for t in range(g * s, min(g * s + s, length)) if mask_BL[b, t]]
            if not real:
                continue
            p = ((router.weight @ torch.cat(z)) / router.temperature).softmax(0)
            chosen = p.topk(router.top_k).indices.tolist()  # equal ones, before the first segment, in torch's order
            total = sum(p[e] for e in chosen)
            alone = router.top_k == 1 and not router.renorm_top1
            for e in chosen:
                counts[e] += 1
                for t in real:
                    weights[b * length + t, e] = p[e] if alone else p[e] / total.clamp(min=1e-6)
            probabilities.append(p)
    balance = sum(counts[e] / sum(counts) * torch.stack(probabilities).mean(0)[e] for e in range(E))
    return weights, router.balance_weight * E * balance


MASKS = {
    "all real": lambda: torch.ones(3, 8, dtype=torch.bool),
    "ragged": lambda: torch.arange(8)[None] < torch.tensor([8, 4, 0])[:, None],
    "holes": lambda: torch.tensor([[1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0, 1], [1] * 8]).bool(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2, "temperature": 0.5},
        {"top_k": 3, "segment_size": 2},
        {"top_k": 2, "shifted": True},
        {"renorm_top1": True},
        {"segment_size": 20},
    ],
    ids=str,
)
def test_equals_its_definition(options, mask):
    router, x, mask = make(**options), tokens(3), MASKS[mask]()
    results = []
    for fast in (False, True):
        x = x.detach().requires_grad_()
        router.zero_grad()
        if fast:
            routing = route(router, x, padding_mask=mask)
            value, loss = dense(routing), routing.losses["balance"]
        else:
            weights, loss = segment_by_segment(router, x, mask)
            value = torch.full((24, E), torch.nan, dtype=D64)
            for (token, expert), weight in weights.items():
                value = value.index_put((torch.tensor(token), torch.tensor(expert)), weight)
        factor = torch.sin(1 + torch.arange(24)[:, None] + 3 * torch.arange(E))
        ((value * factor)[~value.isnan()].sum() + loss).backward()
        results.append((value.detach(), loss.detach(), x.grad, router.weight.grad.clone()))
    for expected, actual, what in zip(*results, ["weights", "loss", "gradient of x", "gradient of W"], strict=True):
        assert_same(actual, expected, what, 1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_segments_of_one_token_are_token_choice(top_k):
    router = make(segment_size=1, top_k=top_k)
    tokenwise = create_router(
        "topk", dim=D, num_experts=E, top_k=top_k, renormalise=top_k > 1, balance_weight=0.02
    ).double()
    tokenwise.load_state_dict(router.state_dict())
    x = tokens()
    ours, theirs = route(router, x), route(tokenwise, x)
    assert_same(dense(ours), dense(theirs), "weights", 1e-14)
    assert_same(ours.losses, theirs.losses, "losses", 1e-14)
    assert router.causal and route(router, x, causal=True).num_tokens == 16


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 9), size=st.integers(1, 5), more=st.integers(0, 7), before=st.integers(0, 2))
def test_zeros_after_the_end_and_segments_of_padding_change_nothing(length, size, more, before):
    router, x = make(size, top_k=2), tokens(2, length)
    expected = dense(route(router, x)).view(2, length, E)

    zeros = -length % size
    explicit = route(router, torch.cat([x, x.new_zeros(2, zeros, D)], 1))
    assert_same(dense(explicit).view(2, -1, E)[:, :length], expected, "explicit zeros", 1e-14)

    front = before * size
    padded = torch.full((2, front + length + more, D), torch.nan, dtype=D64)
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    mask[:, front : front + length] = True
    padded[mask] = x.flatten(0, 1)
    routing = route(router, padded, padding_mask=mask)
    assert_same(dense(routing).view(2, -1, E)[:, front : front + length], expected, "padding around", 1e-13)
    assert_same(routing.losses, route(router, x).losses, "losses", 1e-13)


def test_padding_between_real_tokens_is_a_zero_in_its_place():
    router, x = make(), tokens(1, 6)
    mask = torch.tensor([[True, False, True, True, True, True]])
    zeroed = x.masked_fill(~mask[..., None], 0)
    left = dense(route(router, x, padding_mask=mask))
    right = dense(route(router, zeroed))
    assert left[1].isnan().all()
    assert_same(left[mask[0]], right[mask[0]], "weights", 0)


def test_a_segment_shares_its_decision_and_moves_with_the_series():
    router, x = make(3, top_k=2), tokens(2, 12)
    index, weight = (value.view(2, 4, 3, 2) for value in route(router, x).as_topk())
    assert (index == index[:, :, :1]).all() and (weight == weight[:, :, :1]).all()
    later = torch.cat([tokens(2, 3, seed=5), x], 1)
    shifted_index, shifted_weight = (value.view(2, 5, 3, 2) for value in route(router, later).as_topk())
    assert torch.equal(shifted_index[:, 1:], index)
    assert_same(shifted_weight[:, 1:], weight, "weights", 1e-14)
    assert len(index.unique()) == E, "the segments differ"


def test_the_task_trains_the_router_unless_its_one_weight_is_renormalised():
    """Which is what the published runs did: the gradient that is left is rounding."""
    for options, trained in (({}, True), ({"renorm_top1": True}, False), ({"top_k": 2}, True)):
        router = make(**options)
        _, weight = route(router, tokens()).as_topk()
        (weight * torch.sin(torch.arange(weight.numel()).view(weight.shape))).sum().backward()
        largest = router.weight.grad.abs().max()
        assert largest > 1e-2 if trained else largest < 1e-14
        assert ((weight == 1).all()) == (not trained)
    assert make(renorm_top1=True).without_gradient == (), "the balance loss trains it"
    assert make(renorm_top1=True, balance_weight=0.0).without_gradient == ("tokens", "weight")


def test_a_decision_sees_the_later_tokens_of_its_segment():
    x = tokens(1, 9)
    later = x.clone()
    later[:, 5] += 3
    router = make(3)
    before, after = (dense(route(router, value)) for value in (x, later))
    changed = (before.nan_to_num(9) != after.nan_to_num(9)).any(1)
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match='router "segment" is not causal'):
        route(router, x, causal=True)
    router.allow_noncausal = True
    assert_same(dense(route(router, x, causal=True)), before, "allowed", 0)


def test_shifted_decides_by_the_segment_before():
    x = tokens(1, 9)
    router, shifted = make(3), make(3, shifted=True)
    assert shifted.causal
    own, index = route(router, x), route(shifted, x, causal=True).index.view(3, 3)
    assert torch.equal(index[1:], own.index.view(3, 3)[:-1])
    routing = route(shifted, x)
    assert_same(routing.weight[:3], torch.full((3, 1), 1 / E, dtype=D64), "the first segment knows nothing")
    assert_same(routing.logits[3:], own.logits[:-3], "logits", 1e-14)
    for length in range(1, 10):
        prefix = dense(route(shifted, x[:, :length]))
        assert_same(prefix, dense(routing)[:length], f"prefix of {length}", 1e-14)


def test_dropout_is_of_the_probabilities_and_of_the_context():
    rate, x = 0.25, tokens(64, 12)
    router, plain = make(3, top_k=2, dropout=rate), make(3, top_k=2)
    key = {"seed": 3, "step": 1, "sample_id": torch.arange(64)}
    routing = route(router, x, **key)
    kept, index = routing.prediction
    probabilities = plain(x.flatten(0, 1), TokenContext.for_tokens(x)).prediction[0]
    ratio = kept / probabilities
    assert ((ratio == 0) | ((ratio - 1 / (1 - rate)).abs() < 1e-12)).all()
    assert abs((ratio == 0).double().mean() - rate) < 0.05
    expected = kept.topk(2).values
    expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-6)
    assert_same(routing.weight.view(-1, 3, 2)[:, 0], expected, "weights", 1e-14)
    assert_same(routing.scores, route(plain, x).scores, "scores are what nothing was dropped of", 0)

    alone = route(router, x[40:41], seed=3, step=1, sample_id=torch.tensor([40]))
    assert_same(alone.weight, routing.weight[480:492], "a sample draws the same in any batch", 1e-14)
    assert not torch.equal(route(router, x, **key | {"step": 2}).weight, routing.weight)
    with pytest.raises(ValueError, match="needs context.noise"):
        route(router, x)
    assert_same(dense(route(router.eval(), x)), dense(route(plain, x)), "evaluation", 0)


def test_a_segment_of_which_all_is_dropped_has_weight_zero():
    x = tokens(32, 9)
    for top_k in (1, 2):
        router = make(3, top_k=top_k, dropout=0.9)
        routing = route(router, x, seed=0, step=0, sample_id=torch.arange(32))
        nothing = (routing.prediction[0] == 0).all(1).repeat_interleave(3)
        assert nothing.any() and (routing.weight[nothing] == 0).all() and routing.weight.isfinite().all()
        routing.weight.sum().backward()
        assert router.weight.grad.isfinite().all()


def test_the_balance_loss_counts_segments():
    """E segments, each sure of an expert of its own: the loss is its weight, whatever K and however long each is."""
    router = make(3, balance_weight=0.02)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :E] = 100 * torch.eye(E)
    x = torch.zeros(1, 10, D, dtype=D64)
    x[0, [0, 3, 6, 9], range(E)] = 1
    routing = route(router, x)
    assert routing.load_E().tolist() == [3, 3, 3, 1], "the layer's load is of tokens"
    assert_same(routing.losses["balance"], torch.tensor(0.02, dtype=D64), "balanced", 1e-12)
    collapsed = route(router, x.roll(1, 1)[:, :3].repeat(1, 4, 1))
    assert_same(collapsed.losses["balance"], torch.tensor(0.02 * E, dtype=D64), "all to one", 1e-12)

    # the first version of the released loss sums the share of each slot: K times this one
    router, x = make(3, top_k=2, balance_weight=0.02 * 2), tokens(2, 12)
    p = route(router, x).scores.view(-1, 3, E)[:, 0]
    slots = torch.nn.functional.one_hot(p.topk(2).indices, E).double().mean(0)
    assert_same(route(router, x).losses["balance"], 0.02 * E * (slots * p.mean(0)).sum(), "summed over slots", 1e-12)
    assert make(balance_weight=0.0)(tokens().flatten(0, 1)).losses == {}


def test_the_balance_loss_over_all_layers_weighs_layers_by_their_segments():
    x = tokens(2, 12)
    mask = torch.arange(12)[None] < torch.tensor([12, 5])[:, None]
    routers = [make(size, top_k=2, balance_weight=0.0) for size in (2, 3, 12)]
    routings = [route(router, x, padding_mask=mask) for router in routers]
    p, slots = [], torch.zeros(E, dtype=D64)
    for routing, size in zip(routings, (2, 3, 12), strict=True):
        first = mask & (torch.arange(12) % size == 0)
        p.append(routing.scores.view(2, 12, E)[first])
        slots += routing.index.view(2, 12, 2)[first].flatten().bincount(minlength=E)
    assert [len(part) for part in p] == [6 + 3, 4 + 2, 1 + 1]
    expected = 0.02 * E * (slots / slots.sum() * torch.cat(p).mean(0)).sum()
    loss = balance_loss_over_layers(routings)
    assert_same(loss, expected, "loss", 1e-12)
    loss.backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers)
    own = route(make(3, balance_weight=0.3), x, padding_mask=mask)
    assert_same(balance_loss_over_layers([own], 0.3), own.losses["balance"], "one layer", 1e-14)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(0, 3), length=st.integers(0, 9), size=st.integers(1, 12))
def test_folding_and_unfolding(batch, length, size):
    x = torch.arange(batch * length * 2.0).view(batch, length, 2) + 1
    z = fold_segments(x, size)
    assert z.shape == (batch, -(-length // size), size * 2)
    assert torch.equal(unfold_segments(z, length, 2), x)
    assert (z == 0).sum() == batch * (-length % size) * 2
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.3
    expected = [[any(mask[b, g * size : g * size + size]) for g in range(z.shape[1])] for b in range(batch)]
    assert real_segments(mask, size).tolist() == expected


def test_one_size_a_layer():
    assert segment_sizes([5, 5, 4, 4, 3, 3], 6) == [5, 5, 4, 4, 3, 3]
    assert segment_sizes(4, 3) == [4, 4, 4]
    with pytest.raises(ValueError, match=r"2 segment sizes \[5, 3\] for 6 layers: give one a layer, or one"):
        segment_sizes([5, 3], 6)
    with pytest.raises(ValueError, match="segment_size=0: choose a whole number of at least 1"):
        segment_sizes([5, 0], 2)


def test_what_is_out_of_range_is_refused():
    for options, message in (
        ({"segment_size": 0}, "segment_size=0: choose a whole number of at least 1"),
        ({"segment_size": 2.0}, "segment_size=2.0: choose a whole number"),
        ({"temperature": 0.0}, "temperature=0.0: choose a positive number"),
        ({"dropout": 1.0}, r"dropout=1.0: choose 0 \(none\) to less than 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"top_k": 2, "renorm_top1": True}, "renorm_top1=True with top_k=2: more than one weight is always"),
        ({"top_k": 5}, "top_k=5 with 4 experts: choose 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match='router "segment" needs the option segment_size'):
        create_router("segment", dim=D, num_experts=E)


def test_the_initial_weight_is_xavier_uniform():
    weight = create_router("segment", dim=64, num_experts=32, segment_size=4).weight
    bound = (6 / (32 + 4 * 64)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
