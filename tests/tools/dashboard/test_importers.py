"""Logs made of counts, of Megatron-LM's trace and of router logits: what goes in comes out, the rest is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gatewright.moe.metrics import load_entropy, max_violation
from gatewright.moe.record_log import MARGIN_EDGES, read_log
from gatewright.tools import cli
from gatewright.tools.dashboard import importers
from gatewright.tools.dashboard.importers import import_router_logits, import_routing

SHARED = Path(__file__).parents[3] / "../shared/data/olmoe_routing_counts.json"

# https://github.com/allenai/OLMoE, layers 0, 7 and 15: load entropy over ln E, and MaxVio, to the digits they print in.
GOLDEN = {
    ("OLMoE-1B-7B", "c4"): (".990 .982 .968", "2.02 1.66 1.50"),
    ("OLMoE-1B-7B", "github"): (".961 .851 .853", "4.01 5.16 3.51"),
    ("OLMoE-1B-7B", "arxiv"): (".943 .866 .864", "6.81 5.28 6.49"),
    ("OLMoE-1B-7B", "book"): (".966 .930 .926", "2.63 3.06 1.93"),
    ("OLMoE-1B-7B", "wikipedia"): (".939 .913 .829", "5.18 5.78 3.65"),
    ("Mixtral-8x7B", "arxiv"): (".996 .998 .985", ".27 .13 .17"),
}


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_lines(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- counts ---------------------------------------------------------------------------------------------------------


def test_counts_of_one_step(tmp_path):
    source = write_json(tmp_path / "c.json", {"top_k": 2, "layers": {"1": [3, 5, 2], "0": [4, 0, 4, 2]}})
    assert import_routing(source, tmp_path / "run") == [tmp_path / "run"]
    log = read_log(tmp_path / "run")
    assert log.complete and log.notices == [] and log.options["imported"] == "counts"
    assert [(layer.name, layer.layer, layer.experts, layer.top_k) for layer in log.layers] == [
        ("0", 0, 4, 2.0),
        ("1", 1, 3, 2.0),
    ]
    assert log.counts.tolist() == [[[4, 0, 4, 2], [3, 5, 2, 0]]] and np.array_equal(log.counts, log.requested)
    assert log.tokens.tolist() == [[5, 5]] and log.sampled.tolist() == [[0, 0]]


def test_counts_a_step(tmp_path):
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 90, (4, 2, 8))
    source = write_lines(
        tmp_path / "c.jsonl",
        [
            {"step": 10 * s, "tokens": 100, "layers": {"blocks.3.mlp": a.tolist(), "blocks.5.mlp": b.tolist()}}
            for s, (a, b) in enumerate(rows)
        ],
    )
    import_routing(source, tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log.steps.tolist() == [0, 10, 20, 30] and log.first_steps.tolist() == [0, 1, 11, 21]
    assert np.array_equal(log.counts, rows) and [layer.layer for layer in log.layers] == [3, 5]
    assert np.isnan(log.layers[0].top_k) and (log.tokens == 100).all()


def test_models_and_domains_become_runs(tmp_path):
    domains = {d: {"0": [1 + i, 3 - i, 2, 2], "7": [2, 2, 2, 2]} for i, d in enumerate(("prose", "../code"))}
    source = write_json(tmp_path / "m.json", {"models": {"A/B": {"num_experts": 4, "top_k": 2, "domains": domains}}})
    runs = import_routing(source, tmp_path / "out")
    assert runs == [tmp_path / "out/A_B/prose", tmp_path / "out/A_B/_code"]
    assert [read_log(run).counts[0, 0].tolist() for run in runs] == [[1, 3, 2, 2], [2, 2, 2, 2]]
    assert [layer.layer for layer in read_log(runs[0]).layers] == [0, 7]


@pytest.mark.skipif(not SHARED.is_file(), reason="the OLMoE and Mixtral counts are not here")
def test_olmoe_and_mixtral_read_as_they_print(tmp_path):
    runs = import_routing(SHARED, tmp_path)
    assert len(runs) == 10
    for (model, domain), (entropies, violations) in GOLDEN.items():
        log = read_log(tmp_path / model / domain)
        assert [layer.layer for layer in log.layers] == [0, 7, 15] and (log.tokens == 208_896).all()
        counts = torch.from_numpy(log.counts[0])
        assert load_entropy(counts).tolist() == pytest.approx([float(x) for x in entropies.split()], abs=0.0005)
        assert max_violation(counts).tolist() == pytest.approx([float(x) for x in violations.split()], abs=0.005)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no JSON"),
        ("hello", "is no JSON"),
        ("[1, 2]", "holds a JSON list"),
        ('{"a": 1}', "none of the keys layers, models and top_indices"),
        ('{"layers": {}, "top_k": 1}', "no layers"),
        ('{"layers": {"0": [1, 2]}}', "neither tokens nor top_k"),
        ('{"layers": {"0": [1, 2.5]}, "top_k": 1}', "whole numbers"),
        ('{"layers": {"0": [1, -2]}, "top_k": 1}', "whole numbers"),
        ('{"layers": {"0": [1, true]}, "top_k": 1}', "whole numbers"),
        ('{"layers": {"0": []}, "top_k": 1}', "whole numbers"),
        ('{"layers": {"0": [99999999999999999999999]}, "top_k": 1}', "whole numbers"),
        ('{"layers": {"0": {"a": 1}}, "top_k": 1}', "whole numbers"),
        ('{"layers": {"0": [1, 2]}, "top_k": 3}', "top_k is 3, of 2 experts"),
        ('{"layers": {"0": [1, 2]}, "top_k": "x"}', "top_k is 'x'"),
        ('{"layers": {"0": [1, 2]}, "top_k": NaN}', "top_k is nan"),
        ('{"layers": {"0": [9, 2]}, "tokens": 5, "top_k": 2}', "cannot have 11 assignments"),
        ('{"layers": {"0": [9, 2]}, "tokens": -5}', "tokens is -5"),
        (
            '{"step": 1, "layers": {"0": [1]}, "top_k": 1}\n{"step": 1, "layers": {"0": [1]}, "top_k": 1}',
            "after step 1",
        ),
        (
            '{"step": 1, "layers": {"0": [1]}, "top_k": 1}\n{"step": 2, "layers": {"1": [1]}, "top_k": 1}',
            "other layers",
        ),
        (
            '{"step": 1, "layers": {"0": [1]}, "top_k": 1}\n{"step": 2, "layers": {"0": [1, 1]}, "top_k": 1}',
            "2 experts",
        ),
        ('{"step": 1, "layers": {"0": [1]}, "top_k": 1}\n7\n', "line 2: expected a JSON object"),
        ('{"models": {}}', "holds no counts"),
        ('{"models": {"a": {"domains": {}}}}', "holds no counts"),
        ('{"models": {"a": {"domains": {"b": {"0": [1]}}}}}', "is damaged"),
        ('{"models": {"a": {"num_experts": 3, "top_k": 1, "domains": {"b": {"0": [1]}}}}}', "num_experts is 3"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_counts_that_are_refused(tmp_path, content, said, capsys):
    source = tmp_path / "c.json"
    source.write_text(content)
    assert cli.main(["import-routing", str(source), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_made(tmp_path, capsys):
    source = write_json(tmp_path / "c.json", {"layers": {"0": [4, 0, 4, 2], "1": [3, 5, 2, 0]}})
    out = tmp_path / "run"
    assert cli.main(["import-routing", str(source), "--out", str(out), "--top-k", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 2 layers of 4 experts, 1 steps, 5 tokens" in said and f"gatewright dashboard {out}" in said
    assert cli.main(["import-routing", str(source), "--out", str(out), "--top-k", "2"]) == 2
    assert "holds a routing log already" in capsys.readouterr().err
    assert cli.main(["import-routing", str(tmp_path / "gone.json"), "--out", str(out)]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_document_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(importers, "LARGEST_TEXT", 100)
    source = tmp_path / "c.json"
    source.write_text(json.dumps({"top_k": 1, "layers": {"0": [1] * 100}}, indent=1))
    with pytest.raises(ValueError, match="is larger than .* write JSON Lines"):
        import_routing(source, tmp_path / "run")


# --- Megatron-LM ----------------------------------------------------------------------------------------------------


def trace_record(step, layer, index, rank=0, **more):
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": len(index),
        "topk": len(index[0]) if len(index) else 2,
        "top_indices": np.asarray(index).tolist(),
    } | more


def write_trace(folder, *, steps=3, layers=(2, 4), ranks=2, micro_batches=2, experts=6, logits=False, seed=0):
    """A trace as the tracer writes it, and its decisions by (step, layer): a list of ids [T, 2]."""
    draw, truth = np.random.default_rng(seed), {}
    for rank in range(ranks):
        records, halves = [], []
        offset = 0
        for step in range(steps):
            for _ in range(micro_batches):
                for layer in layers:
                    z = torch.from_numpy(draw.normal(0, 1, (5 + rank, experts))).to(torch.bfloat16)
                    index = z.float().topk(2, dim=1).indices.numpy()
                    truth.setdefault((step, layer), []).append((rank, index, z.float().numpy()))
                    more = {}
                    if logits:
                        data = z.view(torch.int16).numpy().tobytes()
                        more = {"logit_offset": offset, "logit_bytes": len(data), "logit_shape": list(z.shape)}
                        offset += len(data)
                        halves.append(data)
                    records.append(trace_record(step, layer, index, rank, **more))
        write_lines(folder / f"router_trace_rank{rank}.jsonl", records)
        if logits:
            (folder / f"logits_rank{rank}.bin").write_bytes(b"".join(halves))
    return truth


def test_a_megatron_trace(tmp_path):
    truth = write_trace(tmp_path / "trace")
    import_routing(tmp_path / "trace", tmp_path / "run", experts=6)
    log = read_log(tmp_path / "run")
    assert [layer.name for layer in log.layers] == ["decoder.layers.2", "decoder.layers.4"]
    assert [layer.top_k for layer in log.layers] == [2.0, 2.0] and log.steps.tolist() == [0, 1, 2]
    assert (log.tokens == 2 * (5 + 6)).all() and (log.sampled == 0).all()
    for step in range(3):
        for place, layer in enumerate((2, 4)):
            expected = np.bincount(np.concatenate([i.ravel() for _, i, _ in truth[step, layer]]), minlength=6)
            assert log.counts[step, place].tolist() == log.requested[step, place].tolist() == expected.tolist()
    [(step, together, onwards)] = log.structure
    pairs, steps_on = np.zeros((6, 6), int), np.zeros((6, 6), int)
    for (_, a, _), (_, b, _) in zip(truth[2, 2], truth[2, 4], strict=True):
        for x, y in zip(a, b, strict=True):
            for i in x:
                pairs[i, x] += 1
                steps_on[i, y] += 1
    assert step == 2 and np.array_equal(together[0], pairs) and np.array_equal(onwards[0], steps_on)


def test_the_logits_beside_a_trace(tmp_path):
    truth = write_trace(tmp_path / "trace", logits=True)
    import_routing(tmp_path / "trace", tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log.layers[0].experts == 6 and "experts" in log.options
    for step, place, layer in ((0, 0, 2), (2, 1, 4)):
        z = np.concatenate([z for _, _, z in truth[step, layer]]).astype(float)
        check_decisions(log, step, place, z, 2)
    (tmp_path / "trace/logits_rank1.bin").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"logits_rank1.bin ends before the logits of router_trace_rank1.jsonl, line 1"
    ):
        import_routing(tmp_path / "trace", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def check_decisions(log, step, place, z, top_k):
    """Token by token, against the window's sums."""
    scores, entropy, mass, zs, squares, margins = np.zeros(z.shape[1]), 0.0, 0.0, 0.0, 0.0, []
    for row in z:
        s = np.exp(row) / np.exp(row).sum()
        ordered = np.sort(row)[::-1]
        scores += s
        entropy -= sum(x * np.log(x) for x in s)
        mass += np.sort(s)[::-1][:top_k].sum()
        zs += np.log(np.exp(row).sum()) ** 2
        squares += np.mean(row**2)
        margins.append((ordered[top_k - 1] - ordered[top_k]) / row.std())
    assert log.sampled[step, place] == log.tokens[step, place] == len(z)
    assert log.score_sum[step, place, : z.shape[1]] == pytest.approx(scores, rel=1e-6)
    assert log.entropy_sum[step, place] == pytest.approx(entropy, rel=1e-6)
    assert log.mass_sum[step, place] == pytest.approx(mass, rel=1e-6)
    assert log.z_sum[step, place] == pytest.approx(zs, rel=1e-6)
    assert log.logit_square_sum[step, place] == pytest.approx(squares, rel=1e-6)
    assert log.margin_histogram[step, place].tolist() == np.histogram(margins, MARGIN_EDGES)[0].tolist()
    assert log.active_histogram[step, place, top_k] == len(z)


def test_layers_that_predict_further_tokens_come_last(tmp_path):
    records = [trace_record(0, 3, [[0, 1]], block="mtp", mtp_idx=1), trace_record(0, 3, [[2, 0]])]
    import_routing(write_lines(tmp_path / "router_trace_rank0.jsonl", records), tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert [(layer.name, layer.layer) for layer in log.layers] == [
        ("decoder.layers.3", 3),
        ("mtp.layers.1.layers.3", 4),
    ]
    assert log.counts[0].tolist() == [[1, 0, 1], [1, 1, 0]]


def test_a_trace_that_was_cut_off_in_its_last_line(tmp_path, capsys):
    write_trace(tmp_path / "trace", ranks=1)
    file = tmp_path / "trace/router_trace_rank0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    import_routing(tmp_path / "trace", tmp_path / "run", experts=6)
    assert capsys.readouterr().err.count("the last line was cut off") == 1
    assert read_log(tmp_path / "run").tokens.tolist() == [[10, 10], [10, 10], [10, 5]]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([trace_record(0, 0, [[0, 1]]), {"top_indices": [[0, 1]]}], "line 2: no record of a routing trace"),
        ([trace_record(0, 0, [[0, 1], [2, 3]], num_tokens=5)], "num_tokens is 5"),
        ([trace_record(0, 0, [[0, 1]], top_indices=[[0], [1, 2]])], "no record of a routing trace"),
        ([trace_record(0, 0, [[0, 1]], top_indices="abc")], "no record of a routing trace"),
        ([trace_record("1", 0, [[0, 1]])], "no record of a routing trace"),
        ([trace_record(0, 0, [[1, 1]])], "names an expert twice"),
        ([trace_record(0, 0, [[1, -2]])], "names an expert twice, or one below 0"),
        ([trace_record(0, 0, [[0, 2**31]])], "ids go up to 32766"),
        ([trace_record(5, 0, [[0, 1]]), trace_record(4, 0, [[0, 1]])], "step 4 after step 5"),
        ([trace_record(0, 0, [[0, 1]]), trace_record(0, 0, [[0, 1, 2]])], "3 experts a token, and 2 before"),
        ([trace_record(0, 0, [[0, 1]], logit_offset=0, logit_bytes=4, logit_shape=[2, 1])], "logits of shape"),
    ],
)
def test_traces_that_are_refused(tmp_path, records, said, capsys):
    write_lines(tmp_path / "trace/router_trace_rank0.jsonl", records)
    (tmp_path / "trace/logits_rank0.bin").write_bytes(b"\0" * 4)
    assert cli.main(["import-routing", str(tmp_path / "trace"), "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_more_experts_in_the_trace_than_said(tmp_path):
    write_trace(tmp_path / "trace")
    with pytest.raises(ValueError, match="ids up to 5, and experts is 4"):
        import_routing(tmp_path / "trace", tmp_path / "run", experts=4)


# --- router logits --------------------------------------------------------------------------------------------------


def make_logits(layers=3, batch=2, length=5, experts=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch * length, experts, generator=draw) for _ in range(layers))


def test_router_logits(tmp_path):
    logits = make_logits()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    import_router_logits([(logits, mask)], tmp_path / "run", top_k=2)
    log = read_log(tmp_path / "run")
    real = [z.double().numpy()[mask.flatten().bool().numpy()] for z in logits]
    assert (log.tokens == 8).all() and len(log.layers) == 3
    for place, z in enumerate(real):
        index = np.argsort(-z, axis=1)[:, :2]
        assert log.counts[0, place].tolist() == np.bincount(index.ravel(), minlength=6).tolist()
        assert np.array_equal(log.probes[0].index[place], index)
        check_decisions(log, 0, place, z, 2)
    shaped = [z.reshape(2, 5, 6) for z in logits]
    import_router_logits([(shaped, mask)], tmp_path / "shaped", top_k=2)
    assert np.array_equal(read_log(tmp_path / "shaped").counts, log.counts)


def test_checkpoints_of_one_model_make_one_run(tmp_path):
    for step in (0, 100, 50):
        import_router_logits([(make_logits(seed=step), None)], tmp_path / "run", top_k=2, step=step)
    assert read_log(tmp_path / "run").steps.tolist() == [0, 50]  # what a restart at 50 replaces
    import_router_logits([(make_logits(seed=100), None)], tmp_path / "run", top_k=2, step=100)
    log = read_log(tmp_path / "run")
    assert log.steps.tolist() == [0, 50, 100] and [probe.step for probe in log.probes] == [0, 50, 100]
    with pytest.raises(ValueError, match="another model"):
        import_router_logits([(make_logits(experts=7), None)], tmp_path / "run", top_k=2, step=200)
    import_routing(write_json(tmp_path / "c.json", {"top_k": 1, "layers": {"0": [1, 2]}}), tmp_path / "counts")
    with pytest.raises(ValueError, match="not made of router logits"):
        import_router_logits([(make_logits(), None)], tmp_path / "counts", top_k=2, step=200)


def test_batches_are_added_up_and_labels_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(importers, "_CHUNK", 3)
    monkeypatch.setattr(importers, "PROBE_TOKENS", 15)
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 2)
    ids = torch.arange(100, 110).reshape(2, 5)
    domain = torch.tensor([[0] * 5, [1] * 5])
    batches = ((make_logits(seed=s), mask, {"token": ids, "domain": domain}) for s in range(3))
    import_router_logits(batches, tmp_path / "run", top_k=2, label_names={"domain": ["prose", "code"]})
    log = read_log(tmp_path / "run")
    assert (log.tokens == 24).all() and len(log.steps) == 1 and len(log.probes[0].index[0]) == 15
    expected = [
        np.bincount(
            torch.cat([make_logits(seed=s)[0][mask.flatten().bool()] for s in range(3)]).topk(2, 1).indices.flatten(),
            minlength=6,
        )
    ]
    assert log.counts[0, :1].tolist() == [row.tolist() for row in expected]
    values, names = log.probe_labels["token"]
    assert [names[v] for v in values[:8]] == ["100", "101", "102", "103", "105", "106", "107", "108"]
    assert (
        log.probe_labels["domain"][1] == ["prose", "code"]
        and log.probe_labels["domain"][0][:8].tolist() == [0] * 4 + [1] * 4
    )


def test_scores_by_sigmoid(tmp_path):
    logits = make_logits(layers=1)
    import_router_logits([(logits, None)], tmp_path / "run", top_k=2, score="sigmoid")
    s = logits[0].double().sigmoid()
    s = s / s.sum(1, keepdim=True)
    log = read_log(tmp_path / "run")
    assert log.score_sum[0, 0] == pytest.approx(s.sum(0).numpy(), rel=1e-6)
    assert log.entropy_sum[0, 0] == pytest.approx(-(s * s.log()).sum().item(), rel=1e-6)


def test_experts_that_are_not_eligible(tmp_path):
    logits = make_logits(layers=1)[0]
    logits[:, 4] = -torch.inf
    import_router_logits([((logits,), None)], tmp_path / "run", top_k=2)
    log = read_log(tmp_path / "run")
    assert log.score_sum[0, 0, 4] == 0 and np.isfinite(log.logit_square_sum).all() and log.margin_histogram.sum() == 10


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_saved_router_logits(tmp_path, suffix):
    mask, ids = torch.tensor([[1, 1, 1, 1, 0]] * 2), torch.arange(10).reshape(2, 5)
    (tmp_path / "saved").mkdir()
    for batch in range(2):
        logits = make_logits(layers=11, seed=batch)
        arrays = {f"router_logits.{i}": z for i, z in enumerate(logits)} | {"attention_mask": mask, "input_ids": ids}
        file = tmp_path / f"saved/batch{batch}.{suffix}"
        if suffix == "npz":
            np.savez(file, **{name: array.numpy() for name, array in arrays.items()})
        else:
            save_file({n: a.to(torch.bfloat16) if a.is_floating_point() else a for n, a in arrays.items()}, file)
    assert cli.main(["import-routing", str(tmp_path / "saved"), "--out", str(tmp_path / "run"), "--top-k", "2"]) == 0
    given = [[z if suffix == "npz" else z.to(torch.bfloat16) for z in make_logits(layers=11, seed=b)] for b in range(2)]
    import_router_logits([(z, mask, {"token": ids}) for z in given], tmp_path / "direct", top_k=2)
    saved, direct = read_log(tmp_path / "run"), read_log(tmp_path / "direct")
    assert np.array_equal(saved.counts, direct.counts) and np.array_equal(saved.entropy_sum, direct.entropy_sum)
    assert saved.probe_labels["token"][1] == direct.probe_labels["token"][1]


def test_a_model_of_transformers(tmp_path):
    """Its own router says which experts it chose."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    ids = torch.randint(0, 60, (2, 7))
    with torch.no_grad():
        out = model(ids, output_router_logits=True)
    import_router_logits([(out.router_logits, torch.ones_like(ids))], tmp_path / "run", top_k=2)
    log = read_log(tmp_path / "run")
    assert len(chosen) == 2
    for place, index in enumerate(chosen):
        assert log.counts[0, place].tolist() == torch.bincount(index.flatten(), minlength=5).tolist()


@pytest.mark.parametrize(
    ("batches", "options", "said"),
    [
        ([], {}, "no batch"),
        ([((), None)], {}, "output_router_logits=True"),
        ([((None,), None)], {}, "NoneType, expected logits"),
        ([((torch.zeros(3),), None)], {}, r"\(3,\), expected logits"),
        ([(make_logits(), None)], {"top_k": 7}, "choose 1 to 6"),
        ([(make_logits(), None)], {"step": -1}, "step is -1"),
        ([(make_logits(), torch.ones(2, 4))], {}, "10 tokens, and attention_mask has 8"),
        ([(make_logits(), None), (make_logits(layers=2), None)], {}, "has 2 layers, and the first one 3"),
        ([(make_logits(), None), (make_logits(experts=5), None)], {}, "5 experts, and 6 before"),
        ([((torch.full((2, 6), torch.nan),), None)], {}, "not finite"),
        ([(make_logits(), None, {"a": torch.zeros(10)})], {}, "whole numbers"),
        ([(make_logits(), None, {"a": torch.zeros(4).long()})], {}, "a has 4 values"),
        ([(make_logits(), None, {"a": torch.ones(10).long()})], {"label_names": {"a": ["b"]}}, "names for 1"),
    ],
)
def test_router_logits_that_are_refused(tmp_path, batches, options, said):
    with pytest.raises(ValueError, match=said):
        import_router_logits(batches, tmp_path / "run", **({"top_k": 2} | options))
    assert not (tmp_path / "run/routing").exists()


def test_saved_files_that_are_refused(tmp_path):
    def refused(match, top_k=2):
        with pytest.raises(ValueError, match=match):
            import_routing(tmp_path / "in", tmp_path / "run", top_k=top_k)
        assert not (tmp_path / "run").exists()
        for file in (tmp_path / "in").iterdir():
            file.unlink()

    (tmp_path / "in").mkdir()
    refused("holds neither router_trace_rank")
    save_file({"layer_0": torch.zeros(2, 4)}, tmp_path / "in/a.safetensors")
    refused("say --top-k", top_k=None)
    save_file({"layer_0": torch.zeros(2, 4), "other": torch.zeros(1)}, tmp_path / "in/a.safetensors")
    refused("expected one a layer, named alike")
    (tmp_path / "in/a.safetensors").write_bytes(b"\xff" * 50)
    refused("is damaged, or no .safetensors file")
    (tmp_path / "in/a.safetensors").write_bytes(b"")
    refused("is empty")
    (tmp_path / "in/a.npz").write_bytes(b"\xff" * 50)
    refused("is damaged, or no .npz file")
    np.savez(tmp_path / "in/a.npz", layer_0=np.array([{"an": "object"}], dtype=object))
    refused("layer_0 cannot be read")


def test_a_failure_leaves_no_half_import(tmp_path):
    """A file that goes bad after good steps, as a hostile or damaged one may."""
    good = trace_record(0, 0, [[0, 1]])
    bad = trace_record(1, 0, [[0, 1]], logit_offset=0, logit_bytes=8, logit_shape=[1, 4])
    write_lines(tmp_path / "trace/router_trace_rank0.jsonl", [good, bad])
    (tmp_path / "trace/logits_rank0.bin").write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="ends before"):
        import_routing(tmp_path / "trace", tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["mine.txt"]
