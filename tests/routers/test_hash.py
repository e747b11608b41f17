"""Hash routing: the table, how evenly it spreads, and what happens to ids that it does not know."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.moe.metrics import load_entropy, max_violation
from gatewright.routers import TokenContext, create_router


def create(**options):
    return create_router("hash", **{"num_experts": 4, "vocabulary": 40} | options)


def context_of(ids, **fields):
    return TokenContext(batch_size=1, length=len(ids), token_ids=torch.as_tensor(ids)[None], **fields)


def route(router, ids, **fields):
    return router(torch.zeros(len(ids), 3), context_of(ids, **fields))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"kind": "balanced", "top_k": 2, "frequencies": [1] * 40}])
def test_an_id_always_goes_to_its_experts(options):
    router = create(**options)
    ids = [3, 7, 3, 39, 0, 7]
    routing = route(router, ids)
    for place, token_id in enumerate(ids):
        assert routing.index[place].tolist() == router.table_VK[token_id].tolist()
        assert len(set(routing.index[place].tolist())) == router.top_k
        assert routing.weight[place].tolist() == [pytest.approx(1 / router.top_k)] * router.top_k
    # what the token holds says nothing
    other = router(torch.randn(6, 3), context_of(ids))
    assert torch.equal(other.index, routing.index) and torch.equal(other.weight, routing.weight)
    chosen = torch.zeros(6, 4).scatter(1, routing.index, 1 / router.top_k)
    assert torch.equal(routing.scores, chosen)
    assert torch.allclose(routing.logits.exp(), chosen) and (routing.logits[chosen == 0] == -torch.inf).all()


def test_the_random_table_comes_from_the_seed_alone():
    table = create(seed=5).table_VK
    torch.manual_seed(99)
    assert torch.equal(create(seed=5).table_VK, table)
    assert not torch.equal(create(seed=6).table_VK, table)
    state = torch.get_rng_state()
    create()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_table_spreads_ids_evenly():
    table = create(vocabulary=40_000, num_experts=8, top_k=2).table_VK
    counts = table.flatten().bincount(minlength=8)
    assert max_violation(counts) < 0.03


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_balanced_table_is_dealt_to_the_least_loaded(data):
    experts = data.draw(st.integers(1, 5))
    top_k = data.draw(st.integers(1, experts))
    frequencies = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=25))
    router = create(
        num_experts=experts, top_k=top_k, vocabulary=len(frequencies), kind="balanced", frequencies=frequencies
    )
    rarest = min([f for f in frequencies if f] or [1])
    load, table = [0] * experts, router.table_VK.tolist()
    for token_id in sorted(range(len(frequencies)), key=lambda i: (-frequencies[i], i)):
        chosen = table[token_id]
        assert len(set(chosen)) == top_k
        assert sorted(load[e] for e in chosen) == sorted(load)[:top_k]
        for expert in chosen:
            load[expert] += frequencies[token_id] or rarest
    # a greedy deal leaves no two experts further apart than the most frequent id
    assert max(load) - min(load) <= max([*frequencies, rarest])


def test_balanced_is_more_even_than_random_on_the_corpus_it_was_made_for():
    vocabulary, experts = 2000, 8
    frequencies = [1000 / (rank + 10) for rank in range(vocabulary)]
    weight = torch.tensor(frequencies, dtype=torch.float64)
    load = {}
    for kind, options in (("random", {}), ("balanced", {"frequencies": frequencies})):
        router = create(vocabulary=vocabulary, num_experts=experts, kind=kind, **options)
        load[kind] = torch.zeros(experts, dtype=torch.float64).index_add(0, router.table_VK[:, 0], weight)
    assert max_violation(load["balanced"]) < 1e-3 < 0.02 < max_violation(load["random"])
    assert load_entropy(load["balanced"]) > 1 - 1e-6


def test_without_frequencies_every_expert_gets_as_many_ids():
    router = create(vocabulary=400, kind="balanced", top_k=2)
    assert router.table_VK.flatten().bincount().tolist() == [200] * 4
    assert len({tuple(sorted(row)) for row in router.table_VK.tolist()}) == 6, "all pairs of four occur"
    assert torch.equal(create(vocabulary=400, kind="balanced", top_k=2).table_VK, router.table_VK)
    assert not torch.equal(create(vocabulary=400, kind="balanced", top_k=2, seed=1).table_VK, router.table_VK)


def test_ids_that_were_never_seen_are_spread_too():
    router = create(vocabulary=100, kind="balanced", frequencies=[5.0] * 4 + [0.0] * 96)
    assert router.table_VK.flatten().bincount().tolist() == [25] * 4


@pytest.mark.parametrize("bad", [-1, 40, -100])
def test_an_unknown_id_is_an_error_unless_it_is_padding(bad):
    router = create()
    with pytest.raises(RuntimeError, match=r"token_ids holds an id out of range: expected 0 to 39, from vocabulary=40"):
        route(router, [0, bad, 1])
    mask = torch.tensor([[True, False, True]])
    routing = route(router, [0, bad, 1], padding_mask=mask)
    assert (routing.index[1] == -1).all() and (routing.weight[1] == 0).all()
    assert torch.equal(routing.index[[0, 2]], route(router, [0, 1]).index)


def test_options_are_json_and_the_table_is_saved():
    options = {"kind": "balanced", "frequencies": [float(i) for i in range(40)]}
    router = create(**options)
    again = create_router("hash", **json.loads(json.dumps(router.options)))
    assert torch.equal(again.table_VK, router.table_VK)
    other = create(seed=1)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table_VK, router.table_VK)


def test_a_layer_trains_its_experts_by_it():
    layer = MoELayer(create(top_k=2, dim=3), ExpertSpec(3, 5))
    x = torch.randn(1, 6, 3, requires_grad=True)
    y, routing = layer(x, context_of([0, 1, 2, 3, 4, 5]))
    (y.square().sum() + routing.loss).backward()
    assert layer.experts.w1.grad.abs().sum() > 0 and x.grad.abs().sum() > 0
    assert not list(layer.router.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "learned"}, 'kind="learned": choose one of'),
        ({"frequencies": [1.0] * 40}, 'kind="random" takes no frequencies'),
        ({"kind": "balanced", "frequencies": [1.0] * 39}, "frequencies has 39 numbers: expected vocabulary=40"),
        ({"kind": "balanced", "frequencies": [-1.0] + [1.0] * 39}, "frequencies must be finite and at least 0"),
        ({"kind": "balanced", "frequencies": [float("nan")] * 40}, "frequencies must be finite and at least 0"),
        ({"kind": "balanced", "frequencies": torch.ones(40)}, r"give frequencies.tolist\(\)"),
        ({"vocabulary": 0}, "vocabulary=0: choose at least 1"),
        ({"top_k": 5}, "top_k=5 with 4 experts"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_missing_ids_are_named():
    with pytest.raises(ValueError, match='router "hash" needs context.token_ids'):
        create()(torch.zeros(2, 3))
