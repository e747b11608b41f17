"""The layer against its definition, one token after the other: output and every gradient, in float64."""

import copy
import itertools

import pytest
import torch
from made_up_router import KINDS, Counting, MadeUpRouter, token_by_token
from router_cases import LISTED, assert_same, resized
from torch import nn

from gatewright.moe import ExpertSpec, FeedForward, MoELayer, finish_step, moe_layers
from gatewright.routers import Router, Routing, TokenContext, create_router

D, H, B, L = 6, 5, 3, 7
backends = pytest.mark.parametrize("backend", ["reference", "cpu"])
layouts = pytest.mark.parametrize("layout", ["topk", "list", "rows", "slots"])


def make(
    layout="topk", backend="reference", activation="swiglu", bias=True, shared=True, dtype=torch.float64, **options
):
    spec = ExpertSpec(D, H, activation=activation, bias=bias)
    torch.manual_seed(0)
    router = MadeUpRouter(dim=D, layout=layout, **options)
    layer = MoELayer(router, spec, shared=FeedForward(spec) if shared else None, backend=backend).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "router" not in name:
                parameter.normal_(0, 0.7)
    return layer


def tokens(batch_size=B, length=L, dtype=torch.float64, seed=1):
    return torch.randn(batch_size, length, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(layer, compute, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = compute(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def unused(layer, name):
    """Parameters that the layout in hand does not read."""
    reads = {"topk": {"weight"}, "list": {"weight"}, "rows": {"weight", "mixers"}, "slots": {"slots"}}
    own = name.removeprefix("router.")
    return (own != name and own not in reads[layer.router.layout]) or (name.endswith("w3") and not layer.spec.bias)


@backends
@layouts
@pytest.mark.parametrize("activation, bias", [("swiglu", True), ("gelu_tanh", False)])
@pytest.mark.parametrize("flat", [False, True], ids=["BLD", "TD"])
def test_equals_its_definition(backend, layout, activation, bias, flat):
    layer, x = make(layout, backend, activation, bias, shared=not flat), tokens()
    context = TokenContext.for_tokens(x)
    if flat:
        x = x.flatten(0, 1)
    slow, slow_grads = gradients(layer, lambda x: token_by_token(layer, x.reshape(-1, D), context).view(x.shape), x)
    fast, fast_grads = gradients(layer, lambda x: layer(x, context)[0], x)
    assert fast.shape == x.shape
    assert_same(fast, slow, "output", 1e-12)
    for name, expected in slow_grads.items():
        if unused(layer, name):
            assert fast_grads[name] is None, name
        else:
            assert fast_grads[name] is not None, f"{name} has no gradient"
            expected = torch.zeros_like(fast_grads[name]) if expected is None else expected
            assert_same(fast_grads[name], expected, f"gradient of {name}", 1e-11)
    used = {k for k in (layer.router.expert_kinds[e] for e in range(10)) if k != "zero"}
    assert used == {"routed", "local", "copy", "constant"}, "the router offers every kind"


@layouts
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_backends_agree_in_float32(backend, layout):
    """Also ``torch``, the GPU's, which takes widths of 16 bytes only and nothing beyond the rows that are counted."""
    x = torch.randn(B, L, 8)
    context = TokenContext.for_tokens(x, padding_mask=torch.arange(L)[None] < torch.tensor([7, 0, 4])[:, None])
    results = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        spec = ExpertSpec(8, 12, bias=True, init_std=0.5)
        layer = MoELayer(MadeUpRouter(dim=8, layout=layout), spec, shared=FeedForward(spec), backend=name)
        results.append(gradients(layer, lambda x, layer=layer: layer(x, context)[0], x))
    assert_same(results[1][0], results[0][0], "output", 1e-5)
    assert_same(results[1][1], results[0][1], "gradient", 1e-4)


@backends
@layouts
@pytest.mark.parametrize(
    "kinds", [("routed",), ("routed",) * 3, ("copy", "routed"), ("routed", "local"), ("zero", "routed")]
)
def test_banks_of_few_kinds(backend, layout, kinds):
    layer, x = make(layout, backend, kinds=kinds, top_k=1), tokens()
    context = TokenContext.for_tokens(x)
    assert_same(layer(x)[0].flatten(0, 1), token_by_token(layer, x.flatten(0, 1), context), "output", 1e-12)


@backends
@layouts
def test_empty_experts_and_zero_tokens_give_zero_gradients(backend, layout):
    layer = make(layout, backend, floor=torch.inf)  # nobody is chosen
    for x in (tokens(), tokens(0, L), tokens(B, 0), torch.zeros(0, D, dtype=torch.float64)):
        y, grads = gradients(layer, lambda x: layer(x)[0], x)
        assert y.shape == x.shape
        for name, grad in grads.items():
            if name == "x" or unused(layer, name):
                continue
            assert grad is not None, f"{name} has no gradient for x {tuple(x.shape)}"
            assert grad.isfinite().all()
            if x.numel() == 0 or (layout != "slots" and "shared" not in name):
                assert (grad == 0).all(), name


@backends
@layouts
def test_padding_may_hold_anything_and_gives_zero(backend, layout):
    layer = make(layout, backend)
    mask = torch.arange(L)[None] < torch.tensor([7, 0, 4])[:, None]
    x = tokens()
    context = TokenContext.for_tokens(x, padding_mask=mask)
    clean = gradients(layer, lambda x: layer(x, context)[0], x.masked_fill(~mask[..., None], 0))
    for dirt in (torch.nan, torch.inf):
        y, grads = gradients(layer, lambda x: layer(x, context)[0], x.masked_fill(~mask[..., None], dirt))
        assert (y[~mask] == 0).all() and (grads["x"][~mask] == 0).all()
        assert_same(y, clean[0], "output", 0)
        assert_same(grads, clean[1], "gradient", 0)
    if layout != "slots":
        alone = layer(x[2:, :4])[0]
        assert_same(y[2:, :4], alone, "output of the padded sample", 1e-12)


def test_shared_is_called_with_the_context():
    seen = []

    class Shared(nn.Module):
        def forward(self, x, context):
            seen.append((x.shape, context))
            return x

    layer = MoELayer(MadeUpRouter(dim=D), ExpertSpec(D, H), shared=Shared(), layer=3)
    context = TokenContext(batch_size=B, length=L)
    layer(torch.randn(B * L, D), context)
    assert seen[0][0] == (B, L, D) and seen[0][1].layer == 3, "the layer puts its own number into the noise's key"


def test_noise_differs_between_layers():
    x = tokens(2, 4, torch.float32)
    context = TokenContext.for_tokens(x, seed=0, step=0, sample_id=torch.arange(2))
    logits = []
    for number in (0, 1, 1):
        torch.manual_seed(0)
        router = create_router("topk", dim=D, num_experts=4, jitter=0.5)
        logits.append(MoELayer(router, ExpertSpec(D, H), layer=number)(x, context)[1].logits)
    assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[0], logits[1])


def test_what_does_not_fit_is_refused():
    layer, x = make(dtype=torch.float32), tokens(dtype=torch.float32)
    context = TokenContext.for_tokens(x)
    for wrong in (x[..., :4], x[:2], x.transpose(0, 1), x.flatten(), x[None], x.flatten(0, 1)[:5]):
        with pytest.raises(ValueError, match=r"x has shape .*: expected \[3, 7, 6\] or \[21, 6\], from the context"):
            layer(wrong, context)
    with pytest.raises(ValueError, match="made for tokens of width dim=6, the experts for dim=8"):
        MoELayer(MadeUpRouter(dim=6), ExpertSpec(8, H))
    with pytest.raises(ValueError, match='router "promoe" needs context.null_mask'):
        MoELayer(create_router("promoe", dim=D, num_experts=2), ExpertSpec(D, H))(x)


@pytest.mark.parametrize("num_tokens, bank_size", [(5, 2), (B * L, 3)])
def test_routings_that_do_not_fit_are_refused(num_tokens, bank_size):
    class Wrong(Router):
        evidence = "paper"

        def forward(self, x, context):
            index = torch.zeros(num_tokens, 1, dtype=torch.int64)
            return Routing.from_topk(index, torch.ones(num_tokens, 1), bank_size=bank_size)

    layer = MoELayer(Wrong(num_experts=2), ExpertSpec(D, H))
    message = f'"Wrong" returned a routing of {num_tokens} tokens over {bank_size} experts: expected 21 over 2'
    with pytest.raises(ValueError, match=message):
        layer(tokens(dtype=torch.float32))


def test_a_routing_of_nothing_is_refused():
    class Nothing(Router):
        evidence = "paper"

        def forward(self, x, context):
            return Routing(num_tokens=len(x), bank_size=2)

    with pytest.raises(ValueError, match="this routing holds no assignments"):
        MoELayer(Nothing(num_experts=2), ExpertSpec(D, H))(tokens(dtype=torch.float32))


def test_statistics_add_up_over_micro_batches_and_start_anew():
    layer, x = MoELayer(Counting(), ExpertSpec(D, H)), tokens(dtype=torch.float32)
    for values in ([1.0, 8.0, 0.0], [2.0, -5.0, 0.0], [6.0, 0.0, 0.0]):
        layer(x, TokenContext.for_tokens(x, timestep=torch.tensor(values)))
    model = nn.Sequential(nn.Linear(2, 2), layer)
    assert moe_layers(model) == [layer]
    finish_step(model)
    assert layer.router.seen == [
        {"total": [9.0, 3.0], "average": [3.0, 1.0], "highest": [6.0, 8.0], "whole": [3.0, 1.0]}
    ]
    finish_step(model)
    assert len(layer.router.seen) == 1, "nothing was accumulated since"
    layer(x, TokenContext.for_tokens(x, timestep=torch.tensor([5.0, 7.0, 0.0])))
    finish_step(model)
    assert layer.router.seen[1] == {name: [5.0, 7.0] for name in Counting.reductions}


def test_only_training_forwards_are_recorded():
    layer, x = MoELayer(Counting(), ExpertSpec(D, H)), tokens(dtype=torch.float32)
    context = TokenContext.for_tokens(x, timestep=torch.ones(B))
    with torch.no_grad():
        layer(x, context)
    layer.eval()(x, context)
    assert layer._accumulated == {}
    layer.train()(x, context)
    assert set(layer._accumulated) == set(Counting.reductions)
    assert not any(value.requires_grad for value, _ in layer._accumulated.values())


def test_a_statistic_without_a_reduction_is_refused():
    layer, x = MoELayer(Counting(), ExpertSpec(D, H)), tokens(dtype=torch.float32)
    layer.router.reductions = {"total": "median"}
    layer(x, TokenContext.for_tokens(x, timestep=torch.ones(B)))
    with pytest.raises(ValueError, match=r'Counting.reductions\["average"\]=None: choose one of'):
        finish_step(layer)


def test_state_that_is_never_updated_is_said_once(recwarn):
    router = create_router("topk", dim=D, num_experts=2, bias_rate=1e-3)
    layer, x = MoELayer(router, ExpertSpec(D, H)), tokens(1, 2, torch.float32)
    for _ in range(255):
        layer(x)
    assert not recwarn.list
    for _ in range(10):
        layer(x)
    assert [str(w.message) for w in recwarn.list if "finish_step" in str(w.message)][0].startswith(
        'router "topk" of layer 0'
    )
    assert len(recwarn.list) == 1
    stateless = MoELayer(create_router("topk", dim=D, num_experts=2), ExpertSpec(D, H))
    updated = MoELayer(create_router("topk", dim=D, num_experts=2, bias_rate=1e-3), ExpertSpec(D, H))
    for step in range(300):
        stateless(x), updated(x)
        if step % 100 == 0:
            finish_step(updated)
    assert len(recwarn.list) == 1


@pytest.mark.parametrize("case", LISTED, ids=repr)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_half_precision_follows_full(case, state_dtype):
    spec = ExpertSpec(case.width, 24, init_std=0.3)
    layer = MoELayer(case.create(), spec, shared=FeedForward(spec))
    half = copy.deepcopy(layer).to(state_dtype)
    half.router = copy.deepcopy(layer.router)
    x = case.tokens().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=state_dtype == torch.float32):
        y, routing = half(x.to(state_dtype), case.context)
        (y.float().square().mean() + routing.loss).backward()
    expected, reference = layer(x.float(), case.context)
    (expected.square().mean() + reference.loss).backward()
    assert torch.equal(routing.load_E(), reference.load_E()), "the router decides in float32"
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() < 0.03 * expected.abs().max()
    for (name, p), q in zip(half.named_parameters(), layer.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad.dtype == p.dtype
            assert (p.grad.float() - q.grad).norm() < 0.05 * q.grad.norm() + 1e-6, name


@pytest.mark.parametrize("case", [case for case in LISTED if case.name == "promoe"], ids=repr)
def test_compiled_layers_give_the_same(case):
    torch._dynamo.reset()
    spec = ExpertSpec(case.width, 8, bias=True)
    layer = MoELayer(case.create(), spec, shared=FeedForward(spec))
    batch = case.context.batch_size
    mask = torch.arange(8)[None] < torch.tensor([8, 5, 3])[:batch, None]
    context = resized(case.context, batch, 8, padding_mask=mask)
    x = case.tokens(context)

    def step(module):
        layer.zero_grad()
        y, routing = module(x, context)
        (y.square().sum() + routing.loss).backward()
        return y, {name: p.grad for name, p in layer.named_parameters()}

    expected, grads = step(layer)
    actual, compiled_grads = step(torch.compile(layer, backend="aot_eager"))
    assert_same(actual, expected, "output", 1e-5)
    assert_same(compiled_grads, grads, "gradient", 1e-5)
    finish_step(layer)


def test_leaving_the_meta_device():
    """Made without memory, moved, drawn: the same layer as one that was made there, with its experts still marked."""
    there = MoELayer(MadeUpRouter(dim=D), ExpertSpec(D, H, bias=True), seed=3, layer=2)
    for make_meta in (
        lambda: MoELayer(MadeUpRouter(dim=D), ExpertSpec(D, H, bias=True), seed=3, layer=2, device="meta"),
        lambda: MoELayer(
            MadeUpRouter(dim=D), ExpertSpec(D, H, bias=True), seed=3, layer=2, device=torch.device("meta")
        ),
    ):
        layer = make_meta().to_empty(device="cpu")
        layer.experts.reset_parameters()
        layer.local_experts.reset_parameters()
        layer.router.load_state_dict(there.router.state_dict())
        with torch.no_grad():
            layer.constants.zero_()
        x = tokens(dtype=torch.float32)
        assert torch.equal(layer(x)[0], there(x)[0])
        assert not list(layer.named_buffers())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: m.double(), lambda m: m.to("meta").to_empty(device="cpu")])
def test_the_expert_tag_survives(copied):
    layer = MoELayer(MadeUpRouter(dim=D), ExpertSpec(D, H))
    assert all(p.allreduce for p in layer.experts.parameters())
    twin = copied(nn.Sequential(layer))[0]
    assert all(p.allreduce for p in twin.experts.parameters())
    assert not any(
        hasattr(p, "allreduce") for p in itertools.chain(twin.router.parameters(), twin.local_experts.parameters())
    )


def test_state_dict_names():
    spec = ExpertSpec(D, H, bias=True)
    layer = MoELayer(MadeUpRouter(dim=D), spec, shared=FeedForward(spec))
    names = {name for name in layer.state_dict() if not name.startswith("router.")}
    assert names == {
        *(f"{bank}.{w}" for bank in ("experts", "local_experts") for w in ("w1", "w2", "w3")),
        *(f"shared.{part}.{w}" for part in ("up", "down") for w in ("weight", "bias")),
        "constants",
    }
    assert len(layer.experts.ids) == KINDS.count("routed") and layer.local_experts.ids == [2, 8]


def test_a_causal_model_refuses_a_router_that_looks_ahead():
    x = torch.randn(2, 6, D)
    context = TokenContext.for_tokens(x, causal=True)
    spec = ExpertSpec(D, H)
    refused = MoELayer(create_router("expert_choice", dim=D, num_experts=3), spec)
    with pytest.raises(ValueError, match='router "expert_choice" is not causal in training.*allow_noncausal=True'):
        refused(x, context)
    refused(x)
    with pytest.raises(ValueError, match="is not causal in evaluation"):
        refused.eval()(x, context)
    MoELayer(create_router("expert_choice", dim=D, num_experts=3), spec, allow_noncausal=True)(x, context)
    MoELayer(create_router("topk", dim=D, num_experts=3), spec)(x, context)


def test_local_experts_add_to_a_large_result():
    """More than a MiB: memory that a kernel keeps and gives out again may be no view, which autograd would guard."""
    layer = MoELayer(create_router("promoe", dim=128, num_experts=3), ExpertSpec(128, 64, "gelu", bias=True))
    x = torch.randn(4, 600, 128, requires_grad=True)
    context = TokenContext.for_tokens(x, null_mask=torch.tensor([True, False, False, False]))
    y, _ = layer(x, context)
    y.sum().backward()
    layer.backend = "reference"
    torch.testing.assert_close(y, layer(x, context)[0])
