"""Statistics that were drawn, not collected: each domain prefers some experts, each demonstration is a noisy sample."""

import numpy as np

from gatewright.tools.prune.statistics import STANDARD, DomainStatistics, Statistics, exponents


def made_up_statistics(
    *,
    domains=("code", "prose"),
    experts=16,
    layers=(0, 1, 2),
    demos=12,
    top_k=2,
    num_groups=1,
    topk_group=1,
    model_type="qwen3_moe",
    seed=0,
    **model,
) -> Statistics:
    draw = np.random.default_rng(seed)
    L = len(layers)
    sizes = model.get("experts_per_layer", [experts] * L)
    held = {}
    for name in domains:
        likely = draw.dirichlet(np.full(experts, 0.4), size=L)
        likely *= np.arange(experts) < np.array(sizes)[:, None]
        likely /= likely.sum(-1, keepdims=True)
        parts = []
        for _ in range(demos):
            n = np.stack([draw.multinomial(200, row) for row in likely]).astype(float)
            g, u, s = draw.random((L, experts)), 1 + draw.random((L, experts)), 0.1 * draw.random((L, experts))
            sums = {key: n * g**a * u**b * s**c for key in STANDARD for a, b, c in [exponents(key)]}
            parts.append(DomainStatistics.of_demo(sums, u * (n > 0), 100))
        held[name] = DomainStatistics.total(parts)
    about = {
        "model_type": model_type,
        "name": "tiny",
        "config_sha256": "c0",
        "header_hash": "h0",
        "num_experts": experts,
        "top_k": top_k,
        "num_groups": num_groups,
        "topk_group": topk_group,
        "layers": list(layers),
    }
    return Statistics(
        model=about | model,
        options={"token_weight": "residual", "per_demo": "sum", "over": "all"},
        domains=held,
        weights={"aimer": 0.5 + draw.random((L, experts)) / 2},
    )
