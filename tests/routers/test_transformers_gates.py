"""The gates of transformers' families: given the same weights, our routers return the same ids, weights and gradients.

``FAMILIES`` says which router with which options a family's gate is, as far as its configuration says it.
"""

import importlib

import pytest
import torch

from gatewright.routers import create_router

pytest.importorskip("transformers")
from transformers import CONFIG_MAPPING, AutoConfig

D, E, K, T = 16, 8, 3, 60


def grouped(groups: str):
    """DeepSeek-V2 has groups in its configuration whether or not it chooses by them."""
    return lambda config: getattr(config, groups) if config.topk_method == "group_limited_greedy" else 1


_SOFTMAX = ("topk", {}, {"num_experts": "num_experts", "renormalise": "norm_topk_prob"})
_DEEPSEEK_V3 = (
    "topk",
    {"score": "sigmoid", "group_score": "top2_sum", "bias_rate": 1e-3},
    {
        "num_experts": "num_local_experts",
        "renormalise": "norm_topk_prob",
        "scale": "routed_scaling_factor",
        "num_groups": "n_group",
        "top_groups": "topk_group",
    },
)
# family -> our router, options that all its models share, options as read from its configuration
FAMILIES = {
    "mixtral": ("topk", {"renormalise": True}, {"num_experts": "num_local_experts"}),
    "minimax": ("topk", {"renormalise": True}, {"num_experts": "num_local_experts"}),
    "hunyuan_v1_moe": ("topk", {"renormalise": True}, {"num_experts": "num_experts", "top_k": "moe_topk"}),
    "jamba": ("topk", {}, {"num_experts": "num_experts"}),
    "qwen2_moe": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "olmoe": _SOFTMAX,
    "flex_olmo": _SOFTMAX,
    "granitemoe": ("topk", {"softmax_after": True}, {"num_experts": "num_local_experts"}),
    "gpt_oss": ("topk", {"softmax_after": True, "linear_bias": True}, {"num_experts": "num_local_experts"}),
    "ernie4_5_moe": ("ernie4_5", {}, {"num_experts": "num_experts"}),
    "deepseek_v2": (
        "topk",
        {},
        {
            "num_experts": "n_routed_experts",
            "scale": "routed_scaling_factor",
            "num_groups": grouped("n_group"),
            "top_groups": grouped("topk_group"),
        },
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe": _DEEPSEEK_V3,
    "dots1": _DEEPSEEK_V3,
    "deepseek_v4": (
        "topk",
        {"renormalise": True, "bias_rate": 1e-3},
        {"num_experts": "num_local_experts", "score": "scoring_func", "scale": "routed_scaling_factor"},
    ),
    "minimax_m2": (
        "topk",
        {"score": "sigmoid", "renormalise": True, "bias_rate": 1e-3},
        {"num_experts": "num_local_experts"},
    ),
    "longcat_flash": (
        "longcat",
        {},
        {
            "num_experts": "n_routed_experts",
            "identity_experts": "zero_expert_num",
            "top_k": "moe_topk",
            "scale": "routed_scaling_factor",
        },
    ),
}

# their gate, and models of the family: every branch that its configuration opens
GATES = {
    "mixtral": ("MixtralTopKRouter", [{}]),
    "minimax": ("MiniMaxTopKRouter", [{}]),
    "hunyuan_v1_moe": ("HunYuanMoEV1Gate", [{"moe_topk": K}]),
    "jamba": ("JambaTopKRouter", [{}]),
    "qwen2_moe": ("Qwen2MoeTopKRouter", [{"norm_topk_prob": True}, {"norm_topk_prob": False}]),
    "qwen3_moe": ("Qwen3MoeTopKRouter", [{"norm_topk_prob": True}, {"norm_topk_prob": False}]),
    "olmoe": ("OlmoeTopKRouter", [{"norm_topk_prob": True}, {"norm_topk_prob": False}]),
    "flex_olmo": ("FlexOlmoTopKRouter", [{"norm_topk_prob": True}]),
    "granitemoe": ("GraniteMoeTopKRouter", [{}]),
    "gpt_oss": ("GptOssTopKRouter", [{}]),
    "ernie4_5_moe": ("Ernie4_5_MoeTopKRouter", [{"moe_k": K, "moe_num_experts": E}]),
    "deepseek_v2": (
        "DeepseekV2TopkRouter",
        [
            {"topk_method": "greedy", "routed_scaling_factor": 1.0, "n_group": 4, "topk_group": 2},
            {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "n_group": 4, "topk_group": 2},
        ],
    ),
    "deepseek_v3": (
        "DeepseekV3TopkRouter",
        [
            {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
            {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        ],
    ),
    "glm4_moe": ("Glm4MoeTopkRouter", [{"n_group": 2, "topk_group": 1, "norm_topk_prob": True}]),
    "dots1": ("Dots1TopkRouter", [{"n_group": 2, "topk_group": 2, "norm_topk_prob": True}]),
    "deepseek_v4": ("DeepseekV4TopKRouter", [{"scoring_func": "sqrtsoftplus"}, {"scoring_func": "sigmoid"}]),
    "minimax_m2": ("MiniMaxM2TopKRouter", [{}]),
    "longcat_flash": ("LongcatFlashTopkRouter", [{"zero_expert_num": 4, "moe_topk": K}, {"zero_expert_num": 0}]),
}
MODELS = [(family, fields) for family, (_, models) in GATES.items() for fields in models]


def options_of(family, config):
    """The name and options of our router for a model of the family."""
    name, options, read = FAMILIES[family]
    read = {"dim": "hidden_size", "top_k": "num_experts_per_tok"} | read
    return name, options | {o: at(config) if callable(at) else getattr(config, at) for o, at in read.items()}


def their_gate(family, fields):
    sizes = {"hidden_size": D, "num_experts_per_tok": K, "num_attention_heads": 4}
    sizes[{"longcat_flash": "n_routed_experts"}.get(family, FAMILIES[family][2]["num_experts"])] = E
    if family in ("glm4_moe", "dots1", "deepseek_v3"):  # num_local_experts is another name of it
        sizes["n_routed_experts"] = sizes.pop("num_local_experts")
    config = AutoConfig.for_model(family, **sizes | fields)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    gate = getattr(module, GATES[family][0])(config)
    with torch.no_grad():
        for name, tensor in [*gate.named_parameters(), *gate.named_buffers()]:
            # a correction as large as the differences between scores, so that it decides
            tensor.normal_(std=0.2 if "correction_bias" in name else 0.7)
    return config, gate


@pytest.mark.parametrize("family, fields", MODELS, ids=lambda value: value if isinstance(value, str) else repr(value))
def test_equals_the_gate_of_transformers(family, fields):
    torch.manual_seed(0)
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config, gate = their_gate(family, fields)
    name, options = options_of(family, config)
    router = create_router(name, **options)
    assert router.num_experts == E and router.top_k == K
    state = dict(gate.named_parameters()) | dict(gate.named_buffers())
    weight = next(tensor for key, tensor in state.items() if key.endswith("weight"))
    correction = next((tensor for key, tensor in state.items() if "correction_bias" in key), None)
    x = torch.randn(T, D)
    given = (x,)
    if family == "minimax_m2":  # its block holds the correction
        correction = 0.2 * torch.randn(E)
        given = (x, correction)
    with torch.no_grad():
        router.weight.copy_(weight)
        if correction is not None:
            router.bias.copy_(correction.flatten())
        if family == "gpt_oss":
            router.linear_bias.copy_(gate.bias)

    logits, weights, ids = gate(*given)
    routing = router(x)
    torch.testing.assert_close(routing.logits, logits)
    theirs, ours = ids.sort(1), routing.index.sort(1)
    assert torch.equal(ours.values, theirs.values)
    ours_TK, theirs_TK = routing.weight.gather(1, ours.indices), weights.gather(1, theirs.indices)
    torch.testing.assert_close(ours_TK, theirs_TK, rtol=1e-6, atol=1e-6)
    if correction is not None:
        plain = routing.scores.topk(router.top_k).indices.sort(1).values
        assert not torch.equal(plain, ours.values), "the correction decided nothing here"

    factor = torch.randn(ours_TK.shape)
    (expected,) = torch.autograd.grad((theirs_TK * factor).sum(), weight)
    (actual,) = torch.autograd.grad((ours_TK * factor).sum(), router.weight)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_family_is_compared():
    assert FAMILIES.keys() == GATES.keys()
