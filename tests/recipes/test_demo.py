"""The demo as `make demo` runs it, judged by a digit classifier that knows nothing of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gatewright.recipes import promoe_dit
from gatewright.recipes.data import load_data
from gatewright.recipes.models import create_objective, draw_samples
from gatewright.recipes.models.dit import load_dit

AGREES = 0.8


def read_digit(x: Tensor) -> Tensor:
    """[B, 1, 28, 28] in [-1, 1] -> [B], by the classifier that ships inside ccexam (421,642 parameters)."""
    spec = importlib.util.find_spec("ccexam")
    if spec is None:
        pytest.skip("ccexam, which holds the digit classifier, is not installed: `make install` does it")
    weights = torch.load(Path(spec.origin).parent / "weights" / "mnist.pth", weights_only=True, map_location="cpu")
    classifier = nn.ModuleDict(
        {
            "features": nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            ),
            "classifier": nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10)),
        }
    )  # fmt: skip
    classifier.load_state_dict(weights)
    x = ((x.clamp(-1, 1) + 1) / 2 - 0.1307) / 0.3081
    with torch.no_grad():
        return classifier["classifier"](classifier["features"](x).flatten(1)).argmax(1)


def test_the_judge_reads_real_digits():
    validation = load_data("mnist5k").validation
    right = read_digit(validation.images(range(500))) == validation.labels[:500]
    assert right.float().mean() > 0.98


@pytest.mark.evidence
def test_guided_samples_are_the_digits_asked_for(tmp_path):
    run = tmp_path / "run"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = subprocess.run(
        [sys.executable, promoe_dit.__file__, "--out", str(run)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = load_dit(run)
    labels = torch.arange(10).repeat_interleave(10)
    samples = draw_samples(create_objective("flow", model.config), model, labels, guidance=2.0, steps=50, seed=1)
    agrees = (read_digit(samples) == labels).float().mean().item()
    assert agrees >= AGREES, f"the classifier agrees with {agrees:.0%} of 100 samples, less than {AGREES:.0%}"
