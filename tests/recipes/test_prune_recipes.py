"""The pruning recipes: their pieces and a short run each, and in full, as evidence, what the README says of them."""

import json
import math

import numpy as np
import pytest
import torch
from made_run import make_run, small_config
from PIL import Image

from gatewright.recipes import prune_digits, prune_speed, prune_two_alphabets
from gatewright.tools.weights import read_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("pruning") / "run"
    make_run(path, small_config(dim=16))
    return path


def test_the_alphabets_share_no_byte():
    domains = prune_two_alphabets.read_domains()
    assert (domains["B"]["train"] >= 128).all() and (domains["B"]["validation"] >= 128).all()
    code = torch.bincount(domains["A"]["train"].long(), minlength=256)
    assert code[128:].sum() < 0.01 * code.sum()
    text = bytes((domains["B"]["train"][:2000].int() - 128).tolist()).decode("ascii")
    assert " the " in text


def test_two_alphabets_in_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prune_two_alphabets, "EVALUATED", (1, 4))
    monkeypatch.setattr(prune_two_alphabets, "DEMOS", 3)
    monkeypatch.setattr(prune_two_alphabets, "SHOTS", (1, 3))
    monkeypatch.setattr(prune_two_alphabets, "RANDOM_DRAWS", 1)
    monkeypatch.setattr(prune_two_alphabets, "KEEP", (4,))
    options = ["--steps", "3", "--seeds", "5", "--out", str(tmp_path)]
    prune_two_alphabets.main(options)
    first = json.loads((tmp_path / "results.json").read_text())
    prune_two_alphabets.main(options)
    again = json.loads((tmp_path / "results.json").read_text())
    assert first[0]["training_seconds"] > 0 == again[0]["training_seconds"]
    assert first[0]["rows"] == again[0]["rows"] and len(first[0]["rows"]) == len(prune_two_alphabets.PLANS) + 3
    out = capsys.readouterr().out
    assert "| 4 | EASY-EP on A |" in out and "1 other demos | 3 other demos" in out
    lines = (tmp_path / "b-demos.jsonl").read_text().splitlines()
    assert len(lines) == 3 and len(json.loads(lines[0])["input_ids"]) == prune_two_alphabets.LENGTH
    assert (tmp_path / "seed-5" / "config.json").is_file()


def test_a_reversed_choice_shares_nothing_with_the_choice(tmp_path, monkeypatch):
    rows = prune_two_alphabets.selection.top(np.arange(32.0).reshape(2, 16), np.full(2, 8))
    worst = prune_two_alphabets.selection.top(-np.arange(32.0).reshape(2, 16), np.full(2, 8))
    assert not (rows & worst).any()


def test_digits_in_short(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prune_digits, "DEMOS", 3)
    monkeypatch.setattr(prune_digits, "IMAGES", 1)
    monkeypatch.setattr(prune_digits, "RANDOM_DRAWS", 1)
    out = tmp_path / "out"
    prune_digits.main(
        [str(run), "--classes", "7, 3", "--seeds", "0", "--count", "2", "--steps", "2", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    assert "Kept classes 7, 3" in printed and "EASY-EP, keep-rows" in printed
    summary = json.loads((out / "results.json").read_text())
    assert summary["verified"] == {"V0": True, "V1": True, "V2": True, "V3": True}
    assert set(summary["results"][0]["plans"]) == {
        f"{name}, {policy}" for name in prune_digits.PLANS for policy in prune_digits.POLICIES
    }
    assert all(math.isfinite(loss) for loss in summary["results"][0]["full"].values())
    lines = [json.loads(line) for line in (out / "demos.jsonl").read_text().splitlines()]
    assert [line["class"] for line in lines] == [7, 3, 7] and all(line["domain"] == "kept" for line in lines)
    state = read_weights(out / "pruned")[0]
    assert state["blocks.1.mlp.experts.w1"].shape[0] == 3
    with Image.open(out / "samples.png") as picture:  # 8 pixels, enlarged to 64, with a column between the halves
        assert picture.size == (5 * 66 + 2, 4 * 66 + 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--classes", "3,x"], "--classes 3,x: give numbers 0 to 9, each once"),
        (["--classes", "3,3"], "each once"),
        (["--keep", "many"], "many"),
        (["--count", "0"], "--count 0: choose at least 1"),
        (["--clases", "3"], "did you mean --classes"),
    ],
)
def test_digits_options_that_do_not_fit(run, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        prune_digits.main([str(run), "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_speed_of_a_made_checkpoint(tmp_path, capsys):
    sizes = ["--dim", "64", "--hidden", "32", "--layers", "1", "--experts", "8", "--top_k", "2"]
    options = ["--batch", "2", "--length", "4", "--rounds", "2", "--out", str(tmp_path / "speed.json")]
    prune_speed.main([*sizes, *options])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert set(found["speed"]) == {"prompt, 2 x 4 tokens", "one token each of 2"}
    assert all(len(one["full"]) == len(one["pruned"]) == 2 for one in found["speed"].values())
    # 4 of 8 experts of three maps and 4 rows of the router less
    saved = found["memory"]["full"]["held"] - found["memory"]["pruned"]["held"]
    assert saved == 4 * (4 * 3 * 64 * 32 + 4 * 64)
    assert found["memory"]["full"]["process"] > 10e6
    assert "times as fast" in capsys.readouterr().out


def test_held_bytes_count_a_shared_storage_once():
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    tied.register_buffer("view", tied[0].weight.detach()[:2])
    assert prune_speed.held_bytes(tied) == 64


def test_speed_needs_two_folders(capsys):
    with pytest.raises(SystemExit):
        prune_speed.main(["one"])
    assert "two folders" in capsys.readouterr().err


@pytest.mark.evidence
def test_two_alphabets(tmp_path):
    """On three seeds: a plan for A keeps A and loses B, far better than chance, and the files are the mask."""
    prune_two_alphabets.main(["--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 3
    for result in results:
        rows = result["rows"]
        assert rows["8 EASY-EP on A"]["A"] < 0.05 and rows["8 EASY-EP on A"]["B"] > 0.25
        assert rows["8 EASY-EP on B"]["B"] < 0.05 and rows["8 EASY-EP on B"]["A"] > 0.25
        assert rows["8 random"]["A"] > 0.4 and rows["8 EASY-EP on A, reversed"]["A"] > 1
        assert rows["4 EASY-EP on A"]["A"] < 0.3 and rows["4 EASY-EP on A"]["A"] < rows["4 random"]["A"] / 2
        for domain in "AB":
            assert rows["8 EASY-EP on both"][domain] < rows["8 random"][domain] / 2
        # the token term changes little here
        assert abs(rows["4 EASY-EP on A"]["A"] - rows["4 no token term on A"]["A"]) < 0.05
    assert np.mean([result["rows"]["8 EASY-EP on A"]["B"] for result in results]) > 0.4
    check_files(tmp_path)


def check_files(folder):
    """The steps of the command on the model of seed 0: what is written answers as the mask, bit for bit."""
    from gatewright.tools import cli
    from gatewright.tools.prune.loading import load_model
    from gatewright.tools.prune.mask import masked_by
    from gatewright.tools.prune.plan import Plan

    model, stats, plan, out = (str(folder / name) for name in ("seed-0", "stats", "plan.json", "pruned"))
    demos = str(folder / "a-demos.jsonl")
    for line in (
        ["collect", model, "--demos", demos, "--out", stats],
        ["plan", stats, "--keep", "8", "--out", plan],
        ["apply", plan, "--model", model, "--out", out],
        ["verify", plan, "--model", model, "--pruned", out],
    ):
        assert cli.main(["prune", *line]) == 0, line
    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    whole = load_model(model)
    with torch.inference_mode(), masked_by(whole, Plan.load(plan)):
        expected = whole(ids).logits
    with torch.inference_mode():
        assert torch.equal(load_model(out)(ids).logits, expected)
