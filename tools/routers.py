"""The routers that are known here, those of other packages included, as a table made from their classes.

    gatewright routers              a list for reading
    gatewright routers --markdown   the README's table
    gatewright routers promoe       one: where it comes from and its options

"causal" and "needs" are those of the router's own example; "by option" says that some option changes them.
"""

import argparse
import dataclasses
import inspect
import sys
from typing import Any

from ..routers import create_router, list_routers, router_class, router_options, router_paper
from ..routers.base import Router

HEADER = ("router", "strategy", "paper", "chooses", "causal", "needs", "losses", "state", "evidence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterFacts:
    """What the table says of a router, all of it read from the class and from its example in both modes."""

    name: str
    strategy: str
    paper: str
    selection: str
    causal: str
    needs: str
    losses: str
    state: str
    evidence: str

    @classmethod
    def of(cls, name: str) -> "RouterFacts":
        router_type, preset = router_class(name)
        options = {k: v for k, v in router_type.example()[0].items() if k not in preset}
        router = create_router(name, **options)
        training, evaluation = (_in_mode(router, training) for training in (True, False))
        return cls(
            name=name,
            strategy=_strategy(router_type, preset),
            paper=router_paper(name),
            selection=router_type.selection,
            causal=_causal(router_type, training["causal"], evaluation["causal"]),
            needs=_needs(router_type, training["requires"], evaluation["requires"]),
            losses=", ".join(f"`{loss}`" for loss in router_type.loss_names),
            state=", ".join(f"`{buffer}`" for buffer in router_type.state_names),
            evidence=router_type.evidence,
        )

    def row(self) -> tuple[str, ...]:
        values = dataclasses.astuple(self)
        return (f"`{values[0]}`", *values[1:])


def _in_mode(router: Router, training: bool) -> dict[str, Any]:
    router.train(training)
    return {"causal": router.causal, "requires": router.requires}


def _strategy(router_type: type[Router], preset: dict[str, Any]) -> str:
    """The first sentence of the router's file, or what a preset sets."""
    if preset:
        return f"`{router_type.name}` with " + ", ".join(f"`{k}={v}`" for k, v in preset.items())
    text = inspect.getdoc(sys.modules[router_type.__module__]) or inspect.getdoc(router_type) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return first.rstrip(".:")


def _causal(router_type: type[Router], training: bool, evaluation: bool) -> str:
    if training == evaluation:
        answer = "yes" if training else "no"
    else:
        answer = "in training" if training else "in evaluation"
    return answer + (", by option" if isinstance(inspect.getattr_static(router_type, "causal"), property) else "")


def _needs(router_type: type[Router], training: tuple[str, ...], evaluation: tuple[str, ...]) -> str:
    needs = [field if field in evaluation else f"{field} in training" for field in dict.fromkeys(training + evaluation)]
    options = [field for field in router_type.requires_by_option if field not in training + evaluation]
    return "; ".join(filter(None, [", ".join(needs), f"by option: {', '.join(options)}" if options else ""]))


def markdown_table() -> str:
    """The table of every known router."""
    rows = [HEADER, ("---",) * len(HEADER), *(RouterFacts.of(name).row() for name in list_routers())]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _describe(name: str) -> str:
    facts = RouterFacts.of(name)
    lines = [f"{field}: {value.replace('`', '')}" for field, value in dataclasses.asdict(facts).items() if value]
    lines.append("options:")
    for option, default in router_options(name).items():
        lines.append(f"  {option}" + ("" if default is ... else f" = {default!r}"))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="one router, with its options and their defaults")
    parser.add_argument("--markdown", action="store_true", help="the whole table, as in the README")


def run(args: argparse.Namespace) -> int:
    if args.name and args.markdown:
        raise ValueError("--markdown prints the whole table: give no name with it")
    if args.markdown:
        print(markdown_table())
    elif args.name:
        print(_describe(args.name))
    else:
        facts = [RouterFacts.of(name) for name in list_routers()]
        width = max(len(fact.name) for fact in facts)
        for fact in facts:
            print(f"{fact.name:{width}}  {fact.evidence:14}  {fact.strategy.replace('`', '')}")
    return 0
