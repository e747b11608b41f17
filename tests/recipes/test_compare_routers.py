"""The comparison of routers, end to end on a few bytes: the same table after a kill, clear words for what is wrong."""

import json
import math

import pytest
import torch

from gatewright.moe import moe_layers
from gatewright.recipes import compare_routers as compare
from gatewright.recipes.models.byte_lm import DENSE, ByteLM
from gatewright.routers import list_routers


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A small corpus, few windows; runs take a second. Returns a function that runs the program and reads its file."""
    generator = torch.Generator().manual_seed(0)
    train, validation = (torch.randint(97, 123, (n,), generator=generator).to(torch.uint8) for n in (4000, 2000))
    corpus = compare.Corpus(train, validation, 3)
    monkeypatch.setattr(compare, "read_corpus", lambda: corpus)
    monkeypatch.setattr(compare, "LENGTH", 32)
    monkeypatch.setattr(compare, "VALIDATION_WINDOWS", 6)
    threads = torch.get_num_threads()

    def run(*arguments: str, out: str = "one"):
        folder = tmp_path / out
        compare.main(["--seeds", "0", "--steps", "3", "--rounds", "0", "--out", str(folder), *arguments])
        return json.loads((folder / "results.json").read_text())

    run.corpus, run.folder = corpus, tmp_path
    yield run
    torch.set_num_threads(threads)


def without_times(results: dict) -> dict:
    for part in [*sum(results["runs"].values(), []), *results["summary"].values()]:
        part.pop("seconds")
    return {key: results[key] for key in ("runs", "summary", "told_apart", "settings")}


def test_end_to_end(tiny, capsys):
    results = tiny("--routers", "hash", DENSE, "--seeds", "0", "1", "--rounds", "3")
    assert list(results["summary"]) == ["topk", "hash", DENSE]
    said = capsys.readouterr().out
    assert all(f"\n| {name} | " in said for name in ("topk", "hash", DENSE))
    assert "hash, seed 1: loss " in said and "no order is claimed" in said
    assert "where not the defaults: topk balance_weight=0.01." in said
    for name in ("topk", "hash"):
        run = results["runs"][name][0]
        assert run["experts"] == compare.TOP_K
        assert 0 < run["loss"] < 6 and 0 <= run["entropy"] <= 1 and 0 <= run["fluctuation"] <= 1
        timing = results["timing"][name]
        assert timing["steps_per_second"] > 0 and timing["ratio"]["low"] <= timing["ratio"]["median"]
    assert results["runs"]["hash"][0]["fluctuation"] == 0  # a token id keeps its experts
    assert results["timing"]["topk"]["ratio"]["median"] == 1
    assert "entropy" not in results["runs"][DENSE][0]
    assert results["runs"]["topk"][0]["loss"] != results["runs"]["topk"][1]["loss"]


def test_a_killed_run_goes_on_to_the_same_table(tiny, monkeypatch, capsys):
    whole = without_times(tiny("--routers", "hash", "--seeds", "0", "1"))
    table = capsys.readouterr().out.partition("| router |")[2].partition("Every run")[0]
    write, done = compare.Results.write, []

    def write_until_killed(self, name, seed, numbers, model):
        if len(done) == 2:
            compare.save_file(model.state_dict(), self.weights(name, seed))  # as far as a run may get
            raise KeyboardInterrupt
        done.append((name, seed))
        write(self, name, seed, numbers, model)

    monkeypatch.setattr(compare.Results, "write", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        tiny("--routers", "hash", "--seeds", "0", "1", out="two")
    monkeypatch.setattr(compare.Results, "write", write)
    capsys.readouterr()
    resumed = without_times(tiny("--routers", "hash", "--seeds", "0", "1", "--resume", out="two"))
    said = capsys.readouterr().out
    assert done == [("topk", 0), ("topk", 1)]
    assert "topk, seed" not in said and "hash, seed 0: loss" in said
    assert resumed == whole
    assert said.partition("| router |")[2].partition("Every run")[0] == table


def work(results, runs, steps, threads):
    """Stands for training in a process of its own."""
    for name, seed in runs:
        if name in ("mistaken", "killed"):
            raise SystemExit(2 if name == "mistaken" else 9)
        (results.folder / f"{name}-{seed}-{steps}-{threads}").touch()


def test_processes_share_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "_work", work)
    runs = [(name, seed) for name in ("topk", "hash") for seed in range(3)]
    compare.train_in_processes(compare.Results(tmp_path, {}), runs, jobs=2, steps=4, threads=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{name}-{seed}-4-1" for name, seed in runs)
    for name, said in (("mistaken", ""), ("killed", "a process of --jobs ended with status 9; --resume keeps what is")):
        with pytest.raises(SystemExit) as stop:
            compare.train_in_processes(compare.Results(tmp_path, {}), [(name, 0)], jobs=1, steps=4, threads=1)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_an_unfinished_folder_is_not_overwritten(tiny, capsys):
    tiny("--routers", "topk")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        tiny("--routers", "topk")
    assert stop.value.code == 2
    assert "holds 1 runs: add --resume to keep them, or choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--routers", "tpok"], 'unknown router "tpok": did you mean topk'),
        (["--routers", "expert_choice"], 'router "expert_choice" cannot be compared: it is not causal in training'),
        (["--routers", "modality"], "it needs modality, which a model of bytes does not have"),
        (["--steps", "0"], "--steps 0 --jobs 1 --threads 1 --rounds 0: the first three must be at least 1"),
        (["--seeds", "1", "1"], "--seeds 1 1: give different numbers of at least 0"),
        (["--step", "3"], "unknown option --step: did you mean --steps"),
    ],
)
def test_bad_input(tiny, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tiny(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tiny.folder.glob("*/run-*"))


def test_other_settings_are_not_mixed(tiny, capsys, monkeypatch):
    tiny("--routers", "topk")
    with pytest.raises(SystemExit):
        tiny("--routers", "topk", "--steps", "4", "--resume")
    assert "run-topk-0.json was made with steps=3, this run has 4: choose another --out" in capsys.readouterr().err
    monkeypatch.setitem(compare.ROUTERS, "topk", {"balance_weight": 0.5})
    with pytest.raises(SystemExit):
        tiny("--routers", "topk", "--resume")
    assert "run-topk-0.json was made with options=" in capsys.readouterr().err


def test_a_damaged_file_is_named(tiny, capsys):
    tiny("--routers", "topk")
    (tiny.folder / "one" / "run-topk-0.json").write_text("{")
    with pytest.raises(SystemExit):
        tiny("--routers", "topk", "--resume")
    assert "run-topk-0.json is not what a run writes" in capsys.readouterr().err


def test_a_loss_that_is_no_number_names_the_run(tiny, monkeypatch, capsys):
    honest, calls = compare.byte_loss, []

    def breaks(logits, window):
        calls.append(1)
        return honest(logits, window) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(compare, "byte_loss", breaks)
    with pytest.raises(SystemExit) as stop:
        tiny("--routers", "topk", "--seeds", "5")
    assert stop.value.code == 2
    assert 'router "topk", seed 5: the loss is nan at step 1 of 3' in capsys.readouterr().err
    assert not list(tiny.folder.glob("*/run-*"))


def test_every_causal_router_is_in_it_and_the_others_say_why():
    names, reasons = compare.chosen_routers(None)
    assert names[0] == compare.REFERENCE and names[-1] == DENSE
    assert {*names, *reasons} == {*list_routers(), DENSE}
    assert {"similarity_aware", "attention_aware", "hash", "segment", "union", "openmoe"} <= set(names)
    # none is left out for want of options
    assert all("causal" in reason or "modality" in reason for reason in reasons.values()), reasons
    assert {*compare.ROUTERS, *compare.LATER} <= set(names)


@pytest.mark.parametrize("name", compare.chosen_routers(None)[0])
def test_none_of_them_looks_ahead(name):
    """In training, with the options of the comparison: a loss that knew the next byte would be compared with honest
    ones."""
    model = ByteLM(compare.model_config(name)).double()
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        ids = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(0))
        other = torch.cat([ids[:, :12], (ids[:, 12:] + 100) % 256], dim=1)
        a, b = (model(x, sample_id=torch.arange(1), seed=0, step=0)[0] for x in (ids, other))
    torch.testing.assert_close(a[:, :12], b[:, :12], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_every_run_sees_the_same_bytes_and_starts_the_same(tiny):
    first, again = (tiny.corpus.windows(seed=1, step=2) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (compare.BATCH, 33)
    assert not torch.equal(first, tiny.corpus.windows(seed=1, step=3))
    assert not torch.equal(first, tiny.corpus.windows(seed=2, step=2))
    windows = list(tiny.corpus.validation_windows())
    assert sum(map(len, windows)) == 6
    one, two = (ByteLM(compare.model_config(name)) for name in ("topk", "cosine"))
    for a, b in zip(moe_layers(one), moe_layers(two), strict=True):
        assert torch.equal(a.experts.w1, b.experts.w1)


def test_the_corpus_is_split_by_file(tmp_path):
    for i in range(40):
        (tmp_path / f"module_{i}.py").write_bytes(bytes([i]) * 300)
    for folder in ("test", "package/tests", "site-packages"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "left_out.py").write_bytes(b"\xff" * 300)
    (tmp_path / "package" / "inside.py").write_bytes(bytes([40]) * 300)
    corpus = compare.read_corpus(tmp_path)
    train, validation = set(corpus.train.tolist()), set(corpus.validation.tolist())
    assert train | validation == set(range(41)) and not train & validation and validation
    assert corpus.files == 41
    assert corpus.train.tolist()[:300] == [corpus.train[0]] * 300
    with pytest.raises(ValueError, match="holds 0 Python files, .* too little; use a Python that brings the source"):
        compare.read_corpus(tmp_path / "test" / "none")


def test_own_options_are_named():
    said = compare.own_options(["topk", "hash", "moe_plus_plus"])
    assert said.endswith("defaults: topk balance_weight=0.01; moe_plus_plus residual from block 1=True.")


def test_interval_is_student_t():
    # mean 2, deviation 1, three runs: 4.303 / sqrt(3)
    assert compare.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4844, 2 + 2.4844), abs=1e-3)
    assert compare.interval([1.0]) == (-math.inf, math.inf)
    low, high = compare.interval([float(i % 2) for i in range(40)])
    assert low < 0.5 < high


def test_what_is_told_apart():
    losses = {"topk": [2.0, 2.01, 1.99], "worse": [3.0, 3.01, 2.99], "better": [1.0, 1.01, 0.99], "noisy": [1.0, 2, 3]}
    said = compare.what_is_told_apart(losses)
    assert "up to 0.816 nats" in said
    assert "3 of 6 pairs overlap" in said
    assert "from topk: better lower; worse higher." in said
    alone = compare.what_is_told_apart({"topk": [2.0], "worse": [9.0]})
    assert "1 of 1 pairs overlap" in alone and "none lower; none higher" in alone


def test_measures_are_of_what_was_decided(tiny):
    training = compare.Training("topk", seed=0, steps=1)
    before = compare.validate(training.model, tiny.corpus)
    with torch.no_grad():
        for layer in moe_layers(training.model):
            layer.router.weight.copy_(torch.arange(8.0)[:, None].expand_as(layer.router.weight) * 0)
    same = compare.validate(training.model, tiny.corpus)
    measured = compare.measure_routing(training.model, same, same)
    # equal scores: every token takes the same two
    assert measured["fluctuation"] == 0
    assert measured["collapse_aware_entropy"] == pytest.approx(0, abs=1e-9)
    assert measured["max_violation"] == pytest.approx(3)
    assert measured["starved"] == 6
    assert compare.measure_routing(training.model, before, same)["fluctuation"] > 0.5
