"""The flagship as its user runs it: what it writes, killing and resuming it, a loss that is no number, and mistyped
options."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gatewright.moe.hosts.deepspeed_checkpoint import find_latest
from gatewright.moe.record_log import read_log
from gatewright.recipes import promoe_dit
from gatewright.recipes.data import load_data

PROGRAM = Path(promoe_dit.__file__)
SMALL = [
    "--data",
    "digits",
    "--batch",
    "16",
    "--micro_batch",
    "4",
    "--decay",
    "0",
    "--sample_per_class",
    "1",
    "--sample_steps",
    "2",
    "--validation_images",
    "8",
]
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command(*options: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(PROGRAM), *SMALL, *options]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in DISTRIBUTED} | {"OMP_NUM_THREADS": "1"}


def run(*options: str, ranks: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*options, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=600
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor but the random state, which is the process's own."""
    checkpoint = find_latest(folder / "checkpoints")
    tensors = {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}
    return {name: value for name, value in tensors.items() if not name.startswith("random/")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run of 8 steps that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run("--steps", "8", "--log_every", "4", "--save_every", "4", "--eval_every", "8", "--out", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout + done.stderr


def test_what_a_run_leaves(whole):
    folder, said = whole
    record = json.loads((folder / "run.json").read_text())
    assert record["model"] == "dit" and record["config"]["router"] == "promoe" and record["options"]["data"] == "digits"
    from PIL import Image

    assert Image.open(folder / "samples.png").size[0] > 0
    last = said.strip().splitlines()[-1]
    assert all(
        said in last
        for said in (f"run {folder}", str(folder / "samples.png"), str(folder / "checkpoints"), f"--logdir {folder}`")
    )
    assert "routing_contrastive" in said and "entropy" in said and "images/s" in said and "null" in said


def test_the_log_holds_every_loss_apart(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(whole[0] / "tensorboard")).Reload()
    tags = set(log.Tags()["scalars"])
    assert {"train/loss", "train/flow", "train/routing_contrastive", "train/grad_norm", "validation/null"} <= tags
    assert {"routing/entropy", "routing/layer_00/entropy", "routing/layer_00/routing_contrastive"} <= tags
    assert [event.step for event in log.Scalars("routing/layer_02/entropy")] == [3, 7]
    assert "custom_scalars__config__" in log.Tags()["tensors"]
    steps = [event.value for event in log.Scalars("train/loss")]
    parts = zip(log.Scalars("train/flow"), log.Scalars("train/routing_contrastive"), strict=True)
    assert steps == pytest.approx([a.value + b.value for a, b in parts], rel=1e-5)


def test_the_routing_is_recorded(whole):
    """Every token of every step, the losses beside it, and the probe with its labels."""
    log = read_log(whole[0])
    assert log.complete and log.notices == [] and log.steps.tolist() == [3, 7]
    assert [layer.name for layer in log.layers] == ["blocks.1.mlp", "blocks.3.mlp", "blocks.5.mlp"]
    # 16 images a step of 16 patches; an image without its label goes elsewhere, and every other token to one expert
    assert (log.counts.sum(-1) == log.tokens).all() and (log.tokens % 16 == 0).all()
    assert (log.tokens <= 4 * 16 * 16).all() and (log.tokens > 4 * 16 * 16 * 0.6).all()
    assert log.scalars["loss"][0].tolist() == list(range(8)) and "validation/null" in log.scalars
    assert (log.losses["routing_contrastive"] > 0).all()
    assert [probe.step for probe in log.probes] == [8] and log.probes[0].index[0].shape == (8 * 16, 1)
    assert {"class", "patch", "timestep"} <= log.probe_labels.keys()


def test_killed_and_resumed_is_not_disturbed(whole, tmp_path):
    """kill -9 after the first checkpoint; --resume finds it, and ends bit for bit where the undisturbed run ended."""
    folder = tmp_path / "run"
    options = ["--steps", "8", "--log_every", "4", "--save_every", "4", "--eval_every", "8", "--out", str(folder)]
    process = subprocess.Popen(
        command(*options), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while find_latest(folder / "checkpoints") is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert find_latest(folder / "checkpoints") is not None
    resumed = run("--resume", str(folder))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, actual = weights(whole[0]), weights(folder)
    assert expected.keys() == actual.keys()
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert not different, f"{len(different)} tensors differ after the resume, such as {different[:3]}"
    once, again = read_log(whole[0]), read_log(folder)
    assert again.steps.tolist() == [3, 7] and (again.counts == once.counts).all()


def test_killed_before_the_first_checkpoint(whole, tmp_path):
    """What is left then is run.json; --resume begins anew and ends where the undisturbed run ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    record = (whole[0] / "run.json").read_text()
    (folder / "run.json").write_text(record)
    resumed = run("--resume", str(folder))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, actual = weights(whole[0]), weights(folder)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.distributed
def test_resumes_on_two_ranks_with_expert_parallelism(whole, tmp_path):
    """One process to two that share the experts, at another ZeRO stage, the same micro-batches: equal but rounding."""
    folder = tmp_path / "run"
    first = run("--steps", "4", "--save_every", "4", "--eval_every", "4", "--out", str(folder))
    assert first.returncode == 0, first.stderr[-3000:]
    more = ["--steps", "8", "--ep", "2", "--zero", "3", "--save_every", "4", "--eval_every", "8"]
    second = run("--resume", str(folder), *more, ranks=2)
    assert second.returncode == 0, second.stderr[-3000:]
    once, twice = weights(whole[0]), weights(folder)
    assert once.keys() == twice.keys()
    for name, value in once.items():
        # the key bias has no gradient but noise, which Adam makes as large as any
        if "qkv.bias" not in name:
            assert torch.allclose(value.double(), twice[name].double(), atol=1e-5), name


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    folder = tmp_path / "run"
    done = run(
        "--steps", "12", "--lr", "1e30", "--clip", "0", "--save_every", "1", "--eval_every", "12", "--out", str(folder)
    )
    assert done.returncode == 2
    assert "the loss is" in done.stderr and "step " in done.stderr and "first in the" in done.stderr, done.stderr[
        -2000:
    ]
    assert "Traceback" not in done.stderr
    assert all(value.isfinite().all() for name, value in weights(folder).items() if value.is_floating_point()), (
        "a bad checkpoint was kept"
    )


def test_router_of_choice_and_dense(tmp_path):
    """Every router of the recipe trains and draws through the same program."""
    for router in ("dense", "topk", "expert_choice", "diffmoe", "race", "soft_moe", "attention_aware"):
        done = run(
            "--router",
            router,
            "--steps",
            "2",
            "--objective",
            "ddpm" if router == "topk" else "flow",
            "--out",
            str(tmp_path / router),
        )
        assert done.returncode == 0, f"{router}: {done.stderr[-2000:]}"
        assert (tmp_path / router / "samples.png").exists()
        assert (tmp_path / router / "report.html").exists() == (router != "dense")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--router", "promo"], "promoe"),
        (["--router", "dens"], "dense"),
        (["--size", "tinny"], "tiny"),
        (["--data", "mnist5"], "mnist5k"),
        (["--objective", "flaw"], "flow"),
        (["--router", "soft_moe", "--top_k", "2"], "It has dim, num_experts, slots"),
        (["--router_option", "temprature=0.1"], "temperature"),
        (["--router_option", "temperature"], "NAME=VALUE"),
        (["--steps", "0"], "positive"),
        (["--sample_per_class", "0"], "positive"),
        (["--guidance", "-1"], "guidance"),
        (["--vae", "nowhere"], "only latents"),
        (["--dtype", "float16"], "bfloat16"),
        (["--ep", "2"], "does not divide 1 rank"),
        (["--router", "dense", "--ep", "1", "--num_experts", "3"], "dense"),
        (["--num_experts", "5", "--ep", "2"], "choose one of"),
        (["--batch", "10"], "does not divide"),
        (["--deepspeed_config", "nowhere.json"], "nowhere.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_clear_line(options, said, tmp_path, capsys, monkeypatch):
    for name in DISTRIBUTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(promoe_dit, "start_process_group", lambda: None)
    out = tmp_path / "run"
    with pytest.raises((SystemExit, ValueError)) as error:
        check(promoe_dit.parse([*SMALL, *options, "--out", str(out)]))
    assert said in str(error.value) + capsys.readouterr().err
    assert not out.exists(), "something was written before the mistake was told"


def check(args) -> None:
    """What the program checks before it trains, without an engine."""
    data = load_data(args.data)
    promoe_dit.check_options(args, promoe_dit.make_config(args, data), data, ranks=1)


def test_unknown_option_offers_the_close_ones(capsys):
    with pytest.raises(SystemExit) as error:
        promoe_dit.parse(["--rooter", "promoe"])
    assert error.value.code == 2
    assert "--router" in capsys.readouterr().err


def test_a_run_is_never_overwritten(whole):
    with pytest.raises(ValueError, match="not empty"):
        promoe_dit.find_run(promoe_dit.parse(["--out", str(whole[0])]))


def test_resuming_another_model_is_refused(whole):
    args = promoe_dit.parse(["--resume", str(whole[0]), "--num_experts", "4"])
    with pytest.raises(ValueError, match="num_experts=6, not 4"):
        promoe_dit.check_resumable(whole[0], promoe_dit.make_config(args, load_data("digits")))


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        promoe_dit.parse(["--resume", str(tmp_path)])
