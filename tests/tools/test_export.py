"""`gatewright export`: what it writes opens as the same model, and nothing half-written stays."""

import json
import subprocess
import sys

import pytest
import torch
from made_run import STEP, make_run
from safetensors.torch import load_file

from gatewright.recipes.models.dit import load_dit
from gatewright.tools import cli
from gatewright.tools import export as exporter


def test_export_opens_as_the_average(tmp_path, capsys):
    _, average = make_run(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "deep" / "out")]) == 0
    out = tmp_path / "deep" / "out"
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    state, expected = load_dit(out).state_dict(), average.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    content = json.loads((out / "config.json").read_text())
    assert (content["model"], content["weights"], content["step"]) == ("dit", "ema", STEP)
    assert content["options"]["objective"] == "flow" and content["config"]["router"] == "promoe"
    assert f'weights "ema" after {STEP} steps' in capsys.readouterr().out


def test_export_of_the_trained_weights(tmp_path):
    trained, _ = make_run(tmp_path / "run")
    exporter.export(tmp_path / "run", tmp_path / "out", weights="model")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
    with pytest.raises(ValueError, match='holds the weights "model", not "ema"'):
        load_dit(tmp_path / "out", weights="ema")


def test_an_empty_folder_is_filled_and_a_full_one_is_not(tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    exporter.export(tmp_path / "run", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "is not empty: choose a new folder" in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    make_run(tmp_path / "run")

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(exporter, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        exporter.export(tmp_path / "run", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_it_needs_no_engine(tmp_path):
    make_run(tmp_path / "run")
    script = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from gatewright.tools import cli\n"
        f"sys.exit(cli.main(['export', {str(tmp_path / 'run')!r}, '--out', {str(tmp_path / 'out')!r}]))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()
