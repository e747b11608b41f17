"""What the DeepSpeed host leans on is not public: this says by name what a new version changed."""

import inspect

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import autoep_affine, constants
from deepspeed.module_inject import auto_ep_comm
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from deepspeed_toy import Run

FUNCTIONS = [
    (DeepSpeedEngine, "clip_fp32_gradients", ["self"]),
    (DeepSpeedEngine, "_take_model_step", ["self", "lr_kwargs"]),
    (DeepSpeedEngine, "_configure_optimizer", ["self", "client_optimizer", "model_parameters"]),
    (DeepSpeedEngine, "_configure_fp16_optimizer", ["self", "optimizer", "low_precision_dtype"]),
    (
        DeepSpeedEngine,
        "load_checkpoint",
        [
            "self",
            "load_dir",
            "tag",
            "load_module_strict",
            "load_optimizer_states",
            "load_lr_scheduler_states",
            "load_module_only",
            "custom_load_fn",
        ],
    ),
    (DeepSpeedEngine, "load_universal_checkpoint", ["self"]),
    (DeepSpeedEngine, "get_global_grad_norm", ["self"]),
    (DeepSpeedEngine, "was_step_applied", ["self"]),
    (DeepSpeedEngine, "get_data_types", ["self"]),
    (DeepSpeedEngine, "zero_optimization", ["self"]),
    (DeepSpeedEngine, "zero_optimization_stage", ["self"]),
    (DeepSpeedEngine, "gradient_accumulation_steps", ["self"]),
    (DeepSpeedEngine, "gradient_clipping", ["self"]),
    (DeepSpeedEngine, "fp16_enabled", ["self"]),
    (DeepSpeedEngine, "bfloat16_enabled", ["self"]),
    (
        AutoEPMoELayer,
        "set_deepspeed_parallelism",
        ["self", "use_data_before_expert_parallel_", "folding_group_handles"],
    ),
    (FP16_UnfusedOptimizer, "unscale_and_clip_grads", ["self", "total_norm", "apply_scale"]),
    (DeepSpeedZeroOptimizer, "update_lp_params", ["self"]),
    (BF16_Optimizer, "update_lp_params", ["self"]),
    (DeepSpeedZeroOptimizer_Stage3, "get_param_id", ["self", "param"]),
    # a profiler's decorator hides what it takes: self, sub_group_id
    (DeepSpeedZeroOptimizer_Stage3, "_reassign_or_swap_out_partitioned_parameters", ["args", "kwargs"]),
    (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_prologue", ["self"]),
    (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_epilogue", ["self"]),
    (autoep_affine, "legacy_uniform_autoep_placement_descriptor", ["num_experts", "num_local_experts", "ep_size"]),
    (autoep_affine, "autoep_placement_to_affine_map", ["descriptor", "logical_shape"]),
    (autoep_affine, "autoep_experts_for_rank", ["descriptor", "rank"]),
    (groups, "_get_expert_parallel_group", ["group_name"]),
]

# attributes that a class sets or reads somewhere in its code
ATTRIBUTES = [
    (DeepSpeedEngine, ["micro_steps", "global_steps", "global_samples", "skipped_steps", "lr_scheduler", "_config"]),
    (DeepSpeedEngine, ["_global_grad_norm", "has_moe_layers", "num_experts", "basic_optimizer"]),
    (AutoEPMoELayer, ["ep_size", "ep_rank", "ep_group_name", "ep_group", "num_experts", "num_local_experts"]),
    (AutoEPMoELayer, ["folding_group_handles", "tp_group", "comm_backend", "combine_impl"]),
    (AutoEPMoELayer, ["expert_placement_descriptor"]),
    (FP16_Optimizer, ["fp16_groups", "fp16_groups_flat", "fp32_groups_flat", "_global_grad_norm", "optimizer"]),
    (FP16_UnfusedOptimizer, ["fp16_groups", "fp32_groups", "_global_grad_norm", "optimizer"]),
    (BF16_Optimizer, ["bf16_groups", "fp32_groups_flat_partition", "real_dp_process_group", "optimizer"]),
    (DeepSpeedZeroOptimizer, ["bit16_groups", "single_partition_of_fp32_groups", "real_dp_process_group"]),
    (DeepSpeedZeroOptimizer_Stage3, ["fp16_groups", "fp32_partitioned_groups_flat", "grad_position", "optimizer"]),
]

CONSTANTS = [
    (constants, "DS_AUTOEP_UC_META", "ds_autoep_uc_meta"),
    (constants, "AUTOEP_LAYERS_KEY", "ds_autoep_layers"),
    (auto_ep_comm, "COMM_BACKEND", "comm"),
]


@pytest.mark.parametrize("owner, name, parameters", FUNCTIONS, ids=lambda v: getattr(v, "__name__", None))
def test_functions(owner, name, parameters):
    function = getattr(owner, name, None)
    assert function is not None, f"DeepSpeed {deepspeed.__version__} has no {owner.__name__}.{name} any more"
    found = list(inspect.signature(function).parameters)
    assert found == parameters, (
        f"DeepSpeed {deepspeed.__version__}: {owner.__name__}.{name} takes {found}, the host calls it with {parameters}"
    )


@pytest.mark.parametrize("owner, names", ATTRIBUTES, ids=lambda v: getattr(v, "__name__", None))
def test_attributes(owner, names):
    source = inspect.getsource(owner)
    missing = [name for name in names if f"self.{name}" not in source]
    assert not missing, f"DeepSpeed {deepspeed.__version__}: {owner.__name__} has no {missing} any more"


@pytest.mark.parametrize("owner, name, value", CONSTANTS)
def test_constants(owner, name, value):
    assert getattr(owner, name, None) == value, f"DeepSpeed {deepspeed.__version__}: {owner.__name__}.{name}"


def check_engine(stage, dtype):
    """What a live engine has: the class of its optimizer, and what the shares read."""
    with Run("promoe", stage=stage, ep=2, dtype=dtype) as run:
        engine = run.engine
        assert engine.has_moe_layers and engine.num_experts == [4, 4]
        assert isinstance(engine._config._param_dict, dict)
        expert = engine.module.blocks[0].moe.experts.w1
        if stage in (1, 2):
            fragment = expert._hp_mapping
            assert {"start", "numel"} <= vars(fragment.hp_fragment_address).keys()
            assert {"start", "numel"} <= vars(fragment.lp_fragment_address).keys()
        if stage == 3:
            assert torch.distributed.get_world_size(expert.ds_process_group) == 1
            assert expert.ds_numel == 2 * expert.ds_shape[1:].numel() and expert.ds_tensor.ds_numel == expert.ds_numel
            assert expert.ds_z3_leaf_module is engine.module.blocks[0].moe
        return type(engine.optimizer).__name__


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage, dtype, wrapper",
    [
        (0, "float32", "AdamW"),
        (0, "bfloat16", "FP16_UnfusedOptimizer"),
        (1, "float32", "DeepSpeedZeroOptimizer"),
        (1, "bfloat16", "BF16_Optimizer"),
        (2, "bfloat16", "DeepSpeedZeroOptimizer"),
        (3, "bfloat16", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_a_live_engine(ranks, stage, dtype, wrapper):
    assert ranks(2).run(check_engine, stage, dtype) == [wrapper, wrapper]


def test_no_operator_is_compiled_at_the_start():
    """A start that compiles needs a compiler, and one that is killed meanwhile makes every later one wait for ever."""
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops import __compatible_ops__

    import gatewright.moe.hosts.deepspeed  # noqa: F401

    assert "deepspeed_shm_comm" in __compatible_ops__, "DeepSpeed lists its operators under other names"
    assert build_shm_op() is None
