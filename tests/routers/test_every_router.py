"""What every router promises, whatever it decides by: the kit, over each listed one and over options that change how it
decides.

A router by its own example meets every check. Its option variants leave out those that say nothing new of them:
``options_are_used`` starts from the variants already, and compiling costs seconds. `make evidence` leaves out nothing.
"""

import functools

import pytest
import torch
from router_cases import CASES, LISTED, VARIANTS

from gatewright.moe.conformance import CHECKS, Subject, run_check
from gatewright.moe.conformance.independence import looks_ahead, looks_around
from gatewright.routers import create_router

OF_THE_CLASS = ("compiled", "options_are_used", "wrong_shapes_are_refused")
RUNS = [(case, check) for case in CASES for check in CHECKS if case in LISTED or check not in OF_THE_CLASS]
MAY_BE_LEFT_OUT = {
    "gated_steps": "it is no GatedRouter",
    "micro_batches_add_up": "it has no state with these options",
    "dropped_tokens_have_no_weight": "soft slots drop nothing",
    "one_expert": "its options do not go with one expert",
}


@functools.cache
def subject_of(case, long=False):
    return Subject(case.name, options=case.options, variants=VARIANTS.get(case.name, ()), long=long)


def holds(case, check, long=False):
    result = run_check(subject_of(case, long), CHECKS[check])
    if result.notes and check not in ("gradient_reaches_every_parameter", "two_ranks"):
        pytest.fail(f"{case}\n{result}", pytrace=False)  # those two say that there is one expert, or an odd number
    may_be = result.status == "not checked" and MAY_BE_LEFT_OUT.get(check, "nothing") in result.message
    if result.status != "passed" and not may_be:
        pytest.fail(f"{case}\n{result}", pytrace=False)


@pytest.mark.parametrize(("case", "check"), RUNS, ids=lambda value: value if isinstance(value, str) else repr(value))
def test_conformance(case, check):
    holds(case, check)


@pytest.mark.evidence
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_conformance_in_its_long_form(case, check):
    holds(case, check, long=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_independence_is_declared_wherever_it_holds(case, training):
    """The kit lets a router declare less than is true; ours declare all of it, unless an expert that takes everything
    depends on nothing."""
    subject = subject_of(case)
    router = subject.router(training)
    if case.options.get("top_k") == case.options["num_experts"] or case.options["num_experts"] == 1:
        return
    assert router.causal or looks_ahead(subject, router), "is causal"
    assert router.batch_independent or looks_around(subject, router), "is batch-independent"


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_options_out_of_range_are_refused(case):
    bad = {"num_experts": [0, -1], "top_k": [0, 99], "init_std": [-1.0], "threshold_decay": [-0.1, 1.0, 1.5]}
    for option, values in bad.items():
        for value in values if option in case.options else []:
            with pytest.raises((ValueError, RuntimeError)):
                create_router(case.name, **case.options | {option: value})


def test_the_probes_are_the_same_in_any_batch():
    """What the kit relies on: a token of a sample does not change with the batch that it is in."""
    subject = subject_of(LISTED[0])
    names = frozenset({"token_ids", "modality", "previous_logits", "timestep", "null_mask", "noise", "document"})
    batch = subject.probe(samples=(0, 1, 2), length=7, names=names)
    part = subject.probe(samples=(2,), length=5, names=names)
    assert torch.equal(batch.x.view(3, 7, -1)[2, :5], part.x)
    for name in ("token_ids", "modality", "document"):
        assert torch.equal(batch.fields[name][2, :5], part.fields[name][0]), name
    for name in ("timestep", "null_mask", "sample_id"):
        assert batch.fields[name][2] == part.fields[name][0], name
    logits = batch.fields["previous_logits"].unflatten(0, (3, 7))[2, :5]
    assert torch.equal(logits, part.fields["previous_logits"])
