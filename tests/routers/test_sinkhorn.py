"""Sinkhorn: the plan against a loop and against its marginals, and the decisions that come of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.routers import TokenContext, create_router
from gatewright.routers.sinkhorn import sinkhorn

D, E, T = 6, 4, 24


def create(**options):
    torch.manual_seed(0)
    router = create_router("sinkhorn", **{"dim": D, "num_experts": E} | options).double()
    torch.nn.init.normal_(router.weight)
    return router, torch.randn(T, D, dtype=torch.float64)


def draw(tokens, experts, scale, seed, dtype=torch.float64):
    return scale * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_definition(logits_TE, tolerance=1e-4):
    """Rows and columns scaled by turns, as Megatron-Core has it, number by number."""
    tokens, experts = logits_TE.shape
    cost = [[float(torch.exp(value)) for value in row] for row in logits_TE]
    column, change = [1.0] * experts, 1.0
    while change > tolerance:
        row = [1 / tokens / (sum(c * k for c, k in zip(column, line, strict=True)) + 1e-8) for line in cost]
        sums = [sum(row[t] * cost[t][e] for t in range(tokens)) for e in range(experts)]
        new = [1 / experts / (s + 1e-8) for s in sums]
        change = sum(abs(a - b) for a, b in zip(new, column, strict=True)) / experts
        column = new
    return torch.tensor([[row[t] * cost[t][e] * column[e] for e in range(experts)] for t in range(tokens)]).double()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_plan_equals_its_definition(scale):
    for seed in range(3):
        logits = draw(30, 5, scale, seed)
        # the definition is in float32 from its tensor on, and adds 1e-8 to the sums
        torch.testing.assert_close(sinkhorn(logits, max_rounds=200), by_definition(logits), rtol=1e-5, atol=1e-7)


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_marginals_are_uniform(tokens, experts, scale, seed):
    plan = sinkhorn(draw(tokens, experts, scale, seed), max_rounds=200)
    torch.testing.assert_close(plan.sum(0) * experts, torch.ones(experts).double(), rtol=1e-12, atol=0)
    # c changes by 1e-4 in the mean in the last round, and rows are off by what the c of their experts changed
    assert (plan.sum(1) * tokens - 1).abs().max() < 1e-2
    assert (plan >= 0).all()


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_shifts_of_rows_and_orders_change_nothing(seed):
    logits = draw(20, 5, 2.0, seed)
    plan = sinkhorn(logits)
    shifted = sinkhorn(logits + 1e4 * torch.arange(20.0).double()[:, None])
    torch.testing.assert_close(shifted, plan, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(20, generator=generator), torch.randperm(5, generator=generator)
    torch.testing.assert_close(sinkhorn(logits[rows][:, columns]), plan[rows][:, columns], rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_no_logits_overflow(scale, dtype):
    for seed in range(5):
        assert sinkhorn(draw(33, 7, scale, seed, dtype)).isfinite().all()


def test_padding_has_no_share():
    logits, real = draw(20, 5, 2.0, 0), torch.arange(20) % 3 != 1
    plan = sinkhorn(logits, real)
    assert (plan[~real] == 0).all()
    torch.testing.assert_close(plan[real], sinkhorn(logits[real]), rtol=1e-12, atol=0)
    assert (sinkhorn(logits, torch.zeros(20, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_training_chooses_by_the_plan_and_evaluation_by_the_logits(top_k):
    router, x = create(top_k=top_k)
    context = TokenContext(batch_size=2, length=T // 2)
    logits = (x @ router.weight.T).detach()
    gate = logits.sigmoid() if top_k == 1 else logits.softmax(1)
    for training, rank in ((True, by_definition(logits)), (False, logits)):
        routing = router.train(training)(x, context)
        expected = rank.topk(top_k, dim=1).indices
        assert torch.equal(routing.index.sort(1).values, expected.sort(1).values)
        torch.testing.assert_close(routing.weight, gate.gather(1, routing.index), rtol=1e-12, atol=0)
        assert routing.losses == {} and router.causal == router.batch_independent == (not training)


def test_the_gradient_is_that_of_the_weights_alone():
    router, x = create(top_k=2)
    x.requires_grad_()
    routing = router(x, TokenContext(batch_size=1, length=T))
    routing.weight.square().sum().backward()
    gradients = x.grad, router.weight.grad
    x.grad = router.weight.grad = None
    (x @ router.weight.T).softmax(1).gather(1, routing.index).square().sum().backward()
    for ours, theirs in zip(gradients, (x.grad, router.weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_tokens_that_all_prefer_one_expert_are_spread():
    router, x = create()
    x = 0.3 * x + 4 * router.weight[1].detach()
    context = TokenContext(batch_size=1, length=T)
    assert router.eval()(x, context).load_E()[1] == T
    spread = router.train()(x, context).load_E()
    assert spread.max() <= T // 2 and (spread > 0).all()


def test_a_causal_model_trains_only_when_told_to():
    router, x = create()
    causal = TokenContext(batch_size=1, length=T, causal=True)
    with pytest.raises(ValueError, match='router "sinkhorn" is not causal in training .* allow_noncausal=True'):
        router(x, causal)
    router.eval()(x, causal)


@pytest.mark.parametrize(
    "options, message",
    [({"top_k": 5}, "top_k=5 with 4 experts: choose 1 to 4"), ({"max_rounds": 0}, "max_rounds=0: choose at least 1")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
