"""The report's data are the metrics' values, its file asks for nothing outside it, and bad input is told in words."""

import base64
import gzip
import json
import math
import os
import re
from pathlib import Path

import made_up_logs
import numpy as np
import pytest

from gatewright.moe import metrics
from gatewright.moe.record_log import LayerInfo, LogWriter, Window, read_log
from gatewright.tools import cli
from gatewright.tools.dashboard.data import MOST_CELLS, cluster, page_data, read_runs
from gatewright.tools.dashboard.definitions import DEFINITIONS
from gatewright.tools.dashboard.report import report


def unpacked(run: dict, entry: dict) -> np.ndarray:
    """As the page unpacks it."""
    data = gzip.decompress(base64.b64decode(run["blob"]))
    codes = np.frombuffer(data, "<" + entry["type"], math.prod(entry["shape"]), entry["at"]).reshape(entry["shape"])
    if "span" in entry:
        table = 2.0 ** (-entry["span"] + (np.arange(256) - 2) / 253 * 2 * entry["span"])
        table[:2] = np.nan, 0
        return table[codes]
    if "scale" in entry:
        return np.where(codes == entry["missing"], np.nan, entry["low"] + entry["scale"] * codes)
    return codes


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return read_log(made_up_logs.write_log(tmp_path_factory.mktemp("made") / "run", capacity=True))


@pytest.fixture(scope="module")
def run(log):
    return page_data([log])["runs"][0]


def test_curves_are_the_metrics_values(log, run):
    counts = log.requested.astype(float)
    expected = {
        "collapse_aware_entropy": metrics.collapse_aware_entropy(counts, 2),
        "max_violation": metrics.max_violation(counts),
        "drop_rate": 1 - log.counts.sum(-1) / log.requested.sum(-1),
        "token_entropy": log.entropy_sum / log.sampled / math.log(16),
    }
    for name, values in expected.items():
        shown = unpacked(run, run["curves"][name])
        scale = run["curves"][name]["scale"]
        assert np.abs(shown - np.asarray(values)).max() <= scale / 2 + 1e-12, name
    assert set(run["curves"]) <= set(DEFINITIONS)


def test_load_within_the_stated_steps(log, run):
    shown = unpacked(run, run["load"]["ratio"])
    fair = log.requested.mean(-1, keepdims=True)
    assert shown.shape == log.requested.shape
    assert np.abs(shown / (log.requested / fair) - 1).max() < 0.0167  # half of 3.3 %
    assert np.array_equal(unpacked(run, run["load"]["assignments"]), log.requested.sum(-1))


def test_movement_of_a_probe(log, run):
    moved, last = run["movement"], log.probes[-1]
    overlap = unpacked(run, moved["overlap"])
    assert moved["steps"] == [probe.step for probe in log.probes]
    for layer in range(len(log.layers)):
        for place, probe in enumerate(log.probes):
            expected = metrics.saturation(probe.index[layer], last.index[layer])
            assert abs(overlap[layer, place, -1] - expected) <= 0.5 / 254 + 1e-9
            for token in range(3):  # spelt out
                before, after = set(probe.index[layer][token]), set(last.index[layer][token])
                assert len(before & after) / 2 <= 1
        kept = [(p.index[layer][:, 0] == last.index[layer][:, 0]).mean() for p in log.probes]
        settled = moved["settled"][layer]
        assert settled is None or kept[moved["steps"].index(settled)] >= 0.95


def test_meaning_against_chance(log, run):
    named = {one["name"]: one for one in run["meaning"]["sets"]}
    assert [named[name]["kind"] for name in ("class", "patch", "token")] == ["panel", "panel", "chips"]
    values, _ = log.probe_labels["class"]
    share = unpacked(run, named["class"]["share"])
    for label, expert in ((0, 3), (7, 11)):
        index = log.probes[-1].index[2][values == label]
        assert abs(share[2, label, expert] - (index == expert).any(1).mean()) <= 0.5 / 254 + 1e-9
    assert named["patch"]["grid"][5] == [1, 1] and named["class"]["grid"] is None
    value, chance, high = named["class"]["nmi"][3]
    assert value > high > chance > 0  # the planted meaning is beyond what permuted labels give
    # ids that occur less than ten times are left out, and said
    ids = np.bincount(log.probe_labels["token"][0])
    assert len(named["token"]["names"]) == (ids >= 10).sum()
    assert named["token"]["rare"] == ((ids > 0) & (ids < 10)).sum()


def test_order_puts_together_what_is_close():
    place = np.array([0.0, 10.0, 0.1, 10.1, 20.0])
    order, merges = cluster(np.abs(place[:, None] - place))
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert abs(order.index(0) - order.index(2)) == 1 and abs(order.index(1) - order.index(3)) == 1
    assert sorted(merges[0][:2] + merges[1][:2]) == [0, 1, 2, 3] and len(merges) == 4
    heights = [merge[2] for merge in merges]
    assert heights == sorted(heights)
    assert cluster(np.zeros((1, 1))) == ([0], [])


def test_one_file_that_asks_for_nothing(log):
    page = report([log])
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,)""", page.split('<script type="module">')[0])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    content = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(content)["format"] == 1


def test_the_same_runs_give_the_same_file(log):
    assert report([log]) == report([log])


def test_the_file_stays_below_a_megabyte(tmp_path):
    made_up_logs.write_log(tmp_path / "run", layers=24, experts=64, top_k=8, windows=200, probes=8, tokens=4096)
    assert len(report(read_runs([tmp_path / "run"])).encode()) < 1_000_000


def test_names_are_text_never_markup(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    names = tuple(f"{evil}{i}" for i in range(2))
    made_up_logs.write_log(tmp_path / "<b>run", layers=2, names=names, classes=(evil, "<i>b", "c"))
    page = report(read_runs([tmp_path / "<b>run"]), title=evil)
    assert "<img" not in page and "<b>run" not in page and "<i>b" not in page
    content = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert content["runs"][0]["layers"][0]["name"] == names[0]


def test_larger_runs_are_thinned_and_it_is_said(tmp_path):
    """The counts of all windows are there: added up, not left out."""
    run = made_up_logs.write_log(
        tmp_path / "run", layers=20, experts=128, windows=301, probes=30, probe_tokens=64, structure=True
    )
    (log,) = read_runs([run])
    page = page_data([log])["runs"][0]
    frames, layers, experts = page["load"]["ratio"]["shape"]
    assert frames * layers * experts <= MOST_CELLS and frames >= 2
    assert unpacked(page, page["load"]["assignments"]).sum() == read_log(run).requested.sum()
    told = " ".join(page["notices"])
    assert "301 windows are shown as" in told and "the load map shows" in told
    assert "of 20 layers" in told and "of 30 probes" in told
    assert page["movement"]["steps"][-1] == log.probes[-1].step


def test_layers_of_different_sizes_and_routers_without_scores(tmp_path):
    layers = [LayerInfo(name="a", layer=3, experts=4, top_k=1.0), LayerInfo(name="b", layer=5, experts=2)]
    writer = LogWriter(tmp_path, layers)
    window = Window.zeros(0, 9, 2, 4)
    window.tokens[:] = 100
    window.counts[:] = window.requested[:] = [[40, 30, 20, 10], [70, 30, 0, 0]]
    writer.window(window)
    writer.close()
    (run,) = page_data(read_runs([tmp_path]))["runs"]
    assert np.allclose(unpacked(run, run["load"]["ratio"])[0, 1], [1.4, 0.6, np.nan, np.nan], rtol=0.02, equal_nan=True)
    assert run["layers"][1]["top_k"] == 1.0  # as many as its tokens asked for
    assert not {"information", "token_entropy", "mass", "balance", "z"} & set(run["curves"])
    report(read_runs([tmp_path]))


def test_a_log_of_which_only_the_probe_is_there(tmp_path):
    writer = LogWriter(tmp_path, [LayerInfo(name="a", layer=0, experts=4, top_k=1.0)])
    writer.probe(0, [np.array([[0], [1], [2], [-1]])], {"class": (np.array([0, 0, 1, 1]), ["x", "y"])})
    writer.close()
    (run,) = page_data(read_runs([tmp_path]))["runs"]
    assert run["load"] is None and run["movement"]["tokens"] == 4 and run["meaning"]["sets"][0]["counts"] == [2, 2]


# the command


def fails(capsys, *arguments) -> str:
    assert cli.main(["dashboard", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_writes_the_report_and_says_what_is_wrong(tmp_path, capsys):
    made_up_logs.write_log(tmp_path / "run", plant={1: "collapse"})
    out = tmp_path / "report.html"
    assert cli.main(["dashboard", str(tmp_path / "run"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "run: layer 1 has collapsed" in said and f"wrote {out} (0." in said
    assert out.read_text().startswith("<!doctype html>")


def test_the_demo_is_a_small_healthy_run_that_the_package_ships(tmp_path, capsys):
    out = tmp_path / "demo.html"
    assert cli.main(["dashboard", "--demo", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("wrote")  # no notice, no alert
    assert out.stat().st_size < 400_000
    assert "not both" in fails(capsys, tmp_path, "--demo")


def test_bad_folders(tmp_path, capsys):
    out = ("--out", tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("hello")
    assert "is empty" in fails(capsys, tmp_path / "empty", *out)
    assert "holds no routing log" in fails(capsys, tmp_path / "foreign", *out)
    assert "does not exist" in fails(capsys, tmp_path / "nowhere", *out)
    LogWriter(tmp_path / "begun", [LayerInfo(name="a", layer=0, experts=4)])
    assert "nothing is recorded yet" in fails(capsys, tmp_path / "begun", *out)
    assert "name the folder of a recorded run, or --demo" in fails(capsys)
    assert not (tmp_path / "report.html").exists()


def test_runs_of_different_shapes(tmp_path, capsys):
    made_up_logs.write_log(tmp_path / "a", layers=2, experts=8, windows=2, probes=0)
    made_up_logs.write_log(tmp_path / "b", layers=3, experts=8, windows=2, probes=0)
    said = fails(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "report.html")
    assert "runs of different shapes cannot be compared" in said
    assert "2 MoE layers of 8 experts" in said and "3 MoE layers of 8 experts" in said


def test_a_torn_shard_is_shown_with_a_notice(tmp_path, capsys):
    made_up_logs.write_log(tmp_path / "run", windows=4, probes=0)
    (part,) = (tmp_path / "run" / "routing").glob("*.routing")
    os.truncate(part, part.stat().st_size - 100)
    assert cli.main(["dashboard", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 0
    assert "left out" in capsys.readouterr().out
    assert "left out" in (tmp_path / "report.html").read_text()


def test_places_that_cannot_be_written(tmp_path, capsys):
    made_up_logs.write_log(tmp_path / "run", windows=2, probes=0)
    assert "is a folder" in fails(capsys, tmp_path / "run", "--out", tmp_path)
    assert "there is no folder" in fails(capsys, tmp_path / "run", "--out", tmp_path / "a" / "b.html")
    closed = Path("/sys")  # where not even root may write
    if not closed.is_dir():
        pytest.skip("no folder here that nobody may write to")
    assert "/sys/report.html: " in fails(capsys, tmp_path / "run", "--out", closed / "report.html")
