"""X-MoE's cosine router: against one token after the other, and what angles do not see."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.routers import TokenContext, create_router

D, E, T = 12, 6, 20


def create(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    router = create_router("cosine", **{"dim": D, "num_experts": E, "projection_dim": 5} | options).to(dtype)
    return router, torch.randn(T, D, dtype=dtype)


def by_hand(router, x_D):
    """Logits of one token, each the cosine of one pair."""
    h_P = router.projection.weight @ x_D + router.projection.bias
    scale = torch.exp(torch.minimum(router.log_scale, torch.tensor(math.log(100), dtype=x_D.dtype)))
    cosines = [h_P @ v_P / (h_P.square().sum().sqrt() * v_P.square().sum().sqrt()) for v_P in router.directions]
    return scale * torch.stack(cosines)


@pytest.mark.parametrize(
    "options", [{}, {"renormalise": True, "top_k": 3}, {"temperature": 0.03, "top_k": 1}], ids=repr
)
def test_against_one_token_after_the_other(options):
    router, x = create(balance_weight=0.5, **options)
    K = router.top_k
    x = x.requires_grad_()
    factor = torch.randn(T, E, dtype=torch.float64)

    total, counts, mean = 0, torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    chosen, weights = [], []
    for t in range(T):
        p = by_hand(router, x[t]).softmax(0)
        best = sorted(range(E), key=lambda e: -p[e].item())[:K]
        w = p[best] / p[best].sum() if router.renormalise else p[best]
        total = total + (w * factor[t, best]).sum()
        mean = mean + p / T
        counts[best] += 1
        chosen.append(best)
        weights.append(w)
    total = total + 0.5 * E * (counts / (T * K) * mean).sum()
    expected = torch.autograd.grad(total, [x, *router.parameters()])

    routing = router(x)
    assert routing.index.tolist() == chosen
    torch.testing.assert_close(routing.weight, torch.stack(weights), rtol=1e-12, atol=1e-12)
    loss = (routing.weight * factor.gather(1, routing.index)).sum() + routing.loss
    for actual, wanted in zip(torch.autograd.grad(loss, [x, *router.parameters()]), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


@given(st.lists(st.floats(0.01, 100), min_size=E, max_size=E), st.floats(0.01, 100))
@settings(max_examples=15, deadline=None)
def test_no_length_matters(lengths, length):
    """Neither that of an expert's vector nor, where the projection has no bias, that of a token."""
    router, x = create()
    with torch.no_grad():
        router.projection.bias.zero_()
    before = router(x).logits
    with torch.no_grad():
        router.directions *= torch.tensor(lengths, dtype=torch.float64)[:, None]
    torch.testing.assert_close(router(length * x).logits, before, rtol=1e-9, atol=1e-12)


def test_the_scale_starts_at_two_and_ends_at_a_hundred():
    router, x = create()
    assert router.log_scale.exp().item() == pytest.approx(2)
    logits = router(x).logits
    assert (logits.abs() <= 2).all() and logits.abs().max() > 1
    with torch.no_grad():
        router.log_scale.fill_(math.log(100))
    at_bound = router(x).logits
    with torch.no_grad():
        router.log_scale.fill_(9.0)
    routing = router(x)
    torch.testing.assert_close(routing.logits, at_bound, rtol=1e-12, atol=1e-12)
    routing.logits.square().sum().backward()
    assert router.log_scale.grad == 0, "beyond the bound the scale is not learned"
    assert router.directions.grad.abs().max() > 0


def test_a_token_without_direction_is_finite():
    router, x = create(torch.float32)
    with torch.no_grad():
        router.projection.bias.zero_()
    x = torch.zeros_like(x).requires_grad_()
    routing = router(x)
    routing.weight.square().sum().backward()
    assert torch.equal(routing.scores, torch.full((T, E), 1 / E)) and x.grad.isfinite().all()


def test_padding_has_no_share_in_the_loss():
    router, x = create(balance_weight=1.0)
    mask = torch.arange(T)[None] < 7
    padded = router(x, TokenContext.for_tokens(x, padding_mask=mask))
    torch.testing.assert_close(padded.loss, router(x[:7]).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 7}, "top_k=7 with 6 experts"),
        ({"projection_dim": 0}, "projection_dim=0: choose at least 1"),
        ({"temperature": 0.0}, "temperature=0.0: choose at least 0.01"),
        ({"temperature": 0.009}, "choose at least 0.01"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"init_std": 0.0}, "init_std=0.0: choose above 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
