"""Whole layers against the papers' own code: outputs, routing, losses, thresholds and every gradient, to 1e-9 in
float64."""

import pytest
import torch
from golden import assert_equal, assert_expert_gradients, golden_layer, load_golden

from gatewright.moe import finish_step
from gatewright.routers import TokenContext, create_router

backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


def run(layer, case, key="x", **fields):
    x = case[key].clone().requires_grad_()
    y, routing = layer(x, TokenContext.for_tokens(x, **fields))
    return x, y, routing


def set_parameter(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


@backends
@pytest.mark.parametrize("name", ["promoe_token_choice", "promoe_token_choice_top2_softmax"])
def test_promoe_token_choice(name, backend):
    case, meta = load_golden(name)
    router = create_router(
        "promoe",
        dim=int(meta["D"]),
        num_experts=int(meta["E"]),
        top_k=int(meta["K"]),
        gate=meta["gate"],
        temperature=float(meta["tau"]),
    ).double()
    set_parameter(router.prototypes, case["param.cluster_centers"])
    layer = golden_layer(router, case, meta, backend)
    x, y, routing = run(layer, case, null_mask=case["null_mask"].bool())
    assert_equal(y, case["y"], "output")
    assert_equal(routing.losses["routing_contrastive"], case["rcl"], "contrastive loss")

    index, weight = routing.as_topk()
    # pairs of weight 0 mean nothing: the released code repeats the unconditional expert's id there
    shown = weight != 0
    assert torch.equal(shown, case["weights"] != 0)
    assert torch.equal(index[shown], case["experts"][shown])
    assert_equal(weight, case["weights"], "weights")

    (y.square().mean() + routing.loss).backward()
    assert_equal(x.grad, case["grad_x"], "gradient of x")
    assert_equal(router.prototypes.grad, case["grad_prototypes"], "gradient of the prototypes")


@backends
def test_promoe_expert_choice(backend):
    case, meta = load_golden("promoe_expert_choice")
    router = create_router(
        "promoe",
        dim=int(meta["D"]),
        num_experts=int(meta["E"]),
        top_k=int(meta["K"]),
        gate=meta["gate"],
        temperature=float(meta["tau"]),
        selection="expert_choice",
    ).double()
    set_parameter(router.prototypes, case["param.cluster_centers"])
    layer = golden_layer(router, case, meta, backend)
    x, y, routing = run(layer, case, null_mask=case["null_mask"].bool())
    assert_equal(y, case["y"], "output")
    assert_equal(routing.losses["routing_contrastive"], case["rcl"], "contrastive loss")
    (y.square().mean() + routing.loss).backward()
    assert_equal(x.grad, case["grad_x"], "gradient of x")
    assert_equal(router.prototypes.grad, case["grad.cluster_centers"], "gradient of the prototypes")
    assert_expert_gradients(layer, case)


@backends
def test_tcdit_token_choice(backend):
    case, meta = load_golden("tcdit_token_choice")
    router = create_router(
        "topk",
        dim=int(meta["D"]),
        num_experts=int(meta["E"]),
        top_k=int(meta["K"]),
        balance_weight=float(meta["balance_weight"]),
    ).double()
    set_parameter(router.weight, case["param.gate.weight"])
    layer = golden_layer(router, case, meta, backend)
    x, y, routing = run(layer, case)
    assert_equal(y, case["y"], "output")
    assert_equal(routing.losses["balance"], case["aux"], "balance loss")
    (y.square().mean() + routing.loss).backward()
    assert_equal(x.grad, case["grad_x"], "gradient of x")
    assert_equal(router.weight.grad, case["grad.gate.weight"], "gradient of the gate")
    assert_expert_gradients(layer, case)


@backends
def test_ecdit_expert_choice(backend):
    case, meta = load_golden("ecdit_expert_choice")
    router = create_router(
        "expert_choice", dim=int(meta["D"]), num_experts=int(meta["E"]), top_k=float(meta["capacity"])
    ).double()
    set_parameter(router.weight, case["param.gate_weight"])
    layer = golden_layer(router, case, meta, backend)
    x, y, _ = run(layer, case)
    assert_equal(y, case["y"], "output")
    y.square().mean().backward()
    assert_equal(x.grad, case["grad_x"], "gradient of x")
    assert_expert_gradients(layer, case)


@backends
def test_diffmoe_pool(backend):
    case, meta = load_golden("diffmoe_pool")
    router = create_router(
        "diffmoe",
        dim=int(meta["D"]),
        num_experts=int(meta["E"]),
        top_k=float(meta["capacity"]),
        threshold_decay=float(meta["threshold_decay"]),
    ).double()
    set_parameter(router.weight, case["param.gate_weight"])
    for name, parameter in router.predictor.named_parameters():
        set_parameter(parameter, case[f"param.capacity_predictor.{name}"])
    layer = golden_layer(router, case, meta, backend)
    x, y, routing = run(layer, case)
    assert_equal(y, case["y"], "output")
    assert_equal(routing.prediction, case["capacity_logits"], "capacity prediction")
    assert_equal(routing.losses["capacity"], case["capacity_loss"], "capacity loss")
    chosen = torch.zeros(len(routing.scores), router.bank_size, dtype=torch.float64)
    token, expert, _ = routing.as_list()
    chosen[token, expert] = 1
    assert_equal(chosen, case["chosen"], "choice")

    (y.square().mean() + routing.loss).backward()
    assert_equal(x.grad, case["grad_x"], "gradient of x")
    assert_equal(router.weight.grad, case["grad.gate_weight"], "gradient of the gate")
    for name, parameter in router.predictor.named_parameters():
        assert_equal(parameter.grad, case[f"grad.capacity_predictor.{name}"], f"gradient of predictor {name}")
    assert_expert_gradients(layer, case)

    finish_step(layer)
    assert_equal(router.threshold, case["param.expert_threshold"], "threshold after the step")
    layer.eval()
    with torch.no_grad():
        y_eval, _ = layer(case["x_eval"])
    assert_equal(y_eval, case["y_eval"], "inference")
