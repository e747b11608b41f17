"""From a checkpoint folder and a JSONL file to a pruned, verified checkpoint, by the command line alone."""

import json

import browser
import pytest
import torch
from prune_models import copied, tiny, with_mtp
from prune_text import BYTES_VOCABULARY, TEMPLATE, byte_tokenizer, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatewright.tools.cli import main
from gatewright.tools.prune.mask import masked
from gatewright.tools.prune.plan import Plan
from gatewright.tools.prune.statistics import Statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3-MoE with a tokenizer of bytes, in two shards, and two domains' demonstrations."""
    here = tmp_path_factory.mktemp("walk")
    source = tiny("qwen3_moe", vocab_size=BYTES_VOCABULARY, max_position_embeddings=256, shard_size="200KB")
    byte_tokenizer(TEMPLATE).save_pretrained(copied(source, here / "model"))
    assert len(list((here / "model").glob("*.safetensors"))) > 1
    sums = [{"prompt": f"{i} + {i}?", "answer": f"{2 * i}, as {i} twice is {2 * i}."} for i in range(12)]
    write_lines(here / "sums.jsonl", *sums)
    write_lines(here / "words.jsonl", *({"text": "a word and another word, " * (1 + i % 3)} for i in range(6)))
    return here


@pytest.fixture(scope="module")
def walked(folder):
    """All steps, in the order of the walk-through."""

    def step(*argv: object) -> None:
        assert main(["prune", *map(str, argv)]) == 0, argv

    model, stats, plan, out = folder / "model", folder / "stats", folder / "plan.json", folder / "pruned"
    step("inspect", model, "--keep", "0.5")
    demos = (
        "--demos",
        folder / "sums.jsonl",
        "--domain",
        "sums",
        "--demos",
        folder / "words.jsonl",
        "--domain",
        "words",
    )
    step("collect", model, *demos, "--out", stats, "--device", "cpu", "--quiet")
    step("plan", stats, "--keep", "0.5", "--criterion", "easy-ep", "--domain", "sums", "--model", model, "--out", plan)
    step("dry-run", plan, "--model", model)
    data = ("--data", folder / "sums.jsonl", "--domain", "sums")
    choice = ("--keep", "0.75", "0.5", "--criteria", "easy-ep", "random", "--choose-on", "sums")
    step("evaluate", model, "--stats", stats, *choice, *data, "--device", "cpu", "--out", folder / "evaluation.json")
    step("apply", plan, "--model", model, "--out", out)
    step("verify", plan, "--model", model, "--pruned", out)
    given = ("--stats", stats, "--evaluation", folder / "evaluation.json", "--model", model, "--pruned", out)
    step("report", plan, *given, "--out", folder / "report.html")
    return folder


def test_the_output_is_an_ordinary_checkpoint_with_the_masked_models_logits(walked):
    plan = Plan.load(walked / "plan.json")
    pruned = AutoModelForCausalLM.from_pretrained(walked / "pruned")
    whole = AutoModelForCausalLM.from_pretrained(walked / "model")
    ids = AutoTokenizer.from_pretrained(walked / "pruned")("7 + 7?", return_tensors="pt").input_ids
    assert pruned.config.num_experts == plan.count == 4
    with torch.no_grad():
        with masked(whole, plan.keep):
            expected = whole(ids).logits
        assert torch.equal(pruned(ids).logits, expected)
        assert not torch.equal(whole(ids).logits, expected)


def test_the_plan_replays_and_belongs_to_the_files(walked):
    statistics, plan = Statistics.load(walked / "stats"), Plan.load(walked / "plan.json")
    assert list(statistics.domains) == ["sums", "words"] and statistics.domains["sums"].demos == 12
    assert plan.replay(statistics).hash == plan.hash
    assert plan.statistics_sha256 == statistics.sha256
    assert dict(plan.domains) == {"sums": 1.0}


def test_the_plan_was_measured_before_it_was_written(walked):
    cases = json.loads((walked / "evaluation.json").read_text())["cases"]
    plan = Plan.load(walked / "plan.json")
    assert [one["plan_hash"] == plan.hash for one in cases] == [False, True, False, False]
    assert {one["criterion"] for one in cases} == {"easy-ep", "random"}


@pytest.mark.skipif(bool(browser.MISSING), reason="needs a browser")
def test_the_report_shows_all_of_it(walked):
    with browser.Browser() as page:
        page.open(walked / "report.html")
        page.wait("return document.querySelector('main .page')")
        tiles = page.run("return [...document.querySelectorAll('.tile')].map((one) => one.textContent)")
        assert len(tiles) == 6 and "4 of 8" in tiles[0]
        for name in ("cut", "mass", "agreement", "loss", "size"):
            page.run("document.querySelector(arguments[0]).click()", f"[data-page={name}]")
            assert page.run("return document.querySelectorAll('main .missing').length") == 0, name
        said = page.run("return document.querySelector('#fig-size .note').textContent")
        assert "has the predicted size to the byte" in said
        assert page.console() == []


def test_a_spoiled_output_is_found_out(walked, tmp_path, capsys):
    spoiled = copied(walked / "pruned", tmp_path / "spoiled")
    file = sorted(spoiled.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert (
        main(["prune", "verify", str(walked / "plan.json"), "--model", str(walked / "model"), "--pruned", str(spoiled)])
        != 0
    )
    assert "V0  FAILED" in capsys.readouterr().out.replace("failed", "FAILED")


def test_refusals_come_before_anything_is_written(walked, tmp_path, capsys):
    model, plan = str(walked / "model"), str(walked / "plan.json")
    for argv in (
        ["apply", plan, "--model", model, "--out", model],
        ["apply", plan, "--model", model, "--out", str(walked / "pruned")],
        ["apply", plan, "--model", str(tmp_path), "--out", str(tmp_path / "out")],
        ["dry-run", str(walked / "stats"), "--model", model],
        ["collect", model, "--demos", plan, "--out", str(tmp_path / "out")],
        ["verify", plan, "--model", model, "--pruned", str(tmp_path)],
        ["report", plan, "--model", model, "--pruned", str(tmp_path), "--out", str(tmp_path / "report.html")],
    ):
        assert main(["prune", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("gatewright: error: "), error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A DeepSeek-V3 of two groups with a layer for multi-token prediction, and what one pass over token ids leaves."""
    here = tmp_path_factory.mktemp("grouped")
    with_mtp(tiny("deepseek_v3", num_experts=8, n_group=2, topk_group=1), here / "model")
    demos = [{"input_ids": [3 + (7 * i + i * j) % 60 for j in range(24)]} for i in range(6)]
    write_lines(here / "demos.jsonl", *demos)
    arguments = ["--demos", str(here / "demos.jsonl"), "--out", str(here / "stats"), "--device", "cpu", "--quiet"]
    assert main(["prune", "collect", str(here / "model"), "--layerwise", *arguments]) == 0
    return here


@pytest.mark.parametrize("policy", ["slice-equal-groups", "slice", "slice-regroup"])
@pytest.mark.parametrize("mtp", ["strip", "prune"])
def test_groups_and_multi_token_prediction(grouped, tmp_path, capsys, policy, mtp):
    plan, out = tmp_path / "plan.json", tmp_path / "pruned"
    argv = ["--keep", "0.5", "--policy", policy, "--out", str(plan), "--model", str(grouped / "model")]
    if mtp == "prune":
        (tmp_path / "mtp.json").write_text('{"4": [0, 1, 4, 6]}')
        argv += ["--mtp-keep", str(tmp_path / "mtp.json")]
    assert main(["prune", "plan", str(grouped / "stats"), *argv]) == 0
    assert (Plan.load(plan).mtp, Plan.load(plan).num_groups) == (mtp, 1 if policy == "slice" else 2)
    assert main(["prune", "apply", str(plan), "--model", str(grouped / "model"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["prune", "verify", str(plan), "--model", str(grouped / "model"), "--pruned", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(f"{level}  passed" in said for level in ("V0", "V1", "V2", "V3"))
    config = json.loads((out / "config.json").read_text())
    assert config["n_routed_experts"] == 4 and config["n_group"] == Plan.load(plan).num_groups
    assert (config["num_nextn_predict_layers"] == 0) == (mtp == "strip")


def test_a_size_is_kept_to(walked, tmp_path):
    """The count that a size asks for is the largest whose files are no larger."""
    model, stats, sizes = walked / "model", str(walked / "stats"), {}
    for count in (5, 6):
        plan, out = tmp_path / f"plan-{count}", tmp_path / f"pruned-{count}"
        assert main(["prune", "plan", stats, "--keep", str(count), "--out", str(plan)]) == 0
        assert main(["prune", "apply", str(plan), "--model", str(model), "--out", str(out)]) == 0
        sizes[count] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    between = (sizes[5] + sizes[6]) // 2
    plan = tmp_path / "plan.json"
    argv = ["--keep", f"{between / 2**20:.6f}MiB", "--model", str(model), "--out", str(plan)]
    assert main(["prune", "plan", stats, *argv]) == 0
    assert Plan.load(plan).count == 5
