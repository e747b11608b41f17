"""The compiled CPU kernel: accuracy on every shape, the same numbers whatever the threads, memory that is reused, and
that its absence is noticed and harmless. ``test_kernels_expert_mlp.py`` and ``test_kernels_accuracy.py`` use it too,
as ``cpu``, where it is there.
"""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_fixtures import accuracy_cases, poisoned  # noqa: F401

from gatewright.kernels import cpu, native
from gatewright.kernels.activation import ACTIVATIONS, activate
from gatewright.kernels.expert_mlp import expert_mlp
from gatewright.tools.expert_case import ExpertCase, too_far

DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(native.why_not(dtype) is not None, reason=str(native.why_not(dtype))))
    for dtype in (torch.float32, torch.bfloat16)
]
needs_float32 = pytest.mark.skipif(native.why_not(torch.float32) is not None, reason="no compiled kernel here")
NAN_BYTES = 0xFF


@pytest.fixture
def threads():
    """Sets torch's threads, and sets them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def nothing_kept():
    native.release()
    yield
    native.release()


def poison_scratch():
    if native._kept.scratch is not None:
        native._kept.scratch.fill_(NAN_BYTES)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
class TestAccuracy:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(case=accuracy_cases(), num_threads=st.integers(1, 3))
    def test_over_drawn_shapes_in_dirty_memory(self, case, num_threads, dtype):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            poison_scratch()
            assert not too_far(case.errors(dtype, "cpu"), dtype), case
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("activation", ["gelu", "swiglu"])
    def test_sums_longer_than_a_register_holds(self, dtype, activation):
        """Every product is summed over more words than are summed in one register."""
        case = ExpertCase([700, 3, 0, 611], 900, dim=530, hidden=540, activation=activation)
        assert not too_far(case.errors(dtype, "cpu"), dtype)

    @pytest.mark.parametrize("activation", ["gelu", "swiglu"])
    @pytest.mark.parametrize("variant", ["rows", "combine"])
    def test_experts_of_many_rows(self, dtype, variant, activation):
        """So many that sums over rows show how they are taken."""
        poison_scratch()
        case = ExpertCase([5, 2600, 1024, 1025], 500, dim=37, hidden=45, activation=activation, variant=variant)
        assert not too_far(case.errors(dtype, "cpu"), dtype)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations_on_their_whole_range(self, dtype, activation):
        """Experts that are the identity: out = f(x), and dx = f'(x). [1, 1] times x is the pair of a gated one."""
        gated = activation in ("swiglu", "geglu")
        x = torch.cat([torch.linspace(-30, 30, 2003), torch.tensor([-1e4, -100.0, -0.0, 1e-30, 100.0])]).to(dtype)
        if activation not in ("relu", "relu2"):
            x = x[x.abs() <= 100]
        x = x[: len(x) // 4 * 4].view(-1, 4)
        eye = torch.eye(4, dtype=dtype)[None]
        leaf = x.clone().requires_grad_()
        w_in = torch.cat([eye, eye], 1) if gated else eye
        out = expert_mlp(
            leaf, w_in, eye, None, None, torch.tensor([len(x)]), activation=activation, backend="cpu"
        )  # fmt: skip
        out.backward(torch.ones_like(out))
        exact = x.double().requires_grad_()
        expected = activate(torch.cat([exact, exact], 1) if gated else exact, activation)
        expected.backward(torch.ones_like(expected))
        tolerance = {torch.float32: 5e-7, torch.bfloat16: 8e-3}[dtype]
        for value, wanted in ((out.detach(), expected.detach()), (leaf.grad, exact.grad)):
            allowed = tolerance * torch.maximum(wanted.abs(), exact.detach().abs().clamp(max=10))
            assert ((value.double() - wanted).abs() <= allowed + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh", "geglu"])
def test_nan_and_infinity_stay_in_their_row(dtype, activation):
    """A row that is not finite does not become finite, and reaches no other row."""
    case = ExpertCase([40], variant="rows", activation=activation, bias=False, weighted=False)
    leaves, _, dy = case.tensors(dtype)
    leaves[0][7, 3], leaves[0][21, 0] = float("nan"), float("inf")
    out = case.call(leaves, None, "cpu")
    finite = out.isfinite().all(1)
    assert finite.sum() == 38 and not finite[7] and not finite[21]
    leaves[0].requires_grad_()
    case.call(leaves, None, "cpu").backward(dy)
    finite = leaves[0].grad.isfinite().all(1)
    assert finite.sum() >= 38 and (activation == "relu" or not finite[7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1500, 5, 0, 9, 8], [40] * 12], ids=["one for all threads", "one thread each"])
def test_threads_change_no_bit(dtype, counts, threads):
    case = ExpertCase(counts, 100, 70, 45)
    results = []
    for num_threads in (1, 2, 3, 2):
        threads(num_threads)
        poison_scratch()
        results.append(case.run(dtype, "cpu"))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_a_token_is_written_where_it_belongs(dtype):
    """Tokens with one row at most need no sum; those without a row are 0, whatever the memory held."""
    case = ExpertCase([30, 0, 33], 100, 40, 24)
    leaves, _, dy = case.tensors(dtype)
    token = torch.randperm(100, generator=torch.Generator().manual_seed(1))[:63]
    found = {}
    for backend, compute in (("reference", torch.float64), ("cpu", dtype)):
        own = [leaf.to(compute).requires_grad_() for leaf in leaves]
        poison_scratch()
        out = case.call(own, token, backend)
        out.backward(dy.to(compute))
        found[backend] = [out.detach(), own[0].grad, own[5].grad]
    others = torch.ones(100, dtype=torch.bool).index_fill(0, token, False)
    assert not found["cpu"][0][others].any() and not found["cpu"][1][others].any()
    for value, exact in zip(found["cpu"], found["reference"], strict=True):
        assert (value.double() - exact).norm() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * exact.norm()


@needs_float32
@pytest.mark.parametrize("bad", [-1, 12])
def test_a_token_out_of_range_is_refused(bad):
    case = ExpertCase([3, 2])
    leaves, token, _ = case.tensors(torch.float32)
    token[4] = bad
    with pytest.raises(IndexError, match=rf"token\[4\] is {bad}: expected 0 to 11"):
        case.call(leaves, token, "cpu")


@needs_float32
def test_callers_at_once_do_not_disturb_each_other():
    cases = [ExpertCase([50 + seed, 20, 300], 200, 64, 64, seed=seed) for seed in range(4)]
    alone = [case.run(torch.float32, "cpu") for case in cases]
    start = threading.Barrier(len(cases))

    def work(case):
        start.wait()
        return [case.run(torch.float32, "cpu") for _ in range(5)]

    with ThreadPoolExecutor(len(cases)) as pool:
        for expected, repeats in zip(alone, pool.map(work, cases), strict=True):
            for found in repeats:
                assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_float32
class TestMemoryOfResults:
    LIKE = torch.empty(0)

    def test_is_reused_when_no_tensor_has_it(self, nothing_kept):
        first = native._results.empty(self.LIKE, 1000, 600)
        address = first.data_ptr()
        view = first[10:]
        del first
        second = native._results.empty(self.LIKE, 1000, 600)
        assert second.data_ptr() != address, "a view still has that memory"
        del view
        assert native.kept_bytes() == 2400000
        third = native._results.empty(self.LIKE, 600, 1000)
        assert third.data_ptr() == address and third.shape == (600, 1000) and native.kept_bytes() == 0

    def test_outlives_its_tensor_in_no_gradient(self, nothing_kept):
        case = ExpertCase([600, 600], 700, 256, 300, bias=False)
        kept = [case.run(torch.float32, "cpu") for _ in range(3)]
        fresh = [{name: value.clone() for name, value in results.items()} for results in kept]
        case.run(torch.float32, "cpu")
        for results, copies in zip(kept, fresh, strict=True):
            assert all(torch.equal(results[name], copies[name]) for name in results)

    def test_is_let_go_when_nobody_wants_it(self, nothing_kept):
        native._results.empty(self.LIKE, 1000, 600)
        assert native.kept_bytes() == 2400000
        for _ in range(2 * native._results.PATIENCE):
            native._results.empty(self.LIKE, 1000, 500)
        gc.collect()
        assert native.kept_bytes() == 2000000

    def test_small_results_are_left_to_malloc(self, nothing_kept):
        native._results.empty(self.LIKE, 10, 10)
        assert native.kept_bytes() == 0


class TestAbsence:
    def test_without_a_library_slices_compute(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native, "LIBRARIES", [tmp_path / "_native.so"])
        native._load.cache_clear()
        try:
            assert "not compiled at installation" in native.why_not(torch.float32)
            case = ExpertCase([40, 50], 60, 33, 40)
            assert not too_far(case.errors(torch.float32, "cpu"), torch.float32)
        finally:
            native._load.cache_clear()

    def test_a_file_that_is_no_library_is_named(self, monkeypatch, tmp_path):
        (tmp_path / "_native.so").write_text("not a library")
        monkeypatch.setattr(native, "LIBRARIES", [tmp_path / "_native.so"])
        native._load.cache_clear()
        try:
            assert "does not load" in native.why_not(torch.float32) and "_native.so" in native.why_not(torch.float32)
        finally:
            native._load.cache_clear()

    @needs_float32
    def test_a_library_of_other_sources_is_refused(self, monkeypatch):
        class Longer(native.Problem):
            _fields_ = [("more", native.ctypes.c_int64)]

        monkeypatch.setattr(native, "Problem", Longer)
        native._load.cache_clear()
        try:
            assert "other sources" in native.why_not(torch.float32)
        finally:
            native._load.cache_clear()

    def test_the_environment_turns_it_off(self, monkeypatch):
        monkeypatch.setenv(native.VARIABLE, "0")
        assert native.why_not(torch.float32) == "GATEWRIGHT_NATIVE=0"

        def fail(*_):
            raise AssertionError("the compiled kernel was called")

        monkeypatch.setattr(native, "_run", fail)
        case = ExpertCase([4, 5])
        assert case.run(torch.float32, "cpu")["out"].isfinite().all()

    def test_other_types_are_not_its_business(self):
        assert "torch.float64" in native.why_not(torch.float64)
        assert cpu.native is native
