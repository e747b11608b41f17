"""Where a DeepSpeed engine keeps the float32 weights and the optimizer's state of each parameter, at every ZeRO stage.

The inner optimizer steps float32 tensors ("flat"), of which each rank holds a part:

    float32, ZeRO-0     the parameters themselves
    bfloat16, ZeRO-0    a float32 copy of each (``FP16_UnfusedOptimizer``), or of a group in one (``FP16_Optimizer``)
    ZeRO-1, 2           this rank's part of each group, flattened; a parameter may begin on one rank and end on the next
    ZeRO-3              this rank's part of every parameter, one after the other

A ``Share`` says where in which flat tensor this rank's piece of a parameter is. Everything that saves, loads or
averages goes through it. DeepSpeed's own ``safe_get_full_*`` and ``safe_set_full_*`` do not do for that (0.19.8): they
know nothing at ZeRO-0, add up pieces in float (which loses the sign of a zero), need the optimizer's state to exist
before it can be set, fail at ZeRO-3 for a parameter that the ranks do not divide, and set the float32 weights without
the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer import moe_layers

MASTER, EMA_KEY = "master", "ema"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """This rank's piece of one parameter.

    Attributes:
        parameter: of the model.
        shape: of the whole parameter on this rank (its local experts, if it is a bank).
        experts: the global ids of its rows, if it is a bank of routed experts; None otherwise.
        all_experts: those of the banks of all ranks together.
        flat: the tensor that the inner optimizer steps; for a frozen parameter, the one that holds its values.
        offset: where in ``flat`` the piece begins.
        start, length: which elements of the flattened parameter it is; the length may be 0.
        group: the ranks that hold the other pieces; None where this rank holds all.
        trainable: whether the optimizer has state for it.
    """

    parameter: nn.Parameter
    shape: torch.Size
    experts: list[int] | None
    all_experts: list[int] | None
    flat: Tensor
    offset: int
    start: int
    length: int
    group: dist.ProcessGroup | None
    trainable: bool

    @property
    def logical_shape(self) -> list[int]:
        """The shape on all ranks together."""
        return list(self.shape) if self.all_experts is None else [len(self.all_experts), *self.shape[1:]]

    def piece(self, tensor: Tensor) -> Tensor:
        """The piece, as a view of ``flat`` or of a tensor of the same layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def shares(engine: Any) -> dict[str, Share]:
    """Every parameter's share, by its name in the model, in the model's order: the same names on every rank."""
    banks = {
        id(parameter): (
            layer.experts.ids,
            [expert for expert, kind in enumerate(layer.router.expert_kinds) if kind == "routed"],
        )
        for layer in moe_layers(engine.module)
        for parameter in layer.experts.parameters()
    }
    places = dict(_places(engine.optimizer))
    result = {}
    for name, parameter in engine.module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        place = places.get(id(parameter)) or _own_storage(parameter)
        experts, all_experts = banks.get(id(parameter), (None, None))
        result[name] = Share(
            parameter=parameter,
            shape=torch.Size(shape),
            experts=experts,
            all_experts=all_experts,
            trainable=id(parameter) in places,
            **place,
        )
    return result


def _places(optimizer: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The place of every parameter that is trained."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in optimizer.fp16_groups:
            for parameter in group:
                index, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                flat = optimizer.fp32_partitioned_groups_flat[index]
                yield id(parameter), _partition(parameter, flat, offset, size)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _fragments(optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        yield from _fragments(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    elif hasattr(optimizer, "fp32_groups_flat"):
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                yield id(parameter), _whole(parameter, flat, offset)
                offset += parameter.numel()
    elif hasattr(optimizer, "fp32_groups"):
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield id(parameter), _whole(parameter, master, 0)
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield id(parameter), _whole(parameter, parameter, 0)


def _fragments(optimizer: Any, groups: list, flats: list[Tensor]) -> Iterator[tuple[int, dict[str, Any]]]:
    for group, flat, ranks in zip(groups, flats, optimizer.real_dp_process_group, strict=True):
        for parameter in group:
            place = {"flat": flat, "offset": 0, "start": 0, "length": 0, "group": ranks}
            if parameter._hp_mapping is not None:
                master, model = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
                place |= {"offset": master.start, "start": model.start, "length": model.numel}
            yield id(parameter), place


def _partition(parameter: nn.Parameter, flat: Tensor, offset: int, size: int) -> dict[str, Any]:
    """ZeRO-3: equal parts, the last ones padded."""
    start = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    length = min(size, parameter.ds_numel - start)
    return {"flat": flat, "offset": offset, "start": start, "length": length, "group": parameter.ds_process_group}


def _own_storage(parameter: nn.Parameter) -> dict[str, Any]:
    """A frozen parameter's: the model's own tensor."""
    if hasattr(parameter, "ds_tensor"):
        return _partition(parameter, parameter.ds_tensor, 0, parameter.ds_tensor.ds_numel)
    return _whole(parameter, parameter, 0)


def _whole(parameter: nn.Parameter, flat: Tensor, offset: int) -> dict[str, Any]:
    return {"flat": flat, "offset": offset, "start": 0, "length": parameter.numel(), "group": None}


def flats(engine: Any) -> list[Tensor]:
    """Every tensor that the inner optimizer steps, once."""
    found = {id(share.flat): share.flat for share in shares(engine).values() if share.trainable}
    return list(found.values())


def kinds(engine: Any) -> list[str]:
    """The optimizer's tensors with one element a weight, "exp_avg", "exp_avg_sq", "ema": the same on every rank."""
    state = inner_optimizer(engine).state
    names = {key for flat in flats(engine) for key, value in state.get(flat, {}).items() if _is_per_weight(value, flat)}
    return sorted(names)


def tensor_of(engine: Any, share: Share, kind: str) -> Tensor:
    """The tensor laid out as ``share.flat`` that holds the kind."""
    return share.flat if kind == MASTER else inner_optimizer(engine).state[share.flat][kind]


def scalars(engine: Any, share: Share) -> dict[str, float]:
    """What the optimizer knows of the parameter as a whole: Adam's step."""
    state = inner_optimizer(engine).state.get(share.flat, {})
    return {key: float(value) for key, value in state.items() if not _is_per_weight(value, share.flat)}


def _is_per_weight(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape and (value.dim() > 0 or flat.dim() == 0)


@torch.no_grad()
def assemble(engine: Any, share: Share, kind: str, *, everywhere: bool = False) -> Tensor | None:
    """The whole parameter, on every rank of the share's group or on its first only (None on the others).

    Collective in the share's group. Exact: bytes are added to zeros.
    """
    tensor = tensor_of(engine, share, kind)
    if share.group is None or dist.get_world_size(share.group) == 1:
        return share.piece(tensor).view(share.shape)
    whole = torch.zeros(share.shape, dtype=tensor.dtype, device=tensor.device)
    if share.length:
        whole.view(-1).narrow(0, share.start, share.length).copy_(share.piece(tensor))
    octets = whole.view(-1).view(torch.uint8)
    if everywhere:
        dist.all_reduce(octets, group=share.group)
        return whole
    writer = dist.get_global_rank(share.group, 0)
    dist.reduce(octets, dst=writer, group=share.group)
    return whole if dist.get_rank() == writer else None


@torch.no_grad()
def prepare_state(engine: Any) -> None:
    """Makes Adam's state before the first step, as that would: it makes none where it finds any.

    Raises:
        ValueError: another optimizer than Adam.
    """
    optimizer = inner_optimizer(engine)
    if "Adam" not in type(optimizer).__name__:
        raise ValueError(
            f"optimizer {type(optimizer).__name__}: averages are kept beside the state of Adam or AdamW; choose one"
        )
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for flat in flats(engine):
        if not optimizer.state[flat]:
            # ZeRO-3 fills its optimizer's groups at each step and empties them after
            group = group_of.get(id(flat), optimizer.param_groups[0])
            state = optimizer.state[flat]
            state["step"] = step_value(engine, 0, flat)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
            if group.get("amsgrad"):
                state["max_exp_avg_sq"] = torch.zeros_like(flat)


def step_value(engine: Any, step: float, flat: Tensor) -> Tensor | int:
    """Adam's step as the optimizer keeps it: torch's a tensor, DeepSpeed's fused ones a number."""
    optimizer = inner_optimizer(engine)
    if not type(optimizer).__module__.startswith("torch.optim"):
        return int(step)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(step), dtype=torch.float32, device=flat.device if on_device else "cpu")


@torch.no_grad()
def publish(engine: Any) -> None:
    """Gives the model the float32 weights that the optimizer holds, as the end of a step does. Collective."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.checkpoint_event_prologue()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for share in shares(engine).values():
            if share.flat is not share.parameter:
                share.parameter.copy_(share.piece(share.flat).view(share.shape))
