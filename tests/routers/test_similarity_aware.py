"""Similarity-aware routing, against the definition token by token."""

import itertools
import math

import pytest
import torch
from operations import operations_of
from router_cases import assert_same, dense

from gatewright.routers import TokenContext, create_router

DIM, EXPERTS = 12, 5
SIMILARITIES = ("identity", "lowrank", "full")


def make(dtype=torch.float64, **options):
    """A router with parameters of its own, not the initial ones."""
    torch.manual_seed(0)
    router = create_router("similarity_aware", **{"dim": DIM, "num_experts": EXPERTS, "rank": 4} | options)
    with torch.no_grad():
        router.base.weight.normal_()
        for parameter in (router.w_query, router.w_key):
            if parameter is not None:
                parameter += 0.3 * torch.randn_like(parameter)
    return router.to(dtype)


def tokens(count, seed=0, dtype=torch.float64):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def token_by_token(router, x, context):
    """r~ [T, E], by loops over the definition."""
    options, shape = router.options, (context.batch_size, context.length)
    tau = router.log_temperature.exp()[0] if options["learn_temperature"] else options["temperature"] or math.sqrt(DIM)
    w_query = torch.eye(DIM, dtype=x.dtype) if router.w_query is None else router.w_query
    w_s = w_query if router.w_key is None else w_query @ router.w_key.T
    real = torch.ones(shape, dtype=torch.bool) if context.padding_mask is None else context.padding_mask
    document = torch.zeros(shape, dtype=torch.int64) if context.document is None else context.document
    x = x.masked_fill(~real.flatten()[:, None], 0)
    scores = (x @ router.base.weight.T).softmax(1).view(*shape, -1)
    x = x.view(*shape, -1)
    u = x / (x.square().mean(2, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    rows = []
    for b, i in itertools.product(*map(range, shape)):
        if not real[b, i]:
            rows.append(scores[b, i])
            continue
        seen = [
            j
            for j in range(shape[1])
            if real[b, j] and document[b, j] == document[b, i] and (j <= i or not options["causal"])
        ]
        logits = torch.stack([(u[b, i] @ w_s) @ u[b, j] / tau for j in seen])
        average = (logits.softmax(0)[:, None] * scores[b, seen]).sum(0)
        rows.append((1 - options["blend"]) * scores[b, i] + options["blend"] * average)
    return torch.stack(rows)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("fields", [(), ("padding_mask",), ("document",), ("padding_mask", "document")], ids=str)
@pytest.mark.parametrize("rest", [{}, {"learn_temperature": True, "temperature": 2.0, "blend": 0.6}], ids=str)
def test_equals_the_definition(similarity, causal, fields, rest):
    router, x = make(similarity=similarity, causal=causal, **rest), tokens(3 * 7)
    given = {
        "padding_mask": torch.arange(7)[None] < torch.tensor([[7], [4], [0]]),
        "document": torch.tensor([4, 4, -1, 4, -1, 7, 7]).expand(3, -1),
    }
    context = TokenContext(batch_size=3, length=7, **{name: given[name] for name in fields})
    x.requires_grad_()
    inputs = [x, *router.parameters()]
    expected = token_by_token(router, x, context)
    routing = router(x, context)
    index, weight = routing.as_topk()
    assert_same(routing.scores, expected, "scores", 1e-12)
    real = torch.ones(21, dtype=torch.bool) if context.real_T is None else context.real_T
    assert_same(index[real], expected[real].topk(2).indices, "ids", 0)
    expected_weight = expected.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0)
    assert_same(weight, expected_weight, "weights", 1e-12)
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    losses = [
        ((w * factor.gather(1, index.clamp(min=0))).sum() + (s * factor).sum())
        for w, s in ((weight, routing.scores), (expected_weight, expected))
    ]
    grads, expected_grads = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses)
    for (name, _), grad, expected_grad in zip(
        [("x", x), *router.named_parameters()], grads, expected_grads, strict=True
    ):
        assert_same(grad, expected_grad, f"gradient of {name}", 1e-10)


@pytest.mark.parametrize("base_options", [{}, {"score": "sigmoid", "renormalise": True}], ids=str)
def test_cold_it_follows_the_token_itself(base_options):
    """tau -> 0 with W_s = 1: of normalised tokens none is more like one than itself. Bit for bit the base gate."""
    router, x = make(torch.float32, temperature=1e-6, base_options=base_options), tokens(40, dtype=torch.float32)
    context = TokenContext(batch_size=2, length=20)
    smooth, plain = router(x, context), router.base(x, context)
    assert_same(dense(smooth), dense(plain), "weights", 0)
    assert_same(smooth.scores, plain.scores, "scores", 0)


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_hot_it_takes_the_mean_of_the_sequence(causal):
    """tau -> infinity: the mean gate of the own document, so far if causal; its sums over tokens are the plain ones."""
    router, x = make(temperature=1e14, causal=causal, similarity="full"), tokens(2 * 10)
    mask = torch.arange(10)[None] < torch.tensor([[10], [7]])
    document = torch.arange(10).expand(2, -1) // 6
    context = TokenContext(batch_size=2, length=10, padding_mask=mask, document=document)
    smooth, plain = router(x, context).scores.view(2, 10, -1), router.base(x, context).scores.view(2, 10, -1)
    for sample, (start, end) in ((0, (0, 6)), (0, (6, 10)), (1, (0, 6)), (1, (6, 7))):
        own, count = plain[sample, start:end], torch.arange(1, end - start + 1)[:, None]
        expected = own.cumsum(0) / count if causal else own.mean(0).expand_as(own)
        assert_same(smooth[sample, start:end], expected, "scores", 1e-12)
        if not causal:  # S is doubly stochastic
            assert_same(smooth[sample, start:end].sum(0), own.sum(0), "sums", 1e-12)


def test_an_unsure_token_beside_a_sure_one_becomes_surer():
    """r_1 = (1/2, 1/2), r_2 = (1, 0), S_1 = (1/2, 1/2): from 0.693 to 0.562 nats. And r_2 becomes less sure."""
    router = create_router("similarity_aware", dim=2, num_experts=2, top_k=1, temperature=1e14).double()
    with torch.no_grad():
        router.base.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, -60.0]]))
    x = torch.eye(2, dtype=torch.float64)
    plain, smooth = (gate(x).scores for gate in (router.base, router))
    before, after = (-torch.special.xlogy(scores, scores).sum(1) for scores in (plain, smooth))
    assert_same(before, torch.tensor([0.693147180559945, 0.0], dtype=torch.float64), "before", 1e-12)
    assert_same(after, torch.tensor([0.562335144618808] * 2, dtype=torch.float64), "after", 1e-12)


def test_noise_of_the_tokens_moves_fewer_decisions():
    """Clusters of tokens, noise of a fifth of their deviation: about 31 and 12 % of the sets of two experts change, as
    means over 16 draws; no single draw need agree. (Drift of the gate itself is not damped so.)"""
    moved = torch.zeros(2)
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        centres, noise = torch.randn(6, 32, generator=generator), torch.randn(2, 64, 32, generator=generator)
        clean = centres[torch.randint(6, (64,), generator=generator)] + 0.3 * noise[0]
        router = create_router("similarity_aware", dim=32, num_experts=16, top_k=2)
        with torch.no_grad():
            router.base.weight.normal_(0, 32**-0.5, generator=generator)
        for which, gate in enumerate((router.base, router)):
            before, after = (gate(x).as_topk()[0].sort(1).values for x in (clean, clean + 0.2 * noise[1]))
            moved[which] += (before != after).any(1).float().mean() / 16
    assert moved[1] < moved[0] - 0.1, moved


def test_tokens_in_another_order_are_decided_in_that_order():
    router, x, order = (
        make(similarity="full"),
        tokens(15),
        torch.randperm(15, generator=torch.Generator().manual_seed(1)),
    )
    before, after = router(x), router(x[order])
    assert_same(dense(after), dense(before)[order], "weights", 1e-12)
    assert not torch.equal(dense(make(causal=True)(x[order])).isnan(), dense(make(causal=True)(x)).isnan()[order])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_it_starts_at_the_identity(similarity):
    torch.manual_seed(0)
    router = create_router("similarity_aware", dim=32, num_experts=4, similarity=similarity, rank=4096)
    w_query = torch.eye(32) if router.w_query is None else router.w_query
    w_s = w_query if router.w_key is None else w_query @ router.w_key.T
    assert_same(w_s, torch.eye(32), "W_s", 0.1 if similarity == "lowrank" else 0)


def test_the_length_of_a_token_does_not_matter_for_the_similarity():
    router, x = make(), tokens(8)
    eye, context = torch.eye(8, dtype=torch.float64)[None], TokenContext(batch_size=1, length=8)
    assert_same(router.average(100 * x, eye, context), router.average(x, eye, context), "S", 1e-12)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_no_matrix_of_tokens_is_written(similarity, causal, masked):
    length = 512
    router, x = make(torch.float32, similarity=similarity, causal=causal), tokens(length, dtype=torch.float32)
    position = torch.arange(length)[None]
    fields = {"padding_mask": position < 400, "document": position // 90} if masked else {}
    context = TokenContext(batch_size=1, length=length, **fields)
    x.requires_grad_()
    operations = operations_of(lambda: router(x, context).as_list()[2], x, *router.parameters())
    operations.assert_fused(below=length**2)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("calls", [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [7, 3, 1, 1], [12]], ids=str)
@pytest.mark.parametrize("padded", ["", "mask in the first call", "mask in every call"])
def test_decoding_decides_as_one_call(similarity, calls, padded):
    router, x = make(similarity=similarity, causal=True, learn_temperature=True).eval(), tokens(3 * 12).view(3, 12, -1)
    # shorter prompts are padded on the left
    mask = torch.arange(12)[None] >= torch.tensor([[0], [1], [calls[0] - 1]]) if padded else None
    context = TokenContext(batch_size=3, length=12, padding_mask=mask, causal=True, layer=4)
    whole = router(x.flatten(0, 1), context)
    cache, start, scores, weights = {}, 0, [], []
    for length in calls:
        own = mask[:, start : start + length] if padded and (not start or "every" in padded) else None
        now = TokenContext(batch_size=3, length=length, padding_mask=own, causal=True, layer=4, cache=cache)
        routing = router(x[:, start : start + length].flatten(0, 1), now)
        scores.append(routing.scores.view(3, length, -1))
        weights.append(dense(routing).view(3, length, -1))
        start += length
    assert_same(torch.cat(scores, 1).flatten(0, 1), whole.scores, "scores", 1e-12)
    assert_same(torch.cat(weights, 1).flatten(0, 1), dense(whole), "weights", 1e-12)
    assert cache.keys() == {"similarity_aware.4"}
    held = cache["similarity_aware.4"]
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    width = 4 if similarity == "lowrank" else DIM
    assert shapes == {"scores": (3, 12, EXPERTS), "key": (3, 12, width), "padding_mask": (3, 12)}
    assert not any(tensor.requires_grad for tensor in held.values())


def test_beams_are_reordered_by_the_first_dimension_and_taken_back_by_the_second():
    router, x = make(causal=True).eval(), tokens(3 * 9).view(3, 9, -1)
    cache, beams = {}, torch.tensor([2, 0, 0])
    router(x[:, :6].flatten(0, 1), TokenContext(batch_size=3, length=6, causal=True, cache=cache))
    for entry in cache.values():
        for name, tensor in entry.items():
            entry[name] = tensor[beams, :5]
    x = torch.cat([x[beams, :5], x[:, 6:]], dim=1)
    routing = router(x[:, 5:].flatten(0, 1), TokenContext(batch_size=3, length=3, causal=True, cache=cache))
    whole = router(x.flatten(0, 1), TokenContext(batch_size=3, length=8, causal=True))
    assert_same(routing.scores.view(3, 3, -1), whole.scores.view(3, 8, -1)[:, 5:], "scores", 1e-12)


def test_documents_come_with_every_call_or_with_none():
    router, x, document = make(causal=True).eval(), tokens(8), torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1]])
    whole = router(x, TokenContext(batch_size=1, length=8, document=document, causal=True))
    cache, scores = {}, []
    for start, end in ((0, 4), (4, 7), (7, 8)):
        now = TokenContext(batch_size=1, length=end - start, document=document[:, start:end], causal=True, cache=cache)
        scores.append(router(x[start:end], now).scores)
    assert_same(torch.cat(scores), whole.scores, "scores", 1e-12)
    with pytest.raises(ValueError, match=r'context.cache\["similarity_aware.0"\] holds .*document.*in every call'):
        router(x[:1], TokenContext(batch_size=1, length=1, causal=True, cache=cache))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "cosine"}, 'similarity="cosine": choose one of'),
        ({"rank": 0}, "rank=0: choose at least 1"),
        ({"temperature": 0.0}, "temperature=0.0: choose a positive number, or None"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
