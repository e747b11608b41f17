"""Faults planted in a layer are each told by the right sentence, and nothing is told of a healthy run."""

import math
import re

import made_up_logs
import numpy as np
import pytest

from gatewright.moe.record_log import LayerInfo, LogWriter, Window, read_log
from gatewright.tools.dashboard.alerts import find_alerts


def alerts_of(tmp_path, **log):
    return find_alerts(read_log(made_up_logs.write_log(tmp_path / "run", **log)))


@pytest.mark.parametrize(
    "shape",
    [
        {"experts": 16, "top_k": 2},
        {"experts": 64, "top_k": 8},
        {"experts": 8, "top_k": 1, "capacity": True},
        {"experts": 256, "top_k": 1, "tokens": 65_536, "probes": 0, "structure": False},
        {"experts": 16, "top_k": 2, "windows": 3, "probes": 0},
        {"experts": 12, "top_k": 1, "tokens": 512},
    ],
)
def test_a_healthy_run_raises_none(tmp_path, shape):
    assert alerts_of(tmp_path, **shape) == []


def test_collapse(tmp_path):
    (alert,) = alerts_of(tmp_path, experts=16, top_k=2, plant={2: "collapse"})
    assert (alert.kind, alert.layer, alert.since, alert.experts) == ("collapse", 2, 100, (2, 3))
    said = "layer 2 has collapsed: experts 2 and 3 take 98 % of assignments; balanced would be 12 % (since step 100)"
    assert alert.sentence == said


def test_overload_in_the_words_that_name_the_experts(tmp_path):
    (alert,) = alerts_of(tmp_path, layers=8, experts=64, top_k=8, plant={7: "overload"})
    assert (alert.kind, alert.layer, alert.experts) == ("overload", 7, (3, 41))
    found = re.fullmatch(
        r"layer 7: experts 3 and 41 take (\d+) % of assignments; balanced would be 3 % \(since step 100\)",
        alert.sentence,
    )
    # 2 of 64 experts with an eighth each at most
    assert found and 20 <= int(found[1]) <= 25


def test_starvation(tmp_path):
    (alert,) = alerts_of(tmp_path, experts=16, top_k=2, plant={1: "starvation"})
    assert (alert.kind, alert.layer, alert.experts) == ("starvation", 1, (1, 5))
    assert alert.sentence.startswith("layer 1: experts 1 and 5 take ")
    assert alert.sentence.endswith(" of assignments; balanced would be 12 % (since step 100)")


def test_drops_towards_the_end(tmp_path):
    (alert,) = alerts_of(tmp_path, plant={3: "drops"}, capacity=True)
    assert (alert.kind, alert.layer, alert.since) == ("late drops", 3, 100)
    assert re.match(
        r"layer 3 drops towards the end: \d+ % of assignments in the last quarter of a sequence are dropped, "
        r"[\d.]+ % in the first; flat would be",
        alert.sentence,
    )


@pytest.mark.parametrize("probes", [6, 0])
def test_drift_of_the_probe_or_else_of_the_load(tmp_path, probes):
    (alert,) = alerts_of(tmp_path, plant={1: "drift"}, probes=probes, windows=40 if probes else 30)
    assert (alert.kind, alert.layer) == ("drift", 1)
    assert alert.sentence.startswith("layer 1 drifts: ")
    assert ("of the probe's choices" if probes else "of its load") in alert.sentence


def test_all_at_once_are_told_apart(tmp_path):
    plant = dict(enumerate(("collapse", "overload", "starvation", "drops", "drift")))
    found = alerts_of(tmp_path, layers=6, experts=64, top_k=8, plant=plant)
    assert [(alert.kind, alert.layer) for alert in found] == [
        ("collapse", 0),
        ("overload", 1),
        ("starvation", 2),
        ("late drops", 3),
        ("drift", 4),
    ]


def test_chance_raises_none_however_few_the_tokens(tmp_path):
    """Sixteen tokens over 64 experts leave most of them without any: that is chance, not starvation."""
    assert alerts_of(tmp_path, experts=64, top_k=1, tokens=16, probes=0, structure=False, windows=10) == []


def test_where_nothing_is_chosen_nothing_is_wrong(tmp_path):
    """Every token takes every expert, k is not told, a layer gets no token at all."""
    layers = [
        LayerInfo(name="a", layer=0, experts=4, top_k=4.0),
        LayerInfo(name="b", layer=1, experts=1, top_k=1.0),
        LayerInfo(name="c", layer=2, experts=4, top_k=math.nan),
    ]
    writer = LogWriter(tmp_path, layers)
    for step in range(4):
        window = Window.zeros(step, step, 3, 4)
        window.tokens[:] = [1000, 1000, 0]
        window.counts[:2] = window.requested[:2] = np.array([[1000] * 4, [1000, 0, 0, 0]])
        writer.window(window)
    writer.close()
    assert find_alerts(read_log(tmp_path)) == []
