"""The profile of a training step: each operator is counted once, in its kind."""

import json
import subprocess
import sys

import pytest
import torch

from gatewright.moe import ExpertSpec
from gatewright.moe.experts import GroupedExperts
from gatewright.recipes import profile_step


def test_the_kinds_of_known_operators():
    bank = GroupedExperts(ExpertSpec(8, 16, "gelu"), range(2))
    x, counts = torch.randn(6, 8), torch.tensor([2, 4])
    linear, optimizer = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function(profile_step.STEP):
            y = linear(bank(x, counts, backend="torch"))
            y[torch.tensor([1, 0])].exp()
            with torch.profiler.record_function(profile_step.OPTIMIZER):
                optimizer.weight.detach().exp()
    kinds = {event.name: profile_step.kind_of(event) for event in profiler.events()}
    assert kinds["aten::addmm"] == "other products"
    assert kinds["gatewright::expert_mlp"] == "experts' kernel"
    assert kinds["aten::index"] == "moving rows"
    exp = [profile_step.kind_of(event) for event in profiler.events() if event.name == "aten::exp"]
    assert exp == ["elementwise", "optimizer"]
    assert kinds[profile_step.STEP] == "outside operators"
    products = [profile_step.kind_of(event) for event in profiler.events() if event.name == "aten::mm"]
    assert products and set(products) == {"experts' products"}
    by_operator = profile_step.by_operator(profiler.events())
    step = next(event for event in profiler.events() if event.name == profile_step.STEP)
    assert sum(sum(own.values()) for own in by_operator.values()) == pytest.approx(step.cpu_time_total / 1e3, rel=0.05)


@pytest.fixture
def results():
    ms = dict.fromkeys(profile_step.KINDS, 10.0) | {"experts' products": 0.0, "experts' kernel": 30.0}
    return {
        "milliseconds": ms, "operators": {kind: {"aten::exp": 10.0} for kind in ms},
        "expert_products_at_least": 20.0, "size": "S", "batch": 8, "dtype": "float32",
        "machine": {"threads": 2, "cpu": "a CPU", "torch": "2"},
    }  # fmt: skip


def test_what_is_outside_products(results):
    assert "| moving rows | 10.0 | 11.1 % | exp 10.0 |" in profile_step.report(results)
    # of 90 ms the linear layers are 10; the kernel is 30, of which the products take at least 20
    assert "Outside matrix products: 55.6 % to 66.7 % (the native kernel" in profile_step.report(results)
    results["milliseconds"] |= {"experts' products": 20.0, "experts' kernel": 10.0}
    assert "Outside matrix products: 66.7 %;" in profile_step.report(results)


def test_a_step_of_the_recipe(tmp_path):
    out = tmp_path / "profile.json"
    options = ["--size", "tiny", "--batch", "2", "--steps", "1", "--threads", "1", "--out", str(out)]
    # in a process of its own: DeepSpeed's engine leaves its process group behind
    done = subprocess.run(
        [sys.executable, profile_step.__file__, *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert all(found["milliseconds"][kind] > 0 for kind in profile_step.KINDS if kind != "experts' products")
    # 2 samples of 49 tokens in 3 blocks: a routed or the unconditional expert each, 96 to 192 and back, 3 times
    assert found["expert_flops"] == 3 * 98 * 3 * 2 * 96 * (192 + 192)
    assert "| optimizer |" in done.stdout


def test_wrong_options(capsys):
    with pytest.raises(SystemExit):
        profile_step.main(["--batch", "0"])
    assert "--batch 0 --steps 3 --threads 2: choose at least 1 of each" in capsys.readouterr().err
