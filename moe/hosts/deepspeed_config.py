"""DeepSpeed's configuration: a good one to start from, and which of its settings go with our layers.

What is not supported is refused by name, with the reason; nothing that a user sets is ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("Adam", "AdamW")


def default_config(
    *,
    zero_stage: int = 1,
    dtype: str = "float32",
    micro_batch: int = 1,
    accumulation: int = 1,
    clip: float = 1.0,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool = False,
) -> dict[str, Any]:
    """A configuration for ``deepspeed.initialize``.

    Args:
        zero_stage: 0 to 3.
        dtype: of the model, "float32" or "bfloat16"; what the optimizer steps is float32 either way.
        micro_batch: samples a rank and forward.
        accumulation: forwards a step.
        clip: the gradient's norm over the whole model is cut to this; 0 = not at all.
        fused: DeepSpeed's fused Adam, a GPU kernel that is compiled on first use; otherwise torch's.

    Raises:
        ValueError: a value outside its range.
    """
    if zero_stage not in range(4):
        raise ValueError(f"zero_stage={zero_stage}: choose 0, 1, 2 or 3")
    if dtype not in DTYPES:
        raise ValueError(f'dtype="{dtype}": choose one of {DTYPES}')
    for name, value in {"micro_batch": micro_batch, "accumulation": accumulation}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: choose at least 1")
    if clip < 0:
        raise ValueError(f"clip={clip}: choose a positive norm, or 0 for none")
    adam = {"lr": lr, "betas": list(betas), "eps": eps, "weight_decay": weight_decay, "torch_adam": not fused}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": None,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        if zero_stage:
            # at ZeRO-0 the engine refuses this, and accumulates in bfloat16
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


_ELSEWHERE = "gatewright's layer lays out experts over data-parallel ranks only"
# section or setting -> why not; a dotted name goes into sections
_REFUSED = {
    "fp16": "its unfused optimizer leaves experts out of the norm (deepspeed#8613), and routers need bfloat16's range; "
    "use bf16",
    "torch_autocast": "weights and checkpoints are laid out for bf16; use bf16",
    "amp": "apex replaces the optimizer that checkpoints read; use bf16",
    "expert_parallel": "it converts transformers blocks; the layer is expert-parallel by ExpertParallel.create(size)",
    "tensor_parallel": _ELSEWHERE,
    "sequence_parallel_size": _ELSEWHERE,
    "pipeline": _ELSEWHERE,
    "use_data_before_expert_parallelism": "ExpertParallel gives neighbouring ranks one group",
    "compression_training": "checkpoints do not hold its state",
    "data_efficiency": "checkpoints do not hold its state",
    "curriculum_learning": "checkpoints do not hold its state",
    "progressive_layer_drop": "a dropped layer would leave ranks waiting for its exchange",
    "eigenvalue": "checkpoints do not hold its state",
    "hybrid_engine": "it replaces modules",
    "sparse_gradients": "experts' gradients are dense",
    "compile": "DeepCompile rewrites what ZeRO's hooks do around the layer",
    "checkpoint.load_universal": "it leaves out buffers, which are the routers' state, and counts Adam's step wrongly "
    "at ZeRO-3; save_checkpoint and load_checkpoint of gatewright.moe.hosts.deepspeed fit every layout",
    "data_types.param_dtype": "the model's type follows bf16",
    "data_types.buffer_dtype": "a router's state would stand still in bfloat16",
    "bf16.bf16_master_weights_and_grads": "what the optimizer steps, and the average of it, is float32",
    "bf16.bf16_optimizer_states": "what the optimizer steps, and the average of it, is float32",
    "zero_optimization.offload_optimizer": "checkpoints and averages read the optimizer's state where it is stepped",
    "zero_optimization.offload_param": "checkpoints and averages read the weights where they are stepped",
    "zero_optimization.zenflow": "it steps parts of the weights at other times",
    "zero_optimization.round_robin_gradients": "with it, DeepSpeed 0.19.8 takes parts of other weights for a weight's "
    "float32 values (_link_all_hp_params), and checkpoints would too",
    "zero_optimization.stage3_module_granularity_threshold": "it chooses ZeRO-3's leaves anew; the layer has to be one",
    "zero_optimization.zero_hpz_partition_size": "DeepSpeed refuses hpZeRO with experts at ZeRO-3",
    "zero_optimization.mics_shard_size": "MiCS makes groups that leave experts out",
    "zero_optimization.zero_quantized_weights": "not exact, and DeepSpeed has it for dense groups only",
    "zero_optimization.zero_quantized_nontrainable_weights": "not exact, and DeepSpeed has it for dense groups only",
    "zero_optimization.zero_quantized_gradients": "DeepSpeed refuses it with experts at ZeRO-3",
    "zero_optimization.elastic_checkpoint": "it merges experts of different ranks as one",
    "zero_optimization.legacy_stage1": "DeepSpeed has removed it",
    "zero_optimization.super_offload": "checkpoints and averages read the optimizer's state where it is stepped",
}
# values with which a refused setting is off
_OFF = (None, False, 0, 1, -1, "none", {}, [])
_REQUIRED_TRUE = {
    "managed_gradient_accumulation": "a checkpoint has to know where a step ends",
    "zero_optimization.contiguous_gradients": "ZeRO-1 and 2 reduce experts' gradients only with it",
    "zero_optimization.reduce_scatter": "ZeRO-1 and 2 reduce experts' gradients only with it",
    "zero_optimization.compute_grad_norm": "the gradient's norm is reported and clipped by",
}


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """Checks a configuration for ``deepspeed.initialize``; returns it as it is.

    Raises:
        ValueError: a setting that does not go with our layers, and why.
    """
    if not isinstance(config, dict):
        raise ValueError(f"a DeepSpeed configuration is a dictionary: got {type(config).__name__}")
    for setting, reason in _REFUSED.items():
        value = _value(config, setting)
        if not _is_off(value):
            raise ValueError(
                f"DeepSpeed configuration: {setting}={json.dumps(value, default=repr)} is not supported: {reason}"
            )
    for setting, reason in _REQUIRED_TRUE.items():
        if _value(config, setting) is False:
            raise ValueError(f"DeepSpeed configuration: {setting}=false is not supported: {reason}; remove it")
    stage = _value(config, "zero_optimization.stage")
    if stage not in (None, 0, 1, 2, 3):
        raise ValueError(f"DeepSpeed configuration: zero_optimization.stage={stage}: choose 0, 1, 2 or 3")
    optimizer = config.get("optimizer")
    if optimizer is not None and str(optimizer.get("type", "")).lower() not in [name.lower() for name in OPTIMIZERS]:
        raise ValueError(
            f"DeepSpeed configuration: optimizer.type={optimizer.get('type')!r}: choose one of {OPTIMIZERS}, whose "
            "state checkpoints and averages are written for"
        )
    return config


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads and checks a configuration file.

    Raises:
        ValueError: no such file, no JSON, or a setting that does not go with our layers.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"DeepSpeed configuration {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"DeepSpeed configuration {path} is not JSON: {error}") from None
    return check_config(config)


def _value(config: dict[str, Any], setting: str) -> Any:
    value: Any = config
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        if "enabled" in value:
            return not value["enabled"]
        if "device" in value:
            return value["device"] in (None, "none")
    return value is not True and value in _OFF
