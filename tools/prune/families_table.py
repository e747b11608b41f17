"""Which families of transformers were proven on a tiny model, and which are refused with what reason.

``proof.prove`` says what proven means. No torch is imported here.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """What came out for one family.

    Attributes:
        family: its folder in ``transformers.models``.
        model_type: of the configuration that was tried.
        implementations: of the experts, under which logits were equal; empty where it is refused.
        policies: of a grouped router; empty where routers are not grouped.
        refusal: why it cannot be pruned; empty where it is proven.
    """

    family: str
    model_type: str
    implementations: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    refusal: str = ""


def markdown(proofs: Iterable[Proof]) -> str:
    """The proofs as a table."""
    rows = ["| family | pruned = masked, bit for bit, under | grouped router under |", "|---|---|---|"]
    for proof in proofs:
        if proof.refusal:
            rows.append(f"| {proof.family} | refused: {proof.refusal} | |")
        else:
            rows.append(f"| {proof.family} | {', '.join(proof.implementations)} | {', '.join(proof.policies)} |")
    return "\n".join(rows) + "\n"


# Written by `gatewright prune families --prove all --write`.
TRANSFORMERS = "5.23.0"
PROOFS = (
    Proof(
        family="afmoe",
        model_type="afmoe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="aria", model_type="aria", implementations=("eager", "grouped_mm", "batched_mm"), policies=(), refusal=""
    ),
    Proof(
        family="axk1",
        model_type="axk1",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="axk2",
        model_type="axk2",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="bailing_hybrid",
        model_type="bailing_hybrid",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="beam",
        model_type="beam",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="cohere2_moe",
        model_type="cohere2_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="deepseek_ocr2",
        model_type="deepseek_ocr2",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="deepseek_v2",
        model_type="deepseek_v2",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="deepseek_v3",
        model_type="deepseek_v3",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="deepseek_v32",
        model_type="deepseek_v32",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="deepseek_v4",
        model_type="deepseek_v4",
        implementations=(),
        policies=(),
        refusal='"deepseek_v4" cannot be pruned: its first layers are hash-routed: a table sends each token id to fixed experts',
    ),
    Proof(
        family="diffusion_gemma",
        model_type="diffusion_gemma",
        implementations=(),
        policies=(),
        refusal="diffusion_gemma_text: layer 0 has two banks of experts, model.encoder.language_model.layers.0 and model.decoder.layers.0: which of them a plan would mean cannot be told",
    ),
    Proof(
        family="dots1",
        model_type="dots1",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="dots3_note",
        model_type="dots3_note",
        implementations=(),
        policies=(),
        refusal='"dots3_note" holds several mixtures of experts (text_config and vision_config): save the one to prune alone',
    ),
    Proof(
        family="ernie4_5_moe",
        model_type="ernie4_5_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="ernie4_5_vl_moe",
        model_type="ernie4_5_vl_moe",
        implementations=(),
        policies=(),
        refusal='"ernie4_5_vl_moe_text" cannot be pruned: its text and vision experts have counts of their own in one list',
    ),
    Proof(
        family="exaone_moe",
        model_type="exaone_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="flex_olmo",
        model_type="flex_olmo",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="flint",
        model_type="flint",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="gemma4",
        model_type="gemma4",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="glm4_moe",
        model_type="glm4_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="glm4_moe_lite",
        model_type="glm4_moe_lite",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="glm4v_moe",
        model_type="glm4v_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="glm5_next",
        model_type="glm5_next",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="glm_moe_dsa",
        model_type="glm_moe_dsa",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="gpt_oss",
        model_type="gpt_oss",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="granitemoe",
        model_type="granitemoe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="granitemoe_swa",
        model_type="granitemoe_swa",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="granitemoehybrid",
        model_type="granitemoehybrid",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="granitemoeshared",
        model_type="granitemoeshared",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="hunyuan_v1_moe",
        model_type="hunyuan_v1_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="hy_v3",
        model_type="hy_v3",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="hy_v4",
        model_type="hy_v4",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="inkling",
        model_type="inkling_mm_model",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="inkling2",
        model_type="inkling2",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="jamba",
        model_type="jamba",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="kimi_linear",
        model_type="kimi_linear",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="kolibri1",
        model_type="kolibri1",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="laguna",
        model_type="laguna",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="lfm2_moe",
        model_type="lfm2_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(family="llama4", model_type="llama4", implementations=("eager",), policies=(), refusal=""),
    Proof(
        family="mellum",
        model_type="mellum",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="mimo_v2_flash",
        model_type="mimo_v2_flash",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="minimax",
        model_type="minimax",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="minimax_m2",
        model_type="minimax_m2",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="minimax_m3_vl",
        model_type="minimax_m3_vl",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="mistral4",
        model_type="mistral4",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="mistral_large4",
        model_type="mistral_large4",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="mixtral",
        model_type="mixtral",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="muse_spark",
        model_type="muse_spark",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="nemotron_h",
        model_type="nemotron_h",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="olmoe",
        model_type="olmoe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="openai_privacy_filter",
        model_type="openai_privacy_filter",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="phimoe",
        model_type="phimoe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="qwen2_moe",
        model_type="qwen2_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="qwen3_5_moe",
        model_type="qwen3_5_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="qwen3_moe",
        model_type="qwen3_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="qwen3_next",
        model_type="qwen3_next",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="qwen3_omni_moe",
        model_type="qwen3_omni_moe",
        implementations=(),
        policies=(),
        refusal='"qwen3_omni_moe" holds several mixtures of experts (thinker_config.text_config and talker_config.text_config): save the one to prune alone',
    ),
    Proof(
        family="qwen3_vl_moe",
        model_type="qwen3_vl_moe",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="qwen4_exp",
        model_type="qwen4_exp",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=(),
        refusal="",
    ),
    Proof(
        family="solar_open",
        model_type="solar_open",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="unlimited_ocr",
        model_type="unlimited_ocr",
        implementations=("eager", "grouped_mm", "batched_mm"),
        policies=("slice", "slice-equal-groups", "slice-regroup"),
        refusal="",
    ),
    Proof(
        family="zaya", model_type="zaya", implementations=("eager", "grouped_mm", "batched_mm"), policies=(), refusal=""
    ),
)
