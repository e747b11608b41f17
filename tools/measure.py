"""What the benchmarks measure with: a clock, the spread of repeated numbers, paired ratios, peak memory, what the
machine can do at most, the machine itself, a table."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONFIDENCE = 0.95
_RATE_RUNS = 10


def now(device: torch.device | None = None) -> float:
    """Seconds, once the device has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clock(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """How long ``work`` takes, in ms, to the end of its kernels."""
    start = now(device)
    work()
    return 1e3 * (now(device) - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"median": middle, "low": low, "high": high, "min": min(values), "max": max(values)}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The median of ours / theirs, pair by pair, and its interval.

    The interval is the one between two order statistics, which assumes nothing about the noise: the narrowest that
    covers the median with ``CONFIDENCE`` (binomial), symmetric in rank. Below six pairs there is none: then it is the
    extremes, and ``coverage`` says how little they cover.

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} times: a ratio needs pairs")
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    pairs = len(ratios)
    # the median lies outside the k-th lowest and k-th highest with twice the probability of fewer than k heads
    outside = [2 * sum(math.comb(pairs, i) for i in range(k)) / 2**pairs for k in range(1, pairs // 2 + 1)] or [1.0]
    rank = max((k for k, miss in enumerate(outside, 1) if miss <= 1 - CONFIDENCE), default=1)
    return {
        "median": statistics.median(ratios),
        "low": ratios[rank - 1],
        "high": ratios[pairs - rank],
        "pairs": pairs,
        "coverage": 1 - outside[rank - 1],
    }


class Rates(NamedTuple):
    """What the machine does at most, as measured."""

    flops: float  # a second, of a large matrix product
    bytes: float  # a second, read and written, of a large copy
    mm: float | None = None  # as ``flops``, of ``torch.mm``, where another product is faster

    def milliseconds(self, flops: float, bytes_: float) -> float:
        """The roofline: no less time can so many operations on so many bytes take."""
        return 1e3 * max(flops / self.flops, bytes_ / self.bytes)


def measure_rates(dtype: torch.dtype, device: torch.device, *, size: int | None = None) -> Rates:
    """The rates of this machine, now: each the best of ten runs.

    The product is the faster one of ``torch.mm`` and, on a CPU that has it, oneDNN's, which in float32 can take half
    the time.

    Args:
        size: side of the square matrices; by default 2048 on a CPU, 8192 on a GPU. The copy moves 16 matrices of
            float32, which no cache holds.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(16 * size * size, device=device)
    target = torch.empty_like(source)
    products = [_least_seconds(lambda: torch.mm(a, b, out=out), device)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = torch.ops.mkldnn._linear_pointwise
        products.append(_least_seconds(lambda: linear(a, b, None, "none", [], ""), device))
    copy = _least_seconds(lambda: target.copy_(source), device)
    mm, best = (2 * size**3 / seconds for seconds in (products[0], min(products)))
    return Rates(best, 2 * source.nbytes / copy, mm if mm < best else None)


def _least_seconds(work: Callable[[], Any], device: torch.device) -> float:
    work()
    return min(clock(work, device) for _ in range(_RATE_RUNS)) / 1e3


class Peak(NamedTuple):
    """Bytes that ``work`` had at once at most, and what is left of it afterwards."""

    peak: int
    left: int


def peak_memory(work: Callable[[], Any], device: torch.device) -> Peak:
    """Of ``work`` on ``device``, beyond what is there before: what its allocator gave out.

    On a CPU that is more than a dispatch mode sees: the scratch of operators too.
    """
    if device.type != "cuda":
        return Peak(*peak_bytes(work))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)


class LiveStorage(TorchDispatchMode):
    """``with LiveStorage() as live: work()``: ``live.peak`` is the most bytes of storages that lived at once.

    It counts what operators returned since it began, forward and backward, until it is freed; not what an operator
    allocates and frees inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}
        self._before: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            reference = StorageWeakRef(storage)
            if reference not in self._live:
                self._before.add(reference)
        out = func(*args, **(kwargs or {}))
        self._live = {reference: size for reference, size in self._live.items() if not reference.expired()}
        for storage in _storages(out):
            reference = StorageWeakRef(storage)
            if reference not in self._before:
                self._live[reference] = storage.nbytes()
        self.peak = max(self.peak, sum(self._live.values()))
        return out


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(work: Callable[[], Any]) -> tuple[int, int]:
    """The most CPU memory that ``work`` has allocated at any time, and what is left of it afterwards, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    gpu = device is not None and device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
