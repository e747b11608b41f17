"""The routing log of a run: what a recorder writes while training runs, and how it is read, also meanwhile.

    RUN/routing/
        header.json              format, version, the MoE layers; written once, whole or not there
        part-000001.routing      frames, appended; a new part for every process and every PART_BYTES

    frame = b"GwRf" | crc32 of all that follows | length of head | length of body | head: JSON | body: arrays, one after
            the other, little-endian

A window holds sums over its tokens, never ratios, so that windows, micro-batches and ranks add up. Frames are only
appended, each by one write: a killed process loses none that was written, and at most the last is torn, which a reader
leaves out and says. ``os.fsync`` runs every ``SYNC_SECONDS`` and at the end, so a power cut loses no more than that.
A process begins with a frame that names its first step; what earlier processes recorded from there on no longer counts.
Plain numbers and JSON throughout: a log from a stranger runs no code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .files import write_text

FORMAT, VERSION = "gatewright-routing", 1
FOLDER, HEADER = "routing", "header.json"
PART_BYTES = 16 * 2**20
SYNC_SECONDS = 30.0
MARGIN_EDGES = np.array([0.0, *(0.01 * 10 ** (i / 10) for i in range(31)), math.inf])
POSITIONS, ACTIVE = 16, 17

_MAGIC = b"GwRf"
_CHECKED = struct.Struct("<IQ")
_START = struct.Struct("<4sIIQ")
_PART = re.compile(r"part-(\d{6})\.routing")
_DTYPES = ("|u1", "<u2", "<u4", "<u8", "<i2", "<i4", "<f2", "<f4", "<f8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """A MoE layer, as the header tells of it.

    Attributes:
        name: where it is in the model: ``blocks.3.mlp``.
        layer: its index as the layer itself says.
        experts: routed experts, the only ones whose load is recorded.
        top_k: experts a token as the router was told; NaN where it was told none.
        router: the router's registered name, or its class.
        options: the router's.
        kinds: of every expert id.
    """

    name: str
    layer: int
    experts: int
    top_k: float = math.nan
    router: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ()


@dataclasses.dataclass(kw_only=True)
class Window:
    """Sums over the training tokens of some optimizer steps, over micro-batches and ranks. L layers, E the most experts
    of any layer; columns beyond a layer's own experts are 0.

    Attributes:
        first, last: optimizer steps, both inclusive, counted from 0.
        tokens: [L] real tokens that can take a routed expert.
        counts, requested: [L, E] assignments of routed experts, after and before capacity.
        sampled: [L] tokens of which the next seven are sums: a sample of ``tokens``.
        score_sum: [L, E] of the scores, which sum to 1 over a token's routed experts.
        entropy_sum: [L] of each token's ``-sum_e s ln s``.
        mass_sum: [L] of the scores of the chosen experts.
        z_sum: [L] of ``logsumexp(z)^2``, z the logits.
        logit_square_sum: [L] of each token's mean of z^2 over its experts.
        margin_histogram: [L, 32] tokens by (least chosen z - largest other z) / sd(z), between ``MARGIN_EDGES``.
        active_histogram: [L, 17] tokens by how many routed experts they have: 0 to 15, and 16 or more.
        drops: [L, 16, 2] by sixteenth of the sequence: assignments dropped, and assignments requested.
        losses: [L] a name: the mean over forwards of each auxiliary loss, weighted as it enters training; NaN = none.
    """

    first: int
    last: int
    tokens: np.ndarray
    counts: np.ndarray
    requested: np.ndarray
    sampled: np.ndarray
    score_sum: np.ndarray
    entropy_sum: np.ndarray
    mass_sum: np.ndarray
    z_sum: np.ndarray
    logit_square_sum: np.ndarray
    margin_histogram: np.ndarray
    active_histogram: np.ndarray
    drops: np.ndarray
    losses: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def zeros(cls, first: int, last: int, layers: int, experts: int) -> Window:
        """A window without tokens, to be filled."""
        shapes = _shapes(layers, experts)
        return cls(first=first, last=last, **{name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()})


def _shapes(layers: int, experts: int) -> dict[str, tuple[tuple[int, ...], type]]:
    whole, real = np.int64, np.float64
    return {
        "tokens": ((layers,), whole),
        "counts": ((layers, experts), whole),
        "requested": ((layers, experts), whole),
        "sampled": ((layers,), whole),
        "score_sum": ((layers, experts), real),
        "entropy_sum": ((layers,), real),
        "mass_sum": ((layers,), real),
        "z_sum": ((layers,), real),
        "logit_square_sum": ((layers,), real),
        "margin_histogram": ((layers, len(MARGIN_EDGES) - 1), whole),
        "active_histogram": ((layers, ACTIVE), whole),
        "drops": ((layers, POSITIONS, 2), whole),
    }


@dataclasses.dataclass(frozen=True)
class Probe:
    """The decisions for the frozen batch.

    Attributes:
        step: optimizer steps done.
        index: [N, K] int16 a layer: the routed experts of each token, 0 to E - 1; -1 = none.
    """

    step: int
    index: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class ProbeInputs:
    """What the frozen batch's first samples look like.

    Attributes:
        kind: "images", "series" or "texts".
        lengths: tokens of each of these samples.
        values: images [n, H, W, C] uint8 with C 1 or 3; series [n, P] float32; texts, one string a token.
        grid: rows and columns of an image's patches.
    """

    kind: str
    lengths: list[int]
    values: np.ndarray | list[str]
    grid: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingLog:
    """A log as read. S windows, L layers, E the most routed experts of any layer; arrays as in ``Window``, [S, ...].

    Attributes:
        path: the folder of the log.
        name: of the run.
        version: of gatewright that wrote it.
        notices: what was left out or added up, in plain sentences.
        layers: one a MoE layer.
        options: the recorder's.
        complete: whether the recorder was closed.
        session_starts: the step at which each process began.
        first_steps, steps: [S] first and last optimizer step of each window.
        scalars: by name: steps [n] and values [n].
        structure: (step, coactivation [L, E, E], flow [L - 1, E, E]): tokens with both experts, of one layer and of
            neighbouring ones; the diagonal of the first holds the counts.
        similarity: (step, cosines [L, E, E] between the router's rows), NaN for a layer that has none.
        probes: the decisions for the frozen batch.
        probe_labels: by name: class of each token of the batch [N] int32, and what the classes are called.
        probe_inputs: what its first samples look like, where that was recorded.
    """

    path: Path
    name: str
    version: str
    notices: list[str]
    layers: tuple[LayerInfo, ...]
    options: dict[str, Any]
    complete: bool
    session_starts: list[int]
    first_steps: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    requested: np.ndarray
    sampled: np.ndarray
    score_sum: np.ndarray
    entropy_sum: np.ndarray
    mass_sum: np.ndarray
    z_sum: np.ndarray
    logit_square_sum: np.ndarray
    margin_histogram: np.ndarray
    active_histogram: np.ndarray
    drops: np.ndarray
    losses: dict[str, np.ndarray]
    margin_edges: np.ndarray
    scalars: dict[str, tuple[np.ndarray, np.ndarray]]
    structure: list[tuple[int, np.ndarray, np.ndarray]]
    similarity: list[tuple[int, np.ndarray]]
    probes: list[Probe]
    probe_labels: dict[str, tuple[np.ndarray, list[str]]]
    probe_inputs: ProbeInputs | None = None


class LogWriter:
    """Appends to the log of a run; begins it where there is none.

    Args:
        run: the run's folder; the log is the folder ``routing`` in it.
        layers: the MoE layers, in order.
        options: what readers should know of how it was recorded.

    Raises:
        ValueError: there is a log of another model, or a damaged or newer one.
        OSError: the folder cannot be written.
    """

    def __init__(self, run: str | Path, layers: Sequence[LayerInfo], options: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(run) / FOLDER
        self.layers = tuple(layers)
        self._descriptor: int | None = None
        self._written, self._synced = 0, time.monotonic()
        self._labels: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / HEADER).exists():
                self._check_same_model()
            else:
                header = {"format": FORMAT, "version": VERSION, "gatewright": __version__, "options": options or {}}
                header["layers"] = [
                    dataclasses.asdict(layer) | {"top_k": None if math.isnan(layer.top_k) else layer.top_k}
                    for layer in self.layers
                ]
                write_text(self.folder / HEADER, json.dumps(header, indent=1, default=str))
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def _check_same_model(self) -> None:
        recorded = _read_header(self.folder)[0]
        for given, there in zip(self.layers, recorded, strict=False):
            if (given.name, given.experts) != (there.name, there.experts):
                raise ValueError(
                    f"{self.folder} is the log of another model: its layer {there.name} has {there.experts} routed "
                    f"experts, and now {given.name} has {given.experts}. Record into another folder"
                )
        if len(self.layers) != len(recorded):
            raise ValueError(
                f"{self.folder} is the log of another model, of {len(recorded)} MoE layers, not {len(self.layers)}. "
                "Record into another folder"
            )

    def start(self, step: int) -> None:
        """Says that this process records from optimizer step ``step`` on: what was recorded of later ones is void."""
        self._append({"kind": "start", "step": int(step)}, {})

    def window(self, window: Window) -> int:
        """Appends a window; returns its bytes."""
        names = sorted(window.losses)
        arrays = {name: getattr(window, name) for name in _shapes(0, 0)}
        if np.array_equal(arrays["requested"], arrays["counts"]):
            del arrays["requested"]
        arrays = {name: array for name, array in arrays.items() if array.any()}
        if names:
            arrays["losses"] = np.stack([window.losses[name] for name in names])
        return self._append(
            {"kind": "window", "first": int(window.first), "last": int(window.last), "losses": names}, arrays
        )

    def scalars(self, values: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
        """Appends points of curves: by name, steps and values."""
        names = sorted(values)
        arrays = {}
        for place, name in enumerate(names):
            arrays[f"steps/{place}"] = np.asarray(values[name][0], dtype="<u8")
            arrays[f"values/{place}"] = np.asarray(values[name][1], dtype="<f8")
        self._append({"kind": "scalars", "names": names}, arrays)

    def structure(
        self, step: int, coactivation: np.ndarray, flow: np.ndarray, similarity: np.ndarray | None = None
    ) -> None:
        """Appends which experts occur together, in a layer [L, E, E] and in neighbouring ones [L - 1, E, E]."""
        arrays = {"coactivation": coactivation, "flow": flow}
        if similarity is not None:
            arrays["similarity"] = np.asarray(similarity, dtype="<f2")
        self._append({"kind": "structure", "step": int(step)}, arrays)

    def probe(
        self,
        step: int,
        index: Sequence[np.ndarray],
        labels: Mapping[str, tuple[np.ndarray, Sequence[str]]],
        inputs: ProbeInputs | None = None,
    ) -> None:
        """Appends the decisions for the frozen batch; its labels and inputs, where they are not the last one's."""
        arrays = {name: np.asarray(values, dtype="<i4") for name, (values, _) in labels.items()}
        names = {name: [str(text) for text in texts] for name, (_, texts) in labels.items()}
        content = json.dumps(names, sort_keys=True).encode() + b"".join(arrays[n].tobytes() for n in sorted(arrays))
        digest = f"{zlib.crc32(content):08x}-{len(index[0]) if index else 0}"
        if digest != self._labels:
            self._append({"kind": "labels", "digest": digest, "names": names}, arrays)
            self._labels = digest
            if inputs is not None:
                self._append_inputs(digest, inputs)
        ids = {f"index/{layer}": np.asarray(ids, dtype="<i2") for layer, ids in enumerate(index)}
        self._append({"kind": "probe", "step": int(step), "digest": digest}, ids)

    def _append_inputs(self, digest: str, inputs: ProbeInputs) -> None:
        texts = inputs.values if inputs.kind == "texts" else []
        arrays = {} if inputs.kind == "texts" else {"values": inputs.values}
        head = {"kind": "inputs", "digest": digest, "what": inputs.kind, "lengths": inputs.lengths, "texts": texts}
        self._append(head | {"grid": list(inputs.grid or [])}, arrays)

    def close(self, complete: bool = True) -> None:
        """Ends the log; ``complete`` tells readers that the run came to its end."""
        if complete:
            self._append({"kind": "end"}, {})
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, head: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
        packed = {name: _pack(array) for name, array in arrays.items()}
        head["arrays"] = [[name, array.dtype.str, list(array.shape)] for name, array in packed.items()]
        frame = _frame(json.dumps(head).encode(), b"".join(array.tobytes() for array in packed.values()))
        if self._descriptor is None or self._written + len(frame) > PART_BYTES:
            self._next_part()
        view = memoryview(frame)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._written += len(frame)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()
        return len(frame)

    def _next_part(self) -> None:
        """Never goes on with a file of another process: its end may be torn."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
        number = max((int(_PART.fullmatch(part.name)[1]) for part in _parts(self.folder)), default=0) + 1
        name = self.folder / f"part-{number:06d}.routing"
        self._descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._written = 0


def read_log(path: str | Path, *, max_windows: int | None = None, max_bytes: int = 512 * 2**20) -> RoutingLog:
    """Reads the log of a run, also while it is written.

    Args:
        path: the run's folder, or the log's.
        max_windows: where there are more windows, neighbours are added up, which loses no token.
        max_bytes: the same where their arrays would be larger than this; of looks at structure and of probes as many
            are read as fit into as much.

    Raises:
        ValueError: no log there, a damaged header, or a newer version.
    """
    folder = _find(Path(path))
    layers, header = _read_header(folder)
    notices: list[str] = []
    index = _Index(folder, notices)
    experts = max((layer.experts for layer in layers), default=0)
    windows = index.of_kind("window")
    arrays, losses, first, last = _add_up(windows, len(layers), experts, max_windows, max_bytes, notices)
    some = _thin(index.of_kind("structure"), 24 * len(layers) * experts**2, max_bytes, "looks at structure", notices)
    structure, similarity = _read_structure(some, len(layers), experts, notices)
    labels, probes = _read_probes(index, len(layers), max_bytes, notices)
    inputs = _read_inputs(index, probes, notices)
    if not windows:
        notices.append("no window is recorded yet")
    return RoutingLog(
        path=folder,
        name=folder.resolve().parent.name,
        version=str(header["gatewright"]),
        notices=list(dict.fromkeys(notices)),
        layers=layers,
        options=header["options"],
        complete=index.complete,
        session_starts=index.starts,
        first_steps=first,
        steps=last,
        **arrays,
        losses=losses,
        margin_edges=MARGIN_EDGES.copy(),
        scalars=_read_scalars(index.of_kind("scalars")),
        structure=structure,
        similarity=similarity,
        probes=probes,
        probe_labels=labels,
        probe_inputs=inputs,
    )


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where a whole frame lies, and what its head says. ``until``: from this step on, a later process counts."""

    file: Path
    body: int
    length: int
    head: dict[str, Any]
    until: float = math.inf

    def arrays(self) -> dict[str, np.ndarray]:
        with open(self.file, "rb") as stream:
            stream.seek(self.body)
            return _unpack(self.head, stream.read(self.length))


class _Index:
    """The whole frames of a log that count, without their arrays."""

    def __init__(self, folder: Path, notices: list[str]) -> None:
        frames = [frame for part in _parts(folder) for frame in _whole_frames(part, notices)]
        self.starts = [frame.head["step"] for frame in frames if frame.head["kind"] == "start"]
        self.complete = bool(frames) and frames[-1].head["kind"] == "end"
        self.frames: list[_Frame] = []
        until, cut = math.inf, 0
        for frame in reversed(frames):
            if frame.head["kind"] == "start":
                until = min(until, frame.head["step"])
                continue
            if frame.head["kind"] == "window" and frame.head["last"] >= until > frame.head["first"]:
                cut += int(until - frame.head["first"])
            self.frames.append(dataclasses.replace(frame, until=until))
        self.frames.reverse()
        if cut:
            notices.append(f"{cut} steps before a restart are not shown: their windows reached beyond it")

    def of_kind(self, kind: str) -> list[_Frame]:
        """Those that no later process replaced, by step."""
        place = "last" if kind == "window" else "step"
        frames = [f for f in self.frames if f.head["kind"] == kind]
        if kind in ("scalars", "labels", "inputs"):
            return frames
        # the probe is after `step` steps, all else in step `step`
        frames = [f for f in frames if f.head[place] < f.until or (kind == "probe" and f.head[place] == f.until)]
        return sorted({f.head[place]: f for f in frames}.values(), key=lambda f: f.head[place])


def _find(path: Path) -> Path:
    for folder in (path, path / FOLDER):
        if (folder / HEADER).is_file():
            return folder
    if not path.exists():
        raise ValueError(f"{path} does not exist: name the folder of a run")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: name the folder of a run")
    what = "is empty" if not any(path.iterdir()) else f"holds no routing log (no {FOLDER}/{HEADER})"
    raise ValueError(f"{path} {what}: a run is recorded by gatewright.moe.record.Recorder(model, {str(path)!r})")


def _read_header(folder: Path) -> tuple[tuple[LayerInfo, ...], dict[str, Any]]:
    file = folder / HEADER
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        given, version = header["format"], header["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged: expected the header of a routing log") from None
    if given != FORMAT:
        raise ValueError(f'{file} has format {given!r}: expected "{FORMAT}"')
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(f"{file} has version {version!r}: this gatewright reads up to {VERSION}; use a newer one")
    try:
        layers = tuple(
            LayerInfo(
                name=str(entry["name"]),
                layer=int(entry["layer"]),
                experts=int(entry["experts"]),
                top_k=math.nan if entry["top_k"] is None else float(entry["top_k"]),
                router=str(entry["router"]),
                options=dict(entry["options"]),
                kinds=tuple(str(kind) for kind in entry["kinds"]),
            )
            for entry in header["layers"]
        )
        header = {"gatewright": str(header["gatewright"]), "options": dict(header["options"])}
        if any(not 0 <= layer.experts < 2**15 for layer in layers):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: its layers are not what a recorder writes") from None
    return layers, header


def _parts(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if _PART.fullmatch(entry.name))


def _frame(head: bytes, body: bytes) -> bytes:
    checked = _CHECKED.pack(len(head), len(body))
    crc = zlib.crc32(body, zlib.crc32(head, zlib.crc32(checked)))
    return b"".join((_START.pack(_MAGIC, crc, len(head), len(body)), head, body))


def _whole_frames(part: Path, notices: list[str]) -> Iterator[_Frame]:
    """The frames of a file, one after the other. What is torn or damaged is left out, and said."""
    data = part.read_bytes()
    content, place = memoryview(data), 0
    while place < len(content):
        frame = _frame_at(part, content, place)
        if frame is not None:
            yield frame
            place = frame.body + frame.length
            continue
        after = data.find(_MAGIC, place + 1)
        while after >= 0 and _frame_at(part, content, after) is None:
            after = data.find(_MAGIC, after + 1)
        if after < 0:
            why = "its writing was cut off, or goes on right now"
            notices.append(f"the last {len(content) - place} bytes of {part.name} are no whole entry ({why}): left out")
            return
        notices.append(f"{after - place} bytes of {part.name} are damaged: left out")
        place = after


def _frame_at(part: Path, content: memoryview, place: int) -> _Frame | None:
    if len(content) - place < _START.size:
        return None
    magic, crc, head_length, body_length = _START.unpack_from(content, place)
    body = place + _START.size + head_length
    if magic != _MAGIC or body + body_length > len(content):
        return None
    if zlib.crc32(content[place + 8 : body + body_length]) != crc:
        return None
    try:
        head = json.loads(bytes(content[place + _START.size : body]))
        sound = _is_sound(head) and sum(_bytes_of(entry) for entry in head["arrays"]) == body_length
    except (ValueError, KeyError, TypeError):
        sound = False
    return _Frame(part, body, body_length, head) if sound else None


_KINDS: dict[str, dict[str, type]] = {
    "start": {"step": int},
    "window": {"first": int, "last": int, "losses": list},
    "scalars": {"names": list},
    "structure": {"step": int},
    "labels": {"digest": str, "names": dict},
    "probe": {"step": int, "digest": str},
    "inputs": {"digest": str, "what": str, "lengths": list, "texts": list, "grid": list},
    "end": {},
}


def _is_sound(head: dict[str, Any]) -> bool:
    """Frames of other kinds, which an addition to this version may write, are passed over."""
    return all(isinstance(head[name], kind) for name, kind in _KINDS.get(head["kind"], {}).items())


def _bytes_of(entry: list) -> int:
    _, dtype, shape = entry
    if dtype not in _DTYPES or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"array {entry}")
    return math.prod(shape) * np.dtype(dtype).itemsize


def _pack(array: np.ndarray) -> np.ndarray:
    """In the smallest type that holds it: counts unsigned, sums as float32."""
    array = np.asarray(array)
    if array.dtype.str in ("<f2", "<i2", "<i4", "<u8") or array.dtype.str == "<f8" and array.ndim == 1:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype="<f4")
    largest = int(array.max(initial=0))
    dtype = next(d for d in ("|u1", "<u2", "<u4", "<u8") if largest <= np.iinfo(d).max)
    return np.ascontiguousarray(array, dtype=dtype)


def _unpack(head: dict[str, Any], body: bytes) -> dict[str, np.ndarray]:
    arrays, place = {}, 0
    for name, dtype, shape in head["arrays"]:
        array = np.frombuffer(body, dtype=dtype, count=math.prod(shape), offset=place).reshape(shape)
        place += array.nbytes
        arrays[name] = array
    return arrays


def _add_up(
    windows: list[_Frame], layers: int, experts: int, max_windows: int | None, max_bytes: int, notices: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The windows' arrays, [S, ...]; n neighbours as one where there are too many."""
    shapes = _shapes(layers, experts)
    names = sorted({str(name) for frame in windows for name in frame.head["losses"]})
    one = sum(8 * math.prod(shape) for shape, _ in shapes.values()) + 8 * layers * len(names)
    most = max(1, min(max_bytes // max(1, one), len(windows) if max_windows is None else max_windows))
    group = max(1, -(-len(windows) // most))
    slots = -(-len(windows) // group)
    if group > 1:
        notices.append(f"{len(windows)} windows are shown as {slots}: {group} neighbours added up to one")
    arrays = {name: np.zeros((slots, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    losses = {name: np.zeros((slots, layers)) for name in names}
    given = {name: np.zeros((slots, layers)) for name in names}
    first = np.array([windows[group * slot].head["first"] for slot in range(slots)], dtype=np.int64)
    last = np.array([f.head["last"] for f in windows[group - 1 :: group]], dtype=np.int64)
    if len(last) < slots:
        last = np.append(last, windows[-1].head["last"])
    for place, frame in enumerate(windows):
        slot, found = place // group, frame.arrays()
        found.setdefault("requested", found.get("counts", np.zeros((layers, experts))))
        for name, (shape, _) in shapes.items():
            if name in found and found[name].shape == shape:
                arrays[name][slot] += found[name].astype(arrays[name].dtype)
            elif name in found:
                notices.append(f"{name} of steps {frame.head['first']} to {frame.head['last']} has a wrong shape")
        for name, row in zip(frame.head["losses"], found.get("losses", ()), strict=False):
            there = ~np.isnan(row)
            losses[name][slot][there] += row[there]
            given[name][slot] += there
    with np.errstate(invalid="ignore"):
        losses = {name: np.where(given[name] > 0, losses[name] / given[name], np.nan) for name in names}
    return arrays, losses, first, last


def _thin(frames: list[_Frame], size: int, max_bytes: int, what: str, notices: list[str]) -> list[_Frame]:
    """As many as fit, evenly spread, the first and the last among them."""
    most = max(2, max_bytes // max(1, size))
    if len(frames) <= most:
        return frames
    notices.append(f"of {len(frames)} {what}, {most} are shown")
    return [frames[round(place)] for place in np.linspace(0, len(frames) - 1, most)]


def _read_scalars(frames: list[_Frame]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    points: dict[str, dict[int, float]] = {}
    for frame in frames:
        arrays = frame.arrays()
        for place, name in enumerate(frame.head["names"]):
            steps, values = (arrays.get(f"{what}/{place}", np.zeros(0)) for what in ("steps", "values"))
            new = zip(steps.ravel().tolist(), values.ravel().tolist(), strict=False)
            points.setdefault(str(name), {}).update((int(step), value) for step, value in new if step < frame.until)
    read = {name: sorted(curve.items()) for name, curve in sorted(points.items()) if curve}
    return {
        name: (np.array([s for s, _ in curve], dtype=np.int64), np.array([v for _, v in curve], dtype=np.float64))
        for name, curve in read.items()
    }


def _read_structure(
    frames: list[_Frame], layers: int, experts: int, notices: list[str]
) -> tuple[list[tuple[int, np.ndarray, np.ndarray]], list[tuple[int, np.ndarray]]]:
    structure, similarity = [], []
    square = (experts, experts)
    for frame in frames:
        arrays, step = frame.arrays(), frame.head["step"]
        found = {name: array.shape for name, array in arrays.items()}
        if found.get("coactivation") != (layers, *square) or found.get("flow") != (max(0, layers - 1), *square):
            notices.append(f"the structure of step {step} has a wrong shape: left out")
            continue
        structure.append((step, arrays["coactivation"].astype(np.int64), arrays["flow"].astype(np.int64)))
        if found.get("similarity") == (layers, *square):
            similarity.append((step, arrays["similarity"].astype(np.float32)))
    return structure, similarity


def _read_probes(
    index: _Index, layers: int, max_bytes: int, notices: list[str]
) -> tuple[dict[str, tuple[np.ndarray, list[str]]], list[Probe]]:
    """The labels written last, and the probes of that batch."""
    written = index.of_kind("labels")
    if not written:
        return {}, []
    digest = written[-1].head["digest"]
    names = written[-1].head["names"]
    labels = {
        name: (values.astype(np.int32), [str(text) for text in names.get(name, ())])
        for name, values in written[-1].arrays().items()
    }
    frames = index.of_kind("probe")
    same = [frame for frame in frames if frame.head["digest"] == digest]
    if len(same) < len(frames):
        notices.append(f"{len(frames) - len(same)} probes of another batch or with other labels are left out")
    probes = []
    for frame in _thin(same, max((frame.length for frame in same), default=1), max_bytes, "probes", notices):
        arrays = frame.arrays()
        if [f"index/{layer}" for layer in range(layers)] != list(arrays):
            notices.append(f"the probe at step {frame.head['step']} is of another model: left out")
            continue
        # copies, because torch warns of arrays that cannot be written
        probes.append(Probe(frame.head["step"], [ids.copy() for ids in arrays.values()]))
    return labels, probes


def _read_inputs(index: _Index, probes: list[Probe], notices: list[str]) -> ProbeInputs | None:
    """What stands beside the labels written last."""
    written, labels = index.of_kind("inputs"), index.of_kind("labels")
    if not written or not probes or written[-1].head["digest"] != labels[-1].head["digest"]:
        return None
    head = written[-1].head
    kind, lengths, grid = head["what"], head["lengths"], tuple(head["grid"]) or None
    values = [str(text) for text in head["texts"]] if kind == "texts" else written[-1].arrays().get("values")
    whole = all(isinstance(n, int) and n > 0 for n in (*lengths, *(grid or ())))
    fits = whole and values is not None and sum(lengths) <= len(probes[-1].index[0])
    if kind == "images":
        fits = fits and grid is not None and len(grid) == 2 and values.ndim == 4 and values.shape[3] in (1, 3)
        fits = fits and all(n == math.prod(grid) for n in lengths)
    elif kind == "series":
        fits = fits and values.ndim == 2
    elif kind != "texts":
        return None  # a later version's
    if not fits or len(values) != (sum(lengths) if kind == "texts" else len(lengths)):
        notices.append("what the probe's samples look like does not fit its tokens: left out")
        return None
    return ProbeInputs(kind, lengths, values, grid)


def _cannot_write(folder: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"the routing log cannot be written ({error.strerror})", str(folder))
