"""A transformers model held to some of its experts, without writing a file: what pruned files must equal.

    with masked(model, {1: (0, 3, 5, 6), 2: (1, 2, 4, 7)}):
        logits = model(input_ids).logits

``mode="reroute"``: tokens go to the survivors, with as many experts as before. What that means for a grouped router is
the policy's to say; for all others the four are one, but for ``keep-rows`` with a softmax over all that is not
renormalised, whose denominator keeps the removed experts.

    slice                a router of the kept rows alone; a grouped one loses its groups (n_group = topk_group = 1)
    slice-equal-groups   as many kept in every group; groups stay as they are
    slice-regroup        a router of the kept rows; its groups are runs of consecutive survivors
    keep-rows            the whole router scores and chooses groups, then a removed expert is never chosen (what the
                         released code of EASY-EP does, arXiv:2504.06792; its product with 0 could choose a removed
                         expert over one of negative biased score, this cannot)

The slices are the index-slice reference: the router's own forward on the retained rows of every tensor with an expert
axis, and the chosen places mapped back to ids. Under the first three policies logits are those of the files that
``apply`` writes, bit for bit on a CPU.

``mode="no-reroute"``: the whole router decides as ever, and what it gave to removed experts is lost: gates are not
renormalised. Only for evaluation: no stock engine runs such a model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .model import MoeBlock, moe_blocks
from .plan import POLICIES, Plan

MODES = ("reroute", "no-reroute")


@contextlib.contextmanager
def masked(
    model: nn.Module,
    keep: Mapping[int, Sequence[int]],
    *,
    mode: str = "reroute",
    policy: str = "slice",
    top_k: int | None = None,
) -> Iterator[nn.Module]:
    """The model with only ``keep``'s experts, while the context lasts; afterwards it is as it was.

    The model's tensors are not copied or changed: a layer's router takes its slices in each forward, and any experts
    implementation runs as it is.

    Args:
        keep: expert ids by decoder layer, ascending; layers that are not named keep all. They may differ in number.
        mode: "reroute" or "no-reroute".
        policy: for grouped routers, see the module.
        top_k: experts a token from now on, where fewer are kept than a token had.

    Raises:
        ValueError: before anything is changed: a layer, id, mode or policy that does not exist, fewer experts than a
            token takes, groups that the policy cannot keep, a model that ``moe_blocks`` refuses or that is masked.
    """
    if mode not in MODES or policy not in POLICIES:
        raise ValueError(
            f"mode {mode!r} and policy {policy!r}: must be of {', '.join(MODES)} and {', '.join(POLICIES)}"
        )
    blocks = {block.layer: block for block in moe_blocks(model)}
    if unknown := sorted(set(keep) - set(blocks)):
        raise ValueError(f"keep names layers {unknown}; the model's MoE layers are {sorted(blocks)}")
    changes: list[tuple[nn.Module, Callable]] = []
    for layer, ids in sorted(keep.items()):
        block = blocks[layer]
        check_kept(block, ids, mode=mode, policy=policy, top_k=top_k)
        kept = torch.as_tensor(list(ids))
        if mode == "no-reroute":
            changes.append((block.router, _LosingRouter(block, kept)))
        elif policy == "keep-rows":
            changes.append((block.router, _ChoosingRouter(block, kept, top_k)))
        else:
            changes.append((block.router, _SlicedRouter(block, kept, policy, top_k)))
            if block.runs_all_experts:
                changes.append((block.experts, _Slices(block.experts, block.num_experts, kept, 0)))
    with contextlib.ExitStack() as stack:
        for module, forward in changes:
            stack.enter_context(_forward_replaced(module, forward))
        yield model


def masked_by(model: nn.Module, plan: Plan, *, mode: str = "reroute") -> contextlib.AbstractContextManager[nn.Module]:
    """``masked`` as a ``Plan`` says: its kept experts, policy and experts a token."""
    for block in moe_blocks(model):
        if block.layer in plan.keep and block.num_experts != plan.num_experts:
            raise ValueError(
                f"the plan was made for {plan.num_experts} experts a layer, and {block.name} has {block.num_experts}: "
                "it is another model's"
            )
    return masked(model, plan.keep, mode=mode, policy=plan.policy, top_k=plan.top_k)


def check_kept(
    block: MoeBlock, ids: Sequence[int], *, mode: str = "reroute", policy: str = "slice", top_k: int | None = None
) -> None:
    """Whether a layer can be held to these experts.

    Raises:
        ValueError: it cannot; says what to change.
    """
    ids, where = list(ids), f"layer {block.layer}"
    if ids != sorted(set(ids)) or not ids or ids[0] < 0 or ids[-1] >= block.num_experts:
        raise ValueError(f"{where}: kept ids must ascend within 0..{block.num_experts - 1}, each once; got {ids}")
    if mode == "no-reroute":
        if top_k not in (None, block.top_k):
            raise ValueError("no-reroute leaves the router's decisions as they are: top_k cannot be changed with it")
        return
    wanted = block.top_k if top_k is None else top_k
    if not 1 <= wanted <= block.top_k:
        raise ValueError(f"{where}: top_k must be 1 to {block.top_k}, got {wanted}")
    if wanted > len(ids):
        raise ValueError(
            f"{where}: {len(ids)} experts are kept and every token takes {wanted}: keep more, or pass top_k={len(ids)}"
        )
    if wanted != block.top_k and "block.num_experts" in block.memory.gate_factors:
        raise ValueError(f"{where}: this family's block multiplies by its experts a token: top_k cannot be lowered")
    if block.num_groups == 1:
        return
    size = block.num_experts // block.num_groups
    kept = [sum(expert // size == group for expert in ids) for group in range(block.num_groups)]
    if policy == "slice-equal-groups":
        if len(set(kept)) > 1:
            raise ValueError(
                f"{where}: slice-equal-groups needs as many kept experts in each of the {block.num_groups} groups, got "
                f"{kept}; choose policy slice (groups go) or a plan of equal groups"
            )
        kept_each = kept[0]
    elif policy == "slice-regroup":
        if len(ids) % block.num_groups:
            raise ValueError(
                f"{where}: slice-regroup needs a multiple of the {block.num_groups} groups, got {len(ids)} kept experts"
            )
        kept_each = len(ids) // block.num_groups
    elif policy == "keep-rows":
        poorest = sum(sorted(kept)[: block.topk_group])
        if poorest < wanted:
            raise ValueError(
                f"{where}: a token's {block.topk_group} groups may hold as few as {poorest} kept experts, and it takes "
                f"{wanted}: keep more in the poorest groups ({kept})"
            )
        return
    else:
        return
    scores_two = not hasattr(block.router, "topk_method")  # a group's score is the sum of its two best, not its best
    if kept_each < 1 + scores_two or kept_each * block.topk_group < wanted:
        raise ValueError(
            f"{where}: {policy} leaves groups of {kept_each}, of which {block.topk_group} are open to a token: it "
            f"needs {wanted} experts there"
            + (" and two in a group to score it" if scores_two else "")
            + "; keep more, or choose slice"
        )


class _Slices:
    """A module's own forward on the retained rows of every tensor with an expert axis."""

    def __init__(self, module: nn.Module, num_experts: int, kept: Tensor, extra: int) -> None:
        self.module, self.total = module, num_experts + extra
        whole = torch.cat([kept, torch.arange(num_experts, self.total)])
        self.rows = {num_experts: kept, self.total: whole}  # by the length of the axis that they are taken of
        self.twin = _twin(module)
        for part in self.twin.modules():
            _recount(part, num_experts, len(kept), extra)
        self.axes = {name: axis for name, tensor in _tensors(module) if (axis := self._axis(name, tensor)) is not None}
        if not self.axes:
            raise ValueError(
                f"{type(module).__name__} has no tensor with an axis of {self.total} experts: cannot be sliced"
            )

    def _axis(self, name: str, tensor: Tensor) -> int | None:
        axes = [axis for axis, length in enumerate(tensor.shape) if length in self.rows]
        if len(axes) > 1 and tensor.dim() == 2:
            raise ValueError(
                f"{type(self.module).__name__}.{name} is {tuple(tensor.shape)}: which axis counts experts is not told"
            )
        return axes[0] if axes else None

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.index_select(axis, self.rows[tensor.shape[axis]].to(tensor.device))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = {}
        for name, tensor in _tensors(self.module):
            if tensor.is_meta:
                raise ValueError(
                    f"{type(self.module).__name__}.{name} is not in memory (offloaded): it cannot be masked"
                )
            tensors[name] = self.take(tensor, self.axes[name]) if name in self.axes else tensor
        return torch.func.functional_call(self.twin, tensors, args, kwargs)


class _SlicedRouter(_Slices):
    def __init__(self, block: MoeBlock, kept: Tensor, policy: str, top_k: int | None) -> None:
        extra = block.family.extra_rows
        extra = getattr(block.router, extra) if isinstance(extra, str) else extra
        super().__init__(block.router, block.num_experts, kept, extra)
        self.block, self.kept = block, kept
        _set_choice(self.twin, top_k, ungrouped=policy == "slice")

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        # a bias that the block holds and hands to its router
        own = [
            tensor
            for tensors in (self.block.holder._parameters, self.block.holder._buffers)
            for tensor in tensors.values()
        ]
        args = tuple(self._taken(value, own) for value in args)
        kwargs = {name: self._taken(value, own) for name, value in kwargs.items()}
        output = super().__call__(hidden, *args, **kwargs)
        if self.block.runs_all_experts:
            return output
        logits, weight, index, *rest = output
        width = {len(rows): before for before, rows in self.rows.items()}.get(logits.shape[-1])
        if width is None:
            raise ValueError(
                f"{type(self.module).__name__} gives {logits.shape[-1]} columns for {len(self.kept)} kept experts: its "
                "slicing is not understood"
            )
        fill = 0.0 if self.block.memory.gives_probabilities else float("-inf")
        whole = logits.new_full((*logits.shape[:-1], width), fill)
        return (
            whole.index_copy(-1, self.rows[width].to(logits.device), logits),
            weight,
            self.kept.to(index.device)[index],
            *rest,
        )

    def _taken(self, value: Any, own: list[Tensor]) -> Any:
        if not any(value is tensor for tensor in own) or value is None:
            return value
        axis = self._axis("its argument", value)
        return value if axis is None else self.take(value, axis)


class _ChoosingRouter:
    """The whole router, but for its choice of K of all N, in which removed experts count as -inf."""

    def __init__(self, block: MoeBlock, kept: Tensor, top_k: int | None) -> None:
        self.block, self.twin = block, _twin(block.router)
        _set_choice(self.twin, top_k, ungrouped=False)
        self.mode = _ChoiceAmongKept(block.num_experts, top_k or block.top_k, kept)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.mode.chosen = 0
        with self.mode:
            output = torch.func.functional_call(self.twin, dict(_tensors(self.block.router)), args, kwargs)
        if self.mode.chosen != 1:
            raise ValueError(
                f"{type(self.block.router).__name__} does not choose by one top-k over its {self.block.num_experts} "
                "experts: keep-rows cannot be followed; choose slice"
            )
        return output


class _ChoiceAmongKept(TorchFunctionMode):
    def __init__(self, num_experts: int, top_k: int, kept: Tensor) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.chosen = num_experts, top_k, 0
        self.removed = torch.ones(num_experts, dtype=torch.bool).index_fill(0, kept, False)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores, k = args[0], args[1] if len(args) > 1 else kwargs.get("k")
            # scores of groups have three axes
            if scores.dim() == 2 and scores.shape[-1] == self.num_experts and k == self.top_k:
                self.chosen += 1
                scores = scores.masked_fill(self.removed.to(scores.device), float("-inf"))
                args = (scores, *args[1:])
        return func(*args, **kwargs)


class _LosingRouter:
    """The whole router; gates of removed experts become 0."""

    def __init__(self, block: MoeBlock, kept: Tensor) -> None:
        self.block, self.twin = block, _twin(block.router)
        self.stays = torch.zeros(block.num_experts, dtype=torch.bool).index_fill(0, kept, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = torch.func.functional_call(self.twin, dict(_tensors(self.block.router)), args, kwargs)
        if self.block.runs_all_experts:
            scores_TE, logits_TE = output
            return scores_TE * self.stays.to(scores_TE), logits_TE
        logits, weight, index, *rest = output
        return (logits, weight * self.stays.to(index.device)[index].to(weight.dtype), index, *rest)


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """The instance's forward is replaced, so that its hooks, its class and its tensors are what they were."""
    if "kept_experts" in module.__dict__:
        raise ValueError(f"{type(module).__name__} is masked already: leave that context first")
    place = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # what accelerate's own forward calls
    missing = object()
    before = module.__dict__.get(place, missing)
    module.__dict__["kept_experts"] = getattr(forward, "kept", None)
    module.__dict__[place] = forward
    try:
        yield
    finally:
        del module.__dict__["kept_experts"]
        if before is missing:
            del module.__dict__[place]
        else:
            module.__dict__[place] = before


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same tensors whose numbers can be changed: without hooks, and with no replaced forward."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    for name in [name for name in twin.__dict__ if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs")]:
        twin.__dict__[name] = type(twin.__dict__[name])()
    for name in ("forward", "_old_forward", "_hf_hook"):
        twin.__dict__.pop(name, None)
    for name, child in module._modules.items():
        twin._modules[name] = _twin(child) if child is not None else None
    return twin


def _recount(part: nn.Module, before: int, after: int, extra: int) -> None:
    """The numbers of experts that a router keeps as attributes."""
    for name, value in list(part.__dict__.items()):
        if not isinstance(value, int) or isinstance(value, bool) or not ("expert" in name or "classes" in name):
            continue
        if value == before and "shared" not in name and "per_tok" not in name:
            part.__dict__[name] = after
        elif extra and value == before + extra:
            part.__dict__[name] = after + extra
    config = part.__dict__.get("config")
    if config is not None:
        part.__dict__["config"] = config = copy.copy(config)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            if getattr(config, name, None) == before:
                setattr(config, name, after)


def _set_choice(twin: nn.Module, top_k: int | None, *, ungrouped: bool) -> None:
    if top_k is not None:
        if isinstance(twin.__dict__.get("top_k"), int):
            twin.__dict__["top_k"] = top_k
        else:
            twin.__dict__["config"] = copy.copy(twin.config)
            twin.config.top_k_experts = top_k
    if ungrouped and twin.__dict__.get("num_group") is not None:
        twin.__dict__["num_group"] = twin.__dict__["topk_group"] = 1
