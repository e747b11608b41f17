"""Where the thirteen families keep experts and routers, written out by hand; what is found beyond them, and refused."""

import json

import pytest
from prune_models import THIRTEEN, copied, edited, read_folder, tiny, write_folder

from gatewright.tools.prune.checkpoint import Checkpoint
from gatewright.tools.prune.families import FAMILIES, REFUSED, Family, count_places, family_of, text_config_path
from gatewright.tools.prune.layout import Layout
from gatewright.tools.prune.tiny import config_class

# As transformers writes them: MoE block of a layer, its router tensors with their expert axis, fused experts.
GATE = (("gate.weight", 0),)
CORRECTED = (("gate.e_score_correction_bias", 0), ("gate.weight", 0))
ON_DISK = {
    "mixtral": ("block_sparse_moe", GATE, ()),
    "qwen2_moe": ("mlp", GATE, ()),
    "qwen3_moe": ("mlp", GATE, ()),
    "olmoe": ("mlp", GATE, ()),
    "deepseek_v2": ("mlp", GATE, ()),
    "deepseek_v3": ("mlp", CORRECTED, ()),
    "glm4_moe": ("mlp", CORRECTED, ()),
    "gpt_oss": (
        "mlp",
        (("router.bias", 0), ("router.weight", 0)),
        ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"),
    ),
    "phimoe": ("block_sparse_moe", GATE, ()),
    "llama4_text": ("feed_forward", (("router.weight", 0),), ("down_proj", "gate_up_proj")),
    "ernie4_5_moe": ("mlp", (("gate.weight", 0), ("moe_statics.e_score_correction_bias", 1)), ()),
    "minimax": ("block_sparse_moe", GATE, ()),
    "minimax_m2": ("block_sparse_moe", (("e_score_correction_bias", 0), ("gate.weight", 0)), ()),
}
DENSE_FIRST = ("deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe")
GRANITE = ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared")
F32 = 4


def layout_of(folder):
    checkpoint = Checkpoint.open(folder)
    return Layout.of(checkpoint), checkpoint


@pytest.mark.parametrize("family", THIRTEEN)
def test_family(family):
    layout, checkpoint = layout_of(tiny(family))
    block, routers, fused = ON_DISK[family]
    assert layout.family is FAMILIES[family]
    assert (layout.num_experts, layout.top_k, layout.num_groups, layout.topk_group) == (8, 2, 1, 1)
    assert [layer.index for layer in layout.layers] == ([1, 2, 3] if family in DENSE_FIRST else [0, 1, 2, 3])
    assert layout.mtp_layers == () == layout.mtp_tensors
    for layer in layout.layers:
        assert layer.prefix == f"model.layers.{layer.index}.{block}" and not layer.mtp
        assert sorted(layer.router_tensors) == [(f"{layer.prefix}.{name}", axis) for name, axis in sorted(routers)]
        assert sorted(layer.fused_tensors) == [f"{layer.prefix}.experts.{name}" for name in fused]
        assert len(layer.expert_tensors) == (0 if fused else 8)
        for expert, names in enumerate(layer.expert_tensors):
            assert len(names) == 3 and all(f"{layer.prefix}.experts.{expert}." in name for name in names)
    described = layout.describe(checkpoint)
    assert described["num_experts"] == 8 and described["layers"] == [layer.index for layer in layout.layers]


@pytest.mark.parametrize("family", [*THIRTEEN, "deepseek_v32", "bailing_hybrid", "axk1", "beam", *GRANITE, "zaya"])
def test_defaults_are_those_of_transformers(family):
    """What an entry says of a config.json that says nothing."""
    entry, config = FAMILIES[family], config_class(family)()
    top_k = getattr(config, entry.top_k_keys[0])
    assert entry.top_k == (top_k if isinstance(top_k, int) else None)
    groups = getattr(config, "n_group", None) or 1
    assert entry.num_groups == groups and entry.topk_group == (
        getattr(config, "topk_group", None) or 1 if groups > 1 else 1
    )


def test_groups():
    layout, _ = layout_of(tiny("deepseek_v3", n_group=4, topk_group=2))
    assert (layout.num_groups, layout.topk_group) == (4, 2)


def test_the_shared_experts_gate_is_no_router():
    """Also where the hidden size is the number of experts, so that its shape would fit."""
    folder = tiny("qwen2_moe", 32)
    layout, checkpoint = layout_of(folder)
    assert checkpoint.tensors["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 32)
    assert [layer.router_tensors for layer in layout.layers] == [
        ((f"model.layers.{index}.mlp.gate.weight", 0),) for index in range(4)
    ]


# --- configurations


def test_nested_configuration():
    nested = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_local_experts": 8}}
    assert text_config_path(nested) == ("text_config",) and family_of(nested) is FAMILIES["llama4_text"]
    deeper = {"model_type": "x", "thinker_config": {"text_config": {"model_type": "qwen3_moe", "num_experts": 8}}}
    assert text_config_path(deeper) == ("thinker_config", "text_config")
    both = {"model_type": "x", "num_experts": 8, "text_config": {"num_experts": 8}}
    assert text_config_path(both) == () and count_places(both) == [(), ("text_config",)]
    two = {"model_type": "omni", "a_config": {"num_experts": 8}, "b_config": {"num_experts": 8}}
    with pytest.raises(ValueError, match='"omni" holds several mixtures of experts'):
        text_config_path(two)


def test_two_counts(tmp_path):
    """transformers 5 writes Qwen3-MoE's count under another name than the hub's files have."""
    folder = copied(tiny("qwen3_moe"), tmp_path / "model")
    key = (
        "num_local_experts"
        if "num_local_experts" in json.loads((folder / "config.json").read_text())
        else "num_experts"
    )
    other = {"num_local_experts": "num_experts", "num_experts": "num_local_experts"}[key]
    edited(folder, **{other: 8})
    assert layout_of(folder)[0].num_experts == 8
    edited(folder, **{other: 6})
    with pytest.raises(ValueError, match="contradicts itself.*num_local_experts = .*num_experts = "):
        layout_of(folder)
    edited(folder, **{other: [8, 8]})
    assert layout_of(folder)[0].num_experts == 8
    edited(folder, **{other: None, key: [8, 4]})
    with pytest.raises(ValueError, match="differs from layer to layer"):
        layout_of(folder)


def test_dense_and_refused_families():
    with pytest.raises(ValueError, match='"llama" is dense'):
        family_of({"model_type": "llama", "hidden_size": 8})
    with pytest.raises(ValueError, match="no model_type"):
        family_of({"num_experts": 8})
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError, match=f'"{name}" cannot be pruned: {reason}'):
            family_of({"model_type": name, "num_experts": 8})
    for said in ({"num_hash_layers": 3}, {"mlp_layer_types": ["hash_moe", "moe"]}):
        with pytest.raises(ValueError, match="hash-routed"):
            family_of({"model_type": "newer", "num_experts": 8} | said)


# --- checkpoints by hand


def tensors(layers=(0, 1), experts=4, hidden=6, **more):
    made = {}
    for layer in layers:
        block = f"model.layers.{layer}.mlp"
        made[f"{block}.gate.weight"] = ("F32", (experts, hidden), bytes(F32 * experts * hidden))
        for expert in range(experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                made[f"{block}.experts.{expert}.{name}.weight"] = ("F32", (3, hidden), bytes(F32 * 3 * hidden))
    for name, shape in more.items():
        size = 1
        for length in shape:
            size *= length
        made[name.replace("__", ".")] = ("F32", shape, bytes(F32 * size))
    return made


def made(folder, content, **config):
    config = {"model_type": "newer_moe", "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 6} | config
    return Layout.of(Checkpoint.open(write_folder(folder, config, {"model.safetensors": content})))


def test_unknown_family_is_found_by_shapes(tmp_path):
    layout = made(tmp_path, tensors(model__layers__0__mlp__gate__a_new_bias=(4,), model__layers__1__mlp__bias=(1, 4)))
    assert layout.family == Family(model_type="newer_moe", known=False, group_score=2)
    assert layout.layers[0].router_tensors == (
        ("model.layers.0.mlp.gate.weight", 0),
        ("model.layers.0.mlp.gate.a_new_bias", 0),
    )
    assert layout.layers[1].router_tensors[1] == ("model.layers.1.mlp.bias", 1)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model__layers__0__mlp__latent__weight": (4, 6)}, "latent.weight of shape .4, 6. beside its experts"),
        ({"model__layers__0__mlp__gate__inner__weight": (4, 4)}, "more than one router weight"),
        ({"model__layers__0__mlp__gate__other": (3, 4)}, "which axis counts the 4 experts"),
        ({"model__layers__2__mlp__gate__weight": (4, 6)}, "router without experts of its own, model.layers.2.mlp.gate"),
        ({"model__layers__0__mlp__gate__tid2eid": (10, 2)}, "hash-routed"),
        ({"model__experts__0__up_proj__weight": (3, 6)}, "tied experts|for 3 of its 4 experts"),
        ({"model__layers__0__mlp__experts__4__up_proj__weight": (3, 6)}, "holds one of number 4"),
        ({"model__layers__0__mlp__experts__1__bias__weight": (3, 6)}, "only one of experts 0 and 1"),
        ({"model__layers__0__mlp__experts__scales": (3, 4)}, "axis 0 of model.layers.0.mlp.experts.scales has 3"),
        ({f"other__layers__0__mlp__experts__{e}__up__w": (1, 1) for e in range(4)}, "no router weight of 4 rows"),
        ({"model__layers__0__mlp__gate__weight_scale_inv": (1, 2)}, "quantised router, .*several rows of which share"),
        ({"model__layers__0__mlp__gate__weight_scale": (1,)}, None),
        ({"model__layers__0__mlp__gate__scale": (6,)}, None),
        ({"model__layers__0__self_attn__gate__bias": (4,)}, None),
        ({"model__layers__0__input_layernorm__weight": (4,)}, None),
        ({"model__layers__0__mlp__experts__scale": (1,)}, None),
        ({"model__layers__0__mlp__shared_expert__up_proj__weight": (4, 6)}, None),
    ],
)
def test_what_leaves_a_doubt_is_refused_by_name(tmp_path, more, says):
    if says is None:
        layout = made(tmp_path, tensors(**more))
        assert [len(layer.router_tensors) for layer in layout.layers] == [1, 1]
        return
    with pytest.raises(ValueError, match=says):
        made(tmp_path, tensors(**more))


def test_a_scale_as_long_as_hidden_size_and_experts(tmp_path):
    with pytest.raises(ValueError, match="gate.scale of shape .6. in its router"):
        made(tmp_path, tensors(experts=6, model__layers__0__mlp__gate__scale=(6,)), num_experts=6)
    layout = made(tmp_path, tensors(experts=6, model__layers__0__mlp__gate__bias=(6,)), num_experts=6)
    assert len(layout.layers[0].router_tensors) == 2


def test_missing_and_tied_experts(tmp_path):
    content = tensors()
    lost = {name: what for name, what in content.items() if "layers.1.mlp.experts.2" not in name}
    with pytest.raises(
        ValueError, match="no tensors at model.layers.1.mlp for 1 of its 4 experts, 2 first: they are tied"
    ):
        made(tmp_path, lost)
    shared = {name: what for name, what in content.items() if "layers.1.mlp.experts" not in name}
    with pytest.raises(ValueError, match="tied to another layer's"):
        made(tmp_path, shared)
    nowhere = {name.replace("layers.0.mlp", "bank"): what for name, what in tensors(layers=(0,)).items()}
    with pytest.raises(ValueError, match=r"in no numbered layer: .*\(tied experts\)"):
        made(tmp_path, nowhere)
    with pytest.raises(ValueError, match="no tensor is named like an expert's"):
        made(tmp_path, {"model.embed.weight": ("F32", (4, 6), bytes(96))})


def test_counts_that_disagree_with_the_headers(tmp_path):
    with pytest.raises(ValueError, match="for 4 of its 8 experts"):
        made(tmp_path, tensors(), num_experts=8)
    with pytest.raises(ValueError, match="has 2 experts by config.json, but model.layers.0.mlp holds one of number 3"):
        made(tmp_path, tensors(), num_experts=2)


def test_two_towers_and_two_blocks(tmp_path):
    other = {name.replace("model.", "talker."): what for name, what in tensors().items()}
    with pytest.raises(ValueError, match="several stacks of MoE layers .model.layers, talker.layers."):
        made(tmp_path, tensors() | other)
    second = {name.replace("mlp", "moe2"): what for name, what in tensors().items()}
    with pytest.raises(ValueError, match="two MoE blocks in layer"):
        made(tmp_path, tensors() | second)


def test_rows_beyond_the_experts(tmp_path, monkeypatch):
    content = tensors() | {f"model.layers.{i}.mlp.gate.weight": ("F32", (5, 6), bytes(120)) for i in (0, 1)}
    with pytest.raises(ValueError, match="no router weight of 4 rows"):
        made(tmp_path, content)
    monkeypatch.setitem(FAMILIES, "newer_moe", Family(model_type="newer_moe", extra_rows="sinks"))
    layout = made(tmp_path, content | {"model.layers.0.mlp.gate.bias": ("F32", (4,), bytes(16))}, sinks=1)
    assert layout.layers[0].router_tensors == (
        ("model.layers.0.mlp.gate.weight", 0),
        ("model.layers.0.mlp.gate.bias", 0),
    )


# --- layers that predict further tokens


@pytest.mark.parametrize("named", ["model.layers.4", "mtp.layers.0", "model.mtp.layers.0"])
def test_mtp_layers(tmp_path, named):
    source = tiny("deepseek_v3")
    content = read_folder(source)
    head = {name.replace("model.layers.3", named): what for name, what in content.items() if ".layers.3." in name}
    head[f"{named}.eh_proj.weight"] = ("F32", (2, 2), bytes(16))
    tower = {"vision.layers.9.weight": ("F32", (8,), bytes(32))}
    config = json.loads((source / "config.json").read_text())
    folder = write_folder(tmp_path, config, {"model.safetensors": content | head | tower})
    layout, checkpoint = layout_of(folder)
    assert [layer.index for layer in layout.layers] == [1, 2, 3]
    assert [(layer.index, layer.prefix, layer.mtp) for layer in layout.mtp_layers] == [(4, f"{named}.mlp", True)]
    assert set(layout.mtp_tensors) == set(head)
    assert layout.describe(checkpoint)["mtp_layers"] == [4]
