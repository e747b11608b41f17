"""DeepSpeed's configuration: ours passes our own check, and what does not go with our layers is refused by name."""

import json

import pytest

from gatewright.moe.hosts.deepspeed_config import check_config, default_config, read_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_passes(stage, dtype):
    config = default_config(zero_stage=stage, dtype=dtype, micro_batch=3, accumulation=2, clip=0.5, lr=1e-3)
    assert check_config(json.loads(json.dumps(config))) == json.loads(json.dumps(config))
    assert config["train_micro_batch_size_per_gpu"] == 3 and config["gradient_accumulation_steps"] == 2
    assert config.get("bf16", {}).get("enabled", False) == (dtype == "bfloat16")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"zero_stage": 4}, "zero_stage=4: choose 0, 1, 2 or 3"),
        ({"dtype": "float16"}, 'dtype="float16": choose one of'),
        ({"micro_batch": 0}, "micro_batch=0: choose at least 1"),
        ({"accumulation": 0}, "accumulation=0: choose at least 1"),
        ({"clip": -1.0}, "clip=-1.0: choose a positive norm"),
    ],
)
def test_bad_values_of_the_default(options, message):
    with pytest.raises(ValueError, match=message):
        default_config(**options)


@pytest.mark.parametrize(
    "config, setting",
    [
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"use_data_before_expert_parallelism": True}, "use_data_before_expert_parallelism"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint"),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients=false"),
        ({"zero_optimization": {"stage": 2, "reduce_scatter": False}}, "reduce_scatter=false"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm=false"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}},
            "stage3_module_granularity_threshold",
        ),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation=false"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage=5: choose 0, 1, 2 or 3"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type='Muon': choose one of"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type='OneBitAdam'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, setting):
    with pytest.raises(ValueError) as caught:
        check_config(config)
    assert setting in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"fp16": {"enabled": False}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": None}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "contiguous_gradients": True}},
        {"optimizer": {"type": "adamw", "params": {"lr": 1e-3}}, "tensorboard": {"enabled": True}},
    ],
)
def test_what_is_off_passes(config):
    assert check_config(config) is config


def test_files(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path / "nowhere.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is a dictionary: got list"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"fp16": {"enabled": true}}')
    with pytest.raises(ValueError, match="fp16"):
        read_config(tmp_path / "config.json")
