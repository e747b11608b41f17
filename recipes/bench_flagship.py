"""Tokens a second of the flagship's training step, against the same model with other expert layers, at EP = 1 and 2.

    python recipes/bench_flagship.py --size S --batch 8 --ep 1 2 --threads 2

    promoe    ProMoE's router, unconditional and shared expert: gatewright's layer, and a loop over the experts in it
    topk      softmax top-2 of 8 SwiGLU experts: the same two, and DeepSpeed's own AutoEP layer, which has no other
              routers; one set of weights, and losses that are compared before anything is timed

A step is that of ``promoe_dit.py`` on made-up latents: the loss, DeepSpeed's backward, AdamW, the routers' update. All
variants of a model live in one process (one a rank) and take the same batch in turn; ratios are taken inside a round,
with the 95 % interval of their median. At EP = 2 two ranks share the experts, the batch and the threads.
"""

import functools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from gatewright.kernels.activation import activate
from gatewright.moe import ExpertParallel, ExpertSpec, finish_step
from gatewright.moe.experts import GroupedExperts
from gatewright.moe.files import write_text
from gatewright.moe.hosts.deepspeed import DeepSpeedMoELayer, default_config
from gatewright.recipes.console import MISTAKES, Parser, describe, fail, is_first_rank
from gatewright.recipes.data.draw import Draw
from gatewright.recipes.models import DiT, create_objective, dit_config
from gatewright.recipes.models.dit_config import DiTConfig
from gatewright.recipes.promoe_dit import start_process_group
from gatewright.routers import Router, Routing, TokenContext
from gatewright.tools.measure import describe_machine, markdown, now, paired_ratio, spread
from gatewright.tools.peers import Shape, autoep_layer

PROGRAM = "bench_flagship"
WARMUP = 1
DTYPES = ("float32", "bfloat16")
MODELS = ("promoe", "topk")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def loop_over_experts(
    bank: GroupedExperts,
    x: Tensor,
    counts_E: Tensor,
    *,
    token: Tensor | None = None,
    weight: Tensor | None = None,
    combine: bool = False,
    backend: str | None = None,
) -> Tensor:
    """What ``GroupedExperts.forward`` computes, expert after expert in plain torch."""
    rows = x if token is None else x[token]
    none = [None] * len(bank.ids)
    b_in, b_out = (list(b.unbind(0)) if b is not None else none for b in (bank.b_in, bank.b_out))
    done = []
    for e, (block, w_in, w_out) in enumerate(
        zip(rows.split(counts_E.tolist()), bank.w_in.unbind(0), bank.w_out.unbind(0), strict=True)
    ):
        done.append(F.linear(activate(F.linear(block, w_in, b_in[e]), bank.spec.activation), w_out, b_out[e]))
    y = torch.cat(done)
    if weight is not None:
        y = (y * weight[:, None]).to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, y) if combine else y


def with_loop(layer: DeepSpeedMoELayer) -> DeepSpeedMoELayer:
    """The layer with its experts run by ``loop_over_experts``."""
    for bank in (layer.experts, layer.local_experts):
        if bank is not None:
            bank.forward = functools.partial(loop_over_experts, bank)
    return layer


class AutoEP(AutoEPMoELayer):
    """DeepSpeed's layer, called and answering as gatewright's."""

    def forward(self, x: Tensor, context: TokenContext | None = None) -> tuple[Tensor, Routing]:
        seen: list[Any] = []
        handle = self.router.register_forward_hook(lambda _, given, out: seen.append(out))
        y = super().forward(x)
        handle.remove()
        scores_TK, index_TK = seen[0][:2]
        return y, Routing.from_topk(index_TK, scores_TK.float(), bank_size=self.num_experts)


def autoep(router: Router, spec: ExpertSpec, *, parallel: ExpertParallel, seed: int, layer: int, **_: Any) -> nn.Module:
    """AutoEP's layer with the weights that gatewright's would have."""
    bank = GroupedExperts(spec, range(router.num_experts), seed=seed, layer=layer)
    block = nn.Module()
    block.gate, block.experts = SimpleNamespace(weight=router.weight), nn.Module()
    block.experts.gate_up_proj, block.experts.down_proj = bank.w1, bank.w2
    shape = Shape(tokens=1, dim=spec.dim, hidden=spec.hidden, experts=router.num_experts, top_k=router.top_k)
    made = autoep_layer(block, shape, ranks=parallel.size, rank=parallel.rank, kind=AutoEP)
    made.router.requires = router.requires  # the model asks the router of each layer what it must be given
    return made


def swiglu(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A factory of layers whose experts are SwiGLU without biases, which is what AutoEP has."""
    return lambda router, spec, **options: make(router, ExpertSpec(spec.dim, spec.hidden, "swiglu"), **options)


def variants(model: str, size: str) -> tuple[DiTConfig, dict[str, Callable[..., nn.Module]]]:
    """The configuration of a model, and by name what makes its layers."""
    if model == "promoe":
        return dit_config(size, "promoe"), {"gatewright": DeepSpeedMoELayer, "loop over experts": looped}
    dim = dit_config(size, "dense").dim
    # two experts of 4/3 dim, gated, have the parameters of a dense feed-forward of 4 dim
    config = dit_config(
        size, "topk", num_experts=8, top_k=2, expert_hidden=4 * dim // 3,
        router_options={"renormalise": True, "balance_weight": 0.0},
    )  # fmt: skip
    makers = {"gatewright": DeepSpeedMoELayer, "loop over experts": looped, "DeepSpeed AutoEP": autoep}
    return config, {name: swiglu(make) for name, make in makers.items()}


def looped(router: Router, spec: ExpertSpec, **options: Any) -> nn.Module:
    return with_loop(DeepSpeedMoELayer(router, spec, **options))


class Training:
    """One variant under DeepSpeed's engine. Collective.

    Args:
        batch: images of this rank in a step.
    """

    def __init__(
        self, config: DiTConfig, layer: Callable[..., nn.Module], parallel: ExpertParallel, args: Any, batch: int
    ) -> None:
        model = DiT(config, layer, parallel, 0)
        _open_gates(model)
        settings = default_config(zero_stage=args.zero, dtype=args.dtype, micro_batch=batch)
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
        self.objective, self.config, self.batch = create_objective("flow", config), config, batch

    def step(self, number: int) -> float:
        """One training step on the batch of that number; the loss."""
        rank = dist.get_rank()
        positions = range(rank * self.batch, (rank + 1) * self.batch)
        draw = Draw(seed=0, step=number, positions=positions)
        images = draw.normal("image", self.config.input_shape)
        labels = (draw.uniform("label") * self.config.num_classes).long()
        device = self.engine.device
        loss = self.objective.loss(self.engine, images.to(device), labels.to(device), draw).total
        self.engine.backward(loss)
        self.engine.step()
        finish_step(self.engine.module)
        return float(loss.detach())


@torch.no_grad()
def _open_gates(model: DiT) -> None:
    """Draws what adaLN-Zero keeps shut: at 0 the experts would reach neither the loss nor a gradient."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("adaLN_modulation" in name or name == "final_layer.linear"):
            module.weight.normal_(0, 0.02, generator=generator)


def race(model: str, args: Any) -> dict[str, Any]:
    """Seconds of each variant's steps, round by round, on this layout. Collective."""
    ranks = dist.get_world_size()
    config, makers = variants(model, args.size)
    parallel = ExpertParallel.create(ranks)
    entrants, failed = {}, {}
    for name, make in makers.items():
        try:
            entrants[name] = Training(config, make, parallel, args, args.batch // ranks)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if name == "gatewright":
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    losses = {name: [training.step(number) for number in range(WARMUP + 1)] for name, training in entrants.items()}
    for name, found in losses.items():
        for ours, theirs in zip(losses["gatewright"], found, strict=True):
            if abs(ours - theirs) > TOLERANCE[args.dtype] * abs(ours):
                raise ValueError(
                    f"{model}: {name} has losses {found}, gatewright {losses['gatewright']}: not one model"
                )
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    names = list(entrants)
    for round_ in range(args.rounds):
        at = round_ % len(names)
        for name in names[at:] + names[:at]:
            dist.barrier()
            start = now(entrants[name].engine.device)
            entrants[name].step(WARMUP + 1 + round_)
            dist.barrier()
            seconds[name].append(now(entrants[name].engine.device) - start)
    tokens = args.batch * config.num_tokens
    return {
        "model": model, "ep": ranks, "tokens": tokens, "failed": failed, "losses": losses,
        "seconds": {name: spread(own) for name, own in seconds.items()},
        "tokens_per_second": {name: tokens / statistics.median(own) for name, own in seconds.items()},
        "ratios": {
            name: paired_ratio(seconds["gatewright"], own) for name, own in seconds.items() if name != "gatewright"
        },
    }  # fmt: skip


def launch(model: str, ep: int, args: Any) -> dict[str, Any]:
    """Runs ``race`` in ``ep`` processes of their own and returns what the first found."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ep}", __file__,
            "--worker", str(found), "--models", model, "--size", args.size, "--batch", str(args.batch),
            "--dtype", args.dtype, "--zero", str(args.zero), "--rounds", str(args.rounds),
            "--threads", str(max(1, args.threads // ep)),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if not found.exists():
            said = re.findall(r"^(?:\[rank\d+\]: )?(\w*(?:Error|error): .+)$", done.stderr, flags=re.MULTILINE)
            raise ValueError(
                f"{model} at EP={ep} ended with status {done.returncode}: {(said or ['no reason given'])[0]}"
            )
        return json.loads(found.read_text())


def report(results: dict[str, Any]) -> str:
    machine = results["machine"]
    rows, notes = [], []
    for found in results["found"]:
        for name, seconds in found["seconds"].items():
            ratio = found["ratios"].get(name)
            rows.append([
                found["model"], str(found["ep"]), name, f"{found['tokens_per_second'][name]:.0f}",
                f"{1e3 * seconds['median']:.0f} [{1e3 * seconds['low']:.0f}, {1e3 * seconds['high']:.0f}]",
                "" if ratio is None else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
            ])  # fmt: skip
        notes += [
            f"- {found['model']} at EP={found['ep']}: {name} did not run: {why}"
            for name, why in found["failed"].items()
        ]
    return "\n".join([
        f"{machine['cpu']}, {results['threads']} threads in all, torch {machine['torch']}, {results['dtype']}, size "
        f"{results['size']}, batch {results['batch']}, {results['rounds']} rounds:", "",
        *markdown(["model", "EP", "expert layer", "tokens/s", "ms a step [quartiles]", "gatewright / it [95 %]"], rows),
        *(["", *notes] if notes else []),
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="S", help="tiny, S, B, L or XL")
    parser.add_argument("--batch", type=int, default=8, help="images a step, over all ranks")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--zero", type=int, default=1, help="DeepSpeed's ZeRO stage")
    parser.add_argument("--ep", type=int, nargs="+", default=[1, 2], help="ranks that share the experts")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="promoe, topk")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each variant")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, shared by the ranks")
    parser.add_argument("--out", type=Path, help="also write every number into this JSON file")
    parser.add_argument("--worker", type=Path, help="of this program itself: one rank, and where the first one writes")
    args = parser.parse_args(argv)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        check_options(args)
        if args.worker is not None:
            torch.set_num_threads(args.threads)
            start_process_group()
            found = race(args.models[0], args)
            if is_first_rank():
                write_text(args.worker, json.dumps(found))
            dist.destroy_process_group()
            return
        begin = time.perf_counter()
        results = {name: getattr(args, name) for name in ("size", "batch", "dtype", "zero", "rounds", "threads")}
        results["machine"] = describe_machine()
        results["found"] = [launch(model, ep, args) for model in args.models for ep in args.ep]
        results["total_seconds"] = time.perf_counter() - begin
        print(report(results))
        if args.out is not None:
            write_text(args.out, json.dumps(results, indent=1) + "\n")
    except MISTAKES as error:
        fail(PROGRAM, describe(error))


def check_options(args: Any) -> None:
    """
    Raises:
        ValueError: an option outside its range, or ranks that do not divide the batch or the experts.
    """
    for name in ("batch", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: choose at least 1")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: choose float32 or bfloat16")
    for model in args.models:
        if model not in MODELS:
            raise ValueError(f"--models {model}: choose from {', '.join(MODELS)}")
        experts = variants(model, args.size)[0].num_experts
        for ep in args.ep if args.worker is None else []:
            if ep < 1 or args.batch % ep or experts % ep:
                raise ValueError(
                    f"--ep {ep}: choose a number of ranks that divides the batch of {args.batch} and {model}'s "
                    f"{experts} experts"
                )


if __name__ == "__main__":
    main()
