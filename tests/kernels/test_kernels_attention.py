"""The weights of an attention applied to any values, against the definition key by key, and which kernel it takes."""

import itertools

import pytest
import torch
from operations import operations_of

from gatewright.kernels.attention import AttentionWeights

COLUMNS = (1, 3, 64, 65)


def make(batch_size, heads, key_heads, queries, keys, columns, *, width=6, dtype=torch.float64, seed=0):
    """q, k and values with gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch_size, heads, queries, width), (batch_size, key_heads, keys, width), (batch_size, keys, columns)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def masks(batch_size, keys, padding, documents, seed=0):
    """padding with one sample of padding only, and documents that do not lie together."""
    generator = torch.Generator().manual_seed(seed)
    padding_mask = torch.rand(batch_size, keys, generator=generator) > 0.4
    padding_mask[0] = False
    document = torch.randint(-2, 3, (batch_size, keys), generator=generator) * 10**12
    return {"padding_mask": padding_mask if padding else None, "document": document if documents else None}


def some_padding(keys, padding, documents):
    """The masks of one sample that is not all padding."""
    return {name: mask if mask is None else mask[1:] for name, mask in masks(2, keys, padding, documents).items()}


def key_by_key(q, k, values, *, causal, padding_mask=None, document=None, mask=None, scale=None):
    """The definition, in loops. [B, H, L, C]"""
    (batch_size, heads, queries, width), (key_heads, keys) = q.shape, k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    result = []
    for b, h, i in itertools.product(range(batch_size), range(heads), range(queries)):
        own = keys - queries + i
        logits, seen = [], []
        for j in range(keys):
            if causal and j > own or document is not None and document[b, j] != document[b, own]:
                continue
            if padding_mask is not None and not (padding_mask[b, j] and padding_mask[b, own]):
                continue
            logit = q[b, h, i] @ k[b, h * key_heads // heads, j] * scale
            if mask is not None:
                here = mask.expand(batch_size, heads, queries, keys)[b, h, i, j]
                if mask.dtype == torch.bool and not here:
                    continue
                logit = logit if mask.dtype == torch.bool else logit + here
            logits.append(logit)
            seen.append(j)
        row = values[b, :1].sum(0) * 0
        if seen:
            row = torch.stack(logits).softmax(0) @ values[b, seen]
        result.append(row)
    return torch.stack(result).view(batch_size, heads, queries, -1)


def assert_equal(actual, expected, inputs, tolerance=1e-12):
    """The same values and gradients."""
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=expected.dtype)
    grads = [torch.autograd.grad((result * weight).sum(), inputs, retain_graph=True) for result in (actual, expected)]
    torch.testing.assert_close((actual, *grads[0]), (expected, *grads[1]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (1, 6), (4, 6)])
def test_equals_the_definition(heads, causal, padding, documents, queries, keys):
    q, k, values = make(2, *heads, queries, keys, columns=3)
    hidden = masks(2, keys, padding, documents)
    attention = AttentionWeights(q, k, causal=causal, **hidden)
    expected = key_by_key(q, k, values, causal=causal, **hidden)
    assert_equal(attention.apply(values), expected, (q, k, values))
    assert_equal(attention.apply_reference(values), expected, (q, k, values))


@pytest.mark.parametrize("columns", [*COLUMNS, 256, 300])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (70, 140), (1, 140)])
def test_equals_the_reference_at_every_width(columns, queries, keys):
    for causal, padding in itertools.product([False, True], repeat=2):
        q, k, values = make(3, 4, 2, queries, keys, columns)
        attention = AttentionWeights(q, k, causal=causal, **masks(3, keys, padding, padding))
        assert_equal(attention.apply(values), attention.apply_reference(values), (q, k, values))


@pytest.mark.parametrize("shape", [(6, 6), (1, 6), (2, 1, 1, 6), (1, 4, 6, 6), (4, 1, 6)], ids=str)
@pytest.mark.parametrize("kind", ["seen", "added"])
def test_any_other_mask(shape, kind):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if kind == "seen":
        mask = mask > 0
        if shape[-2] == 6:
            mask = mask | torch.eye(6, dtype=torch.bool)
        mask[..., 0] = True
    for causal, padding in itertools.product([False, True], repeat=2):
        q, k, values = make(2, 4, 2, 6, 6, columns=3)
        hidden = {"mask": mask} | masks(2, 6, padding, False)
        attention = AttentionWeights(q, k, causal=causal, scale=0.3, **hidden)
        expected = key_by_key(q, k, values, causal=causal, scale=0.3, **hidden)
        assert_equal(attention.apply(values), expected, (q, k, values))
        assert_equal(attention.apply_reference(values), expected, (q, k, values))


@pytest.mark.parametrize("columns", [*COLUMNS, 300])
@pytest.mark.parametrize("hidden", [(False, False), (True, False), (True, True)], ids=["", "padding", "documents"])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_the_fused_kernel_computes_it(columns, hidden, causal):
    tokens = 768
    q, k, values = make(1, 2, 1, tokens, tokens, columns, dtype=torch.float32 if columns < 64 else torch.float64)
    attention = AttentionWeights(q, k, causal=causal, **some_padding(tokens, *hidden))
    operations_of(lambda: attention.apply(values), q, k, values).assert_fused(below=tokens**2)


def test_the_reference_is_not_taken_for_fused():
    q, k, values = make(1, 2, 1, 64, 64, columns=3)
    operations = operations_of(lambda: AttentionWeights(q, k, causal=True).apply_reference(values), q, k, values)
    assert operations.largest >= 64**2
    with pytest.raises(AssertionError, match="not run: .*flash"):
        operations.assert_fused(below=64**2)


@pytest.mark.parametrize("queries", [1, 300])
def test_the_fused_kernel_computes_the_last_queries_of_many_keys(queries):
    q, k, values = make(1, 2, 2, queries, 1024, columns=5)
    attention = AttentionWeights(q, k, causal=True, **some_padding(1024, True, True))
    limit = 300 * 1024
    operations_of(lambda: attention.apply(values), q, k, values).assert_fused(below=limit)


def test_the_last_queries_are_the_last_rows():
    q, k, values = make(2, 4, 2, 150, 150, columns=5)
    hidden = masks(2, 150, True, True)
    whole = AttentionWeights(q, k, causal=True, **hidden).apply(values)
    for last in (1, 2, 64, 65, 149):
        rows = AttentionWeights(q[:, :, -last:], k, causal=True, **hidden).apply(values)
        torch.testing.assert_close(rows, whole[:, :, -last:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_may_hold_anything_and_gets_nothing(causal, side):
    place = torch.arange(9).flip(0) if side == "left" else torch.arange(9)
    mask = place < torch.tensor([[5], [0], [9]])
    clean = make(3, 4, 2, 9, 9, columns=3)
    results = []
    for filling in (0, torch.nan):
        q, k, values = (tensor.detach().clone() for tensor in clean)
        q.masked_fill_(~mask[:, None, :, None], filling)
        k.masked_fill_(~mask[:, None, :, None], filling)
        values.masked_fill_(~mask[:, :, None], filling)
        inputs = [tensor.requires_grad_() for tensor in (q, k, values)]
        rows = AttentionWeights(q, k, causal=causal, padding_mask=mask).apply(values)
        results.append((rows.detach(), *torch.autograd.grad(rows.square().sum(), inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    rows, dq, dk, dvalues = results[1]
    assert all(tensor.isfinite().all() for tensor in results[1])
    for tensor in (rows.transpose(1, 2), dq.transpose(1, 2), dk.transpose(1, 2), dvalues):
        assert (tensor[~mask] == 0).all() and (tensor[mask] != 0).any()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal):
    q, k, values = make(2, 2, 2, 9, 9, columns=3)
    mask = torch.arange(9).expand(2, 9) < 5
    padded = AttentionWeights(q, k, causal=causal, padding_mask=mask).apply(values)
    short = AttentionWeights(q[:, :, :5], k[:, :, :5], causal=causal).apply(values[:, :5])
    torch.testing.assert_close(padded[:, :, :5], short, rtol=1e-13, atol=1e-13)


def test_each_document_is_as_if_alone():
    lengths = [1, 7, 40, 3, 29]
    document = torch.repeat_interleave(torch.tensor([5, -3, 2**62, 0, -(2**62)]), torch.tensor(lengths))[None]
    q, k, values = make(1, 2, 1, 80, 80, columns=3)
    for causal in (False, True):
        packed = AttentionWeights(q, k, causal=causal, document=document).apply(values)
        alone = [
            AttentionWeights(a, b, causal=causal).apply(c)
            for a, b, c in zip(q.split(lengths, 2), k.split(lengths, 2), values.split(lengths, 1), strict=True)
        ]
        assert_equal(packed, torch.cat(alone, dim=2), (q, k, values))


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_masks_hold_for_any_logits(size):
    """What is hidden has weight 0, not little weight, in float32 too."""
    q, k, values = make(2, 2, 2, 70, 70, columns=3, dtype=torch.float32)
    hidden = masks(2, 70, True, True, seed=4)
    hidden["padding_mask"][0] = True
    seen = (hidden["document"][:, :, None] == hidden["document"][:, None]) & hidden["padding_mask"][:, None]
    attention = AttentionWeights(q * size, k * size, causal=False, **hidden)
    before = attention.apply(values).detach()
    for sample, own in ((0, 3), (1, int(hidden["padding_mask"][1].nonzero()[0]))):
        other = torch.where(seen[sample, own, :, None], values[sample], 1e30)
        changed = attention.apply(values.index_copy(0, torch.tensor([sample]), other[None])).detach()
        assert torch.equal(changed[sample, :, own], before[sample, :, own])


def test_a_causal_row_does_not_know_later_tokens():
    q, k, values = make(1, 2, 2, 100, 100, columns=3, dtype=torch.float32)
    before = AttentionWeights(q, k, causal=True).apply(values)
    later = [torch.cat([tensor[..., :60, :], 1e4 * tensor[..., 60:, :]], dim=-2) for tensor in (q, k, values)]
    after = AttentionWeights(later[0], later[1], causal=True).apply(later[2])
    assert torch.equal(after[:, :, :60], before[:, :, :60]) and not torch.equal(after, before)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no sample", "no token"])
def test_nothing_to_do(shape):
    q, k, values = make(shape[0], 4, 2, shape[1], shape[1], columns=3)
    for causal, hidden in itertools.product([False, True], [False, True]):
        given = {"padding_mask": torch.ones(shape, dtype=torch.bool), "document": torch.zeros(shape, dtype=torch.int64)}
        rows = AttentionWeights(q, k, causal=causal, **given if hidden else {}).apply(values)
        assert rows.shape == (shape[0], 4, shape[1], 3)
        for grad, tensor in zip(torch.autograd.grad(rows.sum(), (q, k, values)), (q, k, values), strict=True):
            assert grad.shape == tensor.shape


def test_no_column():
    q, k, values = make(2, 4, 2, 5, 5, columns=0)
    assert AttentionWeights(q, k, causal=True).apply(values).shape == (2, 4, 5, 0)


def test_dtypes():
    q, k, values = make(2, 2, 2, 6, 6, columns=3)
    half = AttentionWeights(q.bfloat16(), k.bfloat16(), causal=True)
    assert half.apply(values.float()).dtype == torch.float32
    assert half.apply(values).dtype == torch.float64
    assert AttentionWeights(q, k, causal=True).apply(values.float()).dtype == torch.float64
    exact = AttentionWeights(q.bfloat16().double(), k.bfloat16().double(), causal=True).apply(values)
    torch.testing.assert_close(half.apply(values), exact, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_attention_of_torch(causal):
    """nn.MultiheadAttention returns its weights and its output; its output bias is no head's."""
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(module.in_proj_bias)
    x, values = torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(2, 7, 5, dtype=torch.float64)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    output, weights = module(x, x, x, attn_mask=later, average_attn_weights=False)
    projected = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = projected.view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    attention = AttentionWeights(q, k, causal=causal, v=v, w_out=module.out_proj.weight)
    torch.testing.assert_close(attention.apply(values), weights @ values[:, None], rtol=1e-12, atol=1e-12)
    heads = attention.head_contributions()
    assert heads.shape == (2, 3, 7, 12)
    torch.testing.assert_close(heads.sum(1) + module.out_proj.bias, output, rtol=1e-12, atol=1e-12)


def test_what_each_head_adds():
    generator = torch.Generator().manual_seed(0)
    q, k, _ = make(2, 4, 2, 5, 6, columns=1)
    v, w_out = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 2, 6, 3), (7, 12)))
    v, w_out = v.requires_grad_(), w_out.requires_grad_()
    attention = AttentionWeights(q, k, causal=True, v=v, w_out=w_out)
    expected = []
    for head in range(4):
        own = AttentionWeights(q[:, head : head + 1], k[:, head // 2 : head // 2 + 1], causal=True)
        rows = own.apply_reference(v[:, head // 2])[:, 0]
        expected.append(rows @ w_out[:, 3 * head : 3 * head + 3].T)
    assert_equal(attention.head_contributions(), torch.stack(expected, dim=1), (q, k, v, w_out))


def test_compiles():
    q, k, values = make(2, 4, 2, 9, 9, columns=3)
    hidden = masks(2, 9, True, True)

    def compute(q, k, values):
        return AttentionWeights(q, k, causal=True, **hidden).apply(values)

    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(q, k, values), compute(q, k, values), (q, k, values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 5, 3)}, r"q \(2, 4, 5, 3\) and k \(2, 2, 6, 8\): expected \[B, H, L, d\]"),
        ({"q": torch.zeros(4, 5, 8)}, r"expected \[B, H, L, d\] and \[B, Hkv, S, d\]"),
        ({"q": torch.zeros(2, 3, 5, 8)}, "3 heads of queries and 2 of keys: the second must divide the first"),
        ({"q": torch.zeros(2, 4, 7, 8)}, "7 queries and 6 keys: the queries are those of the last tokens"),
        ({"padding_mask": torch.ones(2, 5, dtype=torch.bool)}, r"padding_mask has shape \(2, 5\): expected \(2, 6\)"),
        ({"padding_mask": torch.ones(2, 6)}, r"padding_mask is torch.float32: expected torch.bool"),
        ({"document": torch.ones(6)}, r"document has shape \(6,\): expected \(2, 6\), one entry a key"),
        ({"mask": torch.ones(5, 5)}, r"mask has shape \(5, 5\): expected \[L, S\]"),
        ({"mask": torch.ones(6)}, r"mask has shape \(6,\)"),
        ({"v": torch.ones(2, 4, 6, 3)}, r"v has shape \(2, 4, 6, 3\): expected \(2, 2, 6, 'dv'\)"),
        ({"v": torch.ones(2, 2, 6, 3), "w_out": torch.ones(9, 8)}, r"w_out has shape \(9, 8\): expected \[D, 12\]"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_what_does_not_belong_together_is_refused(change, message):
    given = {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 6, 8)} | change
    with pytest.raises(ValueError, match=message):
        AttentionWeights(given.pop("q"), given.pop("k"), causal=True, **given)


def test_values_of_other_tokens_are_refused():
    attention = AttentionWeights(torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8), causal=True)
    with pytest.raises(ValueError, match=r"values have shape \(2, 5, 3\): expected \[2, 6, C\].*come from a cache"):
        attention.apply(torch.zeros(2, 5, 3))


def test_contributions_need_values_and_the_output_weight():
    q = torch.zeros(2, 4, 5, 8)
    with pytest.raises(ValueError, match="made without v and w_out.*gives AttentionWeights"):
        AttentionWeights(q, q, causal=True).head_contributions()
    with pytest.raises(ValueError, match="made without w_out"):
        AttentionWeights(q, q, causal=True, v=q).head_contributions()
