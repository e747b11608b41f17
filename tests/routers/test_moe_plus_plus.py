"""MoE++: against one token after the other, experts included, and what its three free kinds do."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import TokenContext, create_router

D, H, N, T = 12, 10, 4, 24
CONSTANT, COPY, ZERO = 2, 1, 1
M = N + CONSTANT + COPY + ZERO  # what can be chosen; one id more collects the constants' shares


def create(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    given = {"dim": D, "num_experts": N, "init_std": 0.5, "balance_weight": 0.0} | options
    return create_router("moe_plus_plus", **given).to(dtype), torch.randn(T, D, dtype=dtype)


def in_layer(router):
    layer = MoELayer(router, ExpertSpec(D, H, activation="gelu", bias=False)).to(torch.float64)
    with torch.no_grad():
        for parameter in (layer.experts.w1, layer.experts.w2, layer.constants):
            parameter.normal_(std=0.5)
    return layer


def by_hand(layer, x_D, previous_M=None):
    """One token: ids, weights before constants are split, and y."""
    router = layer.router
    logits = router.weight @ (x_D if router.hidden_weight is None else torch.tanh(router.hidden_weight @ x_D))
    if previous_M is not None:
        logits = logits + router.residual_weight @ previous_M
    p = logits.softmax(0)
    chosen = sorted(range(M), key=lambda e: -p[e].item())[: router.top_k]
    total = sum(p[e] for e in chosen if e < M - ZERO)
    y, weights = 0, []
    for e in chosen:
        w = p[e] / total if e < M - ZERO else torch.zeros((), dtype=x_D.dtype)
        weights.append(w)
        if e < N:
            y = y + w * (layer.experts.w2[e] @ F.gelu(layer.experts.w1[e] @ x_D))
        elif e < N + CONSTANT:
            a = (router.share_weight[e - N] @ x_D).softmax(0)
            y = y + w * (a[0] * x_D + a[1] * layer.constants[e - N])
        elif e < N + CONSTANT + COPY:
            y = y + w * x_D
    return chosen, weights, y, p


@pytest.mark.parametrize(
    "options", [{}, {"gate": "mlp"}, {"residual": True}, {"top_k": 4}, {"top_k": M}, {"top_k": 1}], ids=repr
)
def test_against_one_token_after_the_other(options):
    router, x = create(**options)
    layer, x = in_layer(router), x.requires_grad_()
    previous = torch.randn(T, M, dtype=torch.float64).requires_grad_() if router.residual else None
    # as the layer before returns them: -inf where nothing is chosen
    handed = None if previous is None else F.pad(previous, (0, 1), value=-torch.inf)
    y, routing = layer(x, TokenContext.for_tokens(x, previous_logits=handed))
    expected = []
    for t in range(T):
        chosen, _, y_D, _ = by_hand(layer, x[t], None if previous is None else previous[t])
        assert routing.index[t, : router.top_k].tolist() == chosen
        assert routing.selected[t].nonzero()[:, 0].tolist() == sorted(chosen)
        expected.append(y_D + torch.zeros(D, dtype=x.dtype))
    expected = torch.stack(expected)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    assert router.top_k == 1 or set(routing.index.unique().tolist()) >= set(range(M + 1)), "some id was never chosen"

    factor = torch.randn(T, D, dtype=torch.float64)
    inputs = [x, *layer.parameters()] + ([] if previous is None else [previous])
    actual = torch.autograd.grad((y * factor).sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad((expected * factor).sum(), inputs, allow_unused=True)
    for ours, theirs in zip(actual, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
        else:
            assert ours is None or (ours == 0).all()


@given(st.integers(1, M), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_the_weights_of_a_token_sum_to_one(top_k, seed):
    """The shares of constants included; to 0 where only the zero expert is chosen."""
    router, x = create(top_k=top_k, seed=seed)
    routing = router(x)
    only_zero = (routing.index[:, :top_k] == M - 1).all(1)
    torch.testing.assert_close(routing.weight.sum(1), (~only_zero).double(), rtol=1e-12, atol=1e-12)
    assert (routing.weight >= 0).all()
    assert (routing.weight[routing.index == M - 1] == 0).all()
    constant = (routing.index >= N) & (routing.index < N + CONSTANT)
    assert torch.equal(routing.index[:, -1] == M, constant.any(1))
    assert routing.load_E().sum() == T * top_k and routing.load_E()[M] == 0


def test_a_zero_expert_leaves_all_to_the_other():
    router, x = create()
    with torch.no_grad():
        router.weight[M - 1] = 0
        router.weight[M - 1, 0] = 100.0
        x[:, 0] = 1.0  # so far ahead that the other's probability is 0 in float32
    router = router.float()
    x = x.float().requires_grad_()
    routing = router(x)
    assert (routing.index[:, 0] == M - 1).all() and (routing.weight[:, 0] == 0).all()
    torch.testing.assert_close(routing.weight.sum(1), torch.ones(T))
    routing.weight.square().sum().backward()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def test_kinds_and_ids():
    router, _ = create(constant_experts=3, copy_experts=2, zero_experts=2)
    assert router.expert_kinds == ("routed",) * N + ("constant",) * 3 + ("copy",) * 2 + ("zero",) * 2 + ("copy",)
    without, x = create(constant_experts=0)
    assert without.expert_kinds == ("routed",) * N + ("copy", "zero")
    routing = without(x)
    assert routing.selected is None and routing.index.shape == (T, 2) and routing.logits.isfinite().all()


def test_the_residual_adds_what_the_layer_before_thought():
    router, x = create(residual=True)
    plain, _ = create()
    with torch.no_grad():
        plain.weight.copy_(router.weight)
        plain.share_weight.copy_(router.share_weight)
        router.residual_weight.zero_()
    before = plain(x)
    context = TokenContext.for_tokens(x, previous_logits=before.logits)
    assert torch.equal(router(x, context).index, before.index)
    with torch.no_grad():
        router.residual_weight.copy_(torch.eye(M))
    torch.testing.assert_close(router(x, context).logits[:, :M], 2 * before.logits[:, :M])
    assert (before.logits[:, M] == -torch.inf).all()
    narrow = TokenContext.for_tokens(x, previous_logits=torch.zeros(T, M - 1))
    with pytest.raises(ValueError, match="previous_logits has 7 columns: expected 9"):
        router(x, narrow)
    with pytest.raises(ValueError, match="needs context.previous_logits"):
        router(x)


def test_previous_logits_at_padding_may_hold_anything():
    router, x = create(residual=True)
    mask = torch.arange(T)[None] < 9
    previous = torch.randn(T, M + 1, dtype=torch.float64)
    expected = router(x[:9], TokenContext.for_tokens(x[:9], previous_logits=previous[:9]))
    previous[9:] = torch.nan
    routing = router(x, TokenContext.for_tokens(x, padding_mask=mask, previous_logits=previous))
    torch.testing.assert_close(routing.weight[:9], expected.weight, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(routing.weight.square().sum(), router.residual_weight)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("tau", [0.25, 0.75, 1.0])
def test_the_balance_loss_is_that_of_the_paper(tau):
    router, x = create(balance_weight=0.01, tau=tau, top_k=3)
    layer, x = in_layer(router), x.requires_grad_()
    f, P = torch.zeros(M, dtype=torch.float64), 0
    for t in range(T):
        chosen, _, _, p = by_hand(layer, x[t])
        f[chosen] += 1 / T
        P = P + p / T
    eta = torch.tensor([1.0] * N + [tau] * (M - N), dtype=torch.float64)
    expected, loss = 0.01 * (eta * f * P).sum(), router(x).losses["balance"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, [x, router.weight]), torch.autograd.grad(expected, [x, router.weight]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    with torch.no_grad():
        router.weight.zero_()
    # uniform probabilities: 1 / M of every assignment counts eta of its expert
    load = router(x).requested_E()[:M]
    assert router(x).loss.item() == pytest.approx(0.01 * (eta * load).sum().item() / (T * M), rel=1e-9)


@pytest.mark.parametrize("tau", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("policy", ["position", "probability", "choice"])
def test_free_experts_have_more_room(tau, policy):
    router, x = create(capacity_factor=0.5, tau=tau, drop_policy=policy, balance_weight=0.1)
    free, _ = create(tau=tau, balance_weight=0.1)
    routing, wanted = router(x), free(x)
    room = 0.5 * 2 * T / (tau * N + M - N)
    capacity = torch.tensor([math.ceil(tau * room)] * N + [math.ceil(room)] * (M - N) + [0])
    assert torch.equal(routing.load_E(), torch.minimum(wanted.load_E(), capacity))
    assert torch.equal(routing.requested_E(), wanted.load_E())
    assert torch.equal(routing.losses["balance"], wanted.losses["balance"]), "the loss counts what was asked for"
    kept = routing.index[:, :2] >= 0
    assert torch.equal(routing.weight[:, :2][kept], wanted.weight[:, :2][kept]), "what is dropped goes to nobody else"
    constant = kept & (routing.index[:, :2] >= N) & (routing.index[:, :2] < N + CONSTANT)
    assert torch.equal(routing.index[:, 2] == M, constant.any(1)), "a dropped constant has no share of the token either"
    assert (routing.weight[:, 2][~constant.any(1)] == 0).all()


def test_what_is_causal():
    assert create()[0].causal and create()[0].batch_independent
    dropping = create(capacity_factor=1.1)[0]
    assert dropping.causal and not dropping.batch_independent
    assert not create(capacity_factor=1.1, drop_policy="probability")[0].causal


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 9}, "top_k=9 with 8 experts"),
        ({"constant_experts": -1}, "constant_experts=-1: choose at least 0"),
        ({"zero_experts": -2}, "zero_experts=-2"),
        ({"gate": "deep"}, 'gate="deep": choose "linear" or "mlp"'),
        ({"tau": 0.0}, "tau=0.0: choose above 0"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0"),
        ({"drop_policy": "last"}, 'drop_policy="last"'),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
