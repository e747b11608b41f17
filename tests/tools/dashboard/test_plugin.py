"""The TensorBoard tab, in a TensorBoard that runs: what is served, how, what is not, and how it looks in a browser."""

import contextlib
import http.client
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from browser import MISSING, Browser
from made_up_logs import write_log

import gatewright
from gatewright.moe.record_log import LogWriter, Window, read_log

pytest.importorskip("tensorboard")

from gatewright.tools.dashboard.plugin import RoutingPlugin

ENTRY = "gatewright.tools.dashboard.plugin:RoutingPlugin"
BASE = "data/plugin/gatewright_routing"


@contextlib.contextmanager
def tensorboard(logdir: Path, scratch: Path):
    """A process of TensorBoard on a free port of localhost; gives its address and its output so far."""
    installed = importlib.metadata.entry_points(group="tensorboard_plugins")
    paths = [str(Path(gatewright.__file__).parents[1])]
    if not any(entry.value == ENTRY for entry in installed):
        # What installing this checkout would add, where another one is installed.
        info = scratch / "site/gatewright_here-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gatewright-here\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[tensorboard_plugins]\ngatewright_routing = {ENTRY}\n")
        paths.append(str(info.parent))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    output = scratch / "tensorboard.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "localhost", "--port", "0"]
    with output.open("w") as stream:
        process = subprocess.Popen([*command, "--load_fast=false"], env=environment, stdout=stream, stderr=stream)
        try:
            end = time.monotonic() + 120
            while not (found := re.search(r"at (http://localhost:\d+/)", output.read_text())):
                assert process.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.1)
            yield SimpleNamespace(address=found[1], said=output.read_text)
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two runs that can be compared, one of another shape, one that is empty, and things that must not be seen."""
    top = tmp_path_factory.mktemp("served")
    logs = top / "logs"
    write_log(logs / "<b>first</b>", layers=3, experts=8, windows=6, plant={1: "collapse"})
    write_log(logs / "sub/second", layers=3, experts=8, windows=6, seed=1)
    write_log(logs / "other", layers=2, experts=8, windows=6)
    LogWriter(logs / "empty", read_log(logs / "other").layers).close()
    write_log(top / "outside", layers=2, experts=8, windows=6)
    (logs / "link").symlink_to(top / "outside")
    (logs / "linked-log").mkdir()
    (logs / "linked-log/routing").symlink_to(top / "outside/routing")
    (logs / "linked-part/routing").mkdir(parents=True)
    shutil.copy(top / "outside/routing/header.json", logs / "linked-part/routing")
    (logs / "linked-part/routing/part-000001.routing").symlink_to(top / "outside/routing/part-000001.routing")
    (logs / "damaged/routing").mkdir(parents=True)
    (logs / "damaged/routing/header.json").write_text("{")
    with tensorboard(logs, top) as running:
        yield running


def ask(running, path, method="GET"):
    """(status, headers, body) of a path that is sent as it stands: no client tidies it up."""
    connection = http.client.HTTPConnection("localhost", urlsplit(running.address).port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, "/" + path)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def test_the_tab_is_listed_and_active(served):
    listing = json.loads(ask(served, "data/plugins_listing")[2])["gatewright_routing"]
    assert listing["enabled"] is True and listing["tab_name"] == "Routing"
    assert listing["loading_mechanism"] == {"type": "IFRAME", "module_path": f"/{BASE}/index.js"}


def test_the_runs_below_the_log_folder(served):
    status, _, body = ask(served, f"{BASE}/runs")
    assert status == 200
    names = [run["name"] for run in json.loads(body)["runs"]]
    assert names == ["<b>first</b>", "damaged", "empty", "other", "sub/second"]


@pytest.mark.parametrize(
    "route", ["index.js", "tab.css", "dashboard.js", "dashboard.css", "runs", "data", "data?run=x"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_headers(served, route, method):
    _, headers, body = ask(served, f"{BASE}/{route}", method)
    assert bool(body) == (method == "GET") and int(headers["content-length"]) > 0
    kind = {"js": "application/javascript; charset=utf-8", "ss": "text/css; charset=utf-8"}
    assert headers["content-type"] == kind.get(route[-2:], "application/json")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"] == "default-src 'none'"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert not any(name.startswith("access-control") for name in headers)
    assert "In 3.0, this warning will become an error" not in served.said()


def test_data_of_one_run_and_of_two(served):
    for names in (["sub/second"], ["<b>first</b>", "sub/second"]):
        status, _, body = ask(served, f"{BASE}/data?" + "&".join(f"run={quote(name, safe='')}" for name in names))
        data = json.loads(body)
        assert status == 200 and data["format"] == 1 and [run["name"] for run in data["runs"]] == names


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("", 400, "no run was named"),
        ("?run=other&run=sub/second", 200, "different shapes cannot be compared"),
        ("?run=empty", 200, "nothing is recorded yet"),
        ("?run=damaged", 200, "is damaged"),
        *((f"?run={name}", 404, "no run") for name in ("nobody", "", ".", "link", "linked-log", "sub")),
        ("?run=linked-part", 404, "no run"),
        *(
            (f"?run={path}", 404, "no run")
            for path in (
                "../outside",
                "..%2Foutside",
                "%2e%2e%2foutside",
                "sub/../../outside",
                "sub/second/../second",
                "/etc",
                "file:///etc",
                "other/routing",
                "other%00",
                "..%5Coutside",
            )
        ),
    ],
)
def test_what_is_not_served(served, query, status, said):
    answered, headers, body = ask(served, f"{BASE}/data{query}")
    if query == "?run=linked-part":
        said = "no longer there"
    assert answered == status and said in json.loads(body)["message" if status == 200 else "error"]
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "path",
    ["../plugin.py", "..%2fplugin.py", "page/dashboard.js", "definitions.py", "%2e%2e/setup.py", "....//plugin.py", ""],
)
def test_no_other_file_is_served(served, path):
    assert ask(served, f"{BASE}/{path}")[0] == 404


def test_nothing_can_be_sent(served):
    status, _, body = ask(served, f"{BASE}/data?run=other", "POST")
    assert status == 405 and json.loads(body) == {"error": "only GET is answered"}


# --- without a process ----------------------------------------------------------------------------------------------


def plugin(logdir="", spec=""):
    flags = SimpleNamespace(logdir=str(logdir), logdir_spec=spec)
    return RoutingPlugin(SimpleNamespace(logdir=str(logdir) or spec, flags=flags))


def names_of(made) -> list[str]:
    return sorted(made._runs.find(wait=30))


def test_the_log_folder_may_be_the_run_itself(tmp_path):
    write_log(tmp_path / "run", layers=1, windows=2, probes=0)
    assert names_of(plugin(tmp_path / "run")) == ["."]
    assert names_of(plugin(tmp_path)) == ["run"]


def test_several_log_folders(tmp_path):
    for name in ("a", "b/c"):
        write_log(tmp_path / name, layers=1, windows=2, probes=0)
    assert names_of(plugin(spec=f"x:{tmp_path}/a,y:{tmp_path}/b,{tmp_path}/b")) == ["c", "x", "y/c"]


def test_nothing_to_see_is_no_tab(tmp_path):
    for made in (plugin(tmp_path), plugin(tmp_path / "gone"), plugin("gs://bucket/logs"), plugin()):
        assert made.is_active() is False


def test_being_active_costs_no_look_at_the_disk_for_a_while(tmp_path, monkeypatch):
    write_log(tmp_path / "run", layers=1, windows=2, probes=0)
    made = plugin(tmp_path)
    assert made._runs.find(wait=30) and made.is_active()
    monkeypatch.setattr(os, "walk", None)
    assert all(made.is_active() for _ in range(100))


def test_being_active_never_waits_for_a_slow_folder(tmp_path, monkeypatch):
    """What a look has not found yet is found by a later one."""
    write_log(tmp_path / "run", layers=1, windows=2, probes=0)
    gate, walk = threading.Event(), os.walk
    monkeypatch.setattr(os, "walk", lambda root: gate.wait(60) and walk(root))
    made = plugin(tmp_path)
    assert made.is_active() is False
    gate.set()
    assert names_of(made) == ["run"] and made.is_active()


def test_the_entry_point_is_what_setup_declares():
    declared = (Path(gatewright.__file__).parent / "setup.py").read_text()
    assert f'"tensorboard_plugins": ["gatewright_routing = {ENTRY}"]' in declared


# --- in a browser ---------------------------------------------------------------------------------------------------

FRAME = "[...document.querySelectorAll('iframe')].find(f => f.src.includes('gatewright_routing'))?.contentDocument"

# What TensorBoard's own page says, about its 3-D plugin, and of an icon that it has not got.
OF_TENSORBOARD = ("Multiple instances of Three.js", "Automatic fallback to software WebGL", "favicon.ico")


def complaints(browser) -> list[str]:
    return [line for line in browser.console() if not any(known in line for known in OF_TENSORBOARD)]


@pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} on this machine")
def test_in_a_browser(served):
    with Browser() as browser:
        browser.size(1280, 900)
        browser.open(f"{served.address}#gatewright_routing")
        browser.wait(f"return {FRAME}?.querySelector('#gatewright .fig svg') !== null && !!{FRAME}?.body", 60)
        browser.wait(f"return !!{FRAME}.querySelector('h1')")
        assert browser.run(f"return {FRAME}.querySelector('h1').textContent") == "<b>first</b>"
        worn = f"return {FRAME}.querySelector('#gatewright').dataset.theme"
        for theme in ("dark", "light"):
            browser.run(f"document.body.classList.toggle('dark-mode', {json.dumps(theme == 'dark')})")
            browser.wait(f"{worn} === '{theme}'")
        assert "layer 1 has collapsed" in browser.run(f"return {FRAME}.body.textContent")
        boxes = "querySelectorAll('.runs fieldset input')"
        assert browser.run(f"return [...{FRAME}.{boxes}].map(box => box.value)")[-1] == "sub/second"
        browser.run(f"{FRAME}.{boxes}[4].click()")
        browser.wait(f"return {FRAME}.querySelector('h1').textContent.includes('sub/second')")
        assert complaints(browser) == []
        browser.run(f"{FRAME}.{boxes}[3].click()")  # a run of another shape: said, not drawn
        browser.wait(f"return {FRAME}.querySelector('.message').textContent.includes('different shapes')")
        assert browser.run(f"return {FRAME}.querySelector('#gatewright').hidden")
        browser.run(f"{FRAME}.{boxes}[3].click()")
        browser.wait(f"return !{FRAME}.querySelector('#gatewright').hidden")
        assert complaints(browser) == []


@pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} on this machine")
def test_follows_a_run_that_trains(tmp_path):
    (tmp_path / "run").mkdir()
    with tensorboard(tmp_path / "run", tmp_path) as running, Browser() as browser:
        browser.open(f"{running.address}data/plugin_entry.html?name=gatewright_routing")
        browser.wait("return document.querySelector('.message')?.textContent.includes('No routing log below')", 60)
        write_log(tmp_path / "run", layers=2, experts=8, windows=3, every=10, probes=0)
        look = "document.querySelector('#live').dispatchEvent(new Event('change'))"
        browser.wait(f"{look}; return document.body.textContent.includes('steps 0 to 29')", 60)
        log = read_log(tmp_path / "run")
        writer = LogWriter(tmp_path / "run", log.layers)
        writer.start(30)
        window = window_like(log)
        writer.window(window)
        browser.wait(f"{look}; return document.body.textContent.includes('steps 0 to 39')", 60)
        writer.close()
        assert complaints(browser) == []


def window_like(log):
    """The log's last window once more, ten steps on."""
    window = Window.zeros(30, 39, *log.counts.shape[1:])
    for name, value in vars(window).items():
        if isinstance(value, np.ndarray):
            value[...] = getattr(log, name)[-1]
    return window
