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


def test_the_tables(monkeypatch):
    """On made-up times: what is reached of the product's rate."""
    way = {"flops": 2e12, "bytes": 1.0}
    entrant = {"forward": {"median": 4.0}, "step": {"median": 10.0}}
    times = {
        "rates": {"bf16": {"flops": 1e15}},
        "cells": [
            {
                "row": "gpu_fine", "dtype": "bf16", "costs": {"layer": {"forward": way, "backward": way}},
                "layer": {"changing": {"entrants": {"gatewright": entrant}}},
            }
        ],
    }  # fmt: skip
    assert check_gpu.rates_table(times)[-1] == "| gpu_fine | bf16 | gatewright | 500 | 400 | 0.50 | 0.40 |"
