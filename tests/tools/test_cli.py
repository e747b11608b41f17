"""The console command: finds commands, imports only the one that runs, says what a user got wrong in one line."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

import gatewright
from gatewright.tools import cli


@pytest.fixture
def command(monkeypatch):
    """Puts one command named `probe` in the table; its `run` is what the test sets."""
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--count", type=int, default=1), run=lambda args: 0
    )
    monkeypatch.setattr(cli, "COMMANDS", {"probe": ("probe_module", "look at something")})
    monkeypatch.setitem(sys.modules, "probe_module", module)
    return module


def test_runs_a_command_with_its_arguments(command):
    seen = []
    command.run = lambda args: seen.append(args.count) or 3
    assert cli.main(["probe", "--count", "5"]) == 3
    assert seen == [5]


def test_help_of_a_command_is_its_own(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: gatewright probe") and "--count" in said and "look at something" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "runs/x"), "runs/x: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(command, capsys, error, said):
    def run(args):
        raise error

    command.run = run
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == f"gatewright: error: {said}\n"


def test_our_mistakes_keep_their_traceback(command):
    command.run = lambda args: {}["missing"]
    with pytest.raises(KeyError):
        cli.main(["probe"])


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("exprot", "did you mean export?"), ("quux", f"choose one of {', '.join(sorted(cli.COMMANDS))}")],
)
def test_unknown_command(capsys, typed, hint):
    assert cli.main([typed]) == 2
    assert capsys.readouterr().err == f'gatewright: error: unknown command "{typed}": {hint}\n'


def test_without_a_command_it_says_what_there_is(capsys):
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert all(name in said and summary in said for name, (_, summary) in cli.COMMANDS.items())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"gatewright {gatewright.__version__}\n"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_is_there(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert callable(module.add_arguments) and callable(module.run)
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0


def test_the_installed_command_imports_no_torch(tmp_path):
    code = (
        "import sys\n"
        "from gatewright.tools.cli import main\n"
        "status = main(['no-such-command'])\n"
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 2
