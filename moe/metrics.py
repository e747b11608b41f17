"""Measures of routing, as pure functions of counts: E experts, c_e assignments of expert e, f_e = c_e / sum c.

Counts must be summed over micro-batches and ranks before any ratio is taken: the largest of local ratios is not the
ratio of the global counts. Only experts that can be loaded belong in them. Logarithms are natural. All work on counts
[..., E].
"""

import math

import torch
from torch import Tensor


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


def _entropy(counts: Tensor) -> Tensor:
    share = counts.double() / counts.double().sum(-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(-1)
