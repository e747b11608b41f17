"""What the routing contrastive loss does to a router, on 8x8 digits in minutes on a CPU.

Trains one small diffusion transformer four times a seed: with ProMoE's router and its contrastive loss, with that
router and no such loss, with a linear softmax router and a balance loss, and with plain feed-forwards of the same
activated width. Then, on held-out images, every label shown, at noise and times that never change, in each MoE layer:

    centroid_e      = mean of the tokens that expert e received
    centroid cosine = mean over pairs of experts of cos(centroid_i, centroid_j): do experts see different tokens?
    prototype cosine, the same of the router's rows; at least -1 / (E - 1)
    gate            = mean weight of the assignments
    share_e         = part of the assignments that go to e;   load CV = population deviation of the shares / their mean
    starved         = experts with a share below 1 %

averaged over the layers, beside the validation loss. Prints a table of mean +- population deviation over the seeds and
writes every run into a JSON file.

The setup: 4 blocks, width 64, 4 heads, patch 2 (16 tokens); in blocks 1 and 3 six routed experts and a shared one of
hidden width 128, ProMoE's with its unconditional expert too; dense hidden width 256; rectified flow; AdamW at 1e-3
without decay, batch 128, gradients clipped at 0.5, labels dropped with probability 0.1, raw weights.

    python recipes/contrastive_geometry.py --seeds 0 1 2 --steps 600
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.moe import finish_step, moe_layers
from gatewright.moe.files import write_text
from gatewright.recipes.data.draw import Draw
from gatewright.recipes.data.load import load_data
from gatewright.recipes.data.sampler import batches
from gatewright.recipes.data.split import Data
from gatewright.recipes.models import DiT, DiTConfig, Objective, create_objective, validation_loss
from gatewright.routers import Router, Routing

NUM_EXPERTS = 6
STARVED = 0.01
REPEATS = 8
_EXPERTS = {"num_experts": NUM_EXPERTS, "top_k": 1, "expert_hidden": 128, "shared_expert": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "promoe": {"router": "promoe", "router_options": {"contrastive_weight": 1.0}, **_EXPERTS},
    "promoe without contrastive loss": {"router": "promoe", "router_options": {"contrastive_weight": 0.0}, **_EXPERTS},
    "topk with balance loss": {"router": "topk", "router_options": {"balance_weight": 0.01}, **_EXPERTS},
    "dense": {"router": "dense"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Of one MoE layer, or the mean over layers; see the top of this file."""

    centroid_cosine: float
    prototype_cosine: float
    gate: float
    smallest_share: float
    largest_share: float
    load_cv: float
    starved: float

    @classmethod
    def mean(cls, layers: Sequence["Geometry"]) -> "Geometry":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: sum(getattr(layer, name) for layer in layers) / len(layers) for name in names})


def toy_config(variant: str, data: Data) -> DiTConfig:
    """
    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f'unknown variant "{variant}": choose from {", ".join(VARIANTS)}')
    return DiTConfig(
        input_shape=data.shape,
        num_classes=data.num_classes,
        patch=2,
        dim=64,
        depth=4,
        heads=4,
        learn_sigma=False,
        **VARIANTS[variant],
    )


def train(objective: Objective, data: Data, *, seed: int, steps: int) -> DiT:
    """A model after ``steps`` optimizer steps; model, order, noise and dropped labels all follow from ``seed``."""
    model = DiT(objective.config, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for step in range(steps):
        for batch in batches(data.train, global_batch=128, seed=seed, step=step):
            objective.loss(model, batch.images, batch.labels, batch.draw).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        finish_step(model)
    return model


@torch.no_grad()
def measure_geometry(objective: Objective, model: DiT, images: Tensor, labels: Tensor) -> Geometry | None:
    """The mean over the model's MoE layers, on ``REPEATS`` draws of noise and time an image; None where it has none."""
    tallies = [_Tally(layer.router) for layer in moe_layers(model)]
    if not tallies:
        return None
    model.eval()
    hooks = [tally.router.register_forward_hook(tally.add) for tally in tallies]
    for repeat in range(REPEATS):
        objective.score(model, images, labels, Draw(0, repeat, tuple(range(len(images)))))
    for hook in hooks:
        hook.remove()
    model.train()
    return Geometry.mean([tally.geometry() for tally in tallies])


class _Tally:
    """Adds up what one router sends to each routed expert."""

    def __init__(self, router: Router) -> None:
        self.router = router
        experts, dim = self._prototypes().shape
        self.sum_ED = torch.zeros(experts, dim, dtype=torch.float64)
        self.count_E = torch.zeros(experts, dtype=torch.float64)
        self.weight = 0.0

    def add(self, router: Router, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        token, expert, weight = routing.as_list()
        routed = expert < router.num_experts
        token, expert = token[routed], expert[routed]
        self.sum_ED.index_add_(0, expert, inputs[0][token].double())
        self.count_E += torch.bincount(expert, minlength=len(self.count_E))
        self.weight += float(weight[routed].double().sum())

    def geometry(self) -> Geometry:
        share_E = self.count_E / self.count_E.sum()
        return Geometry(
            centroid_cosine=mean_cosine(self.sum_ED[self.count_E > 0]),  # a sum points where its mean does
            prototype_cosine=mean_cosine(self._prototypes().double()),
            gate=self.weight / float(self.count_E.sum()),
            smallest_share=float(share_E.min()),
            largest_share=float(share_E.max()),
            load_cv=float(share_E.std(correction=0) / share_E.mean()),
            starved=float((share_E < STARVED).sum()),
        )

    def _prototypes(self) -> Tensor:
        """[E, D]: one direction a routed expert, by which tokens are compared to it."""
        return self.router.prototypes if self.router.name == "promoe" else self.router.weight


def mean_cosine(rows_ED: Tensor) -> float:
    """The mean cosine over pairs of different rows; 1 for a single row, to which everything collapsed."""
    rows = len(rows_ED)
    if rows < 2:
        return 1.0
    unit_ED = F.normalize(rows_ED, dim=-1)
    return float(((unit_ED @ unit_ED.T).sum() - rows) / (rows * (rows - 1)))


def zero_predictor_loss(images: Tensor) -> float:
    """What the answer 0 scores on average over noise: mean (eps - x)^2 = 1 + mean x^2. Every run starts there."""
    return 1 + float(images.double().square().mean())


def run_variant(variant: str, data: Data, *, seed: int, steps: int) -> dict[str, float]:
    """Trains one model and measures it: losses ("conditional", "null"), ``Geometry``, "seconds" of training."""
    objective = create_objective("flow", toy_config(variant, data))
    start = time.perf_counter()
    model = train(objective, data, seed=seed, steps=steps)
    seconds = time.perf_counter() - start
    images, labels = data.validation.images(range(len(data.validation))), data.validation.labels
    geometry = measure_geometry(objective, model, images, labels)
    return {
        **validation_loss(objective, model, images, labels, repeats=REPEATS),
        **({} if geometry is None else dataclasses.asdict(geometry)),
        "seconds": seconds,
    }


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and population deviation of every number over the runs."""
    summary = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        mean = sum(values) / len(values)
        summary[name] = {"mean": mean, "sd": math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))}
    return summary


COLUMNS = {
    "conditional": "conditional loss",
    "null": "null loss",
    "centroid_cosine": "centroid cosine",
    "prototype_cosine": "prototype cosine",
    "gate": "gate",
    "smallest_share": "smallest share",
    "largest_share": "largest share",
    "load_cv": "load CV",
    "starved": f"starved of {NUM_EXPERTS}",
}


def table(summaries: dict[str, dict[str, dict[str, float]]]) -> str:
    """A markdown table, one variant a row."""
    lines = [f"| variant | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for variant, summary in summaries.items():
        cells = [f"{s['mean']:.3f} ± {s['sd']:.3f}" if (s := summary.get(name)) else "" for name in COLUMNS]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the routing contrastive loss does to a router, on 8x8 digits.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps a run (default: 600)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                        help=f"of: {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/contrastive_geometry.json"), metavar="FILE",
                        help="where every run's numbers go (default: runs/contrastive_geometry.json)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.steps < 0 or min(args.seeds) < 0:
        parser.error(f"--steps {args.steps} --seeds {args.seeds}: give numbers of at least 0")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    data = load_data("digits")
    zero = zero_predictor_loss(data.validation.images(range(len(data.validation))))
    results: dict[str, Any] = {
        "steps": args.steps, "seeds": args.seeds, "deviation": "population", "torch": torch.__version__,
        "threads": torch.get_num_threads(), "zero_predictor_loss": zero, "runs": {}, "summary": {},
    }  # fmt: skip
    for variant in args.variants:
        runs = results["runs"][variant] = []
        for seed in args.seeds:
            runs.append({"seed": seed, **run_variant(variant, data, seed=seed, steps=args.steps)})
            print(
                f"{variant}, seed {seed}: loss {runs[-1]['conditional']:.4f}, {runs[-1]['seconds']:.0f} s", flush=True
            )
            results["summary"][variant] = summarise(runs)
            write_json(args.out, results)
    print(f"\n{len(data.train)} digits, {args.steps} steps, seeds {args.seeds}: mean ± population standard deviation;")
    print(f"uniform share {1 / NUM_EXPERTS:.3f}; a model that answers 0 scores {zero:.3f}\n")
    print(table(results["summary"]))
    print(f"\nEvery run's numbers: {args.out}")


if __name__ == "__main__":
    main()
