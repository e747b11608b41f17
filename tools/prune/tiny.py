"""Tiny random models of transformers' MoE families, made from any family's configuration class by shrinking its sizes.

Nothing of a family is listed here but what its configuration cannot be shrunk without (``_SPECIAL``).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

EXPERTS, LAYERS, HIDDEN, VOCABULARY = 8, 4, 32, 64

_SIZES: dict[str, Any] = {
    # the text model
    **dict.fromkeys(("vocab_size", "text_vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "text_hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    # latent and linear attention, state spaces
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "index_topk": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    "mamba_dt_rank": 4,
    "router_hidden_size": 16,
    "hidden_size_per_layer_input": 0,
    # towers, which text never enters
    **dict.fromkeys(("depth", "encoder_layers", "decoder_layers", "num_layers"), 1),
    **dict.fromkeys(("num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "d_model", "output_dim"), HIDDEN),
}
_KV_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
_HALF_LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
_ONE_DENSE = ["dense"] + ["sparse"] * (LAYERS - 1)
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HALF_LINEAR},
    "beam": {"mlp_layer_types": _ONE_DENSE},
    "deepseek_ocr2_text": {"mlp_layer_types": _ONE_DENSE},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * LAYERS},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN,
    },
    "glm5_next_text": {"mlp_layer_types": _ONE_DENSE, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": _HALF_LINEAR, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HALF_LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ngram_vocab_size_base": 64, "ple_embed_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def config_class(model_type: str) -> type:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The family's configuration with every size small; ``changes`` go to the text configuration."""
    kind = config_class(model_type)
    if not hasattr(kind(), "text_config"):
        return kind(**_shrunk(kind) | changes)
    return kind(**_shrunk(kind, changes))


def _shrunk(kind: type, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    default = kind()
    plain, fields = default.to_dict(), set(inspect.signature(kind).parameters)
    options = {name: value for name, value in _SIZES.items() if name in fields}
    for name in _KV_HEADS:
        count = plain.get(name) if name in fields else None
        if count is not None and count > 1:
            options[name] = 4 if count == plain.get("num_attention_heads") else 2
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if part is not None and name in fields:
            options[name] = _shrunk(type(part)) | ((changes or {}) if name == "text_config" else {})
            options[name]["model_type"] = part.model_type
    return options | _SPECIAL.get(kind.model_type, {})


def model_class(model_type: str) -> type[nn.Module]:
    """The class with a language head, or else the text model."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for mapping in (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES):  # fmt: skip
        name = mapping.get(model_type)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise ValueError(f"transformers has no text model for {model_type}")


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model, the same for the same arguments; norms, biases and correction biases are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_type)(tiny_config(model_type, **changes))
        with torch.no_grad():
            for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
                if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or "bias" in name):
                    tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()
