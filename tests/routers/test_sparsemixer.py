"""SparseMixer-v2 against transformers' PhiMoE (with the same random numbers), against loops, and its statistics."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import TokenContext, create_router

D, E, B, L = 8, 6, 3, 10
T = B * L


def create(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    options = {"dim": D, "num_experts": E, "jitter": 0.1, "init_std": 1.0} | options
    return create_router("sparsemixer", **options).to(dtype)


def on_logits(jitter, experts=E, dtype=torch.float64):
    """A router whose logits are its input."""
    router = create(dim=experts, num_experts=experts, jitter=jitter, dtype=dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router


def context(step=0, batch_size=B, length=L):
    return TokenContext(batch_size=batch_size, length=length, seed=3, step=step, sample_id=torch.arange(batch_size))


def uniforms(context, experts, dtype):
    """The router's four draws, in its order: Gumbel and Heun of the first expert, of the second."""
    shapes = [experts, 1, experts, 1]
    return [
        context.noise(context.num_tokens, n, distribution="uniform", stream=i).to(dtype) for i, n in enumerate(shapes)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("jitter", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equals_phimoe_of_transformers(monkeypatch, dtype, jitter, training):
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    different_from_best = 0
    for step in range(8):
        at = context(step)
        draws = uniforms(at, E, dtype)
        # it draws an exponential and a uniform number for each expert; the second uniform one is drawn twice
        exponentials, rands = iter([-draws[0].log(), -draws[2].log()]), iter([draws[1], draws[3]])
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, it=exponentials: self.copy_(next(it)))
        monkeypatch.setattr(torch, "rand_like", lambda like, it=rands: next(it))
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)
        generator = torch.Generator().manual_seed(step)
        logits = 3 * torch.randn(T, E, generator=generator, dtype=dtype) + step - 4
        upstream = torch.randn(T, 2, generator=generator, dtype=dtype)
        theirs = logits.clone().requires_grad_()
        weights, ids = phimoe.sparsemixer(theirs, jitter_eps=jitter, training=training)
        weights.backward(upstream)
        monkeypatch.undo()

        x = logits.clone().requires_grad_()
        routing = on_logits(jitter, dtype=dtype).train(training)(x, at)
        routing.weight.backward(upstream)
        assert torch.equal(routing.index, ids)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
        if training:  # theirs adds 0.3333 and 0.6667 in float32
            torch.testing.assert_close(routing.weight, weights, rtol=2e-7, atol=1e-7)
        else:
            torch.testing.assert_close(routing.weight, weights, **tolerance)
        torch.testing.assert_close(x.grad, theirs.grad, **tolerance)
        different_from_best += int((ids[:, 0] != logits.argmax(1)).sum())
    assert (different_from_best > 0) == training, "draws that are not the best are compared too"


def test_the_router_equals_phimoes_in_evaluation():
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    from transformers import PhimoeConfig

    config = PhimoeConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.1)
    theirs, router = phimoe.PhimoeTopKRouter(config).eval(), create(dtype=torch.float32).eval()
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
    x = torch.randn(T, D)
    logits, weights, ids = theirs(x)
    routing = router(x)
    assert torch.equal(routing.index, ids)
    torch.testing.assert_close(routing.weight, weights)
    torch.testing.assert_close(routing.logits, logits)


def by_hand(logits, jitter, draws=None):
    """One token's two experts and weights, in Python; ``draws`` are its four uniform draws in training."""
    chosen, weights = [], []
    for turn in range(2):
        open_ = [e for e in range(E) if e not in chosen]
        known = {e: logits[e].item() for e in open_}
        top = max(known.values())
        candidates = [e for e in open_ if (top - known[e]) / max(abs(known[e]), top) <= 2 * jitter]
        peak = max(known[e] for e in candidates)
        total = sum((logits[e] - peak).exp() for e in candidates)
        p = {e: (logits[e] - peak).exp() / total for e in candidates}
        best = max(candidates, key=lambda e: known[e])
        pick = best
        if draws is not None:
            noise, heun = draws[2 * turn], draws[2 * turn + 1]
            pick = max(candidates, key=lambda e: known[e] - math.log(-math.log(noise[e].item())))
        weight = p[pick]
        if draws is not None and pick != best and heun.item() <= 0.75:
            weight = weight - (weight * (1 - 0.3333)).detach()
        chosen.append(pick)
        weights.append(weight)
    return chosen, torch.stack(weights)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_against_one_token_after_the_other(training):
    router, at = create(jitter=0.4).train(training), context()
    x = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing = router(x, at)
    draws = uniforms(at, E, torch.float64)
    rows = [by_hand(router.weight @ x[t], 0.4, [d[t] for d in draws] if training else None) for t in range(T)]
    assert routing.index.tolist() == [chosen for chosen, _ in rows]
    expected = torch.stack([weights for _, weights in rows])
    torch.testing.assert_close(routing.weight, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(T, 2, dtype=torch.float64)
    grads = torch.autograd.grad(routing.weight, [x, router.weight], upstream)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, [x, router.weight], upstream), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@given(seed=st.integers(0, 10**6), jitter=st.sampled_from([0.01, 0.2, 1.0]), training=st.booleans())
@settings(max_examples=30, deadline=None)
def test_two_different_candidates(seed, jitter, training):
    logits = 2 * torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    routing = on_logits(jitter).train(training)(logits, context(seed))
    first, second = routing.index.T
    assert (first != second).all() and (routing.weight > 0).all() and (routing.weight <= 1).all()
    value, top = logits.gather(1, routing.index), logits.topk(2)
    assert ((top.values[:, 0] - value[:, 0]) / torch.maximum(value[:, 0].abs(), top.values[:, 0]) <= 2 * jitter).all()
    if not training:
        assert torch.equal(routing.index, top.indices)
        lone = routing.weight[:, 0] == 1
        assert lone.any() or jitter > 0.01, "an expert without a rival weighs 1"


def test_with_all_for_candidates_it_is_the_softmax_without_those_before():
    """jitter = 1 keeps every expert: for max l > 0 no distance is more than twice the larger of |l_e| and max l."""
    logits = torch.randn(T, E, dtype=torch.float64)
    logits[:, 0] = 2.0
    routing = on_logits(1.0).eval()(logits)
    expected, index = logits.topk(2)
    first = logits.softmax(1).gather(1, index[:, :1])
    second = logits.scatter(1, index[:, :1], -torch.inf).softmax(1).gather(1, index[:, 1:])
    torch.testing.assert_close(routing.weight, torch.cat([first, second], 1))


def test_draws_follow_p_and_three_in_four_others_weigh_a_third():
    count = 40_000
    logits = torch.tensor([2.0, 1.5, 1.0, -3.0], dtype=torch.float64)
    at = context(batch_size=4, length=count // 4)
    routing = on_logits(0.3, experts=4)(logits.expand(count, 4), at)
    p = torch.tensor([2.0, 1.5, 1.0]).double().softmax(0)
    drawn = routing.index[:, 0]
    share = torch.bincount(drawn, minlength=4) / count
    assert share[3] == 0, "not a candidate"
    assert ((share[:3] - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all()
    for e in range(3):
        ratio = routing.weight[drawn == e, 0] / p[e]
        third = (ratio - 0.3333).abs() < 1e-9
        assert (third | ((ratio - 1).abs() < 1e-9)).all()
        if e == 0:
            assert not third.any(), "the most probable expert is never scaled"
        else:
            error = 5 * math.sqrt(0.75 * 0.25 / len(ratio))
            assert third.double().mean().item() == pytest.approx(0.75, abs=error)


def test_evaluation_needs_no_noise_and_training_does():
    router, x = create(), torch.randn(T, D).double()
    bare = TokenContext(batch_size=B, length=L)
    with pytest.raises(ValueError, match='router "sparsemixer" needs context.noise'):
        router(x, bare)
    router.eval()
    assert router.requires == () and torch.equal(router(x, bare).index, router(x, context()).index)
    router.train()
    at = [router(x, context(step)) for step in (0, 0, 1)]
    assert torch.equal(at[0].index, at[1].index) and not torch.equal(at[0].index, at[2].index)


def test_equal_logits_and_a_lone_candidate():
    x = torch.zeros(T, E, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        routing = on_logits(0.01).train(training)(x, context())
        assert (routing.index[:, 0] != routing.index[:, 1]).all()
        routing.weight.sum().backward()
        assert routing.weight.isfinite().all() and x.grad.isfinite().all()
    far = 100.0 * torch.arange(E, dtype=torch.float64).expand(T, E).contiguous().requires_grad_()
    routing = on_logits(0.01)(far, context())
    assert (routing.weight == 1).all() and routing.index.tolist() == [[E - 1, E - 2]] * T
    routing.weight.sum().backward()


def test_the_balance_loss_counts_the_drawn():
    router, at = create(balance_weight=0.5), context()
    x = torch.randn(T, D).double()
    routing = router(x, at)
    expected = 0.5 * E * (routing.load_E() / (2 * T) * routing.logits.softmax(1).mean(0)).sum()
    torch.testing.assert_close(routing.losses["balance"], expected)


def test_in_the_layer_the_experts_see_the_scaled_weight():
    """The value is a third, the gradient to the logits that of the whole: the estimator is in the weight alone."""
    router = on_logits(0.3, experts=4)
    layer = MoELayer(router, ExpertSpec(4, 5), backend="reference").double()
    x = torch.tensor([2.0, 1.5, 1.0, -3.0], dtype=torch.float64).expand(T, 4).clone()
    y, routing = layer(x, context())
    scaled = (routing.weight[:, 0] < 0.9 * routing.scores.gather(1, routing.index[:, :1])[:, 0]).nonzero().flatten()
    assert len(scaled), "some draw is scaled"
    t = scaled[0].item()
    rows = []
    for e in range(4):
        bank = layer.experts
        gate, up = (bank.w_in[e] @ x[t]).chunk(2)
        rows.append(bank.w_out[e] @ (F.silu(gate) * up))
    expected = sum(w * rows[e] for w, e in zip(routing.weight[t], routing.index[t].tolist(), strict=True))
    torch.testing.assert_close(y[t], expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 1}, "top_k=1 with 6 experts: SparseMixer chooses 2 of at least 2"),
        ({"num_experts": 1}, "top_k=2 with 1 experts"),
        ({"jitter": -0.1}, "jitter=-0.1: choose a finite number of at least 0"),
    ],
    ids=repr,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
