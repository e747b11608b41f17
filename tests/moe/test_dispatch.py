"""The plan of one process: who computes which row, in which order."""

import pytest
import torch

from gatewright.moe import DispatchPlan, ExpertParallel


def build(expert, source=None, weight=None, num_rows=4, num_experts=3):
    expert = torch.tensor(expert, dtype=torch.int64)
    return DispatchPlan.build(
        num_rows=num_rows,
        source=torch.arange(len(expert)) if source is None else torch.tensor(source),
        expert=expert,
        weight=weight,
        num_experts=num_experts,
        parallel=ExpertParallel(),
    )


def test_assignments_are_sorted_by_expert_and_keep_their_order():
    plan = build([2, 0, 2, 0, 1], source=[0, 1, 1, 3, 0], weight=torch.arange(5.0))
    assert plan.source.tolist() == [1, 3, 0, 0, 1]
    assert plan.weight.tolist() == [1, 3, 4, 0, 2]
    assert plan.counts_E.tolist() == [2, 1, 2]


def test_no_assignment_leaves_no_row():
    plan = build([-1, 1, -1, 1], weight=torch.arange(4.0))
    assert plan.source.tolist() == [1, 3] and plan.weight.tolist() == [1, 3] and plan.counts_E.tolist() == [0, 2, 0]
    for empty in (build([-1, -1]), build([])):
        assert empty.source.tolist() == [] and empty.counts_E.tolist() == [0, 0, 0]


def test_a_plan_runs_the_bank_on_its_rows():
    seen = {}

    def bank(x, counts, *, token, weight, combine):
        seen.update(counts=counts.tolist(), token=token.tolist(), combine=combine)
        scale = torch.arange(1.0, 4.0).repeat_interleave(counts)[:, None]
        return torch.zeros_like(x).index_add(0, token, x[token] * scale * weight[:, None])

    x = torch.eye(4)
    plan = build([2, 0, 1, -1], source=[0, 0, 3, 2], weight=torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    y, meanwhile = plan.run(x, bank, lambda: "meanwhile")
    assert meanwhile == "meanwhile" and seen == {"counts": [1, 1, 1], "token": [0, 3, 0], "combine": True}
    assert torch.equal(y, torch.diag(torch.tensor([13.0, 0.0, 0.0, 200.0])))
    assert plan.run(x, bank)[1] is None


@pytest.mark.parametrize("seed", range(3))
def test_plans_lose_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(-1, 5, (50,), generator=generator)
    source = torch.randint(20, (50,), generator=generator)
    plan = DispatchPlan.build(
        num_rows=20, source=source, expert=expert, weight=None, num_experts=5, parallel=ExpertParallel()
    )
    sorted_expert = torch.arange(5).repeat_interleave(plan.counts_E)
    pairs = sorted(zip(sorted_expert.tolist(), plan.source.tolist(), strict=True))
    assert pairs == sorted((e, s) for e, s in zip(expert.tolist(), source.tolist(), strict=True) if e >= 0)
    assert plan.weight is None
