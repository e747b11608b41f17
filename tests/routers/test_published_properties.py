"""Properties that publications state and that hold over several routers at once. Those of one router are in its own
file, those of the contract in the kit."""

import pytest
import torch
import torch.nn.functional as F
from router_cases import CASES, VARIANTS

from gatewright.moe.attention import RoutedHeadAttention
from gatewright.moe.conformance import Subject
from gatewright.moe.conformance.observe import difference
from gatewright.routers import create_router

LENGTH = 12


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_prefix_alone_is_decided_as_within_the_sequence(case, training):
    """What generating token by token needs, and what routers that are not causal lack. A capacity counts the tokens of
    the call, so that where there is one a prefix may keep others: it is causal in what it reads of later tokens only.
    """
    subject = Subject(case.name, options=case.options, variants=VARIANTS.get(case.name, ()))
    router = subject.router(training, torch.float64)
    if router.causal and not router.batch_independent:
        return
    found = None
    for seed in range(1 if router.causal else 6):
        whole = subject.probe(2, LENGTH, seed=seed, dtype=torch.float64)
        expected = {name: value.unflatten(0, (2, LENGTH)) for name, value in subject.decide(router, whole).items()}
        for length in (1, 5, 11):
            prefix = subject.probe(2, length, seed=seed, dtype=torch.float64)
            assert torch.equal(prefix.x.view(2, length, -1), whole.x.view(2, LENGTH, -1)[:, :length])
            part = {name: value[:, :length].flatten(0, 1) for name, value in expected.items()}
            found = found or difference(subject.decide(router, prefix), part, 1e-10, length)
        if found:
            break
    if router.causal:
        assert found is None
    elif case.options.get("top_k") != case.options["num_experts"] > 1:
        assert found, "not causal, and yet every prefix is decided as within the sequence"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"choice": "per_token"}, {"choice": "expert", "length": 7}, {"quota": "max"}])
def test_union_of_all_heads_is_multi_head_attention(options, causal):
    """Union of Experts: with every head on and every token selected the attention is the dense one."""
    torch.manual_seed(0)
    router = create_router("union", dim=12, num_experts=3, top_k=3, **options)
    router.allow_noncausal = True
    attention = RoutedHeadAttention(router, dim=12, num_heads=3, causal=causal).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    heads = [part.unflatten(-1, (3, 4)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1)]
    dense = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x)[0], attention.out(dense), rtol=0, atol=1e-12)
