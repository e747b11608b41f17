"""LongCat-Flash's router: against one token after the other, against transformers' layer, and its bias as a control."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import TokenContext, create_router

D, N, Z, K, T = 12, 6, 3, 4, 30


def create(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    given = {"dim": D, "num_experts": N, "identity_experts": Z, "top_k": K, "init_std": 1.0} | options
    return create_router("longcat", **given).to(dtype), torch.randn(T, D, dtype=dtype)


def test_against_one_token_after_the_other():
    router, x = create(scale=1.5)
    router.bias.normal_(std=0.3)
    x = x.requires_grad_()
    factor = torch.randn(T, N + Z, dtype=torch.float64)
    routing, total = router(x), 0
    for t in range(T):
        p = (router.weight @ x[t]).softmax(0)
        best = sorted(range(N + Z), key=lambda e: -(p[e] + router.bias[e]).item())[:K]
        assert routing.index[t].tolist() == best
        torch.testing.assert_close(routing.weight[t], 1.5 * p[best], rtol=1e-12, atol=1e-12)
        total = total + (1.5 * p[best] * factor[t, best]).sum()
    expected = torch.autograd.grad(total, [x, router.weight])
    actual = torch.autograd.grad((routing.weight * factor.gather(1, routing.index)).sum(), [x, router.weight])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.equal(create()[0](x).index, routing.index), "the bias decided nothing here"


def test_the_layer_equals_that_of_transformers():
    """Router, feed-forwards and identities together, forward and backward."""
    theirs = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    from transformers import LongcatFlashConfig

    config = LongcatFlashConfig(
        hidden_size=D, n_routed_experts=N, zero_expert_num=Z, moe_topk=K, expert_ffn_hidden_size=8,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block = theirs.LongcatFlashMoE(config)
    router, x = create(torch.float32, scale=2.5)
    layer = MoELayer(router, ExpertSpec(D, 8, activation="swiglu", bias=False))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
        router.weight.copy_(block.router.classifier.weight)
        block.router.e_score_correction_bias.copy_(router.bias.normal_(std=0.2))
        layer.experts.w1.copy_(block.experts.gate_up_proj[:N])
        layer.experts.w2.copy_(block.experts.down_proj)
    x = x.view(2, T // 2, D)
    y, routing = layer(x)
    expected = block(x)
    assert (routing.load_E()[N:] > 0).any(), "no identity was chosen"
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(router.weight.grad, block.router.classifier.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.experts.w1.grad, block.experts.gate_up_proj.grad[:N], rtol=1e-4, atol=1e-4)


loads = st.lists(st.integers(0, 1000), min_size=N + Z, max_size=N + Z)


@given(loads, st.floats(1, 4), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_the_update_is_in_proportion_to_what_an_expert_lacks(load, real, times):
    router, _ = create(real_experts=real, bias_rate=0.5)
    router.update({"load": torch.tensor(load)})
    assert (router.bias[N:] == 0).all(), "the identities are not steered"
    total = sum(load)
    wanted = [0.5 * (real / (K * N) - c / total) if total else 0.0 for c in load[:N]]
    assert router.bias[:N].tolist() == pytest.approx(wanted, abs=1e-12)
    again, _ = create(real_experts=real, bias_rate=0.5)
    again.update({"load": times * torch.tensor(load)})  # the size of the batch does not matter
    torch.testing.assert_close(again.bias, router.bias, rtol=1e-9, atol=1e-12)


def test_at_the_target_nothing_moves():
    """K_e / N for each feed-forward, however the identities share the rest."""
    router, _ = create(real_experts=3.0)
    for identities in ([60, 0, 0], [20, 20, 20], [0, 1, 59]):
        router.update({"load": torch.tensor([30] * N + identities)})  # 60 tokens, 4 assignments each
        assert router.bias.abs().max() < 1e-15


@pytest.mark.parametrize("real", [1.5, 2.5, 3.5])
def test_the_bias_controls_how_many_real_experts_a_token_has(real):
    router, _ = create(real_experts=real, bias_rate=0.05, init_std=0.2)
    x = torch.randn(400, D, dtype=torch.float64) + 0.5  # a common part, which some experts like and others do not
    before = router(x).load_E()[:N].sum() / 400
    for _ in range(300):
        router.update(router(x).stats)
    load = router(x).load_E()
    assert abs(before - real) > 0.1
    assert load[:N].sum() / 400 == pytest.approx(real, abs=0.05)
    assert load[:N] / 400 == pytest.approx(torch.full((N,), real / N), abs=0.05), "and each its share"
    index, weight = router(x).as_topk()
    assert torch.equal(weight, 6.0 * router(x).scores.gather(1, index)), "weights know nothing of the bias"
    assert len((index < N).sum(1).unique()) > 1, "tokens take different amounts of computation"


def test_what_it_is_by_default():
    router = create_router("longcat", dim=8, num_experts=512, top_k=12)
    assert router.expert_kinds == ("routed",) * 512 + ("copy",) * 256 and router.real_experts == 8
    every, x = create(top_k=N + Z)
    assert not every.stateful and every(x).stats == {}
    fixed, x = create(bias_rate=0.0)
    assert not fixed.stateful and fixed(x).stats == {} and "bias" in fixed.state_dict()


def test_padded_tokens_do_not_count():
    router, x = create()
    mask = torch.arange(T)[None] < 7
    assert router(x, TokenContext.for_tokens(x, padding_mask=mask)).stats["load"].sum() == 7 * K


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 10}, "top_k=10 with 9 experts"),
        ({"identity_experts": -1}, "identity_experts=-1: choose at least 0"),
        ({"real_experts": 0.5}, "real_experts=0.5 with top_k=4, 6 feed-forwards and 3 identities: choose 1 to 4"),
        ({"real_experts": 4.5}, "choose 1 to 4"),
        ({"num_experts": 2, "real_experts": 3.0}, "choose 1 to 2"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
