"""OpenMoE's router: against a loop over tokens and groups, and at its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.routers import TokenContext, create_router

D, E = 8, 4
D64 = torch.float64


def create(seed=0, tokens=30, dtype=D64, **options):
    torch.manual_seed(seed)
    router = create_router("openmoe", **{"dim": D, "num_experts": E, "init_std": 0.7} | options).to(dtype)
    return router, torch.randn(tokens, D, dtype=dtype)


def room(rule, tokens, experts, top_k, factor, least):
    """C, as the two code bases write it."""
    if rule == "flaxformer":
        return max(int(round(factor * tokens / experts)), least)
    capacity = math.floor(top_k * factor * tokens / experts)
    return max(capacity + capacity % 2, least)


def by_hand(router, x):
    """One group after the other, one choice after the other. -> kept {(token, expert): weight}, asked, balance, z"""
    o = router.options
    factor = o["train_capacity_factor"] if router.training else o["eval_capacity_factor"]
    size = o["group_size"] or (4096 if o["capacity"] == "flaxformer" else len(x))
    kept, asked, balance, z = {}, [], 0, 0
    for first in range(0, len(x), size):
        group = range(first, min(first + size, len(x)))
        probability = {t: torch.exp(router.weight @ x[t]) / torch.exp(router.weight @ x[t]).sum() for t in group}
        order = {t: sorted(range(E), key=lambda e: -probability[t][e].item())[: o["top_k"]] for t in group}
        left = dict.fromkeys(range(E), len(x))
        if o["capacity"]:
            least = o["min_capacity"]
            left = dict.fromkeys(range(E), room(o["capacity"], len(group), E, o["top_k"], factor, least))
        for choice in range(o["top_k"]):
            for t in group:
                expert = order[t][choice]
                if left[expert] > 0:
                    left[expert] -= 1
                    kept[t, expert] = probability[t][expert]
        for e in range(E):
            share = sum(e in order[t] for t in group) / len(group)
            mean = sum(probability[t][e] for t in group) / len(group)
            balance = balance + E**2 * share * mean / E * len(group) / len(x)
        z = z + sum(torch.logsumexp(router.weight @ x[t], 0) ** 2 for t in group) / len(x)
        asked += [order[t] for t in group]
    return kept, asked, balance, z


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_capacity_factor": 0.6, "eval_capacity_factor": 0.9, "min_capacity": 1},
        {"group_size": 7, "min_capacity": 2},
        {"group_size": 10, "top_k": 3, "train_capacity_factor": 1.0},
        {"capacity": "colossalai", "train_capacity_factor": 0.5, "eval_capacity_factor": 0.7, "min_capacity": 1},
        {"capacity": "colossalai", "group_size": 11, "train_capacity_factor": 0.5},
        {"capacity": None, "top_k": 1},
        {"capacity": None, "group_size": 8},
    ],
    ids=str,
)
def test_against_a_loop(options, training):
    router, x = create(balance_weight=0.3, z_weight=0.2, **options)
    router.train(training)
    kept, asked, balance, z = by_hand(router, x)
    routing = router(x)
    token, expert, weight = routing.as_list()
    pairs = list(zip(token.tolist(), expert.tolist(), strict=True))
    assert sorted(pairs) == sorted(kept)
    for pair, value in zip(pairs, weight, strict=True):
        assert value.item() == pytest.approx(kept[pair].item(), abs=1e-12)
    if router.options["capacity"]:
        assert routing.requested.tolist() == asked
    else:
        assert routing.requested is None and routing.index.tolist() == asked
    assert routing.losses["balance"].item() == pytest.approx(0.3 * balance.item(), abs=1e-12)
    assert routing.losses["z"].item() == pytest.approx(0.2 * z.item(), abs=1e-12)

    factor = torch.linspace(-1, 1, len(x) * E, dtype=D64).sin()
    (expected,) = torch.autograd.grad(
        sum(value * factor[t * E + e] for (t, e), value in kept.items()) + 0.3 * balance + 0.2 * z, router.weight
    )
    (actual,) = torch.autograd.grad((weight * factor[token * E + expert]).sum() + routing.loss, router.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["flaxformer", "colossalai"])
@pytest.mark.parametrize("experts", [3, 8, 32])
@pytest.mark.parametrize("factor", [0.5, 1.25, 2.0])
def test_capacity_is_the_published_rule(rule, experts, factor):
    """Rounding halves to even, up to the next even number, and never below 4."""
    router = create_router("openmoe", dim=D, num_experts=experts, capacity=rule, train_capacity_factor=factor)
    sizes = [*range(1, 120), 2048, 4095, 4096]
    expected = [room(rule, size, experts, 2, factor, 4) for size in sizes]
    assert router._capacity(torch.tensor(sizes)).tolist() == expected


def test_capacities_of_the_8b_model():
    router = create_router("openmoe", dim=D, num_experts=32)
    assert router._capacity(torch.tensor([4096])).item() == 160
    assert router.eval()._capacity(torch.tensor([4096])).item() == 256
    router = create_router("openmoe", dim=D, num_experts=32, capacity="colossalai").eval()
    assert router._capacity(torch.tensor([2048])).item() == 2048 // 8


def test_half_as_many_places_as_choices_drop_at_least_three_of_eight():
    """flaxformer's rule does not know K: with K = 2 and factor 1.25 at most 62.5 % of the choices find a place."""
    router, _ = create(num_experts=32, dim=32)
    router.weight.data = torch.eye(32, dtype=D64)
    index = router(torch.randn(4096, 32, dtype=D64)).index
    assert 0.62 < (index >= 0).double().mean() <= 1.25 / 2


def test_a_first_choice_comes_before_an_earlier_second_one():
    router, _ = create(num_experts=2, min_capacity=1, train_capacity_factor=0.75, dim=2)
    router.weight.data = torch.eye(2, dtype=D64)
    x = torch.tensor([[2.0, 0], [2, 0], [0, 2], [0, 2]], dtype=D64)
    # room for round(0.75 * 4 / 2) = 2 in each: taken by the first choices alone
    assert router(x).index.tolist() == [[0, -1], [0, -1], [1, -1], [1, -1]]
    # token 1 now prefers expert 1, so that expert 0 has a place left, which the first second choice gets
    x = torch.tensor([[2.0, 0], [0, 2], [0, 2], [0, 2]], dtype=D64)
    routing = router(x)
    assert routing.index.tolist() == [[0, -1], [1, 0], [1, -1], [-1, -1]]
    assert routing.requested.tolist() == [[0, 1], [1, 0], [1, 0], [1, 0]]
    assert routing.weight[1].sum().item() == pytest.approx(1), "raw, but here all"
    assert (routing.weight[3] == 0).all()


def test_later_tokens_take_the_place_of_an_earlier_second_choice():
    router, x = create(min_capacity=1, train_capacity_factor=0.8)
    assert not router.causal and create(top_k=1)[0].causal and create(capacity=None)[0].causal
    later = x.clone()
    later[15:] = 3 * torch.randn(15, D, dtype=D64, generator=torch.Generator().manual_seed(5))
    before, after = router(x), router(later)
    assert torch.equal(before.requested[:15], after.requested[:15])
    first, second = before.index[:15].T
    assert torch.equal(first, after.index[:15, 0]), "first choices of early tokens depend on earlier ones only"
    assert not torch.equal(second, after.index[:15, 1])
    context = TokenContext(batch_size=1, length=30, causal=True)
    with pytest.raises(ValueError, match="not causal"):
        router(x, context)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_one_expert_drops_exactly_the_last_tokens(data):
    tokens = data.draw(st.integers(1, 24))
    factor = data.draw(st.floats(0.05, 2))
    router, x = create(tokens=tokens, num_experts=1, top_k=1, train_capacity_factor=factor, min_capacity=1)
    kept = (router(x).index[:, 0] >= 0).tolist()
    capacity = max(1, round(factor * tokens))
    assert kept == [place < capacity for place in range(tokens)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 100))
def test_a_few_tokens_are_never_dropped(tokens, seed):
    """One token at a time, as in decoding: C is at least 4."""
    for rule in ("flaxformer", "colossalai"):
        router, x = create(seed, tokens, capacity=rule)
        assert (router(x).index >= 0).all()


def test_unlimited_capacity_is_no_capacity():
    without, x = create(capacity=None)
    expected = without(x)
    for rule in ("flaxformer", "colossalai"):
        router, _ = create(capacity=rule, train_capacity_factor=100.0)
        assert torch.equal(router(x).index, expected.index) and torch.equal(router(x).weight, expected.weight)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_losses_at_uniform_scores(top_k):
    """The balance loss is K, whatever the choices are; z is (ln E)^2."""
    router, x = create(top_k=top_k, balance_weight=1.0, z_weight=1.0, group_size=11)
    torch.nn.init.zeros_(router.weight)
    losses = router(x).losses
    assert losses["balance"].item() == pytest.approx(top_k) and losses["z"].item() == pytest.approx(math.log(E) ** 2)


def test_groups_are_as_if_alone():
    router, x = create(group_size=10, train_capacity_factor=0.5, min_capacity=1)
    whole = router(x)
    parts = [router(part) for part in x.split(10)]
    assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
    for name in whole.losses:
        mean = sum(part.losses[name] for part in parts) / 3
        assert whole.losses[name].item() == pytest.approx(mean.item(), rel=1e-12)


def test_padding_takes_no_place_in_a_group():
    """Groups hold real tokens: those of a padded batch are those of the batch without padding."""
    router, x = create(tokens=15, group_size=6, min_capacity=1, train_capacity_factor=0.7)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, ::2], mask[1, :7], mask[2, 4:] = True, True, True
    padded = torch.full((24, D), torch.nan, dtype=D64)
    padded[mask.flatten()] = x
    routing = router(padded, TokenContext(batch_size=3, length=8, padding_mask=mask))
    expected = router(x)
    assert torch.equal(routing.index[mask.flatten()], expected.index)
    assert (routing.index[~mask.flatten()] == -1).all()
    assert (expected.index == -1).any()
    assert routing.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)


def test_jitter_is_of_the_routers_input_and_in_training_only():
    router, x = create(jitter=0.2)
    context = TokenContext(batch_size=3, length=10, seed=1, step=2, sample_id=torch.arange(3))
    factor = 1 + 0.2 * (2 * context.noise(30, D, distribution="uniform").double() - 1)
    assert 0.8 < factor.min() < 0.85 and 1.15 < factor.max() < 1.2
    torch.testing.assert_close(router(x, context).logits, (x * factor) @ router.weight.T, rtol=1e-12, atol=1e-12)
    assert router.requires == ("noise",)
    assert router.eval().requires == ()
    torch.testing.assert_close(router(x).logits, x @ router.weight.T, rtol=1e-12, atol=1e-12)


def test_published_defaults():
    options = create_router("openmoe", dim=1000, num_experts=64).options
    assert (options["top_k"], options["train_capacity_factor"], options["eval_capacity_factor"]) == (2, 1.25, 2.0)
    assert (options["balance_weight"], options["z_weight"]) == (0.01, 1e-4)
    torch.manual_seed(0)
    assert create_router("openmoe", dim=1000, num_experts=64).weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": "switch"}, 'capacity="switch": choose "flaxformer", "colossalai" or None'),
        ({"train_capacity_factor": 0}, "train_capacity_factor=0: choose a positive number"),
        ({"eval_capacity_factor": math.inf}, "eval_capacity_factor=inf: choose a positive number"),
        ({"min_capacity": 0}, "min_capacity=0: choose at least 1"),
        ({"group_size": 0}, "group_size=0: choose at least 1, or None"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"top_k": 5}, "top_k=5 with 4 experts"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
