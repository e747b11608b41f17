"""expert_mlp: values and gradients against the float64 reference, memory kept, compile, checkpoint, autocast."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_fixtures import poisoned  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from gatewright.kernels.activation import ACTIVATIONS, activate, activate_into, activation_backward_into
from gatewright.kernels.expert_mlp import expert_mlp
from gatewright.tools.expert_case import FLOOR, NAMES, TOLERANCE, relative_error
from gatewright.tools.expert_case import ExpertCase as Case

FAST = ("cpu", "torch")


def check(case, dtype, backend):
    """The backend's errors are within tolerance, or else within 1.5 times those of the reference in this dtype."""
    exact = case.run(dtype, "reference", compute=torch.float64)
    same = case.run(dtype, "reference")
    fast = case.run(dtype, backend)
    assert fast.keys() == exact.keys()
    for name, value in fast.items():
        assert value.shape == exact[name].shape and value.dtype == same[name].dtype, name
        numbers = min(sum(case.counts), value.numel())
        few = 1 if numbers >= 32 else 4 if numbers > 1 else 8  # so few numbers average no rounding out
        allowed = max(few * TOLERANCE[dtype], 1.5 * relative_error(same[name], exact[name]))
        assert relative_error(value, exact[name]) <= allowed, (name, case, dtype, backend)


cases = st.builds(
    Case,
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 70)), min_size=1, max_size=5),
    num_tokens=st.integers(1, 40),
    dim=st.sampled_from([8, 16, 24]),
    hidden=st.sampled_from([8, 40]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    weighted=st.booleans(),
    variant=st.sampled_from(["rows", "gather", "combine"]),
    seed=st.integers(0, 1000),
)
odd_cases = st.builds(
    # not one token alone: of a sum that cancels to one small number, half types leave nothing
    lambda case, dim, hidden: dataclasses.replace(case, dim=dim, hidden=hidden, num_tokens=max(8, case.num_tokens)),
    cases,
    st.integers(1, 19),
    st.integers(1, 19),
)


@pytest.mark.usefixtures("poisoned")
class TestAgainstReference:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(case=odd_cases)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_cpu_on_odd_sizes(self, case, dtype):
        check(case, dtype, "cpu")

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(case=cases)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torch_on_aligned_sizes(self, case, dtype):
        check(case, dtype, "torch")

    @pytest.mark.parametrize("backend", FAST)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("counts", "num_tokens"),
        [([0, 0, 0], 5), ([0], 1), ([1], 1), ([0, 1, 0], 1), ([64], 64), ([33, 0, 32, 31], 7)],
        ids=["no rows", "no rows, one expert", "one row", "one busy expert", "one expert", "around the bucket"],
    )
    @pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
    def test_edges(self, backend, dtype, counts, num_tokens, variant):
        for activation, bias, weighted in itertools.product(("gelu", "swiglu"), (False, True), (False, True)):
            check(Case(counts, num_tokens, 8, 16, activation, bias, weighted, variant), dtype, backend)

    @pytest.mark.parametrize("backend", FAST)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_tolerances_on_larger_sizes(self, backend, dtype, activation):
        # grouped_mm takes no bias: added to a rounded product, it can round h across relu's kink
        bias = (backend, activation) != ("torch", "relu")
        case = Case([300, 0, 70, 536, 64], 256, 64, 96, activation, bias)
        exact = case.run(dtype, "reference", compute=torch.float64)
        same = case.run(dtype, "reference")
        for name, value in case.run(dtype, backend).items():
            error = relative_error(value, exact[name])
            assert error <= TOLERANCE[dtype], name
            assert error <= 1.5 * relative_error(same[name], exact[name]) + FLOOR[dtype], name

    @pytest.mark.parametrize("backend", FAST)
    def test_a_weight_of_zero_has_its_gradient(self, backend):
        case = Case([5, 6])
        results = {}
        for name in ("reference", backend):
            leaves, token, dy = case.tensors(torch.float32)
            leaves[-1][:4] = 0
            leaves[-1].requires_grad_()
            case.call(leaves, token, name).backward(dy)
            results[name] = leaves[-1].grad
        torch.testing.assert_close(results[backend], results["reference"])


def test_a_token_that_is_not_finite_reaches_only_its_expert():
    """Padding rows must not carry one expert's values into another's gradients."""
    case = Case([3, 5], variant="rows")
    leaves, token, dy = case.tensors(torch.bfloat16)
    leaves[0][0] = float("nan")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    case.call(leaves, token, "cpu").backward(dy)
    for leaf in leaves[1:5]:
        assert leaf.grad[1].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
def test_reference_gradients_are_those_of_differences(activation, variant):
    case = Case([2, 0, 3], 4, 3, 2, activation, variant=variant)
    leaves, token, _ = case.tensors(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *leaves: case.call(leaves, token, "reference"), leaves)
    assert torch.autograd.gradcheck(lambda *leaves: case.call(leaves, token, "cpu"), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_backward_is_that_of_autograd(activation):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    a = activate(h, activation)
    da = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    a.backward(da)
    a_only, a_again, dh = torch.empty_like(a), torch.empty_like(a), torch.empty_like(h)
    activate_into(h.detach(), a_only, activation)
    activation_backward_into(h.detach(), da, a_again, dh, activation)
    for value, expected in ((a_only, a), (a_again, a), (dh, h.grad)):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_gradients_and_strided_inputs(backend, dtype):
    case = Case([9, 0, 40])
    results = []
    for strided in (False, True):
        leaves, token, _ = case.tensors(dtype)
        if strided:
            leaves = [leaf.mT.contiguous().mT if leaf.dim() > 1 else leaf for leaf in leaves]
            leaves[5] = torch.stack([leaves[5], leaves[5]], 1)[:, 0]
            token = torch.stack([token, token], 1)[:, 0]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = case.call(leaves, token, backend)
        if strided:
            out.sum().backward()
        else:
            out.backward(torch.ones_like(out))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("wanted", NAMES[1:])
def test_one_gradient_alone(backend, wanted):
    case = Case([9, 0, 40])
    every = case.run(torch.float32, backend)
    leaves, token, dy = case.tensors(torch.float32)
    leaf = leaves[NAMES.index(wanted) - 1].requires_grad_()
    case.call(leaves, token, backend).backward(dy)
    torch.testing.assert_close(leaf.grad, every[wanted])
    assert sum(leaf.grad is not None for leaf in leaves) == 1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("dtype", "activation"), [(torch.float32, "gelu"), (torch.bfloat16, "swiglu")])
def test_keeps_tokens_and_pre_activations_only(backend, dtype, activation):
    case = Case([150, 0, 70, 36], 128, 64, 96, activation)
    leaves, token, _ = case.tensors(dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.call(leaves, token, backend)
    parameters = {id(leaf) for leaf in leaves[1:]}
    sizes = [tensor.nbytes for tensor in kept if id(tensor) not in parameters and tensor.is_floating_point()]
    num_rows, width = sum(case.counts), leaves[1].shape[1]
    assert sum(sizes) <= dtype.itemsize * (128 * 64 + num_rows * width)
    routing = [tensor.nbytes for tensor in kept if not tensor.is_floating_point()]
    assert sum(routing) <= 8 * (2 * num_rows + len(case.counts))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_half_types_are_combined_in_float32(backend):
    num_rows = 700
    x, token = torch.ones(1, 8, dtype=torch.bfloat16), torch.zeros(num_rows, dtype=torch.int64)
    w = torch.eye(8, dtype=torch.bfloat16)[None]
    out = expert_mlp(
        x, w, w, None, None, torch.tensor([num_rows]), token=token, combine=True, activation="relu", backend=backend
    )
    assert out.tolist() == [[700.0] * 8]  # one by one in bfloat16, the sum would stay at 256


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
def test_no_tokens_at_all(backend, variant):
    case = Case([0, 0], variant=variant)
    leaves, _, dy = Case([0, 0], variant="rows").tensors(torch.float32)
    token = None if variant == "rows" else torch.zeros(0, dtype=torch.int64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = case.call(leaves, token, backend)
    assert out.shape == (0, 8)
    out.backward(dy)
    assert all(not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
def test_rows_of_nobody_count_as_zero(backend, dtype, variant):
    case = Case([9, 0, 40], variant=variant, nobody=7)
    leaves, token, dy = case.tensors(dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = case.call(leaves, token, backend)
    out.backward(dy)
    # the same without those rows
    inputs = [leaf.detach() for leaf in leaves]
    inputs[0] = inputs[0][:49] if variant == "rows" else inputs[0]
    inputs[5] = inputs[5][:49]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    expected = case.call(inputs, None if variant == "rows" else token[:49], "reference")
    expected.backward(dy if variant == "combine" else dy[:49])
    results = zip(
        [out.detach(), *(leaf.grad for leaf in leaves)], [expected.detach(), *(i.grad for i in inputs)], strict=True
    )
    for value, short in results:
        assert relative_error(value[: len(short)], short.double()) <= TOLERANCE[dtype]
        assert not value[len(short) :].any()


@pytest.mark.parametrize("backend", FAST)
def test_without_gradients_the_value_is_the_same(backend):
    case = Case([9, 0, 40])
    leaves, token, _ = case.tensors(torch.bfloat16)
    with torch.no_grad():
        quiet = case.call([leaf.clone().requires_grad_() for leaf in leaves], token, backend)
    assert torch.equal(quiet, case.run(torch.bfloat16, backend)["out"])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["rows", "gather", "combine"])
def test_compiles_whole(backend, dtype, variant):
    case = Case([9, 0, 40], variant=variant)
    eager = case.run(dtype, backend)
    torch._dynamo.reset()
    leaves, token, dy = case.tensors(dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    counts = torch.tensor(case.counts)

    def call(x, w_in, w_out, b_in, b_out, weight):
        return expert_mlp(
            x * 1,
            w_in,
            w_out,
            b_in,
            b_out,
            counts,
            token=token,
            weight=weight,
            combine=variant == "combine",
            activation=case.activation,
            backend=backend,
        )

    out = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    out.backward(dy)
    for name, value in zip(NAMES, [out.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert torch.equal(value, eager[name]), name


def test_compiles_whole_with_the_backend_chosen_by_itself(monkeypatch):
    monkeypatch.delenv("GATEWRIGHT_KERNELS", raising=False)
    case = Case([9, 0, 40])
    leaves, token, _ = case.tensors(torch.float32)
    torch._dynamo.reset()
    x, w_in, w_out, b_in, b_out, weight = leaves
    counts = torch.tensor(case.counts)

    def call(x):
        return expert_mlp(
            x, w_in, w_out, b_in, b_out, counts, token=token, weight=weight, combine=True, activation="swiglu"
        )

    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))


@pytest.mark.parametrize("backend", FAST)
def test_recomputation_inside_what_is_compiled(backend):
    case = Case([9, 0, 40])
    plain = case.run(torch.float32, backend)
    torch._dynamo.reset()
    leaves, token, dy = case.tensors(torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(*leaves):
        return checkpoint(case.call, leaves, token, backend, use_reentrant=False)

    out = call(*leaves)
    out.backward(dy)
    for name, value in zip(NAMES, [out.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("backend", FAST)
def test_other_counts_compile_nothing(backend):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    x, w_in, w_out = (leaf.requires_grad_() for leaf in Case([9, 0, 40]).tensors(torch.float32)[0][:3])

    @torch.compile(backend=graphs, fullgraph=True)
    def call(x, counts, token):
        return expert_mlp(
            x, w_in, w_out, None, None, counts, token=token, combine=True, activation="swiglu", backend=backend
        )

    for counts in ([9, 0, 40], [49, 0, 0], [16, 16, 17]):
        call(x, torch.tensor(counts), torch.arange(49) % 12).sum().backward()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_recomputation_changes_nothing(backend):
    case = Case([9, 0, 40])
    plain = case.run(torch.float32, backend)
    leaves, token, dy = case.tensors(torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = checkpoint(lambda *leaves: case.call(leaves, token, backend), *leaves, use_reentrant=False)
    out.backward(dy)
    for name, value in zip(NAMES, [out.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_computes_in_its_dtype_and_leaves_weights_alone(backend):
    case = Case([9, 0, 40])
    leaves, token, dy = case.tensors(torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call(leaves, token, backend)
    assert out.dtype == torch.bfloat16
    out.backward(dy.bfloat16())
    cast = [leaf.detach().bfloat16() for leaf in leaves[:5]]
    cast = [leaf.requires_grad_() for leaf in [*cast, leaves[5].detach().clone()]]
    expected = case.call(cast, token, backend)
    expected.backward(dy.bfloat16())
    assert torch.equal(out, expected)
    for leaf, expected_leaf in zip(leaves, cast, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected_leaf.grad.float())


def test_autocast_leaves_float64_alone():
    case = Case([9, 0, 40])
    leaves, token, _ = case.tensors(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.call(leaves, token, None).dtype == torch.float64


@pytest.mark.parametrize("backend", FAST)
def test_is_a_sound_custom_operator(backend):
    case = Case([9, 0, 40], bias=True)
    (x, w_in, w_out, b_in, b_out, weight), token, _ = case.tensors(torch.float32)
    leaves = [leaf.requires_grad_() for leaf in (x, w_in, w_out, b_in, b_out)]
    counts = torch.tensor(case.counts)
    operands = (*leaves, counts, token, weight.requires_grad_(), True, "swiglu", True, backend)
    torch.library.opcheck(
        torch.ops.gatewright.expert_mlp.default,
        operands,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swigli"}, 'did you mean "swiglu"'),
        ({"activation": "gelu"}, "w_in has shape"),
        ({"b_in": torch.zeros(2, 3)}, "b_in has shape"),
        ({"b_out": torch.zeros(3, 8)}, "b_out has shape"),
        ({"counts": torch.tensor([3, 3, 3])}, "counts has shape"),
        ({"counts": torch.tensor([3, 3])}, "add up to 6"),
        ({"weight": torch.ones(3)}, "weight has shape"),
        ({"token": None}, "combine=True without token"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "give both one dtype"),
        ({"x": torch.zeros(4, 9)}, "x has shape"),
        ({"x": torch.zeros(8)}, r"expected \[T, D\]"),
        ({"backend": "torhc"}, 'did you mean "torch"'),
        ({"backend": "cutlass"}, "is no kernel backend"),
    ],
)
def test_says_what_is_wrong(change, message):
    given_ = {
        "x": torch.zeros(4, 8),
        "w_in": torch.zeros(2, 32, 8),
        "w_out": torch.zeros(2, 8, 16),
        "b_in": None,
        "b_out": None,
        "counts": torch.tensor([3, 2]),
        "token": torch.zeros(5, dtype=torch.int64),
        "weight": None,
        "combine": True,
        "activation": "swiglu",
    } | change
    with pytest.raises(ValueError, match=message):
        expert_mlp(**given_)
