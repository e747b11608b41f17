"""gatewright check-gpu: without a GPU it says so; in the interpreter it checks values and writes what it found."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gatewright.tools import check_gpu
from gatewright.tools.cli import main
from gatewright.tools.expert_case import ExpertCase, too_far

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@without_a_gpu
def test_says_that_no_gpu_is_here(capsys):
    assert main(["check-gpu"]) == 2
    assert "no GPU is here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--out", "gpu.txt"], "ends in .json"), (["--minutes", "0"], "more than 0")]
)
def test_says_what_is_wrong(arguments, message, capsys):
    assert main(["check-gpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_checks_values_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "new" / "gpu.json"
    command = [sys.executable, "-m", "gatewright.tools.cli", "check-gpu", "--interpret", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["times"] is None and results["machine"]["gpu"] is None and results["machine"]["triton"]
    assert {one["name"] for one in results["checks"]} == {
        "values, triton, fp32", "values, triton, fp16", "compile and recompute, triton", "kept for backward, triton",
    }  # fmt: skip
    assert all(one["passed"] for one in results["checks"])
    assert out.with_suffix(".md").read_text().strip() == done.stdout.strip()
    assert os.environ.get("TRITON_INTERPRET") is None


def test_a_check_that_fails_is_told(capsys):
    def broken(device):
        raise AssertionError("off by\none")

    outcomes = check_gpu.run_checks({"good": lambda device: "fine", "broken": broken}, torch.device("cpu"), print)
    assert [(one.name, one.passed) for one in outcomes] == [("good", True), ("broken", False)]
    assert outcomes[1].detail == "AssertionError: off by one"
    assert "FAILED  broken" in capsys.readouterr().out


def test_an_error_that_is_too_large_is_found():
    case = ExpertCase([70, 30], 20)
    errors = case.errors(torch.float32, "cpu")
    assert not too_far(errors, torch.float32)
    for wrong in (2e-6, float("inf")):
        assert too_far(errors | {"x": (wrong, 1e-7)}, torch.float32).keys() == {"x"}
    # within the tolerance, but far above what the reference rounds
    assert too_far({"x": (9e-3, 2e-3)}, torch.bfloat16) and not too_far({"x": (3e-3, 2e-3)}, torch.bfloat16)


@pytest.mark.parametrize("name", check_gpu.ROUTERS)
def test_the_layers_that_are_captured_run(name):
    layer, context, x = check_gpu.make_layer(name, None, torch.device("cpu"))
    found = check_gpu.gradients(layer, context, x.requires_grad_())
    assert len(found) >= 4 and all(value.isfinite().all() for value in found)


def test_the_tables():
    """On made-up times: what is reached of the product's rate, and which goals are met."""
    way = {"flops": 2e12, "bytes": 1.0}

    def entrant(forward, step):
        return {"forward": {"median": forward}, "step": {"median": step}}

    ratios = {"one": {"step": {"low": 0.9, "high": 1.1}}, "two": {"step": {"low": 1.01, "high": 1.2}}}
    cell = {
        "row": "fine", "dtype": "bf16", "costs": {"layer": {"forward": way, "backward": way}},
        "shape": check_gpu.PUBLISHED_SHAPE,
        "memory": {"gatewright": {"peak": 5}, "one": {"peak": 5}, "two": {"peak": 4}},
        "layer": {
            "changing": {
                "entrants": {"gatewright": entrant(4.0, 10.0), "one": entrant(4, 11), "two": entrant(4, 9)},
                "ratios": ratios,
            }
        },
    }  # fmt: skip
    coarse = cell | {"row": "coarse", "shape": check_gpu.PUBLISHED_SHAPE | {"experts": 8}}
    times = {"rates": {"bf16": {"flops": 5e14}}, "cells": [cell, coarse]}
    assert "| fine | bf16 | gatewright | 500 | 400 | 1.00 | 0.80 |" in check_gpu.rates_table(times)
    assert check_gpu.goals_table(times)[2:] == [
        "| fine | bf16 | forward at 501 and both at 413 TFLOP/s | 500 and 400 | missed |",
        "| fine | bf16 | no slower than any peer | slower than two | missed |",
        "| fine | bf16 | no more memory than any peer | more than two | missed |",
        "| coarse | bf16 | both at 0.8 of the product's rate | 0.80 | met |",
        "| coarse | bf16 | no slower than any peer | slower than two | missed |",
        "| coarse | bf16 | no more memory than any peer | more than two | missed |",
    ]
