"""Noisy top-k: both forms against loops in plain Python, the smooth load against repeated draws."""

import math
from statistics import NormalDist, fmean, pvariance

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.routers import TokenContext, create_router
from gatewright.routers.losses import squared_variation

D, E, B, L = 6, 5, 3, 8
T = B * L
D64 = torch.float64
CONTEXT = TokenContext(batch_size=B, length=L, seed=3, step=1, sample_id=torch.arange(B))


def create(seed=0, **options):
    torch.manual_seed(seed)
    router = create_router("noisy_topk", **{"dim": D, "num_experts": E} | options).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router, torch.randn(T, D, dtype=D64)


def cv_squared(values):
    return pvariance(values) / fmean(values) ** 2


def phi(value):
    return NormalDist().cdf(value)


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def by_hand(router, x, noise):
    """-> chosen ids and weights of each token, importance and load losses; the paper's and the code's formulas"""
    o, k = router.options, router.options["top_k"]
    shazeer = o["form"] == "shazeer"
    ids, weights, gates, chances = [], [], [], []
    for token, draws in zip(x, noise.tolist(), strict=True):
        clean = (router.weight @ token).tolist()
        if shazeer:
            raw = (router.noise_weight @ token).tolist() if o["noise_std"] else [0.0] * E
            deviation = [o["noise_std"] * (math.log1p(math.exp(v)) + 0.01) for v in raw]
        else:
            deviation = [o["noise_std"] / E] * E
        noisy = [c + n * s for c, n, s in zip(clean, draws, deviation, strict=True)]
        chosen = sorted(range(E), key=lambda e: -noisy[e])[:k]
        ids.append(chosen)
        if shazeer:
            weights.append(softmax([noisy[e] for e in chosen]))
            gates.append([weights[-1][chosen.index(e)] if e in chosen else 0.0 for e in range(E)])
        else:
            weights.append([softmax(noisy)[e] for e in chosen])
            gates.append(softmax(clean))
        if k == E or not o["noise_std"]:
            continue
        chance = []
        for e in range(E):
            others = [noisy[j] for j in range(E) if j != e] if shazeer else noisy
            chance.append(phi((clean[e] - sorted(others, reverse=True)[k - 1]) / deviation[e]))
        chances.append(chance)
    importance = cv_squared([sum(gate[e] for gate in gates) for e in range(E)])
    load = cv_squared([sum(chance[e] for chance in chances) for e in range(E)]) if chances else None
    return ids, weights, importance, load


FORMS = [
    {"form": "shazeer"},
    {"form": "shazeer", "top_k": 1},
    {"form": "shazeer", "top_k": E},
    {"form": "shazeer", "top_k": 3, "noise_std": 0.3},
    {"form": "shazeer", "noise_std": 0.0},
    {"form": "vmoe"},
    {"form": "vmoe", "top_k": 1, "noise_std": 4.0},
    {"form": "vmoe", "top_k": 4, "noise_std": 7.0},
    {"form": "vmoe", "noise_std": 0.0},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_against_a_loop_in_training(options):
    router, x = create(importance_weight=0.3, load_weight=0.7, **options)
    ids, weights, importance, load = by_hand(router, x, CONTEXT.noise(T, E).double())
    routing = router(x, CONTEXT)
    assert routing.index.tolist() == ids
    torch.testing.assert_close(routing.weight, torch.tensor(weights, dtype=D64), rtol=1e-10, atol=1e-12)
    assert routing.losses["importance"].item() == pytest.approx(0.3 * importance, rel=1e-9, abs=1e-15)
    assert ("load" in routing.losses) == (load is not None)
    if load is not None:
        assert routing.losses["load"].item() == pytest.approx(0.7 * load, rel=1e-9)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradient_against_differences(options):
    """Central differences of the loop, which know nothing of the router's code."""
    router, x = create(importance_weight=0.3, load_weight=0.7, **options)
    noise = CONTEXT.noise(T, E).double()
    factor = torch.linspace(-2, 3, T * router.top_k, dtype=D64).sin().view(T, -1)

    def loss():
        ids, weights, importance, load = by_hand(router, x, noise)
        assert ids == chosen, "the choice must not change within the step"
        value = (torch.tensor(weights, dtype=D64) * factor).sum().item() + 0.3 * importance
        return value + (0.7 * load if load is not None else 0)

    routing = router(x, CONTEXT)
    chosen = routing.index.tolist()
    ((routing.weight * factor).sum() + routing.loss).backward()
    step = 1e-6
    for name, parameter in router.named_parameters():
        for place in (0, D + 2, parameter.numel() - 1):
            flat = parameter.data.view(-1)
            flat[place] += step
            above = loss()
            flat[place] -= 2 * step
            below = loss()
            flat[place] += step
            expected = (above - below) / (2 * step)
            assert parameter.grad.view(-1)[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-7), (name, place)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_evaluation_has_no_noise(options):
    router, x = create(importance_weight=0.3, load_weight=0.7, **options)
    router.eval()
    assert router.requires == ()
    ids, weights, importance, _ = by_hand(router, x, torch.zeros(T, E))
    routing = router(x)
    assert routing.index.tolist() == ids
    torch.testing.assert_close(routing.weight, torch.tensor(weights, dtype=D64), rtol=1e-10, atol=1e-12)
    assert routing.losses.keys() == {"importance"}
    assert routing.losses["importance"].item() == pytest.approx(0.3 * importance, rel=1e-9, abs=1e-15)
    torch.testing.assert_close(routing.logits, x @ router.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["shazeer", "vmoe"])
def test_the_smooth_load_is_the_chance_of_being_chosen_again(form):
    """Redraw one expert's noise many times, the others' kept: it is chosen as often as P says. (With the threshold of
    "vmoe" one that was chosen is measured against itself too, so there only the rest agree.)"""
    router, x = create(form=form, noise_std=3.0 if form == "vmoe" else 1.0)
    noisy, clean, deviation = router(x, CONTEXT).logits, x @ router.weight.T, router._deviation(x)
    chance = router._chance(noisy, clean, deviation)
    deviation = torch.as_tensor(deviation, dtype=D64).expand(T, E)
    draws = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=D64)
    chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(1, noisy.topk(2).indices, True)
    for t in range(4):
        for e in range(E):
            if form == "vmoe" and chosen[t, e]:
                continue
            others = torch.cat([noisy[t, :e], noisy[t, e + 1 :]])
            again = clean[t, e] + draws * deviation[t, e] > others.sort(descending=True).values[1]
            assert chance[t, e].item() == pytest.approx(again.double().mean().item(), abs=0.015)


@pytest.mark.parametrize("form", ["shazeer", "vmoe"])
def test_the_load_loss_evens_the_load(form):
    """Gradient steps on it alone, from a gate that prefers one expert."""
    router, x = create(form=form, importance_weight=0.0, load_weight=1.0, noise_std=1.0 if form == "shazeer" else E)
    with torch.no_grad():
        router.weight[0] += 1.5 * x.mean(0) / x.mean(0).norm()
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = router(x, CONTEXT).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_both_papers_start_evenly():
    torch.manual_seed(0)
    router = create_router("noisy_topk", dim=900, num_experts=50)
    assert not router.weight.any() and not router.noise_weight.any()
    start = create_router("noisy_topk", dim=6, num_experts=4).double()
    context = TokenContext(batch_size=1, length=4000, seed=0, step=0, sample_id=torch.arange(1))
    load = start(torch.randn(4000, 6, dtype=D64), context).load_E()
    assert load.min() > 0.9 * load.max()
    vmoe = create_router("noisy_topk", dim=900, num_experts=50, form="vmoe")
    assert vmoe.weight.std().item() == pytest.approx(1 / 30, rel=0.02)
    assert [name for name, _ in vmoe.named_parameters()] == ["weight"]


def test_what_gives_no_gradient_is_declared():
    one, x = create(top_k=1, load_weight=0.0)
    assert set(one.without_gradient) == {"tokens", "weight", "noise_weight"}
    routing = one(x, CONTEXT)
    (routing.weight.sum() * 3 + routing.loss).backward()
    assert all(parameter.grad.abs().max() < 1e-12 for parameter in one.parameters())
    assert create(top_k=1)[0].without_gradient == () == create(top_k=2, load_weight=0.0)[0].without_gradient
    assert create(top_k=1, form="vmoe", load_weight=0.0)[0].without_gradient == ()
    assert create()[0].eval().without_gradient == ("noise_weight",)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.001, 1000))
def test_squared_variation(values, factor):
    values = torch.tensor(values, dtype=D64)
    variation = squared_variation(values)
    assert variation.item() == pytest.approx(cv_squared(values.tolist()), rel=1e-9, abs=1e-12)
    assert -1e-12 <= variation <= len(values) - 1 + 1e-9
    assert squared_variation(factor * values).item() == pytest.approx(variation.item(), rel=1e-9, abs=1e-12)


def test_squared_variation_at_its_ends():
    assert squared_variation(torch.tensor([0.0, 0, 7, 0])).item() == 3
    assert squared_variation(torch.full((4,), 2.5)).item() == 0
    nothing = torch.zeros(4, requires_grad=True)
    squared_variation(nothing).backward()
    assert squared_variation(nothing).item() == 0 and (nothing.grad == 0).all()


def test_noise_is_needed_in_training_alone():
    router, x = create()
    with pytest.raises(ValueError, match="needs context.noise"):
        router(x)
    assert create(noise_std=0.0)[0](x).losses.keys() == {"importance"}
    again = create()[0]
    assert torch.equal(router(x, CONTEXT).index, again(x, CONTEXT).index)
    assert not torch.equal(router(x, CONTEXT).logits, router(x, CONTEXT.replace(step=2)).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "gshard"}, 'form="gshard": choose one of'),
        ({"noise_std": -1.0}, "noise_std=-1.0: choose a finite number of at least 0"),
        ({"noise_std": math.nan}, "noise_std=nan"),
        ({"top_k": 6}, "top_k=6 with 5 experts"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
