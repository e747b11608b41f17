"""The converter: both ways without changing a bit, sizes read from shapes, and what is refused without running code."""

import pickle
import re

import pytest
import torch
from made_run import opened, small_config
from safetensors.torch import save_file

from gatewright.recipes.models import promoe_weights
from gatewright.recipes.models.dit import DiT, count_parameters, load_dit
from gatewright.recipes.models.dit_config import DiTConfig, dit_config
from gatewright.recipes.models.promoe_weights import (
    from_released,
    infer_config,
    load_released,
    read_released,
    save_released,
    to_released,
)

CONFIGS = {
    "promoe": small_config(num_classes=7),
    "no shared expert": small_config(shared_expert=False),
    "no unconditional expert": small_config(router_options={"unconditional": False}),
    "dense": small_config("dense"),
    "normed": small_config(qk_norm=True, learn_sigma=False, moe_every=1),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return opened(DiT(CONFIGS[request.param]))


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_there_and_back(model):
    released = to_released(model.state_dict(), model.config)
    assert same(from_released(released, model.config), model.state_dict())
    assert same(to_released(from_released(released, model.config), model.config), released)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_through_a_file(model, tmp_path, ending):
    path = tmp_path / f"weights{ending}"
    save_released(model.state_dict(), model.config, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    again = load_released(path, heads=model.config.heads)
    assert same(again.state_dict(), model.state_dict())
    asked = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 999.0]), torch.tensor([0, model.config.num_classes])
    assert torch.equal(again.eval()(*asked)[0], model.eval()(*asked)[0])


def test_names_are_the_released_ones():
    released = to_released(DiT(CONFIGS["promoe"]).state_dict(), CONFIGS["promoe"])
    shapes = {name: tuple(tensor.shape) for name, tensor in released.items()}
    assert shapes["blocks.1.mlp.cluster_centers"] == (6, 32)
    assert shapes["blocks.1.mlp.experts.6.up_proj.weight"] == (64, 32)
    assert shapes["blocks.1.mlp.experts.0.down_proj.bias"] == (32,)
    assert shapes["blocks.1.mlp.shared_expert.down_proj.weight"] == (32, 64)
    assert shapes["blocks.0.mlp.fc1.weight"] == (128, 32)
    assert not [name for name in shapes if re.search(r"\.w[123]$|router|local", name)]


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("router", ["promoe", "dense"])
def test_shapes_tell_the_papers_sizes(size, router):
    config = dit_config(size, router)
    with torch.device("meta"):
        released = to_released(DiT(config).state_dict(), config)
    found = infer_config(released)
    given = {**config.as_dict(), "router_options": {"unconditional": True} if router == "promoe" else {}}
    assert found == DiTConfig.from_dict(given)
    assert sum(tensor.numel() for tensor in released.values()) == count_parameters(config).total


def test_a_checkpoint_of_a_training_run_gives_its_average(tmp_path):
    config = CONFIGS["promoe"]
    states = [to_released(opened(DiT(config), seed).state_dict(), config) for seed in (1, 2)]
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    content = {"step": 3, "model_state_dict": states[0], "ema_model_state_dict": states[1]}
    torch.save(content | {"optimizer_state_dict": optimizer}, tmp_path / "ckpt.pth")
    assert same(read_released(tmp_path / "ckpt.pth"), states[1])
    assert same(read_released(tmp_path / "ckpt.pth", weights="model"), states[0])
    torch.save(states[0], tmp_path / "bare.pth")
    assert same(read_released(tmp_path / "bare.pth"), states[0])


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("",))

    torch.save({"ema_model_state_dict": Evil()}, tmp_path / "evil.pth")
    with open(tmp_path / "plain.pth", "wb") as file:
        pickle.dump(Evil(), file)
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match="cannot be read as weights alone"):
            read_released(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_weights(tmp_path):
    torch.save({"state": torch.zeros(1), "step": 4}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match='holds no "ema_model_state_dict" .* it holds state, step'):
        read_released(tmp_path / "other.pth")
    torch.save({"a": torch.zeros(100)}, tmp_path / "cut.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "cut.pth").read_bytes()[:300])
        with pytest.raises(ValueError, match=r"cannot be read as weights alone|no whole safetensors"):
            read_released(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a \.safetensors or a \.pth"):
        read_released(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="choose one of ema, model"):
        read_released(tmp_path / "other.pth", weights="best")
    with pytest.raises(FileNotFoundError):
        read_released(tmp_path / "nowhere.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no weights of a DiT"):
        load_released(tmp_path / "a.safetensors")


def test_what_does_not_fit_is_named():
    config = CONFIGS["promoe"]
    released = to_released(DiT(config).state_dict(), config)
    lacking = {name: tensor for name, tensor in released.items() if "blocks.1.attn" not in name}
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.attn\.proj\.bias, blocks\.1\.attn\.proj\.weight"):
        from_released(lacking, config)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.9\.mlp\.fc1\.bias"):
        from_released(released | {"blocks.9.mlp.fc1.bias": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"x_embedder\.proj\.bias has shape \(5,\), expected \(32,\)"):
        from_released(released | {"x_embedder.proj.bias": torch.zeros(5)}, config)
    with pytest.raises(ValueError, match=r"do not fit a model of depth 4, width 64"):
        from_released(released, small_config(dim=64))


def test_a_damaged_set_of_experts_is_named():
    config = CONFIGS["promoe"]
    released = to_released(DiT(config).state_dict(), config)
    del released["blocks.1.mlp.experts.0.up_proj.weight"]
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.experts\.0\.up_proj\.weight"):
        infer_config(released, heads=4)


def test_heads_must_be_said_where_no_release_says_them():
    config = CONFIGS["promoe"]
    with pytest.raises(ValueError, match="width 32: give heads="):
        infer_config(to_released(DiT(config).state_dict(), config))


def test_models_without_released_names(tmp_path):
    config = small_config("race")
    with pytest.raises(ValueError, match='not for "race"'):
        to_released(DiT(config).state_dict(), config)
    dense = CONFIGS["dense"]
    with pytest.raises(ValueError, match=r"ends in \.safetensors or \.pth"):
        save_released(DiT(dense).state_dict(), dense, tmp_path / "weights.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pruned", [{"num_experts": (6, 4)}, {"kept_experts": ((0, 1), (2, 5))}])
def test_pruned_models_have_no_released_names(pruned):
    config = small_config(**pruned)
    with pytest.raises(ValueError, match="the same experts in every layer, and this pruned model has not"):
        to_released(DiT(config).state_dict(), config)


def test_as_a_program(tmp_path, capsys):
    config = CONFIGS["promoe"]
    model = opened(DiT(config))
    save_released(model.state_dict(), config, tmp_path / "released.pth")
    promoe_weights.main([str(tmp_path / "released.pth"), str(tmp_path / "export"), "--heads", str(config.heads)])
    assert "router promoe" in capsys.readouterr().out
    assert same(load_dit(tmp_path / "export").state_dict(), model.state_dict())
    promoe_weights.main([str(tmp_path / "export"), str(tmp_path / "back.safetensors")])
    assert same(read_released(tmp_path / "back.safetensors"), read_released(tmp_path / "released.pth"))


@pytest.mark.parametrize(
    "words, message",
    [
        (("released.pth", "export"), "give heads="),
        (("nowhere.pth", "export"), "nowhere.pth: No such file"),
        (("released.pth", "full", "--heads", "4"), "is not empty"),
        ((".", "back.pth"), "is no run"),
    ],
)
def test_as_a_program_says_what_is_wrong(tmp_path, capsys, words, message):
    save_released(DiT(CONFIGS["promoe"]).state_dict(), CONFIGS["promoe"], tmp_path / "released.pth")
    (tmp_path / "full" / "of").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        promoe_weights.main([str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:]])
    assert stop.value.code == 2 and message in capsys.readouterr().err
