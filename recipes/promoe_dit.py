"""Trains ProMoE's diffusion transformer, or the same body with another router, under DeepSpeed.

    deepspeed recipes/promoe_dit.py                                              digits on two cores, minutes
    deepspeed recipes/promoe_dit.py --size XL --data latents:DIR --dtype bfloat16 --ep 4 --zero 2      the paper's run

    loss = objective (flow: mean (v(x_s, s) - (eps - x_0))^2) + sum over MoE blocks of the router's losses

A run is a folder: ``run.json`` (what rebuilds the model), ``checkpoints/``, ``tensorboard/``, ``routing/`` (what the
routers did), ``samples.png``, and ``report.html``, the routing as one page (``gatewright dashboard RUN``).
``--resume`` goes on from its last whole checkpoint, on any number of ranks, at any ``--ep`` and ``--zero``. What a
rank sees and draws in a step follows from the seed and the step alone, so a run is the same on every layout up to
rounding.

Source: ProMoE, arXiv:2510.24711v2, section 5.1 and appendix A, and its released configurations: AdamW 1e-4, batch
256, clip 0.5, label dropout 0.1, EMA 0.9999. The tiny size has a shorter schedule of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import gatewright
from gatewright.moe import ExpertParallel, finish_step
from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer, global_grad_norm
from gatewright.moe.hosts.deepspeed_checkpoint import find_latest, load_checkpoint, save_checkpoint
from gatewright.moe.hosts.deepspeed_config import default_config, read_config
from gatewright.moe.hosts.deepspeed_ema import EMA
from gatewright.moe.parallel import check_divides_world
from gatewright.moe.record import Recorder
from gatewright.recipes.console import MISTAKES, Parser, describe, fail, is_first_rank
from gatewright.recipes.data import Data, batches, load_data
from gatewright.recipes.data.autoencoder import load_autoencoder
from gatewright.recipes.models import DiT, DiTConfig, create_objective, dit_config, draw_samples, validation_loss
from gatewright.recipes.models.dit_config import DENSE
from gatewright.recipes.monitor import RoutingMonitor, RoutingReport
from gatewright.recipes.picture import save_grid
from gatewright.routers import router_options
from gatewright.tools.dashboard.data import read_runs
from gatewright.tools.dashboard.report import write_report
from gatewright.tools.dashboard.scalars import RoutingScalars
from gatewright.tools.runs import Run, read_run

PROGRAM = "promoe_dit"
RUNS = Path("runs")
POSITIVE = (
    *("steps", "batch", "micro_batch", "lr", "log_every", "eval_every", "save_every"),
    *("validation_images", "sample_per_class", "sample_steps"),
)
# what a run may change when it is resumed
LAYOUT = (
    "ep",
    "zero",
    "dtype",
    "micro_batch",
    "deepspeed_config",
    "checkpoint_blocks",
    "local_rank",
    "resume",
    "out",
    "vae",
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    model = parser.add_argument_group("model")
    model.add_argument("--size", default="tiny", help="tiny, S, B, L or XL")
    model.add_argument(
        "--router", default="promoe", help="promoe, topk, expert_choice, diffmoe, race, any other router, or dense"
    )
    model.add_argument(
        "--router_option", action="append", default=[], metavar="NAME=VALUE", help="repeatable; VALUE is JSON or a word"
    )
    model.add_argument("--num_experts", type=int, help="routed experts of a layer (by default the paper's)")
    model.add_argument("--top_k", type=float, help="experts a token (by default the paper's)")
    model.add_argument("--objective", default="flow", help="flow or ddpm")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default="mnist5k", help="mnist5k, digits, fashion-mnist[:DIR], imagefolder:DIR or latents:DIR"
    )
    data.add_argument("--image_size", type=int, help="side of the crop, for imagefolder")
    data.add_argument("--validation_images", type=int, default=500, help="held-out images that are scored")
    data.add_argument("--vae", type=Path, help="folder of the autoencoder that draws the samples of a latents run")

    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=int, help="optimizer steps in all (by default 2000 for tiny, 500000 otherwise)")
    train.add_argument("--batch", type=int, help="images a step, over all ranks (32 for tiny, 256 otherwise)")
    train.add_argument("--lr", type=float, help="of AdamW (3e-3 for tiny, 1e-4 otherwise)")
    train.add_argument(
        "--warmup", type=int, help="steps over which the learning rate rises (50 for tiny, none otherwise)"
    )
    train.add_argument(
        "--decay", type=float, help="share of the steps over which it falls to 0 (0.4 for tiny, 0 otherwise)"
    )
    train.add_argument("--clip", type=float, default=0.5, help="largest norm of the gradient; 0 = no clipping")
    train.add_argument("--ema", type=float, default=0.9999, help="decay of the averaged weights, ramped up from 0")
    train.add_argument("--seed", type=int, default=0)

    layout = parser.add_argument_group("layout")
    layout.add_argument("--ep", type=int, default=1, help="ranks that share the experts of a layer")
    layout.add_argument("--zero", type=int, default=1, help="DeepSpeed's ZeRO stage, 0 to 3")
    layout.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    layout.add_argument(
        "--micro_batch", type=int, help="images a forward on one rank (by default a rank's whole share)"
    )
    layout.add_argument(
        "--checkpoint_blocks", action="store_true", help="compute blocks again in the backward, to save memory"
    )
    layout.add_argument(
        "--deepspeed_config", type=Path, help="JSON; replaces what --zero, --dtype, --lr and --clip would set"
    )
    layout.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, help="the run's folder (by default a new one in runs/)")
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with RUN, or with --out, or with the newest in runs/",
    )
    run.add_argument("--log_every", type=int, default=20, help="steps between log lines")
    run.add_argument("--eval_every", type=int, help="steps between validations (by default a fifth of the steps)")
    run.add_argument("--save_every", type=int, help="steps between checkpoints (by default a fifth of the steps)")
    run.add_argument("--sample_per_class", type=int, default=10, help="columns of the sample grid")
    run.add_argument("--sample_steps", type=int, default=50, help="forwards a sample")
    run.add_argument("--guidance", type=float, default=2.0, help="of the samples; 1 = none")
    args = parser.parse_args(argv)
    recorded = _recorded_options(args)
    if recorded:
        parser.set_defaults(**{name: value for name, value in recorded.items() if name not in LAYOUT})
        args = parser.parse_args(argv)
    return _with_defaults(args)


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    tiny = args.size == "tiny"
    defaults = {
        "steps": 2000 if tiny else 500_000,
        "batch": 32 if tiny else 256,
        "lr": 3e-3 if tiny else 1e-4,
        "warmup": 50 if tiny else 0,
        "decay": 0.4 if tiny else 0.0,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("eval_every", "save_every"):
        if getattr(args, name) is None:
            setattr(args, name, max(1, args.steps // 5))
    if args.warmup < 0 or not 0 <= args.decay <= 1:
        raise ValueError(
            f"--warmup {args.warmup} --decay {args.decay}: choose steps of at least 0, and a share of 0 to 1"
        )
    for name in POSITIVE:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: choose a positive number")
    if args.guidance < 0:
        raise ValueError(f"--guidance {args.guidance}: choose 0 (no class), 1 (no guidance) or more")
    return args


def _router_options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--router_option {pair}: write NAME=VALUE, such as contrastive_weight=0")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def make_config(args: argparse.Namespace, data: Data) -> DiTConfig:
    overrides: dict[str, Any] = {"input_shape": data.shape, "num_classes": data.num_classes}
    for name in ("num_experts", "top_k"):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    options = _router_options(args.router_option)
    if options:
        overrides["router_options"] = options
    config = dit_config(args.size, args.router, **overrides)
    if args.top_k is not None and "top_k" not in router_options(config.router):
        options_there = ", ".join(router_options(config.router))
        raise ValueError(f'--top_k {args.top_k:g}: router "{config.router}" has no such option. It has {options_there}')
    return config


def train(args: argparse.Namespace, run: Path, resumed: bool) -> None:
    """Trains from the last checkpoint of ``run``, or from the start, to ``args.steps``; then draws and saves."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = load_data(args.data, image_size=args.image_size)
    config = make_config(args, data)
    check_options(args, config, data, ranks)
    check_resumable(run, config) if resumed else write_run(run, config, args)
    engine = make_engine(args, config)
    model, objective = engine.module, create_objective(args.objective, config)
    # a run that was killed before its first checkpoint begins anew
    saved = resumed and find_latest(run / "checkpoints") is not None
    first_step = load_checkpoint(engine, run / "checkpoints")["step"] if saved else 0
    ema = EMA(engine, decay=args.ema)
    monitor, log = RoutingMonitor(model, run, every=args.log_every), RunLog(run, args, first_step)
    micro_batches = engine.gradient_accumulation_steps()
    highest_rates = [group["lr"] for group in engine.optimizer.param_groups]

    for step in range(first_step, args.steps):
        totals: dict[str, float] = {}
        if engine.lr_scheduler is None:
            for group, highest in zip(engine.optimizer.param_groups, highest_rates, strict=True):
                group["lr"] = highest * rate(step, args)
        cut = {"global_batch": args.batch, "seed": args.seed, "step": step, "rank": rank, "ranks": ranks}
        for batch in batches(data.train, **cut, micro_batches=micro_batches):
            images, labels = batch.images.to(engine.device), batch.labels.to(engine.device)
            result = objective.loss(engine, images, labels, batch.draw)
            terms = {"loss": result.total, objective.name: result.loss} | result.parts | result.auxiliary
            means = mean_over_ranks(terms)
            if not all(torch.isfinite(torch.tensor(list(means.values())))):
                raise FloatingPointError(
                    f"step {step}: the loss is {means}{blame(model, objective, images, labels, batch.draw)}"
                )
            totals = {name: totals.get(name, 0.0) + value / micro_batches for name, value in means.items()}
            engine.backward(result.total)
            engine.step()
        if engine.was_step_applied():
            finish_step(model)
            ema.update(step + 1)
        totals["grad_norm"] = global_grad_norm(engine)
        log.step(step, totals)
        monitor.step(step, totals)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            log.routing(step, monitor.collect(), monitor.recorder)
        if done % args.eval_every == 0 or done == args.steps:
            with ema.applied():
                losses = validate(objective, model, data, args, rank, ranks)
            log.validation(step, losses)
            monitor.log(step, {f"validation/{name}": value for name, value in losses.items()})
            monitor.probe(done, objective, model, *validation_images(data, args))
        if done % args.save_every == 0 or done == args.steps:
            monitor.collect()  # a window that reached beyond the checkpoint would be lost by going on from it
            save_checkpoint(engine, run / "checkpoints", extra={"step": done})
    monitor.close()
    with ema.applied():
        picture = draw_picture(objective, model, data, args, run)
    log.close(picture, draw_report(run) if config.router != DENSE and is_first_rank() else None)


def check_options(args: argparse.Namespace, config: DiTConfig, data: Data, ranks: int) -> None:
    """Finds what is wrong with the options while nothing is written or joined yet.

    Raises:
        ValueError: an option that does not go with the others, the data, the number of ranks, or the router.
    """
    if args.vae is not None:
        if data.latent_scale is None:
            raise ValueError(
                f"--vae with --data {args.data}: only latents need an autoencoder to be drawn; leave it out"
            )
        load_autoencoder(args.vae)
    create_objective(args.objective, config)
    engine_settings(args, ranks)
    check_divides_world(args.ep, ranks)
    if config.router == DENSE and args.ep > 1:
        raise ValueError(f"--ep {args.ep} with --router dense: there are no experts to share; leave it at 1")
    with torch.device("meta"):
        DiT(config, parallel=ExpertParallel(size=args.ep))


def engine_settings(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    share, rest = divmod(args.batch, ranks)
    micro_batch = args.micro_batch or share
    if rest or share % micro_batch:
        raise ValueError(f"--batch {args.batch} does not divide over {ranks} rank(s) in micro-batches of {micro_batch}")
    settings = default_config(
        zero_stage=args.zero,
        dtype=args.dtype,
        micro_batch=micro_batch,
        accumulation=share // micro_batch,
        clip=args.clip,
        lr=args.lr,
    )
    if args.deepspeed_config is None:
        return settings
    return merge_batch(read_config(args.deepspeed_config), settings, args)


def make_engine(args: argparse.Namespace, config: DiTConfig) -> Any:
    """The DeepSpeed engine with the model in it. Collective."""
    parallel = ExpertParallel.create(args.ep)
    model = DiT(config, DeepSpeedMoELayer, parallel, args.seed, checkpoint_blocks=args.checkpoint_blocks)
    settings = engine_settings(args, dist.get_world_size())
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def merge_batch(config: dict[str, Any], ours: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The user's configuration, with the batch that the options ask for, and with our optimizer where it has none.

    Raises:
        ValueError: it asks for another batch.
    """
    sizes = {"train_batch_size": args.batch} | {
        n: ours[n] for n in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    }
    for name, value in sizes.items():
        if config.get(name, "auto") not in ("auto", value):
            asked = f"--batch and --micro_batch make it {value}"
            raise ValueError(f"{args.deepspeed_config}: {name}={config[name]}, but {asked}: remove one")
    return {"optimizer": ours["optimizer"]} | config | sizes


def rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate in ``step``, as a share of the highest: up over the warm-up, down to 0 over the decay."""
    up = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    falling = args.decay * args.steps
    return min(up, 1.0, (args.steps - step) / falling) if falling else up


def mean_over_ranks(terms: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([term.detach().double() for term in terms.values()])
    dist.all_reduce(values)
    return dict(zip(terms, (values / dist.get_world_size()).tolist(), strict=True))


def blame(model: torch.nn.Module, objective, images: Tensor, labels: Tensor, draw) -> str:
    """Runs the batch again and names the first module whose parameters or output are not finite. Collective."""
    found: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module, _inputs, output) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and not torch.isfinite(first).all():
            what = (
                "parameters" if any(not torch.isfinite(p).all() for p in module.parameters(recurse=False)) else "output"
            )
            found.append(f"; first in the {what} of {names[module] or 'the model'} on rank {dist.get_rank()}")

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    with torch.no_grad():
        objective.loss(model, images, labels, draw)
    for hook in hooks:
        hook.remove()
    reports: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(reports, found[:1])
    return next((report[0] for report in reports if report), "; every module's output is finite, so it is in the loss")


def validate(objective, model, data: Data, args: argparse.Namespace, rank: int, ranks: int) -> dict[str, float]:
    images, labels = validation_images(data, args)
    return validation_loss(objective, model, images, labels, rank=rank, ranks=ranks)


def validation_images(data: Data, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The held-out images that are scored, and their labels."""
    count = min(args.validation_images, len(data.validation))
    return data.validation.images(range(count)), data.validation.labels[:count]


def draw_report(run: Path) -> Path:
    """What the routers did, as one page: ``gatewright dashboard RUN``."""
    path = run / "report.html"
    write_report(read_runs([run]), path)
    return path


def draw_picture(objective, model, data: Data, args: argparse.Namespace, run: Path) -> Path:
    """One row a class, the first ten classes. Collective: with experts on other ranks, every rank draws."""
    labels = torch.arange(min(10, data.num_classes)).repeat_interleave(args.sample_per_class)
    samples = draw_samples(
        objective, model, labels, guidance=args.guidance, steps=args.sample_steps, seed=args.seed
    ).cpu()
    path = run / "samples.png"
    if data.latent_scale is None:
        pixels = data.to_pixels(samples)
    elif args.vae is not None:
        pixels = data.to_pixels(samples, decode=load_autoencoder(args.vae).decode)
    else:
        path = run / "samples.safetensors"  # nothing here can turn a latent into a picture
        if is_first_rank():
            save_file({"latents": samples, "labels": labels}, path)
        return path
    if is_first_rank():
        save_grid(pixels, path, columns=args.sample_per_class)
    return path


class RunLog:
    """The progress bar, the log lines and the TensorBoard files of a run; on other ranks than the first, nothing."""

    def __init__(self, run: Path, args: argparse.Namespace, first_step: int) -> None:
        self.run, self.args, self.writer = run, args, None
        self.scalars: RoutingScalars | None = None
        self._since, self._images, self._last = time.perf_counter(), 0, {}
        self.bar = tqdm(
            total=args.steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=None if is_first_rank() else True,
        )
        if is_first_rank():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def step(self, step: int, totals: dict[str, float]) -> None:
        self._last, self._images = totals, self._images + self.args.batch
        self.bar.set_postfix_str(f"loss {totals['loss']:.4f}", refresh=False)
        self.bar.update()

    def routing(self, step: int, report: RoutingReport, recorder: Recorder | None) -> None:
        """The line: losses, images a second since the last one, and what the routers did."""
        now = time.perf_counter()
        speed, self._since, self._images = self._images / (now - self._since), now, 0
        last = "  ".join(f"{name} {value:.4f}" for name, value in self._last.items())
        self._say(f"step {step + 1}/{self.args.steps}  {last}  {speed:.0f} images/s  {report.line()}")
        self._scalars("train", self._last | {"images_per_second": speed}, step)
        if self.writer is not None and recorder is not None:
            self.scalars = self.scalars or RoutingScalars(self.writer)
            self.scalars.write(recorder)
        for layer, losses in enumerate(report.losses):
            self._scalars(f"routing/layer_{layer:02d}", losses, step)

    def validation(self, step: int, losses: dict[str, float]) -> None:
        self._say(
            f"step {step + 1}/{self.args.steps}  validation (averaged weights)  "
            + "  ".join(f"{n} {v:.4f}" for n, v in losses.items())
        )
        self._scalars("validation", losses, step)
        self._since, self._images = time.perf_counter(), 0

    def close(self, picture: Path, report: Path | None) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
            print(
                f"run {self.run}: samples in {picture}, "
                + (f"routing in {report}, " if report else "")
                + f"checkpoint in {find_latest(self.run / 'checkpoints')}, log by "
                f"`tensorboard --logdir {self.run}`, more samples by "
                f"`python recipes/sample_dit.py {self.run}`"
            )

    def _say(self, line: str) -> None:
        if self.writer is not None:
            self.bar.write(line)

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)


def find_run(args: argparse.Namespace) -> Path:
    """The folder of the run: a new one, or the one to go on with.

    Raises:
        ValueError: a new run would lie in a folder that holds one.
        FileNotFoundError: nothing to go on with.
    """
    if args.resume is None:
        if args.out is None:
            taken = [
                int(path.name.rpartition("-")[2])
                for path in RUNS.glob(f"{PROGRAM}-[0-9]*")
                if path.name.rpartition("-")[2].isdigit()
            ]
            return RUNS / f"{PROGRAM}-{max(taken, default=0) + 1}"
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"{args.out} is not empty: go on with the run in it by --resume, or choose another --out")
        return args.out
    if args.resume or args.out:
        return Path(args.resume or args.out)
    runs = sorted(RUNS.glob(f"{PROGRAM}-*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"no run in {RUNS}/ to go on with: name one, --resume RUN, or leave --resume out")
    return runs[-1].parent


def _recorded_options(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.resume is None else read_run(find_run(args)).options


def write_run(run: Path, config: DiTConfig, args: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(args).items() if name not in LAYOUT}
    versions = {"gatewright": gatewright.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
    if is_first_rank():
        Run(path=run, model="dit", config=config.as_dict(), options=options).write(versions)
    dist.barrier()


def check_resumable(run: Path, config: DiTConfig) -> None:
    """
    Raises:
        ValueError: the run's model is another than the one asked for.
    """
    recorded = DiTConfig.from_dict(read_run(run).config).as_dict()
    for name, value in config.as_dict().items():
        if recorded[name] != value:
            raise ValueError(
                f"{run} was trained with {name}={recorded[name]}, not {value}: leave the option out, or start a new run"
            )


def start_process_group() -> None:
    """Joins the launcher's processes; started without a launcher, makes a group of one."""
    if "RANK" not in os.environ:
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    deepspeed.init_distributed(verbose=False)


def main(argv: list[str] | None = None) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        args = parse(argv)
        # every rank looks before any writes, so that all fail alike or none does
        folder = [str(find_run(args))]
        start_process_group()
        dist.broadcast_object_list(folder)
        train(args, Path(folder[0]), resumed=args.resume is not None)
    except FloatingPointError as error:
        fail(PROGRAM, f"{error}. Nothing was saved since; the last good checkpoint is still there")
    except MISTAKES as error:
        fail(PROGRAM, describe(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
