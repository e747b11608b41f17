"""One pass over the demonstrations of each domain, and every criterion's sums are there.

    gatewright prune collect MODEL --demos math.jsonl --out math.stats

For layer l, token t and each expert i that t is routed to, with g the coefficient that the model multiplies the
expert's output u with, s = max(0, 1 - cos(h, h + r)), r the routed output and h the residual stream before the norm:

    sum over t of |g|^a |u|^b s^c      a, b, c in {0, 1}; (0, 2, 0), (2, 2, 0); and what --exponents adds

(1, 1, 1) is EASY-EP's score (arXiv:2504.06792, equation 3), (1, 1, 0) over (0, 0, 0) REAP's (arXiv:2510.13999).
``token_weight`` says which hidden states s compares: ``residual`` as above; ``mlp_input`` the normed x and x + r, as
some re-implementations do; ``none`` sets s = 1. Norms are taken in at least float32, s and every sum in float64:
1 - cos is small, and a bfloat16 cosine would be noise.

Each demonstration is one forward without padding. Its sums are kept in a journal beside ``--out`` as soon as it is
done, and the total adds the demonstrations in their order: so a collection that was killed and resumed, one split over
many processes (``torchrun``) and one that loads a layer at a time (``--layerwise``) give the very same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, distributed, nn

from ... import __version__
from ...moe.files import write_bytes
from . import demos as demos_module
from .checkpoint import Checkpoint
from .demos import (
    Demo,
    ModelGenerator,
    duration,
    endpoint_of,
    fill_answers,
    lines_of,
    pair_domains,
    short_data,
    tokenise,
)
from .layerwise import LayerwiseModel, backbone
from .layout import Layout
from .loading import (
    DTYPES,
    context_length,
    evaluating,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    vocabulary,
)
from .model import LayerObservation, MoeBlock, moe_blocks, observe, token_contribution, wide
from .run_folder import is_run_folder
from .statistics import STANDARD, DomainStatistics, Statistics, exponents, key

TOKEN_WEIGHTS = ("residual", "mlp_input", "none")
PER_DEMO = ("sum", "mean-per-demo")
OVER = ("all", "answer")
_COSINE_NUMBERS = 1 << 24  # of hidden states turned into float64 at a time
TOKENS_AT_ONCE = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How statistics are collected.

    Attributes:
        token_weight: what s compares, one of ``TOKEN_WEIGHTS``.
        per_demo: "sum" adds up tokens, as published; "mean-per-demo" divides a demonstration's sums by its tokens, so
            that long answers do not outvote short ones.
        over: the tokens that count: "all", or those of the "answer".
        exponents: (a, b, c) of sums beside the standard ones.
    """

    token_weight: str = "residual"
    per_demo: str = "sum"
    over: str = "all"
    exponents: tuple[tuple[float, float, float], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("token_weight", TOKEN_WEIGHTS), ("per_demo", PER_DEMO), ("over", OVER)):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} "{getattr(self, name)}" is not one of {", ".join(allowed)}')
        for abc in self.exponents:
            exponents(key(*abc))

    @property
    def sums(self) -> tuple[str, ...]:
        """The names of all sums."""
        return tuple(dict.fromkeys((*STANDARD, *(key(*abc) for abc in self.exponents))))

    def describe(self) -> dict[str, Any]:
        return {
            "token_weight": self.token_weight,
            "per_demo": self.per_demo,
            "over": self.over,
            "sums": list(self.sums),
        }


class DemoSums:
    """Adds up what the layers did with one demonstration.

    Args:
        rows: the row of each MoE layer.
        experts: columns, E.
        demo: with its answer's start, where ``options.over`` asks for it.
    """

    def __init__(self, rows: Mapping[int, int], experts: int, demo: Demo, options: Options) -> None:
        self._rows, self._options = rows, options
        self._first = demo.answer_start if options.over == "answer" else 0
        self._length = len(demo)
        self._sums = {name: np.zeros((len(rows), experts)) for name in options.sums}
        self._max_norm = np.zeros((len(rows), experts))
        self._seen: set[int] = set()

    def add(self, layer: LayerObservation) -> None:
        """Takes one layer's forward of the demonstration, [1, T]."""
        if layer.layer in self._seen or layer.shape != (1, self._length):
            raise ValueError(f"layer {layer.layer} ran on {layer.shape} tokens, or twice: not one forward of the demo")
        self._seen.add(layer.layer)
        index_TK = layer.index[self._first :].cpu().numpy()
        routed_TK = index_TK >= 0
        expert = index_TK[routed_TK]

        def routed(values_TK: Tensor) -> np.ndarray:
            return values_TK[self._first :].double().cpu().numpy()[routed_TK]

        gate, norm, summand = np.abs(routed(layer.gate)), routed(layer.output_norm), routed(layer.summand_norm)
        weight_T = token_weights(layer, self._options.token_weight)[self._first :].cpu().numpy()
        weight = np.broadcast_to(weight_T[:, None], index_TK.shape)[routed_TK]
        row = self._rows[layer.layer]
        experts = self._max_norm.shape[1]
        for name, sums in self._sums.items():
            a, b, c = exponents(name)
            pairs = summand**a if a == b else gate**a * norm**b
            sums[row] = np.bincount(expert, pairs * weight**c if c else pairs, minlength=experts)
        np.maximum.at(self._max_norm[row], expert, norm)

    def statistics(self) -> DomainStatistics:
        """The demonstration's part.

        Raises:
            ValueError: a MoE layer did not run.
        """
        if self._seen != set(self._rows):
            raise ValueError(f"MoE layers {sorted(set(self._rows) - self._seen)} did not run in the model's forward")
        tokens = self._length - self._first
        scale = tokens if self._options.per_demo == "mean-per-demo" else 1
        sums = {name: value / scale for name, value in self._sums.items()}
        return DomainStatistics.of_demo(sums, self._max_norm, tokens)


def token_weights(layer: LayerObservation, kind: str) -> Tensor:
    """s of each token, [T] float64; ones where ``kind`` is "none"."""
    before_TD = layer.hidden_before if kind == "residual" else layer.mlp_input
    if kind == "none":
        return torch.ones(len(before_TD), dtype=torch.float64, device=before_TD.device)
    step = max(1, _COSINE_NUMBERS // before_TD.shape[-1])
    parts = []
    for start in range(0, len(before_TD), step):
        before = before_TD[start : start + step].double()
        parts.append(token_contribution(before, before + layer.routed_output[start : start + step].double()))
    return torch.cat(parts).double()


def mean_to_rms(block: MoeBlock) -> np.ndarray | None:
    """AIMER's ratio mean|w| / rms(w) of each expert's weights taken together, [N]; the most uniform are the highest.

    None where the weights are packed and no plain numbers. Biases are left out.
    """
    weights_NHD = [p.detach()[: block.num_experts] for p in block.experts.parameters() if p.ndim == 3]
    if not weights_NHD or not all(w.dtype in DTYPES.values() for w in weights_NHD):
        return None
    numbers = sum(w[0].numel() for w in weights_NHD)
    ratios = np.zeros(block.num_experts)
    for expert in range(block.num_experts):
        absolute, square = (
            # rows in float32 and their sum in float64: a tenth of the time of float64 throughout
            sum(torch.linalg.vector_norm(wide(w[expert]), order, dim=-1).double().pow(order).sum() for w in weights_NHD)
            for order in (1, 2)
        )
        ratios[expert] = (absolute / numbers) / (square / numbers).sqrt().clamp_min(1e-300)
    return ratios


def describe_model(model: nn.Module, folder: str | Path | None = None) -> dict[str, Any]:
    """What ``Statistics.model`` and plans say of a model; without a folder the digests are empty."""
    blocks = moe_blocks(model)
    about = {
        "model_type": model.config.model_type,
        "name": Path(folder).resolve().name if folder is not None else type(model).__name__,
        "config_sha256": "",
        "header_hash": "",
        "num_experts": max(block.num_experts for block in blocks),
        "top_k": blocks[0].top_k,
        "num_groups": blocks[0].num_groups,
        "topk_group": blocks[0].topk_group,
        "layers": [block.layer for block in blocks],
        "experts_per_layer": [block.num_experts for block in blocks],
        "mtp_layers": [],
    }
    if folder is not None:
        checkpoint = Checkpoint.open(folder)
        about["config_sha256"], about["header_hash"] = checkpoint.config_sha256, checkpoint.header_hash
        about["mtp_layers"] = [layer.index for layer in Layout.of(checkpoint).mtp_layers]
    return about


def collect(
    model: nn.Module | LayerwiseModel,
    demos: Sequence[Demo],
    *,
    options: Options | None = None,
    folder: str | Path | None = None,
    journal: str | Path | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: bool = True,
) -> Statistics | None:
    """Runs the demonstrations through a model and adds up what its experts did.

    In a distributed job each process takes a share of the demonstrations; all must be given the same ones.

    Args:
        model: of transformers, whole, or opened by ``LayerwiseModel.open``.
        demos: of all domains.
        folder: the model's checkpoint, whose digests plans are then tied to.
        journal: a folder for the parts, from which an interrupted collection goes on. Left where it is.
        tokens_at_once: layer by layer, how many tokens' hidden states are held; more read the checkpoint less often.
        progress: a bar and the expected time, on stderr.

    Returns:
        the statistics; None on all processes but the first.

    Raises:
        ValueError: no demonstrations; a model whose experts cannot be observed.
    """
    options = options or Options()
    if not demos:
        raise ValueError("no demonstrations to collect from")
    plain = model.model if isinstance(model, LayerwiseModel) else model
    about = describe_model(plain, folder)
    rank, ranks, group = _processes()
    described = {**options.describe(), "dtype": str(plain.dtype).removeprefix("torch.")}
    parts = _Parts(journal, {"model": about, "options": described, "version": __version__})
    shares = share_out([len(demo) for demo in demos], ranks)
    own = list(dict.fromkeys(demo.digest for demo, owner in zip(demos, shares, strict=True) if owner == rank))
    by_digest = {demo.digest: demo for demo in demos}
    wanted = [by_digest[digest] for digest in own if digest not in parts]
    walk = _Walk(about, options, progress and rank == 0, len(own), wanted)
    if rank == 0 and not parts.has_weights and not isinstance(model, LayerwiseModel):
        parts.keep_weights(_weights(about, {block.layer: mean_to_rms(block) for block in moe_blocks(plain)}))
    with evaluating(plain):
        if isinstance(model, LayerwiseModel):
            for_weights = rank == 0 and not parts.has_weights
            if for_weights and not wanted:
                wanted = [by_digest[digest] for digest in own[:1]]
            walk.layer_by_layer(model, wanted, tokens_at_once, parts, for_weights)
        else:
            walk.plain(model, wanted, parts)
    found = _gather(demos, shares, parts, rank, group, options, (len(about["layers"]), about["num_experts"]))
    if rank != 0:
        return None
    domains = {
        domain: DomainStatistics.total([part for demo, part in zip(demos, found, strict=True) if demo.domain == domain])
        for domain in dict.fromkeys(demo.domain for demo in demos)
    }
    return Statistics(model=about, options=described, domains=domains, weights=parts.weights())


def share_out(lengths: Sequence[int], ranks: int) -> list[int]:
    """Which process takes each demonstration: the longest first, each to the one with the fewest tokens so far."""
    loads = [0] * ranks
    owners = [0] * len(lengths)
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += lengths[place]
    return owners


class _Walk:
    """Takes demonstrations through a model, whole or layer by layer, and shows how far it is."""

    def __init__(
        self, about: Mapping[str, Any], options: Options, progress: bool, own: int, wanted: Sequence[Demo]
    ) -> None:
        self._rows = {layer: row for row, layer in enumerate(about["layers"])}
        self._about, self._options, self._progress = about, options, progress
        self._todo = sum(map(len, wanted))
        if progress and own > len(wanted):
            _say(f"{own - len(wanted)} of {own} demonstrations were done before")

    def _sums(self, demo: Demo) -> DemoSums:
        return DemoSums(self._rows, self._about["num_experts"], demo, self._options)

    def _bar(self, total: int, unit: str) -> Any:
        import tqdm

        return tqdm.tqdm(
            total=total, unit=unit, unit_scale=True, disable=not self._progress or not total, file=sys.stderr
        )

    def plain(self, model: nn.Module, demos: Sequence[Demo], parts: _Parts) -> None:
        start = time.monotonic()
        with self._bar(self._todo, "token") as bar:
            for number, demo in enumerate(demos, start=1):
                sums = self._sums(demo)
                with torch.inference_mode(), observe(model, sums.add):
                    ids = torch.tensor([demo.input_ids], device=model.device)
                    backbone(model)(ids, use_cache=False)
                parts.keep(demo, sums.statistics())
                bar.update(len(demo))
                if number == 1 and len(demos) > 1:
                    took, rest = time.monotonic() - start, self._todo - len(demo)
                    self._expect(bar, f"the first demonstration ({len(demo)} tokens)", took, took / len(demo) * rest)

    def layer_by_layer(
        self, model: LayerwiseModel, demos: Sequence[Demo], tokens_at_once: int, parts: _Parts, for_weights: bool
    ) -> None:
        groups = list(groups_of(demos, tokens_at_once))
        blocks = {block.layer: block for block in moe_blocks(model.model)}
        ratios: dict[int, np.ndarray | None] = {}
        start, done = time.monotonic(), 0
        with self._bar(sum(map(len, demos)) * len(model.layers), "token-layer") as bar:
            for group in groups:
                sums = [self._sums(demo) for demo in group]
                turn = dict.fromkeys(self._rows, 0)

                def add(layer: LayerObservation, sums=sums, turn=turn) -> None:
                    # the demonstrations go through a layer in their order
                    sums[turn[layer.layer]].add(layer)
                    turn[layer.layer] += 1

                with observe(model.model, add):
                    for place in model.run([demo.input_ids for demo in group]):
                        if for_weights and place in blocks:
                            ratios[place] = mean_to_rms(blocks[place])
                        bar.update(sum(map(len, group)))
                        done += 1
                        if done == 2:  # the first layers of a model are often dense
                            took = (time.monotonic() - start) / done
                            rest = len(model.layers) * len(groups) - done
                            self._expect(bar, f"a layer of {len(model.layers)}", took, took * rest)
                if for_weights:
                    parts.keep_weights(_weights(self._about, ratios))
                    for_weights = False
                for demo, one in zip(group, sums, strict=True):
                    parts.keep(demo, one.statistics())

    def _expect(self, bar: Any, what: str, took: float, rest: float) -> None:
        if self._progress:
            bar.write(f"{what} took {duration(took)}; the rest needs about {duration(rest)}", file=sys.stderr)


def groups_of(demos: Sequence[Demo], tokens: int) -> Iterator[list[Demo]]:
    """Runs of demonstrations of at most so many tokens together, at least one in each."""
    group: list[Demo] = []
    for demo in demos:
        if group and sum(map(len, group)) + len(demo) > tokens:
            yield group
            group = []
        group.append(demo)
    if group:
        yield group


def _weights(about: Mapping[str, Any], ratios: Mapping[int, np.ndarray | None]) -> dict[str, np.ndarray]:
    """{"aimer": [L, E]}, or nothing where the weights are packed."""
    if any(ratio is None for ratio in ratios.values()):
        return {}
    table = np.zeros((len(about["layers"]), about["num_experts"]))
    for row, layer in enumerate(about["layers"]):
        table[row, : len(ratios[layer])] = ratios[layer]
    return {"aimer": table}


class _Parts:
    """What is done: each demonstration's statistics, in memory and, where there is a journal, on disk.

        JOURNAL/<digest>.safetensors            one demonstration; each file is there whole or not at all
        JOURNAL/weights-<digest>.safetensors    what needs no data

    A digest is of the model and the options too, so that parts of another collection are never taken.
    """

    def __init__(self, journal: str | Path | None, about: Mapping[str, Any]) -> None:
        self._folder = Path(journal) if journal is not None else None
        self._about = json.dumps(about, sort_keys=True)
        self._parts: dict[str, DomainStatistics] = {}
        self._weights: dict[str, np.ndarray] | None = None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._file("weights").exists():
                self._weights = safetensors.numpy.load_file(self._file("weights"))

    def _file(self, digest: str) -> Path:
        name = hashlib.sha256(f"{self._about} {digest}".encode()).hexdigest()
        return self._folder / f"{'weights-' if digest == 'weights' else ''}{name}.safetensors"

    def _read(self, digest: str) -> None:
        if self._folder is None or digest in self._parts or not self._file(digest).exists():
            return
        arrays = safetensors.numpy.load_file(self._file(digest))
        max_norm, tokens = arrays.pop("max_norm"), int(arrays.pop("tokens")[0])
        self._parts[digest] = DomainStatistics.of_demo(arrays, max_norm, tokens)

    def __contains__(self, digest: str) -> bool:
        self._read(digest)
        return digest in self._parts

    @property
    def has_weights(self) -> bool:
        return self._weights is not None

    def keep(self, demo: Demo, part: DomainStatistics) -> None:
        self._parts[demo.digest] = part
        if self._folder is not None:
            arrays = {**part.sums, "max_norm": part.max_norm, "tokens": part.tokens_per_demo}
            write_bytes(self._file(demo.digest), safetensors.numpy.save(arrays))

    def keep_weights(self, weights: dict[str, np.ndarray]) -> None:
        self._weights = weights
        if self._folder is not None:
            write_bytes(self._file("weights"), safetensors.numpy.save(weights))

    def weights(self) -> dict[str, np.ndarray]:
        return self._weights or {}

    def of(self, demo: Demo) -> DomainStatistics:
        return self._parts[demo.digest]


def _gather(
    demos: Sequence[Demo],
    shares: Sequence[int],
    parts: _Parts,
    rank: int,
    group: Any,
    options: Options,
    shape: tuple[int, int],
) -> list[DomainStatistics]:
    """Every demonstration's part in their order, on the first process."""
    found = []
    size = shape[0] * shape[1]
    for demo, owner in zip(demos, shares, strict=True):
        if owner == rank == 0:
            found.append(parts.of(demo))
        elif owner == rank:
            part = parts.of(demo)
            arrays = [*(part.sums[name] for name in options.sums), part.max_norm, part.tokens_per_demo]
            flat = np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in arrays])
            distributed.send(torch.from_numpy(flat), dst=0, group=group)
        elif rank == 0:
            flat = torch.empty(size * (len(options.sums) + 1) + 1, dtype=torch.float64)
            distributed.recv(flat, src=owner, group=group)
            *sums, max_norm = flat[:-1].view(-1, *shape).numpy()
            found.append(
                DomainStatistics.of_demo(dict(zip(options.sums, sums, strict=True)), max_norm, int(flat[-1].item()))
            )
    return found


def _processes() -> tuple[int, int, Any]:
    """(rank, how many, their group on gloo); (0, 1, None) alone. Joins what ``torchrun`` started."""
    patient = datetime.timedelta(days=7)  # the others wait while one of them generates answers
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return 0, 1, None
        distributed.init_process_group("gloo", timeout=patient)
    if distributed.get_world_size() == 1:
        return 0, 1, None
    return distributed.get_rank(), distributed.get_world_size(), distributed.new_group(backend="gloo", timeout=patient)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint's folder, or a run of this library")
    parser.add_argument("--out", type=Path, required=True, metavar="STATS", help="the new file of statistics")
    demos_module.add_arguments(parser)
    demos_module.add_answer_arguments(parser)
    what = parser.add_argument_group("statistics")
    what.add_argument("--token-weight", choices=TOKEN_WEIGHTS, default="residual", help="the states that s compares")
    what.add_argument("--per-demo", choices=PER_DEMO, default="sum", help="add tokens, or each demonstration's mean")
    what.add_argument("--over", choices=OVER, default="all", help="the tokens that count")
    what.add_argument(
        "--exponents",
        action="append",
        default=[],
        type=_exponents,
        metavar="A,B,C",
        help="another sum of g^a |u|^b s^c; may be repeated",
    )
    how = add_model_arguments(parser)
    how.add_argument("--quiet", action="store_true", help="no progress bar")


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """How a checkpoint is loaded and run."""
    how = parser.add_argument_group("how the model runs")
    how.add_argument("--dtype", choices=list(DTYPES), default="auto", help="of the weights; auto is as stored")
    how.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    how.add_argument("--layerwise", action="store_true", help="one decoder layer's weights in memory at a time")
    how.add_argument(
        "--tokens-at-once",
        type=int,
        default=TOKENS_AT_ONCE,
        metavar="N",
        help="with --layerwise: tokens whose hidden states are held; more read the checkpoint less often",
    )
    return how


def open_model(args: argparse.Namespace) -> nn.Module | LayerwiseModel:
    """The model as the command says."""
    if args.tokens_at_once < 1:
        raise ValueError(f"--tokens-at-once {args.tokens_at_once}: it must be at least 1")
    device = pick_device(args.device)
    if args.layerwise:
        return LayerwiseModel.open(args.model, dtype=args.dtype, device=device)
    return load_model(args.model, dtype=args.dtype, device=device)


def _exponents(text: str) -> tuple[float, float, float]:
    try:
        return exponents(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    _check_out(args.out)
    if is_run_folder(args.model):
        return _run_own(args)
    options = Options(
        token_weight=args.token_weight, per_demo=args.per_demo, over=args.over, exponents=tuple(args.exponents)
    )
    rank, _, group = _processes()
    demos, model = load_demos(args, lambda: open_model(args), group=group, rank=rank)
    if rank == 0:
        for warning in short_data(demos):
            _say(f"warning: {warning}")
    journal = args.out.with_name(f"{args.out.name}.journal")
    statistics = collect(
        model,
        demos,
        options=options,
        folder=args.model,
        journal=journal,
        tokens_at_once=args.tokens_at_once,
        progress=not args.quiet,
    )
    if statistics is not None:
        statistics.save(args.out)
        shutil.rmtree(journal)
        print(summary(args.out, statistics))
    return 0


def load_demos(
    args: argparse.Namespace, load: Callable[[], nn.Module | LayerwiseModel], *, group: Any = None, rank: int = 0
) -> tuple[list[Demo], nn.Module | LayerwiseModel]:
    """The demonstrations that the command names, with their answers, and the model.

    Everything that can be wrong with them is found before the model is loaded; answers are generated by the first
    process alone.
    """
    lines = lines_of(args)
    config = load_config(args.model)
    Layout.of(Checkpoint.open(args.model))  # refuses what cannot be pruned
    tokenizer = load_tokenizer(args.model) if any(line.kind != "input_ids" for line in lines) else None
    template = not args.no_template
    limits = {"vocab_size": vocabulary(config), "context": context_length(config), "truncate": args.truncate}
    tokenise([line for line in lines if not line.missing], tokenizer, template=template, **limits)
    missing = [line for line in lines if line.missing]
    for line in missing:
        demos_module.prompt_tokens(line, tokenizer, template=template)
    endpoint = endpoint_of(args, tokenizer)
    if missing and endpoint is None and args.layerwise:
        raise ValueError(
            f"{missing[0].where}: no answer, and a model that is loaded layer by layer is too slow to write one: name "
            "a server with --endpoint, or write the answers into the file"
        )
    model = None
    if missing:
        generator = endpoint
        if generator is None and rank == 0:
            model = load()
            generator = ModelGenerator(
                model,
                tokenizer,
                name=_digests(args.model),
                max_tokens=args.answer_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                template=template,
                context=limits["context"],
            )
        filled = [fill_answers(lines, generator) if rank == 0 else None]
        if group is not None:
            distributed.broadcast_object_list(filled, src=0, group=group)
        lines = filled[0]
    demos = tokenise(lines, tokenizer, template=template, **limits)
    cut = sum(len(demo) == limits["context"] for demo in demos)
    if args.truncate and cut and rank == 0:
        _say(
            f"{cut} of {len(demos)} demonstrations fill the context of {limits['context']} tokens: longer ones were cut"
        )
    return demos, load() if model is None else model


def _digests(folder: Path) -> str:
    checkpoint = Checkpoint.open(folder)
    return hashlib.sha256(f"{checkpoint.config_sha256} {checkpoint.header_hash}".encode()).hexdigest()


def summary(file: Path, statistics: Statistics) -> str:
    """What a file of statistics holds, in a few lines."""
    layers, experts = len(statistics.model["layers"]), statistics.model["num_experts"]
    lines = [f"{file}: {layers} layers of {experts} experts, {file.stat().st_size / 1e6:.1f} MB"]
    for name, domain in statistics.domains.items():
        lines.append(f"  {name}: {domain.demos} demonstrations, {domain.tokens} tokens")
    return "\n".join(lines)


def _run_own(args: argparse.Namespace) -> int:
    from . import runs

    refuse_changed(args, add_arguments, ["--demos", "-", "--out", "-"], ("out", "demos", "domain", "device", "quiet"))
    statistics = runs.collect(
        args.model,
        pair_domains(args.demos, args.domain),
        device=str(pick_device(args.device)),
        progress=not args.quiet,
    )
    statistics.save(args.out)
    print(summary(args.out, statistics))
    return 0


def refuse_changed(
    args: argparse.Namespace,
    add: Callable[[argparse.ArgumentParser], None],
    required: Sequence[str],
    allowed: Sequence[str],
) -> None:
    """Nothing is ignored in silence: options that only checkpoints have are refused for a run of this library.

    Raises:
        ValueError: one that is not allowed was given.
    """
    parser = argparse.ArgumentParser()
    add(parser)
    for name, usual in vars(parser.parse_args(["-", *required])).items():
        if name not in ("model", *allowed) and getattr(args, name) != usual:
            option = "data" if name == "demos" else name.replace("_", "-")
            raise ValueError(f"--{option} is for checkpoints of transformers; {args.model} is a run")


def _check_out(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is there already: delete it, or choose another --out")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}, where --out should go, is no folder: make it first")
