"""Operations and bytes that a MoE layer and its parts cannot do without, forward and backward.

Operations are those of matrix products, a multiplication and an addition each. Bytes are what must be read or written
once: inputs, weights, results, what backward needs, gradients; whatever is read again, or written in between, is an
implementation's own. T tokens, N = T * K rows, D, H, E; SwiGLU experts:

    router     T tokens times [D, E]                        experts   N rows times [D, 2H] and [H, D]
    dispatch   N rows gathered                              combine   N rows weighted, summed at T tokens
    dense      T tokens times [D, 2KH] and [KH, D]          layer     router and experts; the rows are gathered inside

``dispatch`` and ``combine`` are what a layer does where it does not gather and sum inside its experts.
"""

from typing import NamedTuple

from .peers import Shape

INDEX = 8  # bytes of an int64
FLOAT = 4  # of a routing weight or a logit
PARTS = ("layer", "dense", "router", "dispatch", "experts", "combine")


class Cost(NamedTuple):
    """Of one part, in one direction."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def cost(part: str, shape: Shape, itemsize: int) -> tuple[Cost, Cost]:
    """Forward and backward of ``part``, whose numbers have ``itemsize`` bytes.

    Raises:
        ValueError: a part that is not in ``PARTS``.
    """
    tokens, dim, hidden, experts, rows = shape.tokens, shape.dim, shape.hidden, shape.experts, shape.rows
    x, routing = tokens * dim * itemsize, rows * (INDEX + FLOAT)
    if part == "router":
        gate, logits, flops = experts * dim * itemsize, tokens * experts * FLOAT, 2 * tokens * dim * experts
        # backward reads tokens, weights and logits, and writes the gradients of the first two
        return Cost(flops, x + gate + logits + routing), Cost(2 * flops, 2 * (x + gate) + logits + rows * FLOAT)
    if part in ("experts", "dense"):
        # the dense layer is one expert of width K * H for every token
        width, used = (hidden * experts, rows) if part == "experts" else (hidden * shape.top_k, tokens)
        inner = hidden if part == "experts" else width
        weights, h, flops = 3 * dim * width * itemsize, 2 * used * inner * itemsize, 6 * used * dim * inner
        given = routing if part == "experts" else 0
        forward = Cost(flops, x + weights + h + x + given)
        # the output's gradient, tokens, weights and h in; gradients of tokens, weights and routing weights out
        backward = Cost(2 * flops, 3 * x + 2 * weights + h + (given + rows * FLOAT if given else 0))
        return forward, backward
    if part == "dispatch":
        gathered = rows * dim * itemsize
        return Cost(0, x + gathered + 2 * rows * INDEX), Cost(0, gathered + x + rows * INDEX)
    if part == "combine":
        gathered = rows * dim * itemsize
        # the rows again, for the gradient of their weights
        return (
            Cost(2 * rows * dim, gathered + x + routing),
            Cost(4 * rows * dim, x + 2 * gathered + routing + rows * FLOAT),
        )
    if part == "layer":
        router, bank = cost("router", shape, itemsize), cost("experts", shape, itemsize)
        return router[0] + bank[0], router[1] + bank[1]
    raise ValueError(f'"{part}" is no part: choose one of {", ".join(PARTS)}')
