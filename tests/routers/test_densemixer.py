"""DenseMixer against its definition: output and experts as in top-k, the router's gradient of the dense mixture."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import TokenContext, create_router

D, E, H, T, K = 6, 5, 4, 9, 2
renormalised = pytest.mark.parametrize("renormalise", [False, True], ids=["raw", "renormalised"])


def create(name="densemixer", seed=0, **options):
    torch.manual_seed(seed)
    options = {"dim": D, "num_experts": E, "top_k": K, "init_std": 1.0} | options
    return create_router(name, **options).double()


def pair(**options):
    """The same layer twice, with DenseMixer and with top-k."""
    layers = []
    for name in ("densemixer", "topk"):
        layer = MoELayer(create(name, **options), ExpertSpec(D, H, activation="gelu"), backend="reference").double()
        layers.append(layer)
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def tokens(seed=1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(layer, x, context=None):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, routing = layer(x, context)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    y.backward(upstream)
    return y.detach(), routing, x.grad, upstream


def by_hand(layer, x_TD, renormalise):
    """The released code's mixture, one token and one expert after the other; an expert's output has a gradient only
    where it is chosen, and the output has the value of the chosen alone."""
    bank, y = layer.experts, []
    for x in x_TD:
        p = F.linear(x, layer.router.weight).softmax(0)
        chosen = sorted(range(E), key=lambda e: -p[e].item())[:K]
        total = sum(p[e] for e in chosen)
        sparse = dense = 0
        for e in range(E):
            out = F.linear(F.gelu(F.linear(x, bank.w_in[e])), bank.w_out[e])
            if e not in chosen:
                out = out.detach()
            weight = p[e]
            if renormalise:
                weight = p[e] / (total if e in chosen else total.detach())
            dense = dense + weight * out
            if e in chosen:
                sparse = sparse + weight * out
        y.append(sparse.detach() + dense - dense.detach())
    return torch.stack(y)


@renormalised
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_the_released_mixture_one_token_after_the_other(renormalise, backend):
    layer, _ = pair(renormalise=renormalise)
    layer.backend = backend
    y, _, dx, upstream = backward(layer, tokens())
    actual = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    x = tokens().requires_grad_()
    expected = by_hand(layer, x, renormalise)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, x.grad, rtol=1e-10, atol=1e-12)
    assert set(actual) == {"router.weight", "experts.w1", "experts.w2"}
    for name, grad in actual.items():
        torch.testing.assert_close(grad, layer.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


@renormalised
def test_the_forward_and_the_experts_gradients_are_those_of_topk(renormalise):
    mixer, topk = pair(renormalise=renormalise)
    y, routing, _, _ = backward(mixer, tokens())
    expected, sparse, _, _ = backward(topk, tokens())
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    for name in ("w1", "w2"):
        ours, theirs = getattr(mixer.experts, name).grad, getattr(topk.experts, name).grad
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    assert torch.equal(routing.load_E(), sparse.load_E()) and torch.equal(routing.requested_E(), sparse.load_E())
    assert not torch.allclose(mixer.router.weight.grad, topk.router.weight.grad), "that is what it is for"


def test_the_routers_gradient_is_that_of_the_dense_mixture():
    """d y / d p_e = f_e(x) for all e: the router of K = 2 learns as if K were E."""
    mixer, _ = pair()
    _, _, _, upstream = backward(mixer, tokens())
    actual = mixer.router.weight.grad.clone()
    _, dense = pair(top_k=E)
    dense.load_state_dict(mixer.state_dict())
    x = tokens().requires_grad_()
    dense(x)[0].backward(upstream)
    torch.testing.assert_close(actual, dense.router.weight.grad, rtol=1e-11, atol=1e-12)


def test_nothing_but_the_router_learns_from_who_was_not_chosen():
    """With all tokens at experts 0 and 1, the others' parameters have a gradient of exactly 0."""
    mixer, _ = pair()
    with torch.no_grad():
        mixer.router.weight.zero_()
        mixer.router.weight[:2, 0], mixer.router.weight[2:, 0] = 5.0, -5.0
    x = tokens().abs()
    _, routing, _, _ = backward(mixer, x)
    assert routing.load_E().tolist() == [T, T, 0, 0, 0]
    assert (mixer.experts.w1.grad[2:] == 0).all() and (mixer.experts.w2.grad[2:] == 0).all()
    assert (mixer.experts.w1.grad[:2] != 0).any()
    assert (mixer.router.weight.grad[2:].abs().sum(1) > 0).all(), "but the router hears of them"


@renormalised
def test_evaluation_and_no_gradient_are_plain_topk(renormalise):
    mixer, topk = pair(renormalise=renormalise)
    x = tokens()
    trained = mixer(x)[1]
    assert trained.index.shape == (T, E) and trained.selected.sum() == T * K
    with torch.no_grad():
        assert torch.equal(mixer(x)[1].index, topk(x)[1].index)
        torch.testing.assert_close(mixer(x)[1].weight, topk(x)[1].weight)
    mixer.eval(), topk.eval()
    y, routing, dx, _ = backward(mixer, x)
    expected, sparse, expected_dx, _ = backward(topk, x)
    assert routing.index.shape == (T, K) and torch.equal(routing.index, sparse.index)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(mixer.router.weight.grad, topk.router.weight.grad)
    assert torch.equal(routing.load_E(), trained.load_E())


@renormalised
def test_with_all_experts_chosen_it_is_topk(renormalise):
    mixer, topk = pair(top_k=E, renormalise=renormalise)
    y, _, dx, _ = backward(mixer, tokens())
    expected, _, expected_dx, _ = backward(topk, tokens())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(mixer.router.weight.grad, topk.router.weight.grad)


@given(
    seed=st.integers(0, 10**6), top_k=st.integers(1, E), renormalise=st.booleans(), spread=st.sampled_from([0, 1, 50])
)
@settings(max_examples=25, deadline=None)
def test_who_is_not_chosen_weighs_exactly_nothing(seed, top_k, renormalise, spread):
    router = create(seed=seed, top_k=top_k, renormalise=renormalise)
    with torch.no_grad():
        router.weight *= spread
    routing = router(tokens(seed))
    assert routing.weight.shape == (T, E) and routing.selected.sum(1).tolist() == [top_k] * T
    assert (routing.weight[~routing.selected] == 0).all()
    expected = (
        routing.scores / (routing.scores * routing.selected).sum(1, keepdim=True) if renormalise else routing.scores
    )
    torch.testing.assert_close(routing.weight[routing.selected], expected[routing.selected])
    assert (
        routing.scores.masked_fill(~routing.selected, 2).amin(1)
        >= routing.scores.masked_fill(routing.selected, -1).amax(1)
    ).all()
    (routing.weight * torch.randn(T, E)).sum().backward()
    assert router.weight.grad.isfinite().all()


def test_padding_and_the_balance_loss_count_the_chosen():
    router = create(balance_weight=0.5)
    x = tokens()
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, 4:] = False
    routing = router(x, TokenContext(batch_size=1, length=T, padding_mask=mask))
    alone = router(x[:4])
    assert not routing.selected[4:].any() and (routing.index[4:] == -1).all()
    assert torch.equal(routing.load_E(), alone.load_E()) and routing.load_E().sum() == 4 * K
    share = routing.load_E() / (4 * K)
    expected = 0.5 * E * (share * alone.scores.mean(0)).sum()
    torch.testing.assert_close(routing.losses["balance"], expected)
    torch.testing.assert_close(alone.losses["balance"], expected)


def test_bad_options():
    with pytest.raises(ValueError, match="top_k=6 with 5 experts: choose 1 to 5"):
        create(top_k=6)
    with pytest.raises(ValueError, match='router "densemixer" has no option "renormalize": did you mean renormalise'):
        create(renormalize=True)
