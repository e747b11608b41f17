"""Measures of routing, as pure functions of counts and ids: E experts, c_e assignments of expert e, f_e = c_e / sum c.

Counts must be summed over micro-batches and ranks before any ratio is taken: the largest of local ratios is not the
ratio of the global counts. Only experts that can be loaded belong in them. Logarithms are natural. Those of load and
specialisation work on counts [..., E]; drops and changes on ids [..., K].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routers.base import Routing


def load_entropy(counts: Tensor) -> Tensor:
    """``-sum f ln f / ln E``: how evenly the load is spread. [..., E] -> [...]

    1 = evenly. Because the k experts of a token differ, total collapse reads ln k / ln E, not 0, which
    ``collapse_aware_entropy`` mends. Under uniformly random choice about ``1 - (E - 1)(1 - k/E) / (2 N k ln E)`` for
    N tokens. 1 for E = 1; NaN without load.
    """
    experts = counts.shape[-1]
    return _entropy(counts) / math.log(experts) if experts > 1 else _entropy(counts) + 1


def collapse_aware_entropy(counts: Tensor, top_k: float) -> Tensor:
    """``(H - ln k) / (ln E - ln k)``, H the load's entropy: 0 = every token takes the same k experts, 1 = evenly.
    [..., E] -> [...]

    1 where k = E, since then there is nothing to choose. NaN without load.

    Args:
        top_k: experts a token, k; an average will do where it varies, and one below 1 counts as 1.
    """
    experts, floor = counts.shape[-1], math.log(max(top_k, 1.0))
    ceiling = math.log(experts)
    if floor > ceiling + 1e-12:
        raise ValueError(f"top_k={top_k} with {experts} experts: it can be at most {experts}")
    if ceiling - floor < 1e-12:
        return _entropy(counts) * 0 + 1
    return (_entropy(counts) - floor) / (ceiling - floor)


def max_violation(counts: Tensor) -> Tensor:
    """``MaxVio = max c / mean c - 1``: by how much the busiest expert exceeds its fair share. [..., E] -> [...]

    0 = evenly; at most E/k - 1. Under uniformly random choice about ``sqrt(2 ln E (1 - k/E) / (N k / E))``.
    Source: arXiv:2408.15664.
    """
    counts = counts.double()
    return counts.amax(-1) / counts.mean(-1) - 1


def expert_ratio(counts: Tensor) -> Tensor:
    """``rho_G(e) = c_e / sum c`` of the assignments of one group of tokens (a domain, a language, a position, a token
    id): which experts the group goes to. [..., E] -> [..., E]

    Sums to 1; 1 / E each = no preference. With K different experts a token no ratio exceeds 1 / K. Take what was
    requested, before capacity dropped some, unless the drops are the question. NaN without load.
    Source: OpenMoE, arXiv:2402.01739, figures 5 to 11.
    """
    counts = counts.double()
    return counts / counts.sum(-1, keepdim=True)


def specialization_std(counts: Tensor) -> Tensor:
    """``sqrt(mean_e (rho_e - 1/E)^2)``: how far a group's expert ratios are from even. [..., E] -> [...]

    0 = evenly; at most ``max_specialization_std``, where all tokens of the group take the same K experts. Under
    uniformly random choice about that maximum over ``sqrt(n)`` for n tokens. Ratios may be given for counts. NaN
    without load. Source: OpenMoE, arXiv:2402.01739, appendix E.
    """
    return (expert_ratio(counts) - 1 / counts.shape[-1]).square().mean(-1).sqrt()


def max_specialization_std(experts: int, top_k: int) -> float:
    """``sqrt(1 / (K E) - 1 / E^2)``: the ``specialization_std`` of a group that always takes the same K experts."""
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} with {experts} experts: choose 1 to {experts}")
    # as one fraction, so that K = E gives 0 and no negative rounding error
    return math.sqrt((experts - top_k) / top_k) / experts


def specialization(counts: Tensor, top_k: int) -> Tensor:
    """``specialization_std`` over its maximum, which compares models of different E and K. [..., E] -> [...]

    0 = evenly, 1 = always the same K experts. Under uniformly random choice about ``1 / sqrt(n)`` for n tokens. 0 where
    K = E, since then there is nothing to choose. NaN without load.
    """
    std = specialization_std(counts)
    highest = max_specialization_std(counts.shape[-1], top_k)
    return std / highest if highest else std * 0


def expert_information(counts: Tensor) -> Tensor:
    """``I(V; Expert) / H(Expert)``: which share of the experts' entropy is known from the token id (or domain, or any
    other label) v of a pair. [..., V, E] -> [...]

    0 = the experts do not depend on v; 1 = v decides the expert; where v decides a set of K equal experts,
    ``1 - ln K / H(Expert)``. Under choice that ignores v about ``(V - 1)(E - K) / (2 N H)`` for N pairs, which is not
    small where labels are rare: leave those out. NaN where fewer than two experts have load.

    Args:
        counts: [..., V, E] pairs of label v that go to expert e.
    """
    counts = counts.double()
    pairs = counts.sum((-2, -1))
    label = counts.sum(-1)
    within = torch.where(label > 0, label * _entropy(counts), 0).sum(-1) / pairs
    total = _entropy(counts.sum(-2))
    return ((total - within) / total).masked_fill(total == 0, torch.nan)


def expert_distance(counts: Tensor, other: Tensor) -> Tensor:
    """``sqrt(JS(rho, rho') / ln 2)``, the Jensen-Shannon distance of two groups' expert ratios, or of one group's at
    two times: ``JS = H((rho + rho') / 2) - (H(rho) + H(rho')) / 2``. [..., E] twice -> [...]

    A metric. 0 = the same ratios, 1 = no expert in common. Two groups of n and n' tokens under uniformly random choice
    are about ``sqrt((E - K) (1/n + 1/n') / (8 K ln 2))`` apart. Ratios may be given for counts. NaN without load.
    """
    ratio, other = expert_ratio(counts), expert_ratio(other)
    divergence = _entropy((ratio + other) / 2) - (_entropy(ratio) + _entropy(other)) / 2
    return (divergence.clamp(min=0) / math.log(2)).sqrt()


def drop_by_position(requested: Tensor, dispatched: Tensor) -> Tensor:
    """``drop(p) = 1 - sum_s sum_k d_k(s, p) / (K N_p)``: which share of the choices made at position p was dropped, N_p
    sequences being longer than p. [..., L, K] twice -> [L]

    0 = none, 1 = all. 0 everywhere without capacity; where early tokens come first it grows with p. NaN where no
    sequence is so long. The capacity depends on how many tokens a call holds, so say how sequences were grouped.
    Source: OpenMoE, arXiv:2402.01739, figure 12.

    Args:
        requested: ids before capacity, -1 = no choice (padding): ``routing.requested.view(B, L, K)``.
        dispatched: the ids that were kept, -1 = dropped: ``routing.index.view(B, L, K)``.
    """
    if requested.shape != dispatched.shape or requested.dim() < 2:
        shapes = f"requested {tuple(requested.shape)}, dispatched {tuple(dispatched.shape)}"
        raise ValueError(f"{shapes}: both must be ids [..., L, K]")
    asked, kept = ((ids >= 0).sum(-1)[None].flatten(0, -2).sum(0).double() for ids in (requested, dispatched))
    return 1 - kept / asked


def routing_change(before: Routing | Tensor, after: Routing | Tensor) -> Tensor:
    """The share of tokens whose set of experts is another one: fluctuation between two checkpoints, or between a clean
    and a corrupted input. [..., T, K] ids twice -> [...], or two routings -> a scalar

    0 = no token changed, 1 = every one. Two independent uniformly random choices: ``1 - 1 / (E over K)``. The order
    within a set does not matter; for the first choices alone give ``index[..., :1]``. Tokens with no expert in either
    do not count; NaN where there is no other. Of a routing, the pairs that count as load are compared.

    Args:
        before, after: ids of different experts, -1 = no assignment; or decisions for the same tokens.
    """
    before, after = _chosen(before), _chosen(after)
    if before.shape[:-1] != after.shape[:-1] or before.dim() < 2:
        shapes = f"ids {tuple(before.shape)} and {tuple(after.shape)}"
        raise ValueError(f"{shapes}: both must be [..., T, K], of the same tokens")
    width = max(before.shape[-1], after.shape[-1])
    before, after = (F.pad(ids, (0, width - ids.shape[-1]), value=-1).sort(-1).values for ids in (before, after))
    routed = ((before >= 0) | (after >= 0)).any(-1)
    return (before != after).any(-1).sum(-1).double() / routed.sum(-1)


def _chosen(decision: Routing | Tensor) -> Tensor:
    """The ids of the pairs that count as load, -1 filling up. [T, K]"""
    if isinstance(decision, Tensor):
        return decision
    if decision.selected is not None:
        decision = Routing.from_mask(decision.selected, decision.selected)
    return decision.as_topk()[0]


def _entropy(counts: Tensor) -> Tensor:
    share = counts.double() / counts.double().sum(-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(-1)
