"""The page of a plan in a real browser, opened from disk: what it draws, what a click says, what is saved, and not a
word in the console; and what it says where a part was not given."""

import json
import struct

import browser
import numpy as np
import pytest
from browser import click, exported, rows, text
from made_up_statistics import made_up_statistics

from gatewright.tools.cli import main
from gatewright.tools.prune import selection
from gatewright.tools.prune.criteria import score
from gatewright.tools.prune.plan import make_plan
from gatewright.tools.prune.report import page_data, report

EVIL = "<img src=x onerror=window.broken=1>"
PAGES = ("choice", "cut", "mass", "agreement", "loss", "size")

needs_browser = pytest.mark.skipif(
    bool(browser.MISSING), reason=f"needs a browser: {' and '.join(browser.MISSING)} not found"
)


def evaluation(statistics, plans) -> dict:
    """As `gatewright prune evaluate` writes it; the losses are made up."""
    domains, layers = list(statistics.domains), statistics.model["layers"]
    cases = []
    for place, plan in enumerate(plans):
        delta = {domain: 0.25 * (place + 1) for domain in domains}
        cases.append(
            {
                "criterion": plan.criterion,
                "domains": dict(plan.domains),
                "keep": plan.count / 16,
                "count": plan.count,
                "policy": plan.policy,
                "mode": "reroute",
                "plan_hash": plan.hash,
                "loss": {domain: 2 + value for domain, value in delta.items()},
                "delta": delta,
                "rerouted": dict.fromkeys(domains, 0.125),
                "rerouted_per_layer": {domain: {str(layer): 0.125 for layer in layers} for domain in domains},
            }
        )
    return {
        "format": 1,
        "kind": "gatewright pruning evaluation",
        "model": dict(statistics.model),
        "data": {domain: {"demos": 4, "tokens": 400} for domain in domains},
        "full": {"loss": dict.fromkeys(domains, 2.0), "perplexity": dict.fromkeys(domains, np.e**2)},
        "cases": cases,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of everything, its plan and statistics."""
    statistics = made_up_statistics(domains=("code", EVIL), layers=(3, 4, 5, 6), name=EVIL)
    plan = make_plan(statistics, keep=0.5)
    others = [make_plan(statistics, keep=keep, criterion=c) for c in ("easy-ep", "random") for keep in (0.75, 0.5)]
    sizes = {"before": 3 * 2**30, "after": 2**31, "real": 2**31, "parallel": [{"gpus": 2, "before": 9, "after": 6}]}
    data = page_data(plan, statistics, {"eval.json": evaluation(statistics, others)}, sizes, title=EVIL)
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report(data), encoding="utf-8")
    return file, plan, statistics, data


def test_data_says_what_the_plan_and_the_statistics_say(made):
    _, plan, statistics, data = made
    shares = {name: selection.normalised(score(statistics, name)) for name in statistics.domains}
    np.testing.assert_allclose(data["scores"]["domains"]["code"], 16 * shares["code"], rtol=1e-3)
    ranked = 16 * (shares["code"] + shares[EVIL]) / 2
    np.testing.assert_allclose(data["scores"]["ranked"], ranked, rtol=1e-3)
    assert data["plan"]["keep"] == [list(ids) for ids in plan.keep.values()]
    curve = data["scores"]["curves"]["code"]
    assert curve[7] == pytest.approx(plan.kept_mass["domains"]["code"]["mean"], rel=1e-3)
    assert curve[15] == 1 and curve == sorted(curve)
    pairs = data["overlaps"]["criteria"]
    at = pairs["names"].index("reap")
    reap = make_plan(statistics, keep=0.5, criterion="reap").mask
    assert pairs["mean"][0][at] == pytest.approx(selection.overlap(plan.mask, reap).mean(), rel=1e-3)
    alone = make_plan(statistics, keep=0.5, domains=["code"]).mask
    pairs = data["overlaps"]["domains"]
    assert pairs["names"] == ["plan", "code", EVIL]
    assert pairs["mean"][0][1] == pytest.approx(selection.overlap(plan.mask, alone).mean(), rel=1e-3)


def test_page_holds_itself_and_no_markup_from_names(made):
    text = made[0].read_text()
    assert "default-src 'none'" in text and EVIL not in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


# --- in the browser


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as started:
        yield started


@pytest.fixture
def page(chromium, made):
    with browser.opened(chromium, made[0]):
        yield chromium


@needs_browser
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_draws_in_both_themes_and_widths(page, width, theme):
    page.theme(theme)
    page.size(width, 900)
    page.wait(f"return document.querySelector('.gatewright').dataset.theme === '{theme}'")
    for name in PAGES:
        click(page, f"[data-page={name}]")
        drawn = page.run(
            """return [...document.querySelectorAll("main svg, main canvas")].map((one) => [
            one.getBoundingClientRect().width, one.getAttribute("aria-label")])"""
        )
        assert drawn, name
        assert all(20 < size <= width and label for size, label in drawn), name
        assert page.run("return document.documentElement.scrollWidth") <= width, name
        assert page.run("return document.querySelectorAll('main .missing').length") == 0, name


@needs_browser
def test_tiles_say_what_matters(page, made):
    _, plan, _, _ = made
    tiles = page.run("return [...document.querySelectorAll('.tile')].map((one) => one.textContent)")
    assert len(tiles) == 6
    assert "8 of 16" in tiles[0] and "in each of 4 layers" in tiles[0]
    assert "+0.500" in tiles[4]  # of the case with this plan's hash, not of the first
    assert "2.00 GiB" in tiles[5] and "3.00 GiB" in tiles[5]
    notes = page.run("return [...document.querySelectorAll('.alerts li')].map((one) => one.textContent)")
    assert notes == list(plan.notes)


@needs_browser
def test_a_cell_tells_and_leads_to_the_cut(page, made):
    _, plan, statistics, _ = made
    box = page.run(
        """const box = document.querySelector('#fig-scores canvas').getBoundingClientRect();
        return [box.left, box.top, box.width]"""
    )
    side = min(110, (box[2] - 54) / 16)
    x, y = box[0] + 46 + 5.5 * side, box[1] + 4 + 1.5 * 34
    page.point(x, y)
    told = page.wait("const tip = document.querySelector('.tip'); return tip.hidden ? null : tip.textContent")
    assert told.startswith("layer 4, expert 5") and ("stays" if 5 in plan.keep[4] else "goes") in told
    page.point(x, y, click=True)
    assert text(page, "[aria-selected=true]") == "2Cut"
    assert text(page, "#fig-profile h3") == "Ranking of layer 4" and "Marked: expert 5" in text(
        page, "#fig-profile .note"
    )
    table = rows(exported(page, "csv", "profile"))
    ranked = sum(selection.normalised(score(statistics, name)) for name in statistics.domains)[1]
    assert [int(row[1]) for row in table[1:]] == sorted(range(16), key=lambda e: (-ranked[e], e))
    assert [row[2] for row in table[1:]] == ["1"] * 8 + ["0"] * 8


@needs_browser
def test_keys(page):
    page.press("2")
    assert "Ranking of layer 3" in text(page, "#fig-profile h3")
    page.press("]")
    assert "Ranking of layer 4" in text(page, "#fig-profile h3")
    page.press("[")
    page.press("[")
    assert "Ranking of layer 3" in text(page, "#fig-profile h3")
    page.press("1")
    before = page.run("return document.querySelector('#fig-scores canvas').toDataURL()")
    page.press("o")
    assert page.run("return document.querySelector('#fig-scores canvas').toDataURL()") != before
    page.press("t")
    assert page.run("return document.querySelector('.gatewright').dataset.theme") == "dark"
    page.press("?")
    assert "order by id or by score" in text(page, "dialog[open]")


@needs_browser
def test_every_measure_explains_itself(page, made):
    definitions, seen = made[3]["definitions"], set()
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
            assert all(definitions[measure][key] in said for key in ("name", "formula", "text", "range", "null"))
            click(page, "dialog .close")
            page.wait("return !document.querySelector('dialog')")
    assert seen == set(definitions)


@needs_browser
def test_scores_of_one_domain(page, made):
    before = rows(exported(page, "csv", "scores"))
    page.run(
        """const select = document.querySelector('select[aria-label="Scores of"]');
        select.value = "code"; select.dispatchEvent(new Event("change"))"""
    )
    table = rows(exported(page, "csv", "scores"))
    assert table != before and len(table) == 1 + 4 * 16
    shares = selection.normalised(score(made[2], "code"))
    assert [float(row[3]) for row in table[1:]] == pytest.approx((16 * shares).ravel().tolist(), rel=1e-3)


@needs_browser
def test_export_of_numbers_and_pictures(page):
    for name, figures in (
        ("choice", ["scores"]),
        ("mass", ["mass", "curve"]),
        ("agreement", ["criteria"]),
        ("loss", ["loss-0"]),
    ):
        click(page, f"[data-page={name}]")
        for figure in figures:
            picture = exported(page, "png", figure)
            assert picture.startswith(b"\x89PNG")
            width, height = struct.unpack(">II", picture[16:24])
            assert width > 600 and height > 200 and len(picture) > 5_000
    table = rows(exported(page, "csv", "cases"))
    assert table[1][:3] == ["easy-ep", f"code + {EVIL}", "12"] and float(table[1][5]) == 0.25
    click(page, '[data-case="3"]')
    assert "random, 8 kept" in text(page, "#fig-rerouted h3")


@needs_browser
def test_names_are_shown_as_text_on_every_page_and_on_paper(page):
    for name in PAGES:
        click(page, f"[data-page={name}]")
        assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return window.broken") is None and text(page, "h1") == EVIL
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("return document.querySelectorAll('main .page').length") == 6
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("return document.querySelectorAll('main .page').length") == 1


@needs_browser
def test_what_was_not_given_is_told_not_drawn(chromium, tmp_path):
    statistics = made_up_statistics(model_type="gatewright/dit", experts_per_layer=[16, 12, 16])
    bare = make_plan(statistics, keep=0.5, mixture="weighted", criterion="random", budget="global")
    (tmp_path / "bare.html").write_text(report(page_data(bare)), encoding="utf-8")
    fair = make_plan(made_up_statistics(), keep=0.5, mixture="max-min")
    (tmp_path / "fair.html").write_text(report(page_data(fair, made_up_statistics())), encoding="utf-8")
    chromium.console()
    for name, missing in (("bare", [1, 1, 1, 2, 1, 1]), ("fair", [0, 1, 0, 0, 1, 1])):
        chromium.open("about:blank")
        chromium.open(tmp_path / f"{name}.html")
        chromium.wait("return document.querySelector('main .page')")
        for place, tab in enumerate(PAGES):
            click(chromium, f"[data-page={tab}]")
            assert chromium.run("return document.querySelectorAll('main .missing').length") == missing[place], (
                name,
                tab,
            )
    assert chromium.console() == []


# --- the command


@pytest.fixture
def files(tmp_path, made):
    _, plan, statistics, _ = made
    plan.save(tmp_path / "plan.json")
    statistics.save(tmp_path / "stats")
    (tmp_path / "eval.json").write_text(json.dumps(evaluation(statistics, [plan])))
    return tmp_path


def test_command(files, capsys):
    arguments = [
        "--stats",
        str(files / "stats"),
        "--evaluation",
        str(files / "eval.json"),
        "--out",
        str(files / "r.html"),
    ]
    assert main(["prune", "report", str(files / "plan.json"), *arguments]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    assert (files / "r.html").read_text().count("eval.json") == 1


def test_command_refuses_what_does_not_belong_together(files, capsys):
    other = made_up_statistics(seed=1)
    other.save(files / "other")
    newer = json.loads((files / "eval.json").read_text()) | {"format": 9}
    (files / "newer.json").write_text(json.dumps(newer))
    foreign = json.loads((files / "eval.json").read_text())
    foreign["model"]["header_hash"] = "h9"
    (files / "foreign.json").write_text(json.dumps(foreign))
    for arguments, says in (
        (["--stats", "other"], "made from other statistics"),
        (["--evaluation", "plan.json"], "is not an evaluation"),
        (["--evaluation", "newer.json"], "update gatewright"),
        (["--evaluation", "foreign.json"], "header_hash is 'h9', the plan's 'h0': they are of different models"),
        (["--evaluation", "none.json"], "none.json"),
        (["--pruned", "somewhere"], "name it with --model"),
        (["--out", "none/r.html"], "name a file in a folder that exists"),
    ):
        given = [one if one.startswith("--") else str(files / one) for one in arguments]
        assert main(["prune", "report", str(files / "plan.json"), "--out", str(files / "r.html"), *given]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not (files / "r.html").exists()


@needs_browser
def test_many_classes_stand_side_by_side(chromium, tmp_path):
    """As of a run of this library: losses of classes, no routed pairs counted."""
    statistics = made_up_statistics(model_type="gatewright/dit", domains=("kept",))
    plans = [make_plan(statistics, keep=0.5), make_plan(statistics, keep=0.5, criterion="random")]
    content = evaluation(statistics, plans)
    classes = [str(digit) for digit in range(10)]
    content["full"] = {"loss": dict.fromkeys(classes, 0.2)}
    for place, case in enumerate(content["cases"]):
        case["delta"] = {name: 0.01 * place + 0.001 * int(name) for name in classes}
        case["loss"] = {name: 0.2 + value for name, value in case["delta"].items()}
        del case["rerouted"], case["rerouted_per_layer"]
    data = page_data(plans[0], statistics, {"eval.json": content})
    (tmp_path / "run.html").write_text(report(data), encoding="utf-8")
    chromium.console()
    chromium.size(1280, 900)
    chromium.open(tmp_path / "run.html")
    chromium.wait("return document.querySelector('main .page')")
    tiles = chromium.run("return [...document.querySelectorAll('.tile')].map((one) => one.textContent)")
    assert "+0.0045" in tiles[4] and "on average over 10 classes" in tiles[4]
    click(chromium, "[data-page=loss]")
    assert chromium.run("return [...document.querySelectorAll('main .fig')].map((one) => one.id)") == [
        "fig-delta",
        "fig-cases",
    ]
    assert "moved" not in text(chromium, "#fig-cases table")
    assert chromium.console() == []
