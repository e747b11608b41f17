"""The model: what it starts as, that the seed and nothing else decides it, and that every router learns in it."""

import pytest
import torch

from gatewright.moe import finish_step, moe_layers
from gatewright.moe.parallel import ExpertParallel
from gatewright.recipes.data.draw import Draw
from gatewright.recipes.models.diffusion import create_objective
from gatewright.recipes.models.dit import DiT, patches, position_table, time_features, unpatch
from gatewright.recipes.models.dit_config import dit_config

ROUTERS = ("promoe", "topk", "expert_choice", "diffmoe", "race", "dense")


def tiny(router, **overrides):
    return dit_config("tiny", router, **{"input_shape": (1, 8, 8), "dim": 32, "depth": 4, **overrides})


def batch(config, size=6):
    draw = Draw(0, 0, tuple(range(size)))
    return draw.normal("image", config.input_shape), torch.arange(size) % config.num_classes, draw


def opened(model):
    """Weights that adaLN-Zero starts at zero get values, so that something comes out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_gradient_reaches_every_parameter(router, objective):
    config = tiny(router, label_dropout=0.5)
    model = opened(DiT(config)).train()
    x0, labels, draw = batch(config, 12)
    result = create_objective(objective, config).loss(model, x0, labels, draw)
    result.total.backward()
    assert len(result.routings) == len(config.moe_blocks)
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert all(name.endswith(("w3", "predictor.2.bias")) for name in still), still
    finish_step(model)


OTHERS = {
    "soft_moe": {"router_options": {"slots": 4}},
    "attention_aware": {"top_k": 2, "router_options": {"combine": "posterior"}},
    "similarity_aware": {"top_k": 2, "router_options": {"similarity": "lowrank", "rank": 4}},
    "segment": {"router_options": {"segment_size": 4}},
    "union": {"top_k": 2, "router_options": {"gate": "ste"}},
    "sparsemixer": {"top_k": 2, "router_options": {"jitter": 1.0}},
    "moe_plus_plus": {"top_k": 2},
    "longcat": {"top_k": 2},
    "base": {},
}


@pytest.mark.parametrize("router", OTHERS)
def test_the_model_gives_other_routers_what_they_need(router):
    config = tiny(router, **OTHERS[router])
    model, objective = opened(DiT(config)).train(), create_objective("flow", config)
    result = objective.loss(model, *batch(config, 12))
    result.total.backward()
    assert len(result.routings) == len(config.moe_blocks)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    learned = [n for n, p in model.named_parameters() if ".router." in n and p.grad is not None and p.grad.any()]
    assert learned, "no router has a gradient"
    finish_step(model)
    with torch.no_grad():
        objective.loss(model.eval(), *batch(config, 3))


def test_a_router_that_wants_what_images_have_not():
    config = tiny("hash", router_options={"vocabulary": 8})
    with pytest.raises(ValueError, match='router "hash" needs context.token_ids, which is missing'):
        create_objective("flow", config).loss(DiT(config), *batch(config, 3))


@pytest.mark.parametrize("router", ROUTERS)
def test_learns(router):
    config = tiny(router)
    model, objective = DiT(config).train(), create_objective("flow", config)
    labels = torch.arange(16) % 2
    x0 = (2 * labels - 1.0)[:, None, None, None].expand(-1, *config.input_shape)  # black and white pictures
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        result = objective.loss(model, x0, labels, Draw(0, step, tuple(range(16))))
        result.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        finish_step(model)
        losses.append(result.loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_new_model_answers_zero():
    config = tiny("promoe")
    out, _ = DiT(config)(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 10]))
    assert out.shape == (2, 2, 8, 8) and not out.any()


def test_initial_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first = DiT(tiny("race"), seed=5).state_dict()
    torch.manual_seed(2)
    again, other = DiT(tiny("race"), seed=5).state_dict(), DiT(tiny("race"), seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert {"x_embedder.proj.weight", "blocks.1.mlp.router.hidden.weight", "blocks.1.mlp.experts.w1"} <= set(changed)


def test_models_share_what_they_have_in_common():
    dense, routed = DiT(tiny("dense")).state_dict(), DiT(tiny("promoe")).state_dict()
    common = dense.keys() & routed.keys()
    assert "blocks.1.attn.qkv.weight" in common and "blocks.0.mlp.up.weight" in common
    assert all(torch.equal(dense[name], routed[name]) for name in common)


def test_a_rank_draws_its_part_of_the_whole_model():
    whole = DiT(tiny("promoe"), seed=3)
    for rank in range(2):
        part = DiT(tiny("promoe"), parallel=ExpertParallel(size=2, rank=rank), seed=3)
        for name, value in part.state_dict().items():
            expected = whole.state_dict()[name]
            if ".mlp.experts." in name:
                expected = expected[3 * rank : 3 * rank + 3]
            assert torch.equal(value, expected), name


def test_making_a_model_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    DiT(tiny("promoe"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("router", ["promoe", "topk"])
def test_checkpointed_blocks_compute_the_same(router):
    config = tiny(router)
    x0, labels, draw = batch(config)
    results = []
    for checkpointed in (False, True):
        model = opened(DiT(config, checkpoint_blocks=checkpointed)).train()
        result = create_objective("flow", config).loss(model, x0, labels, draw)
        result.total.backward()
        results.append((result.total.detach(), [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for plain, again in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, again)


def test_what_a_router_is_told():
    config = tiny("promoe", num_classes=3)
    seen = []
    model = DiT(config)
    moe_layers(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    t = torch.tensor([1.0, 999.0])
    model(torch.zeros(2, 1, 8, 8), t, torch.tensor([3, 1]), sample_id=torch.tensor([4, 5]), seed=6, step=7)
    (context,) = seen
    assert context.null_mask.tolist() == [True, False]
    assert torch.equal(context.timestep, t) and context.grid == (4, 4)
    assert context.sample_id.tolist() == [4, 5] and (context.seed, context.step) == (6, 7)


def test_unlabelled_images_meet_the_unconditional_expert_alone():
    config = tiny("promoe", num_classes=3)
    model = DiT(config)
    _, routings = model(torch.randn(2, 1, 8, 8), torch.tensor([5.0, 5.0]), torch.tensor([3, 1]))
    for routing in routings:
        token, expert, weight = routing.as_list()
        null = token < 16
        assert (expert[null] == 6).all() and (weight[null] == 1).all() and (expert[~null] < 6).all()


def test_bfloat16_model_tells_close_times_apart():
    model = opened(DiT(tiny("promoe"))).bfloat16()
    x, labels = torch.randn(1, 1, 8, 8), torch.tensor([1])
    outputs = [model(x, torch.tensor([t]), labels)[0] for t in (999.0, 1000.0)]
    assert outputs[0].dtype == torch.bfloat16 and not torch.equal(*outputs)


def test_autocast():
    model = opened(DiT(tiny("promoe")))
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([1, 10])
    expected, _ = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        out, routings = model(x, t, labels)
    assert out.dtype == torch.bfloat16 and routings[0].weight.dtype == torch.float32
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_qk_norm_has_a_norm_for_each_head():
    names = DiT(tiny("dense", qk_norm=True)).state_dict()
    assert names["blocks.0.attn.q_norm.weight"].shape == (8,)


def test_patches_and_back():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    cut = patches(x, 2)
    assert cut.shape == (2, 6, 12)
    assert torch.equal(unpatch(cut, 2, (2, 3)), x)
    # a patch row by row, channels innermost, as the released final layer has them
    assert torch.equal(cut[0, 1].view(2, 2, 3), x[0, :, :2, 2:4].permute(1, 2, 0))


def test_position_table_is_that_of_the_papers():
    table = position_table(8, (2, 3))
    column, row = 2.0, 1.0
    expected = [f(angle) for place in (column, row) for f in (torch.sin, torch.cos) for angle in places(place)]
    torch.testing.assert_close(table[5], torch.stack(expected))


def places(place):
    return [torch.tensor(place), torch.tensor(place / 10_000**0.5)]


def test_time_features():
    features = time_features(torch.tensor([0.0, 3.0]))
    assert features.shape == (2, 256)
    assert torch.equal(features[0, :128], torch.ones(128)) and not features[0, 128:].any()
    assert features[1, 0] == torch.tensor(3.0).cos() and features[1, 128] == torch.tensor(3.0).sin()


def test_an_unknown_router_option_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        DiT(tiny("promoe", router_options={"temprature": 0.1}))


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected \[B, 1, 8, 8\]"):
        DiT(tiny("dense"))(torch.zeros(2, 1, 9, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
