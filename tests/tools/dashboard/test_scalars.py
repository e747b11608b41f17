"""What a recorder measures, in TensorBoard's files: every number once, and every chart of the layout finds its own."""

import re

import pytest
import torch

from gatewright.moe import ExpertSpec, MoELayer, finish_step
from gatewright.moe.record import Recorder, measures
from gatewright.routers import create_router
from gatewright.tools.dashboard.scalars import LAYER_MEASURES, RoutingScalars, layout

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            MoELayer(create_router("topk", dim=8, num_experts=4, top_k=2), ExpertSpec(8, 8), layer=i) for i in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return x


def train(tmp_path, steps=5, every=2):
    """Writes after each step; gives what was measured at each window's end."""
    torch.manual_seed(0)
    model, told = TwoLayers(), {}
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer, Recorder(model, tmp_path, every=every) as recorder:
        scalars = RoutingScalars(writer)
        for step in range(steps):
            model(torch.randn(2, 16, 8)).sum().backward()
            finish_step(model)
            recorder.step(step)
            scalars.write(recorder)
            scalars.write(recorder)
            if recorder.window is not None:
                told[recorder.window.last] = recorder.summary(), measures(recorder.window, recorder.layers)
    return told


def read(tmp_path) -> EventAccumulator:
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def test_every_window_is_written_once(tmp_path):
    told = train(tmp_path)
    events = read(tmp_path)
    assert sorted(told) == [1, 3]
    for step, (summary, per_layer) in told.items():
        expected = summary | {
            f"routing/layer_{i:02d}/{name}": per_layer[name][i] for name in LAYER_MEASURES for i in range(2)
        }
        for name, value in expected.items():
            written = [e.value for e in events.Scalars(name) if e.step == step] if name in scalar_tags(events) else []
            assert written == ([] if value != value else [pytest.approx(value, rel=1e-5)]), name


def scalar_tags(events):
    return events.Tags()["scalars"]


def test_every_chart_finds_its_numbers(tmp_path):
    train(tmp_path)
    events = read(tmp_path)
    (config,) = events.Tensors("custom_scalars__config__")
    read_back = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    assert [category.title for category in read_back.category] == list(layout())
    for category in read_back.category:
        for chart in category.chart:
            found = [[tag for tag in scalar_tags(events) if re.match(wanted, tag)] for wanted in chart.multiline.tag]
            expected = 2 if "layer" in category.title else 1
            assert all(len(tags) == expected for tags in found), (chart.title, found)
