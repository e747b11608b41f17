"""Token choice: against loops, and against the routers of transformers."""

import math

import pytest
import torch

from gatewright.routers import TokenContext, create_router

D, E, T = 16, 8, 40


def create(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    router = create_router("topk", **{"dim": D, "num_experts": E, "init_std": 1.0} | options).to(dtype)
    return router, torch.randn(T, D, dtype=dtype)


def by_hand(router, x):
    """One token after the other, in Python. -> ids and weights, sorted by id"""
    o, results = router.options, []
    for token in x:
        logits = (router.weight @ token).double()
        logits = (logits if router.linear_bias is None else logits + router.linear_bias).tolist()
        peak = max(logits)
        total = sum(math.exp(v - peak) for v in logits)
        soft = [math.exp(v - peak) / total for v in logits]
        root = [math.sqrt(math.log1p(math.exp(v))) for v in logits]
        scores = {"softmax": soft, "sigmoid": [1 / (1 + math.exp(-v)) for v in logits], "sqrtsoftplus": root}[
            o["score"]
        ]
        bias = router.bias.tolist() if o["bias_rate"] else [0.0] * E
        choice = [s + b for s, b in zip(scores, bias, strict=True)]
        size = E // o["num_groups"]
        groups = [choice[g * size : (g + 1) * size] for g in range(o["num_groups"])]
        best = 1 if o["group_score"] == "max" else 2
        rank = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-best:]))[: o["top_groups"]]
        chosen = sorted((e for e in range(E) if e // size in rank), key=lambda e: -choice[e])[: o["top_k"]]
        weights = [scores[e] for e in chosen]
        if o["softmax_after"]:
            total = sum(math.exp(logits[e]) for e in chosen)
            weights = [math.exp(logits[e]) / total for e in chosen]
        if o["renormalise"]:
            weights = [w / sum(weights) for w in weights]
        results.append((chosen, [w * o["scale"] for w in weights]))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": E},
        {"renormalise": True},
        {"softmax_after": True, "top_k": 3},
        {"scale": 2.5},
        {"score": "sigmoid"},
        {"score": "sqrtsoftplus", "renormalise": True},
        {"score": "sqrtsoftplus", "top_k": 3, "num_groups": 4, "top_groups": 2, "bias_rate": 0.1},
        {"softmax_after": True, "linear_bias": True},
        {"score": "sigmoid", "renormalise": True, "scale": 2.5, "top_k": 4},
        {"num_groups": 4, "top_groups": 2, "top_k": 3},
        {"num_groups": 2, "top_groups": 1, "group_score": "top2_sum", "top_k": 4},
        {"num_groups": 8, "top_groups": 3, "group_score": "top2_sum", "top_k": 3},
        {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "group_score": "top2_sum", "bias_rate": 0.1},
    ],
    ids=repr,
)
def test_against_one_token_after_the_other(options):
    router, x = create(torch.float64, **options)
    if router.stateful:
        router.bias.copy_(torch.randn(E))
    index, weight = router(x, TokenContext.for_tokens(x)).as_topk()
    for t, (chosen, weights) in enumerate(by_hand(router, x)):
        assert index[t].tolist() == chosen, "the best first"
        assert weight[t].tolist() == pytest.approx(weights, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("renormalise", [True, False])
def test_equals_deepseek_v3_of_transformers(seed, renormalise):
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2,
        norm_topk_prob=renormalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = deepseek.DeepseekV3TopkRouter(config)
    router, x = create(
        seed=seed, top_k=3, score="sigmoid", renormalise=renormalise, scale=2.5, bias_rate=1e-3,
        num_groups=4, top_groups=2, group_score="top2_sum",
    )  # fmt: skip
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
        theirs.e_score_correction_bias.copy_(router.bias.normal_())
    logits, weights, ids = theirs(x)
    routing = router(x)
    torch.testing.assert_close(routing.logits, logits)
    order, index = ids.argsort(1), routing.index.argsort(1)
    assert torch.equal(routing.index.gather(1, index), ids.gather(1, order))
    torch.testing.assert_close(routing.weight.gather(1, index), weights.gather(1, order))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_moe without renormalisation"])
def test_equals_mixtral_and_qwen3_of_transformers(family):
    pytest.importorskip("transformers")
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    renormalise = "without" not in family
    if family == "mixtral":
        theirs = MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=2))
    else:
        config = Qwen3MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=2, norm_topk_prob=renormalise)
        theirs = Qwen3MoeTopKRouter(config)
    router, x = create(renormalise=renormalise)
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
    _, weights, ids = theirs(x)
    routing = router(x)
    assert torch.equal(routing.index, ids)
    torch.testing.assert_close(routing.weight, weights)
    if renormalise:  # softmax after the choice is the same as renormalising
        after, _ = create(softmax_after=True)
        torch.testing.assert_close(after(x).weight, weights)


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 4.0])
def test_capacity_drops_what_does_not_fit(policy, factor):
    router, x = create(capacity_factor=factor, drop_policy=policy, balance_weight=1.0)
    free, _ = create(balance_weight=1.0)
    routing, wanted = router(x), free(x)
    capacity = math.ceil(factor * 2 * T / E)
    assert torch.equal(routing.requested, wanted.index)
    assert torch.equal(routing.load_E(), wanted.load_E().clamp(max=capacity))
    assert torch.equal(routing.requested_E(), wanted.load_E())
    kept = routing.index >= 0
    assert torch.equal(routing.index[kept], wanted.index[kept]) and torch.equal(
        routing.weight[kept], wanted.weight[kept]
    )
    assert (routing.weight[~kept] == 0).all()
    assert torch.equal(routing.losses["balance"], wanted.losses["balance"]), "the loss counts what was asked for"
    for e in range(E):
        asked = [(t, s) for t in range(T) for s in range(2) if wanted.index[t, s] == e]
        if policy == "probability":
            asked.sort(key=lambda pair: -wanted.weight[pair].item())
        assert {pair for pair in asked if kept[pair]} == set(asked[:capacity])


def test_capacity_counts_real_tokens():
    router, x = create(capacity_factor=0.5)
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, T // 2 :] = False
    routing = router(x, TokenContext.for_tokens(x, padding_mask=mask))
    assert routing.load_E().max() == math.ceil(0.5 * 2 * (T // 2) / E)


def test_jitter_is_noise_of_training_on_the_input():
    router, x = create(jitter=0.3)
    context = TokenContext(batch_size=4, length=10, seed=0, step=0, sample_id=torch.arange(4))
    plain, _ = create()
    logits = router(x, context).logits
    noise = context.noise(T, D, distribution="uniform")
    torch.testing.assert_close(logits, plain(x * (0.7 + 0.6 * noise)).logits)
    assert not torch.equal(router(x, context.replace(step=1)).logits, logits)
    router.eval()
    assert torch.equal(router(x, TokenContext.for_tokens(x)).logits, plain(x).logits)


def test_losses_have_their_known_values():
    router, x = create(torch.float64, balance_weight=0.01, z_weight=0.001, top_k=2)
    with torch.no_grad():
        router.weight.zero_()
    losses = router(x).losses
    assert losses["balance"].item() == pytest.approx(0.01, abs=1e-15)  # uniform scores, whoever is chosen
    assert losses["z"].item() == pytest.approx(0.001 * math.log(E) ** 2, abs=1e-15)
    with torch.no_grad():
        router.weight[3] = 100 * x[0]
    one = router(x[:1].expand(6, D))
    assert one.losses["balance"].item() == pytest.approx(
        0.01 * E * 0.5, abs=1e-12
    )  # half of the two choices is expert 3
    assert create()[0](x.float()).losses == {}


def test_bias_moves_towards_balance_and_stays_out_of_the_weight():
    router, x = create(score="sigmoid", bias_rate=0.05, top_k=2)
    plain, _ = create(score="sigmoid", top_k=2)
    assert torch.equal(router(x).weight, plain(x).weight)
    load = router(x).stats["load"]
    assert torch.equal(load, plain(x).load_E())
    router.update({"load": load})
    assert torch.equal(router.bias, 0.05 * (2 * T / E - load).sign())

    router, x = create(score="sigmoid", bias_rate=0.01, top_k=2)
    x = x + 0.5  # a common part, which some experts like and others do not
    spread = router(x).load_E().max() - router(x).load_E().min()
    for _ in range(300):
        router.update(router(x).stats)
    load = router(x).load_E()
    assert load.max() - load.min() < spread / 2
    index, weight = router(x).as_topk()
    assert torch.equal(weight, router(x).logits.sigmoid().gather(1, index)), "weights know nothing of the bias"
    assert "bias" in router.state_dict() and "bias" not in plain.state_dict()


def test_scores_that_all_vanish_stay_finite():
    router, x = create(score="sigmoid", renormalise=True, balance_weight=1.0)
    with torch.no_grad():
        router.weight.copy_(-1e4 * torch.ones(E, D))
    x = x.abs().requires_grad_()
    routing = router(x)
    (routing.weight.sum() + routing.loss).backward()
    assert routing.weight.isfinite().all() and routing.scores.isfinite().all()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def test_switch_is_what_the_paper_says():
    router = create_router("switch", dim=D, num_experts=E)
    expected = {"top_k": 1, "capacity_factor": 1.25, "balance_weight": 0.01, "jitter": 0.01}
    assert {k: router.options[k] for k in expected} == expected
    assert router.requires == ("noise",) and router.eval().requires == ()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "top_k=0 with 8 experts: choose 1 to 8"),
        ({"top_k": 9}, "choose 1 to 8"),
        ({"score": "tanh"}, 'score="tanh"'),
        ({"softmax_after": True, "score": "sigmoid"}, "softmax_after needs"),
        ({"softmax_after": True, "bias_rate": 0.1}, "softmax_after needs"),
        ({"group_score": "sum"}, 'group_score="sum"'),
        ({"num_groups": 3}, "groups must divide 8 experts"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups be 1 to num_groups"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "the 1 best of 4 groups hold 2 experts"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"capacity_factor": 0}, "capacity_factor=0"),
        ({"drop_policy": "last"}, 'drop_policy="last"'),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_logits_come_back_from_their_scores(score):
    """Up to what the choice ignores: a constant a token under softmax."""
    router, x = create(torch.float64, score=score)
    logits = router.logits(x, TokenContext.for_tokens(x))
    again = router.logits_of(router.scores(logits))
    if score == "softmax":
        logits, again = logits.log_softmax(-1), again.log_softmax(-1)
    torch.testing.assert_close(again, logits, rtol=1e-9, atol=1e-9)
    for dtype in (torch.float32, torch.float64):
        far = torch.tensor([[-1e4, 0.0, 1e4], [-200.0, -200.0, -200.0]], dtype=dtype, requires_grad=True)
        scores = router.scores(far)
        assert scores.isfinite().all() and router.logits_of(scores).isfinite().all()
        (grad,) = torch.autograd.grad(scores.sum() + router.logits_of(scores).sum(), far)
        assert grad.isfinite().all(), score


def test_three_steps_make_the_decision():
    router, x = create(score="sigmoid", renormalise=True, bias_rate=0.1)
    context = TokenContext.for_tokens(x)
    logits = router.logits(x, context)
    whole, steps = router(x, context), router.assign(logits, router.scores(logits), context)
    assert torch.equal(whole.index, steps.index) and torch.equal(whole.weight, steps.weight)


def test_presets_of_published_models():
    router = create_router("deepseek_v3", dim=D, num_experts=E, num_groups=4, top_groups=2, top_k=3)
    assert (router.score, router.scale, router.group_score) == ("sigmoid", 2.5, "top2_sum")
    assert router.stateful and router.renormalise
    ernie = create_router("ernie4_5", dim=D, num_experts=E, top_k=6)
    assert (ernie.score, ernie.renormalise, ernie.stateful) == ("softmax", True, True)
