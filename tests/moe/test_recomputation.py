"""Activation checkpointing: statistics counted once, and the reentrant kind refused. That a recomputation gives the
same output, gradients and state is a check of the kit, which every router meets."""

import pytest
from router_cases import LISTED, Case, assert_same
from torch.utils.checkpoint import checkpoint

from gatewright.moe import ExpertSpec, FeedForward, MoELayer, finish_step

every_router = pytest.mark.parametrize("case", LISTED, ids=repr)


def make(case):
    spec = ExpertSpec(case.width, 8, bias=True)
    return MoELayer(case.create(), spec, shared=FeedForward(spec))


def step(layer, x, context, run):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, routing = run(lambda x: layer(x * 1.5, context), x)
    (y.square().sum() + routing.loss).backward()
    return {"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def test_a_recomputation_is_not_counted():
    case = Case("topk", bias_rate=1e-3)
    plain, again = make(case), make(case)
    for _ in range(2):
        expected = step(plain, case.tokens(), case.context, lambda f, x: f(x))
        actual = step(again, case.tokens(), case.context, lambda f, x: checkpoint(f, x, use_reentrant=False))
        assert_same(actual, expected, "output and gradients")
    assert again._forwards == plain._forwards == 2
    for name, (value, count) in plain._accumulated.items():
        assert_same(again._accumulated[name][0], value, f"statistic {name}")
        assert again._accumulated[name][1] == count == 2
    finish_step(plain)
    finish_step(again)
    assert_same(again.router.state_dict(), plain.router.state_dict(), "state")


@every_router
def test_reentrant_checkpointing_is_refused(case):
    """It returns auxiliary losses without gradient, which nobody would notice."""
    layer = make(case)
    x = case.tokens().requires_grad_()
    y = checkpoint(lambda x: layer(x, case.context)[0], x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing.*use_reentrant=False"):
        y.sum().backward()


def test_evaluation_under_either_kind_is_let_be():
    case = LISTED[0]
    layer = make(case).eval()
    for reentrant in (True, False):
        x = case.tokens().requires_grad_()
        checkpoint(lambda x: layer(x, case.context)[0], x, use_reentrant=reentrant).sum().backward()
        assert x.grad is not None and layer._forwards == 0
