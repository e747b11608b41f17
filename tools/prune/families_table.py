"""Which families of transformers were proven on a tiny model, and which are refused with what reason.

``proof.prove`` says what proven means; the outcomes lie in ``families_table.json``, as ``gatewright prune families
--prove all --write`` wrote them. No torch is imported here.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ...moe.files import write_text

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Proof:
    """What came out for one family.

    Attributes:
        family: its folder in ``transformers.models``.
        model_type: of the configuration that was tried.
        implementations: of the experts, under which logits were equal; empty where it is refused.
        policies: of a grouped router; empty where routers are not grouped.
        refusal: why it cannot be pruned; empty where it is proven.
    """

    family: str
    model_type: str
    implementations: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    refusal: str = ""


def read_table(file: Path = FILE) -> tuple[str, tuple[Proof, ...]]:
    """The version of transformers that the proofs are of, and the proofs."""
    table = json.loads(file.read_text(encoding="utf-8"))
    proofs = (
        Proof(**row | {name: tuple(row.get(name, ())) for name in ("implementations", "policies")})
        for row in table["families"]
    )
    return table["transformers"], tuple(proofs)


def write_table(version: str, proofs: Iterable[Proof], file: Path = FILE) -> None:
    """The table, one family a line, without what is empty."""
    rows = [json.dumps({name: value for name, value in asdict(proof).items() if value}) for proof in proofs]
    lines = ",\n    ".join(rows)
    write_text(file, f'{{\n  "transformers": {json.dumps(version)},\n  "families": [\n    {lines}\n  ]\n}}\n')


def markdown(proofs: Iterable[Proof]) -> str:
    """The proofs as a table."""
    rows = ["| family | pruned = masked, bit for bit, under | grouped router under |", "|---|---|---|"]
    for proof in proofs:
        if proof.refusal:
            rows.append(f"| {proof.family} | refused: {proof.refusal} | |")
        else:
            rows.append(f"| {proof.family} | {', '.join(proof.implementations)} | {', '.join(proof.policies)} |")
    return "\n".join(rows) + "\n"
