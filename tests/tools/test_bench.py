"""The benchmark at tiny shapes: who runs, in which order, and that its numbers belong together. No time is judged."""

import argparse
import itertools
import json
import subprocess
from pathlib import Path

import pytest
import torch

from gatewright.tools import bench
from gatewright.tools.bench import LEAST, race, verdict
from gatewright.tools.measure import Rates
from gatewright.tools.peers import CONTESTANTS, LoopUnbound, Shape

CPU = torch.device("cpu")
SHAPE = Shape(tokens=40, dim=16, hidden=24, experts=4, top_k=2)
NAMES = ["torch grouped_mm", "loop over w[e]", "loop, unbind"]


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def parse():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args


def ran(log, name, times):
    """An entrant that writes down when it ran and on what, and takes what ``times`` says."""

    def run(inputs):
        log.append((name, inputs))
        return next(times)

    return run


def test_a_race_runs_all_in_every_round_in_turn_on_the_same_inputs():
    log, draws = [], itertools.count()
    entrants = {name: ran(log, name, itertools.repeat((1.0, 2.0))) for name in "abc"}
    found = race(entrants, lambda: next(draws), seconds=0, rounds=20, first="a")
    # once untimed; then as many rounds as an interval needs, because the time is over at once
    assert log[:3] == [("a", 0), ("b", 0), ("c", 0)] and len(log) == 3 * (1 + LEAST)
    rounds = [log[3 * r : 3 * r + 3] for r in range(1, 1 + LEAST)]
    assert ["".join(name for name, _ in one) for one in rounds] == ["abc", "bca", "cab"] * 2
    assert [{inputs for _, inputs in one} for one in rounds] == [{r} for r in range(1, 1 + LEAST)]
    assert found["entrants"]["a"]["rounds"] == LEAST
    assert found["entrants"]["b"]["step"]["median"] == 3.0
    assert found["ratios"]["c"]["backward"]["pairs"] == LEAST and "a" not in found["ratios"]


def test_ratios_are_taken_inside_a_round():
    # a slow minute doubles everyone's time: the ratio does not move
    pace = [1.0, 2.0, 4.0, 1.0, 2.0, 1.0]
    entrants = {
        "ours": ran([], "ours", iter([(p, p) for p in pace])),
        "theirs": ran([], "theirs", iter([(2 * p, 4 * p) for p in pace])),
    }
    ratio = race(entrants, lambda: None, seconds=0, rounds=6, first="ours", warm=True)["ratios"]["theirs"]
    assert ratio["forward"]["low"] == ratio["forward"]["high"] == 0.5
    assert ratio["step"]["median"] == pytest.approx(1 / 3)


def test_the_slow_leave():
    paces = {"ours": 2.0, "slow": 9.0, "very slow": 25.0, "not so slow": 8.0}
    entrants = {name: ran([], name, itertools.repeat((pace / 2, pace / 2))) for name, pace in paces.items()}
    found = race(entrants, lambda: None, seconds=0, rounds=9, first="ours", warm=True)
    rounds = {name: own["rounds"] for name, own in found["entrants"].items()}
    assert rounds == {"ours": LEAST, "slow": 3, "very slow": 2, "not so slow": LEAST}
    assert found["ratios"]["slow"]["step"]["coverage"] < 0.95 < found["ratios"]["not so slow"]["step"]["coverage"]


def test_time_allows_more_rounds():
    entrants = {name: ran([], name, itertools.repeat((1.0, 1.0))) for name in "ab"}
    assert race(entrants, lambda: None, seconds=60, rounds=11, first="a")["entrants"]["a"]["rounds"] == 11


def test_verdicts_follow_the_whole_interval():
    assert verdict({"low": 0.8, "high": 0.99}) == "faster"
    assert verdict({"low": 0.8, "high": 1.0}) == "tied"
    assert verdict({"low": 1.01, "high": 1.2}) == "slower"


def test_an_interval_of_few_pairs_is_marked():
    ratio = {"median": 0.5, "low": 0.25, "high": 0.75}
    assert bench._ratio(ratio | {"coverage": 0.97}) == "0.50 [0.25, 0.75]"
    assert bench._ratio(ratio | {"coverage": 0.75}) == "0.50 [0.25, 0.75] *"
    assert bench._ratio(None) == ""


def test_counts_change_and_stay_and_follow_from_the_seed():
    cell, again = (bench.Cell(SHAPE, torch.float32, CPU, []) for _ in range(2))
    assert torch.equal(cell.fixed_TD, again.fixed_TD)
    assert not torch.equal(cell.draw(), cell.fixed_TD)
    assert set(cell.contestants) == {"gatewright", "dense"}


def test_the_dense_layer_activates_as_many_hidden_units():
    dense = bench.Cell(SHAPE, torch.float32, CPU, []).contestants["dense"].module
    assert dense.spec.hidden == SHAPE.top_k * SHAPE.hidden


def test_who_computes_something_else_does_not_run(monkeypatch):
    class Wrong(LoopUnbound):
        name = "wrong"

        def layer(self, x_TD):
            return 2 * super().layer(x_TD)

    class Broken(LoopUnbound):
        name = "broken"

        def layer(self, x_TD):
            raise RuntimeError("no kernel image\n is available")

    for kind in (Wrong, Broken):
        monkeypatch.setitem(CONTESTANTS, kind.name, kind)
    cell = bench.Cell(SHAPE, torch.float32, CPU, ["wrong", "broken", "SonicMoE"])
    assert set(cell.contestants) == {"gatewright", "dense"}
    assert cell.skipped["wrong"].startswith("ValueError: computes other values in torch.float32: y by 1.0e+00")
    assert cell.skipped["broken"] == "RuntimeError: no kernel image is available"
    assert cell.skipped["SonicMoE"] in ("sonicmoe is not installed", "needs a GPU")


def test_who_fails_only_at_full_size_leaves_then(monkeypatch):
    class TooLarge(LoopUnbound):
        name = "too large"

        def layer(self, x_TD):
            if len(x_TD) > 256:  # more than the check has
                raise torch.OutOfMemoryError("tried to allocate 48 GiB")
            return super().layer(x_TD)

    monkeypatch.setitem(CONTESTANTS, TooLarge.name, TooLarge)
    large = Shape(tokens=300, dim=16, hidden=24, experts=4, top_k=2)
    cell = bench.Cell(large, torch.float32, CPU, ["too large"])
    assert "too large" in cell.contestants
    assert set(cell.memories()) == set(cell.contestants) == {"gatewright", "dense"}
    assert cell.skipped == {"too large": "OutOfMemoryError: tried to allocate 48 GiB"}


def test_we_do_not_get_off_so_lightly(monkeypatch):
    monkeypatch.setattr(bench, "check", lambda *_: (_ for _ in ()).throw(ValueError("computes other values")))
    with pytest.raises(ValueError, match="computes other values"):
        bench.Cell(SHAPE, torch.float32, CPU, [])


def test_memory_of_known_tensors():
    """The dense layer at float32: what backward needs, and the gradients that it leaves."""
    cell = bench.Cell(SHAPE, torch.float32, CPU, [])
    memory = cell.memory(cell.contestants["dense"])
    tokens, dim, hidden = SHAPE.tokens, SHAPE.dim, SHAPE.top_k * SHAPE.hidden
    # h [T, 2H], silu of a half, their product, and the output
    kept = 4 * tokens * (2 * hidden + 2 * hidden + dim)
    gradients = 4 * (tokens * dim + 3 * dim * hidden)
    assert kept * 0.7 <= memory["kept"] <= kept * 1.1
    assert memory["peak"] >= gradients and memory["peak"] >= memory["live_storage"] >= gradients
    assert all(leaf.grad is None for leaf in cell.contestants["dense"].leaves)


def test_numbers_belong_together(monkeypatch):
    monkeypatch.setattr(bench, "measure_rates", lambda dtype, device: Rates(1e12, 1e11))
    results = bench.measure({"small": SHAPE}, ["fp32", "bf16"], NAMES, CPU, minutes=1e-3, rounds=LEAST)
    assert results == json.loads(json.dumps(results))
    assert set(results) == {"machine", "rounds", "minutes", "rates", "cells", "seconds"}
    assert [cell["dtype"] for cell in results["cells"]] == ["fp32", "bf16"]
    names = {"gatewright", "dense", *NAMES}
    for cell in results["cells"]:
        assert set(cell) == {
            "row",
            "shape",
            "dtype",
            "costs",
            "errors",
            "skipped",
            "memory",
            "layer",
            "parts",
            "seconds",
        }
        assert Shape(**cell["shape"]) == SHAPE and cell["skipped"] == {}
        assert set(cell["memory"]) == names and set(cell["errors"]) == names - {"dense"}
        assert set(cell["layer"]) == {"changing", "fixed", "changing_over_fixed"}
        assert {"router", "experts", "dispatch", "combine", "sum by token", "sum by expert"} == set(cell["parts"])
        rates = Rates(**results["rates"][cell["dtype"]])
        for part, found in [("layer", cell["layer"]["changing"]), *cell["parts"].items()]:
            for name, own in found["entrants"].items():
                assert own["step"]["min"] >= own["forward"]["min"] + own["backward"]["min"] > 0
                if "roofline" in own:
                    counted = cell["costs"]["dense" if name == "dense" else part]["forward"]
                    least = rates.milliseconds(counted["flops"], counted["bytes"])
                    assert own["roofline"]["forward"] == pytest.approx(least / own["forward"]["median"])
            first = next(iter(found["entrants"]))
            assert set(found["ratios"]) == set(found["entrants"]) - {first}
    table = bench.report(results)
    assert table.count("| small (40, 16, 24, 4, 2) | fp32 |") == 4  # changing and fixed, both ways and forward
    assert results["machine"]["cpu"] in table and "| / torch grouped_mm |" in table
    assert "at most" in table and "Memory of one forward plus backward" in table


def test_command(tmp_path, capsys, monkeypatch, parse):
    monkeypatch.setattr(bench, "measure_rates", lambda dtype, device: Rates(1e12, 1e11))
    out = tmp_path / "new" / "bench.json"
    options = ["--row", "40,16,24,4,2", "--dtypes", "fp32", "--peers", "loop, unbind", "--threads", "1"]
    assert bench.run(parse([*options, "--minutes", "0.001", "--rounds", "6", "--out", str(out)])) == 0
    printed = capsys.readouterr().out
    assert "| own (40, 16, 24, 4, 2) | fp32 | changing |" in printed
    assert json.loads(out.read_text())["machine"]["threads"] == 1
    assert out.with_suffix(".md").read_text() == printed
    assert sorted(path.name for path in out.parent.iterdir()) == ["bench.json", "bench.md"]


def test_the_flagship_is_started_as_a_program(tmp_path, capsys, monkeypatch, parse):
    def program(command, **_):
        assert command[1:3] == ["-m", "gatewright.recipes.bench_flagship"]
        assert command[3:7] == ["--size", "tiny", "--threads", "1"]
        Path(command[-1]).write_text('{"found": []}')
        return subprocess.CompletedProcess(command, 0, stdout="| model | EP |\n", stderr="")

    monkeypatch.setattr(subprocess, "run", program)
    out = tmp_path / "bench.json"
    assert bench.run(parse(["--rows", "--flagship", "tiny", "--threads", "1", "--out", str(out)])) == 0
    assert capsys.readouterr().out == "| model | EP |\n" == out.with_suffix(".md").read_text()
    assert json.loads(out.read_text())["flagship"] == {"found": []}
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="bench_flagship: error: unknown size\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="--flagship huge ended with status 2: bench_flagship: error: unknown size"):
        bench.run(parse(["--rows", "--flagship", "huge"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows"], "--rows without a name: there is nothing to time"),
        (["--rounds", "5"], "--rounds 5 --threads 2 --minutes 10: choose at least 6 rounds"),
        (["--threads", "0"], "one thread"),
        (["--minutes", "0"], "more than 0 minutes"),
        (["--rows", "course"], '--rows "course": did you mean coarse'),
        (["--dtypes", "fp16"], '--dtypes "fp16": .*Choose from fp32, bf16'),
        (["--peers", "megatron"], '--peers "megatron": .*Choose from torch grouped_mm, transformers eager'),
        (["--row", "1,2,3"], '--row "1,2,3": write five whole numbers T,D,H,E,K'),
        (["--row", "8,4,4,4,1"], "choose at least 1 of everything, and K from 2"),
        (["--device", "tpu"], "--device tpu: choose cpu"),
        (["--out", "bench.csv"], "--out bench.csv: name a file that ends in .json"),
    ],
)
def test_wrong_options(parse, options, said):
    with pytest.raises(ValueError, match=said):
        bench.run(parse(options))
