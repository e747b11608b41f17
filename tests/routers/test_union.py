"""Union of Experts against a token-by-token definition, its limits, and what its gates let through."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewright.moe import ExpertSpec, FeedForward, MoELayer, upcycle
from gatewright.routers import TokenContext, create_router

D, E, B, L = 6, 4, 3, 11


def create(seed=0, **options):
    torch.manual_seed(seed)
    router = create_router("union", **{"dim": D, "num_experts": E} | options).double()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def tokens(seed=1, count=B * L):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(batch_size, length, seed):
    mask = torch.rand(batch_size, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    return TokenContext(batch_size=batch_size, length=length, padding_mask=mask)


def by_definition(router, x_TD, context):
    """{(token, expert): weight}, one sample, patch and expert after the other."""
    o, length = router.options, context.length
    real = torch.ones(context.num_tokens, dtype=torch.bool) if context.real_T is None else context.real_T
    samples = [[t for t in range(b * length, (b + 1) * length) if real[t]] for b in range(context.batch_size)]
    weight, bias = router.linear.weight, router.linear.bias
    patches, gates = [], []  # of each sample: lists of tokens, and their g [E]
    for sample in samples:
        if o["choice"] == "expert":
            flat = torch.cat([x_TD[t] for t in sample] + [x_TD.new_zeros((o["length"] - len(sample)) * D)])
            patches.append([sample] if sample else [])
            gates.append([(weight @ flat + bias).softmax(0)])
            continue
        cut = [sample[i : i + o["patch"]] for i in range(0, len(sample), o["patch"])]
        patches.append(cut)
        gates.append([sum(weight @ x_TD[t] + bias for t in patch).div(len(patch)).softmax(0) for patch in cut])
    asked = [[set(g.topk(o["top_k"]).indices.tolist()) for g in sample] for sample in gates]
    if o["choice"] == "data":
        taken = quota_choice(o["quota"], gates, asked)
    else:
        taken = asked
    pairs = {}
    for sample, its_gates, its_taken in zip(patches, gates, taken, strict=True):
        for patch, g, experts in zip(sample, its_gates, its_taken, strict=False):
            for t in patch:
                for e in experts:
                    if o["gate"] == "faithful":
                        pairs[t, e] = torch.ones((), dtype=torch.float64)
                    elif o["gate"] == "ste":
                        pairs[t, e] = 1 + g[e] - g[e].detach()
                    else:
                        pairs[t, e] = len(experts) * g[e] / sum(g[i] for i in experts)
    return pairs


def quota_choice(quota, gates, asked):
    """Of each sample and patch, the experts that took it."""
    gates = [[g.detach() for g in sample] for sample in gates]
    taken = [[set() for _ in sample] for sample in gates]
    most = max((sum(e in a for a in sample) for sample in asked for e in range(E)), default=0)
    for b, sample in enumerate(gates):
        count = {"half": int(0.5 * len(sample)), "max": most, "max_60": min(most, int(0.6 * len(sample)))}[quota]
        for e in range(E):
            rank = []
            for m, g in enumerate(sample):
                batch = sum(float(gates[i][m][e]) for i in range(len(gates)) if m < len(gates[i]) and e in asked[i][m])
                rank.append((-float(g[e]) / (batch + 1e-8) if e in asked[b][m] else 0.0, m))
            for _, m in sorted(rank)[:count]:
                taken[b][m].add(e)
    return taken


VARIANTS = [
    *({"quota": quota, "gate": "ste", "top_k": k} for quota in ("half", "max", "max_60") for k in (1, 3)),
    *({"quota": quota, "gate": "weighted", "patch": 3} for quota in ("half", "max", "max_60")),
    {"gate": "faithful", "patch": 4},
    *({"choice": "per_token", "gate": gate} for gate in ("faithful", "ste", "weighted")),
    {"choice": "per_token", "gate": "weighted", "patch": 4},
    *({"choice": "expert", "length": L + 2, "gate": gate, "top_k": 3} for gate in ("faithful", "ste", "weighted")),
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("mask_seed", [None, 2], ids=["full", "padded anywhere"])
def test_equals_its_definition(options, mask_seed):
    router, x = create(**options), tokens().requires_grad_()
    context = TokenContext(batch_size=B, length=L) if mask_seed is None else padded(B, L, mask_seed)
    expected = by_definition(router, x, context)
    routing = router(x, context)
    token, expert, weight = routing.as_list()
    got = dict(zip(zip(token.tolist(), expert.tolist(), strict=True), weight, strict=True))
    assert got.keys() == expected.keys() and expected
    factor = {pair: torch.sin(torch.tensor(1.0 + 2 * pair[0] + pair[1])) for pair in expected}
    ours, theirs = (sum(factor[pair] * value for pair, value in pairs.items()) for pairs in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for pair, value in expected.items():
        torch.testing.assert_close(got[pair], value, rtol=1e-12, atol=1e-12)
    if options["gate"] == "faithful":
        assert not ours.requires_grad and router.without_gradient == ("weights", "tokens", "linear")
        return
    inputs = [x, *router.parameters()]
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("choice", ["data", "per_token", "expert"])
def test_only_faithful_gives_the_gate_nothing(choice):
    length = {"length": L} if choice == "expert" else {}
    for gate in ("faithful", "ste", "weighted"):
        router = create(choice=choice, gate=gate, **length)
        layer = MoELayer(router, ExpertSpec(D, 5, init_std=0.5)).double()
        x = tokens().requires_grad_()
        y, routing = layer(x.view(B, L, D))
        y.square().sum().backward()
        gradient = router.linear.weight.grad
        if gate == "faithful":
            assert gradient is None or (gradient == 0).all()
            assert (routing.as_list()[2] == 1).all()
        else:
            assert gradient.abs().max() > 0
        if gate == "ste":
            assert (routing.as_list()[2] == 1).all()
        assert x.grad.abs().max() > 0 and routing.losses == {} and layer.experts.w1.grad.abs().max() > 0


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    "options",
    [{"choice": "per_token"}, {"choice": "per_token", "patch": 4}, {"choice": "expert", "length": L}, {"quota": "max"}],
    ids=["token", "patch", "sample", "data"],
)
@pytest.mark.parametrize("gate", ["faithful", "ste"])
def test_all_experts_on_are_the_feed_forward_they_were_cut_from(options, gate, activation):
    torch.manual_seed(0)
    dense = FeedForward(ExpertSpec(D, 8, activation=activation, bias=True)).double()
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    router = create(top_k=E, gate=gate, **options)
    layer = MoELayer(router, ExpertSpec(D, 8 // E, activation=activation, bias=True)).double()
    upcycle(layer, dense, how="slices")
    x = tokens().view(B, L, D).requires_grad_()
    y, expected = layer(x)[0], dense(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    gradient, dense_gradient = (torch.autograd.grad(v.sin().sum(), x)[0] for v in (y, expected))
    if gate == "faithful":  # the straight-through one has the gate's besides
        torch.testing.assert_close(gradient, dense_gradient, rtol=1e-9, atol=1e-10)


def test_a_uniform_weighted_gate_is_the_feed_forward_too():
    torch.manual_seed(0)
    dense = FeedForward(ExpertSpec(D, 8)).double()
    router = create(top_k=E, gate="weighted", choice="per_token")
    nn.init.zeros_(router.linear.weight), nn.init.zeros_(router.linear.bias)
    layer = MoELayer(router, ExpertSpec(D, 2)).double()
    upcycle(layer, dense, how="slices")
    x = tokens().view(B, L, D)
    torch.testing.assert_close(layer(x)[0], dense(x), rtol=1e-12, atol=1e-12)


def test_the_order_of_experts_changes_nothing():
    router, x = create(gate="ste"), tokens()
    layer = MoELayer(router, ExpertSpec(D, 5, bias=True)).double()
    y, routing = layer(x)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in [*layer.experts.parameters(), *router.linear.parameters()]:
            parameter.copy_(parameter[order])
    again, other = layer(x)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-12)
    assert torch.equal(other.load_E(), routing.load_E()[order])


def test_samples_too_short_for_a_quota_leave_the_residual_alone():
    router = create(quota="half")
    layer = MoELayer(router, ExpertSpec(D, 5)).double()
    x = tokens(count=B).view(B, 1, D)
    y, routing = layer(x)
    assert (y == 0).all() and routing.load_E().sum() == 0
    assert (layer(tokens(count=2 * B).view(B, 2, D))[1].load_E() == B).all()


@given(
    st.integers(1, 4),
    st.integers(0, 13),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["half", "max", "max_60"]),
)
@settings(max_examples=40, deadline=None)
def test_every_expert_takes_its_quota_of_every_sample(batch_size, length, top_k, patch, quota):
    router = create(top_k=top_k, patch=patch, quota=quota)
    context = TokenContext(batch_size=batch_size, length=length)
    routing = router(tokens(count=batch_size * length), context)
    token, expert, _ = routing.as_list()
    patches = -(-length // patch)
    taken = {(t // length, t % length // patch, e) for t, e in zip(token.tolist(), expert.tolist(), strict=True)}
    loads = {sum((b, m, e) in taken for m in range(patches)) for b in range(batch_size) for e in range(E)}
    assert len(loads) == 1, "balance is by construction"
    most = loads.pop()
    # whole patches are taken
    sizes = [min(patch, length - m * patch) for m in range(patches)]
    assert len(token) == sum(sizes[m] for _, m, _ in taken)
    if quota == "half":
        assert most == patches // 2
    else:
        assert most <= (patches if quota == "max" else int(0.6 * patches))
        if quota == "max" and patches:
            assert most >= -(-top_k * patches // E), "no expert is asked by more than the quota"


def test_what_depends_on_what():
    assert create(choice="per_token").causal and create(choice="per_token").batch_independent
    assert not create(choice="per_token", patch=2).causal
    assert not create().causal and not create().batch_independent
    assert not create(choice="expert", length=L).causal and create(choice="expert", length=L).batch_independent
    causal = TokenContext(batch_size=B, length=L, causal=True)
    create(choice="per_token")(tokens(), causal)
    for options in ({}, {"choice": "expert", "length": L}, {"choice": "per_token", "patch": 2}):
        with pytest.raises(ValueError, match="allow_noncausal=True"):
            create(**options)(tokens(), causal)


def test_a_sample_that_ends_earlier_is_filled_up_with_zeros():
    router, x = create(choice="expert", length=L, gate="weighted"), tokens(count=4)
    short = router(x, TokenContext(batch_size=1, length=4))
    whole = router(F.pad(x, (0, 0, 0, L - 4)), TokenContext(batch_size=1, length=L))
    torch.testing.assert_close(short.weight, whole.weight[:4], rtol=1e-12, atol=1e-12)
    assert torch.equal(short.index, whole.index[:4]) and (whole.index == whole.index[0]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"choice": "patch"}, r'choice="patch": choose one of \(\'data\', \'per_token\', \'expert\'\)'),
        ({"gate": "soft"}, 'gate="soft": choose one of'),
        ({"quota": "all"}, 'quota="all": choose one of'),
        ({"patch": 0}, 'patch=0 with choice="data": choose at least 1'),
        ({"patch": 2, "choice": "expert", "length": 8}, 'and 1 for choice="expert"'),
        ({"choice": "expert"}, "needs the length of the longest sample"),
        ({"length": 8}, "the others take none"),
        ({"top_k": 5}, "top_k=5 with 4 experts: choose 1 to 4"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_a_sample_longer_than_the_gate_is_refused():
    with pytest.raises(ValueError, match=r"samples of 11 tokens, and the gate is made for length=10"):
        create(choice="expert", length=10)(tokens(), TokenContext(batch_size=B, length=L))
