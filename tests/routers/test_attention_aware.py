"""Attention-aware routing, against the definition with the attention written out."""

import math

import pytest
import torch
from operations import operations_of
from router_cases import assert_same, dense

from gatewright.kernels.attention import AttentionWeights
from gatewright.routers import TokenContext, create_router
from gatewright.routers.attention_aware import responsibility

DIM, EXPERTS, HEADS = 12, 5, 4
COMBINATIONS = [{"combine": "mean"}, {"combine": "posterior"}, {"combine": "learned", "num_heads": HEADS}]

every_combination = pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda options: options["combine"])


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    router = create_router("attention_aware", **{"dim": DIM, "num_experts": EXPERTS} | options)
    with torch.no_grad():
        router.base.weight.normal_()
        if router.head_logits is not None:
            router.head_logits.normal_()
    return router.to(dtype)


class Parts:
    """Tokens and an attention of 4 query heads and 2 key heads over them, as one leaf tensor each."""

    def __init__(self, batch_size, length, *, causal=False, dtype=torch.float64, seed=0, **masks):
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape):
            return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

        self.x, self.q = leaf(batch_size * length, DIM), leaf(batch_size, HEADS, length, 6)
        self.k, self.v = leaf(batch_size, 2, length, 6), leaf(batch_size, 2, length, 3)
        self.w_out, self.causal, self.masks = leaf(DIM, HEADS * 3), causal, masks
        self.attention = AttentionWeights(self.q, self.k, causal=causal, v=self.v, w_out=self.w_out, **masks)
        self.context = TokenContext(batch_size=batch_size, length=length, attention=self.attention, **masks)

    def weights(self):
        """A^h written out: [B, H, L, L]"""
        logits = self.q @ self.k.repeat_interleave(2, dim=1).transpose(2, 3) * 6**-0.5
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool)[None]
        if self.causal:
            seen = seen.tril()
        if "padding_mask" in self.masks:
            mask = self.masks["padding_mask"]
            seen = seen & mask[:, None] | ~mask[:, :, None]
        if "document" in self.masks:
            seen = seen & (self.masks["document"][:, None] == self.masks["document"][:, :, None])
        return logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)


def written_out(router, parts):
    """r~ [B, L, E], token by token where heads are weighed."""
    weights_BHLL, context = parts.weights(), parts.context
    batch_size, length = context.batch_size, context.length
    scores_BLE = (parts.x @ router.base.weight.T).softmax(1).view(batch_size, length, -1)
    rows = []
    for b in range(batch_size):
        for i in range(length):
            heads_HE = weights_BHLL[b, :, i] @ scores_BLE[b]
            if router.combine == "mean":
                share_H = torch.full((HEADS,), 1 / HEADS, dtype=torch.float64)
            elif router.combine == "learned":
                share_H = router.head_logits.softmax(0)
            else:
                o_HD = torch.stack(
                    [
                        (weights_BHLL[b, h, i] @ parts.v[b, h // 2]) @ parts.w_out[:, 3 * h : 3 * h + 3].T
                        for h in range(HEADS)
                    ]
                )
                distance_H = (o_HD.sum(0) - HEADS * o_HD).square().sum(1)
                share_H = (-distance_H / (2 * distance_H.detach().mean())).softmax(0)
            rows.append((1 - router.blend) * scores_BLE[b, i] + router.blend * (share_H @ heads_HE))
    return torch.stack(rows)


@every_combination
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("fields", [(), ("padding_mask",), ("padding_mask", "document")], ids=str)
@pytest.mark.parametrize("blend", [1.0, 0.6])
def test_equals_the_definition(combination, causal, fields, blend):
    router = make(causal=causal, blend=blend, **combination)
    given = {
        "padding_mask": torch.arange(7)[None] < torch.tensor([[7], [4], [0]]),
        "document": torch.tensor([4, 4, -1, 4, -1, 7, 7]).expand(3, -1),
    }
    parts = Parts(3, 7, causal=causal, **{name: given[name] for name in fields})
    real = torch.ones(21, dtype=torch.bool) if parts.context.real_T is None else parts.context.real_T
    routing, expected = router(parts.x, parts.context), written_out(router, parts)
    index, weight = routing.as_topk()
    assert_same(routing.scores[real], expected[real], "scores", 1e-12)
    assert_same(index[real], expected[real].topk(2).indices, "ids", 0)
    assert (index[~real] == -1).all()
    expected_weight = expected.gather(1, index.clamp(min=0))[real]
    assert_same(weight[real], expected_weight, "weights", 1e-12)
    factor = torch.randn(expected_weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = {"x": parts.x, "q": parts.q, "k": parts.k} | dict(router.named_parameters())
    if router.combine == "posterior":
        inputs |= {"v": parts.v, "w_out": parts.w_out}
    results = []
    for weights in (weight[real], expected_weight):
        results.append(torch.autograd.grad((weights * factor).sum(), list(inputs.values()), retain_graph=True))
    for name, grad, expected_grad in zip(inputs, *results, strict=True):
        assert_same(grad, expected_grad, f"gradient of {name}", 1e-10)
        assert grad.abs().max() > 0, name


def test_equal_heads_count_equally():
    """Then posterior and learned are the mean."""
    parts = Parts(2, 6)
    q, k, v = (tensor[:, :1].expand(-1, HEADS, -1, -1) for tensor in (parts.q, parts.k, parts.v))
    w_out = parts.w_out[:, :3].repeat(1, HEADS)
    context = parts.context.replace(attention=AttentionWeights(q, k, causal=False, v=v, w_out=w_out))
    mean = make()(parts.x, context).scores
    for combination in COMBINATIONS[1:]:
        assert_same(make(**combination)(parts.x, context).scores, mean, combination["combine"], 1e-12)
    scores = make(combine="posterior")(parts.x, context).scores
    (gradient,) = torch.autograd.grad(scores.square().sum(), parts.x)
    assert gradient.isfinite().all()


def test_learned_shares_start_equal():
    parts, router = Parts(2, 6), create_router("attention_aware", dim=DIM, num_experts=EXPERTS, **COMBINATIONS[2])
    assert_same(router.head_logits.detach(), torch.zeros(HEADS), "shares", 0)
    one = make(**COMBINATIONS[2])
    with torch.no_grad():
        one.head_logits.copy_(torch.tensor([0.0, 0.0, 800.0, 0.0]))
    only = AttentionWeights(parts.q[:, 2:3], parts.k[:, 1:2], causal=False)
    expected = make()(parts.x, parts.context.replace(attention=only)).scores
    assert_same(one(parts.x, parts.context).scores, expected, "one head", 1e-12)


def test_the_head_that_alone_comes_nearest_to_the_sum_counts_most():
    parts = Parts(1, 5)
    share_BHL = responsibility(parts.attention)
    part_BHLD = parts.attention.head_contributions()
    distance_BHL = (part_BHLD.sum(1, keepdim=True) - HEADS * part_BHLD).square().sum(-1)
    assert_same(share_BHL.sum(1), torch.ones(1, 5, dtype=torch.float64), "sum over the heads", 1e-12)
    assert torch.equal(share_BHL.argsort(1), distance_BHL.argsort(1, descending=True))


@pytest.mark.parametrize("base_options", [{}, {"score": "sigmoid", "renormalise": True}], ids=str)
def test_an_attention_to_oneself_is_the_base_gate(base_options):
    """S = 1: bit for bit."""
    router, parts = make(torch.float32, base_options=base_options), Parts(2, 6, dtype=torch.float32)
    own = 1e4 * torch.eye(6).expand(2, HEADS, -1, -1)
    context = parts.context.replace(attention=AttentionWeights(own, own, causal=False))
    smooth, plain = router(parts.x, context), router.base(parts.x, context)
    assert_same(dense(smooth), dense(plain), "weights", 0)
    assert_same(smooth.scores, plain.scores, "scores", 0)


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_an_even_attention_takes_the_mean_of_the_sequence(causal):
    router, parts = make(causal=causal), Parts(2, 6, causal=causal)
    even = AttentionWeights(torch.zeros_like(parts.q), parts.k, causal=causal)
    context = parts.context.replace(attention=even)
    plain = router.base(parts.x, context).scores.view(2, 6, -1)
    expected = (
        plain.cumsum(1) / torch.arange(1, 7)[:, None] if causal else plain.mean(1, keepdim=True).expand(-1, 6, -1)
    )
    assert_same(router(parts.x, context).scores, expected.flatten(0, 1), "scores", 1e-12)


def test_an_unsure_token_that_attends_to_a_sure_one_becomes_surer():
    """r_1 = (1/2, 1/2), r_2 = (1, 0), A_1 = (1/2, 1/2): from 0.693 to 0.562 nats."""
    router = create_router("attention_aware", dim=2, num_experts=2, top_k=1).double()
    with torch.no_grad():
        router.base.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, -60.0]]))
    even = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    context = TokenContext(batch_size=1, length=2, attention=AttentionWeights(even, even, causal=False))
    x = torch.eye(2, dtype=torch.float64)
    entropies = []
    for gate in (router.base, router):
        scores = gate(x, context).scores
        entropies.append(-torch.special.xlogy(scores, scores).sum(1))
    assert_same(entropies[0], torch.tensor([math.log(2), 0.0], dtype=torch.float64), "before", 1e-12)
    assert_same(entropies[1], torch.tensor([0.562335144618808] * 2, dtype=torch.float64), "after", 1e-12)


@every_combination
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_no_matrix_of_tokens_is_written(combination, causal, masked):
    length = 512
    position = torch.arange(length)[None]
    masks = {"padding_mask": position < 400, "document": position // 90} if masked else {}
    router, parts = make(torch.float32, causal=causal, **combination), Parts(1, length, causal=causal, **masks)
    inputs = [parts.x, parts.q, parts.k, *router.parameters()]
    operations = operations_of(lambda: router(parts.x, parts.context).as_list()[2], *inputs)
    operations.assert_fused(below=length**2)


@every_combination
@pytest.mark.parametrize("calls", [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [7, 3, 1, 1], [12]], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_decoding_decides_as_one_call(combination, calls, padded):
    router = make(causal=True, **combination).eval()
    mask = torch.arange(12)[None] >= torch.tensor([[0], [1], [calls[0] - 1]]) if padded else None
    parts = Parts(3, 12, causal=True, **({"padding_mask": mask} if padded else {}))
    whole = router(parts.x, parts.context.replace(layer=4))
    cache, end, scores, weights = {}, 0, [], []
    x = parts.x.view(3, 12, -1)
    for length in calls:
        start, end = end, end + length
        own = {"padding_mask": mask[:, :end]} if padded else {}
        # a model keeps k and v itself
        attention = AttentionWeights(
            parts.q[:, :, start:end], parts.k[:, :, :end], causal=True, v=parts.v[:, :, :end], w_out=parts.w_out, **own
        )
        now = TokenContext(batch_size=3, length=length, attention=attention, causal=True, layer=4, cache=cache)
        if padded:
            now = now.replace(padding_mask=mask[:, start:end])
        routing = router(x[:, start:end].flatten(0, 1), now)
        scores.append(routing.scores.view(3, length, -1))
        weights.append(dense(routing).view(3, length, -1))
    assert_same(torch.cat(scores, 1).flatten(0, 1), whole.scores, "scores", 1e-12)
    assert_same(torch.cat(weights, 1).flatten(0, 1), dense(whole), "weights", 1e-12)
    assert {name: tuple(tensor.shape) for name, tensor in cache["attention_aware.4"].items()} == {
        "scores": (3, 12, EXPERTS)
    }
    assert not cache["attention_aware.4"]["scores"].requires_grad


def test_a_missing_attention_is_named():
    with pytest.raises(ValueError, match='router "attention_aware" needs context.attention, which is missing'):
        make()(torch.zeros(6, DIM, dtype=torch.float64), TokenContext(batch_size=2, length=3))


@pytest.mark.parametrize("causal", [False, True])
def test_an_attention_that_is_not_as_said_is_refused(causal):
    """Otherwise the declared ``causal`` would not be true."""
    parts = Parts(2, 6, causal=causal)
    message = f"context.attention.causal is {causal}, and router .* causal={not causal}: make it with causal={causal}"
    with pytest.raises(ValueError, match=message):
        make(causal=not causal)(parts.x, parts.context)


def test_a_matrix_is_no_attention():
    context = TokenContext(batch_size=1, length=3, attention=torch.eye(3).expand(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"context.attention is a Tensor: give .*AttentionWeights\(q, k, causal="):
        create_router("attention_aware", dim=4, num_experts=2)(torch.zeros(3, 4), context)


def test_what_the_attention_lacks_is_said():
    parts = Parts(2, 6)
    with pytest.raises(ValueError, match="attention has 4 heads, and router .* made for 3: make it with num_heads=4"):
        make(combine="learned", num_heads=3)(parts.x, parts.context)
    bare = parts.context.replace(attention=AttentionWeights(parts.q, parts.k, causal=False))
    with pytest.raises(ValueError, match="this attention was made without v and w_out"):
        make(combine="posterior")(parts.x, bare)
    longer = AttentionWeights(parts.q[:, :, -2:], parts.k, causal=True)
    decoding = TokenContext(batch_size=2, length=2, attention=longer)
    with pytest.raises(ValueError, match=r"values have shape \(2, 2, 5\): expected \[2, 6, C\].*come from a cache"):
        make(causal=True)(parts.x[:4], decoding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "max"}, 'combine="max": choose one of'),
        ({"combine": "learned"}, 'combine="learned" needs num_heads'),
        ({"num_heads": 4}, 'combine="mean" takes no num_heads'),
        ({"combine": "learned", "num_heads": 0}, "num_heads=0: choose at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
