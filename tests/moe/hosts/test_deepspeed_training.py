"""Training under DeepSpeed follows one plain process, at every stage and expert parallelism."""

import functools

import pytest
import torch
from deepspeed_toy import ROUTERS, Run, train_plainly, without_key_bias

pytestmark = pytest.mark.distributed

STEPS = 20


@functools.cache
def plain(router, clip):
    return train_plainly(router, STEPS, clip)


def check_training(router, stage, ep, clip, steps=STEPS, **options):
    with Run(router, stage=stage, ep=ep, clip=clip, **options) as run:
        return run.train(0, steps) | {"parameters": run.parameters(), "buffers": run.buffers()}


def hold_to_plain(results, router, clip, steps=STEPS):
    expected = plain(router, clip)
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"][:steps], rtol=0, atol=1e-6)
        torch.testing.assert_close(result["norms"], expected["norms"][:steps], rtol=1e-5, atol=0)
        assert result["parameters"].keys() == expected["parameters"].keys()
        ours = without_key_bias(result["parameters"])
        for name, value in without_key_bias(expected["parameters"]).items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert result["buffers"].keys() == expected["buffers"].keys()
        for name, value in expected["buffers"].items():
            torch.testing.assert_close(result["buffers"][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world, ep", [(2, 2), (2, 1), (1, 1)])
def test_every_stage_follows_one_process(ranks, world, ep, stage):
    hold_to_plain(ranks(world).run(check_training, "promoe", stage, ep, 0.5), "promoe", 0.5)


OTHERS = [name for name in ROUTERS if name != "promoe"]


@pytest.mark.parametrize("router", OTHERS)
def test_every_kind_of_router_follows_one_process(ranks, router):
    hold_to_plain(ranks(2).run(check_training, router, 3, 2, 0.5), router, 0.5)


@pytest.mark.evidence
@pytest.mark.parametrize("router", OTHERS)
@pytest.mark.parametrize("ep, stage", [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)])
def test_every_router_follows_one_process_everywhere(ranks, router, ep, stage):
    hold_to_plain(ranks(2).run(check_training, router, stage, ep, 0.5), router, 0.5)


def test_the_routers_state_moves():
    """What the comparison above compares is not what it began with."""
    for router, state in (("topk", "bias"), ("diffmoe", "threshold"), ("race", "threshold")):
        assert plain(router, 0.5)["buffers"][f"blocks.1.moe.router.{state}"].any()


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputing_blocks_changes_nothing(ranks, stage):
    results = ranks(2).run(check_training, "topk", stage, 2, 0.5, recompute=True)
    hold_to_plain(results, "topk", 0.5)
