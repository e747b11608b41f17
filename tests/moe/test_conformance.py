"""The kit catches planted faults, each by the check that names it, and lets their healthy siblings pass."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from broken_routers import FAULTS, ByToken, Plain, UnseededNoise

from gatewright.moe.conformance import CHECKS, ConformanceError, TwoRanks, check_router
from gatewright.routers import Router, Routing, TokenContext
from gatewright.tools.cli import main

SLOW = ("compiled", "two_ranks")
QUICK = [name for name in CHECKS if name not in SLOW]
HEALTHY = {fault.healthy.__name__: fault.healthy for fault in FAULTS}.values()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault}-{fault.check}")
def test_a_planted_fault_is_named(fault):
    with pytest.raises(ConformanceError) as caught:
        check_router(fault.broken, only=[fault.check])
    text = str(caught.value)
    assert fault.says in text
    states = " ".join(CHECKS[fault.check].states.split()[:6])
    for part in (fault.broken.__name__, fault.check, states, "  on: ", "  expected: ", "  got: ", "  do: "):
        assert part in text
    assert caught.value.report[fault.check].status == "failed"
    if fault.check in SLOW:
        assert check_router(fault.healthy, only=[fault.check])[fault.check].status == "passed"


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda cls: cls.__name__)
def test_a_healthy_sibling_passes(healthy):
    report = check_router(healthy, only=QUICK)
    skipped = {result.check for result in report.not_checked}
    assert skipped <= {"gated_steps", "micro_batches_add_up"}
    assert not skipped & {fault.check for fault in FAULTS if fault.healthy is healthy}


def test_every_check_catches_something():
    assert {fault.check for fault in FAULTS} == set(CHECKS)
    for name, check in CHECKS.items():
        assert len(check.states) > 60, f"{name} does not state its property"


def test_what_makes_a_router():
    """A class, a function, a name, with options or without."""
    quick = {"only": ["decision_is_well_formed"]}
    assert "top_k=2" in check_router(Plain, **quick).router
    assert "top_k=3" in check_router(Plain, options={"top_k": 3}, **quick).router
    assert "num_experts=3" in check_router(lambda: Plain(dim=8, num_experts=3), **quick).router
    assert "top_k=1" in check_router("switch", **quick).router
    assert "num_experts=6" in check_router("switch", options={"num_experts": 6}, **quick).router
    for factory, message in {
        "swich": "did you mean switch",
        torch.nn.Linear: "Linear is no router",
        Plain(dim=4, num_experts=2): "Plain makes no router: give a subclass",
        (lambda dim: Plain(dim=dim, num_experts=2)): "needs the argument dim",
        (lambda: 5): "returned int: it must return a gatewright.routers.Router",
        (lambda: Plain(dim=4, num_experts=0)): "no router could be made: ValueError: num_experts=0",
        (lambda: NoWidth()): "has no option `dim`; say dim=",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_router(factory)
    with pytest.raises(ValueError, match='unknown check "dtype": did you mean dtypes'):
        check_router(Plain, only=["dtype"])
    check_router(lambda: NoWidth(), dim=5, only=["decision_is_well_formed", "requires_is_true"])


def test_a_context_and_variants_of_the_users_own():
    """What the example does not show: other fields and shapes, and options that only go together."""
    without = TokenContext(batch_size=3, length=4)
    report = check_router(ByToken, context=without, only=["decision_is_well_formed", "requires_is_true"])
    assert report.passed  # what is required is given all the same

    def note(**more):
        return check_router(Paired, only=["options_are_used"], **more)["options_are_used"].notes

    assert any("option rule='none'" in line and "variants=" in line for line in note())
    assert note(variants=[{"rule": "scaled", "factor": 3.0}]) == ()


class Paired(Plain):
    """A factor that one rule needs and the other does not take."""

    def __init__(
        self, *, dim: int, num_experts: int, top_k: int = 2, rule: str = "none", factor: float | None = None
    ) -> None:
        super().__init__(dim=dim, num_experts=num_experts, top_k=top_k)
        if (rule == "scaled") != (factor is not None) or rule not in ("none", "scaled"):
            raise ValueError(f"rule={rule} with factor={factor}")
        self.factor = factor

    def logits(self, x, context):
        return super().logits(x, context) * (1.0 if self.factor is None else self.factor)


class NoWidth(Router):
    """Everything to expert 0: no parameter, no option."""

    evidence = "paper"
    causal = batch_independent = True
    without_gradient = ("tokens", "weights")

    def __init__(self) -> None:
        super().__init__(num_experts=2)

    def forward(self, x, context):
        index = torch.zeros(len(x), 1, dtype=torch.int64)
        if context.real_T is not None:
            index = index.masked_fill(~context.real_T[:, None], -1)
        return Routing.from_topk(index, (index >= 0).float(), bank_size=2)


def test_what_could_not_be_checked_is_said():
    class Local(Plain):
        pass

    report = check_router(Local, only=["two_ranks", "saves_and_loads", "gated_steps"])
    assert report.passed and "another process cannot be given the router" in report["two_ranks"].message
    assert report["gated_steps"].status == "not checked" and "GatedRouter" in report["gated_steps"].message
    assert any("pickle" in note for note in report["saves_and_loads"].notes)
    assert "1 passed, 2 not checked" in str(report)
    assert "saves_and_loads\n             not checked of it: pickle" in str(report)


def test_a_rank_that_crashes_is_reported_and_the_next_router_is_served():
    with pytest.raises(ConformanceError, match=r"(?s)rank 1: .*only one rank says so"):
        check_router(CrashesOnRankOne, only=["two_ranks"])
    assert check_router(Plain, only=["two_ranks"])["two_ranks"].status == "passed"


class CrashesOnRankOne(Plain):
    def forward(self, x, context):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise ArithmeticError("only one rank says so")
        return super().forward(x, context)


def test_two_processes_that_do_not_start(monkeypatch):
    ranks = TwoRanks()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(TwoRanks, "_shared", ranks)
    report = check_router(Plain, only=["two_ranks"])
    assert "the two processes did not start" in report["two_ranks"].message


def test_an_error_inside_a_router_names_its_line():
    class Stumbles(Plain):
        def logits(self, x, context):
            return x[:, 99]

    with pytest.raises(
        ConformanceError, match=r"got: IndexError: .*\n +at .*test_conformance.py:\d+, in logits: return x"
    ):
        check_router(Stumbles, only=["decision_is_well_formed"])


def test_the_callers_random_state_stays():
    state = torch.get_rng_state()
    with pytest.raises(ConformanceError):
        check_router(UnseededNoise, only=["randomness_is_keyed", "forward_is_pure"])
    assert torch.equal(torch.get_rng_state(), state)


# ---- gatewright check-router


def command(capsys, *arguments):
    status = main(["check-router", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_on_names_modules_and_files(capsys, monkeypatch, tmp_path):
    quick = ("--only", "decision_is_well_formed", "declarations")
    status, out, _ = command(capsys, "promoe", *quick)
    assert status == 0 and "passed       declarations\n" in out and "2 passed in" in out
    assert command(capsys, "broken_routers:Plain", *quick)[0] == 0
    monkeypatch.chdir(tmp_path)
    code = "from broken_routers import Plain\ndef wide():\n    return Plain(dim=32, num_experts=5)\n"
    Path("a_file_of_mine.py").write_text(code)
    status, out, _ = command(capsys, "a_file_of_mine.py:wide", *quick)
    assert status == 0 and "Plain(dim=32, num_experts=5, top_k=2)" in out
    assert command(capsys, "a_file_of_mine:wide", *quick)[0] == 0
    status, out, _ = command(
        capsys,
        "topk",
        *quick,
        "--option",
        "top_k=3",
        "score=sigmoid",
        "--option",
        "bias_rate=1e-3",
        "renormalise=true",
        "capacity_factor=None",
    )
    assert status == 0 and "top_k=3, score='sigmoid'" in out and "bias_rate=0.001" in out and "renormalise=True" in out


def test_the_command_on_a_broken_router(capsys):
    status, out, _ = command(
        capsys, "broken_routers:GradientCut", "--only", "gradient_reaches_every_parameter", "dtypes"
    )
    assert status == 1
    assert "failed       gradient_reaches_every_parameter\n  property: In training" in out
    assert "passed       dtypes" in out and "1 passed, 1 failed in" in out


def test_the_command_lists_the_properties(capsys):
    status, out, _ = command(capsys, "--list")
    assert status == 0 and [line for line in out.splitlines() if not line.startswith(" ")] == list(CHECKS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say which router"),
        (("topkk",), "did you mean topk"),
        (("nowhere.at.all:Router",), "there is no module nowhere: looked in "),
        (("nowhere.py:Router",), "there is no file nowhere.py"),
        (("broken_routers.py",), "give broken_routers.py:Factory"),
        (("broken_routers.Plain",), "give broken_routers.Plain:Factory"),
        (("broken_routers:",), "give module:Factory"),
        (("broken_routers:Plane",), "broken_routers has no Plane: did you mean Plain or "),
        (("broken_routers:nothing_like_it",), "routers there: "),
        (("broken_routers:Fault",), "Fault is no router: give a subclass of"),
        (("broken_routers:keep_within_capacity",), "needs the arguments expert_TK, weight_TK"),
        (("broken_routers:Plain", "--only", "causal"), 'unknown check "causal": did you mean causal_is_true'),
        (("broken_routers:Plain", "--option", "top_k"), "give NAME=VALUE"),
        (("broken_routers:Plain", "--option", "topk=1"), "unexpected keyword argument 'topk'"),
        (("topk", "--option", "topk=1"), "did you mean top_k"),
    ],
)
def test_what_the_command_refuses(capsys, arguments, said):
    status, out, err = command(capsys, *arguments)
    assert status == 2 and out == "" and said in err and err.count("\n") == 1


def test_a_module_that_fails_to_import(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("needs_more.py").write_text("import something_that_is_not_here\n")
    Path("does_not_parse.py").write_text("def\n")
    assert "importing needs_more failed: No module named" in command(capsys, "needs_more:Router")[2]
    assert "importing does_not_parse failed: SyntaxError" in command(capsys, "does_not_parse.py:Router")[2]


# ---- a router of another package

PACKAGE = """
    import torch
    from torch import nn
    from gatewright.routers import Router, Routing
    from gatewright.routers.selection import check_top_k, drop_padding

    class Nearest(Router):
        '''The experts whose centre is nearest.'''

        evidence = "paper"
        causal = True
        batch_independent = True

        def __init__(self, *, dim: int, num_experts: int, top_k: int = 1) -> None:
            super().__init__(num_experts=num_experts)
            check_top_k(top_k, num_experts)
            self.top_k = top_k
            self.centres = nn.Parameter(torch.randn(num_experts, dim))

        def forward(self, x, context):
            x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            logits = -(x[:, None] - self.centres.to(x.dtype)).square().sum(-1)
            weight, index = logits.softmax(-1).topk(self.top_k)
            index, weight = drop_padding(index, weight, context.real_T)
            return Routing.from_topk(
                index, weight, bank_size=self.bank_size, logits=logits, scores=logits.softmax(-1)
            )

    class Forgetful(Nearest):
        def forward(self, x, context):
            routing = super().forward(x, context)
            return routing.replace(weight=routing.weight.detach())
"""


def test_a_router_of_another_package(tmp_path):
    """Found through its entry point, in a process that knows nothing of it but that it is installed."""
    (tmp_path / "nearest_package.py").write_text(textwrap.dedent(PACKAGE))
    info = tmp_path / "nearest_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest_package\nVersion: 1.0\n")
    entries = "nearest = nearest_package:Nearest\nforgetful = nearest_package:Forgetful\n"
    (info / "entry_points.txt").write_text(f"[gatewright.routers]\n{entries}")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def run(*arguments):
        call = [sys.executable, "-m", "gatewright.tools.cli", "check-router", *arguments]
        return subprocess.run(
            call, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=False
        )

    done = run("nearest")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in CHECKS:
        status = "not checked" if name in ("gated_steps", "micro_batches_add_up") else "passed     "
        assert f"{status}  {name}" in done.stdout
    done = run("forgetful", "--only", "gradient_reaches_every_parameter", "dtypes")
    assert done.returncode == 1 and "failed       gradient_reaches_every_parameter" in done.stdout, done.stderr
