"""The benchmark at a tiny shape: contestants compute the same, and its numbers belong together. No time is judged."""

import argparse
import json

import pytest
import torch

from gatewright.recipes.models import dit_config
from gatewright.tools import bench

SHAPE = bench.Shape(dim=16, experts=3, length=8, batch=10)


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small():
    return bench.Bench(SHAPE, torch.float64)


def test_the_loop_computes_what_the_layer_does(small):
    x, context, grad = small.inputs()
    results = []
    for name in ("moe", "loop"):
        tokens = x.clone().requires_grad_()
        y, routing = small.contestants[name](tokens, context)
        bench.backward(y, grad, routing)
        results.append((y.detach(), tokens.grad, small.layer.router.prototypes.grad))
        small.layer.router.prototypes.grad = None
    torch.testing.assert_close(*results)
    in_bank = [*small.layer.experts.w_in.grad, *small.layer.local_experts.w_in.grad]
    torch.testing.assert_close(in_bank, [w_in.grad for w_in, *_ in small.loop.experts])


def test_each_activates_as_many_hidden_units(small):
    layer = small.layer
    assert small.dense.spec.hidden == layer.spec.hidden + layer.shared.spec.hidden


@pytest.mark.parametrize("size", bench.SHAPES)
def test_shapes_are_those_of_the_recipes(size):
    config, shape = dit_config(size, "promoe"), bench.SHAPES[size]
    assert (shape.dim, shape.experts, shape.length) == (config.dim, config.num_experts, config.num_tokens)
    assert config.expert_hidden == 2 * shape.dim and config.hidden == 4 * shape.dim and config.top_k == 1


def test_inputs_vary_and_follow_from_the_seed(small):
    again = bench.Bench(SHAPE, torch.float64)
    first, second = small.inputs(), small.inputs()
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(again.inputs()[0], first[0])
    assert first[1].null_mask.sum() == second[1].null_mask.sum() == 1


def test_numbers_belong_together():
    results = bench.measure({"small": SHAPE}, ["fp32", "bf16"], rounds=3)
    assert results == json.loads(json.dumps(results))
    assert [block["dtype"] for block in results["blocks"]] == ["fp32", "bf16"]
    for block in results["blocks"]:
        rows = block["rows_per_expert"]
        assert rows["least"] <= rows["mean"] <= rows["most"]
        assert rows["mean"] * SHAPE.experts == pytest.approx(SHAPE.tokens * 0.9)  # one sample of ten is unconditional
        for one in (*block["milliseconds"].values(), *block["ratio"].values(), *block["parts"].values()):
            assert one["min"] <= one["low"] <= one["median"] <= one["high"] <= one["max"]
        for name, ratio in block["ratio"].items():
            a, b = (block["milliseconds"][which] for which in name.split("/"))
            assert a["min"] / b["max"] <= ratio["median"] <= a["max"] / b["min"]
        assert all(peak > 0 for peak in block["memory"]["peak_bytes"].values())
        assert block["memory"]["gathered_bytes"] > 0
    table = bench.report(results)
    assert table.count("| small | fp32 |") == table.count("| small | bf16 |") == 3
    assert results["machine"]["cpu"] in table


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"S": SHAPE})
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    out = tmp_path / "new" / "bench.json"
    args = parser.parse_args(["--dtypes", "fp32", "--rounds", "1", "--threads", "1", "--out", str(out)])
    assert bench.run(args) == 0
    assert capsys.readouterr().out.count("| S | fp32 |") == 3
    assert json.loads(out.read_text())["machine"]["threads"] == 1
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(ValueError, match="--rounds 0 --threads 1: both must be at least 1"):
        bench.run(parser.parse_args(["--rounds", "0", "--threads", "1"]))
