"""The program that times the flagship's step: its variants are one model, and its numbers belong together."""

import json

import pytest
import torch

from gatewright.moe import ExpertSpec
from gatewright.moe.experts import GroupedExperts
from gatewright.recipes import bench_flagship


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("combine", [False, True])
def test_the_loop_computes_what_the_bank_does(bias, combine):
    bank = GroupedExperts(ExpertSpec(6, 10, "swiglu", bias=bias), range(3), dtype=torch.float64)
    torch.nn.init.normal_(bank.w3)
    counts = torch.tensor([4, 0, 3])
    token = torch.tensor([0, 2, 3, 4, 1, 2, 4])
    results = []
    for run in (bank, lambda *args, **options: bench_flagship.loop_over_experts(bank, *args, **options)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, 6, dtype=torch.float64, generator=generator).requires_grad_()
        weight = torch.rand(7, dtype=torch.float64, generator=generator).requires_grad_()
        y = run(x, counts, token=token, weight=weight, combine=combine)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, weight.grad, bank.w1.grad, bank.w2.grad])
        bank.zero_grad()
    torch.testing.assert_close(*results)


def test_two_ranks_share_the_experts(tmp_path, capsys):
    """A run ends with an error where the variants' losses differ, so that it ends is half of the test."""
    out = tmp_path / "numbers.json"
    options = ["--size", "tiny", "--batch", "2", "--rounds", "2", "--models", "topk", "--ep", "2"]
    bench_flagship.main([*options, "--out", str(out)])
    (found,) = json.loads(out.read_text())["found"]
    assert (found["model"], found["ep"], found["tokens"], found["failed"]) == ("topk", 2, 2 * 49, {})
    assert set(found["seconds"]) == {"gatewright", "loop over experts", "DeepSpeed AutoEP"}
    assert set(found["ratios"]) == {"loop over experts", "DeepSpeed AutoEP"}
    for name, seconds in found["seconds"].items():
        assert found["tokens_per_second"][name] == pytest.approx(98 / seconds["median"])
    losses = found["losses"]
    assert losses["DeepSpeed AutoEP"] == pytest.approx(losses["gatewright"], rel=1e-5)
    assert losses["gatewright"][0] != losses["gatewright"][1]
    assert "| topk | 2 | DeepSpeed AutoEP |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ep", "3"], "--ep 3: choose a number of ranks that divides the batch of 8"),
        (["--models", "gpt"], "--models gpt: choose from promoe, topk"),
        (["--dtype", "fp8"], "--dtype fp8: choose float32 or bfloat16"),
        (["--rounds", "0"], "--rounds 0: choose at least 1"),
        (["--size", "huge"], 'unknown size "huge"'),
        (["--route", "1"], "unknown option --route: did you mean"),
    ],
)
def test_wrong_options(options, said, capsys):
    with pytest.raises(SystemExit):
        bench_flagship.main(options)
    assert said in capsys.readouterr().err
