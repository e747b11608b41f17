"""Checkpoints: a resumed run is the run that did not stop, at any layout; what is damaged or foreign is refused."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from deepspeed_toy import Run, without_key_bias
from distributed import RankFailed

from gatewright.moe.hosts import checkpoint_files
from gatewright.moe.hosts.checkpoint_files import (
    MANIFEST,
    checkpoint_buffers,
    checkpoint_parameters,
    find_latest,
    read_manifest,
)

pytestmark = pytest.mark.distributed


def check_save(folder, steps, keep=2, extra=None, **run_options):
    """Trains some steps, saves, and trains one more: what a resumed run has to do."""
    from gatewright.moe.hosts.deepspeed import save_checkpoint

    with Run(**run_options) as run:
        before = run.train(0, steps)
        saved = save_checkpoint(run.engine, folder, extra=extra, keep=keep, shard_bytes=20_000)
        state = run.state()
        return before | {"folder": saved, "state": state, "next": run.train(steps, steps + 1), "after": run.state()}


def check_load(folder, steps, save_to=None, **run_options):
    """Loads, and perhaps saves at once what was loaded; then trains one step."""
    from gatewright.moe.hosts.deepspeed import load_checkpoint, save_checkpoint

    with Run(**run_options) as run:
        extra = load_checkpoint(run.engine, folder)
        assert run.engine.global_steps == steps
        state = run.state()
        if save_to is not None:
            save_checkpoint(run.engine, save_to, extra=extra)
        return {"extra": extra, "state": state, "next": run.train(steps, steps + 1), "after": run.state()}


def assert_equal_states(ours, expected):
    """Bit for bit."""
    assert ours.keys() == expected.keys()
    assert ours["scalars"] == expected["scalars"]
    for kind in ours.keys() - {"scalars"}:
        assert ours[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert torch.equal(ours[kind][name], value), f"{kind} of {name}"


def assert_same_step(ours, expected):
    for what in ("losses", "norms"):
        torch.testing.assert_close(ours["next"][what], expected["next"][what], rtol=1e-6, atol=0)
    for kind in ("master", "ema"):
        found = without_key_bias(ours["after"][kind])
        for name, value in without_key_bias(expected["after"][kind]).items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


# ---- the same layout -------------------------------------------------------------------------------------------------


def check_resume(folder, stage, dtype, router):
    """One run of 20 steps that saves at 10, and one that starts there."""
    from gatewright.moe.hosts.deepspeed import load_checkpoint, save_checkpoint

    options = {
        "stage": stage,
        "ep": 2,
        "dtype": dtype,
        "ema": 0.9,
        "scheduler": True,
        "weight_decay": 0.1,
        "router": router,
    }
    with Run(**options) as run:
        run.train(0, 10)
        save_checkpoint(run.engine, folder, extra={"seen": 10})
        torch.rand(3)
        drawn = torch.rand(3)
        expected = run.train(10, 20) | {"state": run.state(), "lr": run.engine.get_lr()}
    with Run(**options) as run:
        assert load_checkpoint(run.engine, folder) == {"seen": 10}
        torch.rand(3)
        assert torch.equal(torch.rand(3), drawn)
        return run.train(10, 20) | {"state": run.state(), "lr": run.engine.get_lr()}, expected


@pytest.mark.parametrize(
    "stage, dtype, router",
    [
        (0, "float32", "topk"),
        (1, "float32", "promoe"),
        (2, "float32", "race"),
        (3, "float32", "diffmoe"),
        (0, "bfloat16", "topk"),
        (1, "bfloat16", "topk"),
        (2, "bfloat16", "topk"),
        (3, "bfloat16", "topk"),
    ],
)
def test_resuming_is_not_stopping_bit_for_bit(ranks, tmp_path, stage, dtype, router):
    for resumed, expected in ranks(2).run(check_resume, tmp_path, stage, dtype, router):
        assert resumed["losses"] == expected["losses"]
        assert resumed["norms"] == expected["norms"]
        assert resumed["lr"] == expected["lr"]
        assert_equal_states(resumed["state"], expected["state"])


# ---- another layout --------------------------------------------------------------------------------------------------


def follow(ranks, tmp_path, first, journey, steps=3, **options):
    """Saves at a first layout (world, ep, stage), loads at each of the others and saves there: the state stays as it
    was, bit for bit, and the next step is the same step."""
    world, ep, stage = first
    options = {"ema": 0.9, "router": "topk", "lr": 1e-3} | options
    expected = ranks(world).run(check_save, tmp_path / "0", steps, stage=stage, ep=ep, extra={"at": 3}, **options)[0]
    for number, (world, ep, stage) in enumerate(journey):
        loaded = ranks(world).run(
            check_load, tmp_path / str(number), steps, save_to=tmp_path / str(number + 1), stage=stage, ep=ep, **options
        )
        for ours in loaded:
            assert ours["extra"] == {"at": 3}
            assert_equal_states(ours["state"], expected["state"])
            assert_same_step(ours, expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_expert_parallelism_changes_and_back(ranks, tmp_path, stage):
    follow(ranks, tmp_path, (2, 2, stage), [(2, 1, stage), (2, 2, stage)])


@pytest.mark.parametrize("stage", [1, 3])
def test_number_of_ranks_changes_and_back(ranks, tmp_path, stage):
    follow(ranks, tmp_path, (2, 2, stage), [(1, 1, stage), (2, 2, stage)])


def test_stage_and_expert_parallelism_change_together(ranks, tmp_path):
    follow(ranks, tmp_path, (2, 2, 0), [(2, 1, 3), (2, 2, 2), (2, 1, 1), (2, 2, 0)])


def test_a_bfloat16_run_changes_layout(ranks, tmp_path):
    """The float32 weights move; the step after is as near as bfloat16 sums are."""
    options = {"ema": 0.9, "router": "topk", "dtype": "bfloat16"}
    expected = ranks(2).run(check_save, tmp_path, 3, stage=2, ep=2, **options)[0]
    for stage, ep in [(3, 1), (0, 2), (1, 1)]:
        for ours in ranks(2).run(check_load, tmp_path, 3, stage=stage, ep=ep, **options):
            assert_equal_states(ours["state"], expected["state"])
            torch.testing.assert_close(ours["next"]["losses"], expected["next"]["losses"], rtol=1e-2, atol=0)


@pytest.mark.evidence
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_ranks(ranks, tmp_path, stage):
    follow(ranks, tmp_path, (4, 4, stage), [(4, 2, stage), (4, 1, stage), (2, 2, stage), (1, 1, stage), (4, 4, stage)])


def test_a_checkpoint_is_read_without_an_engine(ranks, tmp_path):
    expected = ranks(2).run(check_save, tmp_path, 3, stage=2, ep=2, ema=0.9, router="topk")[0]["state"]
    for kind in ("ema", "master", "exp_avg"):
        found = dict(checkpoint_parameters(tmp_path, kind))
        assert found.keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert torch.equal(found[name], value), name
    assert torch.equal(
        checkpoint_buffers(tmp_path)["blocks.0.moe.router.bias"], expected["buffers"]["blocks.0.moe.router.bias"]
    )
    with pytest.raises(ValueError, match='holds no "momentum": choose one of'):
        list(checkpoint_parameters(tmp_path, "momentum"))


# ---- what a killed or failed save leaves -----------------------------------------------------------------------------


def check_kills(folder):
    """Forks, which one rank without others may, saves in the child, and kills it at one point after the other."""
    from gatewright.moe.hosts.deepspeed import load_checkpoint, save_checkpoint

    outcomes = {}
    with Run("promoe", stage=0, ema=0.9) as run:
        run.train(0, 1)
        save_checkpoint(run.engine, folder, keep=1)
        run.train(1, 2)
        for module, name, calls in [
            ("checkpoint_files", "save_file", 1),
            ("checkpoint_files", "save_file", 3),
            ("checkpoint_files", "write_text", 1),
            ("checkpoint_files.os", "rename", 1),
            ("checkpoint_files", "write_text", 2),
            ("checkpoint_files.os", "rename", 2),
            ("checkpoint_files.shutil", "rmtree", 2),
        ]:
            child = os.fork()
            if child == 0:
                kill_at(module, name, calls)
                save_checkpoint(run.engine, folder, keep=1, shard_bytes=20_000)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = find_latest(folder)
            manifest = read_manifest(found)
            checkpoint_files.check_files(found, manifest)
            outcomes[f"{module}.{name} {calls}"] = (os.WTERMSIG(status), manifest["counters"]["global_steps"])
        save_checkpoint(run.engine, folder, keep=1)
        load_checkpoint(run.engine, folder)
        return outcomes, sorted(entry.name for entry in Path(folder).iterdir())


def kill_at(module, name, calls):
    """Makes the process die at the n-th call of a function: before it does anything."""
    place = checkpoint_files
    for part in module.split(".")[1:]:
        place = getattr(place, part)
    original, left = getattr(place, name), [calls]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(place, name, counted)


def test_kill_9_at_any_point_leaves_a_good_checkpoint(ranks, tmp_path):
    (outcomes, left), *_ = ranks(1).run(check_kills, tmp_path)
    assert all(died == signal.SIGKILL for died, _ in outcomes.values()), outcomes
    before = [steps for what, (_, steps) in outcomes.items()]
    # the new one counts once its folder has its name; the pointer follows
    assert before[:5] == [1, 1, 1, 1, 1] and before[5:] == [2, 2], outcomes
    assert len(left) == 2 and left[0] == "latest" and left[1].startswith("step-00000002"), left


def check_kill_one(folder):
    """Rank 1 dies in the middle of a save, rank 0 waits for it."""
    from gatewright.moe.hosts.deepspeed import save_checkpoint

    with Run("promoe", stage=2, ep=2, ema=0.9) as run:
        run.train(0, 1)
        save_checkpoint(run.engine, folder)
        run.train(1, 2)
        if run.rank == 1:
            kill_at("checkpoint_files", "save_file", 2)
        save_checkpoint(run.engine, folder, shard_bytes=5_000)


@pytest.mark.evidence
def test_kill_9_of_one_rank(ranks, tmp_path):
    with pytest.raises(RankFailed):
        ranks(2).run(check_kill_one, tmp_path)
    assert find_latest(tmp_path).name == "step-00000001"
    for loaded in ranks(2).run(check_load, tmp_path, 1, save_to=tmp_path, router="promoe", stage=1, ep=1, ema=0.9):
        assert loaded["next"]["losses"]
    # the next save removed what the killed one left
    assert not list(tmp_path.glob(".saving-*"))


def check_full_disk(folder):
    """One rank can write no file of more than a few bytes, as on a full disk; the other could."""
    from gatewright.moe.hosts.deepspeed import load_checkpoint, save_checkpoint

    with Run("promoe", stage=2, ep=2, ema=0.9) as run:
        run.train(0, 1)
        good = save_checkpoint(run.engine, folder)
        state = run.state()
        run.train(1, 2)
        with (
            no_room(run.rank == 1),
            pytest.raises(OSError, match="rank 1.*step-00000002 could not be written") as caught,
        ):
            save_checkpoint(run.engine, folder)
        entries = sorted(entry.name for entry in Path(folder).iterdir())
        load_checkpoint(run.engine, folder)
        assert_equal_states(run.state(), state)
        return str(caught.value), good.name, entries


@contextlib.contextmanager
def no_room(here):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nowhere, output)  # what is printed would count too
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        for output, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, output)


def test_a_failed_write_on_one_rank_is_an_error_on_all_and_loses_nothing(ranks, tmp_path):
    for message, good, entries in ranks(2).run(check_full_disk, tmp_path):
        assert "File too large" in message
        assert entries == ["latest", good]


def check_full_disk_at_the_end(folder):
    from gatewright.moe.hosts.deepspeed import save_checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    with Run("promoe", stage=0, ep=2) as run:
        good = save_checkpoint(run.engine, folder)
        checkpoint_files.flush_to_disk, original = full, checkpoint_files.flush_to_disk
        try:
            with pytest.raises(OSError, match="No space left on device"):
                save_checkpoint(run.engine, folder)
        finally:
            checkpoint_files.flush_to_disk = original
        return good.name, sorted(entry.name for entry in Path(folder).iterdir())


def test_a_full_disk_names_itself(ranks, tmp_path):
    for good, entries in ranks(2).run(check_full_disk_at_the_end, tmp_path):
        assert entries == ["latest", good]


def check_keep(folder):
    from gatewright.moe.hosts.deepspeed import save_checkpoint

    names = []
    with Run("promoe", stage=1, ep=2) as run:
        for step in range(4):
            run.train(step, step + 1)
            save_checkpoint(run.engine, folder, keep=2)
            names.append(sorted(entry.name for entry in Path(folder).iterdir()))
        # again at the same step: nothing is replaced before the new one is whole
        again = save_checkpoint(run.engine, folder, keep=2)
        return names, again.name, sorted(entry.name for entry in Path(folder).iterdir())


def test_only_the_newest_stay(ranks, tmp_path):
    names, again, left = ranks(2).run(check_keep, tmp_path)[0]
    assert names[0] == ["latest", "step-00000001"]
    assert names[3] == ["latest", "step-00000003", "step-00000004"]
    assert again == "step-00000004-1"
    assert left == ["latest", "step-00000004", "step-00000004-1"]
    assert find_latest(tmp_path).name == again


# ---- what is refused -------------------------------------------------------------------------------------------------


def check_refused(folder, **run_options):
    """Tries to load; the message, and whether the engine is as it was."""
    from gatewright.moe.hosts.deepspeed import load_checkpoint

    with Run(**run_options) as run:
        before = run.state()
        try:
            load_checkpoint(run.engine, folder)
        except ValueError as error:
            assert_equal_states(run.state(), before)
            assert run.engine.global_steps == 0
            return str(error)
        return None


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ranks(2).run(check_save, folder, 2, stage=2, ep=2, router="promoe", ema=0.9)
    return folder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router": "topk"}, r"layers 'blocks.0.moe' router is promoe there and topk here"),
        ({"router": "promoe", "num_experts": 8}, r"options num_experts is 4 there and 8 here"),
        ({"router": "promoe", "top_k": 2}, r"options top_k is 1 there and 2 here"),
    ],
)
def test_another_model_is_refused_by_its_first_difference(ranks, saved, options, message):
    for found in ranks(2).run(check_refused, saved, stage=2, ep=2, **options):
        assert found is not None
        assert re.search(message, found), found


def damage(saved, tmp_path, how):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    checkpoint = find_latest(folder)
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    if how == "a shard is missing":
        shard.unlink()
    elif how == "a shard is cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "a bit of a shard is turned":
        content = bytearray(shard.read_bytes())
        content[-3] ^= 4
        shard.write_bytes(content)
    elif how == "the manifest is cut":
        (checkpoint / MANIFEST).write_text((checkpoint / MANIFEST).read_text()[:-30])
    elif how == "the manifest is changed":
        text = (checkpoint / MANIFEST).read_text()
        (checkpoint / MANIFEST).write_text(text.replace('"global_steps": 2', '"global_steps": 3'))
    elif how == "a pickle lies among the files":
        torch.save({"harmless": 1}, checkpoint / "extra.pt")
    elif how == "only a pickle is there":
        shutil.rmtree(checkpoint)
        torch.save({"harmless": 1}, folder / "model.pt")
    elif how == "a newer version":
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    elif how == "nothing is there":
        shutil.rmtree(checkpoint)
    return folder


@pytest.mark.parametrize(
    "how, message",
    [
        ("a shard is missing", "safetensors is missing: expected"),
        ("a shard is cut", "is damaged: it has"),
        ("a bit of a shard is turned", "is damaged: its sha256 is"),
        ("the manifest is cut", "checkpoint.json is damaged"),
        ("the manifest is changed", "does not fit its checksum"),
        ("a pickle lies among the files", "holds extra.pt, which no checkpoint"),
        ("only a pickle is there", "but pickled files (model.pt)"),
        ("a newer version", "has version 99"),
        ("nothing is there", "holds no complete checkpoint"),
    ],
)
def test_damage_is_refused_before_anything_changes(ranks, saved, tmp_path, how, message):
    for found in ranks(2).run(check_refused, damage(saved, tmp_path, how), stage=2, ep=2, router="promoe"):
        assert found is not None and message in found, found


def test_a_cut_off_checkpoint_is_passed_over(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    good = find_latest(folder)
    for name in (".saving-step-00000009", "step-00000010"):
        (folder / name).mkdir()
    (folder / "latest").write_text("step-00000010")
    assert find_latest(folder) == good
    (folder / "latest").write_text("../elsewhere")
    assert find_latest(folder) == good
    assert find_latest(tmp_path / "nowhere") is None


def check_wrong_moments():
    """Saving and loading where something would be lost."""
    from gatewright.moe.hosts.deepspeed import EMA, load_checkpoint, save_checkpoint

    messages = {}

    def expect(what, error, action):
        with pytest.raises(error) as caught:
            action()
        messages[what] = str(caught.value)

    with Run("topk", stage=0, ema=0.9) as run:
        folder = Path("never-written")
        expect("keep", ValueError, lambda: save_checkpoint(run.engine, folder, keep=0))
        expect("extra", ValueError, lambda: save_checkpoint(run.engine, folder, extra={"a": {1, 2}}))
        expect("nan", ValueError, lambda: save_checkpoint(run.engine, folder, extra={"a": float("nan")}))
        with run.ema.applied():
            expect("averaged", RuntimeError, lambda: save_checkpoint(run.engine, folder))
            expect("averaged load", RuntimeError, lambda: load_checkpoint(run.engine, folder))
            expect("averaged update", RuntimeError, lambda: run.ema.update(1))
        loss = run.engine(*run.micro_batch())
        run.engine.backward(loss)
        run.engine.step()
        expect("between", ValueError, lambda: save_checkpoint(run.engine, folder))
        expect("decay", ValueError, lambda: EMA(run.engine, decay=1.0))
        expect("nowhere", ValueError, lambda: load_checkpoint(run.engine, folder))
        assert not folder.exists()
    return messages


def check_other_weights(folder):
    from gatewright.moe.hosts.deepspeed import save_checkpoint

    with Run("topk", stage=1, ep=2) as run, torch.no_grad():
        run.engine.module.head.bias += 1
        with pytest.raises(OSError, match="head.bias is not in the model what it is in the optimizer"):
            save_checkpoint(run.engine, folder)
    with Run("topk", stage=3, ep=2) as run, torch.no_grad():
        if run.rank == 1:
            run.engine.optimizer.fp32_partitioned_groups_flat[0][0] = torch.nan
        with pytest.raises(OSError, match="holds NaN or infinity"):
            save_checkpoint(run.engine, folder)
    return list(Path(folder).iterdir())


def test_weights_that_nobody_should_go_on_from_are_refused(ranks, tmp_path):
    assert ranks(2).run(check_other_weights, tmp_path) == [[], []]


def test_wrong_moments_are_refused(ranks):
    messages = ranks(1).run(check_wrong_moments)[0]
    assert "keep=0: choose at least 1" in messages["keep"]
    assert "must be JSON" in messages["extra"] and "must be JSON" in messages["nan"]
    assert "leave the block first" in messages["averaged"] and "leave the block first" in messages["averaged update"]
    assert "1 of 4 micro-batches are accumulated" in messages["between"]
    assert "decay=1.0" in messages["decay"]
    assert "is no folder" in messages["nowhere"]
