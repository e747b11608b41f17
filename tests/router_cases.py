"""Every listed router by its own example, and options that change how one decides: what the router tests run over."""

import torch
from torch import Tensor

from gatewright.kernels.attention import AttentionWeights
from gatewright.routers import Router, Routing, TokenContext, create_router, list_routers, router_class

VARIANTS = {
    "topk": [
        {"top_k": 1, "renormalise": True},
        {"top_k": 4},
        {"softmax_after": True},
        {"score": "sigmoid", "renormalise": True, "scale": 2.5, "bias_rate": 1e-3, "num_groups": 2, "z_weight": 1e-3},
        {"score": "sigmoid", "balance_weight": 0.1},
        {"capacity_factor": 0.75, "balance_weight": 0.1, "z_weight": 0.1},
        {"capacity_factor": 0.75, "drop_policy": "probability", "jitter": 0.1},
        {"capacity_factor": 0.75, "drop_policy": "choice"},
        {"num_experts": 1, "top_k": 1, "balance_weight": 0.1},
    ],
    "promoe": [
        {"gate": "softmax", "top_k": 3},
        {"gate": "sigmoid", "top_k": 4, "unconditional": False},
        {"selection": "expert_choice"},
        {"selection": "expert_choice", "gate": "softmax", "top_k": 2},
        {"num_experts": 1},
    ],
    "expert_choice": [{"pool": "batch", "top_k": 1.5}, {"top_k": 4.0}, {"num_experts": 1, "top_k": 1.0}],
    "diffmoe": [{"inference": "token", "top_k": 0.75}, {"num_experts": 1, "top_k": 1.0}],
    "race": [
        {"gate": "softmax", "top_k": 1.5},
        {"gate": "sigmoid", "prediction_dim": 3, "similarity_weight": 0.5},
        {"num_experts": 1, "top_k": 1.0},
    ],
    "segment": [
        {"top_k": 2, "segment_size": 4},
        {"top_k": 2, "segment_size": 1},
        {"top_k": 2, "shifted": True, "temperature": 0.5},
        {"dropout": 0.3, "segment_size": 20},
        {"num_experts": 1},
    ],
    "centroid": [{"mode": "nearest", "top_k": 3}, {"num_experts": 1, "top_k": 1}],
    "openmoe": [
        {"group_size": 5, "min_capacity": 1, "jitter": 0.1},
        {"capacity": "colossalai", "train_capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 1},
        {"capacity": None, "group_size": 5, "top_k": 3},
        {"top_k": 1, "train_capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 1},
        {"num_experts": 1, "top_k": 1, "eval_capacity_factor": 0.5, "min_capacity": 1},
    ],
    "hash": [
        {"top_k": 1, "seed": 3},
        {"kind": "balanced", "frequencies": list(range(16, 0, -1))},
        {"num_experts": 1, "top_k": 1},
    ],
    "noisy_topk": [
        {"form": "vmoe", "noise_std": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"noise_std": 0.0, "load_weight": 0.0},
        {"form": "vmoe", "num_experts": 1, "top_k": 1},
    ],
    "cosine": [
        {"renormalise": True, "balance_weight": 0.1, "projection_dim": 3},
        {"top_k": 1, "temperature": 0.05},
        {"num_experts": 1, "top_k": 1, "balance_weight": 0.1},
    ],
    "longcat": [
        {"top_k": 4, "real_experts": 1.5, "identity_experts": 3},
        {"bias_rate": 0.0},
        {"identity_experts": 0},
        {"num_experts": 1, "top_k": 2},
    ],
    "quantile": [
        {"top_k": 1},
        {"score": "sigmoid", "scale": 2.5, "ema": 0.9, "top_k": 3},
        {"score": "sqrtsoftplus", "top_k": 4},
        {"softmax_after": False},
        {"num_experts": 1, "top_k": 1},
    ],
    "moe_plus_plus": [
        {"residual": True, "gate": "mlp"},
        {"capacity_factor": 0.6, "top_k": 3},
        {"capacity_factor": 0.6, "drop_policy": "probability", "tau": 0.25, "balance_weight": 0.0},
        {"constant_experts": 0, "zero_experts": 3, "top_k": 1},
        {"num_experts": 1, "top_k": 3, "copy_experts": 0},
    ],
    "soft_moe": [{"slots": 1, "normalise": False}, {"num_experts": 1, "slots": 3}],
    "densemixer": [{"renormalise": True, "balance_weight": 0.1}, {"top_k": 4}, {"num_experts": 1, "top_k": 1}],
    "remoe": [{"top_k": 1.5, "coefficient": 0.1}, {"num_experts": 1, "top_k": 0.5, "coefficient": 0.1}],
    "aoe": [
        {"renormalise": False, "balance_weight": 0.1, "rank": None},
        {"top_k": 1, "renormalise": False},
        {"num_experts": 1, "top_k": 1},
    ],
    "sparsemixer": [{"jitter": 0.1, "balance_weight": 0.1}, {"num_experts": 2, "jitter": 1.0}],
    "similarity_aware": [
        {"causal": True, "similarity": "lowrank", "rank": 3, "learn_temperature": True, "blend": 0.7},
        {"similarity": "full", "base_options": {"softmax_after": True, "z_weight": 0.1, "balance_weight": 0.1}},
        {"base": "deepseek_v3", "base_options": {"z_weight": 0.1}, "temperature": 8.0},
        {"causal": True, "base": "switch", "similarity": "full"},
        {"num_experts": 1, "top_k": 1, "base_options": {"balance_weight": 0.1}},
    ],
    "union": [
        {"choice": "per_token", "gate": "weighted", "top_k": 3},
        {"choice": "per_token", "patch": 3},
        {"choice": "expert", "length": 40},
        {"gate": "weighted", "quota": "max", "patch": 2},
        {"quota": "max_60", "top_k": 1},
        {"gate": "faithful"},
        {"num_experts": 1, "top_k": 1},
    ],
    "sinkhorn": [{"top_k": 2}, {"top_k": 4}, {"num_experts": 1, "top_k": 1}],
    "base": [{"copy": False}, {"num_experts": 5}, {"num_experts": 1}],
    "attention_aware": [
        {"causal": True, "combine": "posterior", "blend": 0.7},
        {"combine": "posterior", "base_options": {"softmax_after": True, "z_weight": 0.1, "balance_weight": 0.1}},
        {"causal": True, "combine": "learned", "num_heads": 2, "base": "deepseek_v3"},
        {"base": "switch", "top_k": 2},
        {"num_experts": 1, "top_k": 1, "base_options": {"balance_weight": 0.1}},
    ],
}


def attention_of(context: TokenContext, *, causal: bool) -> AttentionWeights:
    """An attention of two heads over the context's tokens, the same at the same place of a sample, however many tokens
    and samples follow."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 8, 2, 64, 8, generator=generator, dtype=torch.float64)
    q, k, v = qkv[:, : context.batch_size, :, : context.length]
    w_out = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    return AttentionWeights(q, k, causal=causal, padding_mask=context.padding_mask, v=v, w_out=w_out)


class Case:
    """A router's name with options, and the context of its example."""

    def __init__(self, name: str, **options) -> None:
        cls, preset = router_class(name)
        example, self.context = cls.example()
        self.name = name
        # what a preset sets is what makes it that strategy
        self.options = {k: v for k, v in example.items() if k not in preset} | options
        self.width = example["dim"]
        if self.context.attention is not None:
            attention = attention_of(self.context, causal=self.options.get("causal", False))
            self.context = self.context.replace(attention=attention)

    def __repr__(self) -> str:
        example = router_class(self.name)[0].example()[0]
        changed = [f"{k}={v}" for k, v in self.options.items() if example.get(k) != v]
        return "-".join([self.name, *changed])

    def create(self, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Router:
        torch.manual_seed(seed)
        router = create_router(self.name, **self.options | options)
        with torch.no_grad():
            for parameter in router.parameters():  # so large that no two experts are nearly equal
                parameter.normal_()
        return router.to(dtype)

    def tokens(self, context: TokenContext | None = None, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        count = (context or self.context).num_tokens
        return torch.randn(count, self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
            dtype
        )


LISTED = [Case(name) for name in list_routers()]
CASES = LISTED + [Case(name, **options) for name, several in VARIANTS.items() for options in several]


def resized(context: TokenContext, batch_size: int, length: int, **fields) -> TokenContext:
    """The context for other shapes: samples are repeated, per-token fields but ids and logits are dropped."""
    which = torch.arange(batch_size) % max(context.batch_size, 1)
    null_mask = None if context.null_mask is None else context.null_mask[which]
    fields = {"null_mask": null_mask, "seed": 0, "step": 0, "sample_id": torch.arange(batch_size)} | fields
    for name in ("token_ids", "modality"):  # the same at the same place of a sample, however many follow
        if (ids_BL := getattr(context, name)) is not None and name not in fields:
            fields[name] = ids_BL[which][:, torch.arange(length) % context.length]
    if context.previous_logits is not None and "previous_logits" not in fields:
        logits_BLE = context.previous_logits.unflatten(0, (context.batch_size, context.length))
        fields["previous_logits"] = logits_BLE[which][:, torch.arange(length) % context.length].flatten(0, 1)
    resized = TokenContext(batch_size=batch_size, length=length, **fields)
    if context.attention is None or "attention" in fields:
        return resized
    return resized.replace(attention=attention_of(resized, causal=context.attention.causal))


def dense(routing: Routing) -> Tensor:
    """The weights [T, E], NaN where there is no assignment, so that a pair of weight 0 still differs from none."""
    token, expert, weight = routing.as_list()
    return weight.new_full((routing.num_tokens, routing.bank_size), torch.nan).index_put((token, expert), weight)


def assert_same(actual, expected, what: str, tolerance: float = 1e-6) -> None:
    """Equal up to ``tolerance``, NaN equal to NaN; dictionaries by key."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), what
        for key in expected:
            assert_same(actual[key], expected[key], f"{what} {key}", tolerance)
    elif expected is not None:
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda message: f"{what}: {message}"
        )
