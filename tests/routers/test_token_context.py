"""TokenContext: what it refuses, and noise that no layout of the batch changes."""

import math

import pytest
import torch

from gatewright.routers import TokenContext, base


def noisy(sample_id, length=4, **fields):
    sample_id = torch.as_tensor(sample_id)
    fields = {"seed": 0, "step": 0} | fields
    return TokenContext(batch_size=len(sample_id), length=length, sample_id=sample_id, **fields)


@pytest.mark.parametrize(
    "field", ["padding_mask", "token_ids", "position", "document", "modality", "null_mask", "timestep", "sample_id"]
)
def test_every_shape_is_checked(field):
    per_sample = field in ("null_mask", "timestep", "sample_id")
    dtype = torch.bool if field.endswith("mask") else torch.int64
    right, wrong = ((2,), (3,)) if per_sample else ((2, 3), (3, 2))
    context = TokenContext(batch_size=2, length=3, **{field: torch.zeros(right, dtype=dtype)})
    assert context.has(field)
    with pytest.raises(ValueError, match=rf"context.{field} has shape \({wrong[0]},.*expected \(2,"):
        TokenContext(batch_size=2, length=3, **{field: torch.zeros(wrong, dtype=dtype)})
    with pytest.raises(ValueError, match="expected"):
        context.replace(batch_size=5)


def test_other_fields_are_checked():
    with pytest.raises(ValueError, match="at least 0"):
        TokenContext(batch_size=-1, length=3)
    with pytest.raises(ValueError, match=r"grid=\(2, 2\) has 4 cells: expected length=3"):
        TokenContext(batch_size=1, length=3, grid=(2, 2))
    with pytest.raises(ValueError, match=r"previous_logits has shape \(4, 5\): expected \[3, E\]"):
        TokenContext(batch_size=1, length=3, previous_logits=torch.zeros(4, 5))
    with pytest.raises(TypeError):
        TokenContext(batch_size=1, length=3, lenght=3)
    TokenContext(batch_size=1, length=6, grid=(2, 3), previous_logits=torch.zeros(6, 5))


@pytest.mark.parametrize("field", ["padding_mask", "null_mask"])
def test_masks_of_numbers_are_refused(field):
    """The tokenizers' masks are integers, of which ``~`` makes -1 and -2: both true."""
    shape = (2, 3) if field == "padding_mask" else (2,)
    with pytest.raises(ValueError, match=rf"{field} is torch.int64: expected torch.bool, give {field}.bool\(\)"):
        TokenContext(batch_size=2, length=3, **{field: torch.ones(shape, dtype=torch.int64)})
    with pytest.raises(ValueError, match="token_ids is torch.float32: expected integers"):
        TokenContext(batch_size=2, length=3, token_ids=torch.zeros(2, 3))


def test_contexts_of_tokens():
    x = torch.zeros(2, 3, 5)
    context = TokenContext.for_tokens(x, null_mask=torch.tensor([False, True]))
    assert (context.batch_size, context.length, context.num_tokens) == (2, 3, 6)
    assert context.null_T.tolist() == [False] * 3 + [True] * 3
    assert context.real_T is None
    flat = TokenContext.for_tokens(torch.zeros(7, 5))
    assert (flat.batch_size, flat.length) == (1, 7) and flat.null_T is None


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_noise_does_not_depend_on_the_layout(distribution, shape):
    ids = [11, 3, 2**40, 0, 77, 5]
    whole = noisy(ids).noise(24, *shape, distribution=distribution).view(6, 4, *shape)
    for first, last in ((0, 2), (2, 3), (3, 6)):
        part = noisy(ids[first:last]).noise(4 * (last - first), *shape, distribution=distribution)
        assert torch.equal(part.view(-1, 4, *shape), whole[first:last])
    shuffled = noisy(ids[::-1]).noise(24, *shape, distribution=distribution).view(6, 4, *shape)
    assert torch.equal(shuffled.flip(0), whole)
    # padding on the right moves no token's place in its sample
    longer = noisy(ids, length=9).noise(54, *shape, distribution=distribution).view(6, 9, *shape)
    assert torch.equal(longer[:, :4], whole)
    per_sample = noisy(ids).noise(6, *shape, distribution=distribution)
    assert torch.equal(per_sample[1:3], noisy(ids[1:3]).noise(2, *shape, distribution=distribution))


def test_noise_follows_every_part_of_its_key():
    def draw(stream=0, **key):
        return noisy([1, 2], **key).noise(8, 3, stream=stream)

    assert torch.equal(draw(), draw())
    draws = [draw(), draw(seed=1), draw(step=1), draw(layer=1), draw(stream=1), draw(seed=-1)]
    draws += [noisy([2, 3]).noise(8, 3), draw(step=2, layer=1), draw(step=1, layer=2)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            if not (one is draws[6] and other is draws[0]):
                assert (one == other).sum() == 0


def test_noise_is_distributed_as_said():
    context = noisy(torch.arange(64), length=128)
    normal = context.noise(8192, 32).double()
    uniform = context.noise(8192, 32, distribution="uniform", stream=1).double()
    count = normal.numel()
    for values, mean, deviation in ((normal, 0, 1), (uniform, 0.5, math.sqrt(1 / 12))):
        assert abs(values.mean() - mean) < 5 * deviation / math.sqrt(count)
        assert abs(values.std() - deviation) < 5 * deviation / math.sqrt(count)
    # Kolmogorov-Smirnov: the largest distance between both distribution functions, 1.95 / sqrt(n) at one in 1000
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    for cumulative in (uniform.flatten(), 0.5 * (1 + torch.erf(normal.flatten() / math.sqrt(2)))):
        assert (cumulative.sort().values - steps).abs().max() < 1.95 / math.sqrt(count)
    assert abs((normal**4).mean() - 3) < 5 * math.sqrt(96 / count)


@pytest.mark.parametrize("pair", ["samples", "tokens", "columns", "layers", "streams", "steps", "seeds"])
def test_neighbouring_noise_is_not_correlated(pair):
    ids = torch.arange(256)
    base = noisy(ids, length=32).noise(8192, 8).view(256, 32, 8)
    left, right = {
        "samples": (base[:-1], base[1:]),
        "tokens": (base[:, :-1], base[:, 1:]),
        "columns": (base[..., :-1], base[..., 1:]),
        "layers": (base, noisy(ids, length=32, layer=1).noise(8192, 8)),
        "streams": (base, noisy(ids, length=32).noise(8192, 8, stream=1)),
        "steps": (base, noisy(ids, length=32, step=1).noise(8192, 8)),
        "seeds": (base, noisy(ids, length=32, seed=1).noise(8192, 8)),
    }[pair]
    correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(left.numel())


@pytest.mark.parametrize("bits", [0, -1, 0x7FFFFF, 0xFFFFFF])
def test_noise_is_never_infinite(bits, monkeypatch):
    """The largest of 24 bits, centred, would round to 1 in float32, whose normal quantile is infinite."""
    monkeypatch.setattr(base, "_mix", lambda x: torch.full_like(x, bits))
    uniform = noisy([0]).noise(4, distribution="uniform")
    assert 0 < uniform.min() and uniform.max() < 1
    assert noisy([0]).noise(4).isfinite().all()


def test_noise_needs_its_key_and_a_shape_that_it_knows():
    with pytest.raises(ValueError, match="needs seed, step and sample_id"):
        TokenContext(batch_size=1, length=4, seed=0, step=0).noise(4)
    with pytest.raises(ValueError, match="must be 4 tokens or 1 samples"):
        noisy([0]).noise(3)
    with pytest.raises(ValueError, match='distribution="gumbel"'):
        noisy([0]).noise(4, distribution="gumbel")
    for empty in (noisy(torch.zeros(0, dtype=torch.int64)), noisy([0, 1], length=0)):
        assert empty.noise(0, 7).shape == (0, 7)
    assert noisy(torch.tensor([3], dtype=torch.int32)).noise(4).equal(noisy([3]).noise(4))
