"""Experts: the bank's parameters and the draw that no layout changes."""

import math

import pytest
import torch
import torch.nn.functional as F

from gatewright.kernels.activation import ACTIVATIONS, GATED, activate
from gatewright.moe import ExpertParallel, ExpertSpec, FeedForward, GroupedExperts, MoELayer
from gatewright.routers import create_router

D, H = 6, 10


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_bank_is_three_parameters_of_three_dimensions(activation, bias):
    spec = ExpertSpec(D, H, activation=activation, bias=bias)
    bank = GroupedExperts(spec, range(4))
    rows = 2 * H if activation in GATED else H
    shapes = {name: tuple(p.shape) for name, p in bank.named_parameters()}
    assert shapes == {"w1": (4, rows, D), "w2": (4, D, H), "w3": (4, 1, rows + D if bias else 1)}
    assert bank.w_in is bank.w1 and bank.w_out is bank.w2
    if bias:
        assert bank.b_in.shape == (4, rows) and bank.b_out.shape == (4, D)
        assert bank.b_in.data_ptr() == bank.w3.data_ptr(), "a view"
        used = sum(p.numel() for p in bank.parameters())
    else:
        assert bank.b_in is None and bank.b_out is None
        used = bank.w1.numel() + bank.w2.numel()
    assert used == 4 * spec.num_parameters
    assert spec.num_parameters == sum(p.numel() for p in FeedForward(spec).parameters())
    assert (bank.w3 == 0).all()


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bank_of_one_is_a_feed_forward(activation, bias):
    spec = ExpertSpec(D, H, activation=activation, bias=bias)
    bank, plain = GroupedExperts(spec, [0], dtype=torch.float64), FeedForward(spec, dtype=torch.float64)
    with torch.no_grad():
        bank.w3.normal_()
        plain.up.weight.copy_(bank.w_in[0])
        plain.down.weight.copy_(bank.w_out[0])
        if bias:
            plain.up.bias.copy_(bank.b_in[0])
            plain.down.bias.copy_(bank.b_out[0])
    x = torch.randn(5, D, dtype=torch.float64)
    expected = F.linear(
        activate(F.linear(x, plain.up.weight, plain.up.bias), activation), plain.down.weight, plain.down.bias
    )
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(plain(x, object()), expected)
    torch.testing.assert_close(bank(x, torch.tensor([5])), expected)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("hidden", [32, 64, 128])  # 32: 2H = D, where rows alone do not tell w_in from w_out
def test_weights_are_drawn_xavier_uniform_or_normal(activation, hidden):
    spec = ExpertSpec(64, hidden, activation=activation)
    plain = FeedForward(spec)
    bound = math.sqrt(6 / (64 + hidden))
    bank = GroupedExperts(spec, range(8))
    for weight in (bank.w1, bank.w2, plain.up.weight, plain.down.weight):
        assert 0.98 * bound < weight.abs().max() < bound
        assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.05
    normal = GroupedExperts(ExpertSpec(64, hidden, init_std=0.02), range(8))
    assert abs(normal.w1.std() / 0.02 - 1) < 0.02 and abs(normal.w2.std() / 0.02 - 1) < 0.02
    plain = FeedForward(ExpertSpec(64, hidden, bias=True, init_std=0.02))
    assert abs(plain.up.weight.std() / 0.02 - 1) < 0.1 and (plain.up.bias == 0).all() and (plain.down.bias == 0).all()


def test_the_draw_follows_seed_layer_and_global_id_alone():
    spec = ExpertSpec(D, H)
    whole = GroupedExperts(spec, range(6), seed=1, layer=2)
    torch.manual_seed(99)
    for first in (0, 2, 4):
        part = GroupedExperts(spec, range(first, first + 2), seed=1, layer=2)
        assert torch.equal(part.w1, whole.w1[first : first + 2]) and torch.equal(part.w2, whole.w2[first : first + 2])
    for key in ({"seed": 2, "layer": 2}, {"seed": 1, "layer": 3}, {"seed": 2, "layer": 1}):
        assert not torch.isin(GroupedExperts(spec, range(6), **key).w1, whole.w1).any()
    assert len(whole.w1.unique()) == whole.w1.numel(), "experts share no number"
    before = torch.get_rng_state()
    GroupedExperts(spec, range(2))
    assert torch.equal(torch.get_rng_state(), before), "other draws are not moved"


def test_the_draw_does_not_follow_defaults_of_torch():
    spec = ExpertSpec(D, H)
    expected = GroupedExperts(spec, range(2))
    torch.set_default_dtype(torch.float64)
    try:
        double = GroupedExperts(spec, range(2))
        half = GroupedExperts(spec, range(2), dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.w1.dtype == torch.float64 and torch.equal(double.w1.float(), expected.w1)
    assert torch.equal(half.w1, expected.w1.bfloat16())


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_layers_of_any_expert_parallelism_hold_the_same_experts(size):
    """12 routed and 1 local expert: the local one is everywhere and does not count in what must divide."""
    spec = ExpertSpec(D, H, bias=True)

    def layer(parallel):
        torch.manual_seed(0)
        return MoELayer(create_router("promoe", dim=D, num_experts=12), spec, parallel=parallel, seed=4, layer=1)

    whole = layer(ExpertParallel())
    parts = [layer(ExpertParallel(size=size, rank=rank)) for rank in range(size)]
    assert sum((part.experts.ids for part in parts), []) == list(range(12))
    for name in ("w1", "w2", "w3"):
        assert torch.equal(torch.cat([getattr(part.experts, name) for part in parts]), getattr(whole.experts, name))
        assert all(torch.equal(getattr(p.local_experts, name), getattr(whole.local_experts, name)) for p in parts)
    assert whole.local_experts.ids == [12]
    assert all(p.allreduce == (size == 1) for part in parts for p in part.experts.parameters())


def test_what_does_not_divide_is_refused():
    router = create_router("topk", dim=D, num_experts=6)
    with pytest.raises(ValueError, match=r"6 routed experts do not divide over expert parallelism 4: .*\[1, 2, 3, 6\]"):
        MoELayer(router, ExpertSpec(D, H), parallel=ExpertParallel(size=4))
    for size in (0, 2, 3):
        with pytest.raises(ValueError, match=f"expert parallelism {size} does not divide 1 rank: "):
            ExpertParallel.create(size)
    assert ExpertParallel.create(1) == ExpertParallel()


def test_specs_are_checked():
    for dim, hidden in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="both must be at least 1"):
            ExpertSpec(dim, hidden)
    with pytest.raises(ValueError, match='activation="swiglo" does not exist: did you mean "swiglu"'):
        ExpertSpec(D, H, activation="swiglo")
