"""What the benchmarks measure with. No time is judged."""

import torch

from gatewright.tools.measure import clock, markdown, peak_bytes, spread


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
