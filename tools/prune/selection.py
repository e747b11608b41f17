"""Which experts stay: masks [L, E] from scores [L, E] and counts. Ties go to the lower id, so a choice can be replayed.

Scores are NaN where a layer has fewer experts than E; such places are never kept.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 100  # of the search for max_min's domain weights
_CLOSE = 1e-3  # of a layer's mass: a set so close to its bound is left as it is


def top(scores: np.ndarray, counts: np.ndarray, groups: int = 1) -> np.ndarray:
    """The ``counts[l]`` best of each layer, [L, E] bool; with ``groups``, an equal number of each run of E / groups."""
    L, E = scores.shape
    by_group = np.where(np.isnan(scores), -np.inf, scores).reshape(L, groups, E // groups)
    order = np.argsort(-by_group, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(E // groups), order.shape), axis=-1)
    kept = rank < (np.asarray(counts) // groups)[:, None, None]
    return kept.reshape(L, E) & ~np.isnan(scores)


def global_counts(shares: np.ndarray, total: int, floor: int) -> np.ndarray:
    """How many each layer keeps when all layers' experts are ranked together, [L].

    Each layer's ``floor`` best are kept; the rest of ``total`` goes to the largest shares left, whatever their layer.
    """
    kept = top(shares, np.minimum(floor, (~np.isnan(shares)).sum(-1)))
    left = np.where(kept | np.isnan(shares), -np.inf, shares).ravel()
    best = np.argsort(-left, kind="stable")[: max(0, total - int(kept.sum()))]
    kept.ravel()[best] = True
    return kept.sum(-1)


def normalised(scores: np.ndarray) -> np.ndarray:
    """Each layer's scores as shares of their sum (arXiv 2504.06792's mixed domains); a layer without any stays 0."""
    total = np.nansum(scores, axis=-1, keepdims=True)
    return np.divide(scores, total, out=np.where(np.isnan(scores), np.nan, 0.0), where=total > 0)


def kept_mass(shares: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The share of each layer's score that the kept experts hold, [..., L]; 1 where a layer has no score at all."""
    total = np.nansum(shares, axis=-1)
    held = np.where(kept & ~np.isnan(shares), shares, 0.0).sum(-1)
    return np.divide(held, total, out=np.ones_like(total), where=total > 0)


def max_min(shares: np.ndarray, counts: np.ndarray, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """In each layer, the set whose least kept mass over domains is largest: a search, and a bound on any set's.

        maximise over S of |S| = M   min over domains d of   sum over i in S of shares[d, l, i]

    For any weights w_d >= 0 that sum to 1, the M best of ``sum_d w_d shares[d]`` bound that value from above (the
    Lagrangian dual, which is the linear programme's bound). Multiplicative weights lower the bound, giving weight to
    the domain that loses. The best set met on the way, where it is not within a thousandth of the bound already, is
    then improved by exchanging one kept for one pruned expert as long as the least mass, or at equal least mass the sum
    of masses, grows.

    Args:
        shares: [D, L, E], each layer's summing to 1.
        counts: [L].
        groups: as in `top`; an exchange stays in its group.

    Returns:
        The mask [L, E] and the bound [L] that no set can exceed.
    """
    D, L, E = shares.shape
    padding = np.isnan(shares[0])
    shares = np.nan_to_num(shares)
    weights = np.full((L, D), 1 / D)
    best = np.zeros((L, E), dtype=bool)
    best_value = np.full((L, 2), -np.inf)
    bound = np.full(L, np.inf)
    for step in range(_ROUNDS if D > 1 else 1):
        mixed = np.einsum("ld,dle->le", weights, shares)
        kept = top(np.where(padding, np.nan, mixed), counts, groups)
        masses = np.where(kept, shares, 0.0).sum(-1).T
        bound = np.minimum(bound, (weights * masses).sum(-1))
        value = np.stack([masses.min(-1), masses.sum(-1)], axis=-1)
        better = (value[:, 0] > best_value[:, 0]) | (
            (value[:, 0] == best_value[:, 0]) & (value[:, 1] > best_value[:, 1])
        )
        best[better], best_value[better] = kept[better], value[better]
        # shares of a layer sum to 1, so masses differ by at most 1
        weights = weights * np.exp(-4 / np.sqrt(1 + step) * (masses - masses.mean(-1, keepdims=True)))
        weights /= weights.sum(-1, keepdims=True)
    group = np.arange(E) // (E // groups)
    for layer in np.flatnonzero(bound - best_value[:, 0] > _CLOSE):
        _exchange(shares[:, layer], best[layer], ~padding[layer], group)
    return best, bound


def _exchange(shares: np.ndarray, kept: np.ndarray, real: np.ndarray, group: np.ndarray) -> None:
    """Exchanges one for one, in place, the best exchange first, while (least mass, sum of masses) grows."""
    masses = shares[:, kept].sum(-1)
    for _ in range(4 * len(kept)):
        inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept & real)
        if not len(outside):
            return
        after = masses[:, None, None] - shares[:, inside, None] + shares[:, None, outside]  # [D, kept, pruned]
        allowed = group[inside, None] == group[None, outside]
        least = np.where(allowed, after.min(0), -np.inf)
        top_least = least.max()
        total = np.where(least >= top_least - 1e-15, after.sum(0), -np.inf)
        out, come = np.unravel_index(int(total.argmax()), total.shape)
        gain = (least[out, come] - masses.min(), total[out, come] - masses.sum())
        if not (gain[0] > 1e-12 or (gain[0] > -1e-15 and gain[1] > 1e-12)):
            return
        kept[inside[out]], kept[outside[come]] = False, True
        masses = shares[:, kept].sum(-1)


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """|A and B| / min(|A|, |B|) of each layer's kept experts, [L]."""
    return (first & second).sum(-1) / np.maximum(1, np.minimum(first.sum(-1), second.sum(-1)))


def margins(scores: np.ndarray, kept: np.ndarray, groups: int = 1) -> np.ndarray:
    """By how much the worst kept expert beats the best pruned one, relative to the former, [L]; 1 where none is pruned.

    With ``groups``, the smallest of the groups' margins.
    """
    L, E = scores.shape
    by_group, held = scores.reshape(L, groups, E // groups), kept.reshape(L, groups, E // groups)
    worst = np.where(held, by_group, np.inf).min(-1)
    rival = np.where(~held & ~np.isnan(by_group), by_group, -np.inf).max(-1)
    gap = np.divide(worst - rival, worst, out=np.zeros_like(worst), where=np.isfinite(worst) & (worst > 0))
    return np.where(np.isneginf(rival) | np.isposinf(worst), 1.0, gap).min(-1)
