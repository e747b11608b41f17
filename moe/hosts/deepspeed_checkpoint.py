"""Checkpoints of a DeepSpeed engine that load at any expert parallelism, number of ranks and ZeRO stage, 0 to 3.

    save_checkpoint(engine, "runs/a/checkpoints", extra={"options": ...})
    extra = load_checkpoint(engine, "runs/a/checkpoints")

Each parameter is stored by its name in the model, whole, an expert by its global id, as float32 weights and as every
tensor that the optimizer keeps of it (Adam's two moments, the average of the weights); beside them Adam's step, the
modules' buffers (the routers' state), the engine's counters, the scheduler and the random state of each rank. So
nothing in it depends on how it was laid out, and DeepSpeed's universal conversion is not needed, which leaves out
buffers, and at ZeRO-3 counts Adam's steps once for each of its parts (0.19.8).

Memory: one parameter is assembled at a time, on the rank that writes it: an expert on the first rank that holds it, all
else on rank 0. Reading takes only the rows that a rank keeps. All ranks see the same folder (a shared file system on
several machines). Whatever fails on one rank fails on all, with its message, and none waits for ever.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..layer import MoELayerCode, moe_layers
from .checkpoint_files import (
    Reader,
    ShardWriter,
    begin,
    check_files,
    complete,
    expert_key,
    find_latest,
    locate,
    read_manifest,
)
from .deepspeed_ema import refuse_averaged
from .deepspeed_state import (
    MASTER,
    Share,
    assemble,
    flats,
    inner_optimizer,
    kinds,
    publish,
    scalars,
    shares,
    step_value,
    tensor_of,
)
from .ranks import agree, barrier, gather, on_rank_0, rank, world

__all__ = ["find_latest", "load_checkpoint", "read_manifest", "save_checkpoint"]

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def save_checkpoint(
    engine: Any, path: str | Path, *, extra: dict[str, Any] | None = None, keep: int = 2, shard_bytes: int = 2**30
) -> Path:
    """Writes a checkpoint into the folder ``path``, as ``step-<global step>``. Collective.

    Args:
        extra: what else belongs to the run, as JSON: the model's options, the position in the data.
        keep: how many checkpoints stay; older ones are removed once the new one is complete.
        shard_bytes: about how large a file may become, and how much of it is held in memory.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the engine is between steps, or ``extra`` is not JSON.
        OSError: a rank could not write, on a full disk for instance; or a weight is not finite, or not in the model
            what it is in the optimizer (it was set after ``deepspeed.initialize``). The checkpoints before are as they
            were.
    """
    extra = {} if extra is None else extra
    _check_can_save(engine, extra, keep)
    name, saving = on_rank_0(lambda: begin(Path(path), engine.global_steps), OSError)
    writer = ShardWriter(saving, f"rank-{rank():05d}", shard_bytes)
    _write_tensors(engine, writer)
    files = gather(writer.files)
    try:
        agree(writer.error, OSError, f"the checkpoint {name} could not be written; the ones before are as they were")
        manifest = _manifest(engine, extra) | {"files": {n: entry for found in files for n, entry in found.items()}}
        return on_rank_0(lambda: complete(saving, name, manifest, keep), OSError)
    except OSError:
        if rank() == 0:
            shutil.rmtree(saving, ignore_errors=True)
        barrier()
        raise


def load_checkpoint(engine: Any, path: str | Path) -> dict[str, Any]:
    """Puts a checkpoint into an engine of the same model, at whatever layout. Collective.

    Everything is checked first: nothing in the engine changes if the checkpoint is damaged or of another model.

    Args:
        path: a checkpoint, or the folder that ``save_checkpoint`` wrote to (then its newest).

    Returns:
        What was given to ``save_checkpoint`` as ``extra``.

    Raises:
        ValueError: no checkpoint, a damaged one (which file, what was expected), or one of another size or router (the
            first difference).
    """
    refuse_averaged(engine, "load_checkpoint")
    folder = on_rank_0(lambda: locate(path), ValueError)
    manifest, error = None, None
    try:
        manifest = read_manifest(folder)
        _check_same_model(manifest["model"], _describe_model(engine), folder)
        check_files(folder, manifest, rank(), world())
        reader = Reader(folder, manifest)
        _check_complete(engine, manifest, reader, folder)
    except (ValueError, OSError, KeyError) as problem:
        error = problem
    agree(error, ValueError, "the checkpoint was not loaded and the engine is as it was")
    _read_tensors(engine, manifest, reader)
    publish(engine)
    _restore_counters(engine, manifest)
    _restore_random_state(manifest, reader)
    return manifest["extra"]


# ---- what is written -------------------------------------------------------------------------------------------------


def _write_tensors(engine: Any, writer: ShardWriter) -> None:
    state_kinds = kinds(engine)
    for name, share in shares(engine).items():
        for kind in [MASTER, *(state_kinds if share.trainable else [])]:
            whole = assemble(engine, share, kind)
            if whole is None or not _writes(engine, share):
                continue
            if kind == MASTER and writer.error is None:
                writer.error = _problem(name, share, whole)
            if share.experts is None:
                writer.add(f"{kind}/{name}", whole)
            else:
                for row, expert in zip(whole, share.experts, strict=True):
                    writer.add(expert_key(kind, name, expert), row)
    if rank() == 0:
        for name, buffer in _buffers(engine).items():
            writer.add(f"buffer/{name}", buffer)
    writer.add(f"random/cpu/{rank()}", torch.get_rng_state())
    if torch.cuda.is_available():
        writer.add(f"random/cuda/{rank()}", torch.cuda.get_rng_state())
    writer.close()


def _writes(engine: Any, share: Share) -> bool:
    """Whether this rank, which holds the whole parameter, is the first that does."""
    if share.experts is None:
        return rank() == 0
    return rank() < _expert_parallel_size(engine)


def _problem(name: str, share: Share, master: torch.Tensor) -> Exception | None:
    """What speaks against a checkpoint of these weights. At ZeRO-3 the model's are not there to be compared."""
    if not master.isfinite().all():
        return RuntimeError(f"{name} holds NaN or infinity")
    parameter = share.parameter
    if not hasattr(parameter, "ds_id") and not torch.equal(master.to(parameter.dtype), parameter.detach()):
        return RuntimeError(f"{name} is not in the model what it is in the optimizer")
    return None


def _buffers(engine: Any) -> dict[str, torch.Tensor]:
    """The buffers that belong to the model's state, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in engine.module.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _manifest(engine: Any, extra: dict[str, Any]) -> dict[str, Any]:
    every = shares(engine)
    return {
        "layout": {
            "world": world(),
            "expert_parallel": _expert_parallel_size(engine),
            "zero_stage": int(engine.zero_optimization_stage()),
            "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        },
        "model": _describe_model(engine),
        "kinds": kinds(engine),
        "parameters": {
            name: {
                "trainable": share.trainable,
                "experts": share.all_experts,
                "scalars": scalars(engine, share) if share.trainable else {},
            }
            for name, share in every.items()
        },
        "counters": {counter: getattr(engine, counter) for counter in COUNTERS},
        "scheduler": None
        if engine.lr_scheduler is None
        else {
            "state": engine.lr_scheduler.state_dict(),
            "lr": [group["lr"] for group in engine.optimizer.param_groups],
        },
        "extra": extra,
    }


def _describe_model(engine: Any) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit, in the order in which a difference is most telling."""
    layers = {}
    for name, layer in engine.module.named_modules():
        if isinstance(layer, MoELayerCode):
            layers[name] = {
                "router": layer.router.name or type(layer.router).__name__,
                "options": getattr(layer.router, "options", {}),
                "kinds": list(layer.router.expert_kinds),
                "experts": dataclasses.asdict(layer.spec),
            }
    shapes = {name: share.logical_shape for name, share in shares(engine).items()}
    buffers = {name: list(buffer.shape) for name, buffer in _buffers(engine).items()}
    # through JSON, so that it compares equal to what is read back
    return json.loads(json.dumps({"layers": layers, "parameters": shapes, "buffers": buffers}, default=repr))


def _check_can_save(engine: Any, extra: dict[str, Any], keep: int) -> None:
    refuse_averaged(engine, "save_checkpoint")
    if keep < 1:
        raise ValueError(f"keep={keep}: choose at least 1, the checkpoint that is written")
    try:
        json.dumps([extra, None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict()], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra and the scheduler's state must be JSON without NaN: {error}") from None
    accumulation = engine.gradient_accumulation_steps()
    if engine.micro_steps % accumulation:
        raise ValueError(
            f"{engine.micro_steps % accumulation} of {accumulation} micro-batches are accumulated: their gradients "
            "would be lost; save after a step"
        )
    if any(layer._accumulated for layer in moe_layers(engine.module)):
        raise ValueError("the routers' statistics of this step would be lost: call finish_step(engine.module) first")


# ---- what is read ----------------------------------------------------------------------------------------------------


def _check_same_model(saved: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    difference = _first_difference(saved, ours)
    if difference is not None:
        where, before, now = difference
        raise ValueError(f"{folder} is of another model: {where} is {before} there and {now} here")


def _first_difference(saved: Any, ours: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if not (isinstance(saved, dict) and isinstance(ours, dict)):
        return None if saved == ours else (where, saved, ours)
    for key in [*saved, *(key for key in ours if key not in saved)]:
        place = f"{where} {key!r}" if where in ("layers", "parameters", "buffers") else f"{where} {key}".strip()
        if key not in saved or key not in ours:
            return place, saved.get(key, "missing"), ours.get(key, "missing")
        found = _first_difference(saved[key], ours[key], place)
        if found is not None:
            return found
    return None


def _check_complete(engine: Any, manifest: dict[str, Any], reader: Reader, folder: Path) -> None:
    averaged = "ema" in kinds(engine)
    if averaged and "ema" not in manifest["kinds"]:
        raise ValueError(
            f"{folder} holds no average of the weights (ema), and this engine keeps one: load before EMA(engine)"
        )
    steps: dict[int, tuple[str, dict[str, float]]] = {}
    for name, share in shares(engine).items():
        entry = manifest["parameters"][name]
        if entry["trainable"] != share.trainable:
            raise ValueError(
                f"{folder} is of another model: {name} was {_trained(entry['trainable'])} there and is not here"
            )
        for key in _keys(name, share, [MASTER, *(manifest["kinds"] if share.trainable else [])]):
            if key not in reader:
                raise ValueError(f"{folder} lacks the tensor {key}")
        if share.trainable:
            first, known = steps.setdefault(id(share.flat), (name, entry["scalars"]))
            if known != entry["scalars"]:
                raise ValueError(
                    f"{folder}: {first} has the optimizer state {known} and {name} {entry['scalars']}, which ZeRO "
                    "keeps as one: load it at ZeRO-0"
                )
    if manifest["scheduler"] is not None and engine.lr_scheduler is not None:
        _rates(engine, manifest["scheduler"]["lr"])
    for name in manifest["model"]["buffers"]:
        if f"buffer/{name}" not in reader:
            raise ValueError(f"{folder} lacks the tensor buffer/{name}")


def _trained(trainable: bool) -> str:
    return "trained" if trainable else "frozen"


def _keys(name: str, share: Share, of: list[str]) -> list[str]:
    if share.experts is None:
        return [f"{kind}/{name}" for kind in of]
    return [expert_key(kind, name, expert) for kind in of for expert in share.experts]


@torch.no_grad()
def _read_tensors(engine: Any, manifest: dict[str, Any], reader: Reader) -> None:
    state = inner_optimizer(engine).state
    every = shares(engine)
    for flat in flats(engine):
        for stale in set(state[flat]) - set(manifest["kinds"]):
            del state[flat][stale]
        for kind in manifest["kinds"]:
            # kept where it is, if it is there: ZeRO-1/2 hold views of it
            state[flat].setdefault(kind, torch.zeros_like(flat))
    for name, share in every.items():
        for kind in [MASTER, *(manifest["kinds"] if share.trainable else [])]:
            _read_piece(share, share.piece(tensor_of(engine, share, kind)), kind, name, reader)
        for key, value in manifest["parameters"][name]["scalars"].items() if share.trainable else ():
            state[share.flat][key] = step_value(engine, value, share.flat)
    own = _buffers(engine)
    for name in manifest["model"]["buffers"]:
        own[name].copy_(reader.tensor(f"buffer/{name}"))


def _read_piece(share: Share, piece: torch.Tensor, kind: str, name: str, reader: Reader) -> None:
    if share.experts is None:
        if share.length:
            piece.copy_(reader.elements(f"{kind}/{name}", share.start, share.length))
        return
    row = share.shape[1:].numel()
    done = 0
    while done < share.length:
        index, inside = divmod(share.start + done, row)
        length = min(row - inside, share.length - done)
        piece[done : done + length].copy_(reader.elements(expert_key(kind, name, share.experts[index]), inside, length))
        done += length


def _restore_counters(engine: Any, manifest: dict[str, Any]) -> None:
    for counter, value in manifest["counters"].items():
        setattr(engine, counter, value)
    # a step boundary, also where the accumulation changed
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    scheduler = manifest["scheduler"]
    if scheduler is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(scheduler["state"])
        for group, lr in zip(engine.optimizer.param_groups, _rates(engine, scheduler["lr"]), strict=True):
            group["lr"] = lr


def _rates(engine: Any, saved: list[float]) -> list[float]:
    """The learning rate of each of the optimizer's groups, whose number depends on the expert parallelism.

    Raises:
        ValueError: the groups are others, and had different rates.
    """
    groups = len(engine.optimizer.param_groups)
    if len(saved) != groups and len(set(saved)) > 1:
        raise ValueError(f"{len(saved)} optimizer groups with learning rates {saved} there, {groups} groups here")
    return saved if len(saved) == groups else saved[:1] * groups


def _restore_random_state(manifest: dict[str, Any], reader: Reader) -> None:
    """Only at the same number of ranks: otherwise nobody's random numbers continue."""
    if manifest["layout"]["world"] != world():
        return
    torch.set_rng_state(reader.tensor(f"random/cpu/{rank()}"))
    if torch.cuda.is_available() and f"random/cuda/{rank()}" in reader:
        torch.cuda.set_rng_state(reader.tensor(f"random/cuda/{rank()}"))


def _expert_parallel_size(engine: Any) -> int:
    return next((layer.parallel.size for layer in moe_layers(engine.module)), 1)
