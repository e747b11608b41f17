"""The byte language model: left to right whatever its router, and every field that a router of text may ask for."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from gatewright.moe import MoELayer, moe_layers
from gatewright.recipes.models.byte_lm import CONTEXT_FIELDS, ByteLM, ByteLMConfig, rotate

ROUTERS = {
    "dense": {},
    "topk": {"balance_weight": 0.01},
    "switch": {},
    "hash": {"vocabulary": 256},
    "moe_plus_plus": {},
    "segment": {"segment_size": 3, "shifted": True},
    "similarity_aware": {"causal": True},
    "attention_aware": {"causal": True, "combine": "posterior"},
}


def make(router: str, seed: int = 0, layer_factory=MoELayer, later=None, **options) -> ByteLM:
    """A small model whose output is not zero."""
    if router != "dense":
        options = {"num_experts": 4, **options}
    config = ByteLMConfig(
        dim=16, heads=2, router=router, router_options=options, later_options=later or {}, expert_hidden=8
    )
    model = ByteLM(config, layer_factory, seed=seed).double()
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def text(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: ByteLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, sample_id=torch.arange(len(ids)), seed=0, step=0)[0]


def change_by_later_bytes(model: ByteLM) -> float:
    """How far the logits of the first 6 bytes move when the others change."""
    ids = text(batch=1)
    other = torch.cat([ids[:, :6], (ids[:, 6:] + 100) % 256], dim=1)
    a, b = logits_of(model, ids), logits_of(model, other)
    assert (a - b)[:, 6:].abs().max() > 1e-3
    return float((a - b)[:, :6].abs().max())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_byte_depends_on_later_ones(router, training):
    assert change_by_later_bytes(make(router, **ROUTERS[router]).train(training)) < 1e-12


def test_a_router_that_looks_ahead_would_show():
    factory = functools.partial(MoELayer, allow_noncausal=True)
    assert change_by_later_bytes(make("expert_choice", layer_factory=factory)) > 1e-3


def test_a_router_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match='router "expert_choice" is not causal in training'):
        logits_of(make("expert_choice"), text())


def test_a_new_model_answers_evenly():
    ids = text()
    logits, routings = ByteLM(ByteLMConfig(router="topk", router_options={"num_experts": 4}))(ids)
    assert F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item() == pytest.approx(math.log(256))
    assert len(routings) == 2


def test_each_layer_gets_what_a_router_may_ask_for():
    model, ids = make("topk"), text()
    contexts, attended = [], []
    for block, layer in zip(model.blocks, moe_layers(model), strict=True):
        layer.router.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[1]))
        block.attn.register_forward_hook(lambda *args: attended.append(args[2][0]))
    _, routings = model(ids, sample_id=torch.tensor([7, 8]), seed=3, step=4)
    assert [context.layer for context in contexts] == [0, 1]
    assert contexts[0].previous_logits is None and contexts[1].previous_logits is routings[0].logits
    assert all(contexts[1].has(field) for field in CONTEXT_FIELDS)
    for context, output_BLD in zip(contexts, attended, strict=True):
        assert context.causal
        assert context.token_ids is ids
        assert torch.equal(context.position, torch.arange(11).expand(2, 11))
        assert (context.seed, context.step, context.sample_id.tolist()) == (3, 4, [7, 8])
        # the attention that it holds is the one that was computed
        torch.testing.assert_close(context.attention.head_contributions().sum(1), output_BLD)


def test_attention_is_the_definition():
    model, ids = make("topk"), text()
    attention = model.blocks[0].attn
    x = model.blocks[0].norm1(model.embed(ids))
    position = torch.arange(ids.shape[1]).expand(ids.shape)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    out = []
    for head in range(2):
        columns = slice(8 * head, 8 * head + 8)
        own_q, own_k = (rotate(part[:, None, :, columns], position)[:, 0] for part in (q, k))
        later = torch.ones(11, 11).triu(1).bool()
        weights = (own_q @ own_k.transpose(1, 2) / 8**0.5).masked_fill(later, -torch.inf).softmax(-1)
        out.append(weights @ v[..., columns])
    torch.testing.assert_close(attention(x, position)[0], torch.cat(out, dim=-1) @ attention.out.weight.T)


def test_rotation_keeps_lengths_and_sees_distances_only():
    x = torch.randn(1, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = []
    for first in (0, 5):
        turned = rotate(x, torch.tensor([[first, first + 3]]))
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
        products.append((turned[0, 0, 0] * turned[0, 0, 1]).sum())
    torch.testing.assert_close(*products, rtol=1e-6, atol=1e-6)  # angles are float32
    assert torch.equal(rotate(x, torch.zeros(1, 2, dtype=torch.int64)), x)


def test_models_share_all_but_their_routers():
    before = torch.random.get_rng_state()
    one, two, other = (ByteLM(ByteLMConfig(router=r, router_options={"num_experts": 4}), seed=s)
                       for r, s in (("topk", 0), ("cosine", 0), ("topk", 1)))  # fmt: skip
    assert torch.equal(before, torch.random.get_rng_state())
    state = two.state_dict()
    shared = {name: value for name, value in one.state_dict().items() if ".router." not in name}
    assert len(shared) > 10 and all(torch.equal(value, state[name]) for name, value in shared.items())
    assert not torch.equal(one.embed.weight, other.embed.weight)
    assert not torch.equal(one.blocks[0].mlp.router.weight, one.blocks[1].mlp.router.weight)


def test_dense_has_the_activated_width():
    model = ByteLM(ByteLMConfig(expert_hidden=24, activated=2))
    assert [block.mlp.spec.hidden for block in model.blocks] == [48, 48]
    assert model(text())[1] == []


def test_later_options_begin_with_the_second_block():
    model = make("moe_plus_plus", later={"residual": True})
    assert [layer.router.residual for layer in moe_layers(model)] == [False, True]
    _, routings = model(text())
    routings[1].weight.sum().backward()
    assert moe_layers(model)[0].router.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": 0}, "depth=0: choose at least 1"),
        ({"heads": 5}, "dim=96 over heads=5: a head's width must be whole and even"),
        ({"heads": 32}, "dim=96 over heads=32: a head's width must be whole and even"),
        ({"router_options": {"top_k": 2}}, 'router="dense" has no options: leave out top_k'),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        ByteLMConfig(**options)


def test_bytes_of_another_shape():
    with pytest.raises(ValueError, match=r"token_ids has shape \(11,\): expected \[B, L\]"):
        make("topk")(text()[0])
