"""Autonomy of experts: the whole layer against a loop, and against the paper's factorised expert."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import TokenContext, create_router

D, E, H, R, T, K = 6, 4, 5, 3, 10, 2


def create(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    options = {"dim": D, "num_experts": E, "top_k": K, "rank": R, "init_std": 0.5} | options
    return create_router("aoe", **options).to(dtype)


def layer_of(router, activation="silu", backend="reference"):
    torch.manual_seed(7)
    layer = MoELayer(router, ExpertSpec(D, H, activation=activation), backend=backend).double()
    with torch.no_grad():
        for parameter in (layer.experts.w1, layer.experts.w2):
            parameter.normal_()
    return layer


def tokens(seed=1, count=T):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(layer, x_TD, real=None):
    """The paper's expert W_o act(W_up W_down x), one token after the other; W_up is here the product of the expert's
    first matrix with the router's ``up``."""
    router, y = layer.router, []
    for t, x in enumerate(x_TD):
        z = [router.down[e] @ x for e in range(E)]
        norms = torch.stack([v.square().sum().sqrt() for v in z])
        scores = norms.softmax(0)
        chosen = sorted(range(E), key=lambda e: -norms[e].item())[:K]
        total = sum(scores[e] for e in chosen) if router.renormalise else 1
        out = torch.zeros_like(x)
        for e in chosen if real is None or real[t] else []:
            w_up = layer.experts.w_in[e] @ router.up[e]
            out = out + scores[e] / total * (layer.experts.w_out[e] @ F.silu(w_up @ z[e]))
        y.append(out)
    return torch.stack(y)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_layer_equals_the_papers_expert(renormalise, padded, backend):
    layer, x = layer_of(create(renormalise=renormalise), backend=backend), tokens()
    real = torch.arange(T) % 3 > 0 if padded else None
    context = TokenContext(batch_size=1, length=T, padding_mask=None if real is None else real[None])

    def run(compute):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters() if not name.endswith("w3")}
        return y, {"x": leaf.grad} | grads

    expected, expected_grads = run(lambda x: by_hand(layer, x, real))
    y, grads = run(lambda x: layer(x, context)[0])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for name, grad in expected_grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_weights_are_the_softmax_of_the_kept_norms():
    x = tokens()
    for renormalise in (True, False):
        router = create(renormalise=renormalise, top_k=3)
        routing = router(x)
        index, weight = routing.as_topk()
        norms = torch.einsum("erd,td->ter", router.down, x).norm(dim=2)
        torch.testing.assert_close(routing.logits, norms)
        torch.testing.assert_close(routing.scores, norms.softmax(1))
        assert torch.equal(index, norms.topk(3).indices), "the largest first"
        expected = norms.topk(3).values.softmax(1) if renormalise else norms.softmax(1).topk(3).values
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_follow_the_list(padded):
    router, x = create(), tokens()
    mask = torch.arange(T)[None] % 4 > 0 if padded else None
    routing = router(x, TokenContext(batch_size=1, length=T, padding_mask=mask))
    token, expert, weight = routing.as_list()
    assert len(token) == len(routing.rows) == K * (T if mask is None else int(mask.sum())) and (token.diff() >= 0).all()
    for n, (t, e) in enumerate(zip(token.tolist(), expert.tolist(), strict=True)):
        torch.testing.assert_close(routing.rows[n], router.up[e] @ (router.down[e] @ x[t]))


def test_with_rotations_for_matrices_it_is_a_plain_mixture():
    """A_e orthogonal and B_e its inverse: every norm is |x|, every row is x, every weight 1 / K."""
    router = create(rank=D)
    with torch.no_grad():
        for e in range(E):
            rotation = torch.linalg.qr(torch.randn(D, D).double()).Q
            router.down[e], router.up[e] = rotation, rotation.T
    x = tokens()
    routing = router(x)
    torch.testing.assert_close(routing.rows, x.repeat_interleave(K, 0))
    torch.testing.assert_close(routing.logits, x.norm(dim=1, keepdim=True).expand(T, E))
    torch.testing.assert_close(routing.as_list()[2], torch.full((T * K,), 1 / K).double())


@given(seed=st.integers(0, 10**6), factor=st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_the_length_of_a_token_scales_norms_and_changes_no_choice(seed, factor):
    router, x = create(seed), tokens(seed)
    a, b = router(x), router(factor * x)
    assert torch.equal(a.expert, b.expert)
    torch.testing.assert_close(b.logits, factor * a.logits)
    torch.testing.assert_close(b.rows, factor * a.rows)
    turned = -x
    torch.testing.assert_close(router(turned).logits, a.logits)


def test_a_zero_token_has_a_finite_gradient():
    layer, x = layer_of(create()), torch.zeros(T, D, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x)
    assert (y == 0).all() and (routing.logits == 0).all()
    assert all(len(set(row)) == K for row in routing.as_topk()[0].tolist())
    (y.sum() + routing.as_list()[2].square().sum() + routing.scores.square().sum()).backward()
    assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_the_balance_loss_is_the_released_one_up_to_k():
    """The released function's f_e sums to K, ours to 1."""
    router, x = create(balance_weight=0.3), tokens()
    routing = router(x)
    chosen = F.one_hot(routing.as_topk()[0], E).double()
    released = (chosen.mean(0) * routing.scores.mean(0)[None]).sum() * E
    torch.testing.assert_close(routing.losses["balance"], 0.3 * released / K)


def test_nothing_larger_than_every_experts_z_is_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for part in torch.utils._pytree.tree_leaves(result):
                if isinstance(part, torch.Tensor):
                    self.elements = max(self.elements, part.numel())
            return result

    router = create_router("aoe", dim=16, num_experts=8, top_k=2, rank=4)
    x = torch.randn(64, 16, requires_grad=True)
    with Largest() as largest:
        routing = router(x)
        (routing.rows.sum() + routing.weight.square().sum()).backward()
    assert largest.elements == 64 * 8 * 4, "T E r; T E D would be 4 times it"


def test_rows_start_as_large_as_tokens():
    torch.manual_seed(0)
    router = create_router("aoe", dim=256, num_experts=4)
    assert router.rank == 64 and router.options["rank"] is None
    rows = router(torch.randn(200, 256)).rows
    assert 0.8 < rows.square().mean().sqrt() < 1.25


@pytest.mark.parametrize("count, padded", [(0, False), (3, True)], ids=["no token", "all padded"])
def test_a_batch_without_a_real_token(count, padded):
    layer, x = layer_of(create(balance_weight=0.1)), tokens(count=count).requires_grad_()
    mask = torch.zeros(1, count, dtype=torch.bool) if padded else None
    y, routing = layer(x, TokenContext(batch_size=1, length=count, padding_mask=mask))
    assert y.shape == x.shape and (y == 0).all() and routing.rows.shape == (0, D) and routing.loss == 0
    (y.sum() + routing.loss).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in layer.parameters())


def test_dtypes():
    router, x = create(dtype=torch.bfloat16), tokens().bfloat16()
    routing = router(x)
    assert routing.rows.dtype == routing.weight.dtype == routing.logits.dtype == torch.float32
    torch.testing.assert_close(router.float()(x.float()).rows, routing.rows)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 5}, "top_k=5 with 4 experts: choose 1 to 4"),
        ({"rank": 0}, "rank=0 of tokens of width 6: choose 1 to 6, or None for a quarter of it"),
        ({"rank": 7}, "rank=7 of tokens of width 6"),
        ({"init_std": 0.0}, "init_std=0.0: choose above 0"),
    ],
    ids=repr,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
