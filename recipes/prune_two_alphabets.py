"""Prunes a small language model of two alphabets to either of them: which criterion keeps what the domain needs.

Trains an OLMoE of transformers on bytes, half of every batch from domain A, the sources of Python's standard library,
and half from domain B, the English of ``pydoc_data.topics`` and Python's licence with 128 added to every byte, so that
the two share no byte. From 25 demonstrations of 64 bytes of each it collects what `gatewright prune collect` collects,
plans by every criterion, and measures by mask, on held-out text, how many nats a byte A and B lose:

    dA, dB = loss of the model with the kept experts alone - loss of the whole one

and how much of a plan fewer or other demonstrations repeat. With both domains as plain bytes the experts do not
specialise (either plan then serves both domains), which is why B has an alphabet of its own.

The setup: 3 layers, width 64, 4 heads, 16 experts of hidden width 64, 2 a token, weights renormalised; embeddings tied;
balance loss 0.02; AdamW at 3e-3 with a cosine to a twentieth, 1200 steps of 8 + 8 sequences of 64 bytes; held out:
one file or topic in sixteen, by a hash of its name. 192 held-out sequences of each domain.

    python recipes/prune_two_alphabets.py                            three seeds, minutes each on one thread
    python recipes/prune_two_alphabets.py --seeds 0 --steps 300      a look

"No token term" is the sum of g |u|, "on both" the mean of the two domains' normalised scores. Each model stays in
OUT/seed-N as a transformers checkpoint, beside a-demos.jsonl and b-demos.jsonl, so that the steps of `gatewright prune`
can be tried on it. A model that is there is not trained again.

Source of the criteria: EASY-EP, arXiv:2504.06792; REAP, arXiv:2510.13999.
"""

import argparse
import hashlib
import json
import math
import shutil
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatewright.moe.files import write_text
from gatewright.recipes.compare_routers import read_corpus
from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.recipes.models.seeding import named_seed
from gatewright.tools.measure import markdown
from gatewright.tools.prune import selection
from gatewright.tools.prune.collect import Options, collect
from gatewright.tools.prune.criteria import score
from gatewright.tools.prune.demos import Demo
from gatewright.tools.prune.mask import masked
from gatewright.tools.prune.plan import make_plan
from gatewright.tools.prune.statistics import Statistics

PROGRAM = "prune_two_alphabets"
DOMAINS = ("A", "B")
EXPERTS, LAYERS, LENGTH = 16, 3, 64
KEEP = (8, 4)
DEMOS = 25
EVALUATED = (12, 16)  # batches, sequences each
RANDOM_DRAWS, OVERLAP_DRAWS = 5, 10
SHOTS = (1, 5, 10, 25)
# how a plan is called: criterion, domains
PLANS = {
    "EASY-EP on A": ("easy-ep", ("A",)),
    "EASY-EP on B": ("easy-ep", ("B",)),
    "EASY-EP on both": ("easy-ep", DOMAINS),
    "no token term on A": ("weighted-ean", ("A",)),
    "gating on A": ("gating", ("A",)),
    "frequency on A": ("frequency", ("A",)),
    "REAP on A": ("reap", ("A",)),
    "MAN on A": ("man", ("A",)),
    "AIMER": ("aimer", ("A",)),
}
NORMED, REVERSED, RANDOM = "EASY-EP on A, cosine of the normed input", "EASY-EP on A, reversed", "random"


def read_domains() -> dict[str, dict[str, Tensor]]:
    """{"A": {"train", "validation"}, "B": ...}, uint8 each.

    Raises:
        ValueError: the standard library's sources are not there.
    """
    code = read_corpus()
    import pydoc_data.topics

    texts = dict(pydoc_data.topics.topics)
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.is_file():
        texts["LICENSE"] = licence.read_text()
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name, text in sorted(texts.items()):
        held_out = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] < 16
        parts[held_out].append(bytes(byte + 128 for byte in text.encode("ascii", "ignore")))
    train, validation = (torch.frombuffer(bytearray(b"".join(parts[p])), dtype=torch.uint8) for p in (False, True))
    return {
        "A": {"train": code.train, "validation": code.validation},
        "B": {"train": train, "validation": validation},
    }


def make_model(seed: int) -> Any:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.02,
        max_position_embeddings=2 * LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        name_or_path=f"two-alphabets-{seed}",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OlmoeForCausalLM(config)


def train(domains: dict[str, dict[str, Tensor]], *, seed: int, steps: int) -> Any:
    """Half of every batch of each domain; the same bytes in the same order whatever the machine."""
    model = make_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.05 + 0.95 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2
    )
    for step in range(steps):
        ids = torch.cat([_windows(domains[name]["train"], 8, f"{seed}, step {step} of {name}") for name in DOMAINS])
        loss = model(ids, labels=ids, output_router_logits=True).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"seed {seed}, step {step}: the loss is {float(loss)}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _windows(content: Tensor, count: int, key: str) -> Tensor:
    """[count, LENGTH] int64, drawn anywhere."""
    generator = torch.Generator().manual_seed(named_seed(0, key))
    start = torch.randint(len(content) - LENGTH, (count,), generator=generator)
    return content[start[:, None] + torch.arange(LENGTH)].long()


@torch.inference_mode()
def losses(model: Any, domains: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Mean nats a byte of each domain, on held-out sequences spread evenly."""
    batches, size = EVALUATED
    found = {}
    for name in DOMAINS:
        content = domains[name]["validation"]
        start = torch.linspace(0, len(content) - LENGTH - 1, batches * size).long()
        ids = content[start[:, None] + torch.arange(LENGTH)].long()
        found[name] = statistics.fmean(float(model(part, labels=part).loss) for part in ids.split(size))
    return found


def draw_demos(domains: dict[str, dict[str, Tensor]], seed: int, count: int) -> dict[str, list[Demo]]:
    """Of training text, LENGTH bytes each."""
    return {
        name: [
            Demo(where=f"{name} {place}", domain=name, input_ids=tuple(ids), answer_start=0)
            for place, ids in enumerate(_windows(domains[name]["train"], count, f"{seed}, demos of {name}").tolist())
        ]
        for name in DOMAINS
    }


def open_model(folder: Path, domains: dict[str, dict[str, Tensor]], *, seed: int, steps: int) -> tuple[Any, float]:
    """The model of a seed, trained unless it is there, and how long that took (0 where it was)."""
    from transformers import AutoModelForCausalLM

    about = folder / "training.json"
    setup = {"seed": seed, "steps": steps, "length": LENGTH}
    if about.is_file() and json.loads(about.read_text()) == setup:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), 0.0
    start = time.perf_counter()
    model = train(domains, seed=seed, steps=steps)
    took = time.perf_counter() - start
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    write_text(about, json.dumps(setup))
    return model, took


def measure(model: Any, domains: dict[str, dict[str, Tensor]], *, seed: int) -> dict[str, Any]:
    """Every row of the tables for one model."""
    demos = draw_demos(domains, seed, 2 * DEMOS)
    chosen = [demo for name in DOMAINS for demo in demos[name][:DEMOS]]
    collected = collect(model, chosen, progress=False)
    normed = collect(model, chosen, options=Options(token_weight="mlp_input"), progress=False)
    others = collect(model, [demo for name in DOMAINS for demo in demos[name][DEMOS:]], progress=False)
    full = losses(model, domains)
    rows: dict[str, dict[str, Any]] = {}
    for count in KEEP:
        keeps = {
            name: make_plan(collected, keep=count, criterion=criterion, domains=which).keep
            for name, (criterion, which) in PLANS.items()
        }
        keeps[NORMED] = make_plan(normed, keep=count, domains=("A",)).keep
        worst = selection.top(-score(collected, "A"), np.full(LAYERS, count))
        keeps[REVERSED] = {layer: tuple(np.flatnonzero(row).tolist()) for layer, row in enumerate(worst)}
        for draw in range(RANDOM_DRAWS):
            plan = make_plan(collected, keep=count, criterion="random", domains=("A",), seed=draw)
            keeps[f"{RANDOM} {draw}"] = plan.keep
        for name, keep in keeps.items():
            with masked(model, keep):
                after = losses(model, domains)
            rows[f"{count} {name}"] = {domain: after[domain] - full[domain] for domain in DOMAINS} | {
                "keep": {str(layer): list(ids) for layer, ids in keep.items()}
            }
        drawn = [rows.pop(f"{count} {RANDOM} {draw}") for draw in range(RANDOM_DRAWS)]
        rows[f"{count} {RANDOM}"] = {domain: statistics.fmean(row[domain] for row in drawn) for domain in DOMAINS}
    overlaps = {
        str(count): {str(n): _overlap(collected, others, count, n, seed) for n in SHOTS}
        | {"A with B": _agreement(_kept(collected, "A", count), _kept(collected, "B", count))}
        | {"with and without the token term": _agreement(*_pair(collected, count))}
        for count in KEEP
    }
    return {"seed": seed, "full": full, "rows": rows, "overlaps": overlaps}


def _kept(collected: Statistics, domain: str, count: int, demos: Sequence[int] | None = None) -> np.ndarray:
    """[L, E] bool by EASY-EP, of some demonstrations or all."""
    held = collected.domains[domain]
    scores = held.easy_ep_per_demo if demos is None else held.easy_ep_per_demo[list(demos)]
    return selection.top(scores.sum(0), np.full(LAYERS, count))


def _pair(collected: Statistics, count: int) -> tuple[np.ndarray, np.ndarray]:
    without = selection.top(score(collected, "A", "weighted-ean"), np.full(LAYERS, count))
    return _kept(collected, "A", count), without


def _agreement(first: np.ndarray, second: np.ndarray) -> float:
    return float(selection.overlap(first, second).mean())


def _overlap(collected: Statistics, others: Statistics, count: int, demos: int, seed: int) -> float:
    """Of the plan of 25 demonstrations, how much ``demos`` others repeat: mean over draws among 25 others."""
    whole, draw = _kept(collected, "A", count), np.random.default_rng(seed)
    draws = 1 if demos == DEMOS else OVERLAP_DRAWS
    picks = [draw.permutation(DEMOS)[:demos] for _ in range(draws)]
    return statistics.fmean(_agreement(_kept(others, "A", count, pick), whole) for pick in picks)


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Mean over the seeds, and least to most."""

    def cell(values: Sequence[float]) -> str:
        if len(values) == 1:
            return f"{values[0]:+.3f}"
        return f"{statistics.fmean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"

    names = [*PLANS, NORMED, REVERSED, RANDOM]
    lines = markdown(
        ["kept of 16", "chosen by", "dA", "dB"],
        [
            [
                str(count),
                name,
                *(cell([result["rows"][f"{count} {name}"][domain] for result in results]) for domain in DOMAINS),
            ]
            for count in KEEP
            for name in names
        ],
    )
    overlaps = [
        [str(count), *(f"{statistics.fmean(r['overlaps'][str(count)][str(key)] for r in results):.2f}" for key in keys)]
        for count in KEEP
        for keys in [(*SHOTS, "with and without the token term", "A with B")]
    ]
    head = ["kept of 16", *(f"{n} other demos" for n in SHOTS), "with and without the token term", "plans of A and B"]
    fulls = "; ".join(f"seed {r['seed']}: A {r['full']['A']:.3f}, B {r['full']['B']:.3f}" for r in results)
    return [
        f"Whole model, nats a byte: {fulls}. Mean over {len(results)} seed(s) (least to most); random: {RANDOM_DRAWS} "
        "draws a seed.",
        "",
        *lines,
        "",
        f"Share of the experts kept by the plan of {DEMOS} demonstrations of A that a plan of other ones keeps too:",
        "",
        *markdown(head, overlaps),
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/two_alphabets"), help="folder of models and results.json"
    )
    args = parser.parse_args(argv)
    if args.steps < 1 or args.threads < 1 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--steps {args.steps} --threads {args.threads} --seeds {args.seeds}: at least 1, seeds once")
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        torch.set_num_threads(args.threads)
        domains = read_domains()
        args.out.mkdir(parents=True, exist_ok=True)
        for name, demos in draw_demos(domains, 0, DEMOS).items():
            lines = [json.dumps({"input_ids": list(demo.input_ids), "domain": name}) for demo in demos]
            write_text(args.out / f"{name.lower()}-demos.jsonl", "\n".join(lines) + "\n")
        results = []
        for seed in args.seeds:
            model, took = open_model(args.out / f"seed-{seed}", domains, seed=seed, steps=args.steps)
            results.append(measure(model, domains, seed=seed) | {"steps": args.steps, "training_seconds": took})
            write_text(args.out / "results.json", json.dumps(results, indent=1))
            print(f"seed {seed}: trained in {took:.0f} s", flush=True)
        print("\n".join(table(results)))
    except MISTAKES as error:
        fail(PROGRAM, describe(error))


if __name__ == "__main__":
    main()
