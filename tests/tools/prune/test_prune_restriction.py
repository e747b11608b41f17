"""Routers held to some experts, for every router there is: slices of the whole one, decisions as worked out by hand."""

import dataclasses

import pytest
import torch

from gatewright.kernels.cosine import cosine
from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import create_router, list_routers
from gatewright.routers.base import router_class, router_options
from gatewright.tools.prune.restriction import FIXED, leave_out, masked, restrict, slice_experts

DIM, EXPERTS, KEEP = 16, 6, (1, 2, 3, 5)
ROUTERS = sorted(list_routers())


def made(name, **options):
    """The router with 6 experts, in evaluation mode and with state that training might have left, and a context."""
    example, context = router_class(name)[0].example()
    example = {k: v for k, v in example.items() if k in router_options(name)} | {"num_experts": EXPERTS, **options}
    if "base_options" in example and example["base_options"]:
        example["base_options"] = dict(example["base_options"])
    torch.manual_seed(0)
    router = create_router(name, **example).eval()
    for entry, tensor in router.state_dict().items():
        if tensor.is_floating_point() and (not tensor.any() or not tensor.isfinite().all()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(entry))) * 0.3)
    context = context.replace(previous_logits=None, modality=torch.randint(0, EXPERTS, (context.batch_size, 8)))
    if "attention" in router.requires:
        context = context.replace(attention=router_class(name)[0].example()[1].attention)
    return router, context


def tokens(context, seed=1):
    return torch.randn(context.num_tokens, DIM, generator=torch.Generator().manual_seed(seed))


def restrictable():
    return [name for name in ROUTERS if router_class(name)[0].name not in FIXED]


@pytest.mark.parametrize("name", restrictable())
def test_its_logits_are_columns_of_the_whole_ones(name):
    router, context = made(name)
    small = restrict(router, KEEP)
    x = tokens(context)
    columns = [*KEEP, *range(EXPERTS, router.bank_size)]
    whole, part = router(x, context), small(x, context)
    assert part.bank_size == small.bank_size == len(columns)
    assert small.expert_kinds == tuple(router.expert_kinds[c] for c in columns)
    if name in ("similarity_aware", "attention_aware"):
        # scores are averaged over tokens after the softmax, which is over the kept experts
        whole, part = router.base.logits(x, context), small.base.logits(x, context)
        torch.testing.assert_close(part, whole[:, columns], rtol=0, atol=1e-6)
    elif whole.logits is not None:
        torch.testing.assert_close(part.logits, whole.logits[:, columns], rtol=0, atol=1e-6)
    assert small.options["num_experts"] == len(KEEP)
    restored = type(small)(**small.options)
    restored.load_state_dict(small.state_dict())


def layer_of(router):
    layer = MoELayer(router, ExpertSpec(DIM, 24, "gelu", bias=True), seed=3, layer=1).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for bank in (layer.experts, layer.local_experts):
            if bank is not None:
                bank.w3.normal_(0, 0.1, generator=generator)
    return layer


@pytest.mark.parametrize("name", restrictable())
def test_a_layer_of_kept_experts_is_the_masked_layer(name):
    """Bit for bit, and the whole layer afterwards is as before."""
    router, context = made(name)
    layer, x = layer_of(router), tokens(context)
    small = layer_of(restrict(router, KEEP))
    state = layer.state_dict()
    for entry, tensor in small.state_dict().items():
        if entry.startswith("experts."):
            tensor.copy_(state[entry][list(KEEP)])
        elif not entry.startswith("router."):
            tensor.copy_(state[entry])
    with torch.no_grad():
        before, _ = layer(x, context)
        with masked(layer, {1: KEEP}):
            y_masked, routing = layer(x, context)
        y_small, _ = small(x, context)
        after, _ = layer(x, context)
    assert torch.equal(y_masked, y_small)
    assert torch.equal(before, after) and "forward" not in vars(router)
    chosen = set(routing.as_list()[1].tolist())
    assert chosen <= {*KEEP, *range(EXPERTS, router.bank_size)}
    if name != "race":  # whose threshold may let nobody in
        assert chosen & set(KEEP)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "soft_moe"])
def test_without_rerouting_a_removed_expert_adds_nothing(name):
    """As if its output had been multiplied by zero, whatever the router."""
    router, context = made(name)
    layer, silent, x = layer_of(router), layer_of(router), tokens(context)
    silent.load_state_dict(layer.state_dict())
    removed = [e for e in range(EXPERTS) if e not in KEEP]
    with torch.no_grad():
        silent.experts.w2[removed] = 0
        silent.experts.w3[removed] = 0
        expected, _ = silent(x, context)
        with masked(layer, {1: KEEP}, "no-reroute"):
            found, routing = layer(x, context)
        whole, _ = layer(x, context)
    state, small = layer.state_dict(), layer_of(leave_out(made(name)[0], KEEP))
    for entry, tensor in small.state_dict().items():
        tensor.copy_(state[entry][list(KEEP)] if entry.startswith("experts.") else state[entry])
    with torch.no_grad():
        assert torch.equal(small(x, context)[0], found), "a bank of the kept experts alone"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not set(routing.as_list()[1].tolist()) & set(removed)
    if name not in ("race", "union"):
        assert not torch.equal(found, whole)


OPTIONS = {
    "softmax": {},
    "renormalised": {"renormalise": True, "scale": 2.5},
    "softmax after": {"softmax_after": True},
    "linear bias": {"linear_bias": True},
    "sigmoid with a selection bias": {"score": "sigmoid", "renormalise": True, "bias_rate": 0.001},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_top_k_by_hand(options):
    router, context = made("topk", **options)
    x = tokens(context)
    logits = (x @ router.weight.T + (0 if router.linear_bias is None else router.linear_bias))[:, KEEP].detach()
    scores = logits.sigmoid() if options.get("score") else logits.softmax(-1)
    chosen = (scores + (router.bias[list(KEEP)] if "bias_rate" in options else 0)).topk(2).indices
    weight = logits.gather(1, chosen).softmax(-1) if options.get("softmax_after") else scores.gather(1, chosen)
    if options.get("renormalise"):
        weight = weight / weight.sum(-1, keepdim=True)
    layer = layer_of(router)
    with masked(layer, {1: KEEP}), torch.no_grad():
        routing = layer(x, context)[1]
    assert torch.equal(routing.index, torch.tensor(KEEP)[chosen])
    torch.testing.assert_close(routing.weight, weight * options.get("scale", 1.0))


def test_promoe_by_hand():
    """Nearest kept prototype with its cosine; unconditional tokens to their own expert as before."""
    router, context = made("promoe")
    x = tokens(context)
    weight, chosen = cosine(x, router.prototypes.detach())[:, KEEP].max(1)
    null = context.null_T
    layer = layer_of(router)
    with masked(layer, {1: KEEP}), torch.no_grad():
        routing = layer(x, context)[1]
    assert torch.equal(routing.index[:, 0], torch.where(null, EXPERTS, torch.tensor(KEEP)[chosen]))
    torch.testing.assert_close(routing.weight[:, 0], torch.where(null, torch.ones(()), weight))


def test_expert_choice_by_hand():
    """Each kept expert takes more tokens: top_k a token on average, as before."""
    router, context = made("expert_choice", top_k=2.0)
    x = tokens(context)
    scores = (x @ router.weight.T)[:, KEEP].softmax(-1).detach().unflatten(0, (context.batch_size, context.length))
    taken = scores.argsort(1, descending=True).argsort(1) < int(context.length / len(KEEP) * 2)
    layer = layer_of(router)
    with masked(layer, {1: KEEP}), torch.no_grad():
        routing = layer(x, context)[1]
    expected = torch.zeros(context.num_tokens, EXPERTS, dtype=torch.bool)
    expected[:, list(KEEP)] = taken.flatten(0, 1)
    found = torch.zeros_like(expected)
    found[routing.token, routing.expert] = True
    assert torch.equal(found, expected)


def test_race_by_hand():
    """Every kept pair above the threshold that training left."""
    router, context = made("race")
    x = tokens(context)
    gates = router(x, context).logits[:, KEEP].detach()
    layer = layer_of(router)
    with masked(layer, {1: KEEP}), torch.no_grad():
        routing = layer(x, context)[1]
    token, place = (gates >= router.threshold).nonzero(as_tuple=True)
    assert len(token) and torch.equal(routing.token, token)
    assert torch.equal(routing.expert, torch.tensor(KEEP)[place])


def test_groups():
    router, context = made("topk", num_groups=3, top_groups=2)
    with pytest.raises(ValueError, match=r'"topk" has 3 groups, of which \[1, 2, 1\] .* "slice-equal-groups"'):
        restrict(router, KEEP)
    equal = restrict(router, (0, 3, 5))
    assert (equal.num_groups, equal.top_groups) == (3, 2)
    x = tokens(context)
    scores = router(x, context).scores[:, [0, 3, 5]]
    # one expert a group: the two best groups are the two best experts
    assert torch.equal(equal(x, context).index.sort(1).values, scores.topk(2).indices.sort(1).values)
    free = restrict(router, KEEP, ungroup=True)
    assert free.num_groups == 1
    assert torch.equal(free(x, context).index, router(x, context).scores[:, KEEP].topk(2).indices)


def test_refusals():
    router, _ = made("topk")
    for keep in ((), (1, 1), (2, 1), (0, 6), (-1, 2)):
        with pytest.raises(ValueError, match="ascending places of 0 to 5"):
            restrict(router, keep)
    with pytest.raises(ValueError, match='"topk" cannot have the 1 kept experts alone: top_k=2 with 1 experts'):
        restrict(router, (3,))
    for name in FIXED:
        with pytest.raises(ValueError, match=f'"{name}" cannot be restricted'):
            restrict(made(name)[0], KEEP)
    with pytest.raises(ValueError, match="reads the logits of the layer before"):
        restrict(made("moe_plus_plus", residual=True)[0], KEEP)
    with pytest.raises(ValueError, match="gate.* becomes .*refused|becomes 64 where|refused"):
        restrict(made("moe_plus_plus", gate="mlp")[0], KEEP)
    with pytest.raises(ValueError, match="sends no token to an expert"):
        leave_out(made("soft_moe")[0], KEEP)
    layer = layer_of(router)
    for keep, mode, message in (
        ({0: KEEP}, "reroute", "layer 0 has no experts"),
        ({1: (9,)}, "reroute", "layer 1: keep=.9."),
        ({1: KEEP}, "zero", "choose one of reroute, no-reroute"),
    ):
        with pytest.raises(ValueError, match=message), masked(layer, keep, mode):
            pass
    assert "forward" not in vars(router)


def test_an_error_inside_leaves_the_whole_model():
    router, _ = made("topk")
    layer = layer_of(router)
    with pytest.raises(KeyError), masked(layer, {1: KEEP}):
        raise KeyError
    assert "forward" not in vars(router)


def test_an_axis_of_another_length_is_not_guessed():
    tensor = torch.arange(24.0).view(8, 3)
    assert torch.equal(slice_experts(tensor, (6, 3), (1, 3), 4, "t"), tensor[[1, 3, 4, 5, 6, 7]])
    square = torch.arange(16.0).view(4, 4)
    assert torch.equal(slice_experts(square, (2, 2), (1, 3), 4, "t"), square[[1, 3]][:, [1, 3]])
    with pytest.raises(ValueError, match="t: 8 becomes 4 where 4 experts become 2: refused"):
        slice_experts(tensor, (4, 3), (1, 3), 4, "t")


def test_padding_and_contexts_reach_the_restricted_router():
    router, context = made("topk")
    padding = torch.ones(context.batch_size, context.length, dtype=torch.bool)
    padding[0, 5:] = False
    context = dataclasses.replace(context, padding_mask=padding)
    layer = layer_of(router)
    with masked(layer, {1: KEEP}), torch.no_grad():
        y, routing = layer(tokens(context), context)
    assert not y[5:8].any() and (routing.index[5:8] == -1).all() and (routing.index[:5] >= 0).all()
