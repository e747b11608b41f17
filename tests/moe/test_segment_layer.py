"""Feed-forwards on segments against what the paper's code computed, against loops, and inside both layers."""

import copy

import pytest
import torch
import torch.distributed as dist
from distributed import ranks  # noqa: F401  a fixture
from golden import assert_equal, load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import assert_same
from torch import nn

from gatewright.kernels.activation import activate
from gatewright.moe import ExpertParallel, ExpertSpec, MoELayer, finish_step
from gatewright.moe.parallel import is_expert_parameter, sync_gradients
from gatewright.moe.segment import SegmentFeedForward, SegmentMoELayer, segment_spec
from gatewright.routers import TokenContext, create_router

D, H, E = 4, 6, 4
D64 = torch.float64
VARIANTS = ("positionwise", "concat", "projected")
variants = pytest.mark.parametrize("variant", VARIANTS)


def make(variant, s=3, *, spec=None, shared=True, top_k=2, dtype=D64, parallel=None, match=False, **options):
    spec = spec or ExpertSpec(D, H)
    torch.manual_seed(0)
    widths = {"positionwise": D, "concat": s * D, "projected": D}
    size = s if variant == "positionwise" else 1
    router = create_router("segment", dim=widths[variant], num_experts=E, segment_size=size, top_k=top_k, **options)
    if variant == "positionwise":
        own = SegmentFeedForward(spec, s, match_parameters=match) if shared else None
        layer = MoELayer(router, spec, shared=own, parallel=parallel)
    else:
        layer = SegmentMoELayer(
            router,
            spec,
            segment_size=s,
            variant=variant,
            shared_expert=shared,
            match_parameters=match,
            parallel=parallel,
        )
    layer = layer.to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.endswith("w3"):  # which nothing reads without biases
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return layer


def inner(layer):
    return layer if isinstance(layer, MoELayer) else layer.moe


def tokens(batch_size=2, length=8, seed=1, dtype=D64):
    return torch.randn(batch_size, length, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(layer, compute, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, loss = compute(x)
    ((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() + loss).backward()
    own = {name: p.grad for name, p in layer.named_parameters() if not name.endswith("w3")}
    return y.detach(), {"x": x.grad} | own


def run(layer, x, **fields):
    y, routing = layer(x, TokenContext.for_tokens(x, **fields))
    return y, routing.loss


# ---- what the paper's code computed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["segmoe_s3_top1", "segmoe_s1_top2_glu"])
def test_golden(name, backend):
    case, meta = load_golden(name)
    dim, size, glu = int(meta["C"]), int(meta["segment"]), meta["glu"] == "True"
    spec = ExpertSpec(dim, int(meta["F"]), activation="swiglu" if glu else "gelu")
    router = create_router(
        "segment", dim=dim, num_experts=int(meta["E"]), segment_size=size, top_k=int(meta["K"]), balance_weight=0.0
    )
    layer = MoELayer(router, spec, shared=SegmentFeedForward(spec, size), backend=backend).double()
    shared = layer.shared

    def matrices(kind):
        """Where each of the released matrices is here; SiLU is of ``up_proj`` there, of the gate rows here."""
        feed_forwards = {"shared_expert": (shared.feed_forward.up.weight, shared.feed_forward.down.weight)}
        for expert in range(router.num_experts):
            feed_forwards[f"experts.{expert}.1"] = (layer.experts.w1, layer.experts.w2, expert)
        for prefix, (up, down, *row) in feed_forwards.items():
            up, down = (p.grad if kind == "grad" else p for p in (up, down))
            up, down = (up[row[0]], down[row[0]]) if row else (up, down)
            parts = up.chunk(2) if glu else (up,)
            yield from zip((f"{prefix}.up_proj", f"{prefix}.gate_proj"), parts, strict=False)
            yield f"{prefix}.down_proj", down
        for prefix, parameter in (("gating", router.weight), ("shared_gating", shared.gate.weight)):
            yield prefix, parameter.grad if kind == "grad" else parameter

    with torch.no_grad():
        for where, value in matrices("param"):
            value.copy_(case[f"param.{where}.weight"])
    x = case["x"].clone().requires_grad_()
    y, routing = layer(x)
    assert_equal(y, case["y"], "output")
    p_SE = case["router_probs"]
    assert_equal(routing.prediction[0], p_SE, "probabilities of the segments")
    expected = p_SE.topk(int(meta["K"])).indices.view(len(x), -1, router.top_k).repeat_interleave(size, 1)
    assert torch.equal(routing.index.view(*x.shape[:2], -1), expected[:, : x.shape[1]])
    y.square().mean().backward()
    assert_equal(x.grad, case["grad_x"], "gradient of x")
    compared = set()
    for where, grad in matrices("grad"):
        assert_equal(grad, case[f"grad.{where}.weight"], f"gradient of {where}")
        compared.add(f"grad.{where}.weight")
    assert compared == {key for key in case if key.startswith("grad.")}
    assert router.weight.grad.abs().max() > 1e-6, "the task trains the router"


# ---- loops -----------------------------------------------------------------------------------------------------------


def feed_forward(z, w_in, w_out, spec):
    return w_out @ activate((w_in @ z)[None], spec.activation)[0]


def segment_by_segment(layer, variant, s, x_BLD, mask_BL):
    """The layer from the formulas alone: output, and the balance loss."""
    moe = inner(layer)
    w_router, spec, bank = moe.router.weight, moe.spec, moe.experts
    rows, counts, ps = [], torch.zeros(E, dtype=D64), []
    for b in range(len(x_BLD)):
        for start in range(0, x_BLD.shape[1], s):
            place = range(start, min(start + s, x_BLD.shape[1]))
            real = [t for t in place if mask_BL[b, t]]
            own = [x_BLD[b, t] if t in real else x_BLD.new_zeros(D) for t in range(start, start + s)]
            z = torch.cat(own)
            if not real:
                rows += [x_BLD.new_zeros(D)] * len(place)
                continue
            if variant == "projected" and s > 1:
                z = layer.in_proj.weight @ z
            p = (w_router @ z).softmax(0)
            chosen = sorted(range(E), key=lambda e: -p[e].item())[: moe.router.top_k]
            counts[chosen] += 1
            ps.append(p)
            total = sum(p[e] for e in chosen) if len(chosen) > 1 else 1
            if variant == "positionwise":
                y = torch.cat(
                    [sum(p[e] / total * feed_forward(v, bank.w1[e], bank.w2[e], spec) for e in chosen) for v in own]
                )
            else:
                y = sum(p[e] / total * feed_forward(z, bank.w1[e], bank.w2[e], spec) for e in chosen)
            if moe.shared is not None:
                ff = moe.shared.feed_forward
                always = feed_forward(z, ff.up.weight, ff.down.weight, ff.spec)
                y = y + always * torch.sigmoid(moe.shared.gate.weight[0] @ z)
            if variant == "projected" and s > 1:
                y = layer.out_proj.weight @ y
            for t, part in zip(place, y.split(D), strict=False):
                rows.append(part if t in real else x_BLD.new_zeros(D))
    loss = moe.router.balance_weight * E * (counts / counts.sum() * torch.stack(ps).mean(0)).sum()
    return torch.stack(rows).view(x_BLD.shape), loss


@variants
@pytest.mark.parametrize(
    "s, top_k, shared, activation, match",
    [
        (3, 1, True, "gelu", False),
        (3, 2, False, "swiglu", False),
        (1, 2, True, "swiglu", False),
        (11, 2, True, "gelu", False),
        (2, 2, True, "swiglu", True),
    ],
)
def test_equals_its_definition(variant, s, top_k, shared, activation, match):
    match = match and variant != "projected"
    layer = make(variant, s, spec=ExpertSpec(D, H, activation), shared=shared, top_k=top_k, match=match)
    x = tokens(3)
    mask = torch.tensor([[1] * 8, [1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]]).bool()
    slow, slow_grads = gradients(layer, lambda x: segment_by_segment(layer, variant, s, x, mask), x)
    fast, fast_grads = gradients(layer, lambda x: run(layer, x, padding_mask=mask), x)
    assert_same(fast, slow, "output", 1e-12)
    for name, expected in slow_grads.items():
        expected = torch.zeros_like(fast_grads[name]) if expected is None else expected
        assert_same(fast_grads[name], expected, f"gradient of {name}", 1e-11)
    flat, _ = run(layer, x, padding_mask=mask)
    context = TokenContext.for_tokens(x, padding_mask=mask)
    assert_same(layer(x.flatten(0, 1), context)[0], flat.flatten(0, 1), "[T, D]", 0)


def test_segments_of_one_token_are_the_same_layer_three_times():
    layers = {variant: make(variant, 1) for variant in VARIANTS}
    x = tokens()
    for variant in ("concat", "projected"):
        assert layers[variant].in_proj is None and layers[variant].out_proj is None
        inner(layers[variant]).load_state_dict(layers["positionwise"].state_dict())
        assert_same(layers[variant](x)[0], layers["positionwise"](x)[0], variant, 1e-14)


def test_only_the_shared_expert_mixes_the_tokens_of_a_segment():
    """A router that cannot tell the places of a segment decides alike for a permuted one: then routed outputs permute
    with it, and the shared expert's do not."""
    x, order = tokens(2, 9), torch.tensor([2, 0, 1, 5, 4, 3, 6, 8, 7])
    for shared, permutes in ((False, True), (True, False)):
        layer = make("positionwise", 3, shared=shared)
        with torch.no_grad():
            layer.router.weight.view(E, 3, D).copy_(layer.router.weight.view(E, 3, D)[:, :1].expand(-1, 3, -1).clone())
        y, permuted = layer(x)[0], layer(x[:, order])[0]
        assert torch.allclose(permuted, y[:, order], atol=1e-12) == permutes
    layer = make("concat", 3, shared=False)
    assert not torch.allclose(layer(x[:, order])[0], layer(x)[0][:, order], atol=1e-3)


def test_time_moe():
    """Token choice of 2 of E without renormalisation, SwiGLU experts of half the width of the shared one, which a
    sigmoid gates; the released loss is 0.02 E sum over slots and experts of f P."""
    torch.manual_seed(0)
    router = create_router("time_moe", dim=D, num_experts=E)
    layer = MoELayer(router, ExpertSpec(D, H // 2), shared=SegmentFeedForward(ExpertSpec(D, H), 1)).double()
    x = tokens(1, 9)
    y, routing = layer(x, TokenContext.for_tokens(x, causal=True))
    bank, shared = layer.experts, layer.shared
    slots = torch.zeros(2, E, dtype=D64)
    for t, token in enumerate(x[0]):
        p = (router.weight @ token).softmax(0)
        expected = shared.feed_forward(token) * torch.sigmoid(shared.gate.weight[0] @ token)
        for slot, e in enumerate(sorted(range(E), key=lambda e: -p[e].item())[:2]):
            gate, up = (bank.w1[e] @ token).chunk(2)
            expected = expected + p[e] * (bank.w2[e] @ (nn.functional.silu(gate) * up))
            slots[slot, e] += 1 / 9
        assert_same(y[0, t], expected, f"token {t}", 1e-12)
    assert_same(routing.loss, 0.02 * E * (slots * routing.scores.mean(0)).sum(), "balance loss", 1e-12)


# ---- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(variant=st.sampled_from(VARIANTS), s=st.integers(1, 5), length=st.integers(1, 9), more=st.integers(0, 6))
def test_a_tail_is_padded_with_zeros_and_cut(variant, s, length, more):
    layer, x = make(variant, s), tokens(2, length)
    y, loss = run(layer, x)
    explicit, _ = run(layer, torch.cat([x, x.new_zeros(2, -length % s, D)], 1))
    assert_same(explicit[:, :length], y, "explicit zeros", 1e-13)
    padded = torch.cat([x, x.new_full((2, more, D), torch.nan)], 1)
    mask = (torch.arange(length + more) < length).expand(2, -1)
    long, long_loss = run(layer, padded, padding_mask=mask)
    assert_same(long[:, :length], y, "padding", 1e-13)
    assert (long[:, length:] == 0).all()
    assert_same(long_loss, loss, "loss", 1e-13)


@variants
def test_padding_may_hold_anything(variant):
    layer, x = make(variant), tokens(3)
    mask = torch.tensor([[1] * 8, [1, 0, 1, 0, 0, 0, 1, 1], [0] * 8]).bool()
    results = [
        gradients(layer, lambda x: run(layer, x, padding_mask=mask), x.masked_fill(~mask[..., None], dirt))
        for dirt in (0, torch.nan, torch.inf)
    ]
    for y, grads in results:
        assert (y[~mask] == 0).all() and (grads["x"][~mask] == 0).all()
        assert_same(y, results[0][0], "output", 0)
        assert_same(grads, results[0][1], "gradient", 0)


@variants
@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (2, 4)], ids=["no sample", "no length", "all padded"])
def test_without_a_real_token(variant, shape):
    layer, x = make(variant), tokens(*shape)
    mask = torch.zeros(shape, dtype=torch.bool) if shape == (2, 4) else None
    y, grads = gradients(layer, lambda x: run(layer, x, padding_mask=mask), x)
    assert y.shape == x.shape and (y == 0).all()
    assert all((grad == 0).all() for grad in grads.values())


def test_a_router_of_any_kind_decides_for_segments():
    """With state that moves, and with a label of the sample; what belongs to single tokens is not handed on."""
    seen = []

    class Listening(nn.Module):
        def forward(self, x, context):
            seen.append(context)
            return torch.zeros_like(x)

    torch.manual_seed(0)
    options = {"segment_size": 3, "variant": "concat", "layer": 5}
    router = create_router("topk", dim=3 * D, num_experts=E, bias_rate=0.1)
    layer, x = SegmentMoELayer(router, ExpertSpec(D, H), **options), tokens(dtype=torch.float32)
    layer.moe.shared = Listening()
    fields = {name: torch.zeros(2, 8, dtype=torch.int64) for name in ("token_ids", "position", "document", "modality")}
    fields |= {"grid": (2, 4), "attention": object(), "previous_logits": torch.zeros(16, E), "cache": object()}
    context = TokenContext.for_tokens(x, timestep=torch.tensor([1.0, 2.0]), **fields)
    y, routing = layer(x, context)
    y.sum().backward()
    assert (routing.num_tokens, seen[0].length, seen[0].layer) == (6, 3, 5)
    assert torch.equal(seen[0].timestep, context.timestep) and not any(seen[0].has(name) for name in fields)
    finish_step(nn.Sequential(layer))
    assert router.bias.abs().max() > 0

    promoe = create_router("promoe", dim=3 * D, num_experts=E)
    layer = SegmentMoELayer(promoe, ExpertSpec(D, H), shared_expert=False, **options)
    _, routing = layer(x, TokenContext.for_tokens(x, null_mask=torch.tensor([False, True])))
    assert (routing.index.view(2, 3)[1] == E).all() and (routing.index.view(2, 3)[0] < E).all()


def test_matched_parameters():
    """A shared expert on segments has s^2 as many weights; with the hidden width H / s those of one token."""
    for activation, matrices in (("gelu", 2), ("swiglu", 3)):
        spec = ExpertSpec(8, 12, activation)
        for s in (1, 2, 3, 4):
            free = SegmentFeedForward(spec, s)
            matched = SegmentFeedForward(spec, s, match_parameters=True)
            count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("free", free), ("matched", matched))}
            assert count["free"] == matrices * s**2 * 8 * 12 + s * 8
            assert count["matched"] == spec.num_parameters + s * 8
            assert matched.feed_forward.spec.hidden == 12 // s
    assert segment_spec(ExpertSpec(8, 12), 5, match_parameters=True).hidden == 2, "rounded"
    assert segment_spec(ExpertSpec(8, 3), 7, match_parameters=True).hidden == 1
    # the paper's example: C = 256, F = 512, without gated activation
    assert 6.55e6 < SegmentFeedForward(ExpertSpec(256, 512, "gelu"), 5, device="meta").feed_forward.spec.num_parameters

    sizes = {s: make("concat", s, spec=ExpertSpec(D, 12), match=True).moe.experts for s in (1, 2, 3)}
    assert {bank.w1.numel() + bank.w2.numel() for bank in sizes.values()} == {E * ExpertSpec(D, 12).num_parameters}


def test_the_initial_weights():
    torch.manual_seed(0)
    xavier = SegmentFeedForward(ExpertSpec(32, 64, "gelu"), 4)
    for weight in (xavier.feed_forward.up.weight, xavier.feed_forward.down.weight, xavier.gate.weight):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    router = create_router("segment", dim=32, num_experts=E, segment_size=1)
    layer = SegmentMoELayer(
        router, ExpertSpec(32, 64, "gelu", bias=True, init_std=0.1), segment_size=4, variant="projected"
    )
    for linear in (layer.in_proj, layer.out_proj):
        assert 0.09 < linear.weight.std() < 0.11 and (linear.bias == 0).all()


def test_a_model_that_decodes_left_to_right_is_refused():
    x = tokens(1, 6)
    context = TokenContext.for_tokens(x, causal=True)
    later = x.clone()
    later[:, 5] += 1
    for variant in VARIANTS:
        with pytest.raises(ValueError, match="is not causal"):
            make(variant)(x, context)
    layer = make("positionwise", shared=False, shifted=True)
    assert_same(layer(later, context)[0][:, :5], layer(x, context)[0][:, :5], "routed, and shifted: causal", 0)

    layer = make("positionwise", shifted=True)
    with pytest.raises(ValueError, match="SegmentFeedForward is not causal with segment_size=3: a token sees"):
        layer(x, context)
    layer.shared.allow_noncausal = True
    assert not torch.equal(layer(later, context)[0][:, 3:5], layer(x, context)[0][:, 3:5])

    layer = make("concat")
    with pytest.raises(ValueError, match="SegmentMoELayer is not causal with segment_size=3"):
        layer(x, context)
    router = create_router("expert_choice", dim=3 * D, num_experts=E)
    allowed = SegmentMoELayer(router, ExpertSpec(D, H), segment_size=3, variant="concat", allow_noncausal=True)
    assert allowed(x.float(), context)[0].shape == x.shape
    assert make("concat", 1)(x, context)[0].shape == x.shape


def test_what_does_not_fit_is_refused():
    router = create_router("segment", dim=D, num_experts=E, segment_size=1)
    spec = ExpertSpec(D, H)
    with pytest.raises(ValueError, match='variant="positionwise": choose one of .* is a MoELayer with the router'):
        SegmentMoELayer(router, spec, segment_size=3, variant="positionwise")
    with pytest.raises(ValueError, match='match_parameters=True with variant="projected"'):
        SegmentMoELayer(router, spec, segment_size=3, variant="projected", match_parameters=True)
    with pytest.raises(ValueError, match="made for tokens of width dim=4, the experts for dim=12"):
        SegmentMoELayer(router, spec, segment_size=3, variant="concat")
    for size in (0, 1.5):
        with pytest.raises(ValueError, match="choose a whole number of at least 1"):
            SegmentFeedForward(spec, size)
        with pytest.raises(ValueError, match="choose a whole number of at least 1"):
            SegmentMoELayer(router, spec, segment_size=size, variant="projected")
    layer = make("concat")
    for wrong in (tokens()[..., :3], tokens()[:1]):
        with pytest.raises(ValueError, match=r"x has shape .*: expected \[2, 8, 4\] or \[16, 4\], from the context"):
            layer(wrong, TokenContext(batch_size=2, length=8))


# ---- dtypes, compilation, ranks --------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_half_precision_follows_full(variant, autocast):
    layer, x = make(variant, dtype=torch.float32), tokens(4, 9, dtype=torch.float32).bfloat16().float()
    half = copy.deepcopy(layer)
    if not autocast:
        half = half.bfloat16()
        inner(half).router = copy.deepcopy(inner(layer).router)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, routing = half(x if autocast else x.bfloat16())
        (y.float().square().mean() + routing.loss).backward()
    expected, reference = layer(x)
    (expected.square().mean() + reference.loss).backward()
    if variant != "projected":  # whose router sees what a bfloat16 product made
        assert torch.equal(routing.load_E(), reference.load_E())
        assert (y.float() - expected).abs().max() < 0.03 * expected.abs().max()
    for (name, p), q in zip(half.named_parameters(), layer.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad.dtype == p.dtype and p.grad.isfinite().all(), name


@pytest.mark.parametrize("variant", ["positionwise", "projected"])
def test_compiled_layers_give_the_same(variant):
    torch._dynamo.reset()
    layer, x = make(variant, dtype=torch.float32), tokens(2, 8, dtype=torch.float32)
    mask = torch.arange(8)[None] < torch.tensor([8, 4])[:, None]
    expected = gradients(layer, lambda x: run(layer, x, padding_mask=mask), x)
    compiled = torch.compile(layer, backend="aot_eager")
    actual = gradients(layer, lambda x: run(compiled, x, padding_mask=mask), x)
    assert_same(actual[0], expected[0], "output", 1e-5)
    assert_same(actual[1], expected[1], "gradient", 1e-5)


def train(variant, parallel, mine, steps=3):
    layer = make(variant, parallel=parallel)
    banks = inner(layer).experts
    whole = make(variant)
    with torch.no_grad():
        for name in ("w1", "w2"):
            getattr(banks, name).copy_(getattr(inner(whole).experts, name)[banks.ids])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    outputs = {}
    for step in range(steps):
        optimizer.zero_grad()
        for number in mine:
            x = tokens(2, 7, seed=10 * step + number)
            mask = torch.arange(7)[None] < torch.tensor([7, number + 1])[:, None]
            y, loss = run(layer, x, padding_mask=mask)
            ((y.square().mean() + loss) / len(mine)).backward()
            outputs[step, number] = y.detach()
        sync_gradients(layer, parallel)
        optimizer.step()
    return outputs, layer


def follows_one_process():
    rank = dist.get_rank()
    for variant in VARIANTS:
        for size in (1, 2):
            parallel = ExpertParallel.create(size)
            outputs, layer = train(variant, parallel, [2 * rank, 2 * rank + 1])
            alone, dist.is_initialized = dist.is_initialized, lambda: False
            try:
                expected, reference = train(variant, ExpertParallel(), range(4))
            finally:
                dist.is_initialized = alone
            what = f"{variant}, EP={size}"
            assert_same(outputs, {key: expected[key] for key in outputs}, f"{what}: outputs", 1e-10)
            for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
                if is_expert_parameter(p) and size == 2:
                    q = q[inner(layer).experts.ids]
                assert_same(p, q, f"{what}: {name}", 1e-10)


@pytest.mark.distributed
def test_two_ranks_follow_one_process(ranks):  # noqa: F811
    ranks(2).run(follows_one_process)
