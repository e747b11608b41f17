"""Operations and bytes against counts by hand, and operations against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatewright.tools.costs import PARTS, Cost, cost
from gatewright.tools.peers import Dense, LoopUnbound, Shape, draw_tokens, draw_weights

SHAPE = Shape(tokens=5, dim=4, hidden=3, experts=6, top_k=2)


def test_by_hand():
    # T 5, N 10, D 4, H 3, E 6; float32 numbers of 4 bytes, ids of 8
    forward, backward = cost("router", SHAPE, 4)
    assert forward == Cost(2 * 5 * 4 * 6, 5 * 4 * 4 + 6 * 4 * 4 + 5 * 6 * 4 + 10 * 12)
    assert backward == Cost(2 * 240, 2 * (80 + 96) + 120 + 40)
    forward, backward = cost("experts", SHAPE, 4)
    # two products a row: 4 x 6 and 3 x 4
    assert forward == Cost(10 * (2 * 24 + 2 * 12), 80 + 6 * (24 + 12) * 4 + 10 * 6 * 4 + 80 + 120)
    assert backward == Cost(2 * 720, 3 * 80 + 2 * 864 + 240 + 120 + 40)
    forward, backward = cost("dense", SHAPE, 4)
    assert forward == Cost(5 * (2 * 4 * 12 + 2 * 6 * 4), 80 + (4 * 12 + 6 * 4) * 4 + 5 * 12 * 4 + 80)
    assert backward == Cost(2 * 720, 3 * 80 + 2 * 288 + 240)
    assert cost("dispatch", SHAPE, 4) == (Cost(0, 80 + 160 + 160), Cost(0, 160 + 80 + 80))
    assert cost("combine", SHAPE, 4) == (Cost(80, 160 + 80 + 120), Cost(160, 80 + 320 + 120 + 40))


def test_half_types_halve_what_is_not_an_id_or_a_routing_weight():
    for part in PARTS:
        for wide, half in zip(cost(part, SHAPE, 4), cost(part, SHAPE, 2), strict=True):
            assert half.flops == wide.flops and wide.bytes / 2 <= half.bytes < wide.bytes


def test_a_layer_is_its_router_and_its_experts():
    sums = [a + b for a, b in zip(cost("router", SHAPE, 4), cost("experts", SHAPE, 4), strict=True)]
    assert list(cost("layer", SHAPE, 4)) == sums


@pytest.mark.parametrize(("part", "kind"), [("layer", LoopUnbound), ("dense", Dense)])
def test_torch_counts_as_many_operations(part, kind):
    generator = torch.Generator().manual_seed(0)
    weights = draw_weights(SHAPE, torch.float32, torch.device("cpu"), generator)
    contestant, x = kind(SHAPE, weights), draw_tokens(SHAPE, weights, generator).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = contestant.layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(one.flops for one in cost(part, SHAPE, 4))


def test_an_unknown_part():
    with pytest.raises(ValueError, match='"gate" is no part: choose one of layer, dense, router'):
        cost("gate", SHAPE, 4)
