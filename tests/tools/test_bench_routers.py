"""The benchmark of routing decisions at a tiny shape: every router runs, and its numbers belong together. No time is
judged."""

import argparse
import json

import pytest
import torch

from gatewright.routers import create_router, list_routers
from gatewright.tools import bench_routers as bench

SHAPE = bench.Shape(batch=2, length=8, dim=16, experts=4)


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def decide(name: str, step: int = 0):
    router = create_router(name, **bench.router_options(name, SHAPE))
    generator = torch.Generator().manual_seed(0)
    context = bench.router_context(router, SHAPE, generator, step)
    x_TD = torch.randn(SHAPE.tokens, SHAPE.dim, generator=generator)
    return router, context, bench.decide(router, x_TD, context)


@pytest.mark.parametrize("name", list_routers())
def test_every_router_decides_and_its_gradient_arrives(name):
    router, context, routing = decide(name)
    assert routing.num_tokens == SHAPE.tokens
    assert all(context.has(field) for field in router.requires)
    assert router.num_experts == SHAPE.experts
    # a parameter that no gradient reaches is one whose backward is not timed; "weights": none reaches any, on purpose
    if "weights" not in router.without_gradient and list(router.parameters()):
        assert any(parameter.grad is not None for parameter in router.parameters())


def test_shared_numbers_and_what_a_preset_sets():
    assert bench.router_options("topk", SHAPE) == {"dim": 16, "num_experts": 4, "top_k": 2}
    assert bench.router_options("switch", SHAPE) == {"dim": 16, "num_experts": 4}
    assert bench.router_options("hash", SHAPE)["vocabulary"] == bench.VOCABULARY
    assert bench.router_options("soft_moe", SHAPE)["slots"] * SHAPE.experts == SHAPE.length * SHAPE.top_k


def test_the_attention_gets_its_gradient():
    _, context, _ = decide("attention_aware")
    assert context.attention.q.grad.abs().max() > 0


def test_a_field_that_is_not_made_here(monkeypatch):
    router = create_router("topk", **bench.router_options("topk", SHAPE))
    monkeypatch.setattr(type(router), "requires", ("cache",))
    with pytest.raises(ValueError, match='router "topk" needs context.cache, which this benchmark does not make'):
        bench.router_context(router, SHAPE, torch.Generator(), 0)


def test_numbers_belong_together():
    results = bench.measure(["topk", "hash", "soft_moe"], SHAPE, rounds=4, seconds=60)
    assert results == json.loads(json.dumps(results))
    assert list(results["routers"]) == ["topk", "hash", "soft_moe"]
    for router in results["routers"].values():
        own, reference = (router["milliseconds"][role] for role in ("router", "reference"))
        ratio = router["ratio"]
        assert own["min"] / reference["max"] <= ratio["median"] <= own["max"] / reference["min"]
        assert ratio["min"] <= ratio["low"] <= ratio["median"] <= ratio["high"] <= ratio["max"]
        assert router["rounds"] == 4
        assert min(router["peak_bytes"].values()) > 0
    table = bench.report(results)
    assert "T = 16 (2 x 8), D = 16, E = 4, K = 2" in table
    assert "| hash | token |" in table and "| soft_moe | slot |" in table


def test_a_slow_router_gets_three_rounds():
    assert bench.compare("topk", SHAPE, rounds=20, seconds=0)["rounds"] == bench.FEWEST_ROUNDS
    assert bench.compare("topk", SHAPE, rounds=2, seconds=0)["rounds"] == 2


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    bench.compare("topk", SHAPE, rounds=1, seconds=0)
    assert torch.equal(before, torch.random.get_rng_state())


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_command(tmp_path, capsys):
    out = tmp_path / "new" / "routers.json"
    shape = ("--batch", "2", "--length", "8", "--dim", "16", "--experts", "4", "--threads", "1")
    assert bench.run(parse("hash", "topk", *shape, "--rounds", "1", "--out", str(out))) == 0
    assert capsys.readouterr().out.count("\n| ") == 4
    assert list(json.loads(out.read_text())["routers"]) == ["hash", "topk"]
    assert list(out.parent.iterdir()) == [out]


def test_bad_input():
    with pytest.raises(ValueError, match='unknown router "hahs": did you mean hash'):
        bench.run(parse("hahs"))
    with pytest.raises(ValueError, match="--experts 0 --rounds 0: must be at least 1"):
        bench.run(parse("--experts", "0", "--rounds", "0"))
