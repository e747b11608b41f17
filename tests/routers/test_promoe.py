"""ProMoE: where unconditional tokens go, the cosine gate and what it does not see, and the contrastive loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from gatewright.routers import TokenContext, create_router

D, E, B, L = 16, 4, 5, 12
both_selections = pytest.mark.parametrize("selection", ["token_choice", "expert_choice"])


def create(dtype=torch.float64, **options):
    torch.manual_seed(0)
    router = create_router("promoe", **{"dim": D, "num_experts": E} | options).to(dtype)
    return router, torch.randn(B * L, D, dtype=dtype)


def context_of(null, length=L):
    null_mask = torch.as_tensor(null)
    return TokenContext(batch_size=len(null_mask), length=length, null_mask=null_mask)


SOME = [False, True, False, False, True]


@both_selections
@pytest.mark.parametrize("num_classes", [10, 1000, 1001])
def test_null_samples_go_to_the_local_expert_alone_whatever_the_classes(selection, num_classes):
    labels = torch.tensor([0, num_classes, 3, min(1000, num_classes - 1), num_classes])
    router, x = create(selection=selection, top_k=2)
    routing = router(x, context_of(labels == num_classes))
    token, expert, weight = routing.as_list()
    null = (labels == num_classes)[token // L]
    assert router.expert_kinds[E] == "local" and router.bank_size == E + 1
    assert (expert[null] == E).all() and (weight[null] == 1).all()
    assert token[null].tolist() == [*range(L, 2 * L), *range(4 * L, 5 * L)], "each once"
    assert (expert[~null] < E).all()
    weight[null].sum().backward()
    assert (router.prototypes.grad == 0).all(), "their weight is a constant"


@both_selections
def test_all_null_and_none_null(selection):
    router, x = create(selection=selection)
    routing = router(x, context_of([True] * B))
    assert routing.load_E().tolist() == [0] * E + [B * L]
    assert routing.losses["routing_contrastive"] == 0
    routing.loss.backward()
    assert (router.prototypes.grad == 0).all()
    assert router(x, context_of([False] * B)).load_E()[E] == 0


@both_selections
def test_without_the_unconditional_expert_all_are_routed_alike(selection):
    router, x = create(selection=selection, unconditional=False)
    assert router.requires == () and router.bank_size == E
    with_mask, without = router(x, context_of(SOME)), router(x, TokenContext(batch_size=B, length=L))
    assert all(torch.equal(a, b) for a, b in zip(with_mask.as_list(), without.as_list(), strict=True))


def test_identity_gate_is_the_cosine_and_the_best_are_chosen():
    router, x = create(torch.float32, top_k=2)
    index, weight = router(x, context_of([False] * B)).as_topk()
    cosine = F.cosine_similarity(x[:, None], router.prototypes[None], dim=-1)
    best = cosine.sort(dim=1, descending=True)
    assert torch.equal(index, best.indices[:, :2])
    torch.testing.assert_close(weight, best.values[:, :2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gate", ["identity", "softmax", "sigmoid"])
def test_gates_of_token_choice(gate):
    router, x = create(gate=gate, top_k=3)
    index, weight = router(x, context_of([False] * B)).as_topk()
    cosine = F.cosine_similarity(x[:, None], router.prototypes[None], dim=-1)
    expected = {"identity": cosine, "softmax": cosine.softmax(1), "sigmoid": cosine.sigmoid()}[gate]
    torch.testing.assert_close(weight, expected.gather(1, index))
    assert torch.equal(index, cosine.topk(3).indices)


def test_gates_may_be_negative_and_stay_so():
    router, x = create(top_k=E)
    assert router(x, context_of([False] * B)).weight.min() < -0.1


@both_selections
def test_length_of_a_token_or_a_prototype_does_not_matter(selection):
    router, x = create(torch.float32, selection=selection)
    before = router(x, context_of(SOME)).as_list()
    scale = torch.tensor([10.0, 0.1, 3.0])[torch.arange(len(x)) % 3]
    after = router(x * scale[:, None], context_of(SOME)).as_list()
    with torch.no_grad():
        router.prototypes *= torch.tensor([[5.0], [0.01], [1.0], [77.0]])
    scaled = router(x, context_of(SOME)).as_list()
    for other in (after, scaled):
        assert torch.equal(other[0], before[0]) and torch.equal(other[1], before[1])
        torch.testing.assert_close(other[2], before[2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gate", ["identity", "softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_expert_choice_takes_exactly_k_of_each_image(gate, top_k):
    router, x = create(selection="expert_choice", gate=gate, top_k=top_k)
    routing = router(x, context_of(SOME))
    token, expert, weight = routing.as_list()
    k = max(1, min(int(L / E * top_k), L))
    cosine = F.cosine_similarity(x[:, None], router.prototypes[None], dim=-1)
    for b in range(B):
        for e in range(E):
            mine = (token // L == b) & (expert == e)
            assert mine.sum() == (0 if SOME[b] else k)
            if not SOME[b]:
                column = cosine[b * L : (b + 1) * L, e]
                assert set((token[mine] - b * L).tolist()) == set(column.topk(k).indices.tolist())
                gates = {"identity": column, "softmax": column.softmax(0), "sigmoid": column.sigmoid()}[gate]
                torch.testing.assert_close(weight[mine], gates[token[mine] - b * L])


def test_21_of_256_tokens_go_to_each_of_12_experts():
    router = create_router("promoe", dim=D, num_experts=12, selection="expert_choice")
    routing = router(torch.randn(512, D), context_of([False, False], 256))
    assert routing.load_E().tolist() == [42] * 12 + [0]


def contrastive_by_hand(router, x, routing, top_k_mean=True):
    """Token choice: centroids of what each expert received, then cross-entropies row by row."""
    token, expert, _ = routing.as_list()
    active = [e for e in range(E) if (expert == e).any()]
    centroids = torch.stack([x[token[expert == e]].mean(0) for e in active])
    cosine = F.cosine_similarity(router.prototypes[active][:, None], centroids[None], dim=-1)
    rows = [F.cross_entropy(row[None] / router.temperature, torch.tensor([i])) for i, row in enumerate(cosine)]
    return torch.stack(rows).mean()


@pytest.mark.parametrize("top_k", [1, 3])
def test_contrastive_loss_is_the_mean_of_the_rows_cross_entropies(top_k):
    router, x = create(top_k=top_k, contrastive_weight=2.0)
    routing = router(x, context_of(SOME))
    expected = 2 * contrastive_by_hand(router, x, routing)
    torch.testing.assert_close(routing.losses["routing_contrastive"], expected, rtol=1e-12, atol=0)


def test_contrastive_gradient_reaches_prototypes_and_conditional_tokens_only():
    router, x = create()
    x.requires_grad_()
    routing = router(x, context_of(SOME))
    routing.losses["routing_contrastive"].backward()
    assert (router.prototypes.grad.abs().sum(1) > 0).all()
    reached = x.grad.abs().sum(1).view(B, L) > 0
    assert torch.equal(reached, ~torch.tensor(SOME)[:, None].expand(B, L))

    by_hand = torch.autograd.grad(contrastive_by_hand(router, x, routing), [x, router.prototypes])
    torch.testing.assert_close(x.grad, by_hand[0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(router.prototypes.grad, by_hand[1], rtol=1e-10, atol=1e-13)


def test_contrastive_known_values_through_the_router():
    router = create_router("promoe", dim=2, num_experts=2).double()
    x = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3]]).double()
    with torch.no_grad():
        router.prototypes.copy_(torch.eye(2))
    on_them = router(x, context_of([False], 4)).losses["routing_contrastive"]
    assert on_them.item() == pytest.approx(math.log1p(math.exp(-1 / 0.07)), rel=1e-6)
    one_active = router(x[:2], context_of([False], 2)).losses["routing_contrastive"]
    assert one_active == 0
    one_active.backward()
    assert (router.prototypes.grad == 0).all()


@both_selections
def test_contrastive_loss_does_not_see_order_or_unconditional_tokens(selection):
    router, x = create(selection=selection)
    reference = router(x, context_of(SOME)).losses["routing_contrastive"]
    within = torch.argsort(torch.rand(B, L), dim=1)
    shuffled = x.view(B, L, D)[torch.arange(B)[:, None], within].flatten(0, 1)
    torch.testing.assert_close(router(shuffled, context_of(SOME)).losses["routing_contrastive"], reference)
    samples = torch.tensor([3, 1, 4, 0, 2])
    moved = router(x.view(B, L, D)[samples].flatten(0, 1), context_of(torch.tensor(SOME)[samples]))
    torch.testing.assert_close(moved.losses["routing_contrastive"], reference)
    more = torch.cat([x, torch.randn(3 * L, D, dtype=x.dtype)])
    padded = router(more, context_of([*SOME, True, True, True]))
    torch.testing.assert_close(padded.losses["routing_contrastive"], reference)


@both_selections
def test_contrastive_loss_is_of_training_and_optional(selection):
    router, x = create(selection=selection)
    assert set(router(x, context_of(SOME)).losses) == {"routing_contrastive"}
    assert router.eval()(x, context_of(SOME)).losses == {}
    assert create(selection=selection, contrastive_weight=0)[0](x, context_of(SOME)).losses == {}


def test_scores_show_who_is_eligible():
    router, x = create()
    routing = router(x, context_of(SOME))
    null = torch.tensor(SOME).repeat_interleave(L)
    assert torch.equal(routing.scores[null], torch.eye(E + 1, dtype=x.dtype)[E].expand(int(null.sum()), -1))
    assert (routing.scores[~null, E] == 0).all() and (routing.scores[~null, :E] > 0).all()
    assert routing.logits[~null, E].eq(-torch.inf).all() and routing.logits[null, :E].eq(-torch.inf).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "choose 1 to 4"),
        ({"top_k": 5}, "choose 1 to 4"),
        ({"gate": "tanh"}, 'gate="tanh"'),
        ({"selection": "both"}, 'selection="both"'),
        ({"temperature": 0}, "temperature=0"),
        ({"contrastive_weight": -1}, "contrastive_weight=-1"),
        ({"num_experts": 0}, "num_experts=0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
