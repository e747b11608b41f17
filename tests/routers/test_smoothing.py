"""What similarity- and attention-aware routing share: averages of any gate's scores, by which that gate assigns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import assert_same, attention_of, dense, resized

from gatewright.kernels.attention import AttentionWeights
from gatewright.moe import ExpertSpec, MoELayer, finish_step
from gatewright.routers import (
    GatedRouter,
    Routing,
    TokenContext,
    base,
    create_router,
    list_routers,
    register_router,
    router_class,
)
from gatewright.routers.smoothing import can_be_base

DIM, EXPERTS = 16, 6
NAMES = ("similarity_aware", "attention_aware")
BASES = {
    "softmax": {"base_options": {"balance_weight": 0.1, "z_weight": 0.1}, "top_k": 2},
    "renormalised": {"base_options": {"renormalise": True, "scale": 3.0}, "top_k": 3},
    "sigmoid, bias, groups": {"base": "deepseek_v3", "base_options": {"num_groups": 3, "top_groups": 2}, "top_k": 2},
    "square root of softplus": {"base_options": {"score": "sqrtsoftplus", "z_weight": 0.1}},
    "capacity": {"base": "switch", "base_options": {"capacity_factor": 0.6}},
    "softmax after": {"base_options": {"softmax_after": True, "balance_weight": 0.1, "z_weight": 0.1}, "top_k": 3},
    "jitter": {"base_options": {"jitter": 0.3}},
}

every_name = pytest.mark.parametrize("name", NAMES)
every_base = pytest.mark.parametrize("gate", BASES.values(), ids=BASES.keys())


def make(name, *, dtype=torch.float64, **options):
    """A router with parameters so large that experts differ."""
    torch.manual_seed(0)
    router = create_router(name, **{"dim": DIM, "num_experts": EXPERTS} | options)
    with torch.no_grad():
        for parameter in router.base.parameters():
            parameter.normal_()
    return router.to(dtype)


def batch(batch_size=2, length=9, *, causal=False, seed=0, **fields):
    """Tokens [T, D] and a context with an attention."""
    noise = {"seed": 0, "step": 0, "sample_id": torch.arange(batch_size)}
    context = TokenContext(batch_size=batch_size, length=length, **noise | fields)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size * length, DIM, generator=generator, dtype=torch.float64)
    return x, context.replace(attention=attention_of(context, causal=causal))


def matrix(router, x, context):
    """S of the router, [B, L, L], by averaging the rows of the identity."""
    eye = torch.eye(context.length, dtype=torch.float64).expand(context.batch_size, -1, -1)
    return router.average(x, eye, context.replace(cache=None))


def plain_scores(router, x, context):
    """[B, L, E]"""
    scores = router.base.scores(router.base.logits(x, context))
    return scores.view(context.batch_size, context.length, -1)


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


@every_name
@every_base
@pytest.mark.parametrize("blend", [1.0, 0.3])
def test_the_base_gate_assigns_by_the_average(name, gate, blend):
    router = make(name, blend=blend, **gate)
    x, context = batch()
    plain_BLE = plain_scores(router, x, context)
    smooth_TE = ((1 - blend) * plain_BLE + blend * matrix(router, x, context) @ plain_BLE).flatten(0, 1)
    routing = router(x, context)
    shares_TE = smooth_TE / smooth_TE.sum(1, keepdim=True)
    assert_same(routing.scores, shares_TE, "scores", 1e-12)
    assert_same(router.base.scores(routing.logits), smooth_TE, "scores of the logits", 1e-12)
    chosen_TK, weight_TK = routing.as_topk()
    if not gate.get("base_options", {}).get("num_groups"):
        requested_TK = chosen_TK if routing.requested is None else routing.requested
        assert_same(requested_TK, smooth_TE.topk(router.base.top_k).indices, "ids", 0)
    weight = smooth_TE.gather(1, chosen_TK.clamp(min=0))
    if router.base.softmax_after:
        weight = weight.log().softmax(1)
    if router.base.renormalise:
        weight = weight / weight.sum(1, keepdim=True)
    assert_same(weight_TK, (weight * router.base.scale).masked_fill(chosen_TK < 0, 0), "weights", 1e-12)
    if "balance" in routing.losses:
        ids = (chosen_TK if routing.requested is None else routing.requested).flatten()
        share_E = torch.bincount(ids, minlength=EXPERTS).double() / len(ids)
        balance = router.base.balance_weight * EXPERTS * (share_E * shares_TE.mean(0)).sum()
        assert_same(routing.losses["balance"], balance, "balance loss", 1e-12)


@every_name
@pytest.mark.parametrize("gate", ["softmax", "softmax after"])
def test_the_z_loss_is_that_of_the_plain_logits(name, gate):
    """Scores of a softmax do not tell the logits' level, which the z-loss holds down."""
    router = make(name, **BASES[gate])
    x, context = batch()
    x.requires_grad_()
    smooth = router(x, context).losses["z"]
    plain = router.base(x, context).losses["z"]
    assert_same(smooth, plain, "z-loss", 1e-12)
    parameters = [x, router.base.weight]
    assert_same(torch.autograd.grad(smooth, parameters), torch.autograd.grad(plain, parameters), "gradient", 1e-12)


@every_name
@every_base
def test_without_blend_it_is_the_base_gate_bit_for_bit(name, gate):
    router = make(name, blend=0.0, dtype=torch.float32, **gate)
    x, context = batch()
    x = x.float().requires_grad_()
    results = []
    for routing in (router(x, context), router.base(x, context)):
        loss = routing.as_list()[2].square().sum() + routing.loss
        grads = torch.autograd.grad(loss, [x, router.base.weight])
        results.append([dense(routing), routing.logits, routing.scores, *routing.losses.values(), *grads])
    assert_same(results[0], results[1], "without blend", 0)


@every_name
@every_base
def test_a_token_alone_is_decided_as_by_the_base_gate(name, gate):
    """S = 1: bit for bit what ranks and weighs; the logits are logarithms of it."""
    router = make(name, dtype=torch.float32, **gate)
    x, context = batch(12, 1) if name == "similarity_aware" else batch(8, 1)
    x = x.float()
    smooth, plain = router(x, context), router.base(x, context)
    exact = not router.base.softmax_after
    assert_same(smooth.scores, plain.scores, "scores", 0)
    assert_same(smooth.as_topk()[0], plain.as_topk()[0], "ids", 0)
    assert_same(smooth.as_topk()[1], plain.as_topk()[1], "weights", 0 if exact else 1e-6)
    assert_same(smooth.losses, plain.losses, "losses", 1e-5)


GATES = [name for name in list_routers() if can_be_base(name)]


@every_name
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_every_listed_gate_can_be_the_base(name, gate, training):
    """A token alone is decided as by the gate, by its own example; with others, as the gate's own checks see to."""
    cls, preset = router_class(gate)
    options, context = cls.example()
    size = {option: options[option] for option in ("dim", "num_experts")}
    rest = {option: value for option, value in options.items() if option not in size | preset}
    torch.manual_seed(0)
    router = create_router(name, base=gate, base_options=rest, **size).double().train(training)
    context = resized(context, 8, 1)
    context = context.replace(attention=attention_of(context, causal=False))
    x = torch.randn(8, size["dim"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    smooth, plain = router(x, context), router.base(x, context)
    assert_same(dense(smooth), dense(plain), "weights", 1e-9)
    assert_same(smooth.losses, plain.losses, "losses", 1e-9)
    assert_same(smooth.stats, plain.stats, "statistics", 1e-9)


@every_name
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(1, 12),
    causal=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_entropy_lies_between_its_bounds(name, seed, length, causal, scale):
    """sum_j S_ij H(r_j) <= H(r~_i) <= H(S_i) + sum_j S_ij H(r_j): concavity, and the entropy of (j, e) together."""
    router = make(name, causal=causal, top_k=1)
    x, context = batch(2, length, causal=causal, seed=seed)
    x = x * scale
    s_BLL, plain_BLE = matrix(router, x, context), plain_scores(router, x, context)
    torch.testing.assert_close(s_BLL.sum(2), torch.ones(2, length, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    smooth_BLE = router(x, context).scores.view_as(plain_BLE)
    lower_BL = (s_BLL @ entropy(plain_BLE)[:, :, None])[:, :, 0]
    assert (entropy(smooth_BLE) >= lower_BL - 1e-9).all()
    assert (entropy(smooth_BLE) <= lower_BL + entropy(s_BLL) + 1e-9).all()


@every_name
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 12), causal=st.booleans(), drift=st.floats(1e-3, 10.0))
def test_a_changed_gate_changes_averages_no_more_than_scores(name, seed, length, causal, drift):
    """max_i |r~_i - r~'_i|_1 <= max_j |r_j - r'_j|_1 for the same S."""
    router = make(name, causal=causal, top_k=1)
    x, context = batch(2, length, causal=causal, seed=seed)
    plain, smooth = plain_scores(router, x, context), router(x, context).scores
    with torch.no_grad():
        router.base.weight += drift * torch.randn(
            router.base.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    moved = (plain_scores(router, x, context) - plain).abs().sum(2).view(2, length).amax(1)
    moved_smooth = (router(x, context).scores - smooth).abs().sum(1).view(2, length).amax(1)
    assert (moved_smooth <= moved + 1e-12).all()


@every_name
def test_identical_tokens_decide_identically_and_as_without_the_average(name):
    router = make(name)
    x, context = batch(2, 9)
    x = x[:1].expand(18, -1)
    smooth, plain = router(x, context), router.base(x, context)
    assert_same(smooth.as_topk()[0], plain.as_topk()[0], "ids", 0)
    assert_same(dense(smooth), dense(plain), "weights", 1e-12)


@every_name
def test_state_moves_in_the_base_gate(name):
    """By update, and through a layer."""
    router = make(name, base="deepseek_v3", base_options={"bias_rate": 0.5}, dtype=torch.float32)
    x, context = batch()
    x = x.float()
    routing = router(x, context)
    assert router.stateful and router.reductions == {"load": "sum"}
    assert_same(routing.stats, {"load": routing.load_E()}, "statistics", 0)
    router.update(routing.stats)
    load_E = routing.load_E().float()
    assert_same(router.base.bias, 0.5 * (load_E.mean() - load_E).sign(), "bias", 0)

    router.base.bias.zero_()
    layer = MoELayer(router, ExpertSpec(DIM, 4))
    _, routing = layer(x.view(2, 9, DIM), context)
    finish_step(layer)
    assert_same(router.base.bias, 0.5 * (load_E.mean() - load_E).sign(), "bias after a step", 0)
    assert not make(name).stateful


@every_name
def test_any_gate_in_three_steps_can_be_the_base(name, monkeypatch):
    """One made up here, with an expert that costs nothing, noise, state and a loss of its own."""
    for registry in ("_routers", "_presets"):
        monkeypatch.setattr(base, registry, dict(getattr(base, registry)))

    @register_router("nearest")
    class Nearest(GatedRouter):
        evidence = "reconstruction"
        reductions = {"near": "mean"}

        def __init__(self, *, dim: int, num_experts: int, pull: float = 0.0) -> None:
            super().__init__(num_experts=num_experts, expert_kinds=("routed",) * num_experts + ("zero",))
            self.centre, self.pull = torch.nn.Parameter(torch.randn(num_experts + 1, dim)), pull
            self.register_buffer("shift", torch.zeros(()))

        @property
        def requires(self):
            return ("noise",) if self.training else ()

        def logits(self, x, context):
            distance = torch.cdist(x, self.centre.to(x.dtype))
            return -distance + (context.noise(*distance.shape) if self.training else 0)

        def scores(self, logits):
            return (logits + self.shift).exp()

        def logits_of(self, scores):
            return scores.log() - self.shift

        def assign(self, logits, scores, context):
            weight, index = scores.max(1, keepdim=True)
            return Routing.from_topk(
                index,
                weight,
                bank_size=self.bank_size,
                logits=logits,
                scores=scores / scores.sum(1, keepdim=True),
                losses={"pull": -self.pull * logits.mean()},
                stats={"near": weight.detach().mean()},
            )

        def update(self, stats):
            self.shift += stats["near"]

    router = make(name, base="nearest", base_options={"pull": 2.0})
    x, context = batch()
    assert router.expert_kinds == (*["routed"] * EXPERTS, "zero") and router.bank_size == EXPERTS + 1
    assert router.num_experts == EXPERTS
    assert "noise" in router.requires and "noise" not in router.eval().requires
    assert router.stateful and router.reductions == {"near": "mean"}
    routing, scores = router(x, context), plain_scores(router, x, context)
    smooth_TE = (matrix(router, x, context) @ scores).flatten(0, 1)
    assert_same(routing.as_topk()[1], smooth_TE.amax(1, keepdim=True), "weights", 1e-12)
    assert_same(routing.losses["pull"], -2 * smooth_TE.log().mean(), "loss", 1e-12)
    router.update(routing.stats)
    assert_same(router.base.shift, smooth_TE.amax(1).mean(), "state", 1e-12)
    assert "nearest" in list_routers()


@every_name
def test_it_says_what_its_base_gate_says_of_itself(name):
    router = make(name, base="remoe", base_options={"top_k": 1})
    assert router.loss_names == ("l1",) and router.state_names == ("base.coefficient",)
    assert set(router(*batch()).losses) == {"l1"} and "base.coefficient" in dict(router.named_buffers())
    assert make(name, base="deepseek_v3").state_names == type(router).state_names == ("base.bias",)
    assert make(name).without_gradient == ()


@every_name
def test_a_diverged_token_reaches_no_other_sample_and_no_earlier_token(name):
    router = make(name, causal=True)
    x, context = batch(3, 9, causal=True)
    before = dense(router(x, context)).view(3, 9, -1)
    x[9 + 4], x[9 + 6] = torch.nan, torch.inf
    after = dense(router(x, context)).view(3, 9, -1)
    assert_same(after[[0, 2]], before[[0, 2]], "other samples", 0)
    assert_same(after[1, :4], before[1, :4], "earlier tokens", 0)


@every_name
def test_other_bases_are_refused(name):
    for refused in ("promoe", "expert_choice", "similarity_aware"):
        with pytest.raises(ValueError, match=f'base="{refused}" does not decide by scores.*: choose one of .*topk'):
            make(name, base=refused)
    # its forward adds a loss of its own, which nobody would compute
    with pytest.raises(ValueError, match='base="noisy_topk" does not decide'):
        make(name, base="noisy_topk")
    with pytest.raises(ValueError, match='unknown router "topq": did you mean topk'):
        make(name, base="topq")
    with pytest.raises(ValueError, match='router "topk" has no option "scoer": did you mean score'):
        make(name, base_options={"scoer": "sigmoid"})
    with pytest.raises(ValueError, match="base_options=.*dim, top_k.*of the router itself"):
        make(name, base_options={"top_k": 3, "dim": 4}, top_k=2)
    with pytest.raises(ValueError, match="top_k=7 with 6 experts"):
        make(name, top_k=7)


@every_name
@pytest.mark.parametrize("blend", [-0.1, 1.1, math.nan])
def test_a_blend_is_a_share(name, blend):
    with pytest.raises(ValueError, match="blend=.*choose 0 .* to 1"):
        make(name, blend=blend)


@every_name
def test_options_of_the_base_gate_stay_its_own(name):
    assert make(name).base.top_k == 2 and make(name, base="switch").base.top_k == 1
    assert make(name, base="switch", top_k=3).base.top_k == 3
    assert not make(name, causal=True, base_options={"capacity_factor": 1.0, "drop_policy": "probability"}).causal
    assert make(name, causal=True).causal and not make(name).causal
    assert make(name).batch_independent and not make(name, base="switch").batch_independent


@every_name
def test_a_causal_model_is_told_of_the_option(name):
    x, context = batch(causal=True)
    with pytest.raises(ValueError, match="not causal in training with these options.*Make it with causal=True"):
        make(name)(x, context.replace(causal=True))
    make(name, causal=True)(x, context.replace(causal=True))


@every_name
def test_a_cache_is_for_decoding_left_to_right(name):
    x, context = batch(causal=True)
    context = context.replace(cache={})
    with pytest.raises(ValueError, match=f'router "{name}" got a context.cache, .*: call model.eval'):
        make(name, causal=True)(x, context)
    x, context = batch()
    with pytest.raises(ValueError, match="which is for decoding left to right: make the router with causal=True"):
        make(name).eval()(x, context.replace(cache={}))


@every_name
def test_a_cache_of_other_samples_is_refused(name):
    router, cache = make(name, causal=True).eval(), {}
    x, context = batch(3, 4, causal=True)
    router(x, context.replace(cache=cache))
    x, context = batch(2, 1, causal=True)
    with pytest.raises(ValueError, match=rf'context.cache\["{name}.0"\] holds 3 samples, and the batch has 2: select'):
        router(x, context.replace(cache=cache))


@every_name
def test_layers_keep_apart_in_one_cache(name):
    """Two layers of one model, decoding through the layers: the outputs of one call over all tokens."""
    spec = ExpertSpec(DIM, 4)
    layers = [MoELayer(make(name, causal=True), spec, layer=i).double().eval() for i in range(2)]
    x, context = batch(2, 6, causal=True)
    x, context, cache = x.view(2, 6, DIM), context.replace(causal=True), {}

    def model(x, context):
        for layer in layers:
            x = x + layer(x, context)[0]
        return x

    whole, attention, parts = model(x, context), context.attention, []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        q, k, v = attention.q[:, :, start:end], attention.k[:, :, :end], attention.v[:, :, :end]
        so_far = AttentionWeights(q, k, causal=True, v=v, w_out=attention.w_out)
        now = TokenContext(batch_size=2, length=end - start, causal=True, attention=so_far, cache=cache)
        parts.append(model(x[:, start:end], now))
    assert_same(torch.cat(parts, dim=1), whole, "output", 1e-12)
    assert cache.keys() == {f"{name}.0", f"{name}.1"}
