"""Auxiliary losses of routers, as pure functions. A router weighs and returns them; nobody hides them in a backward.

balance      E * sum_e f_e P_e                         1 at perfect balance     Switch, arXiv:2101.03961, eq. 4
z            mean_t (logsumexp_e logits_te)^2                                   ST-MoE, arXiv:2202.08906, eq. 5
contrastive  -1/N_a sum_i log softmax_j(cos(p_i, m_j) / tau)_i                  ProMoE, arXiv:2510.24711, eq. 6
similarity   1/T sum_ij W_ij (P^T P)_ij                                         Expert Race, arXiv:2503.16057
CV^2         var_e(v_e) / mean_e(v_e)^2                0 at perfect balance     Shazeer et al., arXiv:1701.06538, eq. 7
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def balance_loss(scores_TE: Tensor, counts_E: Tensor, real_T: Tensor | None = None) -> Tensor:
    """``E * sum_e f_e P_e``: f_e the share of assignments that go to e (no gradient), P_e the mean score. 1 at balance.

    Args:
        scores_TE: scores whose rows sum to 1.
        counts_E: assignments of each expert, before capacity.
        real_T: tokens that count; None = all.
    """
    # divided as the scores' dtype: integers would give a float32 share, also beside float64 scores
    share_E = counts_E.to(scores_TE.dtype) / counts_E.sum().clamp(min=1)
    return scores_TE.shape[1] * (share_E * _mean(scores_TE, real_T)).sum()


def z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """``mean_t (logsumexp_e logits_te)^2``, which keeps logits small. (ln E)^2 for zero logits."""
    return _mean(logits_TE.logsumexp(1).square(), real_T)


def squared_variation(values_E: Tensor) -> Tensor:
    """``var_e(v_e) / mean_e(v_e)^2``, the squared coefficient of variation: 0 where all are equal, E - 1 where one has
    everything. The variance divides by E. 0 where all are 0.

    Args:
        values_E: one non-negative number an expert: its importance or load.
    """
    variance = values_E.var(correction=0)
    return variance / values_E.mean().square().clamp(min=torch.finfo(values_E.dtype).tiny)


def contrastive_loss(prototypes_ED: Tensor, centroids_GED: Tensor, active_GE: Tensor, temperature: float) -> Tensor:
    """Pulls each prototype to the centroid of its own tokens and away from the centroids of the others.

        -mean over groups g and active i of  log softmax_j( cos(p_i, m_gj) / tau )_i,  the softmax over active j

    Prototypes are anchors, centroids positives and negatives; gradient reaches both. 0 where fewer than two experts
    are active.

    Args:
        centroids_GED: mean of each expert's tokens, one set a group (the whole batch is one group).
        active_GE: bool, which experts received tokens.
        temperature: tau.
    """
    cosine_GEE = F.normalize(prototypes_ED, dim=-1) @ F.normalize(centroids_GED, dim=-1).transpose(1, 2)
    logits_GEE = (cosine_GEE / temperature).masked_fill(~active_GE[:, None, :], -torch.inf)
    # rows of inactive experts are replaced before the softmax: a row of -inf would put NaN into the gradient
    own_GE = logits_GEE.masked_fill(~active_GE[:, :, None], 0).log_softmax(-1).diagonal(dim1=1, dim2=2)
    return -(own_GE * active_GE).sum() / active_GE.sum().clamp(min=1)


def similarity_loss(probabilities_TE: Tensor, chosen_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Pushes experts that are often chosen together to different probabilities; its diagonal balances the load.

        M' = M^T M, P' = P^T P;   W_ii = E M'_ii / sum_a M'_aa,   W_ij = (E^2 - E) M'_ij / sum_{a != b} M'_ab
        1/T sum_ij W_ij P'_ij

    Args:
        probabilities_TE: softmax of the logits over the experts.
        chosen_TE: 0/1, who was chosen; no gradient.
        real_T: tokens that count; None = all.
    """
    tokens, experts = probabilities_TE.shape
    if real_T is not None:
        probabilities_TE = probabilities_TE.masked_fill(~real_T[:, None], 0)
        tokens = real_T.sum()
    chosen_TE = chosen_TE.to(probabilities_TE.dtype)
    together_EE = chosen_TE.T @ chosen_TE
    diagonal_EE = torch.eye(experts, dtype=torch.bool, device=together_EE.device)
    own, other = together_EE * diagonal_EE, together_EE * ~diagonal_EE
    weight_EE = experts * own / own.sum().clamp(min=1) + (experts**2 - experts) * other / other.sum().clamp(min=1)
    total = (weight_EE * (probabilities_TE.T @ probabilities_TE)).sum()
    return total / (max(tokens, 1) if real_T is None else tokens.clamp(min=1))


def _mean(values_T: Tensor, real_T: Tensor | None) -> Tensor:
    """Mean over the first dimension, over real tokens only; 0 where there is none."""
    if real_T is None:
        return values_T.sum(0) / max(len(values_T), 1)
    mask = real_T.view(-1, *[1] * (values_T.dim() - 1))
    return values_T.masked_fill(~mask, 0).sum(0) / real_T.sum().clamp(min=1)
