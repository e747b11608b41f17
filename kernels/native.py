"""The expert feed-forward as compiled code for a CPU: csrc/expert_mlp.cpp, loaded by ctypes.

setup.py compiles it where there is a C++ compiler and the processor's architecture is x86-64; it is no part of what
must be there. ``why_not(dtype)`` says why it is not used, and None where it is. It needs AVX-512, for bfloat16 the
bfloat16 instructions of AVX-512 besides, and an OpenMP library of GNU's interface that ``import torch`` has loaded, as
it does on Linux: the threads are torch's own. ``GATEWRIGHT_NATIVE=0`` in the environment turns it off.

Kept between calls (``kept_bytes``): one scratch buffer a thread that calls, as large as the largest call needed, and
the memory of large results that are gone, for the next results of that size. What glibc's malloc gives back to the
system and takes anew in every step would be faulted in and zeroed in every step: hundreds of MiB of weight gradients.
"""

import ctypes
import math
import os
import threading
import weakref
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from .activation import ACTIVATIONS

LIBRARIES = [Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES]
VARIABLE = "GATEWRIGHT_NATIVE"

_BITS = {torch.float32: 1, torch.bfloat16: 2}
_NEEDS = {torch.float32: "AVX-512 (F, BW, DQ, VL)", torch.bfloat16: "AVX-512 with bfloat16, and no AMX"}
_ORDER = ("gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu")  # of `enum Activation`
_ALIGNMENT = 64
assert set(_ORDER) == set(ACTIVATIONS)

_NUMBERS = ("bfloat16", "activation", "threads", "num_experts", "dim", "hidden", "num_tokens", "num_rows", "combine")
_INPUTS = ("counts", "token", "weight", "x", "w_in", "w_out", "b_in", "b_out")
_STRIDES = ("b_in_stride", "b_out_stride")
_RESULTS = ("h", "order", "out", "dy", "dx", "dw_in", "dw_out", "db_in", "db_out", "dweight", "scratch")


class Problem(ctypes.Structure):
    """``struct Problem`` of csrc/expert_mlp.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _INPUTS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_void_p) for name in _RESULTS),
    ]


class _Results:
    """Memory for results, reused when the tensor that it was is gone. Sizes that nobody wants any more are let go."""

    SMALLEST = 1 << 20  # below, malloc keeps memory itself
    PATIENCE = 512  # requests

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._last: dict[int, int] = {}
        self._requests = 0

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """Uninitialised, with the dtype of ``like``."""
        size = math.prod(shape) * like.element_size()
        if size < self.SMALLEST:
            return like.new_empty(shape)
        self._requests += 1
        self._last[size] = self._requests
        if self._requests % self.PATIENCE == 0:
            for old in [key for key, last in self._last.items() if last <= self._requests - self.PATIENCE]:
                self._free.pop(old, None)
                del self._last[old]
        try:
            block = self._free[size].pop()
        except (KeyError, IndexError):
            block = torch.empty(size, dtype=torch.uint8)
            _load()[0].gatewright_advise(block.data_ptr(), size)
        # the tensor's memory is the array's, which lives as long as any tensor that shares it, and then gives it back
        array = block.numpy()
        weakref.finalize(array, self._give_back, size, block).atexit = False
        # no view of another tensor: autograd lets nobody write into a view that comes out of a custom operator
        return like.new_empty(0).set_(torch.from_numpy(array).untyped_storage(), 0, shape)

    def _give_back(self, size: int, block: Tensor) -> None:
        if size in self._last:
            self._free.setdefault(size, []).append(block)

    def kept_bytes(self) -> int:
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def clear(self) -> None:
        self._free.clear()
        self._last.clear()


class _Kept(threading.local):
    scratch: Tensor | None = None


_kept = _Kept()
_results = _Results()


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    compiled = [path for path in LIBRARIES if path.is_file()]
    if not compiled:
        return None, f"it was not compiled at installation: there is no {LIBRARIES[0]}"
    try:
        library = ctypes.CDLL(str(compiled[0]))
        if library.gatewright_problem_bytes() != ctypes.sizeof(Problem):
            return None, f"{compiled[0]} was compiled from other sources: install again"
        library.gatewright_check.restype = library.gatewright_scratch_bytes.restype = ctypes.c_int64
        library.gatewright_advise.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    except (OSError, AttributeError) as error:
        return None, f"it does not load: {error}"
    return library, ""


def why_not(dtype: torch.dtype) -> str | None:
    """Why the compiled kernel does not compute in ``dtype`` here; None where it does."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    if dtype not in _BITS:
        return f"it computes in float32 and bfloat16, not in {dtype}"
    library, reason = _load()
    if library is None:
        return reason
    return None if library.gatewright_supports() & _BITS[dtype] else f"the processor does not have {_NEEDS[dtype]}"


def kept_bytes() -> int:
    """What is kept between calls: this thread's scratch memory, and memory for results that is in no tensor now."""
    return (0 if _kept.scratch is None else _kept.scratch.nbytes) + _results.kept_bytes()


def release() -> None:
    """Lets go what is kept between calls."""
    _kept.scratch = None
    _results.clear()


def expert_mlp_forward(
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts_E: Tensor,
    token_N: Tensor | None,
    weight_N: Tensor | None,
    combine: bool,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cpu.expert_mlp_forward``."""
    num_rows = len(x_TD) if token_N is None else len(token_N)
    out = _results.empty(x_TD, len(x_TD) if combine else num_rows, x_TD.shape[1])
    h_NH = _results.empty(x_TD, num_rows, w_in.shape[1]) if keep else None
    order_N = counts_E.new_empty(num_rows) if keep and token_N is not None else None
    _run(
        False, x_TD, w_in, w_out, b_in, b_out, counts_E, token_N, weight_N, combine, activation,
        {"h": h_NH, "order": order_N, "out": out},
    )  # fmt: skip
    return (
        out,
        x_TD.new_empty(0) if h_NH is None else h_NH,
        counts_E.new_empty(0) if order_N is None else order_N,
    )


def expert_mlp_backward(
    dy: Tensor,
    x_TD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts_E: Tensor,
    token_N: Tensor | None,
    weight_N: Tensor | None,
    h_NH: Tensor,
    order_N: Tensor,
    combine: bool,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``cpu.expert_mlp_backward``."""
    names = ("dx", "dw_in", "dw_out", "db_in", "db_out", "dweight")
    gradients = {
        name: _results.empty(tensor, *tensor.shape)
        for name, tensor, need in zip(names, (x_TD, w_in, w_out, b_in, b_out, weight_N), needs, strict=True)
        if need
    }
    _run(
        True, x_TD, w_in, w_out, b_in, b_out, counts_E, token_N, weight_N, combine, activation,
        gradients, dy=dy, h=h_NH, order=None if token_N is None else order_N,
    )  # fmt: skip
    return tuple(gradients.get(name, x_TD.new_empty(0)) for name in names)


def _run(
    backward: bool, x_TD, w_in, w_out, b_in, b_out, counts_E, token_N, weight_N, combine, activation,
    results: dict[str, Tensor | None], **kept: Tensor | None,
) -> None:  # fmt: skip
    library, _ = _load()
    num_experts, dim, hidden = w_out.shape
    num_rows = len(x_TD) if token_N is None else len(token_N)
    counts = counts_E.tolist()
    if sum(counts) != num_rows or min(counts, default=0) < 0:
        raise ValueError(f"counts {counts} add up to {sum(counts)}: expected {num_rows}, one an expert row")
    if num_rows == 0:
        for tensor in results.values():
            if tensor is not None:
                tensor.zero_()
        return
    # held until the call is over: the library sees addresses only
    tensors = {
        "counts": counts_E.to(torch.int64).contiguous(),
        "token": None if token_N is None else token_N.to(torch.int64).contiguous(),
        "weight": None if weight_N is None else weight_N.contiguous(),
        "x": x_TD.contiguous(),
        "w_in": w_in.contiguous(),
        "w_out": w_out.contiguous(),
        "b_in": _with_whole_rows(b_in),
        "b_out": _with_whole_rows(b_out),
        **kept,
        **results,
    }
    problem = Problem(
        bfloat16=x_TD.dtype == torch.bfloat16,
        activation=_ORDER.index(activation),
        threads=torch.get_num_threads(),
        num_experts=num_experts,
        dim=dim,
        hidden=hidden,
        num_tokens=len(x_TD),
        num_rows=num_rows,
        combine=combine,
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        b_in_stride=0 if b_in is None else tensors["b_in"].stride(0),
        b_out_stride=0 if b_out is None else tensors["b_out"].stride(0),
    )
    reference = ctypes.byref(problem)
    row = library.gatewright_check(reference)
    if row >= 0:
        raise IndexError(f"token[{row}] is {int(token_N[row])}: expected 0 to {len(x_TD) - 1}, a row of x")
    problem.scratch = _scratch(library, library.gatewright_scratch_bytes(reference, backward))
    library.gatewright_expert_mlp(reference, backward)


def _with_whole_rows(bias_EM: Tensor | None) -> Tensor | None:
    """A bank's biases may be a part of each row of one tensor."""
    return bias_EM if bias_EM is None or bias_EM.stride(1) == 1 else bias_EM.contiguous()


def _scratch(library: ctypes.CDLL, size: int) -> int:
    """The address of ``size`` bytes, on a cache line."""
    if _kept.scratch is None or _kept.scratch.nbytes < size + _ALIGNMENT:
        _kept.scratch = None  # before its successor is there
        _kept.scratch = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        library.gatewright_advise(_kept.scratch.data_ptr(), _kept.scratch.nbytes)
    return -(-_kept.scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
