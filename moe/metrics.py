"""Measures of routing, as pure functions of counts and ids: E experts, c_e assignments of expert e, f_e = c_e / sum c.

Counts must be summed over micro-batches and ranks before any ratio is taken: the largest of local ratios is not the
ratio of the global counts. Only experts that can be loaded belong in them. Logarithms are natural. Those of load and
specialisation work on counts [..., E]; drops and changes on ids [..., K]; those of decisions on the sums that a
recorder keeps, n being the tokens that were summed over. Tensors or numpy arrays; results are float64 tensors.

    balance     load_entropy  collapse_aware_entropy  effective_experts  max_violation  min_violation  imbalance
                coefficient_of_variation  dead_fraction  score_balance  drop_rate  drop_by_position
    decisions   token_entropy  routing_information  top_k_mass  margins  margin_below  logit_rms  z_loss  mean_active
    movement    saturation  fluctuation  routing_change  settled_at  load_drift  expert_distance
    structure   coactivation  coactivation_share  coactivation_lift  flow  flow_lift  mutual_information  cosines
    meaning     label_counts  label_share  specialization_score  vocabulary_specialization  context_dependence
                expert_ratio  specialization  expert_information
    by chance   null_load_entropy  null_collapse_aware_entropy  null_max_violation
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..routers.base import Routing

Array = Tensor | np.ndarray


def load_entropy(counts: Array) -> Tensor:
    """``-sum f ln f / ln E``: how evenly the load is spread. [..., E] -> [...]

    1 = evenly. Because the k experts of a token differ, total collapse reads ln k / ln E, not 0, which
    ``collapse_aware_entropy`` mends. Under uniformly random choice about ``1 - (E - k) / (2 N k ln E)`` for N tokens.
    1 for E = 1; NaN without load.
    """
    experts = counts.shape[-1]
    return _entropy(counts) / math.log(experts) if experts > 1 else _entropy(counts) + 1


def collapse_aware_entropy(counts: Array, top_k: float) -> Tensor:
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


def effective_experts(counts: Array) -> Tensor:
    """``exp(H)``, H the load's entropy: as many equally loaded experts would have it. [..., E] -> [...]

    k (total collapse) to E (evenly). Over E it compares layers. Under uniformly random choice about
    ``E exp(-(E - k) / (2 N k))``. NaN without load.
    """
    return _entropy(counts).exp()


def max_violation(counts: Array) -> Tensor:
    """``MaxVio = max c / mean c - 1``: by how much the busiest expert exceeds its fair share. [..., E] -> [...]

    0 = evenly; at most E/k - 1. Under uniformly random choice about ``sqrt(2 ln E (1 - k/E) / (N k / E))``.
    Source: arXiv:2408.15664.
    """
    counts = _double(counts)
    return counts.amax(-1) / counts.mean(-1) - 1


def expert_ratio(counts: Array) -> Tensor:
    """``rho_G(e) = c_e / sum c`` of the assignments of one group of tokens (a domain, a language, a position, a token
    id): which experts the group goes to. [..., E] -> [..., E]

    Sums to 1; 1 / E each = no preference. With K different experts a token no ratio exceeds 1 / K. Take what was
    requested, before capacity dropped some, unless the drops are the question. NaN without load.
    Source: OpenMoE, arXiv:2402.01739, figures 5 to 11.
    """
    counts = _double(counts)
    return counts / counts.sum(-1, keepdim=True)


def specialization_std(counts: Array) -> Tensor:
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


def specialization(counts: Array, top_k: int) -> Tensor:
    """``specialization_std`` over its maximum, which compares models of different E and K. [..., E] -> [...]

    0 = evenly, 1 = always the same K experts. Under uniformly random choice about ``1 / sqrt(n)`` for n tokens. 0 where
    K = E, since then there is nothing to choose. NaN without load.
    """
    std = specialization_std(counts)
    highest = max_specialization_std(counts.shape[-1], top_k)
    return std / highest if highest else std * 0


def expert_information(counts: Array) -> Tensor:
    """``I(V; Expert) / H(Expert)``: which share of the experts' entropy is known from the token id (or domain, or any
    other label) v of a pair. [..., V, E] -> [...]

    0 = the experts do not depend on v; 1 = v decides the expert; where v decides a set of K equal experts,
    ``1 - ln K / H(Expert)``. Under choice that ignores v about ``(V - 1)(E - K) / (2 N H)`` for N pairs, which is not
    small where labels are rare: leave those out. NaN where fewer than two experts have load.

    Args:
        counts: [..., V, E] pairs of label v that go to expert e.
    """
    counts = _double(counts)
    pairs = counts.sum((-2, -1))
    label = counts.sum(-1)
    within = torch.where(label > 0, label * _entropy(counts), 0).sum(-1) / pairs
    total = _entropy(counts.sum(-2))
    return ((total - within) / total).masked_fill(total == 0, torch.nan)


def expert_distance(counts: Array, other: Array) -> Tensor:
    """``sqrt(JS(rho, rho') / ln 2)``, the Jensen-Shannon distance of two groups' expert ratios, or of one group's at
    two times: ``JS = H((rho + rho') / 2) - (H(rho) + H(rho')) / 2``. [..., E] twice -> [...]

    A metric. 0 = the same ratios, 1 = no expert in common. Two groups of n and n' tokens under uniformly random choice
    are about ``sqrt((E - K) (1/n + 1/n') / (8 K ln 2))`` apart. Ratios may be given for counts. NaN without load.
    """
    ratio, other = expert_ratio(counts), expert_ratio(other)
    divergence = _entropy((ratio + other) / 2) - (_entropy(ratio) + _entropy(other)) / 2
    return (divergence.clamp(min=0) / math.log(2)).sqrt()


def drop_by_position(requested: Array, dispatched: Array) -> Tensor:
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
    requested, dispatched = torch.as_tensor(requested), torch.as_tensor(dispatched)
    asked, kept = ((ids >= 0).sum(-1)[None].flatten(0, -2).sum(0).double() for ids in (requested, dispatched))
    return 1 - kept / asked


def routing_change(before: Routing | Array, after: Routing | Array) -> Tensor:
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


def min_violation(counts: Array) -> Tensor:
    """``MinVio = (mean c - min c) / mean c``: how far the idlest expert is below its fair share. [..., E] -> [...]

    0 = evenly, 1 = an expert without any. Under uniformly random choice about as large as MaxVio's null, at most 1.
    NaN without load.
    """
    counts = _double(counts)
    return 1 - counts.amin(-1) / counts.mean(-1)


def imbalance(counts: Array) -> Tensor:
    """``max c / mean c = MaxVio + 1``: the busiest expert in fair shares. 1 to E/k. [..., E] -> [...]"""
    return max_violation(counts) + 1


def coefficient_of_variation(counts: Array, ddof: int = 1) -> Tensor:
    """``sd(c) / mean(c)``, the squares divided by E - ddof. [..., E] -> [...]

    0 = evenly; at most ``sqrt((E/k - 1) E / (E - ddof))``. Under uniformly random choice about
    ``sqrt((1 - k/E) E / (N k))``. NaN without load, and for E <= ddof. V-MoE's importance loss is the square with
    ddof=0, of summed scores (arXiv:2106.05974).
    """
    counts = _double(counts)
    squares = (counts - counts.mean(-1, keepdim=True)).square().sum(-1)
    free = counts.shape[-1] - ddof
    return (squares / free if free > 0 else squares * torch.nan).sqrt() / counts.mean(-1)


def dead_fraction(counts: Array, threshold: float = 0.05) -> Tensor:
    """The share of experts with ``c_e = 0`` or ``f_e < threshold / E``: less than that part of a fair share.
    [..., E] -> [...]

    0 = all are used; at most 1 - k/E with threshold 0. Under uniformly random choice about ``(1 - k/E)^N``, 0 from a
    few hundred tokens an expert on. Relative to the fair share, so that 256 balanced experts are not taken for dead.
    NaN without load.
    """
    counts = _double(counts)
    share = counts / counts.sum(-1, keepdim=True)
    dead = ((counts == 0) | (share < threshold / counts.shape[-1])).double().mean(-1)
    return dead.masked_fill(counts.sum(-1) == 0, torch.nan)


def score_balance(counts: Array, score_sum: Array) -> Tensor:
    """``E sum_e f_e P_e``, P_e the mean score: what balance losses weigh. [..., E] twice -> [...]

    1 at balance, and where only one of the two is even; up to E. Frameworks that do not divide f by k report k times
    as much. NaN without load. Source: Switch, arXiv:2101.03961, equation 4.
    """
    return expert_ratio(counts).mul(expert_ratio(score_sum)).sum(-1) * _double(counts).shape[-1]


def drop_rate(counts: Array, requested: Array) -> Tensor:
    """``1 - sum kept / sum requested``: which share of the assignments capacity dropped. [..., E] twice -> [...]

    0 = none, 1 = all; 0 without capacity. NaN without load. Over experts, ``drop_rate(c[..., None], r[..., None])``.
    """
    return 1 - _double(counts).sum(-1) / _double(requested).sum(-1)


def token_entropy(entropy_sum: Array, tokens: Array, experts: int) -> Tensor:
    """``mean_n(-sum_e s ln s) / ln E``: how undecided the router is about a token. [...] twice -> [...]

    0 = sure of one, 1 = indifferent. Low is a confident router or a collapsed one: read it beside the load's entropy.
    0 for E = 1. NaN without tokens.

    Args:
        entropy_sum: the sum over tokens of the entropies of their scores, which sum to 1.
    """
    return _double(entropy_sum) / _double(tokens) / (math.log(experts) if experts > 1 else 1)


def routing_information(score_sum: Array, entropy_sum: Array, tokens: Array, experts: int | None = None) -> Tensor:
    """``(H(P) - mean_n H(s_n)) / ln E``, P the mean scores: how much the scores tell tokens apart. [..., E], [...],
    [...] -> [...]

    0 = scores ignore the token; 1 = each token is sure of one expert, and all are used. High = specialised; low with
    low ``load_entropy`` = collapsed; low with high = indifferent. Under scores that do not depend on tokens about 0. At
    most the load's entropy for one sure expert a token. 0 for E = 1. NaN without tokens.

    Args:
        experts: where columns fill up beyond them; by default the columns.
    """
    score_sum = _double(score_sum)
    experts = score_sum.shape[-1] if experts is None else experts
    information = _entropy(score_sum) - _double(entropy_sum) / _double(tokens)
    # the mean of a concave function is not above that of the mean: below 0 there is rounding only
    return information.clamp(min=0) / (math.log(experts) if experts > 1 else 1)


def score_sums(scores: Array) -> tuple[Tensor, Tensor]:
    """What ``token_entropy`` and ``routing_information`` take, of scores [..., T, E]: their sum over tokens [..., E],
    and that of the tokens' entropies [...]."""
    scores = _double(scores)
    return scores.sum(-2), -torch.special.xlogy(scores, scores).sum((-2, -1))


def top_k_mass(mass_sum: Array, tokens: Array) -> Tensor:
    """``mean_n sum of the chosen experts' scores``: what is left of a token's scores by choosing. [...] twice -> [...]

    k/E (indifferent) to 1 (nothing lost). NaN without tokens.
    """
    return _double(mass_sum) / _double(tokens)


def margins(logits: Array, index: Array) -> Tensor:
    """``(least chosen z - largest other z) / sd(z)`` of each token: ``(z_(k) - z_(k+1)) / sd(z)`` where the k largest
    are chosen. [..., T, E], ids [..., T, K] -> [..., T]

    Small = the choice flips under noise, dropout or rounding. Below 0 where the choice is not by logits alone (a
    steering bias, experts that choose). sd is the population's, of the finite logits. NaN where nothing or everything
    is chosen, and where all logits are equal.
    """
    logits, index = _double(logits), torch.as_tensor(index)
    chosen = torch.zeros((*logits.shape[:-1], logits.shape[-1] + 1), dtype=torch.bool, device=logits.device)
    chosen = chosen.scatter(-1, torch.where(index < 0, logits.shape[-1], index).long(), True)[..., :-1]
    finite = logits.isfinite()
    number = finite.sum(-1, keepdim=True)
    centred = (logits - logits.masked_fill(~finite, 0).sum(-1, keepdim=True) / number).masked_fill(~finite, 0)
    deviation = (centred.square().sum(-1) / number.squeeze(-1)).sqrt()
    least = logits.masked_fill(~chosen, torch.inf).amin(-1)
    other = logits.masked_fill(chosen, -torch.inf).amax(-1)
    some = chosen.any(-1) & ~chosen.all(-1) & (deviation > 0)
    return ((least - other) / deviation).masked_fill(~some, torch.nan)


def margin_below(histogram: Array, edges: Array, limit: float = 0.1) -> Tensor:
    """The share of tokens whose margin is below ``limit``, in deviations of the token's logits. [..., M] -> [...]

    0 = every choice is firm, 1 = all are near flips. Standard normal logits give 0.11 at top-1 of 8 and 0.73 at
    top-8 of 64, for 0.1. NaN without tokens.

    Args:
        edges: [M + 1] of the histogram.

    Raises:
        ValueError: the limit is no edge.
    """
    edges = _double(edges)
    nearest = int((edges[:-1] - limit).abs().argmin())
    if not math.isclose(edges[nearest], limit, rel_tol=1e-6, abs_tol=1e-12):
        raise ValueError(f"limit={limit} is no edge of the histogram: the nearest is {edges[nearest]:g}")
    histogram = _double(histogram)
    return histogram[..., :nearest].sum(-1) / histogram.sum(-1)


def logit_rms(logit_square_sum: Array, tokens: Array) -> Tensor:
    """``sqrt(mean of z^2)`` over tokens and experts: the scale of the router's logits. Growing without end, it hardens
    the choice and loses precision. [...] twice -> [...], at least 0. NaN without tokens.

    Args:
        logit_square_sum: the sum over tokens of each one's mean over experts.
    """
    return (_double(logit_square_sum) / _double(tokens)).sqrt()


def z_loss(z_sum: Array, tokens: Array) -> Tensor:
    """``mean_n logsumexp(z_n)^2``, at least 0; ``(ln E)^2`` for logits 0. [...] twice -> [...]. NaN without tokens.

    Args:
        z_sum: the sum over tokens. Source: ST-MoE, arXiv:2202.08906, equation 5.
    """
    return _double(z_sum) / _double(tokens)


def mean_active(counts: Array, tokens: Array) -> Tensor:
    """``sum c / N``: routed experts that a token has, on average. [..., E], [...] -> [...]. k where k is fixed."""
    return _double(counts).sum(-1) / _double(tokens)


def saturation(before: Array, after: Array) -> Tensor:
    """``mean_n |S_n and S'_n| / |S'_n|``: which share of the experts that a token has at last it had before. ids
    [..., T, K] twice -> [...]

    1 = the routing is what it will be. Two independent uniformly random choices: k/E. Of a fixed batch, or the change
    of the data is measured. Tokens without an expert in ``after`` do not count; NaN where there is no other.
    Source: OLMoE, arXiv:2409.02060, section 5.1.
    """
    before, after = _same_tokens(before, after)
    had = ((after[..., :, None] == before[..., None, :]) & (after >= 0)[..., :, None]).any(-1).sum(-1).double()
    size = (after >= 0).sum(-1)
    return torch.where(size > 0, had / size, 0).sum(-1) / (size > 0).sum(-1)


def fluctuation(before: Array, after: Array) -> Tensor:
    """The share of tokens whose first expert is another one than at the checkpoint before. ids [..., T, K] -> [...]

    0 = none changed. Two independent uniformly random choices: 1 - 1/E. ``routing_change`` compares whole sets. The
    first is the first column: ids must be sorted by rank. NaN without tokens that have one.
    Source: the idea is StableMoE's, arXiv:2204.08396.
    """
    before, after = _same_tokens(before, after)
    return routing_change(before[..., :1], after[..., :1])


def settled_at(first: Array, share: float = 0.95) -> int:
    """The first checkpoint from which on at least ``share`` of the tokens never leave their last first expert. [S, T]
    -> 0 to S - 1

    0 = settled from the start; S - 1 = still moving at the end, or never recorded before.
    """
    first = torch.as_tensor(first)
    kept = (first == first[-1]).flip(0).cumprod(0).flip(0).double().mean(1) >= share
    return int(kept.double().argmax())


def load_drift(counts: Array, other: Array) -> Tensor:
    """``sum_e |f_e - f'_e| / 2``: which share of the load moved to other experts. [..., E] twice -> [...]

    0 = none, 1 = no expert in common. Two windows of N tokens under the same uniformly random choice are about
    ``sqrt((E - k) / (pi N k))`` apart. NaN without load.
    """
    return (expert_ratio(counts) - expert_ratio(other)).abs().sum(-1) / 2


def coactivation(index: Array, experts: int) -> Tensor:
    """N_ij: the tokens that have both i and j, all pairs of a token's set; N_ii those that have i. ids [..., T, K] ->
    [..., E, E] int64"""
    chosen = _chosen_mask(index, experts)
    return (chosen.mT @ chosen).round().long()


def coactivation_share(pairs: Array) -> Tensor:
    """``P(j given i) = N_ij / N_i``: of i's tokens, those that have j too; the diagonal NaN. [..., E, E] -> the same

    0 to 1; a row sums to k - 1. Under uniformly random choice (k - 1)/(E - 1). NaN for experts without tokens.
    Source: OLMoE, arXiv:2409.02060, section 5.2.
    """
    pairs = _double(pairs)
    share = pairs / pairs.diagonal(dim1=-2, dim2=-1)[..., None]
    return share.masked_fill(torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device), torch.nan)


def coactivation_lift(pairs: Array) -> Tensor:
    """``P(j given i) (E - 1) / (k - 1)``, k the mean over assignments of the size of their token's set: together how
    many times as often as by chance. [..., E, E] -> the same, the diagonal NaN

    1 = by chance, 0 = never together. Loaded experts have a lift above 1 with everybody. NaN where k = 1.
    """
    pairs = _double(pairs)
    own = pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
    others = (pairs.sum((-2, -1)) - own) / own
    return (
        coactivation_share(pairs) * (pairs.shape[-1] - 1) / others.masked_fill(others == 0, torch.nan)[..., None, None]
    )


def flow(index: Array, following: Array, experts: int, following_experts: int | None = None) -> Tensor:
    """N_ij: the tokens that have i in a layer and j in another one, every pair of their sets. ids [..., T, K], [..., T,
    K'] -> [..., E, E'] int64"""
    there = experts if following_experts is None else following_experts
    return (_chosen_mask(index, experts).mT @ _chosen_mask(following, there)).round().long()


def flow_lift(joint: Array) -> Tensor:
    """``p_ij / (p_i p_j)``: how many times as often as if the layers chose independently. [..., E, E'] -> the same

    1 = independent. NaN for experts without tokens.
    """
    joint = _double(joint)
    total = joint.sum((-2, -1), keepdim=True)
    return joint * total / (joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True))


def mutual_information(joint: Array) -> Tensor:
    """``2 I / (H + H')``, normalised: what one side of the pairs tells of the other. [..., V, E] -> [...]

    0 = nothing, 1 = each decides the other. Independent sides give about ``(V - 1)(E - 1) / (N (H + H'))`` for N pairs,
    so subtract a null (``specialization_score``). 0 where neither side varies; NaN without pairs.
    """
    joint = _double(joint)
    rows, columns, both = _entropy(joint.sum(-1)), _entropy(joint.sum(-2)), _entropy(joint.flatten(-2))
    total = rows + columns
    return torch.where(total == 0, 0, 2 * (total - both).clamp(min=0) / total).masked_fill(both.isnan(), torch.nan)


def cosines(rows: Array, other: Array | None = None) -> Tensor:
    """Cosines between rows (prototypes, rows of the router), or with those of ``other``: each prototype beside the mean
    of its own tokens is the diagonal. [..., E, D] -> [..., E, E]

    -1 to 1. Random directions: 0, with deviation ``1 / sqrt(D)``. 0 for a row of zeros.
    """
    rows = F.normalize(_double(rows), dim=-1)
    other = rows if other is None else F.normalize(_double(other), dim=-1)
    return rows @ other.mT


def label_counts(index: Array, labels: Array, experts: int, num_labels: int) -> Tensor:
    """How many of a label's tokens have each expert: ids [T, K], labels [T] -> [V, E] int64; labels below 0 do not
    count."""
    index, labels = torch.as_tensor(index).long(), torch.as_tensor(labels).long()
    there = (index >= 0) & (labels >= 0)[:, None]
    cell = (labels[:, None] * experts + index)[there]
    return torch.bincount(cell, minlength=num_labels * experts).view(num_labels, experts)


def label_share(counts: Array, tokens: Array) -> Tensor:
    """``N_ev / N_v``: of the tokens of a label (domain, class, timestep, patch, channel), those that have e. [..., V,
    E], [..., V] -> [..., V, E]

    0 to 1; a row sums to k. Under uniformly random choice k/E: draw that line. NaN for labels without tokens.
    Source: OLMoE, arXiv:2409.02060, section 5.3.
    """
    return _double(counts) / _double(tokens)[..., None]


def context_dependence(counts: Array) -> Tensor:
    """``H(expert given v) / H(expert)``, v the token id: 0 = the id decides the expert, a look-up; 1 = the id tells
    nothing. [..., V, E] -> [...]

    1 - ``expert_information``, with its bias where ids are rare and its NaN.
    """
    return 1 - expert_information(counts)


class AgainstChance(NamedTuple):
    """A measure, what it is by chance, and their difference, which is 0 where there is nothing to see."""

    score: float
    value: float
    chance: float


def specialization_score(
    index: Array, labels: Array, experts: int, num_labels: int, *, permutations: int = 20, seed: int = 0
) -> AgainstChance:
    """``NMI(label, expert)`` over the pairs of a token's label and its experts, minus its mean where labels are
    shuffled over tokens. ids [T, K], labels [T]

    0 = experts do not know the label; below 1 even where they do, since a label cannot tell k experts apart.
    """
    labels = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(seed)

    def measure(given: Tensor) -> float:
        return float(mutual_information(label_counts(index, given, experts, num_labels)))

    shuffled = [measure(labels[torch.randperm(len(labels), generator=generator)]) for _ in range(permutations)]
    value, chance = measure(labels), sum(shuffled) / len(shuffled)
    return AgainstChance(value - chance, value, chance)


def vocabulary_specialization(
    first: Array, token_ids: Array, experts: int, *, min_count: int = 10, permutations: int = 5, seed: int = 0
) -> AgainstChance:
    """Of a token id's occurrences, the share that its commonest first expert handles, averaged over ids with at least
    ``min_count`` of them, weighted by their number; and the same with experts shuffled over tokens. [T] twice

    1 = an id always has the same expert. By chance at least the largest load, and more for rare ids: an id seen once
    would score 1, hence ``min_count``. NaN where no id occurs so often. Source: OLMoE, arXiv:2409.02060, section 5.4.
    """
    first, token_ids = torch.as_tensor(first).long(), torch.as_tensor(token_ids)
    routed = first >= 0
    first, (ids, token) = first[routed], torch.unique(token_ids[routed], return_inverse=True)
    often = torch.bincount(token, minlength=len(ids)) >= min_count
    generator = torch.Generator().manual_seed(seed)

    def measure(given: Tensor) -> float:
        counts = label_counts(given[:, None], token, experts, len(ids))[often]
        return float(counts.amax(-1).sum() / counts.sum()) if len(counts) else math.nan

    shuffled = [measure(first[torch.randperm(len(first), generator=generator)]) for _ in range(permutations)]
    value, chance = measure(first), sum(shuffled) / len(shuffled)
    return AgainstChance(value - chance, value, chance)


def null_load_entropy(tokens: Array, experts: int, top_k: float, quantile: float | None = None) -> Tensor:
    """``load_entropy`` under uniformly random k-subsets: the mean, ``1 - (E - k) / (2 N k ln E)``, or what only the
    share ``quantile`` of windows falls below. [...] tokens -> [...]

    Each count has the variance ``N k/E (1 - k/E)``, and the deficit is nearly chi-squared with E - 1 degrees of
    freedom; good from about 20 assignments an expert on.
    """
    tokens = _double(tokens)
    if experts == 1:
        return torch.ones_like(tokens)
    free = experts - 1
    spread = 1 if quantile is None else _chi_squared(free, 1 - quantile) / free
    return 1 - spread * max(0.0, experts - top_k) / (2 * tokens * top_k * math.log(experts))


def null_collapse_aware_entropy(tokens: Array, experts: int, top_k: float, quantile: float | None = None) -> Tensor:
    """``collapse_aware_entropy`` under uniformly random k-subsets, as ``null_load_entropy``. 1 where k = E."""
    ceiling, floor = math.log(experts), math.log(max(top_k, 1.0))
    if ceiling - floor < 1e-12:
        return torch.ones_like(_double(tokens))
    return (null_load_entropy(tokens, experts, top_k, quantile) * ceiling - floor) / (ceiling - floor)


def null_max_violation(tokens: Array, experts: int, top_k: float, quantile: float | None = None) -> Tensor:
    """``max_violation`` under uniformly random k-subsets: ``sqrt(2 ln E (1 - k/E) / (N k / E))``, which it seldom
    exceeds, or what it stays below in the share ``quantile`` of windows. [...] tokens -> [...]

    The latter takes the counts for normal and independent; good from about 20 assignments an expert on.
    """
    deviation = (max(0.0, 1 - top_k / experts) / (_double(tokens) * top_k / experts)).sqrt()
    if quantile is None:
        return math.sqrt(2 * math.log(experts)) * deviation
    one = torch.tensor(quantile, dtype=torch.float64) ** (1 / experts)
    return torch.special.ndtri(one).clamp(min=0) * deviation


def _chi_squared(free: int, quantile: float) -> float:
    """The quantile by Wilson and Hilferty's cube, good to a percent or so from 3 degrees on."""
    z = float(torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)))
    return free * (1 - 2 / (9 * free) + z * math.sqrt(2 / (9 * free))) ** 3


def _chosen_mask(index: Array, experts: int) -> Tensor:
    """[..., T, E] of 0 and 1, in float64, which holds counts exactly."""
    index = torch.as_tensor(index).long()
    mask = torch.zeros((*index.shape[:-1], experts + 1), dtype=torch.float64, device=index.device)
    return mask.scatter(-1, torch.where(index < 0, experts, index), 1)[..., :-1]


def _same_tokens(before: Array, after: Array) -> tuple[Tensor, Tensor]:
    before, after = torch.as_tensor(before), torch.as_tensor(after)
    if before.shape[:-1] != after.shape[:-1] or before.dim() < 2:
        shapes = f"ids {tuple(before.shape)} and {tuple(after.shape)}"
        raise ValueError(f"{shapes}: both must be [..., T, K], of the same tokens")
    return before, after


def _chosen(decision: Routing | Array) -> Tensor:
    """The ids of the pairs that count as load, -1 filling up. [T, K]"""
    if not isinstance(decision, Routing):
        return torch.as_tensor(decision)
    if decision.selected is not None:
        decision = Routing.from_mask(decision.selected, decision.selected)
    return decision.as_topk()[0]


def _double(values: Array) -> Tensor:
    return torch.as_tensor(values).double()


def _entropy(counts: Array) -> Tensor:
    share = _double(counts) / _double(counts).sum(-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(-1)
