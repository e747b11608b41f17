"""Every causal router in the same small language model, on the bytes of Python's standard library: minutes on a CPU.

Trains one transformer (``models/byte_lm.py``) for each router and seed. Layer, experts, widths, initial weights of what
the models share, bytes and their order are the same; only the router and its options (``ROUTERS``) differ. "dense" has
feed-forwards of the width that two experts have together. Then, on held-out files, in each MoE layer:

    entropy     = of the routed experts' load, 1 = even;   collapse-aware: 0 = every token takes the same experts
    MaxVio      = largest load / mean load - 1
    starved     = routed experts with less than 1 % of the load
    fluctuation = part of the tokens whose set of experts differs between the last two checkpoints, steps / 8 apart
    experts     = routed experts a token gets, on average: some routers drop, skip, or choose how many

averaged over the layers, beside the loss in nats a byte. Afterwards each trained model takes some more steps in turn
with ``topk``'s, one by one, in one process: steps a second, and the median of the paired times over ``topk``'s.

Prints a table of mean ± population deviation over the seeds. Whether two routers are told apart is judged by the 95 %
confidence intervals of their mean losses (Student's t over the seeds): where these overlap, no order is claimed.

The setup: 2 blocks, width 96, 4 heads, windows of 128 bytes; in every block 8 routed experts of hidden width 96
(SwiGLU), 2 a token; AdamW at 5e-3 with 20 steps of warm-up and a cosine to a tenth, decay 0.1, 8 windows a step,
gradients clipped at 1; 512 windows of held-out files. A file is held out by a hash of its name, one in sixteen; tests
and tables of encodings are left out.

    python recipes/compare_routers.py --jobs 2
    python recipes/compare_routers.py --jobs 2 --resume              what a killed run left is kept
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import statistics
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gatewright.moe import finish_step, moe_layers
from gatewright.moe.files import write_text
from gatewright.moe.metrics import collapse_aware_entropy, load_entropy, max_violation, routing_change
from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.recipes.models.byte_lm import CONTEXT_FIELDS, DENSE, VOCABULARY, ByteLM, ByteLMConfig
from gatewright.recipes.models.seeding import named_seed
from gatewright.routers import Routing, create_router, list_routers, router_class
from gatewright.tools.measure import clock, describe_machine, markdown, spread

PROGRAM = "compare_routers"
REFERENCE = "topk"
NUM_EXPERTS, TOP_K = 8, 2
LENGTH, BATCH = 128, 8
VALIDATION_WINDOWS = 512
CHECKPOINTS = 8
STARVED = 0.01
WARMUP_ROUNDS = 3
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "lib2to3"}
# Student's t for a two-sided 95 %, by degrees of freedom from 1 on
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# what differs from a router's defaults: what its paper adds to the loss, or what makes it causal
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {"balance_weight": 0.01},
    "aoe": {"balance_weight": 0.01},
    "attention_aware": {"causal": True, "base_options": {"balance_weight": 0.01}},
    "centroid": {"seed": 0},  # random ones: there is no trained model whose tokens could be clustered
    "cosine": {"balance_weight": 0.01},
    "densemixer": {"balance_weight": 0.01},
    "openmoe": {"capacity": None},
    "promoe": {"unconditional": False},
    "segment": {"segment_size": 4, "shifted": True},
    "similarity_aware": {"causal": True, "base_options": {"balance_weight": 0.01}},
    "sparsemixer": {"balance_weight": 0.01},
    "union": {"choice": "per_token", "gate": "weighted"},
}
# the same from the second block on
LATER: dict[str, dict[str, Any]] = {"moe_plus_plus": {"residual": True}}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes, uint8: of the files to train on, and of those held out."""

    train: Tensor
    validation: Tensor
    files: int

    @property
    def digest(self) -> str:
        both = self.train.numpy().tobytes() + b"|" + self.validation.numpy().tobytes()
        return hashlib.blake2b(both, digest_size=16).hexdigest()

    def windows(self, *, seed: int, step: int) -> Tensor:
        """The training bytes of a step: [BATCH, LENGTH + 1] int64, the same for every router."""
        generator = torch.Generator().manual_seed(named_seed(seed, f"windows of step {step}"))
        start = torch.randint(len(self.train) - LENGTH, (BATCH,), generator=generator)
        return _cut(self.train, start)

    def validation_windows(self) -> Iterator[Tensor]:
        """[up to 64, LENGTH + 1], spread evenly over the held-out bytes."""
        start = torch.linspace(0, len(self.validation) - LENGTH - 1, VALIDATION_WINDOWS).long()
        for part in start.split(64):
            yield _cut(self.validation, part)


def _cut(content: Tensor, start: Tensor) -> Tensor:
    return content[start[:, None] + torch.arange(LENGTH + 1)].long()


@functools.cache
def read_corpus(root: Path | None = None) -> Corpus:
    """The ``*.py`` of the standard library, or of another folder, in the order of their names.

    Raises:
        ValueError: too little text there.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not LEFT_OUT_FOLDERS & set(name.split("/"))]
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name in names:
        held_out = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] < 16
        parts[held_out].append((root / name).read_bytes())
    train, validation = (torch.frombuffer(bytearray(b"".join(parts[p]) or b" "), dtype=torch.uint8) for p in (0, 1))
    if min(len(train), len(validation)) <= 2 * LENGTH:
        raise ValueError(
            f"{root} holds {len(names)} Python files, {len(train)} bytes to train on and {len(validation)} held out: "
            "too little; use a Python that brings the source of its standard library"
        )
    return Corpus(train, validation, len(names))


def router_options(name: str) -> dict[str, Any]:
    """What the model's router is created with: the shared numbers that it knows, then ``ROUTERS``."""
    if name == DENSE:
        return {}
    cls, preset = router_class(name)
    shared = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "vocabulary": VOCABULARY}
    known = inspect.signature(cls.__init__).parameters.keys() - preset.keys()
    return {option: value for option, value in shared.items() if option in known} | ROUTERS.get(name, {})


def why_not(name: str) -> str | None:
    """Why a router cannot be in the comparison; None where it can."""
    if name == DENSE:
        return None
    try:
        router = create_router(name, dim=ByteLMConfig().dim, **router_options(name))
    except ValueError as error:
        return f"{error}: give its options in ROUTERS"
    for mode in ("training", "evaluation"):
        router.train(mode == "training")
        if not router.causal:
            return f"it is not causal in {mode}"
        missing = [field for field in router.requires if field not in CONTEXT_FIELDS]
        if missing:
            return f"it needs {', '.join(missing)}, which a model of bytes does not have"
    return None


def model_config(name: str) -> ByteLMConfig:
    return ByteLMConfig(
        router=name, router_options=router_options(name), later_options=LATER.get(name, {}), activated=TOP_K
    )


class Training:
    """A model, its optimizer, and one step of them."""

    def __init__(self, name: str, *, seed: int, steps: int) -> None:
        self.name, self.seed, self.steps = name, seed, steps
        self.model = ByteLM(model_config(name), seed=seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        done = min(step / self.steps, 1)
        return min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * done))

    def step(self, corpus: Corpus, step: int) -> None:
        """
        Raises:
            FloatingPointError: the loss is not finite.
        """
        window = corpus.windows(seed=self.seed, step=step)
        sample_id = torch.arange(step * BATCH, (step + 1) * BATCH)
        logits, routings = self.model(window[:, :-1], sample_id=sample_id, seed=self.seed, step=step)
        loss = byte_loss(logits, window) + sum(routing.loss for routing in routings)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f'router "{self.name}", seed {self.seed}: the loss is {loss.item()} at step {step} of {self.steps}'
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        finish_step(self.model)


def byte_loss(logits_BLV: Tensor, window: Tensor) -> Tensor:
    """Nats a byte."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), window[:, 1:].flatten())


@dataclasses.dataclass(frozen=True)
class Validation:
    """The loss on the held-out windows, and every decision on them: for each window batch, one a MoE layer."""

    loss: float
    routings: list[list[Routing]]


@torch.no_grad()
def validate(model: ByteLM, corpus: Corpus) -> Validation:
    model.eval()
    total, count, decisions = 0.0, 0, []
    for window in corpus.validation_windows():
        sample_id = torch.arange(count, count + len(window))
        logits, routings = model(window[:, :-1], sample_id=sample_id, seed=0, step=0)
        total += float(byte_loss(logits, window)) * len(window)
        count += len(window)
        decisions.append(routings)
    model.train()
    return Validation(total / count, decisions)


def measure_routing(model: ByteLM, before: Validation, after: Validation) -> dict[str, float]:
    """The numbers of the table, averaged over the MoE layers; nothing where there is none."""
    layers = []
    for place, layer in enumerate(moe_layers(model)):
        routed = [e for e, kind in enumerate(layer.router.expert_kinds) if kind == "routed"]
        routings = [decisions[place] for decisions in after.routings]
        tokens = sum(routing.num_tokens for routing in routings)
        load_E = torch.stack([routing.load_E() for routing in routings]).sum(0)[routed].double()
        changes = [
            float(routing_change(decisions[place], routing))
            for decisions, routing in zip(before.routings, routings, strict=True)
        ]
        experts = float(load_E.sum() / tokens)
        layers.append({
            "experts": experts,
            "entropy": float(load_entropy(load_E)),
            "collapse_aware_entropy": float(collapse_aware_entropy(load_E, experts)),
            "max_violation": float(max_violation(load_E)),
            "starved": float((load_E < STARVED * load_E.sum()).sum()),
            "fluctuation": statistics.fmean(changes),
        })  # fmt: skip
    return {name: statistics.fmean(layer[name] for layer in layers) for name in (layers[0] if layers else ())}


def run_router(name: str, corpus: Corpus, *, seed: int, steps: int) -> tuple[dict[str, float], ByteLM]:
    """Trains one model and measures it: "loss", what ``measure_routing`` says, "seconds" of training.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    training, before, seconds = Training(name, seed=seed, steps=steps), None, 0.0
    for step in range(steps):
        if step == steps - max(1, steps // CHECKPOINTS):
            before = validate(training.model, corpus)
        start = time.perf_counter()
        training.step(corpus, step)
        seconds += time.perf_counter() - start
    after = validate(training.model, corpus)
    numbers = {"loss": after.loss, **measure_routing(training.model, before, after), "seconds": seconds}
    return numbers, training.model


class Results:
    """The folder of a comparison: one JSON file and the weights of each (router, seed), each whole or not there."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))

    def file(self, name: str, seed: int) -> Path:
        return self.folder / f"run-{name}-{seed}.json"

    def weights(self, name: str, seed: int) -> Path:
        return self.folder / f"run-{name}-{seed}.safetensors"

    def of_run(self, name: str) -> dict[str, Any]:
        config = model_config(name)
        options = {"options": config.router_options, "later_options": config.later_options}
        return {**self.settings, **json.loads(json.dumps(options))}

    def read(self, name: str, seed: int) -> dict[str, float] | None:
        """The numbers of a run; None where it is not done.

        Raises:
            ValueError: it was made with other settings, or is no such file.
        """
        file = self.file(name, seed)
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            settings, numbers = content["settings"], content["numbers"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not what a run writes ({error!r}): remove it") from None
        expected = self.of_run(name)
        for key in expected:
            if settings.get(key) != expected[key]:
                raise ValueError(
                    f"{file} was made with {key}={settings.get(key)!r}, this run has {expected[key]!r}: choose another "
                    "--out, or remove the file"
                )
        return numbers

    def write(self, name: str, seed: int, numbers: Mapping[str, float], model: ByteLM) -> None:
        # the weights first: where the JSON file is, the weights are
        save_file(model.state_dict(), self.weights(name, seed))
        content = {"settings": self.of_run(name), "router": name, "seed": seed, "numbers": numbers}
        write_text(self.file(name, seed), json.dumps(content, indent=1) + "\n")


def train_all(results: Results, runs: Sequence[tuple[str, int]], *, steps: int, threads: int) -> None:
    """Every run that is not done yet, one after the other."""
    torch.set_num_threads(threads)
    corpus = read_corpus()
    for name, seed in runs:
        if results.read(name, seed) is None:
            numbers, model = run_router(name, corpus, seed=seed, steps=steps)
            results.write(name, seed, numbers, model)
            print(f"{name}, seed {seed}: loss {numbers['loss']:.4f}, {numbers['seconds']:.1f} s", flush=True)


def _work(results: Results, runs: Sequence[tuple[str, int]], steps: int, threads: int) -> None:
    with _mistakes_in_one_line():
        train_all(results, runs, steps=steps, threads=threads)


def train_in_processes(results: Results, runs: Sequence[tuple[str, int]], *, jobs: int, **options: int) -> None:
    """The same in several processes, each with every ``jobs``-th run. Ends with status 2 where one fails."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(results, runs[job::jobs]), kwargs=options, daemon=True)
        for job in range(jobs)
    ]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
            time.sleep(0.1)
        failed = [worker.exitcode for worker in workers if worker.exitcode]
    finally:
        for worker in workers:
            worker.terminate()
    if 2 in failed:
        raise SystemExit(2)  # the process has said why
    if failed:
        fail(PROGRAM, f"a process of --jobs ended with status {failed[0]}; --resume keeps what is done")


def time_router(results: Results, name: str, *, seed: int, steps: int, rounds: int) -> dict[str, Any]:
    """Training steps of the trained model and of the reference's, in turn: steps a second, and the ratio of times."""
    corpus, pair = read_corpus(), {}
    for one in {name, REFERENCE}:
        pair[one] = Training(one, seed=seed, steps=steps)
        pair[one].model.load_state_dict(load_file(results.weights(one, seed)))
    times: dict[str, list[float]] = {one: [] for one in pair}
    for round_ in range(-WARMUP_ROUNDS, rounds):
        for one in sorted(pair, reverse=round_ % 2 == 0):
            milliseconds = clock(lambda one=one, step=steps + round_: pair[one].step(corpus, step))
            if round_ >= 0:
                times[one].append(milliseconds)
    ratios = [own / other for own, other in zip(times[name], times[REFERENCE], strict=True)]
    return {"steps_per_second": 1e3 / spread(times[name])["median"], "ratio": spread(ratios)}


def summarise(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and population deviation of every number over the runs."""
    return {
        name: {"mean": statistics.fmean(run[name] for run in runs), "sd": statistics.pstdev(run[name] for run in runs)}
        for name in runs[0]
    }


def interval(losses: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean over seeds; unbounded from one seed alone."""
    mean, degrees = statistics.fmean(losses), len(losses) - 1
    if not degrees:
        return -math.inf, math.inf
    half = STUDENT_T[min(degrees, len(STUDENT_T)) - 1] * statistics.stdev(losses) / math.sqrt(len(losses))
    return mean - half, mean + half


def what_is_told_apart(losses: Mapping[str, Sequence[float]]) -> str:
    """How far the losses of the runs allow an order, in words."""
    bounds = {name: interval(values) for name, values in losses.items()}
    pairs = [(a, b) for i, a in enumerate(losses) for b in list(losses)[i + 1 :]]
    overlapping = [(a, b) for a, b in pairs if bounds[a][0] <= bounds[b][1] and bounds[b][0] <= bounds[a][1]]
    largest = max(statistics.pstdev(values) for values in losses.values())
    low, high = bounds[REFERENCE]
    below = [name for name, (_, top) in bounds.items() if top < low]
    above = [name for name, (bottom, _) in bounds.items() if bottom > high]
    return (
        f"Noise: the deviation over seeds is up to {largest:.3f} nats a byte. The 95 % intervals of "
        f"{len(overlapping)} of {len(pairs)} pairs overlap: no order is claimed inside these. Told apart from "
        f"{REFERENCE}: {', '.join(below) or 'none'} lower; {', '.join(above) or 'none'} higher."
    )


def own_options(names: Sequence[str]) -> str:
    """What ``ROUTERS`` and ``LATER`` set, in words."""
    parts = []
    for name in names:
        sets = {**ROUTERS.get(name, {}), **{f"{key} from block 1": value for key, value in LATER.get(name, {}).items()}}
        if sets:
            parts.append(f"{name} {', '.join(f'{key}={value!r}' for key, value in sets.items())}")
    return f"Options beside E = {NUM_EXPERTS} and K = {TOP_K}, where not the defaults: {'; '.join(parts)}."


# key: (heading, format)
COLUMNS = {
    "loss": ("validation loss", ".3f"),
    "experts": ("experts", ".2f"),
    "entropy": ("entropy", ".3f"),
    "collapse_aware_entropy": ("collapse-aware", ".3f"),
    "max_violation": ("MaxVio", ".2f"),
    "starved": (f"starved of {NUM_EXPERTS}", ".1f"),
    "fluctuation": ("fluctuation", ".3f"),
}


def table(summaries: Mapping[str, Mapping[str, Any]], timings: Mapping[str, Mapping[str, Any]]) -> str:
    """A markdown table, one router a row."""
    rows = []
    for name, summary in summaries.items():
        cells = [
            f"{s['mean']:{form}} ± {s['sd']:{form}}" if (s := summary.get(key)) else ""
            for key, (_, form) in COLUMNS.items()
        ]
        if timings:
            ratio = timings[name]["ratio"]
            cells.append(f"{timings[name]['steps_per_second']:.1f}")
            cells.append(f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
        rows.append([name, *cells])
    head = ["router", *(heading for heading, _ in COLUMNS.values())]
    return "\n".join(markdown([*head, "steps/s", f"time / {REFERENCE}"] if timings else head, rows))


def chosen_routers(asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The reference first, then those asked for, by default all that can be compared; and why others are not.

    Raises:
        ValueError: one that was asked for is unknown or cannot be compared.
    """
    if asked is None:
        reasons = {name: reason for name in list_routers() if (reason := why_not(name)) is not None}
        names = [name for name in list_routers() if name not in reasons] + [DENSE]
    else:
        reasons, names = {}, list(asked)
        for name in names:
            if name != DENSE:
                router_class(name)  # an unknown one is told of the close matches
            if (reason := why_not(name)) is not None:
                raise ValueError(f'router "{name}" cannot be compared: {reason}')
    return list(dict.fromkeys([REFERENCE, *names])), reasons


def parse(arguments: Sequence[str] | None = None) -> Any:
    parser = Parser(prog=PROGRAM, description="Every causal router in the same small language model.")
    parser.add_argument("--routers", nargs="+", metavar="ROUTER", help=f"names, or {DENSE} (default: all that are "
                        f"causal, and {DENSE}); {REFERENCE} is always there")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps a run (default: 400)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each router; 0 = none (default: 20)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_routers"), metavar="FOLDER",
                        help="where every run's numbers go (default: runs/compare_routers)")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in that folder")
    args = parser.parse_args(arguments)
    if min(args.steps, args.jobs, args.threads) < 1 or args.rounds < 0:
        parser.error(
            f"--steps {args.steps} --jobs {args.jobs} --threads {args.threads} --rounds {args.rounds}: the first three "
            "must be at least 1, the last at least 0"
        )
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: give different numbers of at least 0")
    return args


def compare(args: Any) -> None:
    """Trains what is not done, times, and prints and writes the table."""
    names, reasons = chosen_routers(args.routers)
    corpus, model = read_corpus(), model_config(DENSE)
    results = Results(args.out, {
        "steps": args.steps, "threads": args.threads, "corpus": corpus.digest, "torch": torch.__version__,
        "model": {name: getattr(model, name) for name in ("dim", "depth", "heads", "expert_hidden", "activated")},
    })  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume and (there := sorted(args.out.glob("run-*.json"))):
        raise ValueError(f"{args.out} holds {len(there)} runs: add --resume to keep them, or choose another --out")
    for name, reason in reasons.items():
        print(f"left out: {name}, because {reason}")
    print(f"{len(names)} routers, {len(args.seeds)} seeds, {args.steps} steps; {len(corpus.train)} bytes of "
          f"{corpus.files} files to train on, {len(corpus.validation)} held out", flush=True)  # fmt: skip
    runs = [(name, seed) for name in names for seed in args.seeds]
    todo = [run for run in runs if results.read(*run) is None]
    if args.jobs == 1:
        train_all(results, todo, steps=args.steps, threads=args.threads)
    else:
        train_in_processes(results, todo, jobs=args.jobs, steps=args.steps, threads=args.threads)

    torch.set_num_threads(args.threads)
    timings = {}
    for name in names if args.rounds else ():
        timings[name] = time_router(results, name, seed=args.seeds[0], steps=args.steps, rounds=args.rounds)
    numbers = {name: [results.read(name, seed) for seed in args.seeds] for name in names}
    summaries = {name: summarise(of_seeds) for name, of_seeds in numbers.items()}
    told_apart = what_is_told_apart({name: [run["loss"] for run in of_seeds] for name, of_seeds in numbers.items()})
    content = {
        "settings": results.settings, "machine": describe_machine(), "seeds": args.seeds, "deviation": "population",
        "options": {name: router_options(name) for name in names}, "left_out": reasons, "runs": numbers,
        "summary": summaries, "timing": timings, "told_apart": told_apart,
    }  # fmt: skip
    write_text(args.out / "results.json", json.dumps(content, indent=1) + "\n")
    print(f"\n{table(summaries, timings)}\n\n{told_apart}\n\n{own_options(names)}")
    print(f"\nEvery run's numbers: {args.out / 'results.json'}")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with _mistakes_in_one_line():
        compare(args)


@contextlib.contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        fail(PROGRAM, str(error))
    except MISTAKES as error:
        fail(PROGRAM, describe(error))


if __name__ == "__main__":
    main()
