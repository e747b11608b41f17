"""Masked transformers models, held to models that were made smaller, and to slow definitions."""

import random

import pytest
import torch

transformers = pytest.importorskip("transformers")

from prune_models import THIRTEEN  # noqa: E402

from gatewright.tools.prune.families import COUNT_KEYS  # noqa: E402
from gatewright.tools.prune.mask import masked, masked_by  # noqa: E402
from gatewright.tools.prune.model import moe_blocks, observe  # noqa: E402
from gatewright.tools.prune.tiny import EXPERTS, VOCABULARY, tiny_config, tiny_model  # noqa: E402

IDS = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(0))
GROUPED = {
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v3": {},
    "glm4_moe": {},
}


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(input_ids=ids).logits


def different_sets(model, count=4, seed=0, each=None):
    """Other experts in every layer; ``each``: as many of every run of this many."""
    chance = random.Random(seed)
    keep = {}
    for block in moe_blocks(model):
        pools = [range(EXPERTS)] if each is None else [range(at, at + each) for at in range(0, EXPERTS, each)]
        keep[block.layer] = tuple(sorted(e for pool in pools for e in chance.sample(pool, count // len(pools))))
    assert len(set(keep.values())) > 1
    return keep


def smaller(family, model, keep, **changes):
    """A model of fewer experts with the kept ones' rows, made without any of the library's slicing."""
    count = len(next(iter(keep.values())))
    config = model.config.get_text_config()
    counts = {key: count for key in COUNT_KEYS if hasattr(config, key)}
    small = type(model)(tiny_config(family, **counts | changes)).eval()
    state, wanted = dict(model.state_dict()), small.state_dict()
    for block in moe_blocks(model):
        for name in state:
            before, after = state[name].shape, wanted[name].shape
            if name.startswith(f"{block.name}.") and before != after:
                (axis,) = [axis for axis in range(len(before)) if before[axis] != after[axis]]
                state[name] = torch.stack([state[name].select(axis, e) for e in keep[block.layer]], dim=axis)
    small.load_state_dict(state)
    return small


def implementations(model):
    return ("eager", "grouped_mm", "batched_mm") if model._can_set_experts_implementation() else ("eager",)


def assert_masked_is(small, model, keep, **options):
    for name in implementations(model):
        if model._can_set_experts_implementation():
            model.set_experts_implementation(name)
            small.set_experts_implementation(name)
        want = logits(small)
        with masked(model, keep, **options):
            assert torch.equal(logits(model), want), name


@pytest.mark.parametrize("family", THIRTEEN)
def test_the_masked_model_is_the_smaller_one_bit_for_bit(family):
    model = tiny_model(family)
    keep = different_sets(model)
    small = smaller(family, model, keep)
    assert_masked_is(small, model, keep)
    others = {layer: tuple(e for e in range(EXPERTS) if e not in ids) for layer, ids in keep.items()}
    with masked(model, others):
        assert not torch.equal(logits(model), logits(small))


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("policy", ["slice", "slice-equal-groups", "slice-regroup"])
def test_grouped_routers_under_each_policy(family, policy):
    changes = GROUPED[family] | {"n_group": 2, "topk_group": 1}
    model = tiny_model(family, **changes)
    keep = different_sets(model, each=4 if policy == "slice-equal-groups" else None)
    after = changes | {"n_group": 1, "topk_group": 1} if policy == "slice" else changes
    assert_masked_is(smaller(family, model, keep, **after), model, keep, policy=policy)


def kept_rows_slowly(block, x_TD, kept):
    """What EASY-EP's masked routers choose, a token at a time: groups by all experts, then kept ones alone."""
    router, size = block.router, block.num_experts // block.num_groups
    index, weight = [], []
    for row in torch.nn.functional.linear(x_TD.float(), router.weight.float()):
        if hasattr(router, "topk_method"):
            scores = choice = row.softmax(0)
            best = 1
        else:
            scores = row.sigmoid()
            choice = scores + router.e_score_correction_bias
            best = 2
        by_group = [sum(sorted(choice[g * size : (g + 1) * size].tolist())[-best:]) for g in range(block.num_groups)]
        open_groups = sorted(range(block.num_groups), key=lambda g: -by_group[g])[: block.topk_group]
        allowed = [e for e in kept if e // size in open_groups]
        chosen = sorted(allowed, key=lambda e: -choice[e].item())[: block.top_k]
        gates = scores[chosen]
        if getattr(router, "norm_topk_prob", False):
            gates = gates / (gates.sum() + 1e-20)
        index.append(chosen)
        weight.append(gates * router.routed_scaling_factor)
    return torch.tensor(index), torch.stack(weight)


@pytest.mark.parametrize("family", GROUPED)
def test_keep_rows_is_the_definition_of_the_released_code(family):
    model = tiny_model(family, **GROUPED[family], n_group=4, topk_group=2)
    keep = different_sets(model, count=6)
    found = []
    with masked(model, keep, policy="keep-rows"), torch.inference_mode(), observe(model, found.append) as blocks:
        model(input_ids=IDS)
    for one, block in zip(found, blocks, strict=True):
        with torch.inference_mode():
            index, weight = kept_rows_slowly(block, one.mlp_input, keep[block.layer])
        order, wanted = one.index.argsort(1), index.argsort(1)
        assert torch.equal(one.index.gather(1, order), index.gather(1, wanted))
        torch.testing.assert_close(one.gate.gather(1, order), weight.gather(1, wanted))


def test_keep_rows_refuses_a_router_that_does_not_choose_by_one_top_k():
    model = tiny_model("phimoe")
    with masked(model, different_sets(model), policy="keep-rows"), pytest.raises(ValueError, match="choose slice"):
        logits(model)
    assert torch.equal(logits(model), logits(tiny_model("phimoe")))


@pytest.mark.parametrize("family", THIRTEEN)
def test_without_rerouting_removed_experts_give_nothing(family):
    model, emptied = tiny_model(family), tiny_model(family)
    keep = different_sets(model)
    with torch.no_grad():
        for block in moe_blocks(emptied):
            removed = [expert for expert in range(EXPERTS) if expert not in keep[block.layer]]
            for name, tensor in block.experts.named_parameters():
                if name.startswith("down_proj"):
                    tensor[removed] = 0
    with masked(model, keep, mode="no-reroute"):
        assert torch.equal(logits(model), logits(emptied))
    assert not torch.equal(logits(model), logits(emptied))


@pytest.mark.parametrize("mode", ["reroute", "no-reroute"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_text", "ernie4_5_moe", "minimax_m2"])
def test_the_model_is_as_it_was_afterwards_also_after_an_exception(family, mode):
    model = tiny_model(family)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    want = logits(model)
    with pytest.raises(KeyError), masked(model, different_sets(model), mode=mode):
        assert not torch.equal(logits(model), want)
        raise KeyError("stop")
    assert torch.equal(logits(model), want)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())


def test_a_forward_that_someone_had_replaced_comes_back():
    model = tiny_model("qwen3_moe")
    router = moe_blocks(model)[0].router
    router.forward = mine = lambda hidden_states: type(router).forward(router, hidden_states)
    with masked(model, different_sets(model)):
        logits(model)
    assert router.__dict__["forward"] is mine


def test_layers_may_keep_different_numbers_and_layers_not_named_keep_all():
    model = tiny_model("qwen3_moe")
    found = []
    with masked(model, {0: (1, 2), 2: (0, 3, 4, 5, 7)}), torch.inference_mode(), observe(model, found.append):
        model(input_ids=IDS)
    chosen = {one.layer: set(one.index.flatten().tolist()) for one in found}
    assert chosen[0] == {1, 2} and chosen[2] <= {0, 3, 4, 5, 7}
    assert len(chosen[1] | chosen[3]) > 4


def test_ids_and_logits_are_those_of_the_whole_model():
    model = tiny_model("qwen3_moe")
    keep = different_sets(model)
    with masked(model, keep):
        output = model(input_ids=IDS, output_router_logits=True)
    for block, router_logits in zip(moe_blocks(model), output.router_logits, strict=True):
        assert router_logits.shape == (IDS.numel(), EXPERTS)
        finite = [expert for expert in range(EXPERTS) if router_logits[:, expert].isfinite().all()]
        assert tuple(finite) == keep[block.layer]


def test_gradients_reach_the_kept_rows_alone():
    model = tiny_model("qwen3_moe").train()
    keep = different_sets(model)
    with masked(model, keep):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for block in moe_blocks(model):
        rows = block.router.weight.grad.abs().sum(1) > 0
        assert set(rows.nonzero().flatten().tolist()) <= set(keep[block.layer]) and rows.any()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gemma4"])
def test_fewer_experts_a_token(family):
    model = tiny_model(family)
    keep = different_sets(model, count=2 if family == "deepseek_v3" else 1)
    key = "top_k_experts" if family == "gemma4" else "num_experts_per_tok"
    small = smaller(family, model, keep, **{key: 1})
    assert_masked_is(small, model, keep, top_k=1)


def test_bfloat16_is_bit_for_bit_too():
    model = tiny_model("deepseek_v3").bfloat16()
    keep = different_sets(model)
    assert_masked_is(smaller("deepseek_v3", model, keep).bfloat16(), model, keep)


def test_a_plan_of_another_model_is_refused():
    class Other:
        keep, num_experts, policy, top_k = {1: (0, 1)}, 64, "slice", 2

    with pytest.raises(ValueError, match="made for 64 experts"):
        masked_by(tiny_model("qwen3_moe"), Other())


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        ({9: (0, 1)}, {}, r"layers \[9\]"),
        ({1: (1, 0)}, {}, "must ascend"),
        ({1: (0, 8)}, {}, "must ascend within 0..7"),
        ({1: ()}, {}, "must ascend"),
        ({1: (3,)}, {}, "keep more, or pass top_k=1"),
        ({1: (0, 1, 2)}, {"top_k": 3}, "top_k must be 1 to 2"),
        ({1: (0, 1)}, {"mode": "reroute", "policy": "drop"}, "policy 'drop'"),
        ({1: (0, 1)}, {"mode": "skip"}, "mode 'skip'"),
        ({1: (0, 1)}, {"mode": "no-reroute", "top_k": 1}, "leaves the router's decisions"),
        ({1: (0, 1, 2, 4)}, {"policy": "slice-equal-groups"}, r"got \[2, 1, 1, 0\]"),
        ({1: (0, 2, 4, 6)}, {"policy": "slice-equal-groups"}, "two in a group to score it"),
        ({1: (0, 1, 2, 4, 5)}, {"policy": "slice-regroup"}, "multiple of the 4 groups"),
        ({1: (0, 1, 2)}, {"policy": "keep-rows"}, "as few as 0 kept experts"),
    ],
)
def test_what_cannot_be_masked_is_refused_before_anything_changes(keep, options, message):
    model = tiny_model("deepseek_v3", n_group=4, topk_group=2)
    with pytest.raises(ValueError, match=message), masked(model, keep, **options):
        raise AssertionError("entered")
    assert "forward" not in moe_blocks(model)[0].router.__dict__


def test_a_masked_model_is_not_masked_again():
    model = tiny_model("qwen3_moe")
    keep = different_sets(model)
    with masked(model, keep):
        want = logits(model)
        with pytest.raises(ValueError, match="masked already"), masked(model, keep):
            raise AssertionError("entered")
        assert torch.equal(logits(model), want)


def test_a_router_whose_slicing_is_not_understood_is_refused():
    model = tiny_model("qwen3_moe")
    router = moe_blocks(model)[0].router
    router.register_buffer("table", torch.zeros(EXPERTS, EXPERTS))
    with pytest.raises(ValueError, match="which axis counts experts"), masked(model, different_sets(model)):
        raise AssertionError("entered")
    assert "forward" not in router.__dict__


@pytest.mark.parametrize("mode", ["reroute", "no-reroute"])
def test_models_that_accelerate_dispatches(mode):
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain = tiny_model("deepseek_v3"), tiny_model("deepseek_v3")
    keep = different_sets(plain)
    with masked(plain, keep, mode=mode):
        want = logits(plain)
    state = {f"{block.name}.{block.router_name}": block.router for block in moe_blocks(model)}
    for router in state.values():
        hooks.add_hook_to_module(router, hooks.AlignDevicesHook("cpu", offload=True, weights_map=None))
    assert all(parameter.is_meta for router in state.values() for parameter in router.parameters())
    with masked(model, keep, mode=mode):
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), logits(plain))
