"""Soft slots: the whole layer against a loop over samples, slots and tokens, and what the two softmaxes promise."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import TokenContext, create_router

D, E, H = 6, 3, 5
LENGTHS = (5, 3, 0)


def create(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    router = create_router("soft_moe", **{"dim": D, "num_experts": E, "slots": 2} | options).to(dtype)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def tokens(batch_size=2, length=5, seed=1, dtype=torch.float64):
    return torch.randn(batch_size, length, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_of(router):
    layer = MoELayer(router, ExpertSpec(D, H, activation="gelu", bias=True), backend="reference").double()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(0, 0.7)
    return layer


def expert(layer, e, row):
    bank = layer.experts
    return F.linear(F.gelu(F.linear(row, bank.w_in[e], bank.b_in[e])), bank.w_out[e], bank.b_out[e])


def by_hand(layer, x_BLD, lengths):
    """One sample, one slot and one token after the other."""
    router, y = layer.router, []
    num_slots = len(router.mu)
    for x_LD, length in zip(x_BLD, lengths, strict=True):
        logits = []
        for x in x_LD[:length]:
            row = []
            for mu in router.mu:
                if router.normalise:
                    x_unit, mu_unit = (v / (v.square().sum() + 1e-6).sqrt() for v in (x, mu))
                    row.append(router.scale * (x_unit * mu_unit).sum())
                else:
                    row.append((x * mu).sum())
            logits.append(torch.stack(row))
        y_LD = [torch.zeros_like(x) for x in x_LD]
        for s in range(num_slots if length else 0):
            over_tokens = torch.stack([row[s] for row in logits]).exp()
            slot = sum(share * x for share, x in zip(over_tokens / over_tokens.sum(), x_LD, strict=False))
            out = expert(layer, s // router.slots, slot)
            for t in range(length):
                y_LD[t] = y_LD[t] + logits[t][s].exp() / logits[t].exp().sum() * out
        y.append(torch.stack(y_LD))
    return torch.stack(y)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_layer_equals_the_loop(normalise, slots):
    layer = layer_of(create(normalise=normalise, slots=slots))
    x = tokens(len(LENGTHS))
    mask = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]
    context = TokenContext.for_tokens(x, padding_mask=mask)

    def run(compute):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        return y, {"x": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()}

    expected, expected_grads = run(lambda x: by_hand(layer, x, LENGTHS))
    y, grads = run(lambda x: layer(x, context)[0])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@given(seed=st.integers(0, 10**6), slots=st.integers(1, 4), batch_size=st.integers(1, 3), length=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_both_weights_are_averages_and_follow_their_tokens(seed, slots, batch_size, length):
    router, x = create(seed, slots=slots), tokens(batch_size, length, seed)
    context = TokenContext.for_tokens(x)
    routing = router(x.flatten(0, 1), context)
    assert routing.dispatch.shape == routing.combine.shape == (batch_size, length, E * slots)
    torch.testing.assert_close(routing.dispatch.sum(1), torch.ones(batch_size, E * slots).double())
    torch.testing.assert_close(routing.combine.sum(2), torch.ones(batch_size, length).double())
    torch.testing.assert_close(routing.scores.sum(1), torch.ones(batch_size * length).double())
    torch.testing.assert_close(routing.logits.softmax(1), routing.scores)
    summed = routing.combine.view(batch_size * length, E, slots).sum(2)
    torch.testing.assert_close(routing.scores, summed)
    assert routing.load_E().tolist() == [batch_size * slots] * E
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    again = router(x[:, order].flatten(0, 1), context)
    torch.testing.assert_close(again.dispatch, routing.dispatch[:, order])
    torch.testing.assert_close(again.combine, routing.combine[:, order])


def test_without_scale_every_slot_is_the_mean_token():
    router = create()
    with torch.no_grad():
        router.scale.zero_()
    layer, x = layer_of(router), tokens()
    y, _ = layer(x)
    for sample, y_LD in zip(x, y, strict=True):
        expected = sum(expert(layer, e, sample.mean(0)) for e in range(E)) / E
        torch.testing.assert_close(y_LD, expected.expand_as(y_LD))


def test_a_large_scale_makes_a_choice_of_it():
    """Each slot takes its nearest token, each token listens to its nearest slot."""
    router, x = create(), tokens()
    with torch.no_grad():
        router.scale.fill_(1e6)
    routing = router(x.flatten(0, 1), TokenContext.for_tokens(x))
    cosine = F.normalize(x, dim=-1) @ F.normalize(router.mu, dim=-1).T
    assert torch.equal(routing.dispatch.argmax(1), cosine.argmax(1))
    assert torch.equal(routing.combine.argmax(2), cosine.argmax(2))
    assert (routing.dispatch.amax(1) > 0.999).all() and (routing.combine.amax(2) > 0.999).all()


def test_a_sample_of_one_token_is_a_dense_mixture():
    layer, x = layer_of(create()), tokens(3, 1)
    y, routing = layer(x)
    for b in range(3):
        expected = sum(routing.scores[b, e] * expert(layer, e, x[b, 0]) for e in range(E))
        torch.testing.assert_close(y[b, 0], expected)


def test_the_length_of_tokens_is_not_seen_where_it_is_normalised():
    x = tokens(dtype=torch.float64) + 3
    context = TokenContext.for_tokens(x)
    for normalise in (True, False):
        router = create(normalise=normalise)
        a, b = router(x.flatten(0, 1), context).dispatch, router(5 * x.flatten(0, 1), context).dispatch
        assert torch.allclose(a, b, atol=1e-6) == normalise


def test_a_very_short_token_counts_less():
    """Of length 1e-3, whose square is the 1e-6 of the norm: every cosine times sqrt(1/2)."""
    router = create(slots=1)
    x = F.normalize(tokens(1), dim=-1)
    long, short = (router(f * x.flatten(0, 1), TokenContext.for_tokens(x)).logits for f in (1e6, 1e-3))
    torch.testing.assert_close(short, long * 0.5**0.5)


@pytest.mark.parametrize("normalise", [True, False])
def test_padding_has_no_part(normalise):
    layer, x = layer_of(create(normalise=normalise)), tokens(3)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
    dirty = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y, routing = layer(dirty, TokenContext.for_tokens(x, padding_mask=mask))
    assert (routing.dispatch[~mask] == 0).all() and (routing.combine[~mask] == 0).all() and (y[~mask] == 0).all()
    alone = x[:1, [0, 2, 3]]
    expected, without = layer(alone, TokenContext.for_tokens(alone))
    torch.testing.assert_close(y[:1, [0, 2, 3]], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routing.dispatch[:1, [0, 2, 3]], without.dispatch, rtol=1e-12, atol=1e-12)
    assert routing.load_E().tolist() == [4] * E, "the sample without tokens loads nobody"
    with torch.autograd.set_detect_anomaly(True):  # also in between
        y.sum().backward()
    assert (dirty.grad[~mask] == 0).all() and dirty.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("shape", [(2, 4), (2, 0), (0, 3)], ids=["all padded", "no length", "no sample"])
def test_a_batch_without_a_real_token(shape):
    layer = layer_of(create())
    x = torch.zeros(*shape, D, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x, TokenContext.for_tokens(x, padding_mask=torch.zeros(shape, dtype=torch.bool)))
    assert (y == 0).all() and routing.load_E().tolist() == [0] * E and routing.loss == 0
    y.sum().backward()
    assert (x.grad == 0).all() and all(p.grad is None or (p.grad == 0).all() for p in layer.parameters())


def test_zero_tokens_have_a_gradient():
    router, x = create(), torch.zeros(2, 5, D, dtype=torch.float64, requires_grad=True)
    routing = router(x.flatten(0, 1), TokenContext.for_tokens(x))
    (routing.dispatch.square().sum() + routing.combine.square().sum()).backward()
    assert x.grad.isfinite().all() and router.mu.grad.isfinite().all()


def test_it_fails_prefix_invariance_and_is_refused_by_a_causal_model():
    router, x = create(), tokens()
    assert not router.causal and router.batch_independent
    later = x.clone()
    later[:, 3:] += 1
    before = router(x.flatten(0, 1), TokenContext.for_tokens(x)).dispatch[:, :3]
    assert not torch.allclose(router(later.flatten(0, 1), TokenContext.for_tokens(x)).dispatch[:, :3], before)
    with pytest.raises(ValueError, match='router "soft_moe" is not causal in training'):
        router(x.flatten(0, 1), TokenContext.for_tokens(x, causal=True))
    allowed = MoELayer(router, ExpertSpec(D, H), allow_noncausal=True).double()
    allowed(x, TokenContext.for_tokens(x, causal=True))


def test_dtypes():
    x = tokens().bfloat16()
    context = TokenContext.for_tokens(x)
    router = create(dtype=torch.bfloat16)
    routing = router(x.flatten(0, 1), context)
    assert routing.dispatch.dtype == routing.combine.dtype == routing.logits.dtype == torch.float32
    expected = router.float()(x.float().flatten(0, 1), context)
    assert torch.equal(routing.dispatch, expected.dispatch)


def test_bad_options():
    with pytest.raises(ValueError, match="slots=0: choose at least 1 an expert"):
        create(slots=0)
    with pytest.raises(ValueError, match='router "soft_moe" has no option "slot": did you mean slots'):
        create(slot=1)
