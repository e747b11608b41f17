"""Prune a trained MoE to a domain: collect statistics, plan, look at the sizes, rewrite the files, verify, evaluate.

    from gatewright.tools.prune import Demo, load_model, make_plan, masked_by
    from gatewright.tools.prune.apply import apply
    from gatewright.tools.prune.collect import collect
    from gatewright.tools.prune.verify import verify

    folder = "Qwen3-30B-A3B"
    model = load_model(folder)
    demos = [Demo(where="the first", domain="code", input_ids=ids, answer_start=0), ...]
    statistics = collect(model, demos, folder=folder)
    plan = make_plan(statistics, keep=0.5)
    with masked_by(model, plan):  # to be measured before a file is written
        ...
    apply(plan, folder, "pruned")
    assert all(check.passed for check in verify(plan, folder, "pruned"))

The names below are imported when they are first used (PEP 562): what reads a plan or rewrites files imports no torch.
A step's function has its module's name and is imported from there, as above.
"""

from typing import TYPE_CHECKING

from ... import names_on_first_use

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .criteria import score
    from .demos import Demo
    from .layerwise import LayerwiseModel
    from .layout import Layout
    from .loading import load_model, load_tokenizer
    from .mask import masked, masked_by
    from .model import moe_blocks, observe
    from .plan import Plan, make_plan
    from .statistics import DomainStatistics, Statistics

__all__ = [
    "Checkpoint",
    "Demo",
    "DomainStatistics",
    "LayerwiseModel",
    "Layout",
    "Plan",
    "Statistics",
    "load_model",
    "load_tokenizer",
    "make_plan",
    "masked",
    "masked_by",
    "moe_blocks",
    "observe",
    "score",
]

__getattr__, __dir__ = names_on_first_use(
    __name__,
    {
        ".checkpoint": ("Checkpoint",),
        ".criteria": ("score",),
        ".demos": ("Demo",),
        ".layerwise": ("LayerwiseModel",),
        ".layout": ("Layout",),
        ".loading": ("load_model", "load_tokenizer"),
        ".mask": ("masked", "masked_by"),
        ".model": ("moe_blocks", "observe"),
        ".plan": ("Plan", "make_plan"),
        ".statistics": ("DomainStatistics", "Statistics"),
    },
)
