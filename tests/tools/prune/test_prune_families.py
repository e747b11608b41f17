"""Which families can be pruned: proven on disk and in memory, or refused by name, in a table held true here."""

import pytest

transformers = pytest.importorskip("transformers")

import prune_models  # noqa: E402

from gatewright.tools.cli import main  # noqa: E402
from gatewright.tools.prune import proof  # noqa: E402
from gatewright.tools.prune.checkpoint import Checkpoint  # noqa: E402
from gatewright.tools.prune.families_table import FILE, Proof, markdown, read_table, write_table  # noqa: E402
from gatewright.tools.prune.layout import Layout  # noqa: E402

TRANSFORMERS, PROOFS = read_table()
TABLE = {one.family: one for one in PROOFS}
THIRTEEN = [name.removesuffix("_text") for name in prune_models.THIRTEEN]
same_transformers = pytest.mark.skipif(
    transformers.__version__ != TRANSFORMERS, reason=f"the table is of transformers {TRANSFORMERS}"
)


@pytest.mark.parametrize("family", THIRTEEN)
def test_the_thirteen_are_proven(family):
    found = proof.prove(family, family)
    assert found == TABLE[family]
    assert not found.refusal
    implementations = ("eager",) if family == "llama4" else ("eager", "grouped_mm", "batched_mm")
    assert found.implementations == implementations
    grouped = ("deepseek_v2", "deepseek_v3", "glm4_moe")
    assert found.policies == (("slice", "slice-equal-groups", "slice-regroup") if family in grouped else ())


@pytest.mark.parametrize(
    "family", ["deepseek_v4", "dots3_note", "ernie4_5_vl_moe", "qwen3_omni_moe", "diffusion_gemma"]
)
def test_the_refused_are_refused_with_that_reason(family):
    found = proof.prove(family, TABLE[family].model_type)
    assert found == TABLE[family] and found.refusal and not found.implementations


@same_transformers
def test_the_table_holds_every_family_of_the_shared_experts_interface():
    families = proof.shared_families()
    assert {family: one.model_type for family, one in TABLE.items()} == families
    assert len(families) == 65 and "llama4" in families  # 64 share it


@pytest.mark.evidence
@same_transformers
def test_the_table_is_what_proving_every_family_gives():
    assert tuple(proof.prove(*one) for one in proof.shared_families().items()) == PROOFS


def test_a_model_that_comes_out_wrong_is_no_refusal(monkeypatch):
    right = proof.apply

    def wrong(plan, source, out):
        keep = {layer: tuple(7 - expert for expert in reversed(ids)) for layer, ids in plan.keep.items()}
        right(
            proof.Plan(**{name: getattr(plan, name) for name in plan.__dataclass_fields__} | {"keep": keep}),
            source,
            out,
        )

    monkeypatch.setattr(proof, "apply", wrong)
    with pytest.raises(proof.NotEqual, match="differs from the masked model"):
        proof.prove("qwen3_moe", "qwen3_moe")


def test_a_bias_beside_the_block_is_found():
    layout = Layout.of(Checkpoint.open(prune_models.tiny("kolibri1")))
    assert ("model.layers.1.moe.router.expert_bias", 0) in layout.layers[1].router_tensors


def test_the_table_is_written_as_it_lies_here(tmp_path):
    write_table(TRANSFORMERS, PROOFS, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_bytes() == FILE.read_bytes()
    one = Proof("some_moe", "some_moe", refusal='it is "made up"')
    write_table("1.2", [one], tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == ("1.2", (one,))


def test_the_command(capsys, monkeypatch):
    assert main(["prune", "families"]) == 0
    shown = capsys.readouterr().out
    assert "60 proven" in shown and "5 refused by name" in shown and f"transformers {TRANSFORMERS}" in shown
    assert main(["prune", "families", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith(markdown(PROOFS))
    assert main(["prune", "families", "llama4_text"]) == 0
    assert "llama4  proven: eager\n" in capsys.readouterr().out
    assert main(["prune", "families", "--prove", "olmoe"]) == 0
    assert "olmoe  proven: eager, grouped_mm, batched_mm\n\n1 proven" in capsys.readouterr().out
    assert main(["prune", "families", "--prove", "llama"]) == 2
    assert '"llama" is no family' in capsys.readouterr().err
    assert main(["prune", "families", "--write"]) == 2
    assert "--write needs --prove all" in capsys.readouterr().err
    assert main(["prune", "families", "olmoe", "--prove", "olmoe"]) == 2
    assert "leave olmoe out" in capsys.readouterr().err


def test_markdown_is_one_row_a_family():
    rows = markdown(PROOFS).splitlines()
    assert len(rows) == 2 + len(PROOFS) and all(row.count("|") == 4 for row in rows)
