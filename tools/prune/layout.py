"""Where a checkpoint keeps its experts and its routers, found from names and shapes.

    layout = Layout.of(Checkpoint.open(folder))
    layout.layers[0].router_tensors         # (("model.layers.3.mlp.gate.weight", 0), ...)

Experts are tensors `<block>.experts.<e>.<rest>`, one set an expert, or `<block>.experts.<rest>` with the experts along
axis 0; `<block>` is the MoE block. A router tensor is every tensor of the block's router module, and every parameter of
the block itself, that has an axis as long as there are experts: biases and correction biases are found, not listed, so
that a new one is not forgotten. What could be a router tensor and might as well be something else is refused by name.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .checkpoint import Checkpoint, TensorEntry
from .families import LAYER_KEYS, ROUTER_MODULES, SHARED, Family, family_of, number, text_config

EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)")
FUSED = re.compile(r"(?P<block>.+)\.experts\.(?P<rest>[^\d].*)")
LAYER = re.compile(r"(?P<root>(?:.*?\.)?)(?:layers|blocks|block|h)\.(?P<index>\d+)(?=\.|$)")
MTP = re.compile(r"(?:^|\.)mtp(?=[._]|$)")


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer on disk.

    Attributes:
        index: absolute layer index; a multi-token-prediction (MTP) layer stands behind the last hidden layer.
        prefix: the MoE block's name.
        expert_tensors: for each expert the names of its own tensors; () where they are all fused.
        fused_tensors: names of tensors that hold all experts along axis 0.
        router_tensors: name and expert axis of every tensor to slice besides.
        mtp: belongs to a multi-token-prediction head.
    """

    index: int
    prefix: str
    expert_tensors: tuple[tuple[str, ...], ...]
    fused_tensors: tuple[str, ...]
    router_tensors: tuple[tuple[str, int], ...]
    mtp: bool


@dataclass(frozen=True)
class Layout:
    """A checkpoint's experts.

    Attributes:
        family: the model's family.
        layers: the MoE layers in order, without those of MTP heads.
        mtp_layers: the MoE layers of MTP heads.
        mtp_tensors: every tensor of MTP heads, MoE or not.
        num_experts: N, routed experts a layer.
        top_k: K, experts a token goes to; None where neither config.json nor the family says.
        num_groups, topk_group: groups of consecutive experts, and how many of them a token may use; 1 and 1 without.
    """

    family: Family
    layers: tuple[MoeLayer, ...]
    mtp_layers: tuple[MoeLayer, ...]
    mtp_tensors: tuple[str, ...]
    num_experts: int
    top_k: int | None
    num_groups: int
    topk_group: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Layout":
        """
        Raises:
            ValueError: a dense, hash-routed or refused family; experts that are missing or shared between layers; a
                number of experts that differs from config.json's; a tensor of which it is not clear what it is.
        """
        family = family_of(checkpoint.config)
        text = text_config(checkpoint.config)
        num_experts = number(text, family.count_keys)
        num_layers = number(text, LAYER_KEYS)
        found = _find(checkpoint, family, num_experts, num_layers, text.get("hidden_size"))
        groups = number(text, family.group_keys, family.num_groups) or 1
        layout = cls(
            family=family,
            layers=tuple(layer for layer in found if not layer.mtp),
            mtp_layers=tuple(layer for layer in found if layer.mtp),
            mtp_tensors=tuple(name for name in checkpoint.tensors if _is_mtp(name, num_layers)),
            num_experts=num_experts,
            top_k=number(text, family.top_k_keys, family.top_k),
            num_groups=groups,
            topk_group=(number(text, family.topk_group_keys, family.topk_group) or 1) if groups > 1 else 1,
        )
        if not layout.layers:
            raise ValueError(
                f'{checkpoint.folder}: "{family.model_type}" says {num_experts} experts, but no tensor is named like '
                "an expert's: <block>.experts.<number>.<weight>, or <block>.experts.<weight> with the experts along axis 0"
            )
        return layout


def _find(
    checkpoint: Checkpoint, family: Family, num_experts: int, num_layers: int | None, hidden: int | None
) -> list[MoeLayer]:
    single: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    fused: dict[str, list[str]] = defaultdict(list)
    bare: dict[str, list[str]] = defaultdict(list)  # one number an expert, stored beside the experts: a router's bias
    for name, entry in checkpoint.tensors.items():
        if match := EXPERT.fullmatch(name):
            single[match["block"]][int(match["expert"])].append(name)
        elif match := FUSED.fullmatch(name):
            kind = bare if _is_vector(entry, num_experts) else fused
            kind[match["block"]].append(name)
        else:
            for rest in family.fused:
                if name.endswith("." + rest) and len(entry.shape) == 3:
                    fused[name.removesuffix("." + rest)].append(name)
    blocks = {block: None for block in [*single, *fused]}
    for block in blocks:
        _check_fused(checkpoint, fused[block], num_experts)
        if single[block]:
            _check_single(checkpoint, family, block, single[block], num_experts)
    below = _below(checkpoint, blocks)
    layers = []
    for block in blocks:
        index, mtp = _place(checkpoint, family, block, num_layers)
        router = _router(checkpoint, family, block, below[block], num_experts, hidden)
        router += [(name, _axis(checkpoint.tensors[name], num_experts)) for name in bare[block]]
        if not router:
            raise ValueError(
                f'{checkpoint.folder}: "{family.model_type}" has experts at {block}, but no router tensor with an axis '
                f"of {num_experts} beside them"
            )
        per_expert = tuple(tuple(single[block][expert]) for expert in sorted(single[block]))
        whole = tuple(name for name in fused[block] if not _is_scalar(checkpoint.tensors[name]))
        layers.append(MoeLayer(index, block, per_expert, whole, tuple(router), mtp))
    layers.sort(key=lambda layer: (layer.mtp, layer.index))
    _check_layers(checkpoint, family, layers)
    return layers


def _is_vector(entry: TensorEntry, length: int) -> bool:
    """[N] or [1, N], ...: as many numbers as there are experts, all along one axis."""
    return (
        length in entry.shape
        and all(size == 1 for size in entry.shape if size != length)
        and entry.shape.count(length) == 1
    )


def _is_scalar(entry: TensorEntry) -> bool:
    return all(size == 1 for size in entry.shape)


def _axis(entry: TensorEntry, length: int) -> int:
    return entry.shape.index(length)


def _check_fused(checkpoint: Checkpoint, names: Iterable[str], num_experts: int) -> None:
    for name in names:
        entry = checkpoint.tensors[name]
        if _is_scalar(entry):
            continue  # a scale that all experts share
        if entry.shape[0] != num_experts:
            raise ValueError(
                f"{checkpoint.folder}: config.json says {num_experts} experts, but axis 0 of {name} has "
                f"{entry.shape[0]} (shape {list(entry.shape)})"
            )


def _check_single(
    checkpoint: Checkpoint, family: Family, block: str, experts: dict[int, list[str]], num_experts: int
) -> None:
    missing = sorted(set(range(num_experts)) - set(experts))
    extra = sorted(set(experts) - set(range(num_experts)))
    if extra:
        raise ValueError(
            f"{checkpoint.folder}: config.json says {num_experts} experts, but {block} holds an expert {extra[-1]}"
        )
    if missing:
        raise ValueError(
            f"{checkpoint.folder}: {block} has no tensors for expert {missing[0]} ({len(missing)} of {num_experts} are "
            "missing): they are tied to others, or the checkpoint is incomplete; save it with a copy for each expert"
        )
    modules = {expert: _modules(names) for expert, names in experts.items()}
    for expert, own in modules.items():
        if own != modules[0]:
            raise ValueError(
                f"{checkpoint.folder}: {block} has {', '.join(sorted(modules[0] ^ own))} for only one of experts 0 and "
                f"{expert}: tied experts, or an incomplete checkpoint; save it with a copy for each expert"
            )


def _modules(names: Iterable[str]) -> set[str]:
    return {EXPERT.fullmatch(name)["rest"].split(".")[0] for name in names}


def _below(checkpoint: Checkpoint, blocks: Iterable[str]) -> dict[str, list[str]]:
    """For each block the names below it that are no expert's."""
    below: dict[str, list[str]] = {block: [] for block in blocks}
    for name in checkpoint.tensors:
        if ".experts." in name:
            continue
        at = name.rfind(".")
        while at > 0:
            if name[:at] in below:
                below[name[:at]].append(name)
            at = name.rfind(".", 0, at)
    return below


def _router(
    checkpoint: Checkpoint, family: Family, block: str, names: list[str], num_experts: int, hidden: int | None
) -> list[tuple[str, int]]:
    whole_layer = bool(re.search(r"\.\d+$", block))  # the experts stand in the decoder layer itself, beside its norms
    found = []
    for name in names:
        entry = checkpoint.tensors[name]
        rest = name[len(block) + 1 :]
        module, _, parameter = rest.partition(".")
        if rest in family.fused or SHARED.match(module) or module in family.copied or num_experts not in entry.shape:
            continue
        own = not parameter  # the block's own parameter, such as a correction bias outside the gate
        routes = module in ROUTER_MODULES or "router" in module or (own and not whole_layer)
        if not routes and whole_layer:
            continue
        if not routes:
            raise ValueError(
                f"{checkpoint.folder}: {name} of shape {list(entry.shape)} stands beside the experts of "
                f'"{family.model_type}" and has an axis of {num_experts}, their number: whether that is a coincidence '
                "cannot be seen, so this family needs an entry in gatewright.tools.prune.families"
            )
        if "tid2eid" in rest:
            raise ValueError(f"{checkpoint.folder}: {block} is hash-routed ({name}): its experts cannot be pruned")
        if _ambiguous(entry, parameter or rest, num_experts, hidden):
            raise ValueError(
                f'{checkpoint.folder}: {name} of shape {list(entry.shape)} is part of the router of "{family.model_type}", '
                f"but which axis counts the {num_experts} experts, or whether one does, cannot be seen from its shape"
            )
        found.append((name, _axis(entry, num_experts)))
    return found


def _ambiguous(entry: TensorEntry, parameter: str, num_experts: int, hidden: int | None) -> bool:
    """Whether an axis as long as there are experts may be another one."""
    if _is_vector(entry, num_experts):
        return num_experts == hidden and not re.search("bias|expert|correction", parameter)
    axis = _axis(entry, num_experts)
    return axis > 0 and hidden is not None and any(size not in (1, hidden) for size in entry.shape[:axis])


def _place(checkpoint: Checkpoint, family: Family, block: str, num_layers: int | None) -> tuple[int, bool]:
    match = LAYER.match(block)
    if match is None:
        raise ValueError(
            f'{checkpoint.folder}: the experts of "{family.model_type}" at {block} belong to no numbered layer: experts '
            "that layers share (tied experts) cannot be pruned layer by layer"
        )
    index = int(match["index"])
    if MTP.search(block):
        return (num_layers or 0) + index, True
    return index, num_layers is not None and index >= num_layers


def _is_mtp(name: str, num_layers: int | None) -> bool:
    if MTP.search(name):
        return True
    match = LAYER.match(name)
    return bool(match) and num_layers is not None and "vision" not in name and int(match["index"]) >= num_layers


def _check_layers(checkpoint: Checkpoint, family: Family, layers: list[MoeLayer]) -> None:
    roots = {LAYER.match(layer.prefix)["root"] for layer in layers if not layer.mtp}
    if len(roots) > 1:
        raise ValueError(
            f'{checkpoint.folder}: "{family.model_type}" holds several stacks of MoE layers '
            f"({', '.join(sorted(root + 'layers' for root in roots))}): save the one to prune by itself"
        )
    indices = [layer.index for layer in layers]
    for index in indices:
        if indices.count(index) > 1:
            raise ValueError(f'{checkpoint.folder}: "{family.model_type}" has two MoE blocks in layer {index}')
    # A router without experts: they are another layer's, or lost.
    prefixes = {layer.prefix for layer in layers}
    routers = {name.removeprefix(layer.prefix) for layer in layers for name, _ in layer.router_tensors}
    for name in checkpoint.tensors:
        for rest in routers:
            if (
                name.endswith(rest)
                and name.removesuffix(rest) not in prefixes
                and _like(name.removesuffix(rest), prefixes)
            ):
                raise ValueError(
                    f"{checkpoint.folder}: {name} is a router without experts of its own: they are tied to another "
                    "layer's, or the checkpoint is incomplete; save it with a copy for each layer"
                )


def _like(prefix: str, prefixes: set[str]) -> bool:
    return re.sub(r"\d+", "#", prefix) in {re.sub(r"\d+", "#", known) for known in prefixes}
