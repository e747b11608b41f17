"""`gatewright prune families`: which families of transformers can be pruned, and why others cannot."""

import argparse
from collections.abc import Iterable

from .families import FAMILIES, REFUSED
from .families_table import Proof, markdown, read_table, write_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="?", help="one family or model type (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument(
        "--prove",
        nargs="+",
        metavar="FAMILY",
        help="prove these again, or all, with the installed transformers: a tiny model of each is pruned on disk, "
        "loaded and compared with the masked one (seconds a family)",
    )
    parser.add_argument(
        "--write", action="store_true", help="with --prove all: write what comes out into this package's table"
    )


def run(args: argparse.Namespace) -> int:
    if args.write and args.prove != ["all"]:
        raise ValueError("--write needs --prove all: the table holds every family")
    if args.prove:
        if args.family is not None:
            raise ValueError(f"--prove names the families itself: leave {args.family} out")
        proofs = _prove(args.prove)
        _show(proofs, args.markdown)
        if args.write:
            import transformers

            write_table(transformers.__version__, proofs)
        return 0
    version, known = read_table()
    chosen = args.family
    if chosen is None:
        _show(known, args.markdown)
        print(
            f"\nproven with transformers {version}, on tiny models; others are found by the shapes in their "
            "headers, and `gatewright prune inspect MODEL` says whether that leaves a doubt"
        )
        return 0
    rows = [proof for proof in known if chosen in (proof.family, proof.model_type, f"{proof.family}_text")]
    if chosen in REFUSED:
        print(f"{chosen} cannot be pruned: {REFUSED[chosen]}")
    elif rows:
        _show(rows, args.markdown)
    elif chosen in FAMILIES:
        print(f"{chosen} has an entry, and no proof: `gatewright prune families --prove {chosen}` makes one")
    else:
        print(
            f"{chosen} has no entry: its experts and router are found by the shapes in the checkpoint's headers where "
            "that leaves no doubt; `gatewright prune inspect MODEL` says whether it does"
        )
    return 0


def _prove(names: list[str]) -> list[Proof]:
    from .proof import prove, shared_families

    known = shared_families()
    unknown = [name for name in names if name != "all" and name not in known]
    if unknown:
        raise ValueError(
            f'"{unknown[0]}" is no family of the installed transformers that uses its shared experts interface: '
            f"{', '.join(known)}"
        )
    return [prove(name, known[name]) for name in (known if "all" in names else names)]


def _show(proofs: Iterable[Proof], as_markdown: bool) -> None:
    if as_markdown:
        print(markdown(proofs), end="")
        return
    proofs = list(proofs)
    width = max(len(proof.family) for proof in proofs)
    for proof in proofs:
        if proof.refusal:
            print(f"{proof.family:{width}}  refused: {proof.refusal}")
        else:
            groups = f"; grouped: {', '.join(proof.policies)}" if proof.policies else ""
            print(f"{proof.family:{width}}  proven: {', '.join(proof.implementations)}{groups}")
    refused = sum(bool(proof.refusal) for proof in proofs)
    print(f"\n{len(proofs) - refused} proven (pruned = masked, bit for bit on a CPU), {refused} refused by name")
