"""V1 and V2: what loads and equals the masked model passes, whatever is wrong in a checkpoint is found."""

import json
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from prune_models import copied, edited, read, tiny, write  # noqa: E402

from gatewright.tools.prune import verify_model  # noqa: E402
from gatewright.tools.prune.apply import apply  # noqa: E402
from gatewright.tools.prune.checkpoint import Checkpoint  # noqa: E402
from gatewright.tools.prune.layout import Layout  # noqa: E402
from gatewright.tools.prune.loading import load_config  # noqa: E402
from gatewright.tools.prune.proof import random_plan  # noqa: E402
from gatewright.tools.prune.verify_model import check_loads, check_logits, random_ids  # noqa: E402

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    source = tiny("qwen3_moe")
    checkpoint = Checkpoint.open(source)
    plan = random_plan(Layout.of(checkpoint).describe(checkpoint), "slice")
    out = tmp_path_factory.mktemp("verify") / "pruned"
    apply(plan, source, out)
    return SimpleNamespace(plan=plan, source=source, out=out)


def changed(pruned, tmp_path, change):
    """A copy of the pruned folder with its tensors changed."""
    folder = copied(pruned.out, tmp_path / "changed")
    tensors = read(folder / FILE)
    change(tensors)
    write(folder / FILE, tensors)
    return folder


def test_a_right_one_passes(pruned):
    loads, logits = check_loads(pruned.out), check_logits(pruned.plan, pruned.source, pruned.out)
    assert loads.passed and loads.level == "V1" and "Qwen3MoeForCausalLM" in loads.summary
    assert logits.passed and logits.level == "V2"
    assert "48 tokens" in logits.summary and "eager, grouped_mm, batched_mm" in logits.summary


@pytest.mark.parametrize("part", ["gate", "experts.1.up_proj"])
def test_v1_finds_what_is_missing_too_much_or_of_another_shape(pruned, tmp_path, part):
    name = f"model.layers.1.mlp.{part}.weight"
    missing = check_loads(changed(pruned, tmp_path / "a", lambda tensors: tensors.pop(name)))
    assert not missing.passed and missing.problems
    more = changed(pruned, tmp_path / "b", lambda tensors: tensors.update({"model.extra.weight": tensors[name]}))
    assert check_loads(more).problems == ("unexpected: model.extra.weight",)
    other = edited(copied(pruned.out, tmp_path / "c"), num_local_experts=5)
    assert not check_loads(other).passed and len(check_loads(other).problems) >= 4


def test_v1_takes_no_memory_for_weights(pruned, monkeypatch):
    kept = []
    kind = transformers.Qwen3MoeForCausalLM
    original = kind.from_pretrained.__func__

    def spied(cls, *args, **kwargs):
        model, found = original(cls, *args, **kwargs)
        kept.append(model)
        return model, found

    monkeypatch.setattr(kind, "from_pretrained", classmethod(spied))
    assert check_loads(pruned.out).passed
    assert all(parameter.is_meta for parameter in kept[0].parameters())


def swap(first, second):
    def change(tensors):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


@pytest.mark.parametrize("layerwise", [False, True])
def test_v2_finds_swapped_experts_and_changed_numbers(pruned, tmp_path, layerwise):
    def check(folder):
        return check_logits(pruned.plan, pruned.source, folder, layerwise=layerwise)

    assert check(pruned.out).passed
    experts = "model.layers.2.mlp.experts.0.down_proj.weight", "model.layers.2.mlp.experts.3.down_proj.weight"
    swapped = check(changed(pruned, tmp_path / "a", swap(*experts)))
    assert not swapped.passed and "numbers differ" in swapped.problems[0]

    def nudge(tensors):
        dtype, shape, content = tensors["model.layers.3.mlp.gate.weight"]
        tensors["model.layers.3.mlp.gate.weight"] = (dtype, shape, content[4:] + content[:4])

    assert not check(changed(pruned, tmp_path / "b", nudge)).passed
    unloadable = edited(copied(pruned.out, tmp_path / "c"), num_local_experts=5)
    assert check(unloadable).problems


def test_a_model_that_does_not_fit_goes_layer_by_layer_and_says_so(pruned, monkeypatch):
    monkeypatch.setattr(verify_model, "free_memory", lambda: 1000)
    found = check_logits(pruned.plan, pruned.source, pruned.out)
    assert found.passed and "layer by layer" in found.summary and "final hidden states" in found.summary


def test_where_a_tensor_starts_in_memory_does_not_count(tmp_path):
    """Weights are views of the mapped file: a longer header moves them all."""
    source = tiny("granitemoe")
    checkpoint = Checkpoint.open(source)
    plan = random_plan(Layout.of(checkpoint).describe(checkpoint), "slice")
    apply(plan, source, tmp_path / "pruned")
    assert check_logits(plan, source, tmp_path / "pruned").passed
    raw = (tmp_path / "pruned" / FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for more in (8, 16, 24):
        moved = (length + more).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * more + raw[8 + length :]
        (tmp_path / "pruned" / FILE).write_bytes(moved)
        assert check_logits(plan, source, tmp_path / "pruned").passed


def test_an_implementation_that_the_model_itself_does_not_run_under_is_left_out(pruned, monkeypatch):
    experts = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
    original = experts.forward

    def forward(self, *args, **kwargs):
        if self.config._experts_implementation == "grouped_mm":
            raise RuntimeError("strides should be multiple of 16 bytes")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(experts, "forward", forward)
    found = check_logits(pruned.plan, pruned.source, pruned.out)
    assert found.passed and found.summary.endswith("logits under eager, batched_mm")
    assert not check_logits(pruned.plan, pruned.source, pruned.out, implementations=("grouped_mm",)).passed

    def only_the_pruned_one_fails(self, *args, **kwargs):
        if self.num_experts == 4:
            raise RuntimeError("strides should be multiple of 16 bytes")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(experts, "forward", only_the_pruned_one_fails)
    found = check_logits(pruned.plan, pruned.source, pruned.out)
    assert not found.passed and "strides" in found.problems[0]


def test_keep_rows_has_no_checkpoint_to_compare(pruned):
    plan = SimpleNamespace(policy="keep-rows")
    found = check_logits(plan, pruned.source, pruned.out)
    assert not found.passed and "keep-rows" in found.summary


def test_random_text_holds_no_image_and_no_padding():
    config = load_config(tiny("qwen3_vl_moe", num_experts=4))
    config.image_token_id, config.text_config.pad_token_id = 5, 7
    ids = random_ids(config, 8, 100)
    assert ids.shape == (8, 100) and not {5, 7} & set(ids.flatten().tolist())
    assert torch.equal(ids, random_ids(config, 8, 100))


def test_memory_is_counted_as_loaded(tmp_path):
    folder = tmp_path / "fp8"
    folder.mkdir()
    (folder / FILE).write_bytes(bytes(1000))
    config = json.loads((tiny("qwen3_moe") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert verify_model.memory_needed(folder) == 2000
    assert verify_model.free_memory() > 0
