"""Pruning our own runs: what is collected against sums by hand, files against masks bit for bit, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from made_run import make_run, small_config

from gatewright.moe import moe_layers
from gatewright.recipes.models.dit import modulate
from gatewright.recipes.models.dit_pruning import DiTSubject, draw_demonstrations
from gatewright.tools import cli
from gatewright.tools.export import export
from gatewright.tools.prune import runs
from gatewright.tools.prune.plan import make_plan
from gatewright.tools.prune.run_folder import is_run_folder
from gatewright.tools.weights import load_model, read_weights

KEEP = {1: (0, 2, 5), 3: (1, 2)}


def with_seeds(path, count=6, domain=None, **fields):
    """A file of demonstrations of digits 0 and 1."""
    subject = runs.open_run(path).subject
    lines = [demo.record() | fields for demo in draw_demonstrations(subject.data, (0, 1), count, images=2, draws=2)]
    if domain:
        lines = [line | {"domain": domain} for line in lines]
    file = path.parent / f"{path.name}-demos.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("pruning") / "run"
    make_run(path)
    return path


@pytest.fixture(scope="module")
def statistics(run):
    return runs.collect(run, [(with_seeds(run), None)], progress=False)


def plan_of(statistics, keep=KEEP, **changes):
    return dataclasses.replace(make_plan(statistics, keep=0.5), keep=keep, **changes)


def test_which_folders_are_ours(run, tmp_path):
    export(run, tmp_path / "out")
    assert is_run_folder(run) and is_run_folder(tmp_path / "out")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert not is_run_folder(tmp_path / "hf") and not is_run_folder(tmp_path / "none")


def test_sums_by_hand(run, statistics):
    """Every routed pair of every image and draw in plain loops, with the branch's factor in the summand."""
    opened = runs.open_run(run)
    subject, model = opened.subject, opened.model
    expected = {name: np.zeros((2, 6)) for name in ("0,0,0", "1,0,0", "0,1,0", "1,1,0", "1,1,1", "2,2,0", "0,2,0")}
    largest = np.zeros((2, 6))
    demos = draw_demonstrations(subject.data, (0, 1), 6, images=2, draws=2)
    seen = []
    blocks = [model.blocks[i] for i in model.config.moe_blocks]
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append((module, *args)), with_kwargs=False)
        for block in blocks
    ]
    with torch.no_grad():
        for demo in demos:
            subject.run_demo(demo)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 * len(demos) * 2
    with torch.no_grad():
        for block, x, c, context in seen:
            row = blocks.index(block)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
            h = x + gate_1 * block.attn(modulate(block.norm1(x), shift_1, scale_1))[0]
            inner = modulate(block.norm2(h), shift_2, scale_2)
            _, routing = block.mlp(inner, context)
            bank = block.mlp.experts
            for token in range(context.num_tokens):
                image, place = divmod(token, context.length)
                factor = gate_2[image, 0].double()
                parts = []
                for expert, weight in zip(routing.index[token].tolist(), routing.weight[token].tolist(), strict=True):
                    if 0 <= expert < 6:
                        hidden = bank.w_in[expert] @ inner[image, place] + bank.b_in[expert]
                        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
                        out = (bank.w_out[expert] @ hidden + bank.b_out[expert]).double()
                        parts.append((expert, weight, factor * out))
                before = h[image, place].double()
                after = before + sum(weight * u for _, weight, u in parts)
                turn = max(0.0, 1 - float(before @ after / before.norm() / after.norm()))
                for expert, weight, u in parts:
                    g, n = abs(weight), float(u.norm())
                    largest[row, expert] = max(largest[row, expert], n)
                    for name, total in expected.items():
                        a, b, s = map(int, name.split(","))
                        total[row, expert] += g**a * n**b * turn**s
    found = statistics.domains["run-demos"]
    assert found.tokens == 6 * 2 * 2 * model.config.num_tokens and found.demos == 6
    for name, total in expected.items():
        np.testing.assert_allclose(found.sums[name], total, rtol=2e-4, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(found.max_norm, largest, rtol=2e-4)
    np.testing.assert_allclose(found.easy_ep_per_demo.sum(0), found.sums["1,1,1"], rtol=1e-12)


def test_unconditional_demonstrations_reach_no_routed_expert(run, tmp_path):
    file = tmp_path / "null.jsonl"
    file.write_text('{"class": null, "images": [0, 1]}\n')
    found = runs.collect(run, [(file, "none")], progress=False)
    assert not found.domains["none"].sums["0,0,0"].any()


def test_the_same_line_shows_the_same(run, statistics):
    again = runs.collect(run, [(with_seeds(run), None)], progress=False)
    assert again.sha256 == statistics.sha256
    other = runs.collect(run, [(with_seeds(run, time=9), "run-demos")], progress=False)
    assert not np.array_equal(other.domains["run-demos"].sums["1,1,1"], statistics.domains["run-demos"].sums["1,1,1"])
    with_seeds(run)


@pytest.mark.parametrize("policy", ["slice", "keep-rows"])
@pytest.mark.parametrize("router", ["promoe", "topk", "expert_choice", "race", "longcat", "cosine"])
def test_files_are_the_masked_model(tmp_path, router, policy):
    """Layers keep different numbers. The export opens as any does, and answers bit for bit as the mask."""
    options = {"projection_dim": 8} if router == "cosine" else {}
    config = small_config(router, num_experts=6, top_k=1, router_options=options)
    make_run(tmp_path / "run", config)
    found = runs.collect(tmp_path / "run", [(with_seeds(tmp_path / "run", 2), "ones")], progress=False)
    plan = plan_of(found, policy=policy)
    runs.apply(plan, tmp_path / "run", tmp_path / "out")
    assert runs.verify(plan, tmp_path / "run", tmp_path / "out") == dict.fromkeys(("V0", "V1", "V2", "V3"), True)

    model, written = load_model(tmp_path / "out")
    whole, _ = load_model(tmp_path / "run")
    assert [len(layer.experts.w1) for layer in moe_layers(model)] == [3, 2]
    assert written.config["num_experts" if policy == "slice" else "kept_experts"] == (
        [3, 2] if policy == "slice" else [[0, 2, 5], [1, 2]]
    )
    with torch.no_grad():
        answer = DiTSubject(model, written).answer()
        full = DiTSubject(whole, written).answer()
        with runs.masked_by(whole, plan):
            masked = DiTSubject(whole, written).answer()
    assert torch.equal(answer, masked) and not torch.equal(answer, full)
    if router == "promoe":
        losses = runs.evaluate(tmp_path / "run", {"plan": plan}, classes=(0, 3))
        assert losses["plan"] == DiTSubject(model, written).losses((0, 3)) and losses["full"] != losses["plan"]


def test_bank_rows_are_those_of_the_source(run, statistics, tmp_path):
    runs.apply(plan_of(statistics), run, tmp_path / "out")
    source, pruned = read_weights(run)[0], read_weights(tmp_path / "out")[0]
    rows = {"blocks.1.mlp.": [0, 2, 5], "blocks.3.mlp.": [1, 2]}
    changed = 0
    for name, tensor in source.items():
        block = next((b for b in rows if name.startswith((f"{b}experts.", f"{b}router."))), None)
        changed += block is not None
        assert torch.equal(pruned[name], tensor[rows[block]] if block else tensor), name
    assert changed == 2 * 4  # three of the bank and the prototypes
    assert pruned["blocks.1.mlp.local_experts.w1"].shape[0] == 1


def test_a_pruned_export_is_pruned_again(run, statistics, tmp_path):
    runs.apply(plan_of(statistics, {1: (0, 2, 4, 5), 3: (1, 2, 3)}), run, tmp_path / "one")
    again = runs.collect(tmp_path / "one", [(with_seeds(run), "ones")], progress=False)
    assert again.model["experts_per_layer"] == [4, 3]
    second = plan_of(again, {1: (0, 1), 3: (2,)})
    runs.apply(second, tmp_path / "one", tmp_path / "two")
    runs.apply(plan_of(statistics, {1: (0, 2), 3: (3,)}), run, tmp_path / "at once")
    twice, once = (read_weights(tmp_path / name)[0] for name in ("two", "at once"))
    assert all(torch.equal(twice[name], once[name]) for name in once)


def test_damage_is_told_from_a_true_copy(run, statistics, tmp_path):
    from safetensors.torch import load_file, save_file

    plan = plan_of(statistics)
    runs.apply(plan, run, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    state["blocks.1.mlp.experts.w2"][1, 0, 0] += 1e-3
    save_file(state, file, {"format": "pt"})
    found = runs.verify(plan, run, tmp_path / "out")
    assert found == {"V0": False, "V1": True, "V2": False, "V3": True}
    other = plan_of(statistics, {1: (0, 2, 4), 3: (1, 2)})
    assert not runs.verify(other, run, tmp_path / "out")["V3"]


def test_sizes_without_reading_weights(run, statistics, tmp_path):
    plan = plan_of(statistics)
    planned = runs.dry_run(plan, run)
    runs.apply(plan, run, tmp_path / "out")
    before, after = (read_weights(folder)[0] for folder in (run, tmp_path / "out"))
    assert planned["bytes_before"] == sum(t.numel() * 4 for t in before.values())
    assert planned["bytes_after"] == sum(t.numel() * 4 for t in after.values())
    assert planned["layers"][3] == {"experts": 6, "kept": 2, "router": "promoe"}
    half = runs.inspect(run, keep=0.5)
    assert [layer["kept"] for layer in half["layers"].values()] == [3, 3]
    assert half["bytes_after"] < half["bytes_before"] == runs.inspect(run)["bytes_after"]
    rows = runs.dry_run(plan_of(statistics, policy="keep-rows"), run)
    assert rows["parameters_after"] - planned["parameters_after"] == (12 - 5) * 32  # prototypes of width 32


def test_refusals(run, statistics, tmp_path):
    plan = plan_of(statistics)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        runs.apply(plan, run, tmp_path / "full")
    make_run(tmp_path / "other", options={"objective": "flow", "data": "digits", "seed": 1})
    with pytest.raises(ValueError, match="header_hash differs"):
        runs.apply(plan, tmp_path / "other", tmp_path / "out")
    make_run(tmp_path / "deep", small_config(depth=6))
    with pytest.raises(ValueError, match="the plan is for layers and experts"):
        runs.dry_run(plan, tmp_path / "deep")
    make_run(tmp_path / "dense", small_config("dense"))
    for refused in (runs.open_run, runs.inspect):
        with pytest.raises(ValueError, match="dense model"):
            refused(tmp_path / "dense")
    with pytest.raises(ValueError, match="share up to 1.0"):
        runs.inspect(run, keep=1.5)
    with pytest.raises(ValueError, match="ascending places of 0 to 5"):
        runs.inspect(run, keep=7)
    runs.apply(plan_of(statistics, policy="keep-rows"), run, tmp_path / "rows")
    with pytest.raises(ValueError, match='pruned with policy "keep-rows"'):
        runs.open_run(tmp_path / "rows")
    with pytest.raises(ValueError, match='sends no token elsewhere: measure it in mode "no-reroute"'):
        runs.evaluate(run, {"rows": plan_of(statistics, policy="keep-rows")}, mode="reroute", classes=(0,))
    make_run(tmp_path / "soft", small_config("soft_moe"))
    with pytest.raises(ValueError, match='layer 1: router "soft_moe" mixes tokens into slots'):
        runs.collect(tmp_path / "soft", [(with_seeds(run), "ones")], progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "demos.jsonl:2: no JSON"),
        ("[1]", "expected a JSON object"),
        ('{"class": 3}', "lacks images"),
        ('{"class": 3, "images": [0], "text": "x"}', "has text: a demonstration for a diffusion run is"),
        ('{"class": 10, "images": [0]}', "give 0 to 9, or null"),
        ('{"class": true, "images": [0]}', "give 0 to 9, or null"),
        ('{"class": 3, "images": []}', "must be a list of places of 0 to 1499 in digits"),
        ('{"class": 3, "images": [1500]}', "0 to 1499"),
        ('{"class": 3, "images": [0]}', "image 0 of digits is a 0, no 3"),
        ('{"class": 0, "images": [0], "draws": 0}', '"draws" is 0: give a whole number from 1'),
        ('{"class": 0, "images": [0], "noise": -1}', '"noise" is -1'),
        ('{"class": 0, "images": [0], "domain": 3}', '"domain" is 3'),
    ],
)
def test_lines_that_are_no_demonstration(run, tmp_path, line, message):
    file = tmp_path / "demos.jsonl"
    file.write_text('{"class": 0, "images": [0]}\n' + line + "\n")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        runs.collect(run, [(file, None)], progress=False)


def test_the_steps_of_the_command(run, tmp_path, capsys):
    """Every step takes a run where it takes a checkpoint."""
    stats, plan, out, losses = (str(tmp_path / name) for name in ("stats", "plan.json", "pruned", "losses.json"))
    demos = str(with_seeds(run))
    for line in (
        ["inspect", str(run), "--keep", "0.5"],
        ["collect", str(run), "--demos", demos, "--out", stats, "--quiet"],
        ["plan", stats, "--keep", "0.5", "--budget", "global", "--out", plan],
        ["dry-run", plan, "--model", str(run)],
        ["apply", plan, "--model", str(run), "--out", out],
        ["verify", plan, "--model", str(run), "--pruned", out],
        ["plan", stats, "--keep", "0.5", "--policy", "keep-rows", "--out", f"{plan}.rows"],
        ["evaluate", str(run), "--plan", plan, "--plan", f"{plan}.rows", "--out", losses],
    ):
        assert cli.main(["prune", *line]) == 0, (line, capsys.readouterr())
    found = json.loads((tmp_path / "losses.json").read_text())
    model, written = load_model(out)
    expected = DiTSubject(model, written).losses()
    assert found["cases"][0]["loss"] == pytest.approx(expected, rel=1e-12)
    assert [case["mode"] for case in found["cases"]] == ["reroute", "no-reroute"]
    printed = capsys.readouterr().out
    assert "6 routed experts, 3 kept" in printed and "V2  passed" in printed


def test_no_demonstrations(run, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no demonstrations"):
        runs.collect(run, [(tmp_path / "empty.jsonl", None)], progress=False)
    with pytest.raises(FileNotFoundError):
        runs.collect(run, [(tmp_path / "none.jsonl", None)], progress=False)
