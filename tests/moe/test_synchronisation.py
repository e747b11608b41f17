"""A layer whose router takes a fixed number of experts never waits for the device, forward or backward.

Tensors on the meta device stand for those on a GPU: the layer takes the path of a GPU (only a CPU is told apart), and
there is no data that anything could wait for. On a GPU, ``gatewright check-gpu`` asserts it of the running kernels.
"""

import contextlib
import dataclasses

import pytest
import torch
from made_up_router import MadeUpRouter
from operations import NoWaiting
from router_cases import CASES, LISTED, resized
from torch import Tensor

from gatewright.kernels.attention import AttentionWeights
from gatewright.moe import DispatchPlan, ExpertParallel, ExpertSpec, FeedForward, MoELayer, dispatch
from gatewright.routers import TokenContext
from gatewright.tools import check_gpu

NAMES = sorted({case.name for case in LISTED})
HOST = ("base",)  # solves an assignment problem on the host


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Autocast knows no meta device, and backends are chosen by device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setenv("GATEWRIGHT_KERNELS", "torch")


def on_meta(value):
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def context_on_meta(context):
    fields = {field.name: on_meta(getattr(context, field.name)) for field in dataclasses.fields(context)}
    attention = context.attention
    if attention is not None:
        names = ("padding_mask", "document", "mask", "v", "w_out")
        fields["attention"] = AttentionWeights(
            on_meta(attention.q), on_meta(attention.k), causal=attention.causal, scale=attention.scale,
            **{name: on_meta(getattr(attention, name)) for name in names},
        )  # fmt: skip
    return dataclasses.replace(context, **fields)


def takes_a_fixed_number(case, context):
    routing = case.create()(case.tokens(context), context)
    return routing.index is not None or routing.dispatch is not None


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HOST])
def test_no_fixed_k_router_waits(name, like_a_gpu):
    checked = 0
    for case in (case for case in CASES if case.name == name):
        mask = torch.ones(3, 10, dtype=torch.bool)
        mask[0, 7:] = mask[2, 1:] = False
        for context in (case.context, resized(case.context, 3, 10, padding_mask=mask)):
            if not takes_a_fixed_number(case, context):
                continue
            spec = ExpertSpec(case.width, 24, bias=True)
            layer = MoELayer(case.create(), spec, shared=FeedForward(spec), allow_noncausal=True).to("meta").train()
            x = torch.empty(context.batch_size, context.length, case.width, device="meta", requires_grad=True)
            there = context_on_meta(context)
            with NoWaiting("meta"):
                y, routing = layer(x, there)
                (y.sum() + routing.loss).backward()
            assert x.grad.shape == x.shape and layer.experts.w1.grad.shape == layer.experts.w1.shape
            checked += 1
    assert checked or not takes_a_fixed_number(case, case.context)


@pytest.mark.parametrize("layout", ["topk", "slots"])
def test_no_kind_of_expert_waits(layout, like_a_gpu):
    spec = ExpertSpec(8, 4)
    layer = MoELayer(MadeUpRouter(dim=8, layout=layout), spec, shared=FeedForward(spec)).to("meta")
    x = torch.empty(3, 7, 8, device="meta", requires_grad=True)
    with NoWaiting("meta"):
        y, routing = layer(x)
        (y.sum() + routing.loss).backward()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_path_of_a_gpu_has_the_same_values(backend, padded, monkeypatch):
    """Assignments to nobody stay in the plan there; here that path runs on a CPU."""
    generator = torch.Generator().manual_seed(0)
    spec = ExpertSpec(8, 4, bias=True)
    layer = MoELayer(MadeUpRouter(dim=8, floor=2.0), spec, shared=FeedForward(spec), backend=backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(3, 7, 8, generator=generator)
    mask = torch.rand(3, 7, generator=generator) < 0.6
    results = []
    for at_hand in (True, False):
        monkeypatch.setattr(dispatch, "counts_are_at_hand", lambda _, answer=at_hand: answer)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        context = TokenContext.for_tokens(x, padding_mask=mask if padded else None)
        y, routing = layer(leaf, context)
        (y * x).sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert (routing.index < 0).any()
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_the_plan_of_a_gpu_keeps_every_assignment(monkeypatch):
    monkeypatch.setattr(dispatch, "counts_are_at_hand", lambda _: False)
    plan = DispatchPlan.build(
        num_rows=4, source=torch.arange(5), expert=torch.tensor([2, -1, 0, -1, 2]), weight=torch.arange(5.0),
        num_experts=3, parallel=ExpertParallel(),
    )  # fmt: skip
    assert plan.source.tolist() == [2, 0, 4, 1, 3] and plan.weight.tolist() == [2, 0, 4, 1, 3]
    assert plan.counts_E.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0), lambda x: x.unique(), lambda x: x.bincount(),
        lambda x: x.repeat_interleave(x), lambda x: torch.equal(x, x), lambda x: torch.where(x > 0),
    ],
)  # fmt: skip
def test_what_waits_is_noticed(wait):
    with NoWaiting("cpu"), pytest.raises(AssertionError):
        wait(torch.tensor([1, 0, 2]))


def test_a_copy_from_the_host_is_noticed():
    with NoWaiting("meta"), pytest.raises(AssertionError):
        torch.ones(3).to("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in check_gpu.checks_of_a_gpu() if "wait" in name or "graph" in name])
def test_on_a_gpu(name):
    """Neither waits under ``set_sync_debug_mode("error")`` nor breaks the capture of a CUDA graph."""
    check_gpu.checks_of_a_gpu()[name](torch.device("cuda"))
