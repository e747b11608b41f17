"""Opening what others trained: a run or an export becomes the model it was; what is neither is refused by name."""

import json

import pytest
import torch
from made_run import STEP, make_run, small_config
from safetensors.torch import load_file, save_file

from gatewright.tools import runs
from gatewright.tools.export import export
from gatewright.tools.weights import load_model, read_weights


def equal(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("router", ["promoe", "topk", "race", "dense"])
def test_a_run_becomes_its_model(tmp_path, router):
    trained, average = make_run(tmp_path / "run", small_config(router))
    model, run = load_model(tmp_path / "run")
    assert equal(model, average) and not model.training and run.options["data"] == "digits"
    assert equal(load_model(tmp_path / "run", weights="model")[0], trained)


def test_it_computes_what_the_trained_model_computed(tmp_path):
    trained, _ = make_run(tmp_path / "run")
    model, _ = load_model(tmp_path / "run", weights="model")
    asked = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([0, 5, 10])
    assert torch.equal(model(*asked)[0], trained.eval()(*asked)[0])


def test_where_weights_come_from(tmp_path):
    make_run(tmp_path / "run")
    assert read_weights(tmp_path / "run")[2] == ("ema", STEP)
    assert read_weights(tmp_path / "run", weights="model")[2] == ("model", STEP)


def test_a_run_without_an_average(tmp_path):
    trained, _ = make_run(tmp_path / "run", averaged=False)
    with pytest.raises(ValueError, match='holds no average of the weights: ask for weights "model"'):
        load_model(tmp_path / "run")
    assert equal(load_model(tmp_path / "run", weights="model")[0], trained)


def test_a_checkpoint_of_another_model(tmp_path):
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    content = json.loads(file.read_text())
    content["config"]["depth"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not those of its model .* unexpected: blocks\.2"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "dti"}, "did you mean dit"),
        ({"model": "os:system"}, "nobody makes models"),
        ({"config": {"dim": "128"}}, "lacks input_shape"),
        ({"format": 2}, "has format 2"),
        ({"config": 5}, "is damaged"),
    ],
)
def test_a_description_that_is_not_a_recipes(tmp_path, change, message):
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "run")


def test_a_configuration_of_wrong_kinds(tmp_path):
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    content = json.loads(file.read_text())
    for name, value in (("dim", "128"), ("input_shape", 8), ("router", ["promoe"]), ("router_options", "gate")):
        file.write_text(json.dumps(content | {"config": content["config"] | {name: value}}))
        with pytest.raises(ValueError):
            load_model(tmp_path / "run")


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run"):
        load_model(tmp_path)
    run = runs.Run(path=tmp_path / "run", model="dit", config=small_config().as_dict(), options={})
    run.write({})
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load_model(tmp_path / "run")


def test_a_damaged_checkpoint(tmp_path):
    make_run(tmp_path / "run")
    file = next((tmp_path / "run").rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        load_model(tmp_path / "run")


def test_unknown_weights(tmp_path):
    make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="choose one of ema, model"):
        load_model(tmp_path / "run", weights="average")


def test_damaged_exports(tmp_path):
    make_run(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    config, weights = tmp_path / "out" / "config.json", tmp_path / "out" / "model.safetensors"
    state, content = load_file(weights), json.loads(config.read_text())

    config.write_text(json.dumps({name: value for name, value in content.items() if name != "step"}))
    with pytest.raises(ValueError, match='lacks "weights" or "step"'):
        load_model(tmp_path / "out")
    config.write_text(json.dumps(content))

    save_file({name: value for name, value in state.items() if name != "pos_embed"}, weights)
    with pytest.raises(ValueError, match="missing: pos_embed"):
        load_model(tmp_path / "out")
    save_file(state | {"pos_embed": torch.zeros(1, 4, 32)}, weights)
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 4, 32\), expected \(1, 16, 32\)"):
        load_model(tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path / "out")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_model(tmp_path / "out")
