"""Drawing from a run or an export: one row a class, the same picture again, one line where something is wrong."""

import pytest
import torch
from made_run import make_run, small_config
from PIL import Image

from gatewright.recipes import sample_dit
from gatewright.tools.export import export


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    make_run(path)
    return path


def draw(run, out, *options):
    sample_dit.main([str(run), "--steps", "2", "--out", str(out), "--device", "cpu", *options])
    return out.read_bytes()


def test_one_row_a_class(run, tmp_path, capsys):
    draw(run, tmp_path / "a.png", "--classes", "3, 7,none", "--count", "2", "--guidance", "1.5")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 * 66 + 2, 3 * 66 + 2)
    assert "2 each of 3, 7, none; guidance 1.5, 2 steps, seed 0" in capsys.readouterr().out


def test_a_run_and_its_export_draw_the_same(run, tmp_path):
    export(run, tmp_path / "out")
    assert draw(run, tmp_path / "a.png") == draw(tmp_path / "out", tmp_path / "b.png")


def test_what_changes_a_picture(run, tmp_path):
    options = ("--classes", "1,2", "--count", "2")
    first = draw(run, tmp_path / "a.png", *options)
    assert first == draw(run, tmp_path / "b.png", *options)
    for other in (("--seed", "1"), ("--guidance", "5"), ("--weights", "model"), ("--steps", "3")):
        assert first != draw(run, tmp_path / "b.png", *options, *other)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_run_with_the_ddpm_objective(tmp_path, sampler):
    make_run(tmp_path / "run", options={"objective": "ddpm", "data": "digits"})
    draw(tmp_path / "run", tmp_path / "a.png", "--classes", "1", "--sampler", sampler)


def test_latents_need_an_autoencoder(tmp_path, capsys):
    config = small_config(input_shape=(4, 8, 8))
    make_run(tmp_path / "run", config, options={"objective": "flow", "data": "latents:somewhere"})
    with pytest.raises(SystemExit):
        draw(tmp_path / "run", tmp_path / "a.png", "--classes", "1")
    assert "--vae DIR" in capsys.readouterr().err


def test_latents_are_decoded_unscaled(tmp_path, monkeypatch):
    class Doubled:
        scale = 0.5

        @staticmethod
        def decode(latents):
            seen.append(latents)
            return torch.zeros(len(latents), 3, 16, 16)

    seen, drawn = [], []
    monkeypatch.setattr(sample_dit, "load_autoencoder", lambda folder, device: Doubled)
    plain = sample_dit.draw_samples
    monkeypatch.setattr(sample_dit, "draw_samples", lambda *a, **k: drawn.append(plain(*a, **k)) or drawn[-1])
    config = small_config(input_shape=(4, 8, 8))
    make_run(tmp_path / "run", config, options={"objective": "flow", "data": "latents:somewhere"})
    draw(tmp_path / "run", tmp_path / "a.png", "--classes", "1", "--vae", "vae", "--batch", "3")
    assert torch.equal(torch.cat(seen), 2 * drawn[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--classes", "3,12"), '"12" is neither a number 0 to 9 nor "none"'),
        (("--classes", "three"), '"three" is neither'),
        (("--count", "0"), "--count 0"),
        (("--steps", "0"), "steps=0"),
        (("--sampler", "ddim"), 'objective "flow" takes no sampler'),
        (("--weights", "best"), "choose one of ema, model"),
        (("--vae", "x"), "leave --vae out"),
        (("--guidence", "2"), "did you mean --guidance"),
    ],
)
def test_mistakes(run, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        draw(run, tmp_path / "a.png", *options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_no_run_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        draw(tmp_path / "nothing", tmp_path / "a.png")
    assert "is no run" in capsys.readouterr().err
