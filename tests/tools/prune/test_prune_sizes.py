"""Sizes from headers, held to published ones, to what is written, and to arithmetic on the configuration."""

import json
import re

import pytest
from prune_models import copied, plan_of, quantised, tiny, with_mtp, write_sparse

from gatewright.tools.cli import main
from gatewright.tools.prune.apply import apply
from gatewright.tools.prune.checkpoint import Checkpoint
from gatewright.tools.prune.sizes import bytes_at_count, dry_run, inspect, predicted_and_real

# Qwen3-30B-A3B-Instruct-2507's config.json, what has to do with sizes.
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "hidden_size": 2048,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}


def qwen3_shapes():
    H, width_of_one, V, d = 2048, 768, 151936, 128
    shapes = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
    for layer in range(48):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (H,)
        for name, width in (("q", 32 * d), ("k", 4 * d), ("v", 4 * d)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (width, H)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (H, 32 * d)
        for name in ("q_norm", "k_norm"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (d,)
        shapes[f"{prefix}.mlp.gate.weight"] = (128, H)
        for expert in range(128):
            for name, shape in (
                ("gate_proj", (width_of_one, H)),
                ("up_proj", (width_of_one, H)),
                ("down_proj", (H, width_of_one)),
            ):
                shapes[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = shape
    return {name: ("BF16", shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def qwen3_30b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "Qwen3-30B-A3B-Instruct-2507"
    folder.mkdir()
    write_sparse(folder / "model.safetensors", qwen3_shapes())
    (folder / "config.json").write_text(json.dumps(QWEN3_30B))
    return folder


def test_published_size_of_a_30b_model(qwen3_30b):
    """56.93 GiB with 128 experts, 29.92 GiB with 64, as llm-compressor's example for expert pruning says.

    The weights alone are 56.87 GiB; the rest is the rotary table that vLLM keeps beside them, 262,144 positions x 128
    x 2 bytes = 0.0625 GiB.
    """
    report = inspect(qwen3_30b, keep=0.5, tensor_parallel=(1, 4))
    parameters = 30_532_122_624
    one_expert = 3 * 2048 * 768 + 2048  # and its row of the router
    assert report.before.tensors == 2 * parameters
    assert report.after.tensors == 2 * (parameters - 48 * 64 * one_expert)
    assert f"{report.before.gpu[1] / 2**30:.2f} -> {report.after.gpu[1] / 2**30:.2f}" == "56.93 -> 29.92"
    assert report.before.gpu[1] - report.before.tensors == 2**26
    assert report.bytes_before == (qwen3_30b / "model.safetensors").stat().st_size
    assert 0 < report.bytes_after - report.after.tensors < report.bytes_before - report.before.tensors
    # a quarter of all matrices, and all of the rest
    small = 2 * (48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048)
    assert report.before.gpu[4] == (2 * parameters - small) // 4 + small + 2**26
    shown = str(report)
    assert "48 MoE layers of 128, 8 a token" in shown and "29.92 GiB" in shown and "-47" in shown


@pytest.mark.parametrize("count", [8, 127])
def test_bytes_at_count_are_those_of_the_plan(qwen3_30b, count):
    description = plan_of(qwen3_30b, 8).model
    at = bytes_at_count(qwen3_30b, description)
    exact = inspect(qwen3_30b, keep=count).bytes_after
    assert 0 <= at(count) - exact < 0.0005 * exact


@pytest.mark.parametrize(
    ("family", "method"),
    [("mixtral", None), ("gpt_oss", None), ("llama4_text", None), ("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")],
)
def test_what_is_said_is_what_is_written(family, method, tmp_path):
    source = quantised(tiny(family), tmp_path / "model", method, 3) if method else tiny(family)
    plan = plan_of(source)
    said = dry_run(plan, source)
    assert not (tmp_path / "out").exists()
    apply(plan, source, tmp_path / "out")
    pruned = Checkpoint.open(tmp_path / "out")
    assert said.bytes_after == pruned.file_bytes and said.after.tensors == pruned.data_bytes
    assert said.bytes_before == Checkpoint.open(source).file_bytes
    assert inspect(source, keep=4).bytes_after == said.bytes_after
    assert inspect(tmp_path / "out").bytes_before == said.bytes_after
    assert predicted_and_real(plan, source, tmp_path / "out") == {
        "before": said.bytes_before,
        "after": said.bytes_after,
        "real": said.bytes_after,
    }
    assert "real" not in predicted_and_real(plan, source, None)
    lost = said.before.experts - said.after.experts
    assert lost == said.before.experts // 2


def test_inspect_names_what_there_is_to_know(tmp_path):
    source = quantised(
        with_mtp(tiny("deepseek_v3", 16, n_group=4, topk_group=2), tmp_path / "mtp"), tmp_path / "m", "fp8"
    )
    shown = str(inspect(source, keep=0.5, tensor_parallel=(3,)))
    assert "deepseek_v3 (known family)" in shown and "groups        4 of 4, a token uses 2 of them" in shown
    assert "layer 4 with experts" in shown and "fp8, blocks of 128 x 128 (" in shown
    assert "slice-equal-groups keeps 2 of each group" in shown and "8 experts do not divide by 3 GPUs" in shown
    shown = str(inspect(source, keep=6))
    assert "6 experts do not fill 4 groups" in shown and "keep a multiple of 4 from 8" in shown
    assert inspect(source, keep=0.3).experts_after == 8  # rounded up to the groups
    (source / "pytorch_model.bin").write_bytes(b"")
    whole = inspect(source)
    assert whole.target is None and whole.before == whole.after and "now" in str(whole)
    assert "not carried, for they hold weights of the old size: pytorch_model.bin" in str(whole)
    assert "none (F32 100%)" in str(inspect(tiny("mixtral")))


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (0, "from 1 to 8"),
        (9, "from 1 to 8"),
        (1.5, "above 0 and up to 1.0"),
        (0.0, "above 0 and up to 1.0"),
        (1, "2 experts a token of 1 that stay"),
        (True, "keep is True"),
    ],
)
def test_counts_that_cannot_be(keep, says):
    with pytest.raises(ValueError, match=says):
        inspect(tiny("qwen3_moe"), keep=keep)


def test_other_bad_requests(tmp_path):
    with pytest.raises(ValueError, match="a number of GPUs is 0"):
        inspect(tiny("qwen3_moe"), tensor_parallel=(0,))
    with pytest.raises(ValueError, match="statistics are of another model"):
        bytes_at_count(tiny("qwen3_moe"), plan_of(tiny("qwen3_moe", 16)).model)


def test_commands(tmp_path, capsys):
    source = copied(tiny("olmoe"), tmp_path / "model")
    capsys.readouterr()  # what importing a library prints
    assert main(["prune", "inspect", str(source), "--keep", "0.5", "--tensor-parallel", "2"]) == 0
    inspected = capsys.readouterr().out
    plan_of(source).save(tmp_path / "plan.json")
    assert (
        main(["prune", "dry-run", str(tmp_path / "plan.json"), "--model", str(source), "--tensor-parallel", "2"]) == 0
    )
    assert capsys.readouterr().out == inspected
    assert "each of 2 GPUs, expert parallel" in inspected and re.search(r"8 experts +4 experts\n", inspected)
    assert main(["prune", "inspect", str(source), "--keep", "3GiB"]) == 2
    assert "`gatewright prune plan` takes sizes" in capsys.readouterr().err
    assert main(["prune", "inspect", str(tmp_path)]) == 2
    assert "holds no safetensors weights" in capsys.readouterr().err
