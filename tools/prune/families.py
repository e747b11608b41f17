"""What a model family calls its experts, its counts and its groups, in `config.json` and in its weights' names.

Most of it is the same for all: the synonyms below cover every family of transformers 5.23 that uses its shared experts
interface, and `layout.Layout` finds the experts and the router by the shapes in the headers. An entry in `FAMILIES`
holds what cannot be found that way: the defaults that a `config.json` may leave out, and names that differ. A family
without an entry is served by the synonyms where they fit without doubt, and refused by name where they do not.

Everything here reads `config.json` as a dict: it imports neither torch nor transformers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# One meaning, the names that families give it. All that a configuration holds are changed together.
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)
GROUP_KEYS = ("n_group", "num_expert_group")
TOPK_GROUP_KEYS = ("topk_group",)
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers", "num_mtp_modules")
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# Lists whose entries equal the count and are read beside it (ERNIE's remote code: one capacity a phase).
COUPLED_KEYS = ("moe_capacity",)

ROUTER_MODULES = frozenset({"gate", "router", "moe_statics", "wg"})
SHARED = re.compile(r"share")  # shared_expert, shared_experts, shared_expert_gate, shared_mlp, share_expert


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a family's layers do around their experts in memory, where it is not the common shape.

    Paths name attributes of the MoE block (``block.``) or of its decoder layer (``layer.``).

    Attributes:
        residual: what the residual stream h is: the input of the norm before the block ("norm_input"), that norm's
            output ("norm_output"), or what the block itself reads ("block_input").
        norm: the norm's name, for layers that change its output before the block reads it.
        before_factor: what h is multiplied with where r is added to it.
        gate_factors: numbers that the block multiplies its routed output with: part of every gate.
        residual_factors: numbers that the layer multiplies the routed output with.
        projection: the linear layer between the experts' output and the residual stream.
        post_norms: norms that the routed output goes through, alone or with the shared expert's.
        zero_gate_is_none: a pair of gate 0 is a skipped token, not expert 0.
        gives_probabilities: the router's first output holds probabilities in the place of logits.
    """

    residual: str = "norm_input"
    norm: str = ""
    before_factor: str = ""
    gate_factors: tuple[str, ...] = ()
    residual_factors: tuple[str, ...] = ()
    projection: str = ""
    post_norms: tuple[str, ...] = ()
    zero_gate_is_none: bool = False
    gives_probabilities: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type.

    Attributes:
        model_type: as in `config.json`.
        known: False for a family without an entry, served by the synonyms.
        count_keys, top_k_keys, group_keys, topk_group_keys, mtp_keys: the names in `config.json`.
        top_k, num_groups, topk_group: what the model takes where `config.json` says nothing.
        group_score: how many experts of a group its score adds up: a group must keep that many.
        fused: names below the MoE block, besides `experts.*`, of tensors that hold all experts along axis 0.
        copied: names below the MoE block of modules that belong to neither router nor experts.
        extra_rows: rows behind a router's experts that are none (a shared expert's, a skipped token's) and always
            stay: a number, or the key of config.json that says it.
        memory: what its layers do in memory.
    """

    model_type: str
    known: bool = True
    count_keys: tuple[str, ...] = COUNT_KEYS
    top_k_keys: tuple[str, ...] = TOP_K_KEYS
    group_keys: tuple[str, ...] = GROUP_KEYS
    topk_group_keys: tuple[str, ...] = TOPK_GROUP_KEYS
    mtp_keys: tuple[str, ...] = MTP_KEYS
    top_k: int | None = None
    num_groups: int = 1
    topk_group: int = 1
    group_score: int = 1
    fused: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    extra_rows: int | str = 0
    memory: Memory = Memory()


def _entries() -> Iterator[Family]:
    yield Family(model_type="mixtral", top_k=2)
    yield Family(model_type="qwen2_moe", top_k=4)
    yield Family(model_type="qwen3_moe", top_k=8)
    yield Family(model_type="olmoe", top_k=8)
    yield Family(model_type="deepseek_v2")
    yield Family(model_type="deepseek_v3", top_k=8, num_groups=8, topk_group=4, group_score=2)
    yield Family(model_type="glm4_moe", top_k=8, group_score=2)
    yield Family(model_type="gpt_oss", top_k=4)
    yield Family(model_type="phimoe", top_k=2)
    yield Family(model_type="llama4_text", top_k=1)
    yield Family(model_type="ernie4_5_moe", top_k_keys=("moe_k", "num_experts_per_tok"), top_k=6)
    yield Family(
        model_type="minimax",
        top_k=2,
        memory=Memory(
            residual="norm_output",
            before_factor="layer.mlp_alpha_factor",
            residual_factors=("layer.mlp_beta_factor",),
        ),
    )
    yield Family(model_type="minimax_m2", top_k=8)
    # Fused experts that are no module `experts`.
    for name in ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"):
        yield Family(
            model_type=name,
            top_k=2,
            fused=("input_linear.weight", "output_linear.weight"),
            memory=Memory(residual_factors=("layer.residual_multiplier",)),
        )
    # Modules in or around the experts that belong to none of them, whose width may equal their number.
    yield Family(
        model_type="muse_spark_text",
        group_score=2,
        copied=("experts.post_expert_norm",),
        memory=Memory(projection="block.post_expert_proj", post_norms=("layer.post_feedforward_layernorm",)),
    )
    yield Family(
        model_type="nemotron_h",
        group_score=2,
        copied=("fc1_latent_proj", "fc2_latent_proj"),
        memory=Memory(projection="block.fc2_latent_proj"),
    )
    # Routers that score more than experts: a sink of the shared experts; an expert that does nothing.
    yield Family(model_type="inkling_text", group_score=2, extra_rows="n_shared_experts")
    yield Family(model_type="zaya", top_k=1, extra_rows=1, memory=Memory(zero_gate_is_none=True))
    # Grouped where config.json does not say otherwise.
    for name, memory in (
        ("deepseek_v32", Memory()),
        ("bailing_hybrid", Memory()),
        ("axk1", Memory(post_norms=("block.post_mlp_layernorm",))),
        (
            "beam",
            Memory(gate_factors=("block.routed_scaling_factor",), post_norms=("layer.post_feedforward_layernorm",)),
        ),
    ):
        yield Family(model_type=name, top_k=8, num_groups=8, topk_group=4, group_score=2, memory=memory)
    # On disk the synonyms serve; in memory something stands between the experts and the residual stream.
    for name, memory in (
        ("afmoe", Memory(post_norms=("layer.post_mlp_layernorm",))),
        ("cohere2_moe", Memory(residual_factors=("block.shared_expert_combination_strategy",))),
        ("flex_olmo", Memory(residual="block_input", post_norms=("layer.post_feedforward_layernorm",))),
        (
            "gemma4_text",
            Memory(
                post_norms=("layer.post_feedforward_layernorm_2", "layer.post_feedforward_layernorm"),
                gives_probabilities=True,
            ),
        ),
        ("inkling2_text", Memory(norm="post_attention_layernorm")),
        ("kolibri1", Memory(post_norms=("layer.post_mlp_layernorm",))),
        ("laguna", Memory(gate_factors=("block.routed_scaling_factor",))),
        ("minimax_m3_vl_text", Memory(gate_factors=("block.routed_scaling_factor",))),
        ("openai_privacy_filter", Memory(gate_factors=("block.num_experts",))),
        ("qwen4_exp_text", Memory(residual="block_input")),
    ):
        yield Family(model_type=name, known=False, group_score=2, memory=memory)


FAMILIES: dict[str, Family] = {family.model_type: family for family in _entries()}

# Mixtures of experts that no deletion of experts leaves whole.
REFUSED: dict[str, str] = {
    "deepseek_v4": "its first layers are hash-routed: a table sends each token id to fixed experts",
    "ernie4_5_vl_moe": "its text and vision experts have counts of their own in one list",
    "longcat_flash": "its router also addresses zero-computation experts, which are no rows of the expert bank",
    "dbrx": "its experts are stored as one two-dimensional matrix",
    "jetmoe": "its attention has experts too, chosen by routers of their own",
    "nllb_moe": "its encoder and decoder route with capacities that depend on the count",
    "switch_transformers": "its encoder and decoder route with capacities that depend on the count",
}


def text_config_path(config: Mapping) -> tuple[str, ...]:
    """Where in a configuration the language model's own stands: () for a text model, ("text_config",), ...

    The one object that holds an expert count. An outer object wins over those inside it that say the same.

    Raises:
        ValueError: several objects hold different counts, each a model of its own.
    """
    found = list(_holders(config, ()))
    outermost = [path for path in found if not any(path[: len(other)] == other for other in found if other != path)]
    if len(outermost) > 1:
        places = " and ".join(".".join(path) for path in outermost)
        raise ValueError(
            f'"{config.get("model_type")}" holds several mixtures of experts ({places}): save the one to prune alone'
        )
    if outermost:
        return outermost[0]
    return ("text_config",) if isinstance(config.get("text_config"), Mapping) else ()


def count_places(config: Mapping) -> list[tuple[str, ...]]:
    """Every object of a configuration that says the language model's expert count: all are changed together."""
    outermost = text_config_path(config)
    return [path for path in _holders(config, ()) if path[: len(outermost)] == outermost]


def _holders(config: Mapping, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if any(_is_count(config.get(key)) for key in COUNT_KEYS):
        yield path
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("config") and key != "quantization_config":
            yield from _holders(value, (*path, key))


def _is_count(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_count(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def at(config: Mapping, path: tuple[str, ...]) -> Mapping:
    for key in path:
        config = config[key]
    return config


def text_config(config: Mapping) -> Mapping:
    """The language model's part of a configuration (`text_config_path`)."""
    return at(config, text_config_path(config))


def number(config: Mapping, keys: tuple[str, ...], default: int | None = None) -> int | None:
    """The one value that a configuration gives under several names; a list of equal entries counts as its entry.

    Raises:
        ValueError: two names, or two entries, disagree.
    """
    values = {}
    for key in keys:
        value = config.get(key)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and not isinstance(item, bool):
                values.setdefault(item, key)
    if len(values) > 1:
        said = ", ".join(f"{key} = {config[key]}" for key in dict.fromkeys(values.values()))
        raise ValueError(f"config.json contradicts itself or differs from layer to layer: {said}; one value is needed")
    return next(iter(values), default)


def family_of(config: Mapping) -> Family:
    """The family of a checkpoint, from its `config.json`.

    Raises:
        ValueError: it is dense, hash-routed, or of a kind that cannot be pruned; the message names it and the reason.
    """
    text = text_config(config)
    model_type = text.get("model_type") or config.get("model_type")
    if not model_type:
        raise ValueError("config.json has no model_type: it does not say what model this is")
    for name in (model_type, config.get("model_type")):
        reason = REFUSED.get(str(name).removesuffix("_text"))
        if reason:
            raise ValueError(f'"{name}" cannot be pruned: {reason}')
    if _hash_routed(text):
        raise ValueError(
            f'"{model_type}" cannot be pruned: it has hash-routed layers, where a table sends each token id to fixed '
            "experts"
        )
    if (number(text, COUNT_KEYS) or 0) < 2:
        raise ValueError(
            f'"{model_type}" is dense: config.json holds no number of experts ({", ".join(COUNT_KEYS)}), so there are '
            "none to prune"
        )
    return FAMILIES.get(model_type) or Family(model_type=model_type, known=False, group_score=2)


def _hash_routed(text: Mapping) -> bool:
    kinds = text.get("mlp_layer_types")
    by_kind = isinstance(kinds, list) and any("hash" in str(kind) for kind in kinds)
    return by_kind or bool(text.get("num_hash_layers"))
