"""Makes routing logs of what other programs recorded, so that the dashboard opens them.

    gatewright import-routing SOURCE --out RUN

SOURCE is one of

* **counts** (JSON): assignments per expert. One object ``{"layers": {"0": [12, 7, ...], ...}, "top_k": 2,
  "tokens": 4096}``, or JSON Lines with one such object a step, each with its ``"step"``; ``tokens`` may be left out
  where ``top_k`` stands, and the reverse. A file ``{"models": {name: {"num_experts", "top_k", "domains": {domain:
  {layer: [...]}}}}}`` becomes a run a model and domain, RUN/name/domain.
* **Megatron-LM's routing trace** (``--moe-routing-trace-path``): the folder of ``router_trace_rank*.jsonl``, or one of
  them. Where ``logits_rank*.bin`` lie beside them, what the scores say is recorded too. The trace says neither which
  tokens are padding nor how many experts there are; a decision that several ranks or a recomputation saw stands in it
  several times, which leaves shares as they are.
* **transformers' router logits** (``output_router_logits=True``) as .safetensors or .npz: an array a layer,
  [tokens, E] or [B, L, E], whose names end in the layer's number; ``attention_mask`` [B, L] (0 = padding) and
  ``input_ids`` [B, L] if wanted. A folder holds a file a batch. ``import_router_logits`` takes them from the model.

Formats: megatron/core/transformer/moe/router_trace.py of NVIDIA/Megatron-LM (read, not run);
``scripts/routing_output`` of allenai/OLMoE for the counts of models and domains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import heapq
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...moe.metrics import coactivation, flow, margins
from ...moe.record_log import ACTIVE, FOLDER, MARGIN_EDGES, LayerInfo, LogWriter, Window, read_log

LARGEST_TEXT = 256 * 2**20  # bytes of a JSON document, or of one line
PROBE_TOKENS = 16_384
_CHUNK = 16_384
_MOST_EXPERTS = 2**15 - 1
_ROUTER_LOGITS = "router logits"

Array = Tensor | np.ndarray
Batch = tuple[Sequence[Array], Array | None] | tuple[Sequence[Array], Array | None, Mapping[str, Array]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        help="counts as JSON or JSON Lines, Megatron-LM's routing trace, or router logits as .safetensors or .npz",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run to make")
    parser.add_argument("--top-k", type=int, help="experts a token; needed with router logits")
    parser.add_argument("--experts", type=int, help="of a layer; by default the highest one that a trace shows")
    parser.add_argument(
        "--score", choices=("softmax", "sigmoid"), default="softmax", help="what makes scores of logits"
    )
    parser.add_argument("--step", type=int, default=0, help="of the checkpoint that router logits come from")


def run(args: argparse.Namespace) -> int:
    runs = import_routing(
        args.source, args.out, top_k=args.top_k, experts=args.experts, score=args.score, step=args.step
    )
    for made in runs:
        log = read_log(made)
        experts = " or ".join(str(size) for size in sorted({layer.experts for layer in log.layers}))
        print(
            f"{made}: {len(log.layers)} layers of {experts} experts, {len(log.steps)} steps, "
            f"{int(log.tokens[:, 0].sum()):,} tokens"
        )
        if log.options.get("experts") == "seen":
            print(f"  the trace does not say how many experts there are: {experts} were seen; --experts says otherwise")
    # Those of one model: others have another shape and are not compared.
    shown = " ".join(str(made) for made in runs if made.parent == runs[0].parent)
    print(f"look at {'it' if len(runs) == 1 else 'them'}: gatewright dashboard {shown} --out report.html")
    return 0


def import_routing(
    source: str | Path,
    out: str | Path,
    *,
    top_k: int | None = None,
    experts: int | None = None,
    score: str = "softmax",
    step: int = 0,
) -> list[Path]:
    """Makes the log of a run, or of several, from any source that this module knows. Returns the runs' folders.

    Raises:
        ValueError: not one of those sources, or one that contradicts itself, or a run that has a log already.
        OSError: the source cannot be read, or the run's folder not written.
    """
    source, out = Path(source), Path(out)
    if source.is_dir():
        traces = sorted(source.glob("router_trace_rank*.jsonl"))
        if traces:
            return [import_megatron_trace(traces, out, experts=experts, score=score)]
        files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".npz"))
        if files:
            return [_import_saved_logits(files, out, top_k, score, step)]
        raise _unknown(source, "holds neither router_trace_rank*.jsonl nor .safetensors or .npz files")
    if source.suffix in (".safetensors", ".npz"):
        return [_import_saved_logits([source], out, top_k, score, step)]
    first = _first_object(source)
    if "top_indices" in first:
        return [import_megatron_trace([source], out, experts=experts, score=score)]
    if "layers" in first:
        return [import_counts(source, out, top_k=top_k)]
    if "models" in first:
        return _import_models(source, first["models"], out)
    raise _unknown(source, "has none of the keys layers, models and top_indices")


# --- counts ---------------------------------------------------------------------------------------------------------


def import_counts(source: str | Path, out: str | Path, *, top_k: int | None = None) -> Path:
    """Makes a log of counts: one JSON object, or JSON Lines with one a step (see the head of this file).

    Raises:
        ValueError: counts that are no whole numbers of at least 0, other layers than before, steps that do not rise,
            or neither tokens nor top_k.
    """
    source, out = Path(source), Path(out)
    records = _lines(source) if _is_lines(source) else iter([(1, _document(source))])
    start = next(records)
    layers = _counted_layers(start[1], top_k, f"{source}, line {start[0]}")
    with _new_log(out, layers, {"imported": "counts", "source": source.name}) as writer:
        before = -1
        for number, record in itertools.chain([start], records):
            where = f"{source}, line {number}"
            step = record.get("step", 0)
            if not _is_whole(step) or step <= before:
                raise ValueError(f"{where}: step {step!r} after step {before}: steps must be whole numbers that rise")
            writer.window(_counted_window(record, layers, before + 1 if before >= 0 else step, step, where))
            before = step
    return out


def _import_models(source: Path, models: Any, out: Path) -> list[Path]:
    runs: dict[Path, tuple[list[LayerInfo], Window]] = {}
    try:
        for model, about in models.items():
            for domain, layers in about["domains"].items():
                record = {"layers": layers, "top_k": about["top_k"]}
                where = f"{source}, {model}, {domain}"
                infos = _counted_layers(record, None, where)
                if any(info.experts != about["num_experts"] for info in infos):
                    raise ValueError(f"{where}: num_experts is {about['num_experts']}, and a layer counts others")
                run = out / _folder_name(model) / _folder_name(domain)
                runs[run] = infos, _counted_window(record, infos, 0, 0, where)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} is damaged ({type(error).__name__}: {error}): a model has num_experts, top_k and domains"
        ) from None
    if not runs:
        raise ValueError(f"{source} holds no counts: no model has a domain")
    for run, (infos, window) in runs.items():
        with _new_log(run, infos, {"imported": "counts", "source": source.name}) as writer:
            writer.window(window)
    return list(runs)


def _counted_layers(record: Mapping[str, Any], top_k: int | None, where: str) -> list[LayerInfo]:
    counts = record.get("layers")
    if not isinstance(counts, dict) or not counts:
        raise ValueError(f'{where}: no layers; expected {{"layers": {{"0": [counts], ...}}, "top_k": 2}}')
    told = record.get("top_k", top_k)
    if told is not None and not (isinstance(told, int | float) and math.isfinite(told) and told > 0):
        raise ValueError(f"{where}: top_k is {told!r}: it must be a number above 0")
    names = sorted(counts, key=int) if all(name.isdecimal() for name in counts) else list(counts)
    layers = []
    for place, name in enumerate(names):
        found = re.search(r"\d+", name)
        experts = len(_counts(counts[name], f"{where}, layer {name}"))
        if told is not None and told > experts:
            raise ValueError(f"{where}, layer {name}: top_k is {told}, of {experts} experts")
        layers.append(_layer_info(name, int(found[0]) if found else place, experts, told))
    return layers


def _counted_window(record: Mapping[str, Any], layers: list[LayerInfo], first: int, last: int, where: str) -> Window:
    counts = record.get("layers")
    if not isinstance(counts, dict) or set(counts) != {layer.name for layer in layers}:
        raise ValueError(f"{where}: other layers than in the first line: {', '.join(map(str, counts or ())) or 'none'}")
    window = Window.zeros(first, last, len(layers), max(layer.experts for layer in layers))
    for place, layer in enumerate(layers):
        row = _counts(counts[layer.name], f"{where}, layer {layer.name}")
        if len(row) != layer.experts:
            raise ValueError(f"{where}, layer {layer.name}: {len(row)} experts, and {layer.experts} before")
        tokens = record.get("tokens")
        if tokens is None:
            if math.isnan(layer.top_k):
                raise ValueError(f"{where}: neither tokens nor top_k: say one of them, in the file or by --top-k")
            tokens = math.ceil(row.sum() / layer.top_k)
        if not _is_whole(tokens):
            raise ValueError(f"{where}: tokens is {tokens!r}: it must be a whole number of at least 0")
        if row.max() > tokens or row.sum() > tokens * (layer.experts if math.isnan(layer.top_k) else layer.top_k) + 0.5:
            raise ValueError(
                f"{where}, layer {layer.name}: {tokens} tokens of {layer.top_k:g} experts cannot have {row.sum()} "
                f"assignments, {row.max()} to one expert"
            )
        window.tokens[place] = tokens
        window.counts[place, : layer.experts] = window.requested[place, : layer.experts] = row
    return window


def _counts(row: Any, where: str) -> np.ndarray:
    if isinstance(row, list) and 0 < len(row) <= _MOST_EXPERTS and all(_is_whole(count) for count in row):
        if sum(row) < 2**62:
            return np.array(row, dtype=np.int64)
    raise ValueError(f"{where}: expected a list of whole numbers of at least 0, one an expert")


# --- Megatron-LM ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Seen:
    """What the first reading of a trace finds."""

    layers: dict[tuple[str, int, int], int] = dataclasses.field(default_factory=dict)  # choices a token
    experts: int = 0
    last: int = -1


def import_megatron_trace(
    files: Sequence[str | Path], out: str | Path, *, experts: int | None = None, score: str = "softmax"
) -> Path:
    """Makes a log of Megatron-LM's routing trace, a window a step, ranks added up. Reads each file twice, line by line.

    Args:
        files: ``router_trace_rank*.jsonl``.
        experts: routed experts of a layer; by default the highest id anywhere in the trace, and 1.
        score: what makes scores of logits, where those were captured: softmax or sigmoid.

    Raises:
        ValueError: a line that is no record of such a trace, ids beyond ``experts``, or steps that go back in a file.
    """
    files = [Path(file) for file in files]
    seen = _look_through(files)
    if not seen.layers:
        raise ValueError(f"{files[0].parent} holds a routing trace without a record: nothing to import")
    if experts is not None and seen.experts > experts:
        raise ValueError(f"the trace has ids up to {seen.experts - 1}, and experts is {experts}: it must be larger")
    size = experts or seen.experts
    layers, places = [], {}
    for key in sorted(seen.layers, key=lambda key: (key[0] != "decoder", key)):
        block, index, layer = key
        name = f"decoder.layers.{layer}" if block == "decoder" else f"{block}.layers.{index}.layers.{layer}"
        # The layers that predict further tokens come after the decoder's, whose numbers they would repeat.
        number = layer if block == "decoder" or not layers else layers[-1].layer + 1
        places[key] = len(layers)
        layers.append(_layer_info(name, number, size, seen.layers[key]))
    options = {"imported": "Megatron-LM routing trace", "source": files[0].name, "score": score}
    options |= {} if experts else {"experts": "seen"}
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(contextlib.closing(_trace(file))) for file in files]
        writer = stack.enter_context(_new_log(Path(out), layers, options))
        merged = heapq.merge(*streams, key=lambda record: record.step)
        for step, records in itertools.groupby(merged, key=lambda record: record.step):
            window = Window.zeros(step, step, len(layers), size)
            structure = _Structure([size] * len(layers)) if step == seen.last else None
            for record in records:
                place = places[record.layer]
                _add_decisions(window, place, record.index, record.logits(size), score)
                if structure is not None:
                    structure.add(place, record.index, stream=record.file)
            writer.window(window)
            if structure is not None:
                writer.structure(step, structure.together, structure.onwards)
    return Path(out)


@dataclasses.dataclass(frozen=True)
class _Record:
    """A line of a trace."""

    file: Path
    number: int
    step: int
    layer: tuple[str, int, int]
    index: np.ndarray
    sidecar: tuple[int, int, list[int]] | None
    rank: int

    def logits(self, experts: int) -> np.ndarray | None:
        """[T, E] of the file beside the trace; None where none were captured, or where it is not there."""
        path = self.file.with_name(f"logits_rank{self.rank}.bin")
        if self.sidecar is None or not path.is_file():
            return None
        offset, length, shape = self.sidecar
        if shape != [len(self.index), experts] or length != 2 * math.prod(shape):
            raise ValueError(
                f"{self.file}, line {self.number}: logits of shape {shape} in {length} bytes for {len(self.index)} "
                f"tokens of {experts} experts"
            )
        if offset + length > path.stat().st_size:
            raise ValueError(f"{path} ends before the logits of {self.file.name}, line {self.number}: it was cut off")
        halves = np.fromfile(path, dtype="<u2", count=length // 2, offset=offset)
        return (halves.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def _look_through(files: list[Path]) -> _Seen:
    seen = _Seen()
    for file in files:
        before = -1
        for record in _trace(file, quiet=True):
            where = f"{file}, line {record.number}"
            if record.step < before:
                raise ValueError(f"{where}: step {record.step} after step {before}: a trace's steps never go back")
            before = record.step
            width = record.index.shape[1]
            if seen.layers.setdefault(record.layer, width) != width:
                raise ValueError(f"{where}: {width} experts a token, and {seen.layers[record.layer]} before")
            seen.experts = max(seen.experts, width, int(record.index.max(initial=-1)) + 1)
            if record.sidecar is not None:
                seen.experts = max(seen.experts, record.sidecar[2][-1])
            if seen.experts > _MOST_EXPERTS:
                raise ValueError(f"{where}: expert {seen.experts - 1}: ids go up to {_MOST_EXPERTS - 1}")
        seen.last = max(seen.last, before)
    return seen


def _trace(file: Path, quiet: bool = False) -> Iterator[_Record]:
    for number, record in _lines(file, quiet):
        where = f"{file}, line {number}"
        try:
            step, layer, rank = record["step"], record["layer"], record.get("rank", 0)
            block, mtp, rows = record.get("block", "decoder"), record.get("mtp_idx") or 0, record["top_indices"]
            width = len(rows[0]) if rows else record["topk"]
            index = np.array(rows, dtype=np.int64).reshape(len(rows), width)
            sidecar = None
            if "logit_offset" in record:
                sidecar = record["logit_offset"], record["logit_bytes"], list(record["logit_shape"])
                if not all(map(_is_whole, (*sidecar[:2], *sidecar[2]))) or len(sidecar[2]) != 2:
                    raise TypeError("logit_offset, logit_bytes and logit_shape")
            if not all(map(_is_whole, (step, layer, rank, mtp, width))) or not isinstance(block, str) or not width:
                raise TypeError("step, block, layer, rank and topk")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{where}: no record of a routing trace, or of another version ({type(error).__name__}: {error}); "
                "expected step, layer, rank and top_indices [tokens, k]"
            ) from None
        if record.get("num_tokens", len(index)) != len(index):
            raise ValueError(f"{where}: num_tokens is {record['num_tokens']}, and top_indices has {len(index)} rows")
        ordered = np.sort(index, axis=1)
        if index.min(initial=0) < -1 or ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise ValueError(f"{where}: a token names an expert twice, or one below 0")
        yield _Record(file, number, step, (block, mtp, layer), index, sidecar, rank)


# --- router logits --------------------------------------------------------------------------------------------------


def import_router_logits(
    batches: Iterable[Batch],
    out: str | Path,
    *,
    top_k: int,
    step: int = 0,
    score: str = "softmax",
    label_names: Mapping[str, Sequence[str]] | None = None,
    source: str = "",
) -> Path:
    """Makes a log of what ``model(..., output_router_logits=True).router_logits`` held for one checkpoint; adds to the
    log of another checkpoint of the same model, so that the same batches show what moved.

        import_router_logits([(outputs.router_logits, attention_mask)], "run", top_k=model.config.num_experts_per_tok)

    The k experts of a token are taken to be those of its largest logits. A router that chooses by other scores (with a
    bias, within groups) needs a recorder instead.

    Args:
        batches: (router_logits, attention_mask or None[, labels]) each, also one by one from a generator.
            router_logits: [B * L, E] or [B, L, E] a layer; attention_mask: [B, L], 0 = padding; labels: whole numbers
            [B, L] by name, such as token ids or domains, for the page on meaning.
        top_k: experts a token.
        step: the checkpoint's.
        score: what makes scores of logits: softmax or sigmoid.
        label_names: what the values of a label are called; by default their numbers.

    Raises:
        ValueError: no batch, layers that do not fit each other, NaN, or a run that was recorded otherwise.
    """
    out = Path(out)
    if not _is_whole(step):
        raise ValueError(f"step is {step!r}: it must be a whole number of at least 0")
    sums: _LogitSums | None = None
    for number, batch in enumerate(batches):
        logits, mask, *labels = batch
        if len(logits) == 0:
            raise ValueError(f"batch {number} has no layers: was the model called with output_router_logits=True?")
        if sums is None:
            sums = _LogitSums([_experts_of(layer, number, place) for place, layer in enumerate(logits)], top_k, step)
        sums.add(number, logits, mask, labels[0] if labels else {}, score)
    if sums is None:
        raise ValueError("no batch: nothing to import")
    index, labels = sums.probe(label_names or {})
    layers = [_layer_info(f"layers.{i}", i, experts, top_k) for i, experts in enumerate(sums.experts)]
    if (out / FOLDER).exists() and read_log(out, max_windows=1).options.get("imported") != _ROUTER_LOGITS:
        raise ValueError(f"{out} holds a log that was not made of router logits: choose another folder")
    writer = LogWriter(out, layers, {"imported": _ROUTER_LOGITS, "source": source, "score": score})
    writer.start(step)
    writer.window(sums.window)
    writer.structure(step, sums.structure.together, sums.structure.onwards)
    if len(index[0]):
        writer.probe(step, index, labels)
    writer.close()
    return out


class _LogitSums:
    def __init__(self, experts: list[int], top_k: int, step: int) -> None:
        if not _is_whole(top_k) or not 1 <= top_k <= min(experts):
            raise ValueError(f"top_k is {top_k!r}: choose 1 to {min(experts)}, the experts of a layer")
        self.experts, self.top_k = experts, top_k
        self.window = Window.zeros(step, step, len(experts), max(experts))
        self.structure = _Structure(experts)
        self._index: list[list[np.ndarray]] = [[] for _ in experts]
        self._labels: dict[str, list[np.ndarray]] = {}
        self._kept = 0

    def add(
        self, number: int, logits: Sequence[Array], mask: Array | None, labels: Mapping[str, Array], score: str
    ) -> None:
        if len(logits) != len(self.experts):
            raise ValueError(f"batch {number} has {len(logits)} layers, and the first one {len(self.experts)}")
        real = None if mask is None else _array(mask).reshape(-1) != 0
        labels = {name: _array(values).reshape(-1) for name, values in labels.items()}
        if number and set(labels) != set(self._labels):
            raise ValueError(
                f"batch {number} has the labels {sorted(labels)}, and the first one {sorted(self._labels)}"
            )
        keep = 0
        for place, (layer, experts) in enumerate(zip(logits, self.experts, strict=True)):
            if _experts_of(layer, number, place) != experts:
                raise ValueError(f"batch {number}, layer {place}: {layer.shape[-1]} experts, and {experts} before")
            rows = layer.reshape(-1, experts)
            for name, other in {"attention_mask": real, **labels}.items():
                if other is not None and len(other) != len(rows):
                    raise ValueError(
                        f"batch {number}, layer {place}: {len(rows)} tokens, and {name} has {len(other)} values"
                    )
            chosen = self._add_layer(number, place, rows, real, score)
            self.structure.add(place, chosen)
            keep = min(len(chosen), PROBE_TOKENS - self._kept)
            self._index[place].append(chosen[:keep])
        for name, values in labels.items():
            values = values if real is None else values[real]
            if values.dtype.kind not in "iu":
                raise ValueError(f"batch {number}: label {name} must be whole numbers, not {values.dtype}")
            self._labels.setdefault(name, []).append(values[:keep])
        self._kept += keep

    def _add_layer(self, number: int, place: int, rows: Array, real: np.ndarray | None, score: str) -> np.ndarray:
        found = [np.zeros((0, self.top_k), dtype=np.int64)]
        for start in range(0, len(rows), _CHUNK):
            logits = _array(rows[start : start + _CHUNK])
            if real is not None:
                logits = logits[real[start : start + _CHUNK]]
            if np.isnan(logits).any() or np.isposinf(logits).any():
                raise ValueError(f"batch {number}, layer {place}: the logits of a real token are not finite")
            index = np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]
            _add_decisions(self.window, place, index, logits, score)
            found.append(index)
        return np.concatenate(found)

    def probe(
        self, names: Mapping[str, Sequence[str]]
    ) -> tuple[list[np.ndarray], dict[str, tuple[np.ndarray, list[str]]]]:
        labels = {}
        for name, parts in self._labels.items():
            values = np.concatenate(parts)
            if name in names:
                if len(values) and not 0 <= values.min() <= values.max() < len(names[name]):
                    raise ValueError(
                        f"label {name} has values {values.min()} to {values.max()}, and names for {len(names[name])}"
                    )
                labels[name] = values.astype(np.int32), [str(text) for text in names[name]]
            else:
                called, places = np.unique(values, return_inverse=True)
                labels[name] = places.astype(np.int32), [str(value) for value in called.tolist()]
        return [np.concatenate(parts) for parts in self._index], labels


def _experts_of(logits: Array, number: int, place: int) -> int:
    if not hasattr(logits, "shape") or len(logits.shape) not in (2, 3) or not 0 < logits.shape[-1] <= _MOST_EXPERTS:
        shape = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
        raise ValueError(f"batch {number}, layer {place}: {shape}, expected logits [tokens, E] or [B, L, E]")
    return int(logits.shape[-1])


def _array(values: Array) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach()
        return (values.double() if values.is_floating_point() else values).cpu().numpy()
    return np.asarray(values).astype(np.float64) if np.asarray(values).dtype.kind == "f" else np.asarray(values)


def _import_saved_logits(files: list[Path], out: Path, top_k: int | None, score: str, step: int) -> Path:
    if top_k is None:
        raise ValueError(f"{files[0]} does not say how many experts a token takes: say --top-k")
    with contextlib.ExitStack() as stack:
        saved = (_saved_batch(file, stack) for file in files)
        return import_router_logits(saved, out, top_k=top_k, step=step, score=score, source=files[0].name)


def _saved_batch(file: Path, stack: contextlib.ExitStack) -> Batch:
    tensors = _open_tensors(file, stack)
    numbered = {name: re.fullmatch(r"(.*?)(\d+)", name) for name in tensors}
    found = sorted((int(match[2]), match[1], name) for name, match in numbered.items() if match)
    others = {name for name in tensors if not numbered[name]} - {"attention_mask", "input_ids"}
    if not found or len({prefix for _, prefix, _ in found}) != 1 or others:
        raise ValueError(
            f"{file} has the arrays {', '.join(sorted(tensors)[:8]) or 'none'}: expected one a layer, named alike with "
            "the layer's number at the end (layer_0, layer_1, ...), and attention_mask and input_ids if wanted"
        )
    mask = tensors["attention_mask"]() if "attention_mask" in tensors else None
    labels = {"token": tensors["input_ids"]()} if "input_ids" in tensors else {}
    return _Lazy([tensors[name] for _, _, name in found]), mask, labels


class _Lazy(Sequence):
    """Layers that are read when they are looked at, and not kept."""

    def __init__(self, readers: list) -> None:
        self._readers = readers

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, place):
        return self._readers[place]()


def _open_tensors(file: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """By name, what reads the array. Neither format can run code."""
    from safetensors import SafetensorError, safe_open

    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")
    try:
        if file.suffix == ".safetensors":
            opened = stack.enter_context(safe_open(file, framework="pt"))
            return {name: _reader(opened.get_tensor, name, file) for name in opened.keys()}
        opened = stack.enter_context(np.load(file, allow_pickle=False))
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        return {name: _reader(opened.__getitem__, name, file) for name in opened.files}
    except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or no {file.suffix} file ({error})") from None


def _reader(read, name: str, file: Path):
    def load():
        try:
            return read(name)
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{file}: {name} cannot be read ({error})") from None

    return load


# --- what several sources share -------------------------------------------------------------------------------------


class _Structure:
    """Which experts occur together, in a layer and from one layer to the next."""

    def __init__(self, experts: list[int]) -> None:
        most = max(experts)
        self.experts = experts
        self.together = np.zeros((len(experts), most, most), dtype=np.int64)
        self.onwards = np.zeros((max(0, len(experts) - 1), most, most), dtype=np.int64)
        self._before: dict[Any, tuple[int, np.ndarray]] = {}

    def add(self, place: int, index: np.ndarray, stream: Any = None) -> None:
        """Takes the ids [T, K] of a layer. Layers of one stream that follow each other are of the same tokens."""
        own = self.experts[place]
        self.together[place, :own, :own] += coactivation(index, own).numpy()
        before, ids = self._before.get(stream, (-1, index))
        if before == place - 1 and place > 0 and len(ids) == len(index):
            other = self.experts[before]
            self.onwards[before, :other, :own] += flow(ids, index, other, own).numpy()
        self._before[stream] = place, index


def _add_decisions(window: Window, place: int, index: np.ndarray, logits: np.ndarray | None, score: str) -> None:
    """Adds tokens to a layer of a window: their ids [T, K], -1 = none, and their logits [T, E]."""
    chosen = index >= 0
    load = np.bincount(index[chosen], minlength=window.counts.shape[1])
    window.counts[place] += load
    window.requested[place] += load
    window.tokens[place] += len(index)
    if logits is None or not len(index):
        return
    logits_TE = logits.astype(np.float64)
    finite = np.isfinite(logits_TE)
    largest = logits_TE.max(1, keepdims=True)
    powers = np.exp(logits_TE - largest)
    logsumexp = np.log(powers.sum(1)) + largest[:, 0]
    raw = powers if score == "softmax" else 1 / (1 + np.exp(-np.clip(logits_TE, -700, 700)))
    scores_TE = np.where(finite, raw, 0)
    scores_TE /= scores_TE.sum(1, keepdims=True)
    positive = np.where(scores_TE > 0, scores_TE, 1)
    experts = logits_TE.shape[1]
    window.sampled[place] += len(index)
    window.score_sum[place, :experts] += scores_TE.sum(0)
    window.entropy_sum[place] -= (scores_TE * np.log(positive)).sum()
    window.mass_sum[place] += np.where(chosen, np.take_along_axis(scores_TE, np.maximum(index, 0), 1), 0).sum()
    window.z_sum[place] += np.square(logsumexp).sum()
    squares = np.where(finite, np.square(np.where(finite, logits_TE, 0)), 0)
    window.logit_square_sum[place] += (squares.sum(1) / finite.sum(1)).sum()
    found = margins(torch.from_numpy(logits_TE), torch.from_numpy(index)).numpy()
    window.margin_histogram[place] += np.histogram(np.maximum(found[~np.isnan(found)], 0), MARGIN_EDGES)[0]
    active = np.minimum(chosen.sum(1), ACTIVE - 1)
    window.active_histogram[place] += np.bincount(active, minlength=ACTIVE)


def _layer_info(name: str, layer: int, experts: int, top_k: float | None) -> LayerInfo:
    k = math.nan if top_k is None else float(top_k)
    return LayerInfo(name=name, layer=layer, experts=experts, top_k=k, kinds=("routed",) * experts)


@contextlib.contextmanager
def _new_log(run: Path, layers: list[LayerInfo], options: dict[str, Any]) -> Iterator[LogWriter]:
    """A log that is there when all of it is written, and not at all when that fails."""
    if (run / FOLDER).exists():
        raise ValueError(f"{run} holds a routing log already: choose another folder")
    made = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".import-", dir=run))
    try:
        writer = LogWriter(draft, layers, options)
        try:
            writer.start(0)
            yield writer
        except BaseException:
            writer.close(complete=False)
            raise
        writer.close()
        os.rename(draft / FOLDER, run / FOLDER)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if made and not any(run.iterdir()):
            run.rmdir()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= value < 2**62


def _folder_name(name: str) -> str:
    """A model's or domain's name as one harmless path part."""
    return re.sub(r"[^\w.+-]", "_", str(name)).lstrip(".") or "_"


def _unknown(source: Path, what: str) -> ValueError:
    return ValueError(
        f"{source} {what}: expected counts as JSON, Megatron-LM's routing trace, or router logits as .safetensors or "
        ".npz (`gatewright import-routing --help`)"
    )


def _first_object(file: Path) -> dict[str, Any]:
    """The first line where that is a JSON object, otherwise the whole file."""
    return next(_lines(file))[1] if _is_lines(file) else _document(file)


def _is_lines(file: Path) -> bool:
    """Whether the first line with anything in it is a whole JSON object."""
    with open(file, "rb") as stream:
        for line in iter(lambda: stream.readline(LARGEST_TEXT), b""):
            if line.strip():
                try:
                    return isinstance(json.loads(line), dict)
                except (ValueError, RecursionError):
                    return False
    return False


def _document(file: Path) -> dict[str, Any]:
    if file.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{file} is larger than {LARGEST_TEXT >> 20} MiB: write JSON Lines, one object a step")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise _unknown(file, "is no JSON") from None
    if not isinstance(content, dict):
        raise _unknown(file, f"holds a JSON {type(content).__name__}, no object")
    return content


def _lines(file: Path, quiet: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line of a JSON Lines file. A last line without its end was cut off: left out, said."""
    with open(file, "rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LARGEST_TEXT), b""), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                if not line.endswith(b"\n") and len(line) < LARGEST_TEXT and number > 1:
                    if not quiet:
                        print(f"{file}: the last line was cut off and is left out", file=sys.stderr)
                    return
                raise ValueError(f"{file}, line {number}: expected a JSON object") from None
            yield number, record
