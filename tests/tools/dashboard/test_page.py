"""The report in a real browser, opened from disk: scrubber, click, comparison, export, keyboard, themes, print; and
not a word in the console."""

import json
import struct

import browser
import made_up_logs
import numpy as np
import pytest
from browser import click, exported, rows, text

from gatewright.moe.record_log import LayerInfo, LogWriter, ProbeInputs, Window, read_log
from gatewright.tools.dashboard.data import page_data, read_runs
from gatewright.tools.dashboard.report import write_report

pytestmark = pytest.mark.skipif(
    bool(browser.MISSING), reason=f"needs a browser: {' and '.join(browser.MISSING)} not found"
)

PAGES = ("health", "load", "decisions", "movement", "structure", "meaning")
EVIL = "<img src=x onerror=window.broken=1>"


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as started:
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of two runs, and their logs."""
    folder = tmp_path_factory.mktemp("page")
    plant = {1: "overload", 2: "drops"}
    names = ("a", EVIL, "c")
    shape = {"layers": 3, "experts": 32, "top_k": 4, "windows": 12, "probe_tokens": 320}
    made_up_logs.write_log(folder / "first", plant=plant, names=names, classes=(EVIL, "car"), **shape)
    made_up_logs.write_log(folder / "second", seed=3, names=names, **shape)
    logs = read_runs([folder / "first", folder / "second"])
    write_report(logs, folder / "report.html", title=EVIL)
    return folder / "report.html", logs


@pytest.fixture
def page(chromium, made):
    with browser.opened(chromium, made[0]):
        yield chromium


def choose(page, label: str, value: str) -> None:
    page.run(
        """const select = document.querySelector(`select[aria-label="${arguments[0]}"]`);
        select.value = arguments[1]; select.dispatchEvent(new Event("change"))""",
        label,
        value,
    )


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_draws_in_both_themes_and_widths(page, width, theme):
    page.theme(theme)
    page.size(width, 900)
    page.wait(f"return document.querySelector('.gatewright').dataset.theme === '{theme}'")
    for name in PAGES:
        click(page, f"[data-page={name}]")
        drawn = page.run(
            """return [...document.querySelectorAll("main svg, main canvas")].map((one) => [one.clientWidth
            || one.getBoundingClientRect().width, one.getAttribute("aria-label")])"""
        )
        assert len(drawn) >= 2, name
        assert all(20 < size[0] <= width and size[1] for size in drawn), name
        assert page.run("return document.documentElement.scrollWidth") <= width, name


def test_scrubber_and_keys_move_the_step(page, made):
    _, logs = made
    click(page, "[data-page=load]")
    steps = logs[0].steps
    assert "step 119" in text(page, "output")
    before = page.run("return document.querySelector('#fig-load canvas').toDataURL()")
    page.run(
        """const slider = document.querySelector("input[type=range]");
        slider.value = 3; slider.dispatchEvent(new Event("input"))"""
    )
    assert f"step {steps[3]} " in text(page, "output")
    assert page.run("return document.querySelector('#fig-load canvas').toDataURL()") != before
    page.press("ArrowRight")
    assert f"step {steps[4]} " in text(page, "output")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert f"step {steps[2]} " in text(page, "output")
    page.press("Home")
    assert f"step {steps[0]} " in text(page, "output")
    page.press("5")
    assert text(page, "[aria-selected=true]") == "5Structure"
    page.press("?")
    assert "Keyboard" in text(page, "dialog[open]")
    page.press("Escape", windowsVirtualKeyCode=27)
    page.wait("return !document.querySelector('dialog')")
    page.press("t")
    assert page.run("return document.querySelector('.gatewright').dataset.theme") == "dark"
    click(page, ".play")
    page.wait(f"return document.querySelector('output').textContent.includes('step {steps[-1]} ')")


def test_a_cell_tells_its_history_and_a_click_keeps_it(page, made):
    _, logs = made
    click(page, "[data-page=load]")
    # the map's first cell is 46 px from its left edge and 4 from its top; 3 rows of 20 px
    box = page.run(
        "const box = document.querySelector('#fig-load canvas').getBoundingClientRect(); return [box.left, box.top]"
    )
    side = (page.run("return document.querySelector('#fig-load canvas').clientWidth") - 54) / 32
    x, y = box[0] + 46 + 3.5 * side, box[1] + 4 + 30
    page.point(x, y)
    ratio = logs[0].requested[-1, 1, 3] / logs[0].requested[-1, 1].mean()
    told = page.wait("const tip = document.querySelector('.tip'); return tip.hidden ? null : tip.textContent")
    assert told.startswith("layer 1, expert 3")
    shown = float(told.split("load")[1].split("×")[0])
    assert abs(shown / ratio - 1) < 0.02
    assert page.run("return document.querySelector('.tip svg path').getAttribute('d').split('L').length") == 12
    page.point(x, y, click=True)
    assert text(page, "#fig-history h3") == "Layer 1 over time"
    assert "Expert 3 against the others" in text(page, "#fig-history .note")


def test_alerts_are_sentences_that_lead_there(page):
    found = page.run("return [...document.querySelectorAll('.alerts button')].map((one) => one.textContent)")
    assert len(found) == 2 and found[0].startswith("layer 1: experts 3 and 9 take") and "layer 2 drops" in found[1]
    click(page, ".alerts button")
    assert text(page, "[aria-selected=true]") == "2Load"
    assert text(page, "#fig-history h3") == "Layer 1 over time"


def test_every_number_explains_itself(page, made):
    definitions = page_data(made[1][:1])["definitions"]
    seen = set()
    for name in PAGES:
        click(page, f"[data-page={name}]")
        for measure in page.run(
            "return [...document.querySelectorAll('[data-explain]')].map((one) => one.dataset.explain)"
        ):
            if measure in seen:
                continue
            seen.add(measure)
            click(page, f"[data-explain={measure}]")
            said = text(page, "dialog[open]")
            for key in ("name", "formula", "text", "range", "null", "reduction"):
                assert definitions[measure][key] in said
            click(page, "dialog .close")
            page.wait("return !document.querySelector('dialog')")
    assert len(seen) >= 18


def test_comparison_of_runs_and_of_steps(page, made):
    _, logs = made
    click(page, "[data-page=load]")
    assert page.run("return document.querySelectorAll('main canvas').length") == 1
    choose(page, "Compare with", "run1")
    assert page.run("return document.querySelectorAll('main canvas').length") == 3
    table = rows(exported(page, "csv", "load-2"))
    assert table[0] == ["layer", "expert", "log2 ratio of loads"]
    one, two = (log.requested[-1] / log.requested[-1].mean(-1, keepdims=True) for log in logs)
    expected = np.log2(one / two).ravel()
    assert np.abs(np.array([float(row[2]) for row in table[1:]]) - expected).max() < 0.05  # two steps of 3.3 %
    for name in PAGES:
        click(page, f"[data-page={name}]")
    page.press("2")
    choose(page, "Compare with", "step")
    page.press("Home")
    table = rows(exported(page, "csv", "load-1"))
    first, last = (logs[0].requested[s] / logs[0].requested[s].mean(-1, keepdims=True) for s in (0, -1))
    assert abs(float(table[1][2]) - np.log2(first[0, 0] / last[0, 0])) < 0.05
    choose(page, "Run", "1")
    assert text(page, "[data-page=load][aria-selected=true]") == "2Load"


def test_sorting(page, made):
    click(page, "[data-page=load]")
    pictures = set()
    for order in ("id", "load", "cluster"):
        click(page, f"[data-choice={order}]")
        pictures.add(page.run("return document.querySelector('#fig-load canvas').toDataURL()"))
    assert len(pictures) == 3


def test_a_choice_leaves_the_reader_where_they_were(page):
    page.size(1280, 400)
    click(page, "[data-page=load]")
    page.run("scrollTo(0, 500); document.querySelector('#fig-load canvas').focus({ preventScroll: true })")
    choose(page, "Layer", "2")
    assert page.run("return scrollY") == 500
    assert page.run("return document.activeElement.closest('.fig').id") == "fig-load"
    click(page, "[data-page=structure]")
    assert 0 < page.run("return scrollY") < 200


def test_export_of_numbers_and_pictures(page, made):
    _, logs = made
    table = rows(exported(page, "csv", "health"))
    assert table[0][:5] == ["layer", "first step", "last step", "tokens", "collapse_aware_entropy"]
    assert len(table) == 1 + 3 * 12
    expected = logs[0].requested[11, 2].max() / logs[0].requested[11, 2].mean() - 1
    assert abs(float(table[-1][5]) - expected) < 1e-3
    for name, figures in (("health", ("health", "scalar-0")), ("load", ("load",)), ("structure", ("lift",))):
        click(page, f"[data-page={name}]")
        for figure in figures:
            picture = exported(page, "png", figure)
            assert picture.startswith(b"\x89PNG")
            width, height = struct.unpack(">II", picture[16:24])
            assert width > 600 and height > 200 and len(picture) > 5_000
    # what a spreadsheet would take for a formula is text
    click(page, "[data-page=meaning]")
    click(page, '[data-choice="0"]')
    assert rows(exported(page, "csv", "share"))[1][0] == EVIL


def test_names_are_shown_as_text(page):
    for name in PAGES:
        click(page, f"[data-page={name}]")
        assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return window.broken") is None
    assert text(page, "h1") == EVIL
    assert EVIL in text(page, "select[aria-label=Layer]")


def test_print_shows_all_pages_on_paper(page):
    page.theme("dark")
    page.wait("return document.querySelector('.gatewright').dataset.theme === 'dark'")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("return document.querySelectorAll('main .page').length") == 6
    assert page.run("return document.querySelector('.gatewright').dataset.theme") == "light"
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("return document.querySelectorAll('main .page').length") == 1
    assert page.run("return document.querySelector('.gatewright').dataset.theme") == "dark"


def test_what_was_not_recorded_is_told_not_drawn(chromium, tmp_path):
    """A router without scores, no probe, no structure; and a log with nothing but a probe."""
    layers = [LayerInfo(name="a", layer=0, experts=4, top_k=1.0), LayerInfo(name="b", layer=1, experts=2)]
    writer = LogWriter(tmp_path / "bare", layers)
    window = Window.zeros(0, 9, 2, 4)
    window.tokens[:] = 100
    window.counts[:] = window.requested[:] = [[40, 30, 30, 0], [70, 30, 0, 0]]
    writer.window(window)
    writer.close()
    writer = LogWriter(tmp_path / "probe", layers)
    writer.probe(0, [np.array([[0], [1], [-1]]), np.array([[0], [1], [1]])], {"class": (np.array([0, 0, 1]), "xy")})
    writer.close()
    for name, expected in {
        "bare": {
            "decisions": "no scores",
            "movement": "recorder.probe",
            "structure": "structure_every",
            "meaning": "recorder.probe",
        },
        "probe": {"health": "No training window", "load": "No training window", "structure": "structure_every"},
    }.items():
        write_report([read_log(tmp_path / name)], tmp_path / f"{name}.html")
        chromium.console()
        chromium.open(tmp_path / f"{name}.html")
        chromium.wait("return document.querySelector('main .page')")
        for page_name in PAGES:
            click(chromium, f"[data-page={page_name}]")
            if page_name in expected:
                assert expected[page_name] in text(chromium, ".missing"), (name, page_name)
            assert "NaN" not in text(chromium, "main") and "undefined" not in text(chromium, "main")
        assert chromium.console() == []


@pytest.mark.parametrize("kind", ["images", "series", "texts"])
def test_samples_are_shown_with_an_experts_tokens_marked(chromium, tmp_path, kind):
    draw = np.random.default_rng(0)
    layers = [LayerInfo(name=str(i), layer=i, experts=4, top_k=1.0) for i in range(2)]
    index = [draw.integers(0, 4, (5 * 6, 1)) for _ in layers]
    index[0][:12] = 2
    values = {
        "images": draw.integers(0, 255, (3, 8, 12, 3)).astype(np.uint8),
        "series": draw.normal(size=(3, 60)).astype(np.float32),
        "texts": [EVIL, *(f" t{i}" for i in range(17))],
    }[kind]
    writer = LogWriter(tmp_path / "run", layers)
    writer.probe(
        0, index, {"one": (np.zeros(30), "a")}, ProbeInputs(kind, [6] * 3, values, (2, 3) if kind == "images" else None)
    )
    writer.close()
    write_report([read_log(tmp_path / "run")], tmp_path / "report.html")
    chromium.console()
    chromium.open(tmp_path / "report.html")
    chromium.wait("return document.querySelector('main .page')")
    click(chromium, "[data-page=meaning]")
    marked = "return document.querySelectorAll('#fig-shown .taken').length"
    assert "What expert 2 of layer 0 takes" in text(chromium, "#fig-shown h3"), "the one that has most"
    assert chromium.run(marked) == (index[0][:18] == 2).sum()
    choose(chromium, "Expert shown", "1")
    assert chromium.run(marked) == (index[0][:18] == 1).sum()
    assert f"{(index[0][:18] == 1).sum()} of 18" in text(chromium, "#fig-shown .note")
    if kind == "images":
        assert chromium.run("return document.querySelectorAll('#fig-shown image').length") == 3
    if kind == "texts":
        assert EVIL in text(chromium, "#fig-shown .texts")
    assert chromium.console() == []


def test_odd_logs_draw_nothing_wrong(chromium, tmp_path):
    """No layers; layers without experts, tokens or choices; labels with one value, none, many, or shaped as a grid."""

    def layer(place: int, experts: int) -> LayerInfo:
        return LayerInfo(name=f"layer {place}", layer=place, experts=experts)

    many = np.arange(400)
    labels = {
        "same": (many * 0, ["x"]),
        "none": (many * 0 - 1, []),
        "many": (many, [str(i) for i in many]),
        "patch": (many, [f"row {i // 20}, column {i % 20}" for i in many]),
    }
    none, first = np.zeros((400, 0)), np.zeros((400, 1))
    cases = {
        "no layers": ([], [], {}),
        "no experts": ([layer(0, 0)], [], {}),
        "no choices": ([layer(0, 4)], [none], labels),
        "mixed": ([layer(0, 4), layer(1, 0), layer(2, 2)], [first, none, first - 1], labels),
    }
    for name, (layers, index, named) in cases.items():
        writer = LogWriter(tmp_path / name, layers)
        experts = max((one.experts for one in layers), default=0)
        writer.window(Window.zeros(0, 0, len(layers), experts))
        square = (experts, experts)
        writer.structure(0, np.zeros((len(layers), *square), int), np.zeros((max(0, len(layers) - 1), *square), int))
        for step in range(2 if index else 0):
            writer.probe(step, index, named)
        writer.close()
        write_report(read_runs([tmp_path / name] * 2), tmp_path / "report.html")
        chromium.console()
        chromium.open(tmp_path / "report.html")
        chromium.wait("return document.querySelector('main .page')")
        choose(chromium, "Compare with", "run1")
        for page_name in PAGES:
            click(chromium, f"[data-page={page_name}]")
            for place in range(len(layers)):
                choose(chromium, "Layer", str(place))
                for button in range(chromium.run("return document.querySelectorAll('[data-choice]').length")):
                    chromium.run("document.querySelectorAll('[data-choice]')[arguments[0]].click()", button)
                drawn = chromium.run("return document.querySelector('main').innerHTML")
                assert not [word for word in ("NaN", "undefined", "Infinity") if word in drawn], (name, page_name)
        assert chromium.console() == [], name


def test_data_of_a_newer_format_are_refused(chromium, made, tmp_path):
    page = made[0].read_text()
    newer = tmp_path / "newer.html"
    newer.write_text(page.replace('{"format":1,', json.dumps({"format": 2})[:-1] + ",", 1))
    chromium.console()
    chromium.open(newer)
    said = chromium.wait("return document.querySelector('#gatewright').textContent.includes('format') && 'said'")
    assert said == "said"
    chromium.console()
