"""The program that measures what recording costs: it runs, and its arithmetic."""

import json

import pytest

from gatewright.recipes import recorder_overhead


def test_both_models_are_measured(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    small = ["--pairs", "2", "--every", "2", "--batch", "2", "--dim", "32", "--windows", "1", "--threads", "1"]
    recorder_overhead.main([*small, "--out", str(out)])
    found = json.loads(out.read_text())
    for name in ("promoe_dit", "language"):
        assert len(found[name]["on"]) == len(found[name]["off"]) == 2
        assert found[name]["steps"] == 2 + recorder_overhead.WARMUP and found[name]["log_bytes"] > 0
    printed = capsys.readouterr().out
    assert "upper 95 %" in printed and "| promoe_dit |" in printed and "| language |" in printed


def test_overhead_is_a_ratio_of_sums_with_a_bound_above_it():
    on, off = [1.02, 1.04, 1.0, 1.1], [1.0, 1.0, 1.0, 1.0]
    found = recorder_overhead.overhead(on, off)
    assert found["mean"] == pytest.approx(0.04) and found["median"] == pytest.approx(0.03)
    assert found["mean"] < found["upper"] <= 0.1 and found["step_ms"] == 1000
    assert recorder_overhead.overhead(off, off)["upper"] == 0


def test_an_unknown_model(capsys):
    with pytest.raises(SystemExit):
        recorder_overhead.main(["--models", "gpt"])
    assert "choose from promoe_dit, language" in capsys.readouterr().err
