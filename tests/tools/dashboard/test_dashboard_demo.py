"""The run that comes with the package: real, small, whole, and shown by one command."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import setuptools

from gatewright.moe.metrics import collapse_aware_entropy
from gatewright.moe.record_log import read_log
from gatewright.tools import cli, dashboard
from gatewright.tools.dashboard.alerts import find_alerts

DEMO = Path(dashboard.__file__).parent / "demo"


def test_the_demo_is_a_whole_log_with_every_page_in_it():
    log = read_log(DEMO)
    assert log.complete and log.notices == []
    assert len(log.layers) == 3 and all(layer.router == "promoe" and layer.experts == 12 for layer in log.layers)
    assert len(log.steps) == 60 and log.steps[-1] == 599 and (np.diff(log.steps) == 10).all()
    assert (log.counts.sum(-1) == 2 * log.tokens).all() and (log.sampled > 0).all() and "loss" in log.scalars
    assert [probe.step for probe in log.probes] == [120, 240, 360, 480, 600] and len(log.probes[0].index[0]) == 2048
    assert set(log.probe_labels) == {"class", "patch", "timestep"}
    assert len(log.structure) == len(log.similarity) == 2


def test_the_demo_is_healthy_at_the_end_and_was_not_at_the_beginning():
    log = read_log(DEMO)
    entropy = collapse_aware_entropy(log.counts, 2)
    assert (entropy[-1] > 0.95).all() and (entropy[0] < 0.9).any()
    assert find_alerts(log) == []


def test_the_demo_is_small():
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 300_000


def test_the_command_shows_it(tmp_path, capsys):
    assert cli.main(["dashboard", "--demo", "--out", str(tmp_path / "demo.html")]) == 0
    assert f"wrote {tmp_path / 'demo.html'}" in capsys.readouterr().out
    assert 50_000 < (tmp_path / "demo.html").stat().st_size < 1_000_000


def test_the_demo_can_be_read_where_nothing_may_be_written(tmp_path):
    shutil.copytree(DEMO, tmp_path / "demo")
    folder = tmp_path / "demo/routing"
    folder.chmod(0o555)
    try:
        assert read_log(tmp_path / "demo").complete
        assert sorted(file.name for file in folder.iterdir()) == ["header.json", "part-000001.routing"]
    finally:
        folder.chmod(0o755)


def test_the_demo_and_the_page_are_installed(monkeypatch):
    """setup.py names every file of the dashboard's folders that hold no Python."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path(str(DEMO.parents[2] / "setup.py"))
    patterns = given["package_data"]["gatewright.tools.dashboard"]
    named = {file for pattern in patterns for file in DEMO.parent.glob(pattern)}
    assert named == {file for part in ("page", "demo") for file in (DEMO.parent / part).rglob("*") if file.is_file()}
