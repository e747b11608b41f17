"""Who takes whom: choices along other axes than a token's own, and what a full expert drops.

    expert choice   each expert takes the k tokens of its group (a sample, or the whole pool) with the highest scores
    capacity        an expert keeps at most ceil(C), C = factor * K * T / E, of its assignments

Ties go to the earlier token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.permute import sort_by_expert
from .base import TokenContext

DROP_POLICIES = ("position", "probability", "choice")


def experts_take(scores_GME: Tensor, k_GE: Tensor, eligible_GM: Tensor | None = None) -> Tensor:
    """In each group, expert e takes its ``k_GE`` tokens of highest score.

    Args:
        scores_GME: G groups of M tokens.
        k_GE: how many, at most the group's eligible tokens.
        eligible_GM: who may be taken; None = all.

    Returns:
        [G, M, E] bool.
    """
    scores_GME = scores_GME.detach()
    if eligible_GM is not None:
        scores_GME = scores_GME.masked_fill(~eligible_GM[:, :, None], -torch.inf)
    order_GME = scores_GME.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(scores_GME.shape[1], device=scores_GME.device)[None, :, None]
    best_GME = place < k_GE[:, None, :]
    taken_GME = torch.zeros_like(best_GME).scatter(1, order_GME, best_GME)
    return taken_GME if eligible_GM is None else taken_GME & eligible_GM[:, :, None]


def tokens_per_expert(real_G: Tensor, num_experts: int, top_k: float) -> Tensor:
    """k = max(1, min(int(M / E * top_k), M)) for groups of M = ``real_G`` eligible tokens, 0 where M is 0: [G] int64"""
    k_G = (real_G.double() / num_experts * top_k).to(torch.int64)
    return torch.minimum(k_G.clamp(min=1), real_G)


def drop_padding(index_TK: Tensor, weight_TK: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Takes padded tokens' assignments away: id -1, weight 0."""
    if real_T is None:
        return index_TK, weight_TK
    return index_TK.masked_fill(~real_T[:, None], -1), weight_TK.masked_fill(~real_T[:, None], 0)


def known_ids(id_BL: Tensor, count: int, real_T: Tensor | None, field: str, option: str) -> Tensor:
    """Ids of tokens, 0 where a token is padded: [T].

    Args:
        id_BL: ``field`` of the context.
        count: how many ids there are, the router's ``option``.

    Raises:
        RuntimeError: a real token's id is not 0 to count - 1. On a GPU with the next wait for the device; this waits
            for nothing.
    """
    id_T = id_BL.flatten()
    if real_T is not None:
        id_T = id_T.masked_fill(~real_T, 0)
    known = ((id_T >= 0) & (id_T < count)).all()
    torch._assert_async(known, f"{field} holds an id out of range: expected 0 to {count - 1}, from {option}={count}")
    return id_T


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises ValueError unless a token can have ``top_k`` different experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} with {num_experts} experts: choose 1 to {num_experts}")


def check_mean_top_k(top_k: float, num_experts: int) -> None:
    """Raises ValueError unless tokens can have ``top_k`` different experts on average."""
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k={top_k} with {num_experts} experts: choose above 0, at most {num_experts}")


def check_not_negative(**options: float) -> None:
    """Raises ValueError unless every option is a finite number of at least 0."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: choose a finite number of at least 0")


def check_jitter(jitter: float) -> None:
    """Raises ValueError unless ``jittered`` can multiply by it."""
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter={jitter}: choose 0 (none) to less than 1")


def jittered(x_TD: Tensor, jitter: float, context: TokenContext) -> Tensor:
    """x times U(1 - jitter, 1 + jitter), elementwise, by the context's noise. [T, D]"""
    uniform_TD = context.noise(*x_TD.shape, distribution="uniform").to(x_TD.dtype)
    return x_TD * (1 + jitter * (2 * uniform_TD - 1))


def keep_within_capacity(
    expert_TK: Tensor, weight_TK: Tensor, num_experts: int, capacity: Tensor | float, policy: str
) -> Tensor:
    """Which assignments fit: [T, K] bool.

    Args:
        expert_TK: ids; -1 is no assignment.
        weight_TK: what "probability" ranks by.
        capacity: C; an expert keeps at most ceil(C) assignments. [num_experts] where they differ.
        policy: "position": the first ones in token order; "probability": those of highest weight. Both are those of
            Megatron-Core's ``moe_token_drop_policy``. "choice": every token's first choice in token order, then every
            second one, and so on, as flaxformer does.
    """
    flat = expert_TK.flatten()
    by = torch.arange(len(flat), device=flat.device)
    if policy == "choice":
        by = by.view(expert_TK.shape).T.flatten()
    elif policy == "probability":
        by = weight_TK.detach().flatten().argsort(descending=True, stable=True)
    expert = torch.where(flat < 0, num_experts, flat)[by]
    order, _, first_E = sort_by_expert(expert, num_experts + 1)
    expert = expert[order]
    rank = torch.arange(len(flat), device=flat.device) - first_E[expert]
    if isinstance(capacity, Tensor) and capacity.dim() == 1:
        capacity = F.pad(capacity, (0, 1))[expert]
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(0, by[order], (rank < capacity) & (expert < num_experts))
    return keep.view_as(expert_TK)


def check_drop(capacity_factor: float | None, drop_policy: str) -> None:
    """Raises ValueError for a capacity factor or policy outside its range."""
    if capacity_factor is not None and not (capacity_factor > 0 and math.isfinite(capacity_factor)):
        raise ValueError(f"capacity_factor={capacity_factor}: choose a positive number, or None to drop nothing")
    if drop_policy not in DROP_POLICIES:
        raise ValueError(f'drop_policy="{drop_policy}": choose one of {DROP_POLICIES}')
