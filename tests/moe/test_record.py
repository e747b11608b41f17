"""The recorder: what it counts is what a slow loop over every decision counts, whatever the router, the micro-batches,
the padding and the ranks; what is no training is not counted."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from router_cases import CASES
from torch import nn
from torch.utils.checkpoint import checkpoint

from gatewright.moe import ExpertSpec, MoELayer, finish_step, metrics, record_sums
from gatewright.moe.record import Recorder, measures
from gatewright.moe.record_log import ACTIVE, MARGIN_EDGES, read_log
from gatewright.routers import TokenContext, create_router

DIM, LENGTH = 8, 6


class Model(nn.Module):
    """Layers one after the other, with residuals, of as many experts as asked for."""

    def __init__(self, router: str = "topk", experts: tuple[int, ...] = (4, 4), **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for layer, number in enumerate(experts):
            torch.manual_seed(layer)
            made = create_router(router, dim=DIM, num_experts=number, **options)
            self.blocks.append(MoELayer(made, ExpertSpec(DIM, 4), layer=layer))
        self.checkpoint = False

    def forward(self, x, context=None):
        routings = []
        for block in self.blocks:
            y, routing = checkpoint(block, x, context, use_reentrant=False) if self.checkpoint else block(x, context)
            x = x + y
            routings.append(routing)
        return x, routings


def tokens(seed: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, LENGTH, DIM, generator=torch.Generator().manual_seed(seed))


def backward(y, routings) -> None:
    (y.square().mean() + sum(routing.loss for routing in routings)).backward()


def by_loop(routing, router, real, length) -> dict[str, np.ndarray | float]:
    """What a window holds of one decision, token by token."""
    routed = [i for i, kind in enumerate(router.expert_kinds) if kind == "routed"]
    experts = len(routed)
    found = {
        "tokens": 0, "sampled": 0, "counts": np.zeros(experts), "requested": np.zeros(experts),
        "score_sum": np.zeros(experts), "entropy_sum": 0.0, "mass_sum": 0.0, "z_sum": 0.0, "logit_square_sum": 0.0,
        "active_histogram": np.zeros(ACTIVE), "margin_histogram": np.zeros(32), "drops": np.zeros((16, 2)),
    }  # fmt: skip
    if routing.selected is not None:
        chosen = [row.nonzero().flatten().tolist() for row in routing.selected]
    elif routing.dispatch is not None:
        chosen = [list(range(router.bank_size))] * routing.num_tokens
        found["counts"] += routing.load_E().numpy()
        found["requested"] += routing.load_E().numpy()
    else:
        chosen = [[e for e in row if e >= 0] for row in routing.as_topk()[0].tolist()]
    asked = chosen if routing.requested is None else routing.requested.tolist()
    for t in range(routing.num_tokens):
        mine = [routed.index(e) for e in chosen[t] if e in routed]
        wanted = [routed.index(e) for e in asked[t] if e in routed]
        if routing.dispatch is None:
            found["counts"][mine] += 1
            found["requested"][wanted] += 1
        if routing.requested is not None and routing.index is not None:
            found["drops"][t % length * 16 // length] += len(wanted) - len(mine), len(wanted)
        if not real[t]:
            continue
        scores = None if routing.scores is None else routing.scores[t, routed].detach().double().numpy()
        if "local" in router.expert_kinds and scores is not None and scores.sum() == 0:
            continue
        found["tokens"] += 1
        if scores is None or scores.sum() == 0:
            continue
        scores = scores / scores.sum()
        found["sampled"] += 1
        found["score_sum"] += scores
        found["entropy_sum"] -= sum(s * math.log(s) for s in scores if s > 0)
        found["mass_sum"] += scores[mine].sum()
        found["active_histogram"][min(len(mine), ACTIVE - 1)] += 1
        if routing.logits is None:
            continue
        z = routing.logits[t, routed].detach().double()
        found["z_sum"] += z.logsumexp(0).item() ** 2
        found["logit_square_sum"] += z[z.isfinite()].square().mean().item()
        ids = torch.tensor([mine or [-1]])
        margin = metrics.margins(z[None], ids).item()
        if not math.isnan(margin):
            found["margin_histogram"][max(0, np.searchsorted(MARGIN_EDGES, margin, side="right") - 1)] += 1
    return found


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_router_is_counted_as_by_a_loop(case, tmp_path):
    """Two micro-batches in one step, of whatever a router returns: lists, soft slots, selected, requested, kinds."""
    layer = MoELayer(case.create(), ExpertSpec(case.width, 4))
    context = case.context
    real = torch.ones(context.num_tokens, dtype=torch.bool) if context.real_T is None else context.real_T
    with Recorder(layer, tmp_path, every=1, sample=0, sample_every=1) as recorder:
        expected: dict = {}
        losses: dict[str, list[float]] = {}
        for scale in (1.0, -1.5):
            _, routing = layer(case.tokens() * scale, context)
            for name, value in by_loop(routing, layer.router, real, context.length).items():
                expected[name] = expected.get(name, 0) + value
            for name, value in routing.losses.items():
                losses.setdefault(name, []).append(value.item())
        recorder.step(0)
        window = recorder.window
    for name, value in expected.items():
        actual = getattr(window, name)[0]
        if name == "margin_histogram":
            # a margin within rounding of an edge may fall on either side
            assert np.abs(actual - value).sum() <= 2 and actual.sum() == value.sum()
        else:
            assert np.allclose(actual, value, rtol=2e-5, atol=1e-6), (name, actual, value)
    assert window.losses.keys() == losses.keys()
    for name, values in losses.items():
        assert window.losses[name][0] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-12)
    log = read_log(tmp_path)
    assert log.complete and log.notices == [] and np.array_equal(log.counts[0, 0], window.counts[0])
    assert all(np.isfinite(value).any() for value in (measures(window, recorder.layers)["entropy"],))


def test_windows_are_of_whole_steps_and_add_up(tmp_path):
    """Whatever the micro-batches, the same tokens give the same window."""
    model = Model(top_k=2, balance_weight=0.1)
    with Recorder(model, tmp_path / "whole", every=3, sample=0, sample_every=1, structure_every=1) as whole:
        for step in range(6):
            backward(*model(tokens(step, batch=4)))
            whole.step(step, loss=torch.tensor(1.0 + step), lr=0.1)
    with Recorder(model, tmp_path / "parts", every=3, sample=0, sample_every=1, structure_every=1) as parts:
        for step in range(6):
            for part in tokens(step, batch=4).split(1):
                backward(*model(part))
            parts.step(step)
    one, other = read_log(tmp_path / "whole"), read_log(tmp_path / "parts")
    assert one.steps.tolist() == other.steps.tolist() == [2, 5] and one.first_steps.tolist() == [0, 3]
    assert one.tokens.tolist() == [[3 * 4 * LENGTH] * 2] * 2 and np.array_equal(one.counts, other.counts)
    for name in ("score_sum", "entropy_sum", "mass_sum", "z_sum", "logit_square_sum", "margin_histogram"):
        assert np.allclose(getattr(one, name), getattr(other, name), rtol=1e-5), name
    assert one.scalars["loss"][1].tolist() == [1, 2, 3, 4, 5, 6] and one.scalars["lr"][0].tolist() == list(range(6))
    for (step, pairs, onwards), (same, pairs2, onwards2) in zip(one.structure, other.structure, strict=True):
        assert step == same and np.array_equal(pairs, pairs2) and np.array_equal(onwards, onwards2)


def test_structure_counts_all_pairs_and_what_follows(tmp_path):
    model = Model(experts=(4, 6), top_k=2)
    with Recorder(model, tmp_path, every=1, structure_every=2) as recorder:
        for step in range(4):
            _, routings = model(tokens(step))
            if step == 2:
                first, second = (routing.index for routing in routings)
            recorder.step(step)
    log = read_log(tmp_path)
    assert [step for step, *_ in log.structure] == [0, 2]
    _, pairs, onwards = log.structure[1]
    assert np.array_equal(pairs[1], metrics.coactivation(second, 6))
    assert np.array_equal(pairs[0, :4, :4], metrics.coactivation(first, 4)) and pairs[0].sum() == 4 * len(first)
    assert np.array_equal(onwards[0, :4], metrics.flow(first, second, 4, 6))
    step, cosines = log.similarity[0]
    assert step == 0 and np.allclose(np.diagonal(cosines[1]), 1) and cosines[0, 4:].sum() == 0
    assert np.allclose(cosines[1], metrics.cosines(model.blocks[1].router.weight.detach()), atol=1e-3)


def test_recomputation_counts_once(tmp_path):
    model = Model(top_k=2, balance_weight=0.1)
    windows = []
    for recompute in (False, True):
        model.checkpoint = recompute
        with Recorder(model, tmp_path / str(recompute), every=1, sample=0, sample_every=1) as recorder:
            backward(*model(tokens(0)))
            recorder.step(0)
            windows.append(recorder.window)
    assert np.array_equal(windows[0].counts, windows[1].counts) and windows[1].counts.sum() == 2 * 2 * 3 * LENGTH
    assert windows[0].losses["balance"].tolist() == windows[1].losses["balance"].tolist()


def test_evaluation_is_not_training(tmp_path):
    model = Model()
    with Recorder(model, tmp_path, every=1) as recorder:
        with torch.no_grad():
            model(tokens(0))
        model.eval()
        model(tokens(1))
        model.train()
        assert recorder.flush() is None and recorder.summary() == {}
        model(tokens(2))
        recorder.step(0)
    assert read_log(tmp_path).tokens.tolist() == [[3 * LENGTH] * 2]


def test_a_sample_is_looked_at_and_all_are_counted(tmp_path):
    model = Model(experts=(4, 4, 4), top_k=1)
    with Recorder(model, tmp_path, every=8, sample=32, sample_every=2) as recorder:
        for step in range(8):
            model(tokens(step, batch=40))
            recorder.step(step)
    window = recorder.window
    assert window.sampled.tolist() == [4 * 32] * 3 and window.tokens.tolist() == [8 * 40 * LENGTH] * 3
    assert np.allclose(window.score_sum.sum(1), 4 * 32) and window.active_histogram.sum() == 3 * 4 * 32
    share = window.score_sum / window.sampled[:, None]
    with Recorder(model, tmp_path / "all", every=8, sample=0, sample_every=1) as everything:
        for step in range(8):
            model(tokens(step, batch=40))
            everything.step(step)
    exact = everything.window.score_sum / everything.window.sampled[:, None]
    assert np.abs(share - exact).max() < 0.06


def test_the_model_is_not_changed_by_being_watched(tmp_path):
    """Bit for bit the same outputs, gradients and state, recorded or not; copies and pickles are not watched."""
    plain, watched = (Model("topk", top_k=2, bias_rate=0.1, balance_weight=0.1) for _ in range(2))
    recorder = Recorder(watched, tmp_path, every=2, structure_every=1)
    recorder.probe(lambda: watched(tokens(99)), every=1)
    for step in range(3):
        torch.manual_seed(step)
        outputs = []
        for model in (plain, watched):
            model.zero_grad()
            y, routings = model(tokens(step))
            backward(y, routings)
            finish_step(model)
            outputs.append(y)
        recorder.step(step)
        assert torch.equal(*outputs)
        for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
            assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), watched.buffers(), strict=True))
    counted = recorder.flush().counts.sum()
    copy.deepcopy(watched)(tokens(0))
    pickle.loads(pickle.dumps(watched))(tokens(0))
    recorder.step(3)
    assert recorder.flush().counts.sum() == 0 and counted > 0
    recorder.close()
    watched(tokens(0))
    recorder.close()
    assert not any(module._forward_hooks for module in watched.modules())


def test_the_probe_keeps_every_decision_and_its_labels(tmp_path):
    model = Model(experts=(4, 6), top_k=2)
    x = tokens(7, batch=2)
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    context = TokenContext.for_tokens(x, token_ids=ids, grid=(2, 3), timestep=torch.tensor([0.0, 800.0]))
    model.eval()
    model.blocks[0].train()
    with Recorder(model, tmp_path, every=10) as recorder:
        recorder.probe(lambda: model(x, context), labels={"class": ["b", "a"], "mark": ids}, every=2)
        recorder.run_probe(0)
        assert model.blocks[0].training and not model.blocks[1].training
        model.train()
        with torch.no_grad():
            expected = [routing.index for routing in model(x, context)[1]]
        for step in range(3):
            recorder.step(step)
    log = read_log(tmp_path)
    assert [probe.step for probe in log.probes] == [0, 2]
    for probe in log.probes:
        assert [np.array_equal(a, b) for a, b in zip(probe.index, expected, strict=True)] == [True, True]
    assert log.probe_labels["class"][0].tolist() == [1] * LENGTH + [0] * LENGTH
    assert log.probe_labels["class"][1] == ["a", "b"] and log.probe_labels["mark"][0].tolist() == list(range(12))
    assert log.probe_labels["token"][0].tolist() == list(range(12))
    assert log.probe_labels["timestep"][0].tolist() == [0] * LENGTH + [3] * LENGTH
    assert log.probe_labels["timestep"][1] == ["0 to 200", "200 to 400", "400 to 600", "600 to 800"]
    assert log.probe_labels["patch"][1][4] == "row 1, column 1" and log.probe_labels["patch"][0].tolist()[:7] == [
        0, 1, 2, 3, 4, 5, 0,
    ]  # fmt: skip
    assert log.tokens.sum() == 0, "a probe is no training"


def test_a_probe_with_labels_that_do_not_fit(tmp_path):
    model = Model()
    with Recorder(model, tmp_path) as recorder:
        with pytest.raises(ValueError, match="give one by recorder.probe"):
            recorder.run_probe(0)
        recorder.probe(lambda: model(tokens(0)), labels={"class": [1, 2]}, every=1)
        with pytest.raises(ValueError, match="'class' has 2 entries.*3 samples or 18 tokens"):
            recorder.run_probe(0)


def test_the_probe_shows_what_its_tokens_were_cut_from(tmp_path):
    model, x = Model(top_k=1), tokens(7, batch=20)
    context = TokenContext.for_tokens(x, grid=(2, 3))
    ramp = torch.arange(4.0)[:, None] + 4 * torch.arange(6.0)
    images = ramp.expand(20, 1, 4, 6) + torch.arange(20.0).view(20, 1, 1, 1)
    series = torch.arange(20.0)[:, None] * torch.ones(2048)
    texts = [f"<{place}>" for place in range(20 * LENGTH)]
    for name, show in {"images": images, "series": series, "texts": texts}.items():
        with Recorder(model, tmp_path / name) as recorder:
            recorder.probe(lambda: model(x, context), show=show, every=1)
            recorder.run_probe(0)
            recorder.run_probe(1)
        inputs = read_log(tmp_path / name).probe_inputs
        assert inputs.kind == name and len(read_log(tmp_path / name).probes) == 2
        if name == "images":
            assert inputs.values.shape == (16, 4, 6, 1) and inputs.grid == (2, 3) and inputs.lengths == [LENGTH] * 16
            stretched = (images[:16, 0] / images[:16].max() * 255).round()
            assert np.array_equal(inputs.values[..., 0], stretched.numpy().astype(np.uint8))
        elif name == "series":
            assert inputs.values.shape == (8, 1024) and (inputs.values == np.arange(8.0)[:, None]).all()
        else:
            assert inputs.values == texts and inputs.lengths == [LENGTH] * 20
    large = torch.full((20, 3, 200, 100), 7, dtype=torch.uint8)
    with Recorder(model, tmp_path / "large") as recorder, recorder.probing(0, show=large):
        model(x, context)
    inputs = read_log(tmp_path / "large").probe_inputs
    assert inputs.values.shape == (16, 64, 32, 3) and (inputs.values == 7).all(), "uint8 is not stretched"


@pytest.mark.parametrize(
    "show, grid, said",
    [
        (torch.zeros(3, 4, 8, 8), (2, 3), r"\(3, 4, 8, 8\).*1 or 3, H, W"),
        (torch.zeros(2, 1, 8, 8), (2, 3), "2 samples: give each of the 3"),
        (torch.zeros(3, 1, 8, 8), None, "no grid"),
        (["a"] * 17, None, "17 texts: give one for each of the 18 tokens"),
    ],
)
def test_what_cannot_be_shown(show, grid, said, tmp_path):
    model, x = Model(), tokens(0)
    with (
        Recorder(model, tmp_path) as recorder,
        pytest.raises(ValueError, match=said),
        recorder.probing(0, show=show),
    ):
        model(x, TokenContext.for_tokens(x, grid=grid))
    assert read_log(tmp_path).probes == []


def test_decisions_kept_or_added_up_at_once(tmp_path, monkeypatch):
    """However many are kept before they are added up, and however lengths change, the sums are the same."""

    def sums(limit: int, decisions: int = 1 << 30) -> dict[str, np.ndarray]:
        monkeypatch.setattr(record_sums, "HELD_BYTES", limit)
        monkeypatch.setattr(record_sums, "HELD_DECISIONS", decisions)
        model = Model("topk", (4, 6), top_k=2, balance_weight=0.1, capacity_factor=0.7)
        run = tmp_path / f"{limit}-{decisions}"
        with Recorder(model, run, every=6, sample_every=2) as recorder:
            for step in range(6):
                for part in range(1 + step % 2):
                    backward(*model(tokens(10 * step + part, batch=1 + step % 3)))
                    assert len(recorder._sums._held) <= max(decisions, 0)
                recorder.step(step)
        log = read_log(run)
        names = ("tokens", "counts", "requested", "sampled", "score_sum", "entropy_sum", "margin_histogram", "drops")
        return {name: getattr(log, name) for name in names} | log.losses

    kept = sums(1 << 30)
    assert kept["tokens"].sum() == 2 * LENGTH * (1 + 2 * 2 + 3 + 2 * 1 + 2 + 2 * 3) and kept["drops"].any()
    for limit in ((0,), (700,), (1 << 30, 3)):
        for name, values in sums(*limit).items():
            np.testing.assert_allclose(values, kept[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_router_can_be_probed(case, tmp_path):
    layer = MoELayer(case.create(), ExpertSpec(case.width, 4))
    with Recorder(layer, tmp_path) as recorder:
        recorder.probe(lambda: layer(case.tokens(), case.context), every=1)
        recorder.run_probe(0)
    index = read_log(tmp_path).probes[0].index[0]
    assert len(index) == case.context.num_tokens and index.max(initial=-1) < layer.router.num_experts
    rows = [[e for e in row if e >= 0] for row in index.tolist()]
    assert all(len(row) == len(set(row)) for row in rows)
    if case.context.real_T is not None:
        assert all(not row for row, real in zip(rows, case.context.real_T.tolist(), strict=True) if not real)


def test_going_on_after_a_kill_counts_nothing_twice(tmp_path):
    def train(steps, start=0, close=True):
        model = Model()
        recorder = Recorder(model, tmp_path, every=2)
        for step in range(start, steps):
            model(tokens(step))
            recorder.step(step, loss=float(step))
            if step == 3:
                recorder.flush()
        if close:
            recorder.close()

    train(7, close=False)
    train(10, start=4)
    log = read_log(tmp_path)
    assert log.steps.tolist() == [1, 3, 5, 7, 9] and log.session_starts == [0, 4]
    assert log.tokens.tolist() == [[2 * 3 * LENGTH] * 2] * 5 and log.notices == []
    assert log.scalars["loss"][1].tolist() == list(range(10))


def test_going_back_in_steps_replaces_what_was_recorded(tmp_path):
    model = Model()
    with Recorder(model, tmp_path, every=2) as recorder:
        for step in (0, 1, 2, 3, 1, 2):
            model(tokens(step))
            recorder.step(step)
    log = read_log(tmp_path)
    assert log.steps.tolist() == [1, 2] and log.session_starts == [0, 1]
    assert any("1 steps before a restart" in notice for notice in log.notices)


def test_every_window_is_looked_at(tmp_path):
    """Whatever ends it: its length, or a flush between."""
    model = Model()
    with Recorder(model, tmp_path, every=10, sample_every=4) as recorder:
        for step in range(12):
            model(tokens(step))
            recorder.step(step)
            if step == 5:
                recorder.flush()
    log = read_log(tmp_path)
    assert log.steps.tolist() == [5, 9, 11] and log.sampled[:, 0].tolist() == [2 * 18, 18, 18]


def test_summary_is_short_and_its_names_are_stable(tmp_path):
    model = Model(experts=(4, 6), top_k=2)
    with Recorder(model, tmp_path, every=1) as recorder:
        names = []
        for step in range(3):
            model(tokens(step))
            recorder.step(step)
            names.append(list(recorder.summary()))
        values = recorder.summary()
    assert names[0] == names[1] == names[2] and len(values) <= 20
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())
    window = recorder.window
    entropy = [metrics.collapse_aware_entropy(window.counts[i, :e], 2).item() for i, e in enumerate((4, 6))]
    assert values["routing/entropy"] == pytest.approx(np.mean(entropy))
    assert values["routing/entropy_least"] == pytest.approx(min(entropy))
    assert values["routing/experts_per_token"] == 2 and values["routing/tokens"] == 2 * 3 * LENGTH


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear has no MoELayer"):
        Recorder(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="every=0: choose at least 1"):
        Recorder(Model(), tmp_path, every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the routing log cannot be written"):
        Recorder(Model(), tmp_path / "file")


def test_a_full_disk_ends_the_recording_and_not_the_training(tmp_path, monkeypatch):
    model = Model()
    recorder = Recorder(model, tmp_path, every=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    model(tokens(0))
    recorder.step(0)
    monkeypatch.setattr(recorder._log, "window", full)
    with pytest.warns(UserWarning, match="not recorded any more.*No space left"):
        model(tokens(1))
        recorder.step(1)
    model(tokens(2))
    recorder.step(2)
    assert recorder.summary()["routing/tokens"] > 0
    recorder.close()
    assert read_log(tmp_path).steps.tolist() == [0]


def check_ranks(folder: str) -> tuple[list, int]:
    """Each rank has tokens of its own, and one of them more micro-batches."""
    rank = torch.distributed.get_rank()
    model = Model(top_k=2, balance_weight=0.1)
    with Recorder(model, folder, every=2, sample=0, sample_every=1, structure_every=1) as recorder:
        for step in range(4):
            for part in range(1 + rank):
                model(tokens(10 * step + rank + part))
            recorder.step(step)
        recorder.probe(lambda: model(tokens(5)), every=1)
        recorder.run_probe(4)
    return recorder.window.counts.tolist(), int(recorder.window.tokens[0])


@pytest.mark.distributed
def test_counts_are_summed_over_ranks_before_any_ratio(ranks, tmp_path):
    per_rank = ranks(2).run(check_ranks, str(tmp_path / "two"))
    assert per_rank[0] == per_rank[1]
    model = Model(top_k=2, balance_weight=0.1)
    with Recorder(model, tmp_path / "one", every=2, sample=0, sample_every=1, structure_every=1) as recorder:
        for step in range(4):
            for seed in (0, 1, 2):
                model(tokens(10 * step + seed))
            recorder.step(step)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert two.complete and two.steps.tolist() == [1, 3] and len(two.probes) == 1
    assert np.array_equal(one.counts, two.counts) and np.array_equal(one.tokens, two.tokens)
    assert np.allclose(one.entropy_sum, two.entropy_sum) and np.allclose(one.losses["balance"], two.losses["balance"])
    assert np.array_equal(one.structure[0][1], two.structure[0][1])


def check_refusal(folder: str) -> str:
    try:
        Recorder(Model(), folder)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_what_is_refused_is_refused_on_every_rank(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    said = ranks(2).run(check_refusal, str(tmp_path / "file"))
    assert all("cannot be written" in text and "nothing is recorded" in text for text in said)


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}, {"bias_rate": 0.1, "score": "sigmoid"}], ids=str)
def test_nothing_routed_is_recorded_as_nothing(options, tmp_path):
    """No token at all, or padding alone, beside a batch that has some."""
    model = Model(top_k=2, balance_weight=0.1, **options)
    with Recorder(model, tmp_path, every=1) as recorder:
        model(torch.zeros(0, LENGTH, DIM))
        x = tokens(0)
        model(x, TokenContext.for_tokens(x, padding_mask=torch.zeros(3, LENGTH, dtype=torch.bool)))
        recorder.step(0)
        assert recorder.window.tokens.tolist() == [0, 0] and recorder.window.counts.sum() == 0
        assert math.isnan(recorder.summary()["routing/entropy"])
        model(x)
        recorder.step(1)
        assert recorder.window.tokens.tolist() == [18, 18]
    assert read_log(tmp_path).tokens.tolist() == [[0, 0], [18, 18]]
