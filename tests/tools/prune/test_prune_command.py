"""`gatewright prune STEP`: what a user sees, and which steps need no torch."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_statistics import made_up_statistics

from gatewright.tools import prune
from gatewright.tools.cli import main
from gatewright.tools.prune.command import STEPS
from gatewright.tools.prune.plan import Plan

NO_TORCH = ("families", "inspect", "plan", "dry-run", "apply", "report")


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    file = tmp_path_factory.mktemp("stats") / "stats"
    made_up_statistics(domains=("code", "prose")).save(file)
    return str(file)


def test_help_lists_the_steps(capsys):
    with pytest.raises(SystemExit) as left:
        main(["prune", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {step} " in shown for step in STEPS)
    assert main(["prune", "aply"]) == 2
    assert capsys.readouterr().err == 'gatewright: error: unknown step "aply" of prune: did you mean apply?\n'
    assert main(["prune", "zzz"]) == 2
    assert "choose one of families, inspect, collect" in capsys.readouterr().err


@pytest.mark.parametrize("step", STEPS)
def test_every_step_explains_itself(step, capsys):
    with pytest.raises(SystemExit) as left:
        main(["prune", step, "--help"])
    assert left.value.code == 0
    assert f"usage: gatewright prune {step}" in capsys.readouterr().out


def test_the_commands_of_the_readme_are_parsed():
    text = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    lines = re.findall(r"^(?:Before any file is written, `)?gatewright prune ([^#`\n]+)", text, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        step, *arguments = line.split()
        parser = argparse.ArgumentParser()
        importlib.import_module(STEPS[step][0], "gatewright.tools.prune").add_arguments(parser)
        parser.parse_args(arguments)


def test_public_names():
    for name in prune.__all__:
        assert getattr(prune, name).__name__ == name and name in dir(prune)
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        _ = prune.prune_everything


@pytest.mark.parametrize("step", NO_TORCH)
def test_step_imports_no_torch(step):
    code = (
        "import argparse, importlib, sys\n"
        "from gatewright.tools.prune import command\n"
        f"module = importlib.import_module(command.STEPS[{step!r}][0], command.__package__)\n"
        "module.add_arguments(argparse.ArgumentParser())\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_what_is_not_installed_is_named_with_the_extra():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from gatewright.tools.cli import main\n"
        "sys.exit(main(['prune', 'collect', 'folder', '--demos', 'demos.jsonl', '--out', 'stats']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'needs transformers, which is not installed: pip install "gatewright[hf]"' in done.stderr


def test_plan(tmp_path, stats, capsys):
    out = tmp_path / "plan.json"
    assert main(["prune", "plan", stats, "--keep", "0.5", "--criterion", "easy-ep", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    plan = Plan.load(out)
    assert "keeps 8 of 16 experts in each of 3 MoE layers" in shown and plan.hash[:12] in shown
    weighted = tmp_path / "weighted.json"
    arguments = ["prune", "plan", stats, "--keep", "8", "--weights", "code=1", "--out", str(weighted)]
    assert main(arguments) == 0
    assert dict(Plan.load(weighted).domains) == {"code": 1.0}
    assert main([*arguments[:-2], "--criterion", "1,1,1,0", "--out", str(weighted)]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "half"], '"half" is no size'),
        (["--keep", "64"], "keep 64 of 16 experts"),
        (["--keep", "30GiB"], "--model"),
        (["--keep", "8", "--weights", "code"], "NAME=WEIGHT"),
        (["--keep", "8", "--weights", "code=1", "code=2"], "twice"),
        (["--keep", "8", "--weights", "code=1", "--domain", "prose"], "leave --domain out"),
        (["--keep", "8", "--budget", "global"], "one count for all layers"),
        (["--keep", "8", "--mtp-keep", "none.json"], "none.json"),
    ],
)
def test_plan_refuses_in_one_line_and_writes_nothing(tmp_path, stats, capsys, arguments, says):
    out = tmp_path / "plan.json"
    assert main(["prune", "plan", stats, *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gatewright: error: ") and says in error and error.count("\n") == 1
    assert not out.exists()


def test_plan_refuses_places_where_it_cannot_write(tmp_path, stats, capsys):
    assert main(["prune", "plan", stats, "--keep", "8", "--out", str(tmp_path)]) == 2
    assert main(["prune", "plan", stats, "--keep", "8", "--out", str(tmp_path / "none" / "plan.json")]) == 2
    assert main(["prune", "plan", str(tmp_path / "none"), "--keep", "8", "--out", str(tmp_path / "p")]) == 2
    assert "collect statistics first" in capsys.readouterr().err


def test_families(capsys):
    assert main(["prune", "families"]) == 0
    shown = capsys.readouterr().out
    assert "qwen3_moe" in shown and "deepseek_v4" in shown and "hash-routed" in shown
    assert main(["prune", "families", "deepseek_v4"]) == 0
    assert "cannot be pruned: its first layers are hash-routed" in capsys.readouterr().out
    assert main(["prune", "families", "something_new"]) == 0
    assert "has no entry" in capsys.readouterr().out
