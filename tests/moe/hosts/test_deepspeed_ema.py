"""The average of the weights: right, whole on every rank, and exchanged with the weights without a trace."""

import pytest
import torch
from deepspeed_toy import Run, micro_batch

pytestmark = pytest.mark.distributed


def check_average(stage, dtype, decay=0.5):
    """The average by definition, from the weights after each step; and what the model computes with it."""
    with Run("topk", stage=stage, ep=2, dtype=dtype, ema=decay, lr=1e-2) as run:
        expected = run.parameters()
        assert all(torch.equal(v, expected[n]) for n, v in run.average().items())
        for step in range(3):
            run.train(step, step + 1)
            d = min(decay, (2 + step) / (11 + step))
            for name, weight in run.parameters().items():
                if name != "position":  # frozen
                    expected[name] = d * expected[name] + (1 - d) * weight
        average, state = run.average(), run.state()
        for name, value in expected.items():
            torch.testing.assert_close(average[name], value, rtol=0, atol=1e-6)

        x, null = micro_batch(7, 0)
        run.engine.eval()
        with torch.no_grad():
            trained = run.engine(x.to(run.dtype), null).item()
            with run.ema.applied():
                averaged = run.engine(x.to(run.dtype), null).item()
                inside = run.parameters()
            again = run.engine(x.to(run.dtype), null).item()
        run.engine.train()
        assert all(torch.equal(inside[n], average[n]) for n in average)
        after = run.state()
        for kind in ("master", "ema", "exp_avg", "exp_avg_sq"):
            assert all(torch.equal(after[kind][n], v) for n, v in state[kind].items()), kind
        with pytest.raises(RuntimeError, match="leave the block first"), run.ema.applied():
            run.ema.update(4)
        return {"trained": trained, "averaged": averaged, "again": again, "next": run.train(3, 4), "average": average}


@pytest.mark.parametrize(
    "stage, dtype", [(0, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (1, "bfloat16"), (3, "bfloat16")]
)
def test_the_average_and_its_use(ranks, stage, dtype):
    first, second = ranks(2).run(check_average, stage, dtype)
    for result in (first, second):
        assert result["again"] == result["trained"] != result["averaged"]
    assert first["average"].keys() == second["average"].keys()
    for name, value in first["average"].items():
        assert torch.equal(second["average"][name], value), name
    # all experts, also those of the other rank
    assert len(first["average"]["blocks.0.moe.experts.w1"]) == 4


def check_model_with_average():
    """The model in evaluation with the average's weights, loaded into a plain model, computes the same."""
    from deepspeed_toy import Toy

    from gatewright.moe import ExpertParallel, MoELayer

    with Run("promoe", stage=3, ep=2, ema=0.5, lr=1e-2) as run:
        run.train(0, 3)
        plain = Toy("promoe", MoELayer, ExpertParallel())
        plain.load_state_dict(run.average(), strict=False)
        x, null = micro_batch(7, 0)
        run.engine.eval(), plain.eval()
        with torch.no_grad(), run.ema.applied():
            return run.engine(x, null).item(), plain(x, null).item()


def test_the_average_goes_into_a_plain_model(ranks):
    for engine, plain in ranks(2).run(check_model_with_average):
        assert engine == pytest.approx(plain, abs=1e-6)


def check_without_average():
    from gatewright.moe.hosts.deepspeed import EMA, ema_parameters

    with Run("promoe", stage=1) as run:
        with pytest.raises(ValueError, match="keeps no average"):
            ema_parameters(run.engine)
        run.engine.optimizer.optimizer.__class__ = type("Muon", (torch.optim.SGD,), {})
        with pytest.raises(ValueError, match="optimizer Muon: averages are kept beside the state of Adam"):
            EMA(run.engine)
    return True


def test_what_has_no_average_says_so(ranks):
    assert ranks(1).run(check_without_average) == [True]
