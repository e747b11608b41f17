"""A router of a fixed number of experts a token never waits for the device: nothing that it does, forward, backward or
in ``update``, needs a number from the device on the host. Such operations show on a CPU as well."""

import pytest
import torch
from router_cases import CASES
from torch.utils._python_dispatch import TorchDispatchMode

from gatewright.routers import base

READS = {
    "aten::_local_scalar_dense",  # item(), int(), bool(), if
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::equal",
    "aten::bincount",
}
# the assignment is solved on the CPU, and Sinkhorn looks whether it has converged there only
WAITS = ("base", "sinkhorn")


class Reads(TorchDispatchMode):
    """Collects the operations whose result decides a shape or comes to the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        by_mask = name.startswith("aten::index") and any(
            getattr(index, "dtype", None) == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
        )
        sized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in READS or by_mask or sized:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def reads(case, training, real=None):
    router = case.create().train(training)
    context = case.context if real is None else case.context.replace(padding_mask=real)
    with torch.no_grad():
        router(case.tokens(), context)  # what is looked at once, as whether there are centroids
    x = case.tokens().requires_grad_()
    with Reads() as spy:
        routing = router(x, context)
        results = [routing.weight, routing.combine, *routing.losses.values()]
        results = [value.sum() for value in results if value is not None and value.requires_grad]
        if results:
            torch.autograd.backward(results)
        if training and routing.stats and router.stateful:
            with torch.no_grad():
                router.update(routing.stats)
    return routing, spy.seen


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in WAITS], ids=repr)
def test_a_fixed_number_of_experts_waits_for_nothing(case, training, monkeypatch):
    monkeypatch.setattr(base, "_constant", lambda *values: 7)  # the noise's key is made of Python's numbers
    real = torch.arange(case.context.length).expand(case.context.batch_size, -1) < 5
    for mask in (None, real):
        routing, seen = reads(case, training, mask)
        if routing.index is not None or routing.dispatch is not None:
            assert not seen
        else:  # how many are chosen is in the data
            assert set(seen) <= {"aten::nonzero", "aten::index", "aten::index_put"}


def test_what_waits_is_seen():
    with Reads() as spy:
        values = torch.arange(4.0)
        float(values.sum())
        values[values > 1]
        values.nonzero()
        values.repeat_interleave(torch.arange(4))
        values.repeat_interleave(2, output_size=8)
        values[torch.tensor([0, 1])]
    assert spy.seen == [
        "aten::_local_scalar_dense", "aten::index", "aten::nonzero", "aten::repeat_interleave",
    ]  # fmt: skip
