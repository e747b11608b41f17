"""What the benchmarks measure with. No time is judged."""

import random

import pytest
import torch

from gatewright.tools.measure import (
    LiveStorage,
    Rates,
    clock,
    markdown,
    measure_rates,
    paired_ratio,
    peak_bytes,
    peak_memory,
    spread,
)

CPU = torch.device("cpu")


def test_peak_bytes_counts_what_lives_at_once():
    kept = []

    def work():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        kept.append(torch.empty(3000, dtype=torch.uint8))
        torch.empty(500, dtype=torch.uint8)

    assert peak_bytes(work) == (3500, 3000)


def test_spread_of_known_numbers():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "min": 1.0, "max": 5.0}
    assert set(spread([7.0]).values()) == {7.0}


def test_clock_runs_the_work_once():
    done = []
    assert clock(lambda: done.append(1)) >= 0
    assert done == [1]


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_paired_ratio_is_the_median_between_order_statistics():
    # ten pairs: the 2nd and 9th lowest cover the median with 1 - 2 * 11 / 1024
    found = paired_ratio([float(n) for n in range(1, 11)], [10.0] * 10)
    assert found == {"median": 0.55, "low": 0.2, "high": 0.9, "pairs": 10, "coverage": 1 - 22 / 1024}
    # six: the extremes just do, 1 - 2 / 64
    six = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6)
    assert (six["low"], six["high"], six["coverage"]) == (1.0, 6.0, 1 - 2 / 64)


def test_the_interval_covers_the_median_as_often_as_it_says():
    generator = random.Random(0)
    draws = [[generator.lognormvariate(0, 1) for _ in range(9)] for _ in range(2000)]
    found = [paired_ratio(draw, [1.0] * 9) for draw in draws]
    share = sum(one["low"] <= 1 <= one["high"] for one in found) / len(found)
    assert share == pytest.approx(found[0]["coverage"], abs=0.02) and found[0]["coverage"] >= 0.95


def test_few_pairs_have_their_extremes_and_say_how_little_that_covers():
    assert paired_ratio([2.0], [4.0]) == {"median": 0.5, "low": 0.5, "high": 0.5, "pairs": 1, "coverage": 0.0}
    assert paired_ratio([2.0, 1.0, 3.0], [1.0] * 3)["coverage"] == 0.75
    with pytest.raises(ValueError, match="1 and 2 times: a ratio needs pairs"):
        paired_ratio([1.0], [1.0, 2.0])


def test_rates_and_the_roofline():
    rates = measure_rates(torch.float32, CPU, size=64)
    assert rates.flops > 0 and rates.bytes > 0 and (rates.mm is None or 0 < rates.mm < rates.flops)
    rates = Rates(flops=1e9, bytes=1e8)
    assert rates.milliseconds(2e6, 1e5) == 2.0  # operations take longer
    assert rates.milliseconds(1e6, 1e6) == 10.0  # bytes do


def test_live_storage_counts_what_lives_at_once():
    x = torch.ones(100, requires_grad=True)  # was there before
    with LiveStorage() as live:
        y = x * 2  # 400 bytes
        z = y[:50]  # a view of them
        del y
        w = z.exp()  # 200 more, kept for backward
        del z
        w.sum().backward()
    # exp's result and its sum; then the sum's gradient, exp's, the slice's and that of x
    assert 600 <= live.peak <= 600 + 2 * 4 + 200 + 2 * 400
    with LiveStorage() as live:
        a = torch.empty(1000, dtype=torch.uint8)
        del a
        b = torch.empty(3000, dtype=torch.uint8)
        torch.empty(500, dtype=torch.uint8)
    assert live.peak == 3500 and len(b) == 3000


def test_peak_memory_counts_the_scratch_of_operators():
    out = []
    found = peak_memory(lambda: out.append(torch.randn(64, 64).sort(-1)), CPU)
    # the values and the indices stay; the input does not
    assert found.left == 64 * 64 * (4 + 8) and found.peak >= found.left + 64 * 64 * 4
