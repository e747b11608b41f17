"""What nobody means to hand a router: options of another type or out of range, logits that are no numbers, models that
decode left to right. Every listed router either decides something defined or says what to do.

What the kit looks at for every listed router is not repeated here: missing fields of the context
(``requires_is_true``), tokens that are all padded (``nothing_to_route``), one expert (``one_expert``), tokens of NaN
and infinities (``nonfinite_tokens``).
"""

import math
import typing

import pytest
import torch
from router_cases import CASES, LISTED, dense

from gatewright.moe import ExpertSpec, MoELayer
from gatewright.routers import GatedRouter, TokenContext, create_router, router_class, router_options


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=repr)


@by_name(LISTED)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "nonsense", [1]], ids=repr)
def test_no_option_takes_everything(case, value):
    """An option that takes what makes no sense would be ignored, or fail later, far from the mistake."""
    for option in router_options(case.name):
        if (option, value) == ("seed", -1):
            continue
        with pytest.raises(ValueError, match=option):
            create_router(case.name, **case.options | {option: value})


@by_name(LISTED)
def test_numbers_are_of_their_kind(case):
    """Half an expert, and True for a number or 1 for True, are mistakes."""
    hints = typing.get_type_hints(router_class(case.name)[0].__init__)
    for option in router_options(case.name):
        wrong = {int: [2.5, True], float: [True], bool: [1]}.get(hints[option], [])
        for value in wrong:
            with pytest.raises(ValueError, match=f"{option}={value}: choose (a whole|a number|True or False)"):
                create_router(case.name, **case.options | {option: value})


@by_name([case for case in LISTED if "top_k" in router_options(case.name)])
def test_more_experts_a_token_than_there_are(case):
    for top_k in (0, 99):
        with pytest.raises(ValueError, match=f"top_k={top_k}.*(choose|for others)"):
            create_router(case.name, **case.options | {"top_k": top_k})


@by_name(LISTED)
def test_a_width_is_at_least_1(case):
    with pytest.raises(ValueError, match="dim=0: choose at least 1"):
        create_router(case.name, **case.options | {"dim": 0})


@by_name(LISTED)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_causal_model_is_refused_by_the_layer_unless_allowed(case, training):
    x = case.tokens().view(case.context.batch_size, case.context.length, case.width)
    context = case.context.replace(causal=True)
    layer = MoELayer(case.create(), ExpertSpec(case.width, 4)).train(training)
    if layer.router.causal:
        layer(x, context)
    else:
        with pytest.raises(
            ValueError, match=r"is not causal in (training|evaluation).*MoELayer\(\.\.\., allow_noncaus"
        ):
            layer(x, context)
    allowed = MoELayer(case.create(), ExpertSpec(case.width, 4), allow_noncausal=True).train(training)
    assert allowed(x, context)[0].isfinite().all()


@by_name([case for case in CASES if router_class(case.name)[0].causal_option])
def test_the_option_that_makes_it_causal_does(case):
    """What the refusal names."""
    for training in (True, False):
        router = case.create().train(training)
        if router.causal:
            continue
        context = case.context.replace(causal=True)
        with pytest.raises(ValueError, match=f"Make it with {router.causal_option}, choose"):
            router(case.tokens(), context)
        told = eval(f"dict({router.causal_option})")
        options = {name: value for name, value in case.options.items() if name != "length"}  # of choice="expert" alone
        assert create_router(case.name, **options | told).train(training).causal


@by_name([case for case in LISTED if case.name not in ("hash", "modality")])
def test_tokens_of_another_width_are_refused(case):
    with pytest.raises(ValueError, match=r"x has shape \(\d+, \d+\): expected \[\d+, 16\], since the router was made"):
        case.create()(torch.zeros(case.context.num_tokens, 5), case.context)


GATED = [
    case
    for case in CASES
    if issubclass(router_class(case.name)[0], GatedRouter)
    and case.options["num_experts"] > max(1, case.options.get("top_k", 1))
]
# the logits of centroid are distances, and the weights of union may be 1 whatever the score
WEIGHT_IS_SCORE = [case for case in GATED if case.name not in ("centroid", "union")]


@by_name(GATED)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_logits_that_are_no_numbers(case, training):
    """An expert whose logit is -inf, as one that is switched off, and tokens whose logits are all -inf or NaN: ids stay
    in range and differ, and tokens that do not depend on others get what they get without those."""
    router = case.create().train(training)
    context = case.context
    with torch.no_grad():
        logits = router.logits(case.tokens(), context)
        logits[:, 1] = -torch.inf
        expected = router.assign(logits, router.scores(logits), context)
        logits = logits.clone()
        logits[3], logits[5] = -torch.inf, torch.nan
        routing = router.assign(logits, router.scores(logits), context)
    token, expert, weight = routing.as_list()
    assert ((expert >= 0) & (expert < router.bank_size)).all()
    assert len((token * router.bank_size + expert).unique()) == len(token)
    if router.batch_independent:
        same = torch.ones(len(logits), dtype=torch.bool)
        same[[3, 5]] = False
        if case.options.get("choice") == "expert" or case.options.get("patch", 1) > 1:
            same[: context.length] = False  # these tokens decide together
        torch.testing.assert_close(dense(routing)[same], dense(expected)[same], rtol=0, atol=0, equal_nan=True)


@by_name(WEIGHT_IS_SCORE)
def test_an_expert_that_is_switched_off_gets_no_weight(case):
    """Where others are left, an expert of logit -inf adds nothing."""
    router = case.create().eval()
    with torch.no_grad():
        logits = router.logits(case.tokens(), case.context)
        logits[:, 1] = -torch.inf
        weights = dense(router.assign(logits, router.scores(logits), case.context))
    assert (weights[:, 1].nan_to_num() == 0).all() and (weights.nan_to_num() != 0).any()


@pytest.mark.parametrize(("name", "field"), [("hash", "token_ids"), ("modality", "modality")])
def test_ids_out_of_range_are_named_unless_padded(name, field):
    case = next(case for case in LISTED if case.name == name)
    router, x = case.create(), case.tokens()
    ids = getattr(case.context, field)
    real = torch.arange(case.context.length).expand(ids.shape) < 6
    expected = router(x, case.context.replace(padding_mask=real))
    unnamed = case.context.replace(padding_mask=real, **{field: ids.masked_fill(~real, -100)})
    assert torch.equal(router(x, unnamed).index, expected.index)
    for wrong in (-1, 16):
        with pytest.raises(RuntimeError, match=f"context.{field} holds an id out of range: expected 0 to"):
            router(x, case.context.replace(**{field: ids.masked_fill(ids == 1, wrong)}))


def test_a_segment_longer_than_the_sequence_is_one_segment():
    router = create_router("segment", dim=6, num_experts=4, segment_size=9)
    x = torch.randn(2 * 4, 6, generator=torch.Generator().manual_seed(0))
    longer = torch.nn.functional.pad(x.view(2, 4, 6), (0, 0, 0, 5))
    routing = router(x, TokenContext(batch_size=2, length=4))
    whole = router(longer.flatten(0, 1), TokenContext.for_tokens(longer))
    assert torch.equal(routing.index.view(2, 4), whole.index.view(2, 9)[:, :4])
    assert (routing.index.view(2, 4) == routing.index.view(2, 4)[:, :1]).all()
    torch.testing.assert_close(routing.loss, whole.loss, rtol=0, atol=0)
