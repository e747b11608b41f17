"""Routers that tests of the layer make up, and the layer's definition as a loop over tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.kernels.activation import activate
from gatewright.moe import MoELayer
from gatewright.routers import Router, Routing

KINDS = ("zero", "routed", "local", "routed", "copy", "constant", "routed", "constant", "local", "routed")


class MadeUpRouter(Router):
    """The two highest of x W^T, of which those below ``floor`` are dropped; weight = sigmoid.

    ``layout``: "topk" (index with -1), "list", "rows" (the list, whose experts see tanh(x U_e) instead of x) or "slots"
    (three soft slots an expert).
    """

    evidence = "paper"

    def __init__(
        self, *, dim: int, kinds: tuple[str, ...] = KINDS, layout: str = "topk", floor: float = -0.3, top_k: int = 2
    ) -> None:
        super().__init__(num_experts=kinds.count("routed"), expert_kinds=kinds)
        self.layout, self.floor, self.top_k = layout, floor, top_k
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(self.bank_size, dim, generator=generator))
        self.mixers = nn.Parameter(torch.randn(self.bank_size, dim, dim, generator=generator) / dim**0.5)
        self.slots = nn.Parameter(torch.randn(3 * self.bank_size, dim, generator=generator))

    def forward(self, x: Tensor, context) -> Routing:
        if self.layout == "slots":
            logits_BLS = F.linear(x, self.slots).unflatten(0, (context.batch_size, context.length))
            if context.padding_mask is not None:
                logits_BLS = logits_BLS.masked_fill(~context.padding_mask[..., None], -1e9)
            return Routing(
                num_tokens=len(x),
                bank_size=self.bank_size,
                dispatch=logits_BLS.softmax(1),
                combine=logits_BLS.softmax(2),
            )
        logits = F.linear(x, self.weight)
        value, index = logits.topk(self.top_k)
        dropped = value < self.floor
        if context.real_T is not None:
            dropped = dropped | ~context.real_T[:, None]
        routing = Routing.from_topk(index.masked_fill(dropped, -1), value.sigmoid(), bank_size=self.bank_size)
        if self.layout == "topk":
            return routing
        token, expert, weight = routing.as_list()
        routing = Routing(num_tokens=len(x), bank_size=self.bank_size, token=token, expert=expert, weight=weight)
        if self.layout == "list":
            return routing
        return routing.replace(rows=torch.einsum("nd,nde->ne", x[token], self.mixers[expert]).tanh())


class Counting(Router):
    """Reports numbers that the context's timestep sets, under every reduction."""

    evidence = "paper"
    reductions = {"total": "sum", "average": "mean", "highest": "max", "whole": "mean"}

    def __init__(self) -> None:
        super().__init__(num_experts=1)
        self.seen = []

    def forward(self, x, context):
        value = context.timestep[:2]
        stats = {"total": value, "average": value, "highest": value, "whole": value.long()}
        index = torch.zeros(len(x), 1, dtype=torch.int64)
        return Routing.from_topk(index, torch.ones(len(x), 1), bank_size=1, stats=stats)

    def update(self, stats):
        self.seen.append({name: value.tolist() for name, value in stats.items()})


def one_expert(layer: MoELayer, expert: int, row: Tensor) -> Tensor:
    """What expert ``expert`` makes of one input [D]."""
    kind = layer.router.expert_kinds[expert]
    place = [i for i, k in enumerate(layer.router.expert_kinds) if k == kind].index(expert)
    if kind == "zero":
        return torch.zeros_like(row)
    if kind == "copy":
        return row
    if kind == "constant":
        return layer.constants[place]
    bank = layer.experts if kind == "routed" else layer.local_experts
    b_in, b_out = (None, None) if bank.b_in is None else (bank.b_in[place], bank.b_out[place])
    hidden = activate(F.linear(row[None], bank.w_in[place], b_in), bank.spec.activation)
    return F.linear(hidden, bank.w_out[place], b_out)[0]


def token_by_token(layer: MoELayer, x_TD: Tensor, context) -> Tensor:
    """The layer's output by its definition: one assignment after the other."""
    routing = layer.router(x_TD, context)
    y = [torch.zeros_like(row) for row in x_TD]
    if routing.dispatch is not None:
        num_slots = routing.dispatch.shape[2]
        for b in range(context.batch_size):
            tokens = range(b * context.length, (b + 1) * context.length)
            for s in range(num_slots):
                row = sum(routing.dispatch[b, t - tokens[0], s] * x_TD[t] for t in tokens)
                out = one_expert(layer, s * layer.router.bank_size // num_slots, row)
                for t in tokens:
                    y[t] = y[t] + routing.combine[b, t - tokens[0], s] * out
    else:
        for n, (t, e, w) in enumerate(zip(*routing.as_list(), strict=True)):
            row = x_TD[t] if routing.rows is None else routing.rows[n]
            y[t] = y[t] + w * one_expert(layer, int(e), row)
    if layer.shared is not None:
        shared = layer.shared(x_TD.view(context.batch_size, context.length, -1), context).flatten(0, 1)
        y = [y_t + s for y_t, s in zip(y, shared, strict=True)]
    return torch.stack(y) if y else x_TD
