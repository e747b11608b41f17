"""Whom the layer is timed against: each computes the same values, or says why it cannot run."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from gatewright.tools import peers
from gatewright.tools.bench_parts import MOVERS
from gatewright.tools.peers import CONTESTANTS, Shape, check, choose, draw_tokens, draw_weights

CPU = torch.device("cpu")
SHAPE = Shape(tokens=48, dim=16, hidden=24, experts=6, top_k=2)
EVERYONE = [name for name in CONTESTANTS if name != "dense"]


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    yield
    if dist.is_initialized():  # by Megatron-Core's contestant
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def able(kind, dtype=torch.float32):
    reason = kind.why_not(SHAPE, dtype, CPU)
    if reason is not None:
        pytest.skip(reason)
    return kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERYONE)
def test_a_contestant_computes_what_the_reference_does(name, dtype):
    errors = check(able(CONTESTANTS[name], dtype), SHAPE, dtype, CPU)
    assert set(errors) == {"y", "dx", "d gate", "d w_in", "d w_out"}


def test_who_computes_something_else_is_found():
    class Wrong(peers.LoopUnbound):
        name = "wrong"

        def layer(self, x_TD):
            index_TK, weight_TK = choose(x_TD, self.leaves[0], self.top_k)
            return self.experts(x_TD, index_TK, weight_TK * 1.001)

    with pytest.raises(ValueError, match=r"computes other values in torch.float32: y by 1.0e-03.*allowed 1e-05"):
        check(Wrong, SHAPE, torch.float32, CPU)


@pytest.mark.parametrize("name", [name for name, kind in CONTESTANTS.items() if "experts" in kind.parts])
def test_experts_alone_are_the_layer_on_its_own_routing(name):
    generator = torch.Generator().manual_seed(1)
    weights = draw_weights(SHAPE, torch.float32, CPU, generator)
    x_TD, contestant = draw_tokens(SHAPE, weights, generator), able(CONTESTANTS[name])(SHAPE, weights)
    y_TD = contestant.experts(x_TD, *choose(x_TD, weights.gate, SHAPE.top_k))
    torch.testing.assert_close(y_TD, contestant.layer(x_TD))


@pytest.mark.parametrize("name", [name for name, kind in CONTESTANTS.items() if "router" in kind.parts])
def test_routers_alone_agree(name):
    generator = torch.Generator().manual_seed(1)
    weights = draw_weights(SHAPE, torch.float32, CPU, generator)
    x_TD = draw_tokens(SHAPE, weights, generator)
    contestant = able(CONTESTANTS[name])(SHAPE, weights)
    expected = choose(x_TD, weights.gate, SHAPE.top_k)[1]
    torch.testing.assert_close(contestant.route(x_TD).sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("transformers eager", "aten.index_add_"),
        ("transformers batched_mm", "aten.bmm"),
        ("transformers grouped_mm", "aten._grouped_mm"),
        ("torch grouped_mm", "gatewright.expert_mlp"),
    ],
)
def test_each_runs_its_own_implementation(name, does):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func).rpartition(".")[0])
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    generator = torch.Generator().manual_seed(1)
    weights = draw_weights(SHAPE, torch.float32, CPU, generator)
    contestant = able(CONTESTANTS[name])(SHAPE, weights)
    with Names():
        contestant.layer(draw_tokens(SHAPE, weights, generator))
    everyone = {"aten.index_add_", "aten.bmm", "aten._grouped_mm", "gatewright.expert_mlp"}
    assert seen & everyone == {does}


@pytest.mark.parametrize("name", MOVERS)
def test_movers_bring_rows_to_experts_and_back(name):
    kind = MOVERS[name]
    if kind.why_not() is not None:
        pytest.skip(kind.why_not())
    x_TD = torch.randn(SHAPE.tokens, SHAPE.dim, dtype=torch.float64)
    index_TK = torch.rand(SHAPE.tokens, SHAPE.experts).argsort(-1)[:, : SHAPE.top_k]
    weight_TK = torch.rand(index_TK.shape, dtype=torch.float64)
    mover = kind(index_TK, weight_TK, SHAPE.experts)
    rows_ND = mover.dispatch(x_TD)
    experts = index_TK.flatten()
    by_expert = [x_TD[(index_TK == e).any(-1)] for e in range(SHAPE.experts)]
    torch.testing.assert_close(rows_ND, torch.cat(by_expert))
    assert len(rows_ND) == len(experts)
    expected = weight_TK.sum(-1, keepdim=True) * x_TD
    torch.testing.assert_close(mover.combine(rows_ND, mover.weights()), expected, rtol=1e-6, atol=1e-6)


def test_gpu_peers_say_why_they_cannot_run(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: False)
    assert CONTESTANTS["SonicMoE"].why_not(SHAPE, torch.bfloat16, CPU) == "sonicmoe is not installed"
    monkeypatch.setattr(peers, "installed", lambda package: True)
    assert CONTESTANTS["SonicMoE"].why_not(SHAPE, torch.bfloat16, CPU) == "needs a GPU"
    cuda = torch.device("cuda")
    assert CONTESTANTS["SonicMoE"].why_not(SHAPE, torch.float32, cuda) == "is not compared in torch.float32"
    assert CONTESTANTS["ScatterMoE"].why_not(SHAPE, torch.float32, cuda) is None
    assert CONTESTANTS["torch grouped_mm"].why_not(SHAPE, torch.float64, CPU).startswith('backend="torch" takes')


def test_copies_that_do_not_fit_are_counted(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: True)
    monkeypatch.setattr(peers, "memory_bytes", lambda device: 2**32)
    large = Shape(tokens=8192, dim=256, hidden=512, experts=8, top_k=2)
    # 16384 rows of 3 * 256 * 512 numbers of 4 bytes, and their gradients
    reason = CONTESTANTS["transformers batched_mm"].why_not(large, torch.float32, CPU)
    assert reason == "copies an expert's weights for every row: 48 GiB with their gradients, of 4 GiB here"
    assert CONTESTANTS["transformers batched_mm"].why_not(SHAPE, torch.float32, CPU) is None


def test_no_rounding_changes_who_is_chosen():
    generator = torch.Generator().manual_seed(0)
    shape = Shape(tokens=500, dim=64, hidden=8, experts=16, top_k=4)
    weights = draw_weights(shape, torch.bfloat16, CPU, generator)
    x_TD = draw_tokens(shape, weights, generator)
    assert x_TD.shape == (500, 64) and x_TD.dtype == torch.bfloat16
    exact = choose(x_TD.double(), weights.gate.double(), 4)[0].sort(-1).values
    rounded = torch.nn.functional.linear(x_TD, weights.gate).topk(4).indices.sort(-1).values
    assert torch.equal(exact, rounded)


@pytest.mark.parametrize("wrong", [{"top_k": 1}, {"top_k": 6}, {"tokens": 0}])
def test_shapes_that_compare_nothing(wrong):
    with pytest.raises(ValueError, match=r"choose at least 1 of everything, and K from 2"):
        Shape(**{"tokens": 48, "dim": 16, "hidden": 24, "experts": 6, "top_k": 2} | wrong)
