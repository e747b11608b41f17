"""Which implementation computes a kernel: chosen by device, dtype and shape, or forced.

    reference   a readable loop over experts in plain differentiable operations: the definition. Any device, any dtype
    cpu         slices of preallocated results, expert by expert while they are in cache. CPU; float16 by way of float32
    torch       torch.nn.functional.grouped_mm. float32, bfloat16, float16; every row a multiple of 16 bytes

Chosen by itself: ``cpu`` on a CPU, ``torch`` on CUDA where it can, ``reference`` for all else. The argument
``backend=`` forces one, and so does the environment variable ``GATEWRIGHT_KERNELS`` where no argument is given; a
forced backend that cannot do it is an error, never another backend.
"""

import difflib
import os

import torch

BACKENDS = ("reference", "cpu", "torch")
VARIABLE = "GATEWRIGHT_KERNELS"

_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_MM_ALIGNMENT = 16  # bytes, of every row


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
        preferred = {"cpu": "cpu", "cuda": "torch"}.get(device.type, "reference")
        return "reference" if _why_not(preferred, device, dtype, widths) else preferred
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
        if dtype not in _GROUPED_MM_DTYPES:
            return f"takes {_names(_GROUPED_MM_DTYPES)}, not {dtype}"
        unaligned = [width for width in widths if width * dtype.itemsize % _GROUPED_MM_ALIGNMENT]
        if unaligned:
            multiple = _GROUPED_MM_ALIGNMENT // dtype.itemsize
            return f"needs widths that are multiples of {multiple} in {dtype}, not {unaligned[0]}"
    return None


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
