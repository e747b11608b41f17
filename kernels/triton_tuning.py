"""Which tile sizes a Triton kernel takes: timed once for each kernel, dtype, width and magnitude of rows, then known.

Candidates are few. They are timed on the operands of the first call that asks; the fastest is kept in memory and in a
JSON file beside Triton's own cache, whose name holds the GPU, Triton's version and what the kernels' source is. The
number of rows enters as its power of two, so that counts that change every step ask nothing new.

Nothing is timed while a CUDA graph is captured, under ``torch.use_deterministic_algorithms`` (another tile size may
round differently) or in Triton's interpreter: then the first candidate that the GPU can hold is taken.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from . import triton_kernels


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of m rows and n columns, k deep a step.

    Attributes:
        warps, stages: of a program.
        programs: of them an SM holds at once.
        flatten: the loops over tiles and over depth become one, so that one tile's loads overlap the last one's end.
        group: tiles of rows that go through all columns together.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 1
    flatten: bool = False
    group: int = 8

    @property
    def options(self) -> dict[str, int]:
        """What every kernel takes by these names."""
        sizes = {"BM": self.m, "BN": self.n, "BK": self.k}
        # multiplications and additions in one, whatever Triton's default is
        return sizes | {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# the first is what is taken untimed. For Hopper: its 64 x 256 products of 8 warps, or two programs of 4 warps an SM
_HALF = {
    # n columns of the gate and n that it multiplies: one product of 2n
    "rows gated": (
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 8, 3, flatten=True),
        Config(128, 64, 64, 4, 3, programs=2),
        Config(64, 64, 64, 4, 4, programs=2),
    ),
    "rows": (
        Config(128, 256, 64, 8, 3),
        Config(128, 256, 64, 8, 4),
        Config(128, 256, 64, 8, 3, flatten=True),
        Config(128, 128, 64, 4, 3, programs=2),
        Config(64, 128, 64, 4, 4, programs=2),
    ),
    "hidden_grad": (
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 8, 4, flatten=True),
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 4, 3, programs=2),
        Config(64, 128, 64, 4, 3, programs=2),
    ),
    "weight_grad": (
        Config(128, 256, 64, 8, 3),
        Config(256, 128, 64, 8, 3),
        Config(128, 128, 64, 4, 3),
        Config(128, 64, 64, 4, 3),
    ),
}
_TF32 = (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3, programs=2), Config(64, 64, 32, 4, 3, programs=2))
# without tensor cores
_IEEE = (Config(64, 64, 32, 4, 3, programs=2), Config(128, 64, 32, 8, 2), Config(128, 128, 16, 8, 2))
_INTERPRETED = (Config(16, 32, 16, 4, 1),)


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


def candidates(kernel: str, dtype: torch.dtype, precision: str) -> tuple[Config, ...]:
    if interpreted():
        return _INTERPRETED
    if dtype != torch.float32:
        return _HALF[kernel]
    return _TF32 if precision == "tf32" else _IEEE


_chosen: dict[str, Config] = {}


def choose(kernel: str, dtype: torch.dtype, precision: str, sizes: tuple[int, ...], num_rows: int, run) -> Config:
    """The candidate with which ``run`` is fastest.

    Args:
        sizes: widths and number of experts: what is compiled for.
        num_rows: enters as its power of two.
        run: called with a ``Config``; writes the same results whatever it is called with, and as often.
    """
    choices = candidates(kernel, dtype, precision)
    if interpreted():
        return choices[0]
    device = torch.cuda.current_device()
    key = f"{kernel} {dtype} {precision} {'x'.join(map(str, sizes))} rows 2^{num_rows.bit_length()}"
    known = _chosen.get(f"{device} {key}")
    if known is None:
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
            return next((config for config in choices if _fits(run, config)), choices[0])
        known = _read(device).get(key)
        if known not in choices:
            times = {config: _time(run, config) for config in choices}
            known = min(times, key=times.get)
            _write(device, key, known)
        _chosen[f"{device} {key}"] = known
    return known


def _fits(run: Callable[[Config], None], config: Config) -> bool:
    try:
        run(config)
    except OutOfResources:
        return False
    return True


def _time(run: Callable[[Config], None], config: Config) -> float:
    if not _fits(run, config):
        return float("inf")
    return do_bench(lambda: run(config), warmup=10, rep=40, return_mode="median")


@functools.cache
def _path(device: int) -> Path:
    source = Path(triton_kernels.__file__).read_bytes() + Path(__file__).read_bytes()
    name = "-".join(torch.cuda.get_device_name(device).split())
    digest = hashlib.sha256(source).hexdigest()[:12]
    return Path(triton.knobs.cache.dir) / "gatewright" / f"{name}-triton{triton.__version__}-{digest}.json"


def _read(device: int) -> dict[str, Config]:
    try:
        stored = json.loads(_path(device).read_text())
        return {key: Config(**fields) for key, fields in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # a cache that is not there or not ours: time again
        return {}


def _write(device: int, key: str, config: Config) -> None:
    """Adds one choice; where the file cannot be written the choice holds for this process."""
    path = _path(device)
    choices = {name: dataclasses.asdict(known) for name, known in (_read(device) | {key: config}).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(choices, file, indent=1)
        os.replace(temporary, path)
    except OSError:
        return
