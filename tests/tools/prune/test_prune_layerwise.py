import numpy as np
import pytest
import torch
from prune_models import THIRTEEN, copied, edited, read, tiny, write
from safetensors.torch import load_file, save_file

from gatewright.tools.prune.checkpoint import Checkpoint
from gatewright.tools.prune.collect import collect, groups_of
from gatewright.tools.prune.demos import Demo
from gatewright.tools.prune.evaluate import next_token_losses
from gatewright.tools.prune.layerwise import LayerwiseModel, backbone
from gatewright.tools.prune.layout import Layout
from gatewright.tools.prune.loading import load_config, load_model, load_tokenizer, loading_options, pick_device
from gatewright.tools.prune.model import moe_blocks, observe
from gatewright.tools.prune.proof import _check_family as check_family
from gatewright.tools.prune.proof import shared_families
from gatewright.tools.prune.tiny import config_class, tiny_model

IDS = [[1, 5, 9, 3, 7, 11, 13], [2, 4, 8, 16], [3, 9, 27, 17, 51, 25]]


def demos():
    return [Demo(where=f"d:{i}", domain="ab"[i % 2], input_ids=tuple(ids), answer_start=1) for i, ids in enumerate(IDS)]


@pytest.mark.parametrize("family", THIRTEEN)
def test_layer_by_layer_is_the_whole_model_bit_for_bit(family):
    folder = tiny(family, shard_size="100KB")
    whole = collect(load_model(folder), demos(), folder=folder, progress=False)
    layers = collect(LayerwiseModel.open(folder), demos(), folder=folder, progress=False, tokens_at_once=12)
    assert layers.sha256 == whole.sha256


@pytest.mark.evidence
def test_every_family_that_can_be_pruned_is_the_same_layer_by_layer(tmp_path):
    """And the losses that a sweep measures are those of the family's own logits."""
    same, refused = [], {}
    for name, model_type in shared_families().items():
        folder = tmp_path / name
        try:
            check_family(config_class(model_type)().to_dict())
            tiny_model(model_type).float().save_pretrained(folder)
            Layout.of(Checkpoint.open(folder))
            model = load_model(folder)
            moe_blocks(model)
        except ValueError as error:
            refused[name] = str(error)
            continue
        whole = collect(model, demos(), folder=folder, progress=False)
        layers = collect(LayerwiseModel.open(folder), demos(), folder=folder, progress=False)
        assert layers.sha256 == whole.sha256, name
        same.append(name)
        if name == "openai_privacy_filter":  # it labels tokens
            continue
        for demo in demos():
            ids = torch.tensor([demo.input_ids])
            with torch.no_grad():
                found = next_token_losses(model, demo, backbone(model)(ids, use_cache=False))
                chances = torch.log_softmax(model(ids, use_cache=False).logits[0].double(), dim=-1)
            expected = [-chances[t - 1, demo.input_ids[t]].item() for t in range(1, len(demo))]
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, err_msg=name)
    assert len(same) >= 58, refused


def test_an_interrupted_collection_goes_on_after_the_last_whole_group(tmp_path):
    folder, groups = tiny("glm4_moe", shard_size="100KB"), []
    whole = collect(load_model(folder), demos(), folder=folder, progress=False)
    model = LayerwiseModel.open(folder)
    run = model.run

    def stopped_in_the_second(sequences):
        groups.append(len(sequences))
        for place in run(sequences):
            if len(groups) == 2 and place == 2:
                raise KeyboardInterrupt
            yield place

    model.run = stopped_in_the_second
    with pytest.raises(KeyboardInterrupt):
        collect(model, demos(), folder=folder, progress=False, tokens_at_once=12, journal=tmp_path)
    model.run = lambda sequences: groups.append(len(sequences)) or run(sequences)
    found = collect(model, demos(), folder=folder, progress=False, tokens_at_once=12, journal=tmp_path)
    assert groups == [2, 1, 1] and found.sha256 == whole.sha256


def test_layers_of_several_kinds_go_through_in_order():  # chunked and full attention, with and without positions
    folder = tiny("llama4_text", shard_size="100KB", attention_chunk_size=4)
    whole, seen = load_model(folder), []
    with torch.no_grad():
        expected = [whole.model(torch.tensor([ids]), use_cache=False).last_hidden_state for ids in IDS]
    model = LayerwiseModel.open(folder)
    with observe(model.model, lambda layer: seen.append((layer.layer, layer.shape[1]))):
        assert list(model.run(IDS)) == [0, 1, 2, 3]
    assert seen == [(layer, len(ids)) for layer in range(4) for ids in IDS]
    for output, hidden in zip(model.outputs, expected, strict=True):
        assert torch.equal(output.last_hidden_state, hidden)


def test_one_layer_is_in_memory_at_a_time():
    model = LayerwiseModel.open(tiny("qwen3_moe", shard_size="100KB"))
    stack = model.model.model.layers

    def loaded():
        return [
            place for place, layer in enumerate(stack) if not all(parameter.is_meta for parameter in layer.parameters())
        ]

    assert loaded() == [] and not model.model.model.embed_tokens.weight.is_meta
    for place in model.run(IDS):
        assert loaded() == [place]
        assert not any(parameter.is_meta for parameter in stack[place].parameters())
    assert loaded() == []
    assert list(model.run(IDS)) == [0, 1, 2, 3]  # and again
    assert list(model.run([])) == []


def test_a_run_that_is_left_leaves_the_model_as_it_was():
    model = LayerwiseModel.open(tiny("mixtral"))
    kinds = [type(layer) for layer in model.layers]
    running = model.run(IDS)
    next(running)
    assert [type(layer) for layer in model.layers] != kinds
    running.close()
    assert [type(layer) for layer in model.layers] == kinds
    assert list(model.run(IDS[:1])) == [0, 1, 2, 3]


def test_an_error_in_a_layer_or_outside_comes_through():
    model = LayerwiseModel.open(tiny("mixtral"))

    def broken(*args):
        raise RuntimeError("broken layer")

    handle = model.layers[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        list(model.run(IDS))
    handle.remove()
    with pytest.raises(IndexError):
        list(model.run([[1, 10**6]]))
    assert list(model.run(IDS)) == [0, 1, 2, 3]


def test_a_model_that_skips_or_repeats_layers_is_refused():
    model = LayerwiseModel.open(tiny("mixtral"))
    stack = model.model.model.layers
    first, second = stack[0], stack[1]
    stack[0], stack[1] = second, first
    with pytest.raises(ValueError, match="calls another layer where layer 0 is next"):
        list(model.run(IDS))
    stack[0], stack[1] = first, second
    model.model.model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="ends where layer 3 is next"):
        list(model.run(IDS))
    model.model.model.config.num_hidden_layers = 4
    assert list(model.run(IDS)) == [0, 1, 2, 3]


def test_what_cannot_be_read_layer_by_layer_is_refused_by_name(tmp_path):
    packed = edited(copied(tiny("qwen3_moe"), tmp_path / "packed"), quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match='qwen3_moe: weights quantised by "gptq" cannot be loaded layer by layer'):
        LayerwiseModel.open(packed)
    pickled = copied(tiny("mixtral"), tmp_path / "pickled")
    torch.save(load_model(pickled).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        LayerwiseModel.open(pickled)
    with pytest.raises(FileNotFoundError):
        LayerwiseModel.open(tmp_path / "nothing")


def test_a_layer_that_is_not_all_there_is_refused(tmp_path):
    folder = copied(tiny("olmoe"), tmp_path / "model")
    tensors = read(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    write(folder / "model.safetensors", tensors)
    model = LayerwiseModel.open(folder)
    with pytest.raises(ValueError, match=r"layer 2 cannot be loaded .*model\.layers\.2\.self_attn\.q_proj\.weight"):
        list(model.run(IDS))


def test_tied_embeddings_are_outside_the_layers():
    folder = tiny("qwen3_moe", tie_word_embeddings=True)
    model = LayerwiseModel.open(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta


def test_demonstrations_go_in_groups_of_few_tokens():
    lengths = [[len(demo) for demo in group] for group in groups_of(demos(), 11)]
    assert lengths == [[7, 4], [6]]
    assert [len(group) for group in groups_of(demos(), 1)] == [1, 1, 1]


# loading


def test_a_model_is_loaded_as_asked(tmp_path, monkeypatch):
    folder = tiny("mixtral")
    assert load_model(folder).dtype == torch.float32
    wide = load_model(folder, dtype="float64")
    assert wide.dtype == torch.float64 and not wide.training
    with torch.no_grad():
        assert np.isfinite(wide(torch.tensor([IDS[0]])).logits.numpy()).all()
    with pytest.raises(ValueError, match='dtype "int8" is not one of auto'):
        load_model(folder, dtype="int8")
    with pytest.raises(ValueError, match='device "cuda:99" cannot be used'):
        pick_device("cuda:99")
    with monkeypatch.context() as patched:
        patched.setattr("transformers.utils.is_accelerate_available", lambda: False)
        state = load_model(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_model(folder).state_dict().items())
    broken = copied(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(broken)


def test_a_model_that_does_not_fit_is_told_what_to_do(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.MixtralForCausalLM.from_pretrained", full)
    with pytest.raises(ValueError, match="does not fit on cpu: .*--layerwise"):
        load_model(tiny("mixtral"))


def test_scaled_formats_become_plain_numbers_on_loading(tmp_path):
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = load_config(edited(copied(tiny("deepseek_v3"), tmp_path / "model"), quantization_config=stored))
    asked = loading_options(config, "auto")["quantization_config"]
    assert asked.dequantize and list(asked.weight_block_size) == [128, 128]
    assert "quantization_config" not in loading_options(load_config(tiny("mixtral")), "auto")


def test_a_tokenizer_that_is_broken_is_told_and_none_is_none(tmp_path):
    bare = copied(tiny("mixtral"), tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    assert load_tokenizer(bare) is None
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tiny("mixtral"))


# block-scaled weights


def fp8_checkpoint(folder):
    """DeepSeek-V3 as it is distributed: FP8 projections with a scale for each block, the rest bfloat16."""
    copied(tiny("deepseek_v3"), folder)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 2 and name.endswith("_proj.weight"):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            stored[name] = tensor if "bias" in name else tensor.to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return edited(folder, quantization_config=how, dtype="bfloat16")


def mxfp4_checkpoint(folder):
    """GPT-OSS as it is distributed: two 4-bit numbers a byte, 32 of them a scale; the rest bfloat16."""
    copied(tiny("gpt_oss", intermediate_size=32), folder)
    stored, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, rows, columns = tensor.shape
            for what, shape, span in (("blocks", (rows // 32, 16), (0, 256)), ("scales", (rows // 32,), (118, 122))):
                numbers = torch.randint(*span, (experts, columns, *shape), generator=generator, dtype=torch.uint8)
                stored[f"{name}_{what}"] = numbers
        else:
            stored[name] = tensor.to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    how = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return edited(folder, quantization_config=how, dtype="bfloat16")


@pytest.mark.parametrize("made", [fp8_checkpoint, mxfp4_checkpoint])
def test_scaled_weights_are_the_same_layer_by_layer(made, tmp_path):
    if made is fp8_checkpoint:
        pytest.importorskip("accelerate")  # transformers asks for it
    folder = made(tmp_path / "model")
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    whole = collect(model, demos(), folder=folder, progress=False)
    assert collect(LayerwiseModel.open(folder), demos(), folder=folder, progress=False).sha256 == whole.sha256
    if made is fp8_checkpoint:  # near the weights that were rounded
        plain = collect(load_model(tiny("deepseek_v3")), demos(), progress=False)
        ours, theirs = (found.domains["a"].sums["0,1,0"].sum() for found in (whole, plain))
        assert ours == pytest.approx(theirs, rel=0.1)
