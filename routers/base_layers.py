"""BASE layers: in training all experts get equally many tokens, so that the sum of scores is the highest possible.

    s_te = x_t . c_e                                   c_e: the expert's centroid
    training     argmax over assignments of  sum_t s_{t, e(t)},  every expert with floor(T/E) or ceil(T/E) tokens
    evaluation   e(t) = argmax_e s_te
    y_t = alpha_t f_e(x_t) + (1 - alpha_t) x_t         alpha_t = sigmoid(s_{t, e(t)})

The second summand is an expert of kind "copy", id E, which is no load. In fairseq an expert is a stack of residual
sublayers, f(x) = x + g(x), and the layer stands alone, so that y = x + alpha g(x): inside a residual block the same is
had by plain experts g and ``copy=False``, which leaves the second summand out.

The assignment is exact, not the bounded auction of fairseq (``balanced_assignment``), which stops at an approximation
and needs E to divide T: see ``balanced_assignment`` here. It runs on the CPU in integers, so every device decides
alike; its input is the local batch. There is no gradient through it: centroids learn from alpha alone.

Source: Lewis et al., arXiv:2103.16716; fairseq/modules/base_layer.py and fairseq/clib/libbase/balanced_assignment.cpp
(facebookresearch/fairseq), read. Not taken over: the random exchange of tokens between workers before the assignment.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, register_router, router_dtype
from .selection import drop_padding

NEVER = 2**61  # more than any path costs, and twice it still fits 64 bits


@register_router("base")
class BaseLayersRouter(Router):
    evidence = "code"
    paper = "BASE Layers, arXiv:2103.16716"

    def __init__(self, *, dim: int, num_experts: int, copy: bool = True) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            copy: add (1 - alpha) x to alpha f(x).
        """
        super().__init__(num_experts=num_experts, expert_kinds=("routed",) * num_experts + ("copy",) * copy)
        self.copy = copy
        self.centroids = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, dim), gain=0.1))

    @property
    def causal(self) -> bool:
        return not self.training

    @property
    def batch_independent(self) -> bool:
        return not self.training

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype, real_T = router_dtype(x_TD), context.real_T
        logits_TE = F.linear(x_TD.to(dtype), self.centroids.to(dtype))
        expert_T = logits_TE.argmax(1) if not self.training else balanced_assignment(logits_TE, real_T)
        index_T1 = expert_T[:, None].clamp(min=0)
        alpha_T1 = logits_TE.gather(1, index_T1).sigmoid()
        selected_TE = F.one_hot(index_T1[:, 0], self.bank_size).bool()
        if real_T is not None:
            selected_TE = selected_TE & real_T[:, None]
        scores_TE = logits_TE.softmax(-1)
        index_TK, weight_TK = index_T1, alpha_T1
        if self.copy:
            index_TK = torch.cat([index_T1, torch.full_like(index_T1, self.num_experts)], 1)
            weight_TK = torch.cat([alpha_T1, 1 - alpha_T1], 1)
            logits_TE, scores_TE = F.pad(logits_TE, (0, 1), value=-torch.inf), F.pad(scores_TE, (0, 1))
        index_TK, weight_TK = drop_padding(index_TK, weight_TK, real_T)
        return Routing.from_topk(
            index_TK, weight_TK, bank_size=self.bank_size, logits=logits_TE, scores=scores_TE, selected=selected_TE
        )

    @classmethod
    def example(cls) -> tuple[dict[str, Any], TokenContext]:
        return {"dim": 16, "num_experts": 4}, super().example()[1]


@torch.compiler.disable
@torch.no_grad()
def balanced_assignment(scores_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """One expert a token, each expert with floor(T/E) or ceil(T/E) of them, so that the sum of scores is highest.

    Which experts get one more, where E does not divide T, is part of the optimum. Scores are rounded to 2^-40 of their
    range; scores that are not finite count as the smallest that is.

    How: prices p of the experts give every token an expert, argmax_e(s_te - p_e), which is optimal for the loads that
    come of it. While loads are not the shares wanted, tokens move along the cheapest path of experts, a -> b by the
    token of a that loses least by it, from one with too many to one with too few. That keeps the assignment optimal
    for its loads (successive shortest paths), and takes at most T paths over a graph of E + 1 nodes. The last node
    trades who of the experts has ceil(T/E). Good prices to begin with leave few paths.

    Args:
        scores_TE: [T, E].
        real_T: tokens that take part; None = all.

    Returns:
        [T] int64, -1 for tokens that take no part.
    """
    result_T = torch.full((len(scores_TE),), -1, dtype=torch.int64)
    real_T = torch.ones(len(scores_TE), dtype=torch.bool) if real_T is None else real_T.cpu()
    scores = scores_TE.detach().to("cpu", torch.float64)[real_T].numpy()
    if scores.size:
        result_T[real_T] = torch.from_numpy(_assign(_to_integers(scores)))
    return result_T.to(scores_TE.device)


def _to_integers(scores: np.ndarray) -> np.ndarray:
    finite = np.isfinite(scores)
    low, high = (scores[finite].min(), scores[finite].max()) if finite.any() else (0.0, 0.0)
    if not low < high:
        return np.zeros(scores.shape, np.int64)
    return np.rint((np.where(finite, scores, low) - low) / (high - low) * 2**40).astype(np.int64)


def _prices(scores: np.ndarray, sweeps: int = 2) -> np.ndarray:
    """Each expert in turn asks what leaves it T/E tokens that prefer it, the others' prices as they are. [E]"""
    tokens, experts = scores.shape
    prices, values, place = np.zeros(experts, np.int64), scores.copy(), tokens - max(1, tokens // experts)
    for _ in range(sweeps if experts > 1 else 0):
        for e in range(experts):
            values[:, e] = -NEVER
            prices[e] = np.partition(scores[:, e] - values.max(1), place)[place]
            values[:, e] = scores[:, e] - prices[e]
    return prices


def _assign(scores: np.ndarray) -> np.ndarray:
    """Integer scores [T, E] -> expert [T]; see ``balanced_assignment``."""
    tokens, experts = scores.shape
    floor, rest = divmod(tokens, experts)
    prices = _prices(scores)
    expert = (scores - prices).argmax(1)
    share = np.full(experts, floor)
    share[np.argsort(-prices, kind="stable")[:rest]] += 1  # the dearest, so that no trade of places pays
    cost = np.full((experts + 1, experts + 1), NEVER, np.int64)
    changed = range(experts)
    while True:
        for a in changed:
            members = scores[expert == a]
            cost[a, :experts] = (members[:, [a]] - members).min(0) if len(members) else NEVER
            cost[a, a] = NEVER
        surplus = np.bincount(expert, minlength=experts) - share
        if not surplus.any():
            return expert
        cost[:experts, experts] = np.where(share < floor + (rest > 0), 0, NEVER)
        cost[experts, :experts] = np.where(share > floor, 0, NEVER)
        path = _cheapest_path(cost, surplus)
        steps = list(zip(path[:-1], path[1:], strict=True))
        ways = [
            np.flatnonzero((expert == a) & (scores[:, a] - scores[:, b] == cost[a, b]))
            for a, b in steps
            if experts not in (a, b)
        ]
        # tokens that lose the same go together
        count = 1 if experts in path else min(surplus[path[0]], -surplus[path[-1]], *map(len, ways))
        for a, b in steps:
            if b == experts:
                share[a] += 1
            elif a == experts:
                share[b] -= 1
            else:
                expert[ways.pop(0)[:count]] = b
        changed = [a for a in path if a < experts]


def _cheapest_path(cost: np.ndarray, surplus: np.ndarray) -> list[int]:
    """From an expert with too many tokens to one with too few, by Bellman and Ford."""
    nodes = len(cost)
    distance = np.where(np.append(surplus, 0) > 0, 0, NEVER)
    before = np.full(nodes, -1)
    for _ in range(nodes):
        through = distance[:, None] + cost
        best = through.argmin(0)
        nearer = through[best, np.arange(nodes)] < distance
        if not nearer.any():
            break
        distance[nearer], before[nearer] = through[best, np.arange(nodes)][nearer], best[nearer]
    path = [int(np.where(surplus < 0, distance[:-1], 2 * NEVER).argmin())]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]
