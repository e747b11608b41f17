"""ReMoE: weights, loss and statistics against loops, and the coefficient that steers the number of experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe import ExpertSpec, MoELayer, finish_step
from gatewright.routers import TokenContext, create_router

D, E, T, K = 6, 5, 12, 2


def create(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    options = {"dim": D, "num_experts": E, "top_k": K, "init_std": 1.0} | options
    return create_router("remoe", **options).to(dtype)


def tokens(seed=1, count=T):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(router, x_TD, coefficient):
    """Active (token, expert) -> weight, and the loss, one pair after the other."""
    weights, loss = {}, 0
    counts = [0] * E
    for t, x in enumerate(x_TD):
        for e in range(E):
            logit = (router.weight[e] * x).sum()
            if logit.item() > 0:
                weights[t, e] = logit
                counts[e] += 1
    for (_, e), weight in weights.items():
        loss = loss + coefficient * E / (router.top_k * len(x_TD) ** 2) * counts[e] * weight
    return weights, loss, counts


@pytest.mark.parametrize("top_k", [2, 1.5, E])
def test_against_one_pair_after_the_other(top_k):
    router, x = create(top_k=top_k, coefficient=0.3), tokens().requires_grad_()
    routing = router(x)
    token, expert, weight = routing.as_list()
    expected, loss, counts = by_hand(router, x, 0.3)
    assert list(zip(token.tolist(), expert.tolist(), strict=True)) == sorted(expected)
    torch.testing.assert_close(weight, torch.stack([expected[pair] for pair in sorted(expected)]))
    torch.testing.assert_close(
        routing.losses["l1"].double(), loss, rtol=1e-7, atol=0
    )  # the coefficient is float32's 0.3
    assert routing.load_E().tolist() == counts == routing.stats["load"].tolist()
    assert routing.stats["tokens"] == T
    factors = torch.randn(E, dtype=torch.float64)
    grads = torch.autograd.grad((weight * factors[expert]).sum() + routing.loss, [x, router.weight])
    by_hand_loss = sum(w * factors[e] for (_, e), w in expected.items()) + loss
    for actual, wanted in zip(grads, torch.autograd.grad(by_hand_loss, [x, router.weight]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-9)


def test_at_balance_the_loss_is_the_l1_norm():
    """Where each expert has its share k T / E of tokens: coefficient * mean_t |r_t|_1."""
    router = create(top_k=2, num_experts=4, coefficient=1.0, dim=4)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor([[3.0, 1, -1, -2], [-1, 2, 5, -1], [-1, -1, 1, 2], [4, -3, -1, 7]], dtype=torch.float64)
    routing = router(x)
    assert routing.load_E().tolist() == [2, 2, 2, 2]
    torch.testing.assert_close(routing.losses["l1"], x.relu().sum(1).mean())


@given(seed=st.integers(0, 10**6), size=st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_weights_move_no_faster_than_logits(seed, size):
    """relu is 1-Lipschitz: where an expert comes or goes the output does not jump, as it does with top-k."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(T, E, generator=generator, dtype=torch.float64)
    b = a + size * torch.randn(T, E, generator=generator, dtype=torch.float64)
    router, context = create(), TokenContext(batch_size=1, length=T)

    def dense(logits):
        routing = router.assign(logits, router.scores(logits), context)
        token, expert, weight = routing.as_list()
        assert (weight > 0).all()
        torch.testing.assert_close(routing.scores.sum(1), torch.ones(T).double())
        return torch.zeros(T, E).double().index_put((token, expert), weight)

    assert ((dense(a) - dense(b)).abs() <= (a - b).abs() + 1e-12).all()
    assert torch.equal(dense(router.logits_of(router.scores(a))), dense(a)), "scores say all"


def test_a_token_may_have_no_expert():
    router = create()
    x = torch.zeros(4, D, dtype=torch.float64)
    x[1] = router.weight[0].detach()
    layer = MoELayer(router, ExpertSpec(D, 3)).double()
    y, routing = layer(x.requires_grad_())
    assert (y[[0, 2, 3]] == 0).all() and (y[1] != 0).any()
    assert routing.scores[0].tolist() == [1 / E] * E and routing.scores[1, 0] > 0
    (y.sum() + routing.loss + routing.scores.square().sum()).backward()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def test_the_coefficient_steers_by_factors():
    router = create(top_k=2, coefficient=1e-3, dtype=torch.float32)
    start = router.coefficient.item()

    def after(active, tokens):
        twin = create(top_k=2, coefficient=1e-3, dtype=torch.float32)
        load = torch.tensor([active, 0, 0, 0, 0])
        with torch.no_grad():
            twin.update({"load": load.double(), "tokens": torch.tensor(float(tokens)).double()})
        return twin.coefficient.item() / start

    assert after(21, 10) == pytest.approx(1.2, rel=1e-6), "more than k a token"
    assert after(19, 10) == pytest.approx(1 / 1.2, rel=1e-6)
    assert after(20, 10) == pytest.approx(1 / 1.2, rel=1e-6), "at k exactly it falls, as released"
    assert after(0, 0) == 1, "a step without tokens moves nothing"


def test_update_through_the_layer_over_micro_batches():
    """The density of the step decides, not that of each micro-batch."""
    router = create(coefficient=1.0, num_experts=2, top_k=1, dim=2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    layer = MoELayer(router, ExpertSpec(2, 3)).double()
    dense, sparse = torch.ones(3, 2).double(), -torch.ones(4, 2).double()
    layer(dense), layer(sparse)
    assert router.coefficient == 1
    finish_step(layer)  # 6 pairs of 7 tokens: below 1 a token, though the first micro-batch has 2
    assert router.coefficient.item() == pytest.approx(1 / 1.2)
    layer(dense)
    finish_step(layer)
    assert router.coefficient.item() == pytest.approx(1.0)


def test_training_comes_to_k_experts_a_token():
    """A task that pays c for every unit of weight: at rest c = coefficient * E n_e / (k T) for every expert, so all are
    equally busy, and k experts a token mean coefficient = c."""
    pay = 0.1
    torch.manual_seed(0)
    router = create_router(
        "remoe", dim=16, num_experts=8, top_k=2, coefficient=1e-2, multiplier=1.02, init_std=0.1
    )  # slower steps than the released ones: a batch of 256 tokens is a small sample
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    experts_a_token = []
    for step in range(400):
        x = torch.randn(256, 16, generator=torch.Generator().manual_seed(step))
        x[:, 0] = 1  # a constant to learn thresholds by
        routing = router(x)
        optimizer.zero_grad()
        (routing.loss - pay * routing.weight.sum() / 256).backward()
        optimizer.step()
        with torch.no_grad():
            router.update(routing.stats)
        experts_a_token.append(routing.load_E().sum().item() / 256)
    assert 3 < experts_a_token[0] < 5, "half of all experts"
    assert sum(experts_a_token[-100:]) / 100 == pytest.approx(2, abs=0.2)
    assert router.coefficient.item() == pytest.approx(pay, rel=0.3)
    assert (routing.load_E() / routing.load_E().sum()).max() < 0.2, "an eighth each at balance"


def test_the_coefficient_never_dies():
    """A step to 0 or infinity would be the last: no factor leads back."""
    router = create(dtype=torch.float32)
    few, many = ({"load": torch.full((E,), n), "tokens": torch.tensor(9.0)} for n in (0.0, 9.0))
    with torch.no_grad():
        for _ in range(700):
            router.update(few)
        assert 0 < router.coefficient < 1e-37
        for _ in range(1100):
            router.update(many)
        assert 1e37 < router.coefficient < torch.inf


def test_padding_is_not_counted():
    router, x = create(coefficient=0.1), tokens()
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, ::3] = False
    padded = x.clone()
    padded[::3] = torch.nan
    routing = router(padded, TokenContext(batch_size=1, length=T, padding_mask=mask))
    alone = router(x[mask[0]])
    torch.testing.assert_close(routing.losses, alone.losses, rtol=1e-12, atol=0)
    assert torch.equal(routing.stats["load"], alone.stats["load"]) and routing.stats["tokens"] == mask.sum()
    empty = router(padded, TokenContext(batch_size=1, length=T, padding_mask=torch.zeros(1, T, dtype=torch.bool)))
    assert empty.loss == 0 and empty.load_E().sum() == 0 and empty.stats["tokens"] == 0


def test_the_coefficient_is_state_in_float32():
    router = create(coefficient=1e-8, dtype=torch.bfloat16)
    assert router.coefficient.dtype == torch.float32 and "coefficient" in router.state_dict()
    stats = {"load": torch.full((E,), 9.0), "tokens": torch.tensor(9.0)}
    with torch.no_grad():
        for _ in range(10):
            router.update(stats)
    assert math.log(router.coefficient.item() / 1e-8, 1.2) == pytest.approx(10, abs=1e-3)
    again = create()
    again.load_state_dict(router.state_dict())
    assert again.coefficient == router.coefficient


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "top_k=0 with 5 experts: choose above 0, at most 5"),
        ({"top_k": 5.5}, "top_k=5.5 with 5 experts"),
        ({"coefficient": 0.0}, "coefficient=0.0: choose above 0"),
        ({"multiplier": 0.9}, "multiplier=0.9: choose at least 1"),
    ],
    ids=repr,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
