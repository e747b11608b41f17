"""Layers on segments under DeepSpeed: they train as one plain process does, whichever layer runs inside."""

import pytest
import torch
from torch import nn

from gatewright.moe import ExpertParallel, ExpertSpec, MoELayer
from gatewright.moe.parallel import clip_gradients
from gatewright.moe.segment import SegmentFeedForward, SegmentMoELayer
from gatewright.routers import TokenContext, create_router

pytestmark = pytest.mark.distributed

DIM, SIZE, STEPS, CLIP = 8, 3, 4, 0.5


class Model(nn.Module):
    """A position-wise layer with the shared expert on segments, then one of each other kind."""

    def __init__(self, layer_class, parallel):
        super().__init__()
        torch.manual_seed(0)
        spec = ExpertSpec(DIM, 12)

        def router(width, size):
            return create_router("segment", dim=width, num_experts=4, segment_size=size, top_k=2)

        shared = SegmentFeedForward(spec, SIZE)
        options = {"segment_size": SIZE, "layer_class": layer_class, "parallel": parallel}
        self.embed = nn.Linear(DIM, DIM)
        self.positionwise = layer_class(router(DIM, SIZE), spec, shared=shared, parallel=parallel)
        self.concat = SegmentMoELayer(router(SIZE * DIM, 1), spec, variant="concat", layer=1, **options)
        self.projected = SegmentMoELayer(router(DIM, 1), spec, variant="projected", layer=2, **options)

    def forward(self, x):
        context = TokenContext.for_tokens(x, padding_mask=torch.arange(x.shape[1]).expand(len(x), -1) < 6)
        hidden, total = self.embed(x), 0.0
        for layer in (self.positionwise, self.concat, self.projected):
            y, routing = layer(hidden, context)
            hidden, total = hidden + y, total + routing.loss
        return (hidden - x)[:, :6].square().mean() + total


def batch(step, number):
    return torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(10 * step + number))


def train_plainly():
    model = Model(MoELayer, ExpertParallel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (model(batch(step, 0)) + model(batch(step, 1))) / 2
        loss.backward()
        clip_gradients(model.parameters(), CLIP, ExpertParallel())
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def train_under_deepspeed(stage):
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import groups

    from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer, default_config, full_parameters

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for made in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
        made.clear()
    settings = default_config(
        zero_stage=stage, dtype="float32", micro_batch=2, accumulation=1, clip=CLIP, lr=1e-4, weight_decay=0.0
    )
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}
    model = Model(DeepSpeedMoELayer, ExpertParallel.create(2))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    losses = []
    for step in range(STEPS):
        loss = engine(batch(step, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / 2
        dist.all_reduce(mean)
        losses.append(mean.item())
    parameters = {name: value.clone() for name, value in full_parameters(engine)}
    engine.destroy()
    return losses, parameters


@pytest.mark.parametrize("stage", [0, 3])
def test_training_follows_one_process(ranks, stage):
    expected, reference = train_plainly()
    for losses, parameters in ranks(2).run(train_under_deepspeed, stage):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert parameters.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(
                parameters[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
