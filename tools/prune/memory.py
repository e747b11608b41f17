"""What a family's layers do around their experts, where it is not the common shape. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """Paths name attributes of the MoE block (``block.``) or of its decoder layer (``layer.``).

    Attributes:
        stack: only blocks whose names hold this part are pruned; others (a vision tower's) stay as they are.
        residual: what the residual stream h is: the input of the norm before the block ("norm_input"), that norm's
            output ("norm_output"), or what the block itself reads ("block_input").
        norm: the norm's name, for layers that change its output before the block reads it.
        before_factor: what h is multiplied with where r is added to it.
        gate_factors: numbers that the block multiplies its routed output with: part of every gate.
        residual_factors: numbers that the layer multiplies the routed output with.
        projection: the linear layer between the experts' output and the residual stream.
        post_norms: norms that the routed output goes through, alone or with the shared expert's.
        zero_gate_is_none: a pair of gate 0 is a skipped token, not expert 0.
        extra_rows: trailing rows of the router's tensors that are no experts and always stay: a number, or the name of
            the router's attribute that tells it.
        gives_probabilities: the router's first output holds probabilities in the place of logits.
    """

    stack: str = ""
    residual: str = "norm_input"
    norm: str = ""
    before_factor: str = ""
    gate_factors: tuple[str, ...] = ()
    residual_factors: tuple[str, ...] = ()
    projection: str = ""
    post_norms: tuple[str, ...] = ()
    zero_gate_is_none: bool = False
    extra_rows: int | str = 0
    gives_probabilities: bool = False

    def in_stack(self, name: str) -> bool:
        return self.stack in name


MEMORY: dict[str, Memory] = {
    "afmoe": Memory(post_norms=("layer.post_mlp_layernorm",)),
    "axk1": Memory(post_norms=("block.post_mlp_layernorm",)),
    "beam": Memory(gate_factors=("block.routed_scaling_factor",), post_norms=("layer.post_feedforward_layernorm",)),
    "flex_olmo": Memory(residual="block_input", post_norms=("layer.post_feedforward_layernorm",)),
    "gemma4": Memory(
        gives_probabilities=True,
        post_norms=("layer.post_feedforward_layernorm_2", "layer.post_feedforward_layernorm"),
    ),
    "granitemoe": Memory(residual_factors=("layer.residual_multiplier",)),
    "granitemoe_swa": Memory(residual_factors=("layer.residual_multiplier",)),
    "granitemoehybrid": Memory(residual_factors=("layer.residual_multiplier",)),
    "granitemoeshared": Memory(residual_factors=("layer.residual_multiplier",)),
    "inkling_mm_model": Memory(extra_rows="n_shared_experts"),
    "inkling2": Memory(norm="post_attention_layernorm"),
    "kolibri1": Memory(post_norms=("layer.post_mlp_layernorm",)),
    "laguna": Memory(gate_factors=("block.routed_scaling_factor",)),
    "minimax": Memory(
        residual="norm_output",
        before_factor="layer.mlp_alpha_factor",
        residual_factors=("layer.mlp_beta_factor",),
    ),
    "minimax_m3_vl": Memory(gate_factors=("block.routed_scaling_factor",)),
    "muse_spark": Memory(projection="block.post_expert_proj", post_norms=("layer.post_feedforward_layernorm",)),
    "nemotron_h": Memory(projection="block.fc2_latent_proj"),
    "openai_privacy_filter": Memory(gate_factors=("block.num_experts",)),
    "qwen4_exp": Memory(residual="block_input"),
    "zaya": Memory(zero_gate_is_none=True, extra_rows=1),
}


def memory_of(model_type: str) -> Memory:
    """The family's entry, or the common shape's."""
    return MEMORY.get(model_type) or MEMORY.get(model_type.removesuffix("_text")) or Memory()
