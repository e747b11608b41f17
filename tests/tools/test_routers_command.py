"""`gatewright routers`: what it says comes from the classes."""

import pytest

from gatewright.routers import Router, base, list_routers, register_preset, register_router
from gatewright.tools.cli import main
from gatewright.tools.routers import RouterFacts, markdown_table


@pytest.fixture
def made_up(monkeypatch):
    """A router with an answer in every column, and a preset of it."""
    list_routers()
    for table in ("_routers", "_presets", "_preset_papers"):
        monkeypatch.setattr(base, table, dict(getattr(base, table)))

    @register_router("made_up")
    class MadeUp(Router):
        """One thing | another.

        More of it.
        """

        evidence, paper, selection = "paper", "Somebody, 2026", "segment"
        loss_names, state_names, requires_by_option = ("even", "odd"), ("bias",), ("noise", "token_ids")

        def __init__(self, *, dim: int, num_experts: int = 3, top_k: int = 1) -> None:
            super().__init__(num_experts=num_experts)

        @property
        def causal(self):
            return not self.training

        @property
        def requires(self):
            return ("noise", "grid") if self.training else ("grid",)

    MadeUp.__module__ = "a_module_without_a_docstring"
    monkeypatch.setitem(__import__("sys").modules, MadeUp.__module__, type("module", (), {}))
    register_preset("made_up_twice", "made_up", paper="Somebody else", top_k=2)


def test_the_facts_of_a_router(made_up):
    assert RouterFacts.of("made_up").row() == (
        "`made_up`",
        "One thing | another",
        "Somebody, 2026",
        "segment",
        "in evaluation, by option",
        "noise in training, grid; by option: token_ids",
        "`even`, `odd`",
        "`bias`",
        "paper",
    )
    preset = RouterFacts.of("made_up_twice")
    assert (preset.strategy, preset.paper) == ("`made_up` with `top_k=2`", "Somebody else")
    assert r"One thing \| another" in markdown_table()


def test_every_listed_router_says_where_it_comes_from():
    for name, evidence in list_routers().items():
        facts = RouterFacts.of(name)
        assert facts.evidence == evidence and facts.paper and facts.strategy, name


def test_the_command(made_up, capsys):
    assert main(["routers"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(list_routers())
    assert main(["routers", "made_up_twice"]) == 0
    shown = capsys.readouterr().out
    assert "chooses" not in shown and "selection: segment" in shown
    assert "  dim\n  num_experts = 3\n  top_k = 2\n" in shown
    assert main(["routers", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| router | strategy | paper |")


def test_what_it_refuses(capsys):
    assert main(["routers", "promo"]) == 2
    assert "did you mean promoe" in capsys.readouterr().err
    assert main(["routers", "promoe", "--markdown"]) == 2
    assert "give no name with it" in capsys.readouterr().err
