"""What every router promises, whatever it decides by: each listed one, and options that change how it decides."""

import copy
import json
import pickle

import pytest
import torch
from router_cases import CASES, LISTED, assert_same, dense, resized

from gatewright.routers import TokenContext, create_router

every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_router = pytest.mark.parametrize("case", LISTED, ids=repr)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def loss_of(routing, context):
    """A loss that every weight and every auxiliary loss enters, each weight with a factor of its own."""
    token, expert, weight = routing.as_list()
    place_T = torch.arange(routing.num_tokens) if context.real_T is None else context.real_T.cumsum(0) - 1
    return (weight * torch.sin(1 + place_T[token] + 3 * expert)).sum() + routing.loss


def gradients(router, x, context):
    x = x.clone().requires_grad_()
    routing = router(x, context)
    router.zero_grad()
    loss_of(routing, context).backward()
    return routing, {"x": x.grad} | {name: parameter.grad for name, parameter in router.named_parameters()}


@every_case
@both_modes
def test_a_decision_is_well_formed(case, training):
    router, x = case.create().train(training), case.tokens()
    routing = router(x, case.context)
    token, expert, weight = routing.as_list()
    assert routing.num_tokens == len(x) and routing.bank_size == router.bank_size == len(router.expert_kinds)
    assert token.shape == expert.shape == weight.shape and token.dim() == 1
    assert ((expert >= 0) & (expert < router.bank_size)).all() and ((token >= 0) & (token < len(x))).all()
    assert (token.diff() >= 0).all()
    assert len(set(zip(token.tolist(), expert.tolist(), strict=True))) == len(token), "a pair occurs twice"
    assert weight.dtype == torch.float32 and weight.isfinite().all()
    assert routing.logits.shape == routing.scores.shape == (len(x), router.bank_size)
    assert_same(routing.scores.sum(1), torch.ones(len(x)), "rows of scores")
    assert_same(routing.load_E(), expert.bincount(minlength=router.bank_size), "load")
    assert (routing.requested_E() >= routing.load_E()).all()
    assert all(loss.dim() == 0 and loss.isfinite() and loss.requires_grad for loss in routing.losses.values())
    assert set(routing.stats) <= set(router.reductions)
    assert not any(value.requires_grad for value in routing.stats.values())
    if training and router.stateful:
        assert set(routing.stats) == set(router.reductions)


@every_case
@both_modes
def test_forward_changes_nothing_and_repeats_itself(case, training):
    router, x = case.create().train(training), case.tokens()
    before, random_state = copy.deepcopy(router.state_dict()), torch.get_rng_state()
    first, second = router(x, case.context), router(x, case.context)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(router.state_dict(), before, "state", 0)
    assert_same(dense(second), dense(first), "weights", 0)
    assert_same(second.losses, first.losses, "losses", 0)


@every_case
def test_options_make_the_same_router_again(case):
    router = case.create()
    again = create_router(case.name, **json.loads(json.dumps(router.options)))
    assert again.options == router.options and again.expert_kinds == router.expert_kinds
    assert set(case.options) <= set(router.options)
    again.load_state_dict(router.state_dict())
    x = case.tokens()
    assert_same(dense(again(x, case.context)), dense(router(x, case.context)), "weights", 0)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert twin.options == router.options
        assert_same(dense(twin(x, case.context)), dense(router(x, case.context)), "weights", 0)


@every_case
def test_gradient_reaches_every_parameter_and_the_tokens(case):
    router = case.create()
    routing, grads = gradients(router, case.tokens(), case.context)
    if routing.prediction is not None and router.options.get("prediction_dim"):
        grads.pop("head.weight"), grads.pop("head.bias")  # a head of the recipe's own loss
    for name, grad in grads.items():
        assert grad is not None and grad.isfinite().all(), name
        one_choice = case.options["num_experts"] == 1 and case.name not in ("promoe", "race")
        # the softmax over one expert is 1 whatever the token is
        assert one_choice or grad.abs().max() > 0, name


@every_case
@both_modes
def test_padding_is_as_if_it_were_not_there(case, training):
    short = resized(case.context, 3, 5)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, :5] = True
    long = resized(case.context, 3, 9, padding_mask=mask)
    router = case.create(dtype=torch.float64).train(training)
    x = case.tokens(short, dtype=torch.float64)
    padded = torch.full((27, case.width), torch.nan, dtype=torch.float64)
    padded[1::2] = torch.inf
    padded[mask.flatten()] = x
    expected, expected_grads = gradients(router, x, short)
    actual, grads = gradients(router, padded, long)
    real = mask.flatten()
    assert dense(actual)[~real].isnan().all(), "a padded token is assigned"
    assert_same(dense(actual)[real], dense(expected), "weights", 1e-12)
    assert_same(actual.losses, expected.losses, "losses", 1e-12)
    assert_same(actual.stats, expected.stats, "statistics", 1e-12)
    assert_same(actual.load_E(), expected.load_E(), "load")
    assert_same(actual.requested_E(), expected.requested_E(), "requested load")
    assert (grads["x"][~real] == 0).all(), "gradient at padded tokens"
    grads["x"] = grads["x"][real]
    assert_same(grads, expected_grads, "gradient", 1e-10)


@every_case
@both_modes
def test_ragged_padding_may_hold_anything(case, training):
    lengths = torch.tensor([8, 1, 0, 5])
    mask = torch.arange(8)[None] < lengths[:, None]
    context = resized(case.context, 4, 8, padding_mask=mask)
    router = case.create().train(training)
    x = case.tokens(context)
    clean, clean_grads = gradients(router, x.masked_fill(~mask.flatten()[:, None], 0), context)
    dirty, dirty_grads = gradients(router, x.masked_fill(~mask.flatten()[:, None], torch.nan), context)
    assert_same(dense(dirty), dense(clean), "weights", 0)
    assert_same(dirty.losses, clean.losses, "losses", 0)
    assert_same(dirty.stats, clean.stats, "statistics", 0)
    assert_same(dirty_grads, clean_grads, "gradient", 0)
    assert all(grad is None or grad.isfinite().all() for grad in dirty_grads.values())


@every_case
@both_modes
@pytest.mark.parametrize(
    "shape", [(2, 4, True), (0, 8, False), (2, 0, False)], ids=["all padded", "no sample", "no length"]
)
def test_a_batch_without_a_real_token(case, training, shape):
    batch_size, length, padded = shape
    mask = torch.zeros(batch_size, length, dtype=torch.bool) if padded else None
    context = resized(case.context, batch_size, length, padding_mask=mask)
    router = case.create().train(training)
    x = torch.full((context.num_tokens, case.width), torch.nan)
    routing, grads = gradients(router, x, context)
    assert len(routing.as_list()[0]) == 0 and routing.load_E().sum() == 0
    assert routing.loss == 0 and all(loss == 0 for loss in routing.losses.values())
    assert all(grad is None or (grad == 0).all() for grad in grads.values())
    if training:
        before = copy.deepcopy(router.state_dict())
        router.update(routing.stats) if routing.stats else None
        assert_same(router.state_dict(), before, "state after an empty batch", 0)


@every_case
def test_padded_and_real_micro_batches_move_the_same_state(case):
    """An empty micro-batch beside a real one must not pull thresholds anywhere."""
    router = case.create()
    if not router.stateful:
        return
    real = router(case.tokens(), case.context).stats
    empty = router(
        torch.zeros(8, case.width), resized(case.context, 2, 4, padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    ).stats
    alone, together = copy.deepcopy(router), copy.deepcopy(router)
    with torch.no_grad():
        alone.update(real)
        together.update(
            {k: real[k] + empty[k] if router.reductions[k] == "sum" else torch.max(real[k], empty[k]) for k in real}
        )
    assert_same(together.state_dict(), alone.state_dict(), "state", 1e-6)


@every_case
@both_modes
def test_dtypes(case, training):
    router, x = case.create().train(training), case.tokens()
    expected = router(x.bfloat16().float(), case.context)
    actual = router(x.bfloat16(), case.context)
    assert_same(dense(actual), dense(expected), "weights of bfloat16 tokens", 0)
    with torch.autocast("cpu", torch.bfloat16):
        under = router(x.bfloat16().float(), case.context)
    assert under.logits.dtype == torch.float32
    assert_same(dense(under), dense(expected), "weights under autocast", 0)
    assert_same(under.losses, expected.losses, "losses under autocast", 0)

    double = copy.deepcopy(router).double()(x.double(), case.context)
    assert double.as_list()[2].dtype == double.logits.dtype == torch.float64

    half = copy.deepcopy(router).bfloat16()
    assert all(buffer.dtype == torch.float32 for buffer in half.buffers())
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    routing = half(x.bfloat16(), case.context)
    assert routing.as_list()[2].dtype == routing.logits.dtype == torch.float32


@every_case
@both_modes
def test_declared_independence_is_true(case, training):
    """Of other samples, and of later tokens of the own sample: where it is declared, and only there."""
    context = resized(case.context, 3, 12, null_mask=torch.zeros(3, dtype=torch.bool))
    router = case.create().train(training)
    if router.stateful and not training:
        router.train()
        with torch.no_grad():
            router.update(router(case.tokens(context), context).stats)  # thresholds of 0 would let everything pass
        router.eval()

    def decisions(x_BLD):
        return dense(router(x_BLD.flatten(0, 1), context)).view(3, 12, -1).nan_to_num(99)

    changed_batch = changed_later = False
    for seed in range(6):
        x = case.tokens(context, seed).view(3, 12, -1)
        for sample in range(3):
            other, later = 3 * case.tokens(context, seed + 6).view(3, 12, -1), x.clone()
            other[sample] = x[sample]
            later[sample, 5:] = 3 * case.tokens(context, seed + 9).view(3, 12, -1)[sample, 5:]
            before = decisions(x)[sample]
            changed_batch |= not torch.equal(decisions(other)[sample], before)
            changed_later |= not torch.equal(decisions(later)[sample, :5], before[:5])
    if case.options.get("top_k") == case.options["num_experts"]:
        # an expert that takes everything depends on nothing, and a router may declare less than is true
        assert not (router.batch_independent and changed_batch) and not (router.causal and changed_later)
    else:
        assert router.batch_independent == (not changed_batch)
        assert router.causal == (not changed_later)


@every_router
def test_missing_fields_are_named(case):
    router = case.create()
    x = torch.randn(6, case.width)
    bare = TokenContext(batch_size=2, length=3)
    for field in router.requires:
        with pytest.raises(
            ValueError, match=f'router "{router.name}" needs context.{field}, which is missing: the model'
        ):
            router(x, bare)
    if not router.requires:
        router(x, bare)
        router(x)
    with pytest.raises(ValueError, match=r"x has shape \(5, 16\): expected \[6, D\]"):
        router(torch.randn(5, case.width), bare)
    with pytest.raises(ValueError, match="x has shape"):
        router(torch.randn(2, 3, case.width), bare)


@every_router
def test_equal_scores_give_different_experts(case):
    router = case.create()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    for x in (case.tokens(), torch.zeros(case.context.num_tokens, case.width)):
        routing, grads = gradients(router, x, case.context)
        token, expert, weight = routing.as_list()
        assert len(set(zip(token.tolist(), expert.tolist(), strict=True))) == len(token)
        assert weight.isfinite().all() and routing.loss.isfinite()
        assert all(grad is None or grad.isfinite().all() for grad in grads.values())


@every_router
def test_compiled_routers_decide_the_same(case):
    torch._dynamo.reset()
    router, x = case.create(), case.tokens()
    expected, expected_grads = gradients(router, x, case.context)
    compiled = torch.compile(router, backend="aot_eager")
    x = x.requires_grad_()
    routing = compiled(x, case.context)
    router.zero_grad()
    loss_of(routing, case.context).backward()
    assert_same(dense(routing), dense(expected), "weights")
    assert_same(routing.losses, expected.losses, "losses")
    assert_same({"x": x.grad} | {n: p.grad for n, p in router.named_parameters()}, expected_grads, "gradient", 1e-5)


@every_case
def test_options_out_of_range_are_refused(case):
    bad = {"num_experts": [0, -1], "top_k": [0, 99], "init_std": [-1.0], "threshold_decay": [-0.1, 1.0, 1.5]}
    for option, values in bad.items():
        for value in values if option in case.create().options else []:
            with pytest.raises((ValueError, RuntimeError)):
                create_router(case.name, **case.options | {option: value})
