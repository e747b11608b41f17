import json
import math

import numpy as np
import pytest
import torch
from prune_models import tiny
from prune_text import write_lines

from gatewright.tools import cli
from gatewright.tools.prune import evaluate as evaluate_module
from gatewright.tools.prune.collect import collect
from gatewright.tools.prune.demos import Demo
from gatewright.tools.prune.evaluate import Case, evaluate, next_token_losses, sweep
from gatewright.tools.prune.layerwise import LayerwiseModel, backbone
from gatewright.tools.prune.loading import load_model
from gatewright.tools.prune.mask import masked, masked_by
from gatewright.tools.prune.model import moe_blocks, observe

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")


def made_data(count=6, seed=1):
    numbers = np.random.default_rng(seed)
    return [
        Demo(
            where=f"data.jsonl:{i + 1}",
            domain="ab"[i % 2],
            input_ids=tuple(numbers.integers(3, 64, size=numbers.integers(6, 20)).tolist()),
            answer_start=(0, 3)[i % 2],
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def collected():
    """(model, its folder, statistics) by family."""

    def make(family, made={}):  # noqa: B006 made once a module
        if family not in made:
            folder = tiny(family)
            model = load_model(folder)
            made[family] = model, folder, collect(model, made_data(seed=0), folder=folder, progress=False)
        return made[family]

    return make


def plain_loss(model, demo):
    """Whole logits, the loss as transformers' own models count it."""
    with torch.no_grad():
        logits = model(torch.tensor([demo.input_ids])).logits[0].double()
    first = max(demo.answer_start, 1)
    chances = torch.log_softmax(logits, dim=-1)
    return [-chances[t - 1, demo.input_ids[t]].item() for t in range(first, len(demo))]


@pytest.mark.parametrize("family", (*FAMILIES, "llama4_text", "llama4", "minimax"))
def test_losses_are_those_of_the_models_own_logits(family, collected, monkeypatch):
    model, _, _ = collected(family)
    monkeypatch.setattr(evaluate_module, "_LOGITS_AT_ONCE", 64 * 5)  # five places at a time
    for demo in made_data(3):
        with torch.no_grad():
            output = backbone(model)(torch.tensor([demo.input_ids]), use_cache=False)
            found = next_token_losses(model, demo, output)
        np.testing.assert_allclose(found.numpy(), plain_loss(model, demo), rtol=1e-5)
    assert "forward" not in vars(backbone(model)) and backbone(model) is not model


def test_a_model_that_labels_tokens_has_no_such_loss():
    model = load_model(tiny("openai_privacy_filter"))
    with pytest.raises(ValueError, match="scores .* labels, not the next of 64 tokens"):
        evaluate(model, made_data(1), [])
    assert evaluate(model, [], [], metric=lambda given: {"layers": 4})["full"]["metric"] == {"layers": 4.0}


def test_every_case_is_the_masked_models_loss(collected):
    model, _, statistics = collected("qwen3_moe")
    data = made_data()
    cases = sweep(statistics, keep=(6, 0.5), criteria=("easy-ep", "frequency"), modes=("reroute", "no-reroute"))
    assert len(cases) == 8
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = evaluate(model, data, cases)
    assert found["data"] == {
        "a": {"demos": 3, "tokens": sum(len(demo) - 1 for demo in data if demo.domain == "a")},
        "b": {"demos": 3, "tokens": sum(len(demo) - 3 for demo in data if demo.domain == "b")},
    }
    for domain in "ab":
        own = [demo for demo in data if demo.domain == domain]
        whole = np.mean(sum((plain_loss(model, demo) for demo in own), []))
        assert found["full"]["loss"][domain] == pytest.approx(whole, rel=1e-5)
        for case, row in zip(cases, found["cases"], strict=True):
            with masked_by(model, case.plan, mode=case.mode):
                expected = np.mean(sum((plain_loss(model, demo) for demo in own), []))
            assert row["loss"][domain] == pytest.approx(expected, rel=1e-5)
            assert row["delta"][domain] == pytest.approx(expected - whole, abs=1e-5)
            assert row["perplexity"][domain] == pytest.approx(math.exp(expected), rel=1e-5)
    counts = {(row["criterion"], row["count"], row["mode"]) for row in found["cases"]}
    assert counts == {(c, n, m) for c in ("easy-ep", "frequency") for n in (6, 4) for m in ("reroute", "no-reroute")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rerouted_share_is_counted_pair_by_pair(family, collected):
    model, _, statistics = collected(family)
    data = made_data()
    (case,) = sweep(statistics, keep=(4,))
    (row,) = evaluate(model, data, [case])["cases"]
    pairs, lost = {}, {}
    for demo in data:

        def count(layer, demo=demo):
            for token in range(max(demo.answer_start, 1) - 1, len(demo) - 1):
                for expert in layer.index[token].tolist():
                    for key in (demo.domain, (demo.domain, layer.layer)):
                        pairs[key] = pairs.get(key, 0) + 1
                        lost[key] = lost.get(key, 0) + (expert not in case.plan.keep[layer.layer])

        with torch.no_grad(), observe(model, count):
            model(torch.tensor([demo.input_ids]))
    for domain in "ab":
        assert row["rerouted"][domain] == lost[domain] / pairs[domain]
        for block in moe_blocks(model):
            key = (domain, block.layer)
            assert row["rerouted_per_layer"][domain][str(block.layer)] == lost[key] / pairs[key]


def test_layer_by_layer_finds_the_same(collected):
    model, folder, statistics = collected("deepseek_v3")
    cases = sweep(statistics, keep=(4,), modes=("reroute", "no-reroute"))
    assert evaluate(LayerwiseModel.open(folder), made_data(), cases, tokens_at_once=30) == evaluate(
        model, made_data(), cases
    )


def test_any_function_of_the_model_is_measured(collected):
    model, _, statistics = collected("qwen3_moe")
    cases = sweep(statistics, keep=(4,))
    ids = torch.tensor([made_data(1)[0].input_ids])

    def metric(given):
        assert given is model
        with torch.no_grad():
            return {"top": given(ids).logits[0, -1].max()}

    found = evaluate(model, [], cases, metric=metric)
    assert found["data"] == {} and found["full"]["loss"] == {}
    assert found["full"]["metric"] == metric(model)
    with masked_by(model, cases[0].plan):
        assert found["cases"][0]["metric"] == metric(model)
    assert found["cases"][0]["metric"] != found["full"]["metric"]
    both = evaluate(model, made_data(), cases, metric=metric)  # its own forwards are not counted as data
    assert both["cases"][0]["rerouted"] == evaluate(model, made_data(), cases)["cases"][0]["rerouted"]


def test_the_model_is_restored_whatever_happens(collected):
    model, _, statistics = collected("qwen3_moe")
    cases, ids = sweep(statistics, keep=(4,)), torch.tensor([made_data(1)[0].input_ids])
    with torch.no_grad():
        before = model(ids).logits
    calls = []

    def failing(given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, [], cases, metric=failing)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    with masked(model, cases[0].plan.keep):  # it is not masked any more
        pass


def test_what_cannot_be_measured_is_refused_first(collected):
    model, folder, statistics = collected("qwen3_moe")
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate(model, [], [])
    with pytest.raises(ValueError, match="a metric needs the whole model"):
        evaluate(LayerwiseModel.open(folder), [], [], metric=lambda given: {})
    with pytest.raises(ValueError, match='mode "rerout" is not one of reroute, no-reroute'):
        sweep(statistics, modes=("rerout",))
    with pytest.raises(ValueError, match='unknown criterion "easy": did you mean'):
        sweep(statistics, criteria=("easy",))
    with pytest.raises(ValueError):  # fewer than a token takes
        sweep(statistics, keep=(1,))
    other, _, _ = collected("deepseek_v3")  # its layer 0 is dense
    measured = []
    with pytest.raises(ValueError, match="layers"):
        evaluate(other, made_data(), sweep(statistics, keep=(4,)), report=measured.append)
    assert measured == []


# the command line


def command(*argv):
    return cli.main(["prune", "evaluate", *map(str, argv), "--device", "cpu"])


@pytest.fixture
def files(tmp_path, collected):
    _, folder, statistics = collected("qwen3_moe")
    statistics.save(tmp_path / "stats")
    lines = [{"input_ids": list(demo.input_ids), "domain": demo.domain} for demo in made_data()]
    return folder, tmp_path / "stats", write_lines(tmp_path / "data.jsonl", *lines)


def test_the_command_sweeps_and_writes_numbers(files, tmp_path, capsys):
    folder, stats, data = files
    out = tmp_path / "evaluation.json"
    argv = [folder, "--stats", stats, "--data", data, "--keep", "0.75", "4", "--criteria", "easy-ep", "random"]
    assert command(*argv, "--mode", "reroute", "no-reroute", "--choose-on", "a", "--out", out) == 0
    found = json.loads(out.read_text())
    assert found["kind"] == "gatewright pruning evaluation" and found["model"]["model_type"] == "qwen3_moe"
    assert [(row["criterion"], row["count"], row["mode"]) for row in found["cases"]] == [
        (criterion, count, mode)
        for criterion in ("easy-ep", "random")
        for count in (6, 4)
        for mode in ("reroute", "no-reroute")
    ]
    assert all(list(row["domains"]) == ["a"] for row in found["cases"])
    printed = capsys.readouterr()
    assert "the whole model took" in printed.err and "8 masked ones need about" in printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 2 + 1 + 8
    assert lines[2].startswith("whole model") and lines[4].startswith("easy-ep 6 no-reroute")
    assert f"{found['cases'][0]['delta']['a']:+.4f}" in lines[3]
    assert len({len(line) for line in lines[3:]}) == 1  # columns stand below each other


def test_the_command_measures_plans(files, tmp_path, collected):
    folder, stats, data = files
    (case,) = sweep(collected("qwen3_moe")[2], keep=(0.5,))
    case.plan.save(tmp_path / "plan.json")
    out = tmp_path / "evaluation.json"
    assert command(folder, "--plan", tmp_path / "plan.json", "--data", data, "--out", out) == 0
    (row,) = json.loads(out.read_text())["cases"]
    assert row["plan_hash"] == case.plan.hash and row["count"] == 4


def test_the_command_refuses_what_does_not_fit(files, tmp_path, capsys):
    folder, stats, data = files
    for argv, message in [
        ([folder, "--data", data], "give either --stats"),
        ([folder, "--data", data, "--stats", stats, "--plan", "p"], "give either --stats"),
        ([tiny("mixtral"), "--data", data, "--stats", stats], "is not the checkpoint that the statistics"),
        ([folder, "--data", data, "--stats", stats, "--keep", "some"], "some"),
        ([folder, "--data", data, "--stats", stats, "--out", tmp_path / "none" / "x"], "make it first"),
        ([folder, "--data", tmp_path / "none.jsonl", "--stats", stats], "none.jsonl"),
    ]:
        assert command(*argv) == 2
        assert message in capsys.readouterr().err


def test_cases_can_be_made_by_hand(collected):
    model, _, statistics = collected("qwen3_moe")
    (case,) = sweep(statistics, keep=(4,))
    (row,) = evaluate(model, made_data(), [Case(case.plan, "no-reroute")])["cases"]
    assert row["keep"] is None and row["mode"] == "no-reroute"


# a run of this library


def test_a_run_is_collected_from_and_measured_by_the_same_commands(tmp_path, capsys):
    from made_run import make_run

    from gatewright.recipes.models.dit_pruning import draw_demonstrations
    from gatewright.tools.prune import runs

    run, stats, out = tmp_path / "run", tmp_path / "stats", tmp_path / "evaluation.json"
    make_run(run)
    demos = draw_demonstrations(runs.open_run(run).subject.data, (0, 1), 3, images=2, draws=2)
    file = write_lines(tmp_path / "digits.jsonl", *(demo.record() for demo in demos))
    assert cli.main(["prune", "collect", str(run), "--demos", str(file), "--out", str(stats), "--device", "cpu"]) == 0
    assert "digits: 3 demonstrations" in capsys.readouterr().out
    assert command(run, "--stats", stats, "--keep", "4", "--criteria", "easy-ep", "random", "--out", out) == 0
    found = json.loads(out.read_text())
    assert found["kind"] == "gatewright pruning evaluation" and found["model"]["model_type"].startswith("gatewright/")
    assert [(row["criterion"], row["count"]) for row in found["cases"]] == [("easy-ep", 4), ("random", 4)]
    for row in found["cases"]:
        assert row["loss"].keys() == found["full"]["loss"].keys() == found["data"].keys()
        for label, loss in row["loss"].items():
            assert row["delta"][label] == loss - found["full"]["loss"][label]
    assert "easy-ep 4" in capsys.readouterr().out
    assert command(run, "--stats", stats, "--data", file) == 2
    assert "--data is for checkpoints" in capsys.readouterr().err
