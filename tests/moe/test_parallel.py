"""Expert parallelism in plain PyTorch: training on several ranks follows one process that sees the same batches."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from distributed import ranks  # noqa: F401  a fixture
from made_up_router import Counting, MadeUpRouter
from operations import NoWaiting
from router_cases import LISTED, Case, assert_same, resized
from torch import nn
from torch.utils.checkpoint import checkpoint

from gatewright.moe import ExpertParallel, ExpertSpec, FeedForward, MoELayer, dispatch, finish_step
from gatewright.moe.parallel import (
    Exchange,
    check_divides_world,
    clip_gradients,
    grad_norm,
    is_expert_parameter,
    sync_gradients,
)
from gatewright.routers import TokenContext

D64 = torch.float64
MICRO_BATCHES, BATCH, LENGTH, STEPS = 4, 3, 6, 2
CASES = [
    *LISTED,
    Case("topk", score="sigmoid", bias_rate=0.05, renormalise=True),
    Case("promoe", selection="expert_choice"),
    Case("diffmoe", inference="token"),
]
LAYOUTS = [f"made-up {layout}" for layout in ("topk", "list", "rows", "slots")]
NAMES = [repr(case) for case in CASES] + LAYOUTS


class Toy(nn.Module):
    """Two layers, so that the exchanges of one must not meet those of the other."""

    def __init__(self, name, parallel):
        super().__init__()
        self.case = next((case for case in CASES if repr(case) == name), None)
        width = 6 if self.case is None else self.case.width
        spec = ExpertSpec(width, 5, bias=True)

        def router(number):
            if self.case is None:
                kinds = ("routed", "local", "routed", "copy", "routed", "constant", "routed", "zero")
                return MadeUpRouter(dim=width, kinds=kinds, layout=name.removeprefix("made-up "))
            return self.case.create(seed=number)

        self.width = width
        self.layers = nn.ModuleList()
        for number in range(2):
            torch.manual_seed(number)
            shared = FeedForward(spec) if number == 0 else None
            self.layers.append(MoELayer(router(number), spec, shared=shared, parallel=parallel, layer=number))
        self.double()

    def forward(self, x, context):
        losses, routings = 0, []
        for layer in self.layers:
            y, routing = layer(x, context)
            x = x + y.tanh()
            losses = losses + routing.loss
            routings.append(routing)
        return x, losses, routings


def batch(model, step, number, *, padding=None, null=None, size=BATCH):
    """Micro-batch ``number`` of a step, of which everything follows from both."""
    generator = torch.Generator().manual_seed(100 * step + number)
    x = torch.randn(size, LENGTH, model.width, generator=generator, dtype=D64)
    fields = {"seed": 7, "step": step, "sample_id": torch.arange(size) + BATCH * number, "padding_mask": padding}
    fields["null_mask"] = torch.rand(size, generator=generator) < 0.4 if null is None else torch.full((size,), null)
    if model.case is None:
        return x, TokenContext(batch_size=size, length=LENGTH, **fields)
    return x, resized(model.case.context, size, LENGTH, **fields)


def case_of_micro_batch(kind, number):
    """What makes a rank's part of the batch special; rank 0 has micro-batches 0 and 1 (of 2 ranks) or 0 (of 4)."""
    if kind == "padded" and number % 2:
        return {"padding": torch.arange(LENGTH)[None].expand(BATCH, -1) < torch.tensor([[4], [0], [6]])}
    if kind == "all padded" and number == 0:
        return {"padding": torch.zeros(BATCH, LENGTH, dtype=torch.bool)}
    if kind == "no tokens" and number == 0:
        return {"size": 0}
    if kind == "all null" and number == 0:
        return {"null": True}
    return {}


def train(name, kind, parallel, mine, world):
    """A few steps of plain SGD; -> losses of the own micro-batches, norms, weights, states, outputs"""
    model = Toy(name, parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, outputs, norms = {}, {}, []
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in mine:
            x, context = batch(model, step, number, **case_of_micro_batch(kind, number))
            y, aux, _ = model(x, context)
            loss = y.square().sum() / 100 + aux
            (loss / len(mine)).backward()
            losses[step, number], outputs[step, number] = loss.item(), y.detach()
        sync_gradients(model, parallel)
        before = grad_norm(model.parameters(), parallel)
        norm = clip_gradients(model.parameters(), 0.7 * before.item(), parallel)
        assert norm == before
        norms += [before.item(), grad_norm(model.parameters(), parallel).item()]
        optimizer.step()
        finish_step(model)
    names = {name for name, p in model.named_parameters() if is_expert_parameter(p)}
    assert names == {n for n, _ in model.named_parameters() if ".experts." in n and parallel.size > 1}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    states = {n: b.clone() for n, b in model.named_buffers()}
    return losses, outputs, norms, weights, states


def follows_one_process(name, kind, size):
    parallel, world = ExpertParallel.create(size), dist.get_world_size()
    share = MICRO_BATCHES // world
    mine = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    losses, outputs, norms, weights, states = train(name, kind, parallel, mine, world)
    # the reference: one process, without a group for the duration
    alone = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        expected = train(name, kind, ExpertParallel(), range(MICRO_BATCHES), 1)
    finally:
        dist.is_initialized = alone
    what = f"{name}, {kind}, EP={size} of {world}"
    assert losses == {k: pytest.approx(expected[0][k], rel=1e-9, abs=1e-12) for k in losses}, what
    assert_same(outputs, {k: expected[1][k] for k in outputs}, f"{what}: outputs", 1e-9)
    assert_same(torch.tensor(norms), torch.tensor(expected[2]), f"{what}: norms", 1e-9)
    assert_same(states, expected[4], f"{what}: state", 1e-9)
    for key, value in weights.items():
        reference = expected[3][key]
        if ".experts." in key and size > 1:
            rows = len(reference) // size
            reference = reference[parallel.rank * rows : (parallel.rank + 1) * rows]
        assert_same(value, reference, f"{what}: {key}", 1e-9)


def every_router_follows_one_process(size):
    for name in NAMES:
        follows_one_process(name, "padded", size)


def special_parts_of_the_batch(size):
    """A rank without tokens, without real ones, or with unconditional ones alone, which go to no other rank."""
    for kind in ("all padded", "no tokens", "all null"):
        for name in ("topk", "promoe", "diffmoe", "race", "made-up rows"):
            if (kind, name) != ("all null", "made-up rows"):
                follows_one_process(name, kind, size)


def keeping_what_goes_to_nobody():
    """As on a GPU, where the plan holds assignments to nobody: none of them travels."""
    dispatch.counts_are_at_hand, at_hand = lambda _: False, dispatch.counts_are_at_hand
    os.environ["GATEWRIGHT_KERNELS"] = "reference"  # "cpu" takes none of them
    try:
        for name in ("topk", "promoe"):
            follows_one_process(name, "padded", 2)
        model = Toy("topk", ExpertParallel.create(2))
        x, context = batch(model, 0, dist.get_rank())
        # but for the split sizes, which are read as a list: no operation that a GPU would be waited for
        with NoWaiting("cpu", but=("bincount",)):
            y, losses, _ = model(x, context)
            (y.sum() + losses).backward()
    finally:
        dispatch.counts_are_at_hand = at_hand
        del os.environ["GATEWRIGHT_KERNELS"]


@pytest.mark.distributed
def test_plans_of_a_gpu_on_two_ranks(ranks):  # noqa: F811
    ranks(2).run(keeping_what_goes_to_nobody)


@pytest.mark.distributed
@pytest.mark.parametrize("world, size", [(2, 1), (2, 2)])
def test_every_router_on_two_ranks(ranks, world, size):  # noqa: F811
    ranks(world).run(every_router_follows_one_process, size)


@pytest.mark.distributed
def test_parts_of_the_batch_without_tokens(ranks):  # noqa: F811
    ranks(2).run(special_parts_of_the_batch, 2)


def four_ranks(size):
    for name in ("topk", "promoe", "race"):
        follows_one_process(name, "padded", size)
    follows_one_process("promoe", "all null", size)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 4])
def test_four_ranks(ranks, size):  # noqa: F811
    ranks(4).run(four_ranks, size)


def no_rank_waits_for_ever():
    """One rank's inputs, and only they, need no gradient or go to one rank; backward must still meet."""
    parallel, rank = ExpertParallel.create(2), dist.get_rank()
    layer = Toy("topk", parallel).layers[0]
    x = torch.randn(4, 16, dtype=D64, requires_grad=rank == 0)
    for parameter in layer.parameters():
        parameter.requires_grad_(rank == 0)
    layer(x)[0].sum().backward()
    assert (x.grad is not None) == (rank == 0)

    for all_to in (0, 3):  # every token to one expert: the other rank's bank gets none
        layer = Toy("topk", parallel).layers[0]
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[all_to] = 1
        layer.router.top_k = 1
        x = torch.rand(4, 16, dtype=D64, requires_grad=True)
        y, routing = layer(x)
        assert routing.load_E()[all_to] == 4
        y.sum().backward()
        has_it = all_to // 2 == rank
        assert (layer.experts.w1.grad.abs().sum() > 0) == has_it
        assert x.grad.abs().sum() > 0

    with torch.no_grad():
        layer(x)
    layer.eval()
    assert not layer(x.detach())[0].isnan().any()


def layouts_of_ranks():
    """Contiguous blocks: which rank holds what, and who holds the same."""
    rank = dist.get_rank()
    for size in (1, 2, 4):
        parallel = ExpertParallel.create(size)
        assert (parallel.size, parallel.rank) == (size, rank % size)
        assert list(parallel.local_experts(8)) == list(range(rank % size * 8 // size, (rank % size + 1) * 8 // size))
        groups = {"group": parallel.group, "data_group": parallel.data_group}
        members = {k: None if g is None else dist.get_process_group_ranks(g) for k, g in groups.items()}
        first = rank // size * size
        assert members["group"] == (None if size == 1 else list(range(first, first + size)))
        assert members["data_group"] == (None if size == 4 else list(range(rank % size, 4, size)))
        model = Toy("topk", parallel)
        twin = copy.deepcopy(model)  # as an average of the weights is made
        assert twin.layers[0].parallel is parallel
        for left, right in zip(model.parameters(), twin.parameters(), strict=True):
            assert is_expert_parameter(left) == is_expert_parameter(right)
    for size in (0, 3, 8):
        with pytest.raises(ValueError, match=rf"{size} does not divide 4 ranks: choose one of \[1, 2, 4\]"):
            ExpertParallel.create(size)
    with pytest.raises(ValueError, match="6 routed experts do not divide over expert parallelism 4"):
        ExpertParallel.create(4).local_experts(6)


def an_exchange_is_its_own_way_back():
    parallel, rank = ExpertParallel.create(4), dist.get_rank()
    send = [rank, 1, 0, 2]  # how many rows this rank sends to each
    receive = [[0, 1, 2, 3], [1] * 4, [0] * 4, [2] * 4][rank]
    rows = torch.arange(sum(send), dtype=D64)[:, None] + 100 * rank
    rows.requires_grad_()
    for dtype in (D64, torch.float32, torch.bfloat16):
        there = Exchange(parallel, send, receive)
        (arrived,) = there.start(rows.to(dtype))
        there.finish()
        origin = torch.arange(4).repeat_interleave(torch.tensor(receive))
        assert torch.equal((arrived[:, 0].double() / 100).round(), origin.double())
        back = there.reversed()
        (returned,) = back.start(3 * arrived)
        back.finish()
        assert torch.equal(returned, 3 * rows.to(dtype))
        rows.grad = None
        returned.backward(torch.ones_like(returned))
        assert (rows.grad == 3).all()


def recomputation_and_half_precision():
    """The exchanges of a recomputed forward meet too, and autocast changes what travels, not where."""
    parallel = ExpertParallel.create(4)
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        model = Toy("promoe", parallel)
        x, context = batch(model, 0, dist.get_rank(), null=dist.get_rank() == 1)
        x.requires_grad_()
        y, aux = run(lambda x, model=model, context=context: model(x, context)[:2], x)
        (y.sum() + aux).backward()
        gradients.append({"x": x.grad} | {n: p.grad for n, p in model.named_parameters()})
    assert_same(gradients[1], gradients[0], "gradients of a recomputed forward", 1e-12)

    model = Toy("promoe", parallel).float()
    x, context = batch(model, 0, dist.get_rank())
    with torch.autocast("cpu", torch.bfloat16):
        half, aux, _ = model(x.float(), context)
        (half.float().square().mean() + aux).backward()
    whole = model(x.float(), context)[0]
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def torchs_own_wrapper_gives_the_same():
    """DistributedDataParallel, which needs a gradient of every parameter, where every rank holds every expert."""
    parallel = ExpertParallel.create(1)
    for name in ("topk", "promoe", "expert_choice", "diffmoe", "race"):
        plain = Toy(name, parallel)
        wrapped = nn.parallel.DistributedDataParallel(Toy(name, parallel))
        for step in range(2):
            x, context = batch(plain, step, dist.get_rank(), null=dist.get_rank() == 1)
            for model in (plain, wrapped):
                model.zero_grad()
                y, aux, _ = model(x, context)
                (y.square().sum() + aux).backward()
            sync_gradients(plain, parallel)
            finish_step(plain)
            finish_step(wrapped)
            for (key, left), right in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
                assert_same(right.grad, left.grad, f"{name}: gradient of {key}", 1e-12)


def statistics_reduce_over_ranks():
    rank, world = dist.get_rank(), dist.get_world_size()
    layer = MoELayer(Counting(), ExpertSpec(6, 5))
    x = torch.zeros(2, 3, 6)
    for micro in range(2):
        value = torch.tensor([10.0 * rank + micro, -rank])
        layer(x, TokenContext.for_tokens(x, timestep=value))
    finish_step(layer)
    values = torch.tensor([[10.0 * r + m, -r] for r in range(world) for m in range(2)])
    (seen,) = layer.router.seen
    assert seen["total"] == values.sum(0).tolist() and seen["highest"] == values.amax(0).tolist()
    assert seen["average"] == pytest.approx(values.mean(0).tolist())


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world, check",
    [
        (2, no_rank_waits_for_ever),
        (2, torchs_own_wrapper_gives_the_same),
        (4, layouts_of_ranks),
        (4, an_exchange_is_its_own_way_back),
        (4, recomputation_and_half_precision),
        (4, statistics_reduce_over_ranks),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_between_ranks(ranks, world, check):  # noqa: F811
    ranks(world).run(check, timeout=120)


def test_one_process_needs_no_group():
    model = Toy("topk", ExpertParallel())
    x, context = batch(model, 0, 0)
    model(x, context)[0].sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    sync_gradients(model, ExpertParallel())
    assert_same({n: p.grad for n, p in model.named_parameters()}, before, "gradients", 0)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert_same(grad_norm(model.parameters(), ExpertParallel()), expected, "norm", 1e-12)
    grads = [p.grad * 2 if i else None for i, p in enumerate(model.parameters())]
    assert_same(
        grad_norm(model.parameters(), ExpertParallel(), grads),
        torch.cat([g.flatten() for g in grads[1:]]).norm(),
        "norm of given gradients",
        1e-12,
    )
    check_divides_world(1, 1)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_clipping_is_torchs(factor):
    model, other = Toy("topk", ExpertParallel()), Toy("topk", ExpertParallel())
    for m in (model, other):
        x, context = batch(m, 0, 0)
        m(x, context)[0].sum().backward()
    norm = grad_norm(model.parameters(), ExpertParallel())
    returned = clip_gradients(model.parameters(), factor * norm.item(), ExpertParallel())
    expected = nn.utils.clip_grad_norm_(other.parameters(), factor * norm.item())
    assert_same(returned, expected, "norm", 1e-12)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(left.grad, right.grad, "clipped gradient", 1e-12)
    for bad in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="choose a positive number"):
            clip_gradients(model.parameters(), bad, ExpertParallel())
