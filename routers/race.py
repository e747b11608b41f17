"""Expert Race: all (token, expert) pairs of the batch compete for one budget.

    logits Z = W2 gelu(W1 x);  gate = Z (identity), sigmoid, or softmax over the experts
    training    the top_k * T highest gates of the whole pool (this micro-batch) win; a token may have 0 to E experts
                after the step  tau <- decay * tau + (1 - decay) * (the smallest winning gate; mean over pools)
    inference   every pair with gate >= tau: independent of the batch
    loss similarity = similarity_weight * L_sim    (``losses.similarity_loss``)
    prediction = W3 gelu(W1 x)  [T, P]: a second head that the recipe holds against the model's target, for per-layer
                regularisation

Source: Expert Race, arXiv:2503.16057, of which tables and captions were read, and two unofficial implementations; they
agree on the loss's weights and differ in its normaliser (here 1/T) and in the momentum (0.95 and 0.99). The paper's
loss weights were not seen.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, apply_linear, register_router, router_dtype
from .losses import similarity_loss
from .selection import check_mean_top_k, check_not_negative


@register_router("race")
class RaceRouter(Router):
    evidence = "reconstruction"
    paper = "Expert Race, arXiv:2503.16057"
    selection = "pool"
    loss_names = ("similarity",)
    state_names = ("threshold",)
    reductions = {"cut": "sum", "pools": "sum"}

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: float = 1.0,
        gate: Literal["identity", "sigmoid", "softmax"] = "identity",
        similarity_weight: float = 1e-4,
        threshold_decay: float = 0.95,
        prediction_dim: int | None = None,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token on average.
            gate: what competes, and the weight.
            similarity_weight: of the loss ``similarity``; 0 = no such loss.
            threshold_decay: of the running threshold.
            prediction_dim: width P of the second head; None = no such head.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_not_negative(similarity_weight=similarity_weight)
        check_mean_top_k(top_k, num_experts)
        if gate not in ("identity", "sigmoid", "softmax"):
            raise ValueError(f'gate="{gate}": choose "identity", "sigmoid" or "softmax"')
        if not 0 <= threshold_decay < 1:
            raise ValueError(f"threshold_decay={threshold_decay}: choose 0 to less than 1")
        if prediction_dim is not None and prediction_dim < 1:
            raise ValueError(f"prediction_dim={prediction_dim}: choose at least 1, or None for no such head")
        self.top_k, self.gate = top_k, gate
        self.similarity_weight, self.threshold_decay = similarity_weight, threshold_decay
        self.hidden = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, num_experts)
        self.head = None if prediction_dim is None else nn.Linear(dim, prediction_dim)
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def without_gradient(self) -> tuple[str, ...]:
        return () if self.head is None else ("head",)

    @property
    def batch_independent(self) -> bool:
        return not self.training

    @property
    def causal(self) -> bool:
        return not self.training

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype, real_T = router_dtype(x_TD), context.real_T
        hidden_TD = F.gelu(apply_linear(self.hidden, x_TD.to(dtype)))
        logits_TE = apply_linear(self.out, hidden_TD)
        scores_TE = logits_TE.softmax(-1)
        gates_TE = {"identity": logits_TE, "sigmoid": logits_TE.sigmoid(), "softmax": scores_TE}[self.gate]
        running_TE = gates_TE.detach()
        if real_T is not None:
            running_TE = running_TE.masked_fill(~real_T[:, None], -torch.inf)

        losses, stats = {}, {}
        if self.training:
            won_TE, stats["cut"], stats["pools"] = self._race(running_TE, real_T)
            if self.similarity_weight:
                losses["similarity"] = self.similarity_weight * similarity_loss(scores_TE, won_TE, real_T)
        else:
            won_TE = running_TE >= self.threshold.to(dtype)
        prediction = None if self.head is None else apply_linear(self.head, hidden_TD)
        return Routing.from_mask(
            won_TE, gates_TE, logits=logits_TE, scores=scores_TE, prediction=prediction, losses=losses, stats=stats
        )

    def _race(self, running_TE: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The winners [T, E], exactly the budget (ties to the earlier pair); the smallest winning gate, or 0 where
        nobody wins; whether anybody does."""
        budget = int(self.top_k * len(running_TE)) if real_T is None else (self.top_k * real_T.sum().double()).long()
        value, order = running_TE.flatten().sort(descending=True, stable=True)
        place = torch.arange(len(order), device=order.device)
        won_TE = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, place < budget).view_as(running_TE)
        is_last = place == budget - 1
        return won_TE, value.where(is_last, 0).sum(), is_last.any().to(value.dtype)

    def update(self, stats: dict[str, Tensor]) -> None:
        cut = (stats["cut"] / stats["pools"].clamp(min=1)).to(self.threshold.dtype)
        moves = (stats["pools"] > 0).to(self.threshold.dtype)
        self.threshold.lerp_(cut, (1 - self.threshold_decay) * moves)
