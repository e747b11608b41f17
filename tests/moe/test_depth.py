"""Tokens that skip blocks: who goes through, what it costs, and the limits in which nothing is skipped."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewright.moe.depth import GatedBlock, MixtureOfDepths, budget_loss
from gatewright.routers import TokenContext


class Mixing(nn.Module):
    """A block whose result at a token depends on all tokens that it may attend to, and on their positions."""

    def __init__(self, dim=6):
        super().__init__()
        torch.manual_seed(1)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.seen = []

    def forward(self, x, context):
        self.seen.append(context)
        position = context.position if context.position is not None else torch.arange(x.shape[1]).expand(x.shape[:2])
        q, k, v = self.qkv(x + torch.sin(position[..., None].to(x.dtype))).chunk(3, -1)
        keys = None if context.padding_mask is None else context.padding_mask[:, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys)


def tokens(batch=3, length=8, seed=0):
    return torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def depths(**options):
    torch.manual_seed(2)
    module = MixtureOfDepths(Mixing(), dim=6, **options).double()
    with torch.no_grad():
        module.score.normal_()
    return module


def test_everything_through_with_unit_weights_is_the_dense_block():
    module, x = depths(capacity=1.0, unit_weight=True), tokens()
    y, routing = module(x)
    torch.testing.assert_close(y, x + Mixing.forward(module.block, x, TokenContext.for_tokens(x)), rtol=0, atol=1e-12)
    assert routing.load_E().tolist() == [24]


def test_nothing_through_is_the_identity():
    module, x = depths(capacity=0.0), tokens().requires_grad_()
    y, routing = module(x)
    assert torch.equal(y, x) and routing.load_E().tolist() == [0] and not module.block.seen
    (y.sum() + routing.loss).backward()
    assert (x.grad != 0).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(0, 1), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_exactly_the_share_of_each_sample_moves(length, capacity, lengths):
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    module, x = depths(capacity=capacity), tokens(len(lengths), length)
    y, routing = module(x, TokenContext.for_tokens(x, padding_mask=mask))
    taken = torch.zeros(mask.numel()).index_fill(0, routing.as_list()[0], 1).view_as(mask)
    assert taken.sum(1).tolist() == (capacity * mask.sum(1)).round().tolist()
    assert not taken[~mask].any()
    clean = x.masked_fill(~mask[..., None], 0)
    assert torch.equal(y[taken == 0], clean[taken == 0])


def test_the_selected_go_among_themselves_at_their_positions():
    """By a loop over samples, with their gradients."""
    module, x = depths(capacity=0.4), tokens().requires_grad_()
    y, routing = module(x)
    expected, errors = [], []
    for sample in x:
        rho = sample @ module.score
        best = sorted(rho.detach().topk(3).indices.tolist())
        context = TokenContext(batch_size=1, length=3, position=torch.tensor([best]))
        added = Mixing.forward(module.block, sample[best][None], context)[0]
        row = sample.clone()
        row[best] = row[best] + rho[best, None] * added
        expected.append(row)
        target = torch.zeros(8, dtype=torch.float64).index_fill(0, torch.tensor(best), 1)
        errors.append(F.binary_cross_entropy_with_logits(rho, target, reduction="sum"))
    torch.testing.assert_close(y, torch.stack(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(routing.losses["depth"], 0.01 * sum(errors) / 24, rtol=0, atol=1e-12)
    inputs = [x, module.score, module.block.qkv.weight]
    ours = torch.autograd.grad(y.square().sum() + routing.loss, inputs)
    theirs = torch.autograd.grad(torch.stack(expected).square().sum() + 0.01 * sum(errors) / 24, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_inference_looks_at_the_token_alone_and_training_does_not():
    """A later token changes who is selected in training; at inference a block that does not mix keeps the past."""
    module, x = depths(capacity=0.4), tokens()
    later = x.clone()
    later[:, 5:] = 4 * tokens(seed=5)[:, 5:]

    def selected(of):
        taken = torch.zeros(24).index_fill(0, module(of)[1].as_list()[0], 1)
        return taken.view(3, 8)[:, :5]

    assert not torch.equal(selected(x), selected(later))
    module.eval()
    assert torch.equal(selected(x), selected(later))
    assert torch.equal(selected(x) > 0, (x @ module.score)[:, :5] > 0)
    assert module(x)[1].losses == {}


def test_a_causal_model_needs_the_prediction():
    x = tokens()
    with pytest.raises(ValueError, match="predict_weight=0 selects the best tokens"):
        depths(predict_weight=0.0)(x, TokenContext.for_tokens(x, causal=True))
    depths(predict_weight=0.1)(x, TokenContext.for_tokens(x, causal=True))
    without = depths(predict_weight=0.0, capacity=0.5)
    assert without(x)[1].losses == {}
    assert torch.equal(without(x)[0], without.eval()(x)[0])
    for options in ({"capacity": 1.5}, {"capacity": -0.1}, {"predict_weight": -1.0}):
        with pytest.raises(ValueError, match="choose"):
            depths(**options)


def test_the_block_is_told_the_fields_of_its_tokens():
    module, x = depths(capacity=0.25), tokens()
    ids = torch.arange(24).view(3, 8)
    context = TokenContext.for_tokens(x, token_ids=ids, modality=ids % 3, document=ids % 2, grid=(2, 4))
    _, routing = module(x, context)
    (seen,) = module.block.seen
    assert torch.equal(seen.token_ids.flatten(), routing.as_list()[0]) and seen.grid is None
    assert torch.equal(seen.modality, seen.token_ids % 3) and torch.equal(seen.document, seen.token_ids % 2)
    assert torch.equal(seen.position, seen.token_ids % 8)


def gated(**options):
    torch.manual_seed(2)
    return GatedBlock(Mixing(), dim=6, **options).double()


def noisy(x, **fields):
    return TokenContext.for_tokens(x, seed=0, step=0, sample_id=torch.arange(len(x)), **fields)


@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_are_the_identity_and_open_ones_the_block(training):
    x = tokens()
    closed, opened = gated(initial_logit=-50.0).train(training), gated(initial_logit=50.0).train(training)
    y, gate = closed(x, noisy(x))
    assert torch.equal(y, x) and (gate == 0).all()
    y, gate = opened(x, noisy(x))
    assert (gate == 1).all()
    torch.testing.assert_close(y, x + Mixing.forward(opened.block, x, noisy(x)), rtol=0, atol=1e-12)


def test_gates_at_inference_are_those_of_the_sign_and_repeat_themselves():
    module, x = gated(initial_logit=0.0).eval(), tokens()
    y, gate = module(x)
    logit = module.gate(x)[..., 0]
    assert torch.equal(gate > 0, logit > 0) and 0 < gate.sum() < gate.numel()
    assert torch.equal(module(x)[0], y) and not gate.requires_grad
    for sample in range(3):  # only open tokens are computed, and seen
        at = (gate[sample] > 0).nonzero()[:, 0]
        context = TokenContext(batch_size=1, length=len(at), position=at[None])
        added = Mixing.forward(module.block, x[sample, at][None], context)[0]
        torch.testing.assert_close(y[sample, at], x[sample, at] + added, rtol=0, atol=1e-12)
        assert torch.equal(y[sample, gate[sample] == 0], x[sample, gate[sample] == 0])


def test_gates_in_training_have_the_gradient_of_their_sigmoid():
    module, x = gated(initial_logit=0.0, temperature=0.7), tokens()
    context = noisy(x)
    y, gate = module(x, context)
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    uniform = context.noise(24, distribution="uniform").view(3, 8).double()
    soft = ((module.gate(x)[..., 0] + uniform.logit()) / 0.7).sigmoid()
    assert torch.equal(gate > 0, soft > 0.5)
    weight = module.gate[-1].weight
    ours = torch.autograd.grad((gate * torch.arange(24.0).view(3, 8)).sum(), weight, retain_graph=True)
    theirs = torch.autograd.grad((soft * torch.arange(24.0).view(3, 8)).sum(), weight)
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.grad(y.square().sum(), weight)[0].abs().sum() > 0
    assert not torch.equal(module(x, context.replace(step=1))[1], gate)
    with pytest.raises(ValueError, match="context.noise needs seed, step and sample_id"):
        module(x)
    with pytest.raises(ValueError, match="temperature=0"):
        gated(temperature=0)


@pytest.mark.parametrize("training", [True, False])
def test_decisions_are_of_full_precision_under_autocast(training):
    x = tokens().float()
    for module in (depths(capacity=0.5).float(), gated(initial_logit=0.0).float()):
        module.train(training)
        expected = module(x, noisy(x))[1]
        with torch.autocast("cpu", torch.bfloat16):
            decided = module(x, noisy(x))[1]
        if isinstance(module, MixtureOfDepths):
            expected, decided = expected.logits, decided.logits
        assert torch.equal(decided, expected) and decided.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: depths(capacity=0.5), lambda: gated(initial_logit=0.5)])
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_as_if_it_were_not_there(make, training):
    module, x = make().train(training), tokens(2, 5)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :5] = True
    long = torch.full((2, 8, 6), torch.nan, dtype=torch.float64)
    long[:, :5] = x
    # the noise is keyed by the place in the sample, so a longer sample keeps it
    expected, _ = module(x, noisy(x))
    actual, _ = module(long, noisy(long, padding_mask=mask))
    torch.testing.assert_close(actual[:, :5], expected, rtol=0, atol=1e-12)
    assert (actual[:, 5:] == 0).all()
    nobody, _ = module(long, noisy(long, padding_mask=torch.zeros_like(mask)))
    assert (nobody == 0).all()
    (nobody.sum() + 0 * sum(p.sum() for p in module.parameters())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 1000))
def test_the_budget_is_linear_in_the_gates(costs, target, seed):
    generator = torch.Generator().manual_seed(seed)
    gates = [torch.rand(2, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in costs]
    loss = budget_loss(gates, costs, target, weight=2.0)
    spent = sum(gate.mean() * cost for gate, cost in zip(gates, costs, strict=True)).item() / sum(costs)
    assert loss.item() == pytest.approx(2 * (spent - target) ** 2, abs=1e-12)
    for cost, grad in zip(costs, torch.autograd.grad(loss, gates), strict=True):
        assert grad.flatten().tolist() == pytest.approx([4 * (spent - target) * cost / sum(costs) / 10] * 10, abs=1e-9)
    ones = [torch.ones(2, 5) for _ in costs]
    assert budget_loss(ones, costs, 1.0) < 1e-12
    mask = torch.arange(5).expand(2, 5) < 3
    cut = [torch.cat([gate[:, :3], torch.full((2, 2), 9.0)], 1) for gate in gates]
    short = budget_loss([gate[:, :3] for gate in gates], costs, target).item()
    assert budget_loss(cut, costs, target, real_BL=mask).item() == pytest.approx(short)


def test_the_budget_refuses_what_does_not_belong_together():
    gate = torch.ones(1, 2)
    for gates, costs in ([[gate], [1.0, 2.0]], [[], []], [[gate], [0.0]]):
        with pytest.raises(ValueError, match="give each block's gate and its positive cost"):
            budget_loss(gates, costs, 0.5)
    with pytest.raises(ValueError, match="target=2"):
        budget_loss([gate], [1.0], 2.0)
