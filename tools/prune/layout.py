"""Where a checkpoint keeps its experts and its routers, found from names and shapes.

    layout = Layout.of(Checkpoint.open(folder))
    layout.layers[0].router_tensors         # (("model.layers.3.mlp.gate.weight", 0), ...)

Experts are tensors `<block>.experts.<e>.<rest>`, one set an expert, or `<block>.experts.<rest>` with the experts along
axis 0; `<block>` is the MoE block. A router tensor is every tensor of the block's router module, and every parameter of
the block itself, that has an axis as long as there are experts, and every vector of that length in a router module
elsewhere in the decoder layer: biases and correction biases are found, not listed, so that a new one is not forgotten.
What could be a router tensor and might as well be something else is refused by name.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .checkpoint import Checkpoint, TensorEntry
from .families import LAYER_KEYS, ROUTER_MODULES, SHARED, Family, family_of, number, text_config

EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)")
FUSED = re.compile(r"(?P<block>.+)\.experts\.(?P<rest>[^\d].*)")
LAYER = re.compile(r"(?P<root>(?:.*?\.)?)(?:layers|blocks|block|h)\.(?P<index>\d+)(?=\.|$)")
NO_ROUTER = re.compile(r"share|attn|attention")  # their gates are no routers
MTP = re.compile(r"(?:^|\.)mtp(?=[._]|$)")


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer on disk.

    Attributes:
        index: absolute layer index; a multi-token-prediction (MTP) layer stands behind the last hidden layer.
        prefix: the MoE block's name.
        expert_tensors: for each expert the names of its own tensors; () where they are all fused.
        fused_tensors: names of tensors that hold all experts along axis 0.
        router_tensors: name and expert axis of every tensor to slice besides; what stands behind the experts on that
            axis stays (`Family.extra_rows`).
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
        extra = text.get(family.extra_rows, 0) if isinstance(family.extra_rows, str) else family.extra_rows
        found = _Search(checkpoint, family, num_experts, num_experts + extra, text.get("hidden_size"), num_layers).run()
        roots = {LAYER.match(layer.prefix)["root"] for layer in found if not layer.mtp}
        groups = number(text, family.group_keys, family.num_groups) or 1
        layout = cls(
            family=family,
            layers=tuple(layer for layer in found if not layer.mtp),
            mtp_layers=tuple(layer for layer in found if layer.mtp),
            mtp_tensors=tuple(name for name in checkpoint.tensors if _is_mtp(name, roots, num_layers)),
            num_experts=num_experts,
            top_k=number(text, family.top_k_keys, family.top_k),
            num_groups=groups,
            topk_group=(number(text, family.topk_group_keys, family.topk_group) or 1) if groups > 1 else 1,
        )
        if not layout.layers:
            raise ValueError(
                f'{checkpoint.folder}: "{family.model_type}" has {num_experts} experts by config.json, but no tensor '
                "is named like an expert's: <block>.experts.<number>.<weight>, or <block>.experts.<weight> of them all"
            )
        return layout

    def describe(self, checkpoint: Checkpoint) -> dict:
        """What statistics and plans say of the model (`Statistics.model`)."""
        return {
            "model_type": self.family.model_type,
            "name": checkpoint.folder.resolve().name,
            "config_sha256": checkpoint.config_sha256,
            "header_hash": checkpoint.header_hash,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_groups": self.num_groups,
            "topk_group": self.topk_group,
            "layers": [layer.index for layer in self.layers],
            "experts_per_layer": [self.num_experts] * len(self.layers),
            "mtp_layers": [layer.index for layer in self.mtp_layers],
        }


@dataclass(frozen=True)
class _Search:
    """The search for MoE layers in one checkpoint's names and shapes.

    `rows` is what a router scores: the experts, and whatever else. Its tensors have one entry for each of `rows`, or
    one for each expert.
    """

    checkpoint: Checkpoint
    family: Family
    num_experts: int
    rows: int
    hidden: int | None
    num_layers: int | None

    def run(self) -> list[MoeLayer]:
        single: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        fused: dict[str, list[str]] = defaultdict(list)
        bare: dict[str, list[str]] = defaultdict(list)  # one number an expert beside the experts: a router's bias
        for name, entry in self.checkpoint.tensors.items():
            if match := EXPERT.fullmatch(name):
                single[match["block"]][int(match["expert"])].append(name)
            elif match := FUSED.fullmatch(name):
                if not self._is_copied(f"experts.{match['rest']}"):
                    kind = bare if self._is_vector(name) else fused
                    kind[match["block"]].append(name)
            else:
                for rest in self.family.fused:
                    if name.endswith("." + rest) and len(entry.shape) == 3:
                        fused[name.removesuffix("." + rest)].append(name)
        blocks = dict.fromkeys([*single, *fused])
        for block in blocks:
            self._check_fused(fused[block])
            if single[block]:
                self._check_single(block, single[block])
        below, beside = self._below(blocks), self._beside(blocks)
        layers = []
        for block in blocks:
            index, mtp = self._place(block)
            layer = LAYER.match(block)
            aside = beside[layer[0]] if layer is not None and layer[0] != block else ()
            names = (*self._router(block, below[block]), *bare[block], *aside)
            router = [(name, self._axis(name)) for name in names]
            matrices = [name for name, _ in router if not self._is_vector(name)]
            if not matrices:
                raise self._refusal(f"has experts at {block}, but no router weight of {self.rows} rows beside them")
            if len(matrices) > 1:
                raise self._refusal(
                    f"has more than one router weight at {block} with an axis of {self.num_experts} "
                    f"({', '.join(matrices)}): which of them counts the experts cannot be seen"
                )
            self._check_scales(matrices[0], below[block])
            per_expert = tuple(tuple(single[block][expert]) for expert in sorted(single[block]))
            whole = tuple(name for name in fused[block] if not _is_scalar(self.checkpoint.tensors[name]))
            layers.append(MoeLayer(index, block, per_expert, whole, tuple(router), mtp))
        layers.sort(key=lambda layer: (layer.mtp, layer.index))
        self._check_layers(layers)
        return layers

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f'{self.checkpoint.folder}: "{self.family.model_type}" {reason}')

    def _axis(self, name: str) -> int:
        shape = self.checkpoint.tensors[name].shape
        return next(axis for axis, size in enumerate(shape) if size in (self.rows, self.num_experts))

    def _is_vector(self, name: str) -> bool:
        """[N], [1, N], ...: one number an expert, along one axis."""
        shape = self.checkpoint.tensors[name].shape
        return len(shape) > 0 and max(shape) == math.prod(shape) in (self.rows, self.num_experts)

    def _is_copied(self, rest: str) -> bool:
        return any(rest == module or rest.startswith(f"{module}.") for module in self.family.copied)

    def _check_fused(self, names: Iterable[str]) -> None:
        for name in names:
            shape = self.checkpoint.tensors[name].shape
            # a single number is a scale that all experts share
            if not _is_scalar(self.checkpoint.tensors[name]) and shape[0] != self.num_experts:
                raise self._refusal(
                    f"has {self.num_experts} experts by config.json, but axis 0 of {name} has {shape[0]} "
                    f"(shape {list(shape)})"
                )

    def _check_single(self, block: str, experts: dict[int, list[str]]) -> None:
        missing = sorted(set(range(self.num_experts)) - set(experts))
        beyond = sorted(set(experts) - set(range(self.num_experts)))
        if beyond:
            raise self._refusal(
                f"has {self.num_experts} experts by config.json, but {block} holds one of number {beyond[-1]}"
            )
        if missing:
            raise self._refusal(
                f"has no tensors at {block} for {len(missing)} of its {self.num_experts} experts, {missing[0]} first: "
                "they are tied to others, or the checkpoint is incomplete; save it with a copy for each expert"
            )
        modules = {expert: _modules(names) for expert, names in experts.items()}
        for expert, own in modules.items():
            if own != modules[0]:
                raise self._refusal(
                    f"has {', '.join(sorted(modules[0] ^ own))} at {block} for only one of experts 0 and {expert}: "
                    "tied experts, or an incomplete checkpoint; save it with a copy for each expert"
                )

    def _below(self, blocks: Iterable[str]) -> dict[str, list[str]]:
        """For each block the names below it that are no expert's."""
        below: dict[str, list[str]] = {block: [] for block in blocks}
        for name in self.checkpoint.tensors:
            if ".experts." in name:
                continue
            end = name.rfind(".")
            while end > 0:
                if name[:end] in below:
                    below[name[:end]].append(name)
                end = name.rfind(".", 0, end)
        return below

    def _router(self, block: str, names: list[str]) -> Iterator[str]:
        whole_layer = bool(re.search(r"\.\d+$", block))  # the experts stand in the decoder layer itself
        for name in names:
            shape = self.checkpoint.tensors[name].shape
            rest = name[len(block) + 1 :]
            module, _, parameter = rest.partition(".")
            if "tid2eid" in rest:
                raise self._refusal(f"is hash-routed at {block} ({name}): its experts cannot be pruned")
            if rest in self.family.fused or SHARED.match(module) or self._is_copied(rest):
                continue
            if self.rows not in shape and self.num_experts not in shape:
                continue
            own = not parameter  # the block's own parameter, such as a correction bias outside the gate
            routes = module in ROUTER_MODULES or "router" in module or (own and not whole_layer)
            if not routes and whole_layer:
                continue
            if not routes:
                raise self._refusal(
                    f"has {name} of shape {list(shape)} beside its experts, with an axis of their number: whether that "
                    "is a coincidence cannot be seen, so the family needs an entry in gatewright.tools.prune.families"
                )
            if self._is_ambiguous(name, parameter or rest):
                raise self._refusal(
                    f"has {name} of shape {list(shape)} in its router: which axis counts the {self.num_experts} "
                    "experts, or whether one does, cannot be seen"
                )
            yield name

    def _check_scales(self, matrix: str, names: list[str]) -> None:
        """A router whose rows share scales cannot lose some of them."""
        module = matrix.rpartition(".")[0]
        for name in names:
            entry = self.checkpoint.tensors[name]
            shared = not _is_scalar(entry) and not {self.rows, self.num_experts}.intersection(entry.shape)
            if (
                name.startswith(f"{module}.")
                and re.search("weight_scale|weight_zero|scales|zeros", name[len(module) :])
                and shared
            ):
                raise self._refusal(
                    f"has a quantised router, {matrix}, several rows of which share a scale ({name} of shape "
                    f"{list(entry.shape)}): its rows cannot be cut apart; take a checkpoint with plain routers"
                )

    def _beside(self, blocks: Iterable[str]) -> dict[str, list[str]]:
        """For each decoder layer: one number an expert, in a router module that is in no block. A router's bias."""
        inside = tuple(f"{block}." for block in blocks)
        beside: dict[str, list[str]] = defaultdict(list)
        for name in self.checkpoint.tensors:
            modules = name.split(".")[:-1]
            if ".experts." in name or not ROUTER_MODULES.intersection(modules) or any(map(NO_ROUTER.search, modules)):
                continue
            layer = LAYER.match(name)
            if layer is not None and not name.startswith(inside) and self._is_vector(name):
                beside[layer[0]].append(name)
        return beside

    def _is_ambiguous(self, name: str, parameter: str) -> bool:
        """Whether an axis as long as there are experts may be another one."""
        if self._is_vector(name):
            return self.hidden in (self.rows, self.num_experts) and not re.search("bias|expert|correction", parameter)
        before = self.checkpoint.tensors[name].shape[: self._axis(name)]
        return any(size not in (1, self.hidden) for size in before)

    def _place(self, block: str) -> tuple[int, bool]:
        """The absolute layer index, and whether the layer belongs to an MTP head."""
        match = LAYER.match(block)
        if match is None:
            raise self._refusal(
                f"has experts at {block}, in no numbered layer: experts that layers share (tied experts) cannot be "
                "pruned layer by layer"
            )
        index = int(match["index"])
        if MTP.search(block):
            return (self.num_layers or 0) + index, True
        return index, self.num_layers is not None and index >= self.num_layers

    def _check_layers(self, layers: list[MoeLayer]) -> None:
        roots = {LAYER.match(layer.prefix)["root"] for layer in layers if not layer.mtp}
        if len(roots) > 1:
            stacks = ", ".join(sorted(f"{root}layers" for root in roots))
            raise self._refusal(f"holds several stacks of MoE layers ({stacks}): save the one to prune by itself")
        indices = [layer.index for layer in layers]
        for index in set(indices):
            if indices.count(index) > 1:
                raise self._refusal(f"has two MoE blocks in layer {index}")
        # A router without experts: they are another layer's, or lost.
        prefixes = {layer.prefix for layer in layers}
        alike = {_unnumbered(prefix) for prefix in prefixes}
        routers = {name[len(layer.prefix) :] for layer in layers for name, _ in layer.router_tensors}
        for name in self.checkpoint.tensors:
            for rest in routers:
                block = name.removesuffix(rest)
                if block != name and block not in prefixes and _unnumbered(block) in alike:
                    raise self._refusal(
                        f"has a router without experts of its own, {name}: they are tied to another layer's, or the "
                        "checkpoint is incomplete; save it with a copy for each layer"
                    )


def _is_scalar(entry: TensorEntry) -> bool:
    return math.prod(entry.shape) == 1


def _modules(names: Iterable[str]) -> set[str]:
    return {EXPERT.fullmatch(name)["rest"].split(".")[0] for name in names}


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _is_mtp(name: str, roots: set[str], num_layers: int | None) -> bool:
    if MTP.search(name):
        return True
    match = LAYER.match(name)
    return bool(match) and match["root"] in roots and num_layers is not None and int(match["index"]) >= num_layers
