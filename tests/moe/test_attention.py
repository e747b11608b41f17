"""Attention that routes: held to the released code, to full attention, and to loops."""

import pytest
import torch
import torch.nn.functional as F
from golden import assert_equal, load_golden

from gatewright.moe import ExpertSpec, FeedForward, MoELayer
from gatewright.moe.attention import BiLevelRoutingAttention, ModalityAttention, RoutedHeadAttention
from gatewright.routers import Router, Routing, TokenContext, create_router


def bra(**options):
    torch.manual_seed(0)
    return BiLevelRoutingAttention(**{"dim": 12, "num_heads": 3, "regions": 3, "top_k": 2} | options).double()


def tokens(batch, length, dim=12, seed=1):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_attention(attention, x, scale):
    """Every token of the sample, and the convolution of v."""
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = [part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(-1, -2) * scale).softmax(-1)
    return (weights @ heads[2]).transpose(1, 2).flatten(2), v


def test_equals_the_released_code():
    case, meta = load_golden("biformer_attention")
    heads, top_k, regions = (int(meta[key]) for key in ("heads", "topk", "regions"))
    x = case["x"].flatten(2).transpose(1, 2).requires_grad_()
    attention = BiLevelRoutingAttention(
        dim=x.shape[-1], num_heads=heads, regions=regions, top_k=top_k, local_kernel=int(meta["lce"])
    ).double()
    names = {"qkv": "qkv_linear", "out": "output_linear", "local": "lepe"}
    parameters = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in names.items() for part in ("weight", "bias")}
    with torch.no_grad():
        for ours, theirs in parameters.items():
            attention.get_parameter(ours).copy_(case[f"param.{theirs}"].view_as(attention.get_parameter(ours)))
    y, chosen = attention(x, (14, 14))
    assert chosen.shape == (2, 49, 4)
    assert_equal(y.transpose(1, 2), case["y"].flatten(2), "y")
    y.square().mean().backward()
    assert_equal(x.grad.transpose(1, 2), case["grad_x"].flatten(2), "gradient of x")
    for ours, theirs in parameters.items():
        assert_equal(attention.get_parameter(ours).grad, case[f"grad.{theirs}"], f"gradient of {theirs}")


@pytest.mark.parametrize("scale", ["dim", "head"])
@pytest.mark.parametrize("regions, grid", [(3, (6, 9)), (1, (4, 5)), (3, (7, 5)), (2, (1, 3)), (4, (2, 2))])
def test_looking_at_every_region_is_full_attention(scale, regions, grid):
    attention = bra(regions=regions, top_k=regions**2, scale=scale)
    x = tokens(2, grid[0] * grid[1])
    y, chosen = attention(x, grid)
    expected, v = full_attention(attention, x, 12**-0.5 if scale == "dim" else 4**-0.5)
    expected = expected + attention.local(v.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y, attention.out(expected), rtol=0, atol=1e-12)
    assert chosen.sort(-1).values.eq(torch.arange(regions**2)).all()
    other = bra(regions=regions, top_k=regions**2, scale="head" if scale == "dim" else "dim")(x, grid)[0]
    assert (other - y).abs().max() > 1e-6, "the two scales must differ"


@pytest.mark.parametrize("mask_padding", [True, False])
def test_regions_by_a_loop(mask_padding):
    """Means over real tokens, the best regions, and softmax over their tokens; padding as zeros where it is let in."""
    attention = bra(local_kernel=0, mask_padding=mask_padding)
    grid, side = (5, 7), (2, 3)
    x = tokens(2, 35)
    q, k, v = (part.unflatten(1, grid) for part in attention.qkv(x).chunk(3, dim=-1))
    cells = [
        [(h, w) for h in range(r // 3 * 2, r // 3 * 2 + 2) for w in range(r % 3 * 3, r % 3 * 3 + 3)] for r in range(9)
    ]
    inside = [[(h, w) for h, w in region if h < 5 and w < 7] for region in cells]
    assert side == (2, 3) and any(len(a) != len(b) for a, b in zip(cells, inside, strict=True))
    y, chosen = attention(x, grid)
    for b in range(2):
        mean = lambda part, region: torch.stack([part[b, h, w] for h, w in region]).mean(0)  # noqa: B023, E731
        for r, region in enumerate(inside):
            affinity = [(mean(q, region) @ mean(k, other)).item() for other in inside]
            best = sorted(range(9), key=lambda i: -affinity[i])[:2]
            assert chosen[b, r].tolist() == best
            seen = [cell for i in best for cell in (inside if mask_padding else cells)[i]]
            zero = torch.zeros(12, dtype=torch.float64)
            keys = torch.stack([k[b, h, w] if h < 5 and w < 7 else zero for h, w in seen]).view(-1, 3, 4)
            values = torch.stack([v[b, h, w] if h < 5 and w < 7 else zero for h, w in seen]).view(-1, 3, 4)
            for h, w in region:
                weights = (torch.einsum("nd,snd->ns", q[b, h, w].view(3, 4), keys) * 12**-0.5).softmax(-1)
                out = attention.out(torch.einsum("ns,snd->nd", weights, values).flatten())
                torch.testing.assert_close(y[b, h * 7 + w], out, rtol=0, atol=1e-12)


def test_the_routing_has_no_gradient_and_its_order_no_meaning(monkeypatch):
    attention = bra()
    x = tokens(1, 36).requires_grad_()
    y, chosen = attention(x, (6, 6))
    (expected,) = torch.autograd.grad(y.square().sum(), x)

    topk = torch.Tensor.topk

    def reversed_and_cut(self, *args, **kwargs):
        assert not self.requires_grad, "the affinity has a gradient"
        result = topk(self, *args, **kwargs)
        return type("Result", (), {"indices": result.indices.flip(-1)})

    monkeypatch.setattr(torch.Tensor, "topk", reversed_and_cut)
    again, flipped = attention(x, (6, 6))
    assert torch.equal(flipped, chosen.flip(-1))
    torch.testing.assert_close(again, y, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(again.square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 5}, "num_heads=5: choose a divisor of dim=12"),
        ({"top_k": 10}, r"top_k=10, regions=3: choose 1 to regions\^2=9"),
        ({"top_k": 0}, "top_k=0"),
        ({"scale": "none"}, 'scale="none": choose'),
        ({"local_kernel": 4}, "local_kernel=4: choose an odd size"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        bra(**options)
    with pytest.raises(ValueError, match=r"grid=\(2, 3\) has 6 cells: expected the 9 tokens"):
        bra()(tokens(1, 9), (2, 3))


class Given(Router):
    """The assignment that a test gives."""

    evidence = "paper"
    causal = True

    def __init__(self, mask, weight):
        super().__init__(num_experts=mask.shape[1])
        self.mask, self.given = mask, weight

    def forward(self, x, context):
        return Routing.from_mask(self.mask, self.given)


def routed_heads(mask, weight, **options):
    torch.manual_seed(0)
    return RoutedHeadAttention(Given(mask, weight), dim=12, num_heads=3, **options).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_head_on_is_multi_head_attention(causal, bias):
    ones = torch.ones(14, 3, dtype=torch.float64)
    attention = routed_heads(ones > 0, ones, causal=causal, bias=bias)
    x = tokens(2, 7)
    heads = [part.unflatten(-1, (3, 4)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1)]
    expected = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x)[0], attention.out(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_by_a_loop(causal):
    """Values and gradients, with a head that has nobody and a token that has no head."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(14, 3, generator=generator) < 0.5
    mask[:7, 1], mask[4] = False, False
    weight = torch.rand(14, 3, generator=generator, dtype=torch.float64).requires_grad_()
    attention = routed_heads(mask, weight, causal=causal)
    x = tokens(2, 7).requires_grad_()
    q, k, v = (part.flatten(0, 1).view(14, 3, 4) for part in attention.qkv(x).chunk(3, dim=-1))
    rows = []
    for t in range(14):
        parts = []
        for h in range(3):
            seen = [s for s in range(14) if mask[s, h] and s // 7 == t // 7 and (s <= t or not causal)]
            if not mask[t, h]:
                parts.append(torch.zeros(4, dtype=torch.float64))
                continue
            weights = torch.stack([q[t, h] @ k[s, h] / 2 for s in seen]).softmax(0)
            parts.append(weight[t, h] * sum(w * v[s, h] for w, s in zip(weights, seen, strict=True)))
        rows.append(torch.cat(parts))
    expected = attention.out(torch.stack(rows)).view(2, 7, 12)
    y, _ = attention(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    inputs = [x, weight, attention.qkv.weight]
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_nobody_anywhere():
    nothing = torch.zeros(14, 3, dtype=torch.float64)
    attention = routed_heads(nothing > 0, nothing)
    x = tokens(2, 7).requires_grad_()
    y, _ = attention(x)
    assert (y == 0).all()
    y.sum().backward()
    assert (x.grad == 0).all()


def test_a_trained_router_chooses_heads():
    torch.manual_seed(0)
    router = create_router("topk", dim=12, num_experts=3, top_k=2)
    attention = RoutedHeadAttention(router, dim=12, num_heads=3, causal=True)
    x = tokens(2, 7).float()
    y, routing = attention(x)
    y.square().mean().backward()
    assert router.weight.grad.abs().sum() > 0 and routing.load_E().sum() == 28
    later = x.clone()
    later[:, 5:] += 1
    torch.testing.assert_close(attention(later)[0][:, :5], y[:, :5])
    padded = TokenContext.for_tokens(x, padding_mask=torch.arange(7).expand(2, 7) < 5)
    nan = x.clone()
    nan[:, 5:] = torch.nan
    torch.testing.assert_close(attention(nan, padded)[0][:, :5], y[:, :5])
    with pytest.raises(ValueError, match="addresses 4 experts.*expected 3 routed ones, one a head"):
        RoutedHeadAttention(create_router("topk", dim=12, num_experts=4), dim=12, num_heads=3)


def test_a_model_that_decodes_left_to_right_needs_causal_attention():
    x, ones = tokens(2, 7), torch.ones(14, 3, dtype=torch.float64)
    context = TokenContext.for_tokens(x, causal=True, modality=torch.zeros(2, 7, dtype=torch.int64))
    heads, modalities = routed_heads(ones > 0, ones), modality_attention(True)
    heads.router.allow_noncausal = True
    for attention in (heads, modalities):
        with pytest.raises(ValueError, match="was made with causal=False.*make it with causal=True"):
            attention(x, context)
    # a mask may say it instead, as where an image's tokens see each other
    by_mask = modalities(x, context, mask=torch.ones(2, 7, 7, dtype=torch.bool).tril())
    torch.testing.assert_close(by_mask, modality_attention(True, causal=True)(x, context), rtol=0, atol=1e-12)


def modality_attention(tied, **options):
    torch.manual_seed(0)
    attention = ModalityAttention(dim=12, num_heads=3, num_modalities=3, **options).double()
    if tied:
        with torch.no_grad():
            for linear in (attention.qkv, attention.out):
                linear.weight.copy_(linear.weight[:1].expand_as(linear.weight))
    return attention


@pytest.mark.parametrize("causal", [False, True])
def test_tied_modalities_are_multi_head_attention(causal):
    attention, x = modality_attention(True, causal=causal), tokens(2, 7).requires_grad_()
    modality = torch.tensor([[0, 2, 2, 1, 0, 0, 2], [2] * 7])
    heads = F.linear(x, attention.qkv.weight[0]).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)
    expected = F.linear(expected, attention.out.weight[0])
    y = attention(x, TokenContext.for_tokens(x, modality=modality))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(of.square().sum(), x, retain_graph=True)[0] for of in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_modalities_that_do_not_see_each_other_are_independent(causal):
    attention, x = modality_attention(False, causal=causal), tokens(1, 6)
    modality = torch.tensor([[0, 1, 0, 1, 1, 2]])
    context = TokenContext.for_tokens(x, modality=modality)
    same = modality[:, :, None] == modality[:, None, :]
    y = attention(x, context, mask=same)
    for m in range(3):
        at = (modality[0] == m).nonzero()[:, 0]
        alone = attention(x[:, at], TokenContext.for_tokens(x[:, at], modality=modality[:, at]))
        torch.testing.assert_close(y[:, at], alone, rtol=0, atol=1e-12)
    together = attention(x, context)
    assert (together - y).abs().max() > 1e-3, "modalities must see each other where nothing keeps them apart"


def test_modalities_and_padding():
    attention, x = modality_attention(False, causal=True), tokens(2, 6)
    modality = torch.arange(12).view(2, 6) % 3
    expected = attention(x[:, :4], TokenContext.for_tokens(x[:, :4], modality=modality[:, :4]))
    mask = torch.arange(6).expand(2, 6) < 4
    y = attention(x, TokenContext.for_tokens(x, modality=modality, padding_mask=mask))
    torch.testing.assert_close(y[:, :4], expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="context.modality is missing"):
        attention(x, TokenContext.for_tokens(x))
    dirty, unnamed = x.masked_fill(~mask[..., None], torch.nan), modality.masked_fill(~mask, -100)
    again = attention(dirty, TokenContext.for_tokens(x, modality=unnamed, padding_mask=mask))
    torch.testing.assert_close(again[:, :4], y[:, :4], rtol=0, atol=0)
    for wrong in (-1, 3):
        with pytest.raises(RuntimeError, match="context.modality holds an id out of range: expected 0 to 2"):
            attention(x, TokenContext.for_tokens(x, modality=modality.masked_fill(modality == 1, wrong)))
    with pytest.raises(ValueError, match="num_modalities=0"):
        ModalityAttention(dim=12, num_heads=3, num_modalities=0)


def test_a_layer_of_tied_modalities_is_dense():
    """The other half of the Mixture-of-Transformers block: the layer with the ``modality`` router."""
    layer = MoELayer(create_router("modality", num_experts=3), ExpertSpec(12, 20)).double()
    dense = FeedForward(layer.spec).double()
    with torch.no_grad():
        layer.experts.w1.copy_(dense.up.weight.expand_as(layer.experts.w1))
        layer.experts.w2.copy_(dense.down.weight.expand_as(layer.experts.w2))
    x = tokens(2, 6)
    y, routing = layer(x, TokenContext.for_tokens(x, modality=torch.arange(12).view(2, 6) % 3))
    torch.testing.assert_close(y, dense(x), rtol=0, atol=1e-12)
    assert routing.load_E().tolist() == [4, 4, 4]
    with pytest.raises(RuntimeError, match="context.modality holds an id out of range: expected 0 to 2"):
        layer(x, TokenContext.for_tokens(x, modality=torch.full((2, 6), 3)))
    with pytest.raises(ValueError, match='router "modality" needs context.modality'):
        layer(x)
