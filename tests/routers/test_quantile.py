"""Quantile balancing: against loops over sorted lists, against Megatron-Core where installed, and what it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.routers import TokenContext, create_router

D, E, T = 12, 8, 32


def create(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    router = create_router("quantile", **{"dim": D, "num_experts": E, "top_k": 2, "init_std": 1.0} | options)
    return router.to(dtype), torch.randn(T, D, dtype=dtype)


def by_hand(logits, beta, K):
    """Ids of each token, and what the (m + 1)-th best token offers each expert, with sorted lists."""
    chosen, margins = [], []
    for row in logits.tolist():
        offers = [value - b for value, b in zip(row, beta.tolist(), strict=True)]
        order = sorted(range(E), key=lambda e: -offers[e])
        chosen.append(order[:K])
        margins.append([value - offers[order[K]] for value in row])
    m = len(margins) * K // E
    return chosen, [sorted((row[e] for row in margins), reverse=True)[m] for e in range(E)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_after": False, "scale": 2.0},
        {"top_k": 1},
        {"top_k": 7},
        {"score": "sigmoid", "top_k": 3, "scale": 2.5},
        {"score": "sigmoid", "top_k": 1},
        {"score": "sqrtsoftplus"},
    ],
    ids=repr,
)
def test_against_one_token_after_the_other(options):
    router, x = create(**options)
    router.beta.normal_()
    K, x = router.top_k, x.requires_grad_()
    factor = torch.randn(T, E, dtype=torch.float64)
    routing = router(x)
    chosen, quantile = by_hand(routing.logits, router.beta, K)
    assert routing.index.tolist() == chosen
    assert routing.stats["quantile"].tolist() == pytest.approx(quantile, abs=1e-12)
    assert routing.stats["batches"] == 1

    total = 0
    for t in range(T):
        logits = router.weight @ x[t]
        if router.softmax_after:
            weight = logits[chosen[t]].softmax(0)
        elif router.score == "softmax":
            weight = logits.softmax(0)[chosen[t]]
        else:
            s = logits.sigmoid() if router.score == "sigmoid" else (1 + logits.exp()).log().sqrt()
            weight = s[chosen[t]] / s[chosen[t]].sum() if K > 1 else s[chosen[t]]
        torch.testing.assert_close(routing.weight[t], router.scale * weight, rtol=1e-9, atol=1e-12)
        total = total + (router.scale * weight * factor[t, chosen[t]]).sum()
    expected = torch.autograd.grad(total, [x, router.weight])
    actual = torch.autograd.grad((routing.weight * factor.gather(1, routing.index)).sum(), [x, router.weight])
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equals_megatron_core(top_k):
    utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils", reason="Megatron-Core is not installed")
    if not hasattr(utils, "qb_dual_update"):
        pytest.skip("this Megatron-Core has no quantile balancing")
    router, x = create(torch.float32, top_k=top_k, softmax_after=top_k > 1)
    router.beta.normal_()
    routing = router(x)
    index, quantile = utils.qb_dual_update(routing.logits.detach(), top_k, router.beta)
    assert torch.equal(routing.index, index) and torch.equal(routing.stats["quantile"], quantile)
    probabilities, _ = utils.topk_routing_with_score_function(
        routing.logits, top_k, use_pre_softmax=top_k == 1, precomputed_indices=index
    )
    torch.testing.assert_close(routing.weight, probabilities.gather(1, index))


@given(st.integers(1, 40), st.integers(1, E - 1), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_at_the_quantile_each_expert_has_its_share(tokens, top_k, seed):
    """floor(T K / E) tokens offer more, if what else they could have stays; those whose next expert it is tie."""
    router, _ = create(top_k=top_k, seed=seed, softmax_after=False)
    x = torch.randn(tokens, D, dtype=torch.float64)
    router.beta.normal_()
    routing = router(x)
    alpha = (routing.logits - router.beta).sort(1, descending=True).values[:, top_k]
    over = routing.logits - alpha[:, None] - routing.stats["quantile"]
    share = tokens * top_k // E
    assert ((over > 1e-9).sum(0) <= share).all() and ((over >= -1e-9).sum(0) > share).all()


@given(st.lists(st.floats(-50, 50), min_size=T, max_size=T), st.floats(-50, 50))
@settings(max_examples=15, deadline=None)
def test_only_differences_between_experts_matter(of_tokens, of_beta):
    router, x = create()
    router.beta.normal_()
    context = TokenContext.for_tokens(x)
    logits = router.logits(x, context)
    before = router.assign(logits, router.scores(logits), context)
    router.beta += of_beta
    shifted = logits + torch.tensor(of_tokens, dtype=torch.float64)[:, None]
    after = router.assign(shifted, router.scores(shifted), context)
    assert torch.equal(after.index, before.index)
    torch.testing.assert_close(after.weight, before.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.stats["quantile"], before.stats["quantile"] + of_beta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_update_takes_the_mean_over_micro_batches(ema):
    router, _ = create(ema=ema)
    old = router.beta.normal_().clone()
    stats = [router(torch.randn(T, D, dtype=torch.float64)).stats for _ in range(3)]
    empty = router(torch.zeros(0, D, dtype=torch.float64)).stats
    assert empty["batches"] == 0 and (empty["quantile"] == 0).all()
    router.update({name: sum(s[name] for s in [*stats, empty]) for name in empty})
    expected = ema * old + (1 - ema) * torch.stack([s["quantile"] for s in stats]).mean(0)
    torch.testing.assert_close(router.beta, expected - expected.mean(), rtol=1e-12, atol=1e-12)
    moved = router.beta.clone()
    router.update(empty)
    assert torch.equal(router.beta, moved)


def test_it_balances_what_is_far_from_balanced():
    router, _ = create(top_k=2)
    x = torch.randn(512, D, dtype=torch.float64)
    with torch.no_grad():
        x[:, 0] = 1.0
        router.weight[:, 0] = torch.tensor([4.0, 2.0, 0, 0, 0, 0, -2.0, -4.0])  # what every token likes, and does not
    share = 512 * 2 // E
    excess = [(router(x).load_E() - share).abs().max().item()]
    for _ in range(20):
        router.update(router(x).stats)
        excess.append((router(x).load_E() - share).abs().max().item())
    assert excess[0] > share and excess[1] < excess[0] / 2, "one update is most of it"
    assert excess[-1] < share / 10
    assert router.beta.mean().abs() < 1e-12
    router.eval()
    assert router(x).stats == {} and (router(x).load_E() - share).abs().max() < share / 10


def test_padded_tokens_offer_nothing():
    router, x = create()
    mask = torch.arange(T)[None] < 13  # 13 * 2 / 8 rounds down to 3
    padded = router(x, TokenContext.for_tokens(x, padding_mask=mask)).stats
    assert torch.equal(padded["quantile"], router(x[:13]).stats["quantile"]) and padded["batches"] == 1
    _, quantile = by_hand(router(x[:13]).logits, router.beta, 2)
    assert padded["quantile"].tolist() == pytest.approx(quantile, abs=1e-12)


def test_where_every_expert_is_chosen_there_is_nothing_to_balance():
    router, x = create(top_k=E)
    assert not router.stateful and router(x).stats == {}
    assert (router(x).load_E() == T).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 9}, "top_k=9 with 8 experts"),
        ({"ema": 1.0}, "ema=1.0: choose 0"),
        ({"ema": -0.1}, "ema=-0.1"),
        ({"score": "relu"}, 'score="relu"'),
        ({"score": "sigmoid", "softmax_after": True}, "softmax_after needs"),
        ({"top_k": 1, "softmax_after": True}, "every weight would be 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
