"""A feed-forward cut into experts and back, and layers that compute a feed-forward before any training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewright.moe import (
    ExpertParallel,
    ExpertSpec,
    FeedForward,
    FeedForwardWeights,
    GroupedExperts,
    MoELayer,
    merge_experts,
    split_feed_forward,
    upcycle,
)
from gatewright.routers import TokenContext, create_router

D, H, E = 6, 12, 4
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu"]


def make_dense(activation="swiglu", bias=True, hidden=H, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    dense = FeedForward(ExpertSpec(D, hidden, activation=activation, bias=bias)).to(dtype)
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    return dense


def make_layer(router="topk", hidden=H, activation="swiglu", bias=True, dtype=torch.float64, layer=MoELayer, **options):
    own = {"shared", "parallel"}
    given = {"dim": D, "num_experts": E} | {k: v for k, v in options.items() if k not in own}
    torch.manual_seed(1)
    router = create_router(router, **given)
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    spec = ExpertSpec(D, hidden, activation=activation, bias=bias)
    return layer(router, spec, **{k: v for k, v in options.items() if k in own}).to(dtype)


def tokens(dtype=torch.float64, seed=2):
    return torch.randn(3, 7, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(layer, dense, tolerance=1e-12, x=None, **fields):
    x = tokens(dense.up.weight.dtype) if x is None else x
    for training in (True, False):
        y = layer.train(training)(x, TokenContext.for_tokens(x, **fields))[0]
        torch.testing.assert_close(y, dense(x), rtol=tolerance, atol=tolerance * dense(x).abs().max().item())


@given(
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.integers(1, 7),
    st.integers(1, 4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_split_and_merged_is_the_same_to_the_bit(activation, bias, num_experts, width, dtype, seed):
    dense = make_dense(activation, bias, num_experts * width, dtype, seed)
    stacked = split_feed_forward(dense, num_experts)
    bank = GroupedExperts(ExpertSpec(D, width, activation=activation, bias=bias), range(num_experts)).to(dtype)
    stacked.copy_to(bank)
    for weights in (stacked, bank):
        again = copy.deepcopy(dense)
        for parameter in again.parameters():
            nn.init.zeros_(parameter)
        merge_experts(weights).copy_to(again)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), dense.parameters(), strict=True))


@given(st.sampled_from(ACTIVATIONS), st.booleans(), st.integers(1, 6), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_the_experts_sum_to_the_feed_forward(activation, bias, num_experts, width, seed):
    dense = make_dense(activation, bias, num_experts * width, seed=seed)
    spec = ExpertSpec(D, width, activation=activation, bias=bias)
    stacked, x, total = split_feed_forward(dense, num_experts), tokens(), 0
    for e in range(num_experts):
        expert = FeedForward(spec).double()
        FeedForwardWeights(*(None if value is None else value[e] for value in stacked)).copy_to(expert)
        total = total + expert(x)
    torch.testing.assert_close(total, dense(x), rtol=1e-12, atol=1e-11)


def test_each_expert_has_its_hidden_units_and_a_share_of_the_bias():
    dense = make_dense("swiglu")
    stacked = split_feed_forward(dense, 3)
    assert stacked.w_in.shape == (3, 8, D) and stacked.w_out.shape == (3, D, 4)
    assert stacked.b_in.shape == (3, 8) and stacked.b_out.shape == (3, D)
    for e in range(3):
        units = torch.arange(4 * e, 4 * e + 4)
        rows = torch.cat([units, H + units])  # of the gate, of the rest
        assert torch.equal(stacked.w_in[e], dense.up.weight[rows]) and torch.equal(stacked.b_in[e], dense.up.bias[rows])
        assert torch.equal(stacked.w_out[e], dense.down.weight[:, units])
        torch.testing.assert_close(stacked.b_out[e], dense.down.bias / 3, rtol=1e-14, atol=0)

    beside = FeedForwardWeights(dense.up.weight, dense.down.weight, dense.up.bias, dense.down.bias)._replace(b_out=None)
    bank = GroupedExperts(ExpertSpec(D, 4, bias=True), range(3)).double()
    nn.init.normal_(bank.w3)
    split_feed_forward(beside, 3).copy_to(bank)
    assert (bank.b_out == 0).all() and torch.equal(bank.b_in, stacked.b_in)


COPIES = {
    "renormalised": {"top_k": 2, "renormalise": True},
    "softmax after": {"top_k": 3, "softmax_after": True},
    "scaled sigmoid": {"top_k": 2, "score": "sigmoid", "renormalise": True, "scale": 2.5},
    "groups and bias": {"top_k": 2, "score": "sigmoid", "renormalise": True, "num_groups": 2, "bias_rate": 1e-3},
    "sqrtsoftplus": {"top_k": 1, "score": "sqrtsoftplus", "renormalise": True},
    "all on": {"top_k": E, "scale": 0.5},
    "equal weights": {"router": "union", "choice": "per_token", "top_k": 3},
}


@pytest.mark.parametrize("activation, bias", [("swiglu", True), ("relu2", False), ("gelu", True)])
@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
def test_copies_compute_the_feed_forward(options, activation, bias):
    dense = make_dense(activation, bias)
    layer = make_layer(activation=activation, bias=bias, **options)
    before = copy.deepcopy(layer.router.state_dict())
    upcycle(layer, dense)
    equal(layer, dense)
    assert all(torch.equal(value, before[name]) for name, value in layer.router.state_dict().items())


def test_copies_whose_weights_sum_to_one_are_copies_to_the_bit():
    dense, layer = make_dense(), make_layer(top_k=2, renormalise=True)
    upcycle(layer, dense)
    for e in range(E):
        assert torch.equal(layer.experts.w_in[e], dense.up.weight) and torch.equal(
            layer.experts.b_out[e], dense.down.bias
        )


SLICES = {
    "softmax after, two groups of three": {"num_experts": 12, "top_k": 6, "softmax_after": True, "hidden": 4},
    "renormalised, one group": {"num_experts": 8, "top_k": 4, "renormalise": True, "hidden": 3},
    "sigmoid, groups of groups": {
        "num_experts": 16, "top_k": 4, "score": "sigmoid", "renormalise": True, "scale": 2.5, "num_groups": 4,
        "top_groups": 2, "hidden": 6,
    },
    "logits with a bias": {"num_experts": 6, "top_k": 4, "softmax_after": True, "linear_bias": True, "hidden": 6},
    "all on, equal weights": {"router": "union", "choice": "per_token", "top_k": E, "hidden": 3},
    "all on, three sets": {"router": "union", "choice": "per_token", "num_experts": 12, "top_k": 12, "hidden": 3},
}  # fmt: skip


@pytest.mark.parametrize("activation, bias", [("swiglu", True), ("relu2", False), ("gelu", True)])
@pytest.mark.parametrize("options", SLICES.values(), ids=SLICES)
def test_slices_compute_the_feed_forward(options, activation, bias):
    dense = make_dense(activation, bias)
    layer = make_layer(activation=activation, bias=bias, **options)
    upcycle(layer, dense, how="slices")
    equal(layer, dense)


def test_virtual_groups_score_alike_and_hold_every_slice():
    dense, layer = make_dense(), make_layer(num_experts=12, top_k=3, softmax_after=True, hidden=4)
    rows = layer.router.weight.detach()[:4].clone()
    upcycle(layer, dense, how="slices")
    stacked = split_feed_forward(dense, 3)
    for e in range(12):
        assert torch.equal(layer.router.weight[e], rows[e // 3])
        assert torch.equal(layer.experts.w_in[e], stacked.w_in[e % 3])
        torch.testing.assert_close(layer.experts.w_out[e], 3 * stacked.w_out[e % 3])
    _, routing = layer(tokens())
    assert (routing.index.sort(1).values // 3).diff(dim=1).eq(0).all() and len(routing.load_E().unique()) > 1


@given(
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    parts=st.integers(1, 3),
    groups=st.integers(1, 4),
    chosen=st.integers(1, 4),
    gate=st.sampled_from(
        [
            {"softmax_after": True},
            {"renormalise": True},
            {"score": "sigmoid", "renormalise": True, "bias_rate": 1e-3},
            {"score": "sqrtsoftplus", "renormalise": True},
        ]
    ),
    scale=st.sampled_from([1.0, 2.5, 0.3]),
    linear_bias=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_gate_with_one_sum_starts_as_the_feed_forward(
    activation, bias, parts, groups, chosen, gate, scale, linear_bias, seed
):
    """E = parts x groups experts; parts > 1 are slices of which a token chooses whole groups."""
    dense = make_dense(activation, bias, hidden=6, seed=seed)
    own = {"num_experts": parts * groups, "top_k": parts * min(chosen, groups), "scale": scale}
    layer = make_layer(hidden=6 // parts, activation=activation, bias=bias, linear_bias=linear_bias, **own, **gate)
    upcycle(layer, dense, how="slices" if parts > 1 else "copies")
    equal(layer, dense, x=tokens(seed=seed))


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 2}, {"top_k": 2, "score": "sigmoid"}, {"router": "sinkhorn", "top_k": 1}],
    ids=["softmax", "softmax, two", "sigmoid", "sinkhorn"],
)
def test_a_router_of_zeros_gives_any_weights_one_sum(options):
    dense, layer = make_dense(), make_layer(**options)
    before = layer.router.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weights of a token on its experts sum to .* zero_router=True"):
        upcycle(layer, dense)
    assert torch.equal(layer.router.weight, before), "a refusal leaves the layer as it was"
    upcycle(layer, dense, zero_router=True)
    assert (layer.router.weight == 0).all()
    equal(layer, dense)


def test_local_experts_are_copies_too():
    dense = make_dense()
    layer = make_layer("promoe", gate="softmax", top_k=E)
    upcycle(layer, dense)
    x = tokens()
    null = torch.tensor([True, False, False])
    assert layer.local_experts is not None
    y, routing = layer(x, TokenContext.for_tokens(x, null_mask=null))
    torch.testing.assert_close(y, dense(x), rtol=1e-12, atol=1e-11)
    assert routing.load_E()[E] == 7


@pytest.mark.parametrize("how, options", [("copies", {"top_k": 2}), ("slices", {"top_k": 2, "hidden": 6})])
def test_every_rank_fills_its_own_experts(how, options):
    dense = make_dense()
    whole = make_layer(renormalise=True, **options)
    upcycle(whole, dense, how=how, noise=0.1)
    for rank in range(2):
        part = make_layer(renormalise=True, parallel=ExpertParallel(size=2, rank=rank), **options)
        upcycle(part, dense, how=how, noise=0.1)
        assert part.experts.ids == [2 * rank, 2 * rank + 1]
        for own, all_of_them in zip(part.experts.parameters(), whole.experts.parameters(), strict=True):
            assert torch.equal(own, all_of_them[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("dense_dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dense_dtype):
    dense = make_dense(dtype=dense_dtype)
    layer = make_layer(top_k=2, renormalise=True, dtype=torch.bfloat16)
    upcycle(layer, dense)
    assert layer.experts.w1.dtype == torch.bfloat16
    half = copy.deepcopy(dense).bfloat16()
    assert torch.equal(layer.experts.w_in[1], half.up.weight)
    x = tokens(torch.bfloat16)
    torch.testing.assert_close(layer(x)[0], half(x), rtol=2e-2, atol=2e-2 * half(x).abs().max().item())


def test_float32_slices():
    dense = make_dense(dtype=torch.float32)
    layer = make_layer(num_experts=12, top_k=6, softmax_after=True, hidden=4, dtype=torch.float32)
    upcycle(layer, dense, how="slices")
    equal(layer, dense, tolerance=1e-5)


def test_plain_tensors_of_a_llama():
    torch.manual_seed(0)
    gate_proj, up_proj = torch.randn(2, H, D, dtype=torch.float64)
    down_proj, x = torch.randn(D, H, dtype=torch.float64), tokens()
    layer = make_layer(top_k=2, renormalise=True, bias=False)
    upcycle(layer, FeedForwardWeights(torch.cat([gate_proj, up_proj]), down_proj))
    expected = (F.silu(x @ gate_proj.T) * (x @ up_proj.T)) @ down_proj.T
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_mlp_of_transformers():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    torch.manual_seed(0)
    mlp = modeling.LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=H, num_attention_heads=1)).double()
    w_in = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    layer = make_layer(num_experts=8, top_k=4, softmax_after=True, hidden=6, bias=False)
    upcycle(layer, FeedForwardWeights(w_in, mlp.down_proj.weight), how="slices")
    torch.testing.assert_close(layer(tokens())[0], mlp(tokens()), rtol=1e-12, atol=1e-12)


def test_experts_without_biases_to_fill_get_zeros():
    dense = make_dense(bias=False)
    layer = make_layer(top_k=2, renormalise=True, bias=True)
    nn.init.normal_(layer.experts.w3)
    upcycle(layer, dense)
    assert (layer.experts.w3 == 0).all()
    equal(layer, dense)


def test_copies_part_in_training_and_noise_parts_them_before():
    dense, layer = make_dense(), make_layer(top_k=2, renormalise=True)
    upcycle(layer, dense)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    layer(tokens())[0].square().mean().backward()
    optimizer.step()
    assert not torch.equal(layer.experts.w1[0], layer.experts.w1[1])

    upcycle(layer, dense, noise=0.1)
    fresh = GroupedExperts(layer.spec, range(E)).double()
    for e in range(E):
        torch.testing.assert_close(layer.experts.w1[e], dense.up.weight + 0.1 * fresh.w1[e], rtol=1e-6, atol=1e-7)
        assert torch.equal(layer.experts.b_out[e], dense.down.bias)


def test_weights_may_be_measured_with_tokens_of_ones_own():
    dense = make_dense()
    layer = make_layer("union", choice="expert", length=3, top_k=2)
    with pytest.raises(ValueError, match=r"does not take random tokens .*length=3.*give x and context"):
        upcycle(layer, dense)
    x = tokens()[:, :3]
    upcycle(layer, dense, x=x.flatten(0, 1), context=TokenContext.for_tokens(x))
    equal(layer, dense, x=x)

    mask = torch.tensor([[True, True, False]] * 3)
    layer = make_layer(top_k=2, renormalise=True)
    upcycle(layer, dense, x=x.flatten(0, 1), context=TokenContext.for_tokens(x, padding_mask=mask))
    equal(layer, dense)


REFUSED = {
    "top-1 softmax": ({"top_k": 1}, {}, r"renormalise=True or softmax_after=True \(with top_k=1 its gate then learns"),
    "identity gates": ({"router": "promoe"}, {}, 'router "promoe" cannot start as a feed-forward: the weights'),
    "capacity": ({"top_k": 2, "renormalise": True, "capacity_factor": 8.0}, {}, "have a capacity"),
    "experts choose": ({"router": "expert_choice"}, {}, "sum to 0 for one"),
    "copy experts": ({"router": "base"}, {}, "return the token itself"),
    "soft slots": ({"router": "soft_moe"}, {}, "mixtures of tokens"),
    "shared": (
        {"top_k": 2, "renormalise": True, "shared": FeedForward(ExpertSpec(D, 4))}, {},
        "shared feed-forward adds to what the experts give",
    ),
    "unknown": ({"top_k": 2}, {"how": "slice"}, r'how="slice": choose one of'),
    "other hidden": ({"top_k": 2, "hidden": 6}, {}, "hidden=12 in experts of hidden=6: make them equal, or how="),
    "no parts": ({"top_k": 2, "hidden": 5}, {"how": "slices"}, "hidden must divide the feed-forward's"),
    "parts of no number": ({"top_k": 3, "hidden": 4}, {"how": "slices"}, "and n the number of experts"),
    "broken sets": ({"top_k": 3, "hidden": 6}, {"how": "slices"}, "whole sets of 2 slices; choose a multiple of 2"),
    "tied slices": ({"top_k": 2, "hidden": 6}, {"how": "slices", "zero_router": True}, "tied scores"),
    "local slices": (
        {"router": "promoe", "top_k": 2, "hidden": 6}, {"how": "slices"}, "local experts hold no whole feed-forward",
    ),
    "raw softmax slices": ({"top_k": 2, "hidden": 6}, {"how": "slices"}, "weights of a token on each slice sum"),
    "activation": ({"top_k": 2, "activation": "geglu"}, {}, '"swiglu" does not become "geglu"'),
    "not gated": ({"top_k": 2, "activation": "gelu"}, {}, '"swiglu" does not become "gelu"'),
    "no place for biases": ({"top_k": 2, "bias": False}, {}, r"the experts have none: ExpertSpec\(bias=True"),
}  # fmt: skip


@pytest.mark.parametrize("options, arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_start_as_a_feed_forward_is_refused(options, arguments, message):
    if options.get("router") == "expert_choice":
        options = options | {"top_k": 1.0}
    layer = make_layer(**options)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        upcycle(layer, make_dense(), **arguments)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_layer_without_memory_is_refused():
    router = create_router("topk", dim=D, num_experts=E, renormalise=True)
    layer = MoELayer(router, ExpertSpec(D, H, bias=True), device="meta")
    with pytest.raises(ValueError, match="on the meta device: give it memory first"):
        upcycle(layer, make_dense())


@pytest.mark.parametrize(
    "weights, num_experts, message",
    [
        (FeedForwardWeights(torch.zeros(H, D), torch.zeros(D, H)), 5, "num_experts=5: 12 hidden units do not divide"),
        (FeedForwardWeights(torch.zeros(H, D), torch.zeros(D, H)), 0, "num_experts=0"),
        (FeedForwardWeights(torch.zeros(H, D), torch.zeros(H, D)), 2, r"expected w_in \[H, D\] or \[2H, D\]"),
        (FeedForwardWeights(torch.zeros(H, D), torch.zeros(D, H), torch.zeros(D)), 2, r"b_in \[H\] or \[2H\]"),
        (FeedForwardWeights(torch.zeros(2, H, D), torch.zeros(2, D, H)), 2, "weights of shapes"),
    ],
)
def test_weights_that_are_no_feed_forward_are_refused(weights, num_experts, message):
    with pytest.raises(ValueError, match=message):
        split_feed_forward(weights, num_experts)


def test_weights_that_do_not_fit_are_refused():
    stacked = split_feed_forward(make_dense(), 3)
    with pytest.raises(ValueError, match=r"w_in has shape \[3, 8, 6\]: the target's is \[2, 8, 6\]"):
        stacked.copy_to(GroupedExperts(ExpertSpec(D, 4, bias=True), range(2)))
    with pytest.raises(ValueError, match="b_in is given and the target has no biases"):
        stacked.copy_to(GroupedExperts(ExpertSpec(D, 4), range(3)))


def check_upcycled(how, hidden):
    dense = make_dense()
    layer = make_layer(top_k=2, renormalise=True, hidden=hidden, parallel=ExpertParallel.create(2))
    upcycle(layer, dense, how=how)
    x = tokens(seed=torch.distributed.get_rank())
    return len(layer.experts.ids), (layer(x)[0] - dense(x)).abs().max().item()


@pytest.mark.distributed
@pytest.mark.parametrize("how, hidden", [("copies", H), ("slices", H // 2)])
def test_over_ranks_too_the_layer_computes_the_feed_forward(ranks, how, hidden):
    for experts, off in ranks(2).run(check_upcycled, how, hidden):
        assert experts == 2 and off < 1e-11
