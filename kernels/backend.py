"""Which implementation computes a kernel: chosen by device, dtype and shape, or forced.

    reference   a readable loop over experts in plain differentiable operations: the definition. Any device, any dtype
    cpu         compiled code (native.py) in float32 and bfloat16 where the processor has AVX-512, else slices of
                preallocated results, expert by expert while they are in cache. CPU; float16 by way of float32
    torch       torch.nn.functional.grouped_mm. float32, bfloat16, float16; every row a multiple of 16 bytes
    triton      our own kernels, with gather, activation and routing weight inside the products. float32, bfloat16,
                float16 on CUDA of compute capability 8 or more; anywhere in Triton's interpreter (TRITON_INTERPRET=1)

Chosen by itself: ``cpu`` on a CPU; on CUDA ``triton`` where it can, else ``torch`` where that can; ``reference`` for
all else. The argument ``backend=`` forces one, and so does the environment variable ``GATEWRIGHT_KERNELS`` where no
argument is given; a forced backend that cannot do it is an error, never another backend.
"""

import difflib
import functools
import importlib
import importlib.util
import os
import types

import torch

BACKENDS = ("reference", "cpu", "torch", "triton")
VARIABLE = "GATEWRIGHT_KERNELS"

_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_MM_ALIGNMENT = 16  # bytes, of every row
_TRITON_CAPABILITY = (8, 0)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_PREFERRED = {"cpu": ("cpu",), "cuda": ("triton", "torch")}  # in this order, by device


def choose_backend(backend: str | None, *, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    """The name of the backend that computes on ``device`` in ``dtype`` with rows of ``widths`` elements.

    Raises:
        ValueError: a forced backend that is unknown or cannot take the device, dtype or shape.
    """
    origin = "backend="
    if backend is None:
        backend = os.environ.get(VARIABLE) or None
        origin = f"{VARIABLE}="
    if backend is None:
        preferred = _PREFERRED.get(device.type, ())
        return next((name for name in preferred if not _why_not(name, device, dtype, widths)), "reference")
    choices = ", ".join(f'"{name}"' for name in BACKENDS)
    if backend not in BACKENDS:
        close = difflib.get_close_matches(str(backend), BACKENDS, n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise ValueError(
            f'{origin}"{backend}" is no kernel backend: {hint}Choose {choices}, or none to have one chosen'
        )
    reason = _why_not(backend, device, dtype, widths)
    if reason:
        raise ValueError(f'{origin}"{backend}" {reason}; take "reference", or none to have one chosen')
    return backend


def _why_not(backend: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """Why ``backend`` cannot compute this, or None where it can."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"computes on cpu only, and the tensors are on {device}"
        if dtype not in _CPU_DTYPES:
            return f"takes {_names(_CPU_DTYPES)}, not {dtype}"
    if backend == "torch":
        if dtype not in _GPU_DTYPES:
            return f"takes {_names(_GPU_DTYPES)}, not {dtype}"
        unaligned = [width for width in widths if width * dtype.itemsize % _GROUPED_MM_ALIGNMENT]
        if unaligned:
            multiple = _GROUPED_MM_ALIGNMENT // dtype.itemsize
            return f"needs widths that are multiples of {multiple} in {dtype}, not {unaligned[0]}"
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not _HAS_TRITON:
            return 'needs Triton, which is not installed: pip install "gatewright[triton]"'
        if device.type != "cuda" and not interpreted:
            return f"computes on cuda only (elsewhere in its interpreter, TRITON_INTERPRET=1), not on {device}"
        if dtype not in _GPU_DTYPES:
            return f"takes {_names(_GPU_DTYPES)}, not {dtype}"
        capability = None if interpreted else _capability(device)
        if capability is not None and capability < _TRITON_CAPABILITY:
            wanted, found = (".".join(map(str, number)) for number in (_TRITON_CAPABILITY, capability))
            return f"needs compute capability {wanted} or more, and {device} has {found}"
    return None


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device; None where there is none, as for fake tensors, or it counts otherwise (ROCm)."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


_MODULES = {"reference": "reference", "cpu": "cpu", "torch": "grouped_mm", "triton": "triton_mlp"}


@functools.cache
def backend_module(backend: str) -> types.ModuleType:
    """The module that computes for ``backend``, imported when it is first asked for."""
    return importlib.import_module(f".{_MODULES[backend]}", __package__)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which ``x`` takes part in a matrix product: autocast's where it is on, else its own.

    As for F.linear, float64 is left alone.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and x.is_floating_point() and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types, else ``dtype`` itself: in what sums over rows are taken."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
