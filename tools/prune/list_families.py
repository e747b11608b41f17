"""`gatewright prune families`: which model types can be pruned, by what they call things, and which are refused."""

import argparse

from .families import FAMILIES, REFUSED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_type", nargs="?", help="one model type, as in config.json (default: all)")


def run(args: argparse.Namespace) -> int:
    chosen = args.model_type
    if chosen in REFUSED:
        print(f"{chosen} cannot be pruned: {REFUSED[chosen]}")
        return 0
    if chosen is not None and chosen not in FAMILIES:
        print(
            f"{chosen} has no entry: its experts and router are found by the shapes in the checkpoint's headers where "
            "that leaves no doubt; `gatewright prune inspect MODEL` says whether it does"
        )
        return 0
    names = list(FAMILIES) if chosen is None else [chosen]
    width = max(map(len, names))
    print(f"{'model type':{width}}  experts a token  groups")
    for name in names:
        family = FAMILIES[name]
        k = "config.json" if family.top_k is None else str(family.top_k)
        groups = f"{family.topk_group} of {family.num_groups}" if family.num_groups > 1 else "as config.json says"
        print(f"{name:{width}}  {k:15}  {groups}")
    if chosen is None:
        print("\nrefused")
        for name, reason in REFUSED.items():
            print(f"{name:{max(map(len, REFUSED))}}  {reason}")
        print(
            "\nother model types are found by shape; `gatewright prune inspect MODEL` says whether that leaves a doubt"
        )
    return 0
