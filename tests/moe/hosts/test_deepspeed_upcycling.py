"""DeepSpeed's layer starts as a feed-forward as the plain one does."""

import torch

from gatewright.moe import ExpertSpec, FeedForward, upcycle
from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer
from gatewright.routers import create_router


def test_deepspeeds_layer_is_upcycled():
    torch.manual_seed(0)
    dense, x = FeedForward(ExpertSpec(6, 12, bias=True)).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    router = create_router("topk", dim=6, num_experts=4, top_k=2, renormalise=True)
    layer = DeepSpeedMoELayer(router, ExpertSpec(6, 6, bias=True)).double()
    upcycle(layer, dense, how="slices")
    torch.testing.assert_close(layer(x)[0], dense(x), rtol=1e-12, atol=1e-12)
    assert all(parameter.allreduce is False for parameter in layer.experts.parameters())
