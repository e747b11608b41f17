"""Which families of the installed transformers can be pruned, shown on a tiny model of each.

A family is proven when a random model of its class is saved, pruned on disk by ``apply`` to different experts in every
layer, loaded again by stock ``from_pretrained`` with no key amiss (V1), and gives the logits of the masked model bit
for bit under every experts implementation that it has (V2); with a grouped router under every policy that can be
written. Everything else is refused, with the reason that a user would get.
"""

from __future__ import annotations

import ast
import random
import tempfile
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from .apply import apply
from .checkpoint import Checkpoint
from .families import COUNT_KEYS, family_of, number, text_config
from .families_table import Proof
from .layout import Layout
from .loading import quiet
from .model import moe_blocks
from .plan import Plan
from .tiny import config_class, tiny_config, tiny_model
from .verify_model import IMPLEMENTATIONS, check_loads, check_logits, implementations_of

GROUPED = ("slice", "slice-equal-groups", "slice-regroup")


class NotEqual(AssertionError):
    """A family that is accepted and comes out wrong."""


def shared_families() -> dict[str, str]:
    """The folders of ``transformers.models`` whose experts use its shared interface, and Llama 4's, each with the model
    type of its checkpoints."""
    root = Path(transformers.__file__).parent / "models"
    found = {}
    for folder in sorted(root.iterdir()):
        sources = sorted(folder.glob("modeling_*.py"))
        if folder.name == "llama4" or any(_decorates(source.read_text(encoding="utf-8")) for source in sources):
            types = [kind for kind in CONFIG_MAPPING_NAMES if model_type_to_module_name(kind) == folder.name]
            found[folder.name] = min(types, key=lambda kind: (kind != folder.name, _is_part(kind), kind))
    return found


def _is_part(model_type: str) -> bool:
    """A tower's or the text model's own configuration, rather than the whole model's."""
    return not hasattr(config_class(model_type)(), "text_config")


def _decorates(source: str) -> bool:
    if "use_experts_implementation" not in source:
        return False
    decorators = (
        ast.unparse(decorator)
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
    )
    return any(text.startswith("use_experts_implementation") for text in decorators)


def prove(family: str, model_type: str, *, seed: int = 0) -> Proof:
    """Tries one family.

    Raises:
        NotEqual: the tools accept it, and the pruned model is not the masked one.
    """
    try:
        _check_family(config_class(model_type)().to_dict())
        _check_family(tiny_config(model_type).to_dict())
        implementations = _prove(model_type, {}, ("slice",), seed)
        grouped = _grouped_changes(model_type)
        policies = GROUPED if grouped else ()
        if grouped:
            _prove(model_type, grouped, GROUPED, seed)
    except ValueError as error:
        return Proof(family, model_type, refusal=str(error))
    return Proof(family, model_type, implementations, policies)


def _check_family(config: dict) -> None:
    """Refuses what the family's own default or the tiny one shows; a default without experts shows nothing."""
    if (number(text_config(config), COUNT_KEYS) or 0) > 1:
        family_of(config)


def _prove(model_type: str, changes: dict[str, object], policies: tuple[str, ...], seed: int) -> tuple[str, ...]:
    model = tiny_model(model_type, seed, **changes)
    blocks = moe_blocks(model)
    implementations = implementations_of(model, IMPLEMENTATIONS)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "model"
        with quiet():
            model.save_pretrained(source)
        try:
            checkpoint = Checkpoint.open(source)
            description = Layout.of(checkpoint).describe(checkpoint)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{source}: ")) from None
        if description["layers"] != [block.layer for block in blocks]:
            raise NotEqual(f"{model_type}: MoE layers {description['layers']} on disk, others in memory")
        for policy in policies:
            plan = random_plan(description, policy, seed)
            pruned = Path(place) / policy
            apply(plan, source, pruned)
            for check in (check_loads(pruned), check_logits(plan, source, pruned, implementations=implementations)):
                if not check.passed:
                    raise NotEqual(f"{model_type}, {policy}: {check.summary}: {'; '.join(check.problems[:3])}")
    return implementations


def _grouped_changes(model_type: str) -> dict[str, object]:
    """What makes the family's router a grouped one; {} where it cannot be."""
    config = config_class(model_type)().get_text_config()
    if not hasattr(config, "n_group") or not hasattr(config, "topk_group"):
        return {}
    changes = {"n_group": 2, "topk_group": 1}
    if hasattr(config, "topk_method"):
        changes["topk_method"] = "group_limited_greedy"
    return changes if moe_blocks(tiny_model(model_type, **changes))[0].num_groups == 2 else {}


def random_plan(description: dict, policy: str, seed: int = 0) -> Plan:
    """Half of the experts, others in every layer; as many in each group where the policy wants that."""
    chance = random.Random(seed)
    N, groups = description["num_experts"], description["num_groups"]
    pools = [range(N)]
    if policy == "slice-equal-groups":
        size = N // groups
        pools = [range(start, start + size) for start in range(0, N, size)]
    keep = {
        layer: tuple(sorted(expert for pool in pools for expert in chance.sample(pool, len(pool) // 2)))
        for layer in description["layers"]
    }
    return Plan(
        model=description,
        criterion="random",
        domains={},
        policy=policy,
        keep=keep,
        top_k=description["top_k"],
        num_groups=1 if policy == "slice" else groups,
        topk_group=1 if policy == "slice" else description["topk_group"],
    )
