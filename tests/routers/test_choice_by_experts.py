"""Routers in which experts or pairs are chosen: expert choice, DiffMoE and Expert Race."""

import pytest
import torch
import torch.nn.functional as F

from gatewright.routers import TokenContext, create_router
from gatewright.routers.losses import similarity_loss

D, E, B, L = 16, 4, 3, 10
T = B * L
CONTEXT = TokenContext(batch_size=B, length=L)


def create(name, **options):
    torch.manual_seed(0)
    router = create_router(name, **{"dim": D, "num_experts": E} | options).double()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0, 0.5)
    return router, torch.randn(T, D, dtype=torch.float64)


def mask_of(routing):
    token, expert, _ = routing.as_list()
    return torch.zeros(routing.num_tokens, routing.bank_size, dtype=torch.bool).index_put(
        (token, expert), torch.tensor(True)
    )


def top(scores, k):
    """The k highest of each column."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for e in range(scores.shape[1]):
        chosen[scores[:, e].topk(int(k[e] if isinstance(k, torch.Tensor) else k)).indices, e] = True
    return chosen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [0.1, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("pool", ["sample", "batch"])
def test_expert_choice_takes_exactly_k_of_each_group(pool, top_k, training):
    router, x = create("expert_choice", pool=pool, top_k=top_k)
    routing = router.train(training)(x, CONTEXT)
    size = L if pool == "sample" else T
    k = max(1, min(int(size / E * top_k), size))
    scores = F.linear(x, router.weight).softmax(1)
    expected = torch.cat([top(group, k) for group in scores.split(size)])
    assert torch.equal(mask_of(routing), expected)
    token, expert, weight = routing.as_list()
    torch.testing.assert_close(weight, scores[token, expert])
    assert routing.load_E().tolist() == [k * (T // size)] * E and routing.losses == {}
    assert router.batch_independent == (pool == "sample") and not router.causal


@pytest.mark.parametrize("top_k", [0.01, 0.75, 1.0, 2.0])
def test_diffmoe_trains_on_exactly_k_of_the_pool(top_k):
    router, x = create("diffmoe", top_k=top_k, predictor_weight=0.5)
    routing = router(x, CONTEXT)
    k = max(1, int(T / E * top_k))
    scores = F.linear(x, router.weight).softmax(1)
    taken = top(scores, k)
    assert torch.equal(mask_of(routing), taken) and routing.load_E().tolist() == [k] * E
    token, expert, weight = routing.as_list()
    torch.testing.assert_close(weight, scores[token, expert])
    prediction = router.predictor(x)
    torch.testing.assert_close(routing.prediction, prediction)
    expected = 0.5 * F.binary_cross_entropy_with_logits(prediction, taken.double())
    torch.testing.assert_close(routing.losses["capacity"], expected)


def test_diffmoe_predictor_does_not_reach_the_tokens():
    router, x = create("diffmoe")
    x.requires_grad_()
    router(x, CONTEXT).losses["capacity"].backward()
    assert x.grad is None and router.weight.grad is None
    assert all(p.grad.abs().sum() > 0 for p in router.predictor.parameters())


def test_diffmoe_thresholds_move_by_a_twentieth_to_the_kth_prediction():
    router, x = create("diffmoe")
    k = T // E
    expected = torch.zeros(E, dtype=torch.float64)
    for step in range(3):
        tokens = x * (1 + step)
        kth = router.predictor(tokens).sigmoid().topk(k, dim=0).values[-1].detach()
        expected = 0.95 * expected + 0.05 * kth
        router.update(router(tokens, CONTEXT).stats)
        torch.testing.assert_close(router.threshold, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("inference", ["pool", "token"])
def test_diffmoe_inference(inference):
    router, x = create("diffmoe", inference=inference)
    with torch.no_grad():
        router.threshold.copy_(torch.tensor([0.3, 0.5, 0.6, 1.0]))
    routing = router.eval()(x, CONTEXT)
    passed = router.predictor(x).sigmoid() > router.threshold
    scores = F.linear(x, router.weight).softmax(1)
    expected = passed if inference == "token" else top(scores, passed.sum(0))
    assert torch.equal(mask_of(routing), expected)
    assert routing.load_E().tolist() == passed.sum(0).tolist() and routing.load_E()[3] == 0
    assert routing.losses == {} and routing.stats == {}


def test_diffmoe_token_inference_does_not_see_the_batch_and_pool_does():
    for inference, independent in (("token", True), ("pool", False)):
        router, x = create("diffmoe", inference=inference)
        with torch.no_grad():
            router.threshold.fill_(0.5)
        router.eval()
        whole = mask_of(router(x, CONTEXT))
        alone = torch.cat([mask_of(router(part, TokenContext(batch_size=1, length=L))) for part in x.split(L)])
        assert torch.equal(whole, alone) == independent == router.batch_independent


def test_diffmoe_capacity_at_inference_follows_training():
    """After training, each expert takes about as many tokens at inference as in training: capacity 1 within a tenth."""
    torch.manual_seed(0)
    router = create_router("diffmoe", dim=D, num_experts=E, init_std=0.3)
    optimizer = torch.optim.Adam(router.predictor.parameters(), lr=1e-2)
    context = TokenContext(batch_size=8, length=64)
    for _ in range(150):
        routing = router(torch.randn(512, D), context)
        optimizer.zero_grad()
        routing.loss.backward()
        optimizer.step()
        router.update(routing.stats)
    router.eval()
    loads = sum(router(torch.randn(512, D), context).load_E() for _ in range(8))
    assert abs(loads.sum() / (8 * 512) - 1) < 0.1


@pytest.mark.parametrize("gate", ["identity", "sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [0.5, 1.0, 2.0, 4.0])
def test_race_has_exactly_its_budget_of_winners(gate, top_k):
    router, x = create("race", gate=gate, top_k=top_k, similarity_weight=0.1)
    routing = router(x, CONTEXT)
    logits = router.out(F.gelu(router.hidden(x)))
    gates = {"identity": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(1)}[gate]
    budget = int(top_k * T)
    best = gates.flatten().topk(budget)
    won = torch.zeros(T * E, dtype=torch.bool).index_fill(0, best.indices, True).view(T, E)
    assert torch.equal(mask_of(routing), won) and routing.load_E().sum() == budget
    token, expert, weight = routing.as_list()
    torch.testing.assert_close(weight, gates[token, expert])
    assert routing.stats["cut"] == best.values[-1] and routing.stats["pools"] == 1
    torch.testing.assert_close(routing.losses["similarity"], 0.1 * similarity_loss(logits.softmax(1), won))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_race_keeps_its_budget_when_all_are_equal(value):
    router, x = create("race")
    with torch.no_grad():
        router.out.weight.zero_()
        router.out.bias.fill_(value)
    routing = router(x, CONTEXT)
    assert routing.load_E().sum() == T
    assert routing.as_list()[0].max() == T // E, "ties go to the earlier pair"


def test_race_threshold_is_the_running_cut_and_decides_at_inference():
    router, x = create("race", threshold_decay=0.9)
    expected = 0.0
    for step in range(3):
        stats = router(x * (1 + step), CONTEXT).stats
        expected = 0.9 * expected + 0.1 * stats["cut"].item()
        router.update(stats)
        assert router.threshold.item() == pytest.approx(expected, rel=1e-12)
    router.eval()
    routing = router(x, CONTEXT)
    assert torch.equal(mask_of(routing), routing.logits >= router.threshold) and routing.losses == {}
    alone = torch.cat([mask_of(router(part, TokenContext(batch_size=1, length=L))) for part in x.split(L)])
    assert torch.equal(alone, mask_of(routing))


def test_race_has_a_head_for_the_recipes_regulariser():
    router, x = create("race", prediction_dim=5)
    prediction = router(x, CONTEXT).prediction
    torch.testing.assert_close(prediction, router.head(F.gelu(router.hidden(x))))
    prediction.sum().backward()
    assert router.hidden.weight.grad.abs().sum() > 0
    assert create("race")[0](x, CONTEXT).prediction is None


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("expert_choice", {"top_k": 0}, "choose above 0, at most 4"),
        ("expert_choice", {"pool": "rank"}, 'pool="rank"'),
        ("diffmoe", {"top_k": 5}, "choose above 0, at most 4"),
        ("diffmoe", {"threshold_decay": 1}, "threshold_decay=1"),
        ("diffmoe", {"inference": "both"}, 'inference="both"'),
        ("race", {"top_k": -1}, "choose above 0"),
        ("race", {"gate": "tanh"}, 'gate="tanh"'),
        ("race", {"threshold_decay": -0.1}, "threshold_decay=-0.1"),
        ("race", {"prediction_dim": 0}, "prediction_dim=0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options)
