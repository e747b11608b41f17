"""From two ranks that share the experts to one process without DeepSpeed: a run, its export and its picture agree."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gatewright.recipes import sample_dit
from gatewright.tools import cli

PROGRAM = Path(sample_dit.__file__).with_name("promoe_dit.py")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OPTIONS = ["--data", "digits", "--steps", "3", "--batch", "16", "--lr", "0.01", "--ep", "2", "--zero", "2"]
PICTURE = ["--sample_per_class", "2", "--sample_steps", "3", "--guidance", "1.5", "--seed", "4"]


@pytest.mark.distributed
def test_a_run_on_two_ranks_is_drawn_by_one(tmp_path):
    pytest.importorskip("deepspeed")
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = [sys.executable, *LAUNCHER, str(PROGRAM), *OPTIONS, *PICTURE, "--out", str(tmp_path / "run")]
    done = subprocess.run(words, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0

    own = picture(tmp_path / "run" / "samples.png")
    for source in ("run", "export"):
        out = tmp_path / f"{source}.png"
        options = ["--count", "2", "--steps", "3", "--guidance", "1.5", "--seed", "4", "--device", "cpu"]
        sample_dit.main([str(tmp_path / source), *options, "--out", str(out)])
        drawn = picture(out)
        assert drawn.shape == own.shape
        assert np.abs(drawn - own).max() <= 1  # a rounding of the sums, after which 0 to 255 may round the other way
    assert len(np.unique(own)) > 50


def picture(path):
    return np.asarray(Image.open(path)).astype(int)
