"""Routing: two layouts of one decision, each derived from the other, and what is counted."""

import pytest
import torch
from router_cases import assert_same, dense
from torch.utils import _pytree as pytree

from gatewright.routers import Routing


def random_topk(tokens, slots, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :slots]
    index = index.masked_fill(torch.rand(tokens, slots, generator=generator) < 0.3, -1)
    weight = torch.rand(tokens, slots, generator=generator).masked_fill(index < 0, 0)
    return index, weight


@pytest.mark.parametrize("tokens, slots, experts", [(7, 3, 5), (1, 1, 1), (0, 2, 4), (5, 0, 4), (6, 4, 4)])
def test_layouts_derive_from_each_other(tokens, slots, experts):
    index, weight = random_topk(tokens, slots, experts)
    fixed = Routing.from_topk(index, weight, bank_size=experts)
    token, expert, listed = fixed.as_list()
    expected = [
        (t, e, w) for t in range(tokens) for e, w in zip(index[t].tolist(), weight[t].tolist(), strict=True) if e >= 0
    ]
    assert list(zip(token.tolist(), expert.tolist(), listed.tolist(), strict=True)) == expected

    as_list = Routing(num_tokens=tokens, bank_size=experts, token=token, expert=expert, weight=listed)
    index_again, weight_again = as_list.as_topk()
    assert index_again.shape[1] == max([0, *(index >= 0).sum(1).tolist()])
    assert_same(dense(Routing.from_topk(index_again, weight_again, bank_size=experts)), dense(fixed), "weights", 0)
    for t in range(tokens):  # assignments first, in their order, then -1 with weight 0
        kept = index[t][index[t] >= 0].tolist()
        assert index_again[t].tolist() == kept + [-1] * (index_again.shape[1] - len(kept))
        assert (weight_again[t][len(kept) :] == 0).all()
    assert torch.equal(fixed.load_E(), as_list.load_E())
    assert fixed.load_E().tolist() == [sum(e == i for _, e, _ in expected) for i in range(experts)]


def test_from_mask_takes_the_chosen():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    weight = torch.arange(9.0).view(3, 3).requires_grad_()
    routing = Routing.from_mask(mask, weight)
    assert [part.tolist() for part in routing.as_list()] == [[0, 0, 2], [0, 2, 1], [0, 2, 7]]
    index, weights = routing.as_topk()
    assert index.tolist() == [[0, 2], [-1, -1], [1, -1]]
    weights.sum().backward()
    assert torch.equal(weight.grad, mask.float())


def test_gradient_flows_through_both_layouts():
    index, weight = random_topk(6, 2, 4)
    weight = weight.double().requires_grad_()
    routing = Routing.from_topk(index, weight, bank_size=4)
    token, expert, listed = routing.as_list()
    again = Routing(num_tokens=6, bank_size=4, token=token, expert=expert, weight=listed)
    factor = torch.randn(again.as_topk()[1].shape, dtype=torch.float64)
    (again.as_topk()[1] * factor).sum().backward()
    assert torch.equal(weight.grad != 0, index >= 0)


def test_load_and_what_was_asked_for():
    index = torch.tensor([[0, 1], [0, -1], [-1, -1]])
    routing = Routing.from_topk(index, index.float(), bank_size=3)
    assert routing.load_E().tolist() == routing.requested_E().tolist() == [2, 1, 0]
    dropped = routing.replace(requested=torch.tensor([[0, 1], [0, 2], [-1, -1]]))
    assert dropped.load_E().tolist() == [2, 1, 0] and dropped.requested_E().tolist() == [2, 1, 1]
    selected = routing.replace(selected=torch.tensor([[True, False, True]] * 3))
    assert selected.load_E().tolist() == [3, 0, 3]


def test_loss_adds_up():
    routing = Routing.from_topk(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), bank_size=1)
    assert routing.loss == 0 and routing.loss.shape == ()
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor([3.0], requires_grad=True)
    loss = routing.replace(losses={"a": a, "b": b * 2}).loss
    assert loss == 8 and loss.shape == ()
    loss.backward()
    assert a.grad == 1 and b.grad == 2


def test_a_routing_is_a_pytree():
    index, weight = random_topk(4, 2, 3)
    losses = {"balance": torch.tensor(1.5)}
    routing = Routing.from_topk(index, weight, bank_size=3, losses=losses, stats={"load": torch.ones(3)})
    leaves, spec = pytree.tree_flatten(routing)
    assert any(leaf is weight for leaf in leaves) and any(leaf is losses["balance"] for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Routing) and again.num_tokens == 4 and again.bank_size == 3
    assert again.weight is weight and again.token is None and again.losses["balance"] is losses["balance"]
    doubled = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf * 2, routing)
    assert torch.equal(doubled.weight, 2 * weight)


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"index \(2, 1\) and weight \(2, 2\)"):
        Routing.from_topk(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 2), bank_size=3)
    with pytest.raises(ValueError, match=r"both must be \[T, E\]"):
        Routing.from_mask(torch.ones(3, dtype=torch.bool), torch.ones(3))
    slots = Routing(num_tokens=2, bank_size=1, dispatch=torch.ones(1, 2, 1), combine=torch.ones(1, 2, 1))
    assert slots.loss == 0
    for derive in (slots.as_list, slots.as_topk):
        with pytest.raises(ValueError, match="no assignments.*soft slots"):
            derive()


def test_the_load_of_soft_slots_is_how_many_hold_a_token():
    """Two samples with six slots for three experts; the second is all padding, and slot 3 of the first takes nobody."""
    dispatch = torch.zeros(2, 4, 6)
    dispatch[0, 1:] = 1 / 3
    dispatch[0, :, 3] = 0
    slots = Routing(num_tokens=8, bank_size=3, dispatch=dispatch.requires_grad_(), combine=dispatch)
    assert slots.load_E().tolist() == slots.requested_E().tolist() == [2, 1, 2]
    assert slots.load_E().dtype == torch.int64
