"""What the page draws, computed from routing logs: `page_data(logs)` is JSON, the arrays of a run packed into one
compressed string.

Large runs are thinned, and the page says so: curves have at most ``MOST_WINDOWS`` points (neighbouring windows are
added up, so no token is lost), the load map at most ``MOST_CELLS`` cells, and matrices [E, E] are of evenly spaced
layers. Arrays are quantised where a picture cannot tell: linearly to 16 bits, or to 8 on a log2 scale
(steps of 3.3 %).
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...moe import metrics
from ...moe.record_log import Probe, RoutingLog, read_log
from .alerts import choices_a_token, find_alerts, recent
from .definitions import DEFINITIONS

MOST_WINDOWS = 200
MOST_CELLS = 320_000
MOST_PAIRS = 200_000
MOST_PROBES = 24
MOST_SHOWN = 60_000  # choices of the tokens that are drawn
MOST_POINTS = 400
MOST_LABELS = 48  # with more values a label is shown as chips, not as a panel, unless they form a grid
PERMUTATIONS = 20
ENOUGH = 10  # occurrences below which a token id says nothing


def read_runs(paths: Sequence[str | Path]) -> list[RoutingLog]:
    """The logs of runs that can be compared, thinned to what a page can show.

    Raises:
        ValueError: no log there, nothing recorded in it yet, or runs of different shapes.
    """
    logs = [read_log(path, max_windows=MOST_WINDOWS) for path in paths]
    for path, log in zip(paths, logs, strict=True):
        if not len(log.steps) and not log.probes and not log.structure:
            raise ValueError(f"{path}: nothing is recorded yet: wait for the first window, or record more often")
    for path, log in zip(paths[1:], logs[1:], strict=True):
        if _shape(log) != _shape(logs[0]):
            raise ValueError(
                f"runs of different shapes cannot be compared: {paths[0]} has {_shape_in_words(logs[0])}, {path} has "
                f"{_shape_in_words(log)}; make a report of each"
            )
    return logs


def _shape(log: RoutingLog) -> list[int]:
    return [layer.experts for layer in log.layers]


def _shape_in_words(log: RoutingLog) -> str:
    experts = sorted(set(_shape(log)))
    return f"{len(log.layers)} MoE layers of {' or '.join(map(str, experts)) or 'no'} experts"


def page_data(logs: Sequence[RoutingLog], *, title: str = "") -> dict[str, Any]:
    """All that ``mount`` of ``page/dashboard.js`` needs, as JSON."""
    names = _different([log.name for log in logs])
    keys = ("name", "formula", "text", "range", "null", "reduction")
    return {
        "format": 1,
        "title": title or _listed(names),
        "library": f"gatewright {__version__}",
        "definitions": {name: dict(zip(keys, entry, strict=True)) for name, entry in DEFINITIONS.items()},
        "runs": [_run(log, name) for log, name in zip(logs, names, strict=True)],
    }


def _listed(names: list[str]) -> str:
    return ", ".join(names[:2]) + f" and {len(names) - 2} more" if len(names) > 2 else " and ".join(names)


def _different(names: list[str]) -> list[str]:
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


class _Blob:
    """Arrays one after the other in one compressed string; what refers to them are their places in it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, array: np.ndarray, **meaning: Any) -> dict[str, Any]:
        data = np.ascontiguousarray(array).tobytes()
        data += b"\0" * (-len(data) % 4)
        entry = {"type": array.dtype.str[1:], "shape": list(array.shape), "at": self._length, **meaning}
        self._parts.append(data)
        self._length += len(data)
        return entry

    def whole(self, values: np.ndarray) -> dict[str, Any]:
        largest, least = values.max(initial=0), values.min(initial=0)
        dtype = next(
            d for d in ("<i2", "<i4", "<f8") if d == "<f8" or (largest <= (i := np.iinfo(d)).max and least >= i.min)
        )
        return self.add(values.astype(dtype))

    def linear(self, values: np.ndarray, bits: int = 16, low: float | None = None, high: float | None = None):
        """Between the least and the largest finite value, or the given; the highest code is NaN."""
        values = np.asarray(values, dtype=np.float64)
        there = np.isfinite(values)
        if low is None or high is None:
            low = float(values[there].min()) if there.any() else 0.0
            high = float(values[there].max()) if there.any() else 1.0
        top = 2**bits - 2
        scale = (high - low) / top or 1.0
        codes = np.where(there, np.clip(np.rint((np.where(there, values, low) - low) / scale), 0, top), top + 1)
        return self.add(codes.astype("<u2" if bits == 16 else "|u1"), low=low, scale=scale, missing=top + 1)

    def logarithmic(self, ratios: np.ndarray, span: float = 6.0) -> dict[str, Any]:
        """8 bits: 0 = missing, 1 = zero, 2 to 255 = log2 of the ratio from -span to span."""
        ratios = np.asarray(ratios, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = 2 + np.rint((np.clip(np.log2(ratios), -span, span) + span) / (2 * span) * 253)
        codes = np.where(ratios > 0, codes, 1)
        return self.add(np.where(np.isnan(ratios), 0, codes).astype("|u1"), span=span)

    def text(self) -> str:
        return base64.b64encode(gzip.compress(b"".join(self._parts), 9, mtime=0)).decode()


def _run(log: RoutingLog, name: str) -> dict[str, Any]:
    blob, notices = _Blob(), list(log.notices)
    log = dataclasses.replace(log, probes=[_with_a_choice(probe) for probe in log.probes])
    top_k = [choices_a_token(log, layer) for layer in range(len(log.layers))]
    structure = _structure(log, top_k, blob, notices)
    if log.probes and not _chosen(log):
        notices.append("the probe holds no choices of tokens (soft slots have none): movement and meaning show nothing")
    layers = [
        {
            "name": layer.name,
            "layer": layer.layer,
            "experts": layer.experts,
            "top_k": None if math.isnan(top_k[i]) else round(top_k[i], 4),
            "router": layer.router,
            "options": json.dumps(layer.options, default=str, sort_keys=True),
        }
        for i, layer in enumerate(log.layers)
    ]
    run = {
        "name": name,
        "version": log.version,
        "complete": log.complete,
        "sessions": [int(step) for step in log.session_starts],
        "hash": hashlib.sha256(json.dumps([layers, log.options], default=str, sort_keys=True).encode()).hexdigest()[
            :12
        ],
        "layers": layers,
        "first": log.first_steps.tolist(),
        "last": log.steps.tolist(),
        "alerts": [dataclasses.asdict(alert) for alert in find_alerts(log)],
        "scalars": _scalars(log),
        "curves": _curves(log, top_k, blob),
        "tokens": blob.whole(log.tokens),
        "sampled": blob.whole(log.sampled),
        "load": _load(log, blob, notices),
        "decisions": _decisions(log, blob),
        "movement": _movement(log, blob, notices),
        "structure": structure,
        "meaning": _meaning(log, top_k, blob, notices),
        "notices": notices,
    }
    return run | {"blob": blob.text()}


def _with_a_choice(probe: Probe) -> Probe:
    """The probe with a column of "none" for a layer that chose nothing at all."""
    return Probe(probe.step, [np.pad(ids, ((0, 0), (0, ids.shape[1] == 0)), constant_values=-1) for ids in probe.index])


def _scalars(log: RoutingLog) -> list[dict[str, Any]]:
    """At most two, the loss first; the mean of neighbouring points where there are many."""
    names = sorted(log.scalars, key=lambda name: ("loss" not in name, len(name), name))[:2]
    shown = []
    for name in names:
        steps, values = log.scalars[name]
        pieces = np.array_split(np.arange(len(steps)), min(len(steps), MOST_POINTS))
        thinned = [float(np.mean(values[piece])) for piece in pieces]
        shown.append(
            {
                "name": name,
                "steps": [int(steps[piece[-1]]) for piece in pieces],
                "values": [float(f"{v:.5g}") if math.isfinite(v) else None for v in thinned],
                "mean_of": math.ceil(len(steps) / max(1, len(pieces))),
            }
        )
    return shown


def _curves(log: RoutingLog, top_k: list[float], blob: _Blob) -> dict[str, Any]:
    """Every measure [S, L] that was recorded."""
    windows, layers = log.tokens.shape
    named: dict[str, np.ndarray] = {}
    for layer, info in enumerate(log.layers):
        measured = _measures(log, layer, info.experts, top_k[layer]) if info.experts and windows else {}
        for name, values in measured.items():
            named.setdefault(name, np.full((windows, layers), np.nan))[:, layer] = values
    return {name: blob.linear(values) for name, values in named.items() if np.isfinite(values).any()}


def _measures(log: RoutingLog, layer: int, experts: int, top_k: float) -> dict[str, Any]:
    """Of one layer [S], NaN where it was not recorded."""
    requested, scores = log.requested[:, layer, :experts], log.score_sum[:, layer, :experts]
    # a router without scores or logits leaves their sums at zero
    scored = np.where(scores.sum(-1) > 0, log.sampled[:, layer], 0)
    with_logits = np.where(log.logit_square_sum[:, layer] > 0, log.sampled[:, layer], 0)
    entropy_sum = np.where(scored > 0, log.entropy_sum[:, layer], np.nan)
    made = {
        "max_violation": metrics.max_violation(requested),
        "dead": metrics.dead_fraction(requested),
        # what was read from elsewhere tells what was computed, not what was asked for
        "drop_rate": np.full(len(log.tokens), np.nan)
        if log.options.get("imported")
        else metrics.drop_rate(log.counts[:, layer, :experts], requested),
        "balance": metrics.score_balance(requested, np.where(scored[:, None] > 0, scores, np.nan)),
        "information": metrics.routing_information(scores, entropy_sum, scored),
        "token_entropy": metrics.token_entropy(entropy_sum, scored, experts),
        "mass": np.where(scored > 0, metrics.top_k_mass(log.mass_sum[:, layer], scored), np.nan),
        "z": np.where(with_logits > 0, metrics.z_loss(log.z_sum[:, layer], with_logits), np.nan),
        "logit_scale": np.where(
            with_logits > 0, metrics.logit_rms(log.logit_square_sum[:, layer], with_logits), np.nan
        ),
        "close_calls": metrics.margin_below(log.margin_histogram[:, layer], log.margin_edges),
        "drift": np.concatenate([[np.nan], metrics.load_drift(requested[:-1], requested[1:])]),
    }
    if not math.isnan(top_k):
        made["collapse_aware_entropy"] = metrics.collapse_aware_entropy(requested, min(top_k, experts))
    return {name: np.asarray(values) for name, values in made.items()}


def _groups(size: int, most: int) -> list[np.ndarray]:
    return [group for group in np.array_split(np.arange(size), max(1, min(size, most))) if len(group)]


def _load(log: RoutingLog, blob: _Blob, notices: list[str]) -> dict[str, Any] | None:
    """Times the fair share [F, L, E], of windows or of several added up."""
    windows, layers, experts = log.requested.shape
    if not windows or not layers or not experts:
        return None
    groups = _groups(windows, max(2, MOST_CELLS // (layers * experts)))
    if len(groups) < windows:
        notices.append(
            f"the load map shows {len(groups)} moments: {windows} windows added up, so that the page stays small"
        )
    counts = np.stack([log.requested[group].sum(0) for group in groups]).astype(np.float64)
    sizes = np.array(_shape(log))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = counts * sizes[:, None] / counts.sum(-1, keepdims=True)
    ratios[:, np.arange(experts) >= sizes[:, None]] = np.nan
    return {
        "ratio": blob.logarithmic(ratios),
        "first": [int(log.first_steps[group[0]]) for group in groups],
        "last": [int(log.steps[group[-1]]) for group in groups],
        "assignments": blob.whole(counts.sum(-1).astype(np.int64)),
    }


def _decisions(log: RoutingLog, blob: _Blob) -> dict[str, Any]:
    windows = len(log.steps)
    groups = _groups(windows, 24)

    def shares(histogram: np.ndarray) -> np.ndarray:
        summed = np.stack([histogram[group].sum(0) for group in groups]).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return summed / summed.sum(-1, keepdims=True)

    made: dict[str, Any] = {"last": [int(log.steps[group[-1]]) for group in groups]}
    if windows and log.margin_histogram.any():
        made["margins"] = blob.linear(shares(log.margin_histogram), bits=8)
        made["edges"] = [float(edge) if math.isfinite(edge) else None for edge in log.margin_edges]
    if windows and log.active_histogram.any():
        made["active"] = blob.linear(shares(log.active_histogram), bits=16, low=0.0, high=1.0)
    if windows and log.drops[..., 0].any():
        drops = log.drops[recent(log)].sum(0).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            made["drops"] = blob.linear(drops[..., 0] / drops[..., 1])
    return made


_BITS = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def _sets(index: np.ndarray, experts: int) -> np.ndarray:
    """Each token's experts as bits. [N, K] -> [N, E / 8]"""
    chosen = np.zeros((len(index), experts + 1), dtype=bool)
    chosen[np.arange(len(index))[:, None], np.where(index < 0, experts, index)] = True
    return np.packbits(chosen[:, :experts], axis=1)


def _overlap(before: np.ndarray, after: np.ndarray) -> float:
    size = np.maximum(_BITS[before].sum(1, dtype=np.int64), _BITS[after].sum(1, dtype=np.int64))
    shared = _BITS[before & after].sum(1, dtype=np.int64)
    routed = size > 0
    return float((shared[routed] / size[routed]).mean()) if routed.any() else math.nan


def _chosen(log: RoutingLog) -> bool:
    """Whether there are probes that hold choices of tokens: soft slots are none."""
    return bool(log.probes) and all(index.size for index in log.probes[-1].index)


def _movement(log: RoutingLog, blob: _Blob, notices: list[str]) -> dict[str, Any] | None:
    """Of the probe: overlap of every two checkpoints [L, P, P], from which saturation and fluctuation are read."""
    if not _chosen(log):
        return None
    chosen = np.unique(np.linspace(0, len(log.probes) - 1, min(len(log.probes), MOST_PROBES)).round().astype(int))
    if len(chosen) < len(log.probes):
        notices.append(f"{len(chosen)} of {len(log.probes)} probes are shown, evenly spaced")
    probes = [log.probes[place] for place in chosen]
    layers, count = len(log.layers), len(probes)
    overlap, first, settled = np.full((layers, count, count), np.nan), np.full((layers, count), np.nan), []
    pairs = list(zip(probes, probes[1:], strict=False))
    for layer, info in enumerate(log.layers):
        sets = [_sets(probe.index[layer], info.experts) for probe in probes]
        for i in range(count):
            for j in range(i, count):
                overlap[layer, i, j] = overlap[layer, j, i] = _overlap(sets[i], sets[j])
        leading = np.stack([probe.index[layer][:, 0] for probe in probes])
        first[layer, 1:] = [metrics.fluctuation(probe.index[layer], later.index[layer]) for probe, later in pairs]
        stays = metrics.settled_at(leading)
        settled.append(probes[stays].step if stays < count - 1 else None)
    return {
        "steps": [probe.step for probe in probes],
        "tokens": len(probes[-1].index[0]),
        "overlap": blob.linear(overlap, bits=8, low=0.0, high=1.0),
        "first": blob.linear(first),
        "settled": settled,
    }


def _spread(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, max(1, min(count, most))).round().astype(int)).tolist() if count else []


def _structure(log: RoutingLog, top_k: list[float], blob: _Blob, notices: list[str]) -> dict[str, Any] | None:
    """The last sampled co-activation and flow, the last prototypes' cosines, and an order that puts alike experts side
    by side."""
    layers, experts = len(log.layers), max(_shape(log), default=0)
    if not experts or not (log.structure or log.similarity):
        return None
    shown = _spread(layers, MOST_PAIRS // experts**2)
    if len(shown) < layers:
        notices.append(
            f"structure is shown of {len(shown)} of {layers} layers, evenly spaced, so that the page stays small"
        )
    made: dict[str, Any] = {"layers": shown, "order": [], "merges": []}
    lift, cosine = None, None
    if log.structure:
        step, together, onwards = log.structure[-1]
        made["step"] = int(step)
        lift = np.stack([_lift(together[layer], log.layers[layer].experts) for layer in shown])
        made["tokens"] = [
            int(round(np.trace(together[layer]) / top_k[layer])) if top_k[layer] > 0 else None for layer in shown
        ]
        if np.isfinite(lift).any():
            made["lift"] = blob.logarithmic(lift, span=4.0)
        pairs = [layer for layer in shown if layer < layers - 1]
        if pairs:
            made["flow_layers"] = pairs
            made["flow"] = blob.logarithmic(np.asarray(metrics.flow_lift(onwards[pairs])), span=4.0)
    if log.similarity:
        step, rows = log.similarity[-1]
        made["cosine_step"] = int(step)
        cosine = np.stack([rows[layer] for layer in shown]).astype(np.float64)
        if np.isfinite(cosine).any():
            made["cosine"] = blob.linear(cosine, bits=8, low=-1.0, high=1.0)
    for place, layer in enumerate(shown):
        size = log.layers[layer].experts
        order, merges = list(range(size)), []
        for alike, far in ((lift, lambda m: 1 / (1 + m)), (cosine, lambda m: (1 - m) / 2)):
            if (
                alike is not None
                and size > 2
                and np.isfinite(alike[place][:size, :size][~np.eye(size, dtype=bool)]).all()
            ):
                order, merges = cluster(far(alike[place][:size, :size]))
                break
        made["order"].append(order)
        made["merges"].append(merges)
    return made


def _lift(together: np.ndarray, experts: int) -> np.ndarray:
    """Of the layer's own experts; NaN beyond them, on the diagonal and where k = 1."""
    lift = np.full(together.shape, np.nan)
    lift[:experts, :experts] = metrics.coactivation_lift(together[:experts, :experts])
    return lift


def cluster(distance: np.ndarray) -> tuple[list[int], list[list[float]]]:
    """Average linkage of [E, E] distances: an order of the leaves, and merges [left, right, height] as in scipy, where
    E + i is what merge i made."""
    size = len(distance)
    between = (distance + distance.T) / 2
    np.fill_diagonal(between, np.inf)
    names, members = list(range(size)), {i: [i] for i in range(size)}
    weights, merges = np.ones(size), []
    alive = np.ones(size, dtype=bool)
    for made in range(size - 1):
        masked = np.where(alive[:, None] & alive[None, :], between, np.inf)
        a, b = sorted(divmod(int(np.argmin(masked)), size))
        merges.append([names[a], names[b], round(float(masked[a, b]), 4)])
        joined = (weights[a] * between[a] + weights[b] * between[b]) / (weights[a] + weights[b])
        between[a], between[:, a], between[a, a] = joined, joined, np.inf
        members[size + made] = members.pop(names[a]) + members.pop(names[b])
        weights[a] += weights[b]
        names[a], alive[b] = size + made, False
    return members[size + len(merges) - 1] if merges else [0] * size, merges


def _meaning(log: RoutingLog, top_k: list[float], blob: _Blob, notices: list[str]) -> dict[str, Any] | None:
    """Which labels go to which experts, at the last probe."""
    if not log.probe_labels or not _chosen(log):
        return None
    probe, sets = log.probes[-1], []
    rng = np.random.default_rng(0)
    for name, (values, names) in log.probe_labels.items():
        present = np.unique(values[values >= 0])
        if len(present) < 2 or any(len(index) != len(values) for index in probe.index):
            continue
        labels = np.searchsorted(present, values)
        labels = np.where(values >= 0, labels, -1)
        called = [names[value] if value < len(names) else str(value) for value in present]
        make = _panel if len(present) <= MOST_LABELS or _grid(called) else _chips
        sets.append({"name": name, **make(log, labels, called, top_k, blob, rng, notices)})
    shown = _shown(log, blob)
    if not sets and shown is None:
        return None
    return {"step": probe.step, "tokens": len(probe.index[0]), "sets": sets, "shown": shown}


def _shown(log: RoutingLog, blob: _Blob) -> dict[str, Any] | None:
    """The probe's first samples, and the experts of their tokens, [F, n, K] of some layers."""
    inputs, index = log.probe_inputs, log.probes[-1].index
    if inputs is None:
        return None
    tokens, width = sum(inputs.lengths), max(ids.shape[1] for ids in index)
    layers = _spread(len(log.layers), max(1, MOST_SHOWN // (tokens * width)))
    ids = np.full((len(layers), tokens, width), -1, dtype=np.int16)
    for place, layer in enumerate(layers):
        ids[place, :, : index[layer].shape[1]] = index[layer][:tokens]
    values = inputs.values if inputs.kind == "texts" else blob.add(inputs.values)
    made = {"kind": inputs.kind, "lengths": inputs.lengths, "grid": inputs.grid, "values": values}
    return made | {"layers": layers, "index": blob.whole(ids)}


def _panel(log, labels, called, top_k, blob, rng, notices) -> dict[str, Any]:
    probe, count = log.probes[-1], np.bincount(labels[labels >= 0], minlength=len(called))
    experts = max(_shape(log))
    shown = _spread(len(log.layers), MOST_PAIRS // (experts * len(called)))
    share = np.full((len(shown), len(called), experts), np.nan)
    for place, layer in enumerate(shown):
        size = log.layers[layer].experts
        share[place, :, :size] = _joint(labels, probe.index[layer], len(called), size) / count[:, None]
    return {
        "kind": "panel",
        "names": called,
        "counts": count.tolist(),
        "layers": shown,
        "share": blob.linear(share, bits=8, low=0.0, high=1.0),
        "grid": _grid(called),
        "nmi": [
            _nmi_with_null(labels, index, len(called), log.layers[i].experts, rng)
            for i, index in enumerate(probe.index)
        ],
    }


_PLACE = re.compile(r"(?:row )?(\d+), ?(?:column )?(\d+)")


def _grid(called: Sequence[str]) -> list[list[int]] | None:
    """Row and column of every label, where all are called "row 3, column 5" or "3,5"."""
    places = [_PLACE.fullmatch(name) for name in called]
    return [[int(place[1]), int(place[2])] for place in places] if all(places) else None


def _chips(log, labels, called, top_k, blob, rng, notices) -> dict[str, Any]:
    """For every expert the token ids that go there most; only ids that occur ten times or more say anything."""
    probe, experts, most = log.probes[-1], max(_shape(log)), 8
    count = np.bincount(labels[labels >= 0], minlength=len(called))
    common = np.flatnonzero(count >= ENOUGH)
    ids = np.full((len(log.layers), experts, most), -1)
    shares = np.full((len(log.layers), experts, most), np.nan)
    context, vocabulary = [], []
    kept = np.full(len(called), -1)
    kept[common] = np.arange(len(common))
    reduced = np.where(labels >= 0, kept[labels], -1)
    for layer, info in enumerate(log.layers):
        if not len(common):
            break
        joint = _joint(reduced, probe.index[layer], len(common), info.experts)
        share = joint / count[common][:, None]
        best = np.argsort(-share, axis=0, kind="stable")[:most].T
        ids[layer, : info.experts, : best.shape[1]] = best
        shares[layer, : info.experts, : best.shape[1]] = np.take_along_axis(share.T, best, 1)
        shuffled = np.stack(
            [_joint(rng.permutation(reduced), probe.index[layer], len(common), info.experts) for _ in range(5)]
        )
        context.append([_context(joint), float(np.mean([_context(made) for made in shuffled]))])
        first = metrics.vocabulary_specialization(probe.index[layer][:, 0], labels, info.experts, min_count=ENOUGH)
        vocabulary.append([float(first.value), float(first.chance)])
    return {
        "kind": "chips",
        "names": [called[i] for i in common],
        "counts": count[common].tolist(),
        "rare": len(called) - len(common),
        "ids": blob.whole(ids),
        "shares": blob.linear(shares, bits=8, low=0.0, high=1.0),
        "context": _rounded(context),
        "vocabulary": _rounded(vocabulary),
        "nmi": [
            _nmi_with_null(labels, index, len(called), log.layers[i].experts, rng)
            for i, index in enumerate(probe.index)
        ],
    }


def _joint(labels: np.ndarray, index: np.ndarray, values: int, experts: int) -> np.ndarray:
    """Tokens of each label at each expert. [V, E]"""
    there = (index >= 0) & (labels >= 0)[:, None]
    pairs = (np.where(labels < 0, 0, labels)[:, None] * experts + index)[there]
    return np.bincount(pairs, minlength=values * experts).reshape(values, experts).astype(np.float64)


def _context(joint: np.ndarray) -> float:
    return float(metrics.context_dependence(joint))


def _nmi_with_null(labels: np.ndarray, index: np.ndarray, values: int, experts: int, rng) -> list[float | None]:
    """NMI, its mean and its 95th percentile over permuted labels."""
    value = _nmi(_joint(labels, index, values, experts))
    null = [_nmi(_joint(rng.permutation(labels), index, values, experts)) for _ in range(PERMUTATIONS)]
    return _rounded([[value, float(np.mean(null)), float(np.quantile(null, 0.95))]])[0]


def _nmi(joint: np.ndarray) -> float:
    return float(metrics.mutual_information(joint))


def _rounded(rows: Iterable[Iterable[float]]) -> list[list[float | None]]:
    return [[round(value, 5) if math.isfinite(value) else None for value in row] for row in rows]
