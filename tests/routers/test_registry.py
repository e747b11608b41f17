"""How routers are found, named and created, also those of other packages."""

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import Literal

import numpy
import pytest
import torch

from gatewright.routers import (
    GatedRouter,
    Router,
    Routing,
    base,
    create_router,
    list_routers,
    register_preset,
    register_router,
    router_class,
    router_options,
    router_paper,
)


@pytest.fixture
def clean_registry(monkeypatch):
    list_routers()
    monkeypatch.setattr(base, "_routers", dict(base._routers))
    monkeypatch.setattr(base, "_presets", dict(base._presets))
    monkeypatch.setattr(base, "_preset_papers", dict(base._preset_papers))


def made_up(name="made_up", **members):
    def forward(self, x, context):
        return Routing.from_topk(torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1), bank_size=1)

    return type(name, (Router,), {"evidence": "paper", "forward": forward, "__module__": name} | members)


def test_every_file_of_the_folder_is_found():
    names = list_routers()
    assert {"topk", "promoe", "expert_choice", "diffmoe", "race", "switch"} <= set(names)
    assert list(names) == sorted(names) and set(names.values()) <= set(base.EVIDENCE)
    assert names["promoe"] == "code" and names["race"] == "reconstruction" and names["switch"] == names["topk"]


def test_options_are_kept_with_their_defaults():
    router = create_router("promoe", dim=8, num_experts=4)
    assert router.options["temperature"] == 0.07 and router.options["num_experts"] == 4
    assert router.name == "promoe" and router.expert_kinds == ("routed",) * 4 + ("local",) and router.bank_size == 5


def test_options_of_a_name():
    options = router_options("switch")
    assert list(options)[:3] == ["dim", "num_experts", "top_k"]
    assert options["dim"] is ... and options["top_k"] == 1 and options["bias_rate"] == 0
    assert router_options("topk")["top_k"] == 2


def test_presets_are_options_of_another():
    cls, options = router_class("switch")
    assert cls.name == "topk" and options["top_k"] == 1
    router = create_router("switch", dim=8, num_experts=4, jitter=0.0)
    assert router.top_k == 1 and router.jitter == 0 and router.capacity_factor == 1.25
    again = create_router(router.name, **router.options)
    assert again.options == router.options


def test_unknown_names_and_options_offer_the_close_ones():
    with pytest.raises(ValueError, match='unknown router "promo": did you mean promoe.*Known: .*topk'):
        create_router("promo", dim=8, num_experts=4)
    with pytest.raises(ValueError, match='unknown router "zzz": Known: .*deepseek_v3, '):
        router_class("zzz")
    with pytest.raises(ValueError, match='router "topk" has no option "topk": did you mean top_k'):
        create_router("topk", dim=8, num_experts=4, topk=1)
    with pytest.raises(ValueError, match='router "switch" has no option "xyz"'):
        create_router("switch", dim=8, num_experts=4, xyz=1)
    with pytest.raises(ValueError, match='router "topk" needs the options dim, num_experts'):
        create_router("topk")
    with pytest.raises(ValueError, match="needs the option dim"):
        create_router("topk", num_experts=4)


def test_names_are_taken_once(clean_registry):
    with pytest.raises(ValueError, match='router name "topk" is taken by .*TopKRouter'):
        register_router("topk")(made_up())
    with pytest.raises(ValueError, match='"switch" is taken'):
        register_router("switch")(made_up())
    with pytest.raises(ValueError, match='"topk" is taken'):
        register_preset("topk", "race")
    with pytest.raises(ValueError, match='"switch" is taken'):
        register_preset("switch", "topk", top_k=2)
    register_preset("switch", "topk", **router_class("switch")[1])  # the same again
    cls = made_up("once")
    assert register_router("once")(cls) is register_router("once")(cls)
    reloaded = made_up("once")  # a module that is imported again makes its class again
    register_router("once")(reloaded)
    assert router_class("once") == (reloaded, {})


def test_evidence_is_required(clean_registry):
    cls = made_up()
    del cls.evidence
    with pytest.raises(ValueError, match="made_up.evidence=None: choose one of"):
        register_router("made_up")(cls)
    with pytest.raises(ValueError, match="evidence='hearsay'"):
        register_router("made_up")(made_up(evidence="hearsay"))
    with pytest.raises(ValueError, match="made_up.selection='whim': choose one of"):
        register_router("made_up")(made_up(selection="whim"))
    assert "made_up" not in list_routers()


def test_papers_of_routers_and_presets(clean_registry):
    assert router_paper("promoe") == "ProMoE, arXiv:2510.24711"
    assert router_paper("switch") == "Switch, arXiv:2101.03961"
    register_preset("plain", "topk", top_k=1)
    assert router_paper("plain") == router_paper("topk")
    with pytest.raises(ValueError, match='unknown router "zzz"'):
        router_paper("zzz")


def test_a_gate_in_three_steps_says_which_one_is_missing():
    router = type("Half", (GatedRouter,), {"evidence": "paper"})(num_experts=2)
    with pytest.raises(NotImplementedError, match="Half must define logits"):
        router(torch.zeros(2, 3))
    router.logits = lambda x, context: torch.zeros(2, 2)
    with pytest.raises(NotImplementedError, match="Half must define assign"):
        router(torch.zeros(2, 3))


@pytest.mark.parametrize(
    "init, loose",
    [
        (lambda self, **options: None, "options"),
        (lambda self, dim, *, num_experts: None, "dim"),
        (lambda self, *args, num_experts: None, "args"),
    ],
)
def test_constructors_that_would_swallow_options_are_refused(clean_registry, init, loose):
    with pytest.raises(ValueError, match=f"made_up.__init__ takes {loose}: make every option keyword-only"):
        register_router("made_up")(made_up(__init__=init))


class Annotated(Router):
    evidence = "paper"

    def __init__(
        self,
        *,
        num_experts: int = 1,
        dim: int | None = None,
        rate: float = 0.0,
        on: bool = False,
        how: Literal["a", "b"] | None = None,
        inner: dict[str, int] | None = None,
        anything: Sequence[int] = (),
    ):
        super().__init__(num_experts=num_experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2.0}, "num_experts=2.0: choose a whole number$"),
        ({"num_experts": True}, "num_experts=True: choose a whole number$"),
        ({"dim": "4"}, "dim='4': choose a whole number or None"),
        ({"dim": 0}, "dim=0: choose at least 1"),
        ({"rate": "fast"}, "rate='fast': choose a number"),
        ({"rate": None}, "rate=None: choose a number"),
        ({"on": 1}, "on=1: choose True or False"),
        ({"how": 3}, "how=3: choose a text or None"),
        ({"inner": [1]}, r"inner=\[1\]: choose a dict or None"),
    ],
)
def test_options_are_what_their_annotation_says(options, message):
    with pytest.raises(ValueError, match=message):
        Annotated(**options)


def test_what_an_annotation_allows():
    allowed = {"num_experts": numpy.int64(2), "dim": 4, "rate": 1, "on": True, "how": "a", "inner": {}, "anything": "x"}
    assert Annotated(**allowed).options == allowed
    # an annotation that only a type checker understands
    init = Annotated.__init__
    unknown = type("Unknown", (Annotated,), {"__init__": lambda self, *, rate: init(self)})
    unknown.__init__.__annotations__ = {"rate": "NotHere"}
    assert unknown(rate="fast").options == {"rate": "fast"}


def test_what_is_no_routing_is_refused():
    router = made_up("Forgetful", forward=lambda self, x, context: x)(num_experts=1)
    with pytest.raises(ValueError, match='"Forgetful" returned Tensor: forward must return a Routing'):
        router(torch.zeros(2, 3))


def test_kinds_are_checked():
    with pytest.raises(ValueError, match="num_experts=0"):
        Router(num_experts=0)
    with pytest.raises(ValueError, match="choose from .* 2 of them routed"):
        Router(num_experts=2, expert_kinds=("routed", "copy"))
    with pytest.raises(ValueError, match="choose from"):
        Router(num_experts=1, expert_kinds=("routed", "magic"))
    router = Router(num_experts=1, expert_kinds=["routed", "zero"])
    assert router.expert_kinds == ("routed", "zero") and router.bank_size == 2
    with pytest.raises(NotImplementedError, match="Router must define forward"):
        router(torch.zeros(2, 3))


def write_distribution(folder, name, entry_point, code):
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gatewright.routers]\n{entry_point}\n")


PLUGIN = """
    import torch
    from gatewright.routers import Router, Routing

    class First(Router):
        evidence = "paper"

        def __init__(self, *, num_experts: int, dim: int | None = None) -> None:
            super().__init__(num_experts=num_experts)

        def forward(self, x, context):
            index = torch.zeros(len(x), 1, dtype=torch.int64)
            return Routing.from_topk(index, torch.ones(len(x), 1), bank_size=self.bank_size)
"""


def test_routers_of_other_packages(tmp_path):
    """They are found; what one of them breaks is a warning and costs its own routers only."""
    write_distribution(tmp_path, "made_up_package", "always_first = made_up_package:First", PLUGIN)
    write_distribution(tmp_path, "broken_package", "broken = broken_package:First", "import a_module_that_is_not_there")
    write_distribution(tmp_path, "thief_package", "topk = thief_package:First", PLUGIN)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        from gatewright.routers import create_router, list_routers
        router = create_router("always_first", num_experts=3)
        print(list_routers()["always_first"], router.name, router(torch.zeros(4, 2)).load_E().tolist())
        print("broken" in list_routers(), create_router("topk", dim=4, num_experts=2).evidence)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "paper always_first [4, 0, 0]\nFalse code\n"
    assert 'router "broken" of broken_package is left out: ModuleNotFoundError' in result.stderr
    assert 'router "topk" of thief_package is left out' in result.stderr and "is taken by" in result.stderr
