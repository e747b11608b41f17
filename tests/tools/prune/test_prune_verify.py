"""Every fault that is planted in a pruned folder is found and named; a right folder passes; no torch for V0 and V3."""

import json
import shutil
import subprocess
import sys

import pytest
from prune_models import THIRTEEN, plan_of, quantised, read, tiny, with_mtp, write

from gatewright.tools.cli import main
from gatewright.tools.prune.apply import apply
from gatewright.tools.prune.verify import check_bytes, check_replay, verify

LEVELS = ("V0", "V3")


def passed(plan, model, pruned):
    checks = verify(plan, model, pruned, levels=LEVELS)
    assert [check.level for check in checks] == list(LEVELS)
    return [check.passed for check in checks]


@pytest.mark.parametrize("family", THIRTEEN)
def test_right_folders_pass(family, tmp_path):
    plan = plan_of(tiny(family))
    apply(plan, tiny(family), tmp_path / "out")
    assert passed(plan, tiny(family), tmp_path / "out") == [True, True]


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("slice-equal-groups", {"keep": {layer: (0, 3, 4, 5, 8, 9, 12, 15) for layer in (1, 2, 3)}}),
        ("slice-regroup", {"keep": {layer: tuple(range(8)) for layer in (1, 2, 3)}}),
        ("keep-rows", {"keep": {layer: (1, 2, 3) for layer in (1, 2, 3)}}),
    ],
)
def test_right_folders_of_every_policy_pass(policy, changes, tmp_path):
    source = tiny("deepseek_v3", 16, n_group=4, topk_group=2)
    plan = plan_of(source, policy=policy, num_groups=4, topk_group=2, **changes)
    apply(plan, source, tmp_path / "out")
    assert passed(plan, source, tmp_path / "out") == [True, True]


def test_right_folders_with_mtp_and_scales_pass(tmp_path):
    source = quantised(with_mtp(tiny("deepseek_v3"), tmp_path / "mtp"), tmp_path / "model", "fp8", 3)
    for name, changes in (("stripped", {}), ("pruned", {"mtp": "prune", "mtp_keep": {4: (1, 2, 4, 7)}})):
        plan = plan_of(source, **changes)
        apply(plan, source, tmp_path / name)
        assert passed(plan, source, tmp_path / name) == [True, True]
    assert passed(plan, source, tmp_path / "stripped") == [False, False]


@pytest.fixture
def case(tmp_path):
    source = tiny("deepseek_v3", shard_size="100KB", n_group=2, topk_group=1)
    plan = plan_of(source)
    apply(plan, source, tmp_path / "out")
    return plan, source, tmp_path / "out"


def file_with(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change_tensor(folder, name, change):
    file = file_with(folder, name)
    content = read(file)
    content[name] = change(*content[name])
    write(file, content)


GATE = "model.layers.2.mlp.gate.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (EXPERT, lambda t, s, raw: (t, s, raw[:-1] + bytes([raw[-1] ^ 1])), f"{EXPERT} differs from "),
        (GATE, lambda t, s, raw: (t, s, raw[4:] + raw[:4]), f"{GATE} differs from {GATE} at 4 of its rows"),
        (BIAS, lambda t, s, raw: (t, s, raw[8:] + raw[:8]), f"{BIAS} differs from"),
        (EXPERT, lambda t, s, raw: ("I32", s, raw), f"{EXPERT} is I32"),
        (EXPERT, lambda t, s, raw: (t, s[::-1], raw), f"{EXPERT} is F32"),
        ("model.norm.weight", lambda t, s, raw: (t, s, bytes(len(raw))), "model.norm.weight differs from"),
    ],
)
def test_tensors_that_are_not_their_slices(case, name, change, says):
    plan, source, out = case
    change_tensor(out, name, change)
    check = check_bytes(plan, source, out)
    assert not check.passed and len(check.problems) == 1 and says in check.problems[0]
    assert str(check).startswith("V0  FAILED") and says in str(check)


def test_two_experts_exchanged(case):
    plan, source, out = case
    other = EXPERT.replace("experts.3", "experts.2")
    file = file_with(out, EXPERT)
    assert file == file_with(out, other)
    content = read(file)
    content[EXPERT], content[other] = content[other], content[EXPERT]
    write(file, content)
    check = check_bytes(plan, source, out)
    assert sorted(problem.split()[0] for problem in check.problems) == [other, EXPERT]
    # the header is as it has to be: the bytes are what V0 is for
    assert check_replay(plan, source, out).passed


def test_tensors_too_many_and_too_few(case):
    plan, source, out = case
    file = file_with(out, EXPERT)
    content = read(file)
    content["ghost"] = content.pop(EXPERT)
    write(file, content)
    index = out / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(EXPERT, "ghost"))
    check = check_bytes(plan, source, out)
    assert set(check.problems) >= {f"{EXPERT} is missing", "ghost should not be there"}
    replayed = check_replay(plan, source, out)
    assert f"{file.name} has another header" in replayed.problems
    file.unlink()
    check = check_bytes(plan, source, out)
    assert not check.passed and "is missing, though the index names it" in check.problems[0]
    assert f"{file.name} is missing" in check_replay(plan, source, out).problems


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("n_routed_experts", 8, "n_routed_experts is 8 and not 4"),
        ("n_group", 2, "n_group is 2 and not 1"),
        ("num_experts_per_tok", 1, "num_experts_per_tok is 1 and not 2"),
        ("rms_norm_eps", 0.5, "config.json: rms_norm_eps was changed"),
        ("n_routed_experts", None, "does not say num_local_experts = 4"),
    ],
)
def test_configuration(case, key, value, says):
    plan, source, out = case
    config = json.loads((out / "config.json").read_text())
    config[key] = value
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert any(says in problem for problem in check_bytes(plan, source, out).problems)
    assert "config.json has another content" in check_replay(plan, source, out).problems


def test_other_files(case):
    plan, source, out = case
    (out / "tokenizer_config.json").write_text("{}")
    (out / "extra.txt").write_text("")
    (out / "generation_config.json").unlink()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = check_bytes(plan, source, out).problems
    assert len(problems) == 4
    for says in (
        "tokenizer_config.json differs",
        "generation_config.json was not",
        "extra.txt was not in",
        "total_size of",
    ):
        assert any(says in problem for problem in problems)


def test_another_plan(case):
    plan, source, out = case
    other = plan_of(source, seed=1)
    assert passed(other, source, out) == [False, False]
    assert "pruning_plan.json has the hash" in check_replay(other, source, out).problems[0]
    (out / "pruning_plan.json").write_text("{}")
    assert "is not a pruning plan" in check_replay(plan, source, out).problems[0]
    (out / "pruning_plan.json").unlink()
    assert check_replay(plan, source, out).problems == ("pruning_plan.json is missing",)


def test_another_source(case, tmp_path):
    """The same shapes, other numbers: only the bytes tell."""
    plan, _, out = case
    other = tiny("deepseek_v3", shard_size="100KB", seed=1, n_group=2, topk_group=1)
    check = check_bytes(plan, other, out)
    assert not check.passed and len(check.problems) > 50
    assert str(check).splitlines()[-1].strip() == f"and {len(check.problems) - 10} more"


def test_command(case, tmp_path, capsys):
    plan, source, out = case
    plan.save(tmp_path / "plan.json")
    arguments = ["prune", "verify", str(tmp_path / "plan.json"), "--model", str(source), "--pruned", str(out)]
    assert main([*arguments, "--levels", "V0", "V3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("passed") == 2 and "compared byte for byte with the source" in shown
    change_tensor(out, GATE, lambda dtype, shape, raw: (dtype, shape, bytes(len(raw))))
    assert main([*arguments, "--levels", "V0"]) == 1
    assert "FAILED" in capsys.readouterr().out
    shutil.rmtree(out)
    assert main([*arguments, "--levels", "V0"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match='no level "V9"'):
        verify(plan, source, out, levels=("V9",))


def test_no_torch(case, tmp_path):
    plan, source, out = case
    plan.save(tmp_path / "plan.json")
    code = (
        "import sys\nfrom gatewright.tools.cli import main\n"
        f"status = main(['prune', 'verify', {str(tmp_path / 'plan.json')!r}, '--model', {str(source)!r}, '--pruned', "
        f"{str(out)!r}, '--levels', 'V0', 'V3'])\n"
        "print(status, any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
