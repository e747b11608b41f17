"""config.json, the index and other lists of names after a plan; plans that no configuration can say are refused."""

import json
from pathlib import Path

import pytest
from prune_models import copied, edited, plan_of, quantised, tiny, with_mtp

from gatewright.tools.prune.checkpoint import Checkpoint
from gatewright.tools.prune.layout import Layout
from gatewright.tools.prune.target import Target


def target_of(folder, plan):
    checkpoint = Checkpoint.open(folder)
    return Target.of(checkpoint, Layout.of(checkpoint), plan)


def config_of(folder, plan):
    return json.loads(target_of(folder, plan).texts["config.json"])


@pytest.fixture
def qwen3(tmp_path):
    return copied(tiny("qwen3_moe"), tmp_path / "model")


def rewritten(folder, change):
    file = folder / "config.json"
    file.write_text(change(file.read_text()))


# --- config.json


def test_the_count_is_changed_where_it_stands(qwen3):
    count_key = next(
        key for key in ("num_experts", "num_local_experts") if f'"{key}": 8' in (qwen3 / "config.json").read_text()
    )
    rewritten(qwen3, lambda text: text.replace(f'  "{count_key}": 8,', f'\t"{count_key}" :8 ,\r\n  "other_eight": 8,'))
    before = (qwen3 / "config.json").read_bytes().decode()
    text = target_of(qwen3, plan_of(qwen3)).texts["config.json"]
    assert text == before.replace(f'\t"{count_key}" :8 ,', f'\t"{count_key}" :4 ,')


def test_two_counts_and_nested_ones_change_together(qwen3):
    edited(qwen3, num_experts=8, num_local_experts=8, text_config={"num_experts": 8, "num_experts_per_tok": 2})
    config = config_of(qwen3, plan_of(qwen3, 2, top_k=1))
    assert (config["num_experts"], config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2, 1)
    assert config["text_config"] == {"num_experts": 2, "num_experts_per_tok": 1}


def test_top_k_is_lowered_by_the_plan_alone(qwen3):
    assert config_of(qwen3, plan_of(qwen3, 3))["num_experts_per_tok"] == 2
    assert config_of(qwen3, plan_of(qwen3, 3, top_k=1))["num_experts_per_tok"] == 1
    with pytest.raises(ValueError, match="2 experts a token of 1 that stay"):
        plan_of(qwen3, 1)


def test_default_that_config_json_leaves_out(tmp_path):
    """ERNIE's own name for it is added; DeepSeek-V3's groups are its class's."""
    ernie = edited(copied(tiny("ernie4_5_moe"), tmp_path / "ernie"), moe_k=None, moe_capacity=[8, 8, 8])
    plan = plan_of(ernie, 4, top_k=3, model=plan_of(ernie, 6).model)
    config = config_of(ernie, plan)
    assert (config["moe_k"], config["moe_num_experts"], config["moe_capacity"]) == (3, 4, [4, 4, 4])
    deepseek = edited(copied(tiny("deepseek_v3", 16), tmp_path / "v3"), n_group=None, topk_group=None)
    plan = plan_of(deepseek, 4)
    assert (plan.model["num_groups"], plan.model["topk_group"]) == (8, 4)
    config = config_of(deepseek, plan)
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (1, 1, 4)


# --- groups


@pytest.fixture(scope="module")
def grouped():
    return tiny("deepseek_v3", 16, n_group=4, topk_group=2)


def test_groups_under_each_policy(grouped):
    config = config_of(grouped, plan_of(grouped, 6))
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (1, 1, 6)
    equal = {layer: (0, 1, 4, 6, 9, 11, 14, 15) for layer in (1, 2, 3)}
    kept = {"keep": equal, "num_groups": 4, "topk_group": 2}
    target = target_of(grouped, plan_of(grouped, policy="slice-equal-groups", **kept))
    config = json.loads(target.texts["config.json"])
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (4, 2, 8) and not target.warnings
    uneven = kept | {"keep": {layer: tuple(range(8)) for layer in (1, 2, 3)}}
    with pytest.raises(ValueError, match=r"layer 1 keeps \[4, 4, 0, 0\] experts of its groups"):
        plan_of(grouped, policy="slice-equal-groups", **uneven)
    target = target_of(grouped, plan_of(grouped, policy="slice-regroup", **uneven))
    assert "groups are cut anew" in target.warnings[0]
    for count, says in ((6, "6 experts in 4 groups"), (4, "keep a multiple of 4 from 8")):
        few = {"keep": {layer: tuple(range(count)) for layer in (1, 2, 3)}, "num_groups": 4, "topk_group": 2}
        with pytest.raises(ValueError, match=says):
            plan_of(grouped, policy="slice-regroup", **few)


def test_rows_that_stay_come_with_a_map(grouped):
    plan = plan_of(grouped, 4, policy="keep-rows", num_groups=4, topk_group=2, mtp="none")
    target = target_of(grouped, plan)
    expert_map = json.loads(target.texts["expert_map.json"])
    assert {layer: [old for old, new in enumerate(row) if new >= 0] for layer, row in expert_map.items()} == {
        str(layer): list(ids) for layer, ids in plan.keep.items()
    }
    assert [new for new in expert_map["1"] if new >= 0] == [0, 1, 2, 3]
    shapes = {tensor.name: tensor.shape for shard in target.shards for tensor in shard.tensors}
    assert shapes["model.layers.1.mlp.gate.weight"] == (16, 32)
    assert shapes["model.layers.1.mlp.gate.e_score_correction_bias"] == (16,)
    assert "model.layers.1.mlp.experts.4.up_proj.weight" not in shapes
    assert "no stock engine loads this" in target.warnings[0]


# --- plans for something else


def test_plan_of_another_model(grouped, qwen3):
    with pytest.raises(
        ValueError, match="another model than .*: model_type is qwen3_moe in the plan and deepseek_v3 here"
    ):
        target_of(grouped, plan_of(qwen3))
    other = tiny("qwen3_moe", 16)
    with pytest.raises(ValueError, match="num_experts is 16 in the plan and 8 here"):
        target_of(qwen3, plan_of(other))
    one_less = plan_of(qwen3).model | {"layers": [0, 1, 2], "experts_per_layer": [8] * 3}
    plan = plan_of(qwen3, model=one_less, keep={layer: (0, 1, 2, 3) for layer in range(3)})
    with pytest.raises(ValueError, match=r"layers is \[0, 1, 2\] in the plan and \[0, 1, 2, 3\] here"):
        target_of(qwen3, plan)


def test_plan_of_another_precision_is_followed_and_said(qwen3, tmp_path):
    plan = plan_of(qwen3)
    assert target_of(qwen3, plan).warnings == ()
    other = quantised(qwen3, tmp_path / "fp8", "fp8")
    assert "another precision?" in target_of(other, plan).warnings[0]


def test_mtp_layers_cannot_stay(tmp_path):
    source = with_mtp(tiny("glm4_moe"), tmp_path / "model")
    with pytest.raises(ValueError, match="cannot stay at 8 experts"):
        plan_of(source, mtp="none")
    config = config_of(source, plan_of(source))
    assert config["num_nextn_predict_layers"] == 0
    with pytest.raises(ValueError, match=r"mtp_layers is \[\] in the plan and \[4\] here"):
        target_of(source, plan_of(tiny("glm4_moe")))


def test_unequal_counts_are_refused(qwen3):
    with pytest.raises(ValueError, match="one count for all layers"):
        plan_of(qwen3, keep={0: (0, 1), 1: (0, 1, 2), 2: (0, 1), 3: (0, 1)})


# --- names of experts elsewhere


def test_lists_of_names(qwen3):
    names = [f"model.layers.{layer}.mlp.experts.{e}.gate_proj" for layer in (0, 3) for e in range(8)]
    ignore = ["lm_head", *names, "re:.*self_attn.*", "re:model[.]layers[.]1[.].*"]
    edited(qwen3, quantization_config={"quant_method": "compressed-tensors", "ignore": ignore})
    listed = {"quantization": {"exclude_modules": ["model.layers.1.mlp.gate", "layers.2.mlp.experts.5"], "other": [1]}}
    (qwen3 / "hf_quant_config.json").write_text(json.dumps(listed, indent=4))
    by_name = {f"model.layers.1.mlp.experts.{e}.up_proj.weight": "W8A8" for e in range(8)}
    (qwen3 / "quant_model_description.json").write_text(json.dumps(by_name))
    (qwen3 / "tokenizer.json").write_text('{"a": ["mlp.experts.0.x"]}')
    keep = {0: (0, 1, 2, 3), 1: (2, 3, 4, 6), 2: (1, 3, 5, 7), 3: (1, 5, 6, 7)}
    target = target_of(qwen3, plan_of(qwen3, keep=keep))
    said = json.loads(target.texts["config.json"])["quantization_config"]["ignore"]
    assert said == [
        "lm_head",
        *(f"model.layers.{layer}.mlp.experts.{e}.gate_proj" for layer in (0, 3) for e in range(4)),
        *ignore[-2:],
    ]
    listed["quantization"]["exclude_modules"][1] = "layers.2.mlp.experts.2"
    assert json.loads(target.texts["hf_quant_config.json"]) == listed
    assert '    "exclude_modules": [' in target.texts["hf_quant_config.json"].replace("        ", "    ")
    assert list(json.loads(target.texts["quant_model_description.json"])) == [
        f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(4)
    ]
    assert "tokenizer.json" in target.copied


def test_experts_of_stripped_layers_leave_the_lists(tmp_path):
    source = with_mtp(tiny("deepseek_v3"), tmp_path / "model")
    ignore = ["model.layers.4.mlp.experts.0.up_proj", "model.layers.3.mlp.experts.7.up_proj", "lm_head"]
    edited(source, quantization_config={"quant_method": "x", "ignored_layers": ignore})
    plan = plan_of(source, keep={layer: (1, 2, 3, 7) for layer in (1, 2, 3)})
    assert config_of(source, plan)["quantization_config"]["ignored_layers"] == [
        "model.layers.3.mlp.experts.3.up_proj",
        "lm_head",
    ]


def test_names_and_expressions_that_cannot_be_followed(qwen3):
    edited(qwen3, quantization_config={"ignore": ["model.layers.9.mlp.experts.0.up_proj"]})
    with pytest.raises(ValueError, match="an expert of no MoE layer of this model"):
        target_of(qwen3, plan_of(qwen3))
    edited(qwen3, quantization_config={"ignore": [r"re:.*layers\.1\.mlp\.experts\.5\..*"]})
    keep = {layer: (0, 1, 2, 3) for layer in range(4)}
    assert target_of(qwen3, plan_of(qwen3, keep=keep))  # it means no expert that stays, under either number
    with pytest.raises(ValueError, match="tells model.layers.1.mlp.experts.5.gate_proj from its new name"):
        target_of(qwen3, plan_of(qwen3, keep=keep | {1: (0, 1, 2, 5)}))


# --- the rest


def test_index_counts_what_stays(tmp_path):
    folder = tiny("qwen3_moe", shard_size="100KB")
    target = target_of(folder, plan_of(folder))
    index = json.loads(target.texts["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == target.data_bytes == 4 * index["metadata"]["total_parameters"]
    assert set(index["weight_map"].values()) == {shard.file for shard in target.shards}


def test_the_same_plan_gives_the_same_target(qwen3):
    first, second, other = (target_of(qwen3, plan_of(qwen3, seed=seed)) for seed in (0, 0, 1))
    assert first.digest == second.digest != other.digest
    assert Path(qwen3 / "config.json").read_text() != first.texts["config.json"]
