"""What `apply` writes: the bytes that numpy would slice, for every family and every way to store weights; whole or not
at all, killed wherever it may be; and nothing where it should not."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from prune_models import (
    SIZES,
    THIRTEEN,
    copied,
    edited,
    plan_of,
    quantised,
    read,
    read_folder,
    tiny,
    with_mtp,
    write_folder,
)

from gatewright.tools.prune import apply as apply_module
from gatewright.tools.prune.apply import apply, workplace
from gatewright.tools.prune.checkpoint import Checkpoint
from gatewright.tools.prune.layout import Layout

# Every name below an MoE block whose tensors lose rows, and along which axis.
SLICED = {
    "gate.weight": 0,
    "gate.e_score_correction_bias": 0,
    "e_score_correction_bias": 0,
    "moe_statics.e_score_correction_bias": 1,
    "router.weight": 0,
    "router.bias": 0,
    **{
        f"experts.{name}{end}": 0
        for name in ("gate_up_proj", "down_proj")
        for end in ("", "_bias", "_blocks", "_scales")
    },
}


def sliced(content, keep):
    """The pruned tensors, worked out on arrays of bytes."""
    made = {}
    for name, (dtype, shape, raw) in content.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        below = ".".join(parts[4:])
        if layer in keep and parts[3] != "self_attn" and below in SLICED:
            array = np.frombuffer(raw, np.uint8).reshape(*shape, SIZES[dtype])
            array = np.take(array, keep[layer], axis=SLICED[below])
            made[name] = (dtype, array.shape[:-1], array.tobytes())
        elif layer in keep and len(parts) > 5 and parts[4] == "experts" and parts[5].isdigit():
            if int(parts[5]) in keep[layer]:
                parts[5] = str(keep[layer].index(int(parts[5])))
                made[".".join(parts)] = (dtype, shape, raw)
        else:
            made[name] = (dtype, shape, raw)
    return made


def listing(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", THIRTEEN)
def test_family(family, tmp_path):
    source, out = tiny(family), tmp_path / "out"
    before = listing(source)
    plan = plan_of(source)
    apply(plan, source, out)
    assert read_folder(out) == sliced(read_folder(source), plan.keep)
    assert listing(source) == before
    assert set(listing(out)) == {*before, "pruning_plan.json"}
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    changed = {key for key in {**old, **new} if old.get(key) != new.get(key)}
    assert len(changed) == 1 and {old[key] for key in changed} == {8} and {new[key] for key in changed} == {4}
    raw = (out / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0 and b'"__metadata__":{"format":"pt"}' in raw
    assert not workplace(out).exists()


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(
    ("method", "family"), [("fp8", "deepseek_v3"), ("fp8", "minimax_m2"), ("int4", "qwen3_moe"), ("mxfp4", "gpt_oss")]
)
def test_quantised(method, family, shards, tmp_path):
    source = quantised(tiny(family), tmp_path / "model", method, shards)
    plan = plan_of(source, 3)
    out = tmp_path / "out"
    apply(plan, source, out)
    assert read_folder(out) == sliced(read_folder(source), plan.keep)
    pruned = Checkpoint.open(out)
    assert Layout.of(pruned).num_experts == 3
    if shards > 1:
        assert pruned.index["metadata"] == {"total_size": pruned.data_bytes}


def test_long_ranges_and_odd_ones(tmp_path, monkeypatch):
    """Ranges beyond what is gathered go through the kernel, or through memory where it cannot."""
    chance = random.Random(0)
    shapes = {
        "model.layers.0.mlp.gate.weight": ("F32", (4, 3)),
        "model.layers.0.mlp.gate.bias": ("F32", (1, 4)),
        "model.layers.0.mlp.experts.gate_up_proj": ("U8", (4, 1 << 20)),
        "model.layers.0.mlp.experts.down_proj": ("BF16", (4, 700_001)),
        "model.embed.weight": ("F8_E4M3", (3, 700_003)),
    }
    content = {
        name: (dtype, shape, chance.randbytes(int(np.prod(shape)) * SIZES[dtype]))
        for name, (dtype, shape) in shapes.items()
    }
    config = {"model_type": "newer", "num_experts": 4, "num_experts_per_tok": 1}
    source = write_folder(tmp_path / "model", config, {"model.safetensors": content})
    SLICED_HERE = {"model.layers.0.mlp.gate.bias": 1}
    for name, keep in (("first", (0, 1)), ("apart", (1, 3))):
        plan = plan_of(source, 2, keep={0: keep})
        expected = {}
        for tensor, (dtype, shape, raw) in content.items():
            array = np.frombuffer(raw, np.uint8).reshape(*shape, SIZES[dtype])
            if "layers" in tensor:
                array = np.take(array, keep, axis=SLICED_HERE.get(tensor, 0))
            expected[tensor] = (dtype, array.shape[:-1], array.tobytes())
        apply(plan, source, tmp_path / name)
        assert read_folder(tmp_path / name) == expected

    def cannot(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(apply_module, "_copy_in_kernel", cannot)
    apply(plan, source, tmp_path / "through memory")
    assert read_folder(tmp_path / "through memory") == expected


def test_alignment_survives_what_is_dropped(tmp_path):
    """An odd number of odd-sized tensors before a wide one: it moves in front."""
    content = {
        "model.layers.0.mlp.experts.0.up.weight": ("U8", (3,), b"abc"),
        "model.layers.0.mlp.experts.1.up.weight": ("U8", (5,), b"defgh"),
        "model.layers.0.mlp.gate.weight": ("F32", (2, 2), bytes(range(16))),
    }
    config = {"model_type": "newer", "num_experts": 2, "num_experts_per_tok": 1}
    source = write_folder(tmp_path / "model", config, {"model.safetensors": content})
    apply(plan_of(source, 1, keep={0: (1,)}), source, tmp_path / "out")
    shard = Checkpoint.open(tmp_path / "out").shards["model.safetensors"]
    assert [(entry.name, entry.start % 4) for entry in shard.tensors][0] == ("model.layers.0.mlp.gate.weight", 0)
    assert read(tmp_path / "out/model.safetensors")["model.layers.0.mlp.experts.0.up.weight"] == ("U8", (5,), b"defgh")


def test_shards_that_lose_everything_and_files_that_are_carried(tmp_path):
    content = read_folder(tiny("qwen3_moe"))
    first = {name: what for name, what in content.items() if ".experts.0." in name}
    config = json.loads((tiny("qwen3_moe") / "config.json").read_text())
    files = {"model-00001-of-00002.safetensors": first}
    files["model-00002-of-00002.safetensors"] = {name: what for name, what in content.items() if name not in first}
    source = write_folder(tmp_path / "model", config, files)
    (source / "code").mkdir()
    (source / "code/modeling.py").write_text("# remote code\n")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"old")
    os.chmod(source / "code/modeling.py", 0o755)
    plan = plan_of(source, 4, keep={layer: (1, 2, 3, 4) for layer in range(4)})
    out = tmp_path / "deep" / "er" / "out"
    applied = apply(plan, source, out)
    assert set(listing(out)) == {
        "config.json",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "code/modeling.py",
        "chat_template.jinja",
        "pruning_plan.json",
    }
    assert (out / "code/modeling.py").stat().st_mode & 0o111 and not applied.reused
    assert read_folder(out) == sliced(content, plan.keep)


# --- layers that predict further tokens


def test_mtp_layers_are_stripped_or_pruned(tmp_path):
    source = with_mtp(tiny("deepseek_v3"), tmp_path / "model")
    content = read_folder(source)
    plan = plan_of(source)
    apply(plan, source, tmp_path / "stripped")
    rest = {name: what for name, what in content.items() if ".layers.4." not in name}
    assert read_folder(tmp_path / "stripped") == sliced(rest, plan.keep)
    assert json.loads((tmp_path / "stripped/config.json").read_text())["num_nextn_predict_layers"] == 0
    plan = plan_of(source, mtp="prune", mtp_keep={4: (0, 2, 5, 7)})
    apply(plan, source, tmp_path / "pruned")
    assert read_folder(tmp_path / "pruned") == sliced(content, plan.keep | plan.mtp_keep)
    assert json.loads((tmp_path / "pruned/config.json").read_text())["num_nextn_predict_layers"] == 1


# --- where it writes, and where it does not


@pytest.fixture
def model(tmp_path):
    return copied(tiny("qwen3_moe", shard_size="100KB"), tmp_path / "model")


def assert_nothing_written(tmp_path, model):
    assert {path.name for path in tmp_path.iterdir()} == {"model"} and not list(model.glob(".*"))


def test_output_that_is_the_model_or_in_it(model, tmp_path):
    plan = plan_of(model)
    link = tmp_path / "link"
    link.symlink_to(model)
    for out in (model, link, tmp_path / "model" / ".." / "model"):
        with pytest.raises(ValueError, match="is the model itself, which is never overwritten"):
            apply(plan, model, out)
    with pytest.raises(ValueError, match="lies in the model's folder"):
        apply(plan, model, model / "pruned")
    with pytest.raises(ValueError, match="lies in the model's folder"):
        apply(plan, model, link / "pruned")
    link.unlink()
    assert_nothing_written(tmp_path, model)


def test_output_that_is_not_empty(model, tmp_path, monkeypatch):
    plan = plan_of(model)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: choose a new folder"):
        apply(plan, model, out)
    (out / "notes").rename(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file"):
        apply(plan, model, tmp_path / "file")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="is a mount point"):
        patch.setattr(apply_module.os.path, "ismount", lambda path: path == out)
        apply(plan, model, out)
    assert not workplace(out).exists()
    apply(plan, model, out)  # empty is as good as new
    assert len(Checkpoint.open(out).shards) > 1
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    apply(plan, model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and listing(tmp_path / "target") == listing(out)


def test_disk_that_is_too_small(model, tmp_path, monkeypatch):
    plan = plan_of(model)
    needed = apply(plan, model, tmp_path / "once").target.total_bytes
    usage = type("usage", (), {})()
    monkeypatch.setattr(apply_module.shutil, "disk_usage", lambda _: usage)
    usage.free = needed - 1
    with pytest.raises(ValueError, match=" left: make room, or choose a folder on another disk"):
        apply(plan, model, tmp_path / "out")
    assert not workplace(tmp_path / "out").exists() and not (tmp_path / "out").exists()
    usage.free = needed
    apply(plan, model, tmp_path / "out")


def test_disk_that_becomes_full(model, tmp_path, monkeypatch):
    """It stops with everything resumable, the source untouched, and goes on to the same bytes."""
    plan = plan_of(model)
    before = listing(model)
    apply(plan, model, tmp_path / "whole")
    out = tmp_path / "out"
    first = sorted((tmp_path / "whole").glob("*.safetensors"))[0]
    original, left = os.write, first.stat().st_size + 5000

    def write(descriptor, content):
        nonlocal left
        if len(content) > left:
            original(descriptor, content[:left])
            left = 0
            raise OSError(28, "No space left on device")
        left -= len(content)
        return original(descriptor, content)

    monkeypatch.setattr(apply_module.os, "write", write)
    with pytest.raises(OSError, match="disk is full after 1 of .* run the same command again") as error:
        apply(plan, model, out)
    assert error.value.filename == str(workplace(out)) and not out.exists()
    assert not list((workplace(out) / "files").glob(".*"))
    monkeypatch.undo()
    assert apply(plan, model, out).reused == (first.name,)
    assert listing(out) == listing(tmp_path / "whole") and listing(model) == before


def test_unfinished_work_of_another_plan_or_a_changed_model(model, tmp_path, monkeypatch):
    plan, out = plan_of(model), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(apply_module, "_write_others", stop)
        apply(plan, model, out)
    with pytest.raises(ValueError, match="holds an unfinished rewriting by another plan"):
        apply(plan_of(model, seed=1), model, out)
    os.utime(model / "config.json")
    with pytest.raises(ValueError, match="or the model changed since"):
        apply(plan, model, out)


def test_model_that_changes_meanwhile(model, tmp_path, monkeypatch):
    original = apply_module._write_others

    def change(*args):
        original(*args)
        os.utime(sorted(model.glob("*.safetensors"))[0])

    monkeypatch.setattr(apply_module, "_write_others", change)
    with pytest.raises(ValueError, match="was changed while it was read"):
        apply(plan_of(model), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_at_once(model, tmp_path, monkeypatch):
    plan, out = plan_of(model), tmp_path / "out"
    original, inside, go_on = apply_module._write_others, threading.Event(), threading.Event()

    def wait(*args):
        inside.set()
        assert go_on.wait(30)
        original(*args)

    monkeypatch.setattr(apply_module, "_write_others", wait)
    first = threading.Thread(target=apply, args=(plan, model, out))
    first.start()
    try:
        assert inside.wait(30)
        with pytest.raises(ValueError, match="another process is writing in"):
            apply(plan, model, out)
    finally:
        go_on.set()
        first.join()
    assert Layout.of(Checkpoint.open(out)).num_experts == 4


def test_finished_file_that_was_spoilt_is_made_again(model, tmp_path, monkeypatch):
    plan, out = plan_of(model), tmp_path / "out"
    apply(plan, model, tmp_path / "whole")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(apply_module, "_write_others", stop)
        apply(plan, model, out)
    files = sorted((workplace(out) / "files").iterdir())
    raw = bytearray(files[0].read_bytes())
    raw[-1] ^= 1
    files[0].write_bytes(raw)
    files[1].unlink()
    assert set(apply(plan, model, out).reused) == {file.name for file in files[2:]}
    assert listing(out) == listing(tmp_path / "whole")


# --- killed

KILLED = """
import itertools, os, signal, sys
from gatewright.tools.prune.apply import apply
from gatewright.tools.prune.plan import Plan
plan, model, out, at = sys.argv[1:]
calls = itertools.count(1)
def counted(function):
    def call(*args, **options):
        if next(calls) == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call
for name in ("write", "sendfile", "fsync", "replace", "pread", "open", "mkdir", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
plan = Plan.load(plan)
calls = itertools.count(1)
apply(plan, model, out)
print(next(calls) - 1)
"""


def run_counted(plan, model, out, at=0):
    arguments = [sys.executable, "-c", KILLED, *map(str, (plan, model, out, at))]
    return subprocess.run(arguments, capture_output=True, text=True)


def test_killed_anywhere_and_resumed(tmp_path):
    source = quantised(tiny("deepseek_v3"), tmp_path / "model", "fp8", shards=5)
    (source / "tokenizer.json").write_text("{}")
    plan = plan_of(source)
    plan.save(tmp_path / "plan.json")
    done = run_counted(tmp_path / "plan.json", source, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout)
    before, whole = listing(source), listing(tmp_path / "whole")
    chance = random.Random(calls)
    # the first and the last steps, and ten between
    places = sorted({1, 2, calls - 2, calls - 1, calls, *chance.sample(range(3, calls - 2), 10)})
    reused = 0
    for place in places:
        out = tmp_path / f"out{place}"
        killed = run_counted(tmp_path / "plan.json", source, out, place)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if out.exists():
            assert listing(out) == whole  # there whole
        reused += len(apply(plan, source, out).reused)
        assert listing(out) == whole and not workplace(out).exists()
    assert reused > len(places)  # what was finished is not done again
    assert listing(source) == before


def test_killed_again_and_again(tmp_path):
    """Every attempt gets a little further than it was given: it arrives all the same."""
    source = copied(tiny("mixtral", shard_size="100KB"), tmp_path / "model")
    plan = plan_of(source)
    plan.save(tmp_path / "plan.json")
    apply(plan, source, tmp_path / "whole")
    calls = int(run_counted(tmp_path / "plan.json", source, tmp_path / "once").stdout)
    attempts = 1
    while (done := run_counted(tmp_path / "plan.json", source, tmp_path / "out", calls // 2)).returncode:
        assert done.returncode == -signal.SIGKILL, done.stderr
        attempts += 1
        assert attempts < 9
    assert attempts > 1 and listing(tmp_path / "out") == listing(tmp_path / "whole")


# --- without torch


def test_memory_and_imports(tmp_path):
    """Neither torch nor numpy's arrays: what a process needs to rewrite files."""
    plan_file, source = tmp_path / "plan.json", tiny("deepseek_v3")
    plan_of(source).save(plan_file)
    code = (
        "import re, sys\n"
        "from gatewright.tools.cli import main\n"
        f"assert main(['prune', 'apply', {str(plan_file)!r}, '--model', {str(source)!r}, '--out', "
        f"{str(tmp_path / 'out')!r}]) == 0\n"
        "print(any(name in sys.modules for name in ('torch', 'transformers')))\n"
        # the process's own, unlike ru_maxrss, which begins with that of the process that started it
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, torch_imported, peak = done.stdout.splitlines()
    assert torch_imported == "False" and int(peak) * 1024 < 100_000_000
    assert shown[-1].startswith(f"{tmp_path / 'out'}: ") and "KiB of weights in 1 file;" in shown[-1]


def test_command_refuses_in_one_line(tmp_path, capsys):
    from gatewright.tools.cli import main

    source = copied(tiny("qwen3_moe"), tmp_path / "model")
    plan_of(source).save(tmp_path / "plan.json")
    arguments = ["prune", "apply", str(tmp_path / "plan.json"), "--model", str(source), "--out"]
    assert main([*arguments, str(source)]) == 2
    assert "is the model itself" in capsys.readouterr().err
    edited(source, num_local_experts=None, num_experts=None)
    assert main([*arguments, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert '"qwen3_moe" is dense' in error and error.count("\n") == 1
    assert {path.name for path in Path(tmp_path).iterdir()} == {"model", "plan.json"}
