"""Small models that are really trained and recorded: each planted fault is told in the right words, and a healthy
run raises nothing."""

import re

import pytest
import torch
from torch import nn

from gatewright.moe import ExpertSpec, MoELayer, Recorder, finish_step
from gatewright.moe.record_log import read_log
from gatewright.routers import create_router
from gatewright.tools.dashboard.alerts import find_alerts

DIM, EXPERTS, STEPS = 8, 8, 60


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        given = {"dim": DIM, "num_experts": EXPERTS, "top_k": 2, "balance_weight": 0.1, "init_std": 0.1} | options
        self.layers = nn.ModuleList(
            MoELayer(create_router("topk", **given), ExpertSpec(DIM, 8), layer=layer) for layer in range(2)
        )

    def forward(self, x):
        routings = []
        for layer in self.layers:
            y, routing = layer(x)
            x = x + y
            routings.append(routing)
        return x, routings


def alerts(run, *, penalty=None, at=None, shape=(4, 64), probe=False, **options):
    """Trains to turn tokens round, plus ``penalty(routings)``; ``at(model, step)`` meddles before a step."""
    model, generator = Model(**options), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    frozen = torch.randn(4, 64, DIM, generator=generator)
    recorder = Recorder(model, run, every=2, structure_every=0)
    if probe:
        recorder.probe(lambda: model(frozen), every=5)
    for step in range(STEPS):
        if at is not None:
            at(model, step)
        x = torch.randn(*shape, DIM, generator=generator)
        y, routings = model(x)
        loss = (y + x).square().mean() + sum(routing.loss for routing in routings)
        if penalty is not None:
            loss = loss + penalty(routings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish_step(model)
        recorder.step(step, loss=loss.detach())
    recorder.close()
    return find_alerts(read_log(run))


@pytest.mark.parametrize("probe", [False, True])
def test_a_healthy_run(tmp_path, probe):
    assert alerts(tmp_path, probe=probe) == []


def test_collapse(tmp_path):
    """A loss that pays for experts 2 and 5 of the second layer alone."""
    (alert,) = alerts(tmp_path, penalty=lambda r: -50 * r[1].scores[:, [2, 5]].log().mean(), linear_bias=True)
    assert (alert.kind, alert.layer, alert.experts) == ("collapse", 1, (2, 5))
    assert re.match(
        r"layer 1 has collapsed: experts 2 and 5 take \d+ % of assignments; balanced would be 25 %", alert.sentence
    )


def test_starvation(tmp_path):
    """A loss that fines the use of expert 3 of the first layer."""
    (alert,) = alerts(tmp_path, penalty=lambda r: 50 * r[0].logits[:, 3].mean(), linear_bias=True)
    assert (alert.kind, alert.layer, alert.experts) == ("starvation", 0, (3,))
    assert re.match(
        r"layer 0: expert 3 takes (none|[\d.]+ %|less than 0.01 %) of assignments; balanced would be 12 %",
        alert.sentence,
    )


def test_drops_towards_the_end(tmp_path):
    """Less room than tokens, and the first come first: what is late in the one sequence of a batch is dropped."""
    found = alerts(tmp_path, shape=(1, 256), capacity_factor=0.7)
    assert [(alert.kind, alert.layer) for alert in found] == [("late drops", 0), ("late drops", 1)]
    for layer, alert in enumerate(found):
        assert alert.sentence.startswith(f"layer {layer} drops towards the end: ")
        assert "of assignments in the last quarter of a sequence are dropped" in alert.sentence


def test_router_drift(tmp_path):
    """The first layer's router loses what it has learned, long after it had come to rest."""

    def forget(model, step):
        if step == 45:
            with torch.no_grad():
                model.layers[0].router.weight.copy_(
                    torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(9))
                )

    found = alerts(tmp_path, at=forget, probe=True)
    drift = [alert for alert in found if alert.kind == "drift"]
    assert [alert.layer for alert in drift] == [0]
    assert re.match(
        r"layer 0 drifts: \d+ % of the probe's choices moved to other experts between steps 4\d and (45|50), ",
        drift[0].sentence,
    )
