"""grouped_gemm and its transposed forms against the float64 reference, to second order; and the choice of a backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_fixtures import poisoned  # noqa: F401

from gatewright.kernels import backend as backends
from gatewright.kernels.backend import choose_backend
from gatewright.kernels.grouped_gemm import grouped_gemm, grouped_gemm_input_grad, grouped_gemm_weight_grad

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BACKENDS = ("reference", "cpu", "torch")  # what runs here; triton has its own file
FORMS = {
    "grouped_gemm": (grouped_gemm, ("NK", "EMK")),
    "input_grad": (grouped_gemm_input_grad, ("NM", "EMK")),
    "weight_grad": (grouped_gemm_weight_grad, ("NM", "NK")),
}


def operands(form, counts, m, k, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"N": sum(counts), "E": len(counts), "M": m, "K": k}
    return [
        torch.randn([sizes[letter] for letter in shape], generator=generator, dtype=torch.float64).to(dtype)
        for shape in FORMS[form][1]
    ]


def value_and_gradients(form, tensors, counts, backend):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = FORMS[form][0](*leaves, torch.tensor(counts, device=leaves[0].device), backend=backend)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(tensors[0].dtype)
    out.backward(dy.to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(form, counts, m, k, dtype, backend, seed):
    tensors = operands(form, counts, m, k, dtype, seed)
    fast = value_and_gradients(form, tensors, counts, backend)
    same = value_and_gradients(form, tensors, counts, "reference")
    doubled = [tensor.double() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in doubled]
    exact_out = FORMS[form][0](*leaves, torch.tensor(counts), backend="reference")
    generator = torch.Generator().manual_seed(1)
    exact_out.backward(torch.randn(exact_out.shape, generator=generator, dtype=torch.float64).to(dtype).double())
    for value, reference, exact in zip(fast, same, [exact_out.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert value.dtype == dtype and value.shape == exact.shape
        scale = exact.norm() + 1e-12
        allowed = max(TOLERANCE[dtype], 1.5 * float((reference.double() - exact).norm() / scale))
        assert float((value.double() - exact).norm() / scale) <= allowed


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", FORMS)
class TestAgainstReference:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        counts=st.lists(st.one_of(st.just(0), st.integers(0, 70)), min_size=1, max_size=5),
        m=st.integers(1, 19),
        k=st.integers(1, 19),
        seed=st.integers(0, 1000),
    )
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_cpu_on_odd_sizes(self, form, dtype, counts, m, k, seed):
        check(form, counts, m, k, dtype, "cpu", seed)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 1000))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torch_on_aligned_sizes(self, form, dtype, counts, seed):
        check(form, counts, 16, 8, dtype, "torch", seed)

    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_gradients_to_second_order(self, form, backend):
        counts = [2, 0, 3]
        tensors = [tensor.requires_grad_() for tensor in operands(form, counts, 2, 3, torch.float64)]

        def call(left, right):
            return FORMS[form][0](left, right, torch.tensor(counts), backend=backend)

        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_expanded_gradients_and_strided_inputs(self, form, backend):
        counts = [3, 0, 5]
        tensors = operands(form, counts, 16, 8, torch.float32)
        results = []
        for strided in (False, True):
            leaves = [tensor.mT.contiguous().mT if strided else tensor for tensor in tensors]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            out = FORMS[form][0](*leaves, torch.tensor(counts), backend=backend)
            if strided:
                out.sum().backward()
            else:
                out.backward(torch.ones_like(out))
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for plain, strided in zip(*results, strict=True):
            torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(form, backend):
    counts = [3, 0, 5]
    tensors = operands(form, counts, 16, 8, torch.float32)
    eager = value_and_gradients(form, tensors, counts, backend)
    torch._dynamo.reset()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    counts_E = torch.tensor(counts)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(left, right):
        return FORMS[form][0](left, right, counts_E, backend=backend)

    out = call(*leaves)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).float())
    for value, expected in zip([out.detach(), *(leaf.grad for leaf in leaves)], eager, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend):
    x, w = operands("grouped_gemm", [3, 0, 5], 16, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_gemm(x, w, torch.tensor([3, 0, 5]), backend=backend)
    expected = grouped_gemm(x.bfloat16(), w.bfloat16(), torch.tensor([3, 0, 5]), backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize(
    ("x", "w", "counts", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 5, 6), [1, 2], "equal widths"),
        (torch.zeros(3, 4), torch.zeros(5, 4), [1, 2], r"expected \[N, K\] and \[E, M, K\]"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4), [3], "one an expert"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4), [1, 1], "add up to 2: expected 3"),
        (torch.zeros(3, 4), torch.zeros(2, 5, 4, dtype=torch.float64), [1, 2], "give both one dtype"),
    ],
)
def test_says_what_is_wrong(x, w, counts, message):
    with pytest.raises(ValueError, match=message):
        grouped_gemm(x, w, torch.tensor(counts))


class TestChoice:
    """choose_backend: by device, dtype and shape; by argument before environment; refusals that say why."""

    @pytest.fixture(autouse=True)
    def no_variable(self, monkeypatch):
        monkeypatch.delenv("GATEWRIGHT_KERNELS", raising=False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(backends, "_HAS_TRITON", True)
        monkeypatch.setattr(backends, "_capability", lambda device: None)

    @pytest.mark.parametrize(
        ("device", "dtype", "widths", "chosen"),
        [
            ("cpu", torch.float32, (7,), "cpu"),
            ("cpu", torch.float64, (7,), "cpu"),
            ("cpu", torch.complex64, (8,), "reference"),
            ("cuda", torch.bfloat16, (8, 16), "triton"),
            ("cuda", torch.float32, (7,), "triton"),
            ("cuda", torch.float64, (8,), "reference"),
            ("meta", torch.float32, (8,), "reference"),
        ],
    )
    def test_by_itself(self, device, dtype, widths, chosen):
        assert choose_backend(None, device=torch.device(device), dtype=dtype, widths=widths) == chosen

    @pytest.mark.parametrize(("widths", "chosen"), [((8, 16), "torch"), ((8, 12), "reference")])
    @pytest.mark.parametrize("lacking", ["package", "capability"])
    def test_by_itself_without_triton(self, lacking, widths, chosen, monkeypatch):
        if lacking == "package":
            monkeypatch.setattr(backends, "_HAS_TRITON", False)
        else:
            monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
        assert choose_backend(None, device=torch.device("cuda"), dtype=torch.bfloat16, widths=widths) == chosen

    def test_argument_before_environment(self, monkeypatch):
        monkeypatch.setenv("GATEWRIGHT_KERNELS", "torch")
        options = {"device": torch.device("cpu"), "dtype": torch.float32, "widths": (8,)}
        assert choose_backend(None, **options) == "torch"
        assert choose_backend("reference", **options) == "reference"

    @pytest.mark.parametrize(
        ("backend", "device", "dtype", "widths", "message"),
        [
            ("refrence", "cpu", torch.float32, (8,), 'did you mean "reference"'),
            ("cutlass", "cpu", torch.float32, (8,), 'Choose "reference", "cpu", "torch", "triton"'),
            ("triton", "cpu", torch.float32, (8,), "on cuda only .*TRITON_INTERPRET=1.*, not on cpu"),
            ("triton", "cuda", torch.float64, (8,), "not torch.float64"),
            ("cpu", "cuda", torch.float32, (8,), "cpu only, and the tensors are on cuda"),
            ("cpu", "cpu", torch.complex64, (8,), "not torch.complex64"),
            ("torch", "cpu", torch.float64, (8,), "not torch.float64"),
            ("torch", "cpu", torch.float32, (8, 6), "multiples of 4 in torch.float32, not 6"),
            ("torch", "cpu", torch.bfloat16, (12,), "multiples of 8 in torch.bfloat16, not 12"),
        ],
    )
    @pytest.mark.parametrize("by", ["argument", "environment"])
    def test_refusals(self, by, backend, device, dtype, widths, message, monkeypatch):
        if by == "environment":
            monkeypatch.setenv("GATEWRIGHT_KERNELS", backend)
            message = f'GATEWRIGHT_KERNELS="{backend}".*{message}'
        given_ = backend if by == "argument" else None
        with pytest.raises(ValueError, match=message):
            choose_backend(given_, device=torch.device(device), dtype=dtype, widths=widths)

    @pytest.mark.parametrize(
        ("lacking", "message"), [("package", "not installed"), ("capability", "8.0 or more, .* 7.5")]
    )
    def test_triton_refuses_where_it_cannot_run(self, lacking, message, monkeypatch):
        if lacking == "package":
            monkeypatch.setattr(backends, "_HAS_TRITON", False)
        else:
            monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
        with pytest.raises(ValueError, match=message):
            choose_backend("triton", device=torch.device("cuda"), dtype=torch.float32, widths=(8,))
