"""Triton's kernels compile for Hopper, which needs no GPU: with tensor cores, pipelined loads, and room for all of it.

The arguments are those with which ``triton_mlp`` would start them: what it starts is caught and compiled instead. What
the machine code then takes is no measurement of time.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction, mangle_type

from gatewright.kernels import triton_kernels, triton_mlp, triton_tuning
from gatewright.tools.expert_case import ExpertCase

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a program may have
NAMES = ("rows gated", "rows", "hidden_grad", "weight_grad")
EVERY = max(len(triton_tuning._HALF[name]) for name in NAMES)
pytestmark = pytest.mark.skipif(triton_tuning.interpreted(), reason="compiles nothing in the interpreter")


class Catcher:
    """In place of a kernel: notes what it is started with."""

    def __init__(self, kernel: JITFunction, caught: list) -> None:
        self.kernel, self.caught = kernel, caught

    def __getitem__(self, grid):
        return lambda *args, **options: self.caught.append((self.kernel, args, options))


def started(case, dtype, number, monkeypatch):
    """What one forward and backward start, with the ``number``-th candidates; on a CPU, where nothing is computed."""
    caught = []
    for name, kernel in list(vars(triton_kernels).items()):
        if isinstance(kernel, JITFunction) and not name.startswith("_"):
            monkeypatch.setattr(triton_kernels, name, Catcher(kernel, caught))

    def choose(kernel, dtype, precision, sizes, num_rows, run):
        found = triton_tuning.candidates(kernel, dtype, precision)
        return found[number % len(found)]

    monkeypatch.setattr(triton_mlp, "choose", choose)
    monkeypatch.setattr(triton_mlp, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_mlp, "_has_tma", lambda device: True)
    (x, w_in, w_out, b_in, b_out, weight), token, dy = case.tensors(dtype)
    counts = torch.tensor(case.counts)
    operands = (w_in, w_out, b_in, b_out, counts, token, weight)
    combine, activation = case.variant == "combine", case.activation
    _, h, order = triton_mlp.expert_mlp_forward(x, *operands, combine, activation, True)
    needs = [True, True, True, case.bias, case.bias, case.weighted]
    triton_mlp.expert_mlp_backward(dy, x, *operands, h, order, combine, activation, needs)
    return caught


def compiled(kernel, args, options):
    """For Hopper, as a start with these arguments would."""
    asked = {name: options.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else mangle_type(values[name]) for name in kernel.arg_names
    }  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=HOPPER, options=asked)


def check(case, dtype, number, monkeypatch):
    seen = {}
    for kernel, args, options in started(case, dtype, number, monkeypatch):
        program = compiled(kernel, args, options)
        name = kernel.__name__
        seen[name] = seen.get(name, 0) + 1
        assert program.metadata.shared <= SHARED, name
        if name in ("rows", "hidden_grad", "weight_grad"):
            code = program.asm["ptx"]
            assert "wgmma.mma_async" in code, f"{name} without tensor cores"
            assert "cp.async" in code, f"{name} waits for every load"
            # the tiles go from shared memory into the products, never through registers
            assert not any("local_load" in line for line in products(program)), name
    return seen


def products(program):
    """The lines of the loop that multiplies."""
    lines = program.asm["ttgir"].splitlines()
    at = next(i for i, line in enumerate(lines) if "warp_group_dot " in line)
    start = max(i for i in range(at) if "scf.for" in lines[i])
    end = next(i for i in range(at, len(lines)) if "scf.yield" in lines[i])
    return [line for line in lines[start:end] if "xbf16" in line or "xf16" in line]


CASE = ExpertCase([300, 0, 200], 256, 256, 384, variant="combine")


def test_the_first_candidates(monkeypatch):
    seen = check(CASE, torch.bfloat16, 0, monkeypatch)
    # x W_in, a W_out and dh W_in; dW_in and dW_out; tiles once for every height of theirs in forward and in backward
    assert seen.pop("tiles") >= 2
    assert seen == {
        "rows": 3, "hidden_grad": 1, "weight_grad": 2, "row_products": 1, "sum_tokens": 2, "sum_experts": 2,
    }  # fmt: skip


def test_widths_that_no_tile_divides(monkeypatch):
    check(dataclasses.replace(CASE, dim=200, hidden=328, bias=False), torch.float16, 0, monkeypatch)


@pytest.mark.evidence
@pytest.mark.parametrize("number", range(EVERY))
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_candidate(dtype, activation, number, monkeypatch):
    check(dataclasses.replace(CASE, activation=activation), dtype, number, monkeypatch)
