"""Averaging a gate's scores over tokens before it assigns: what similarity- and attention-aware routing share.

    r_j  = scores of the base gate for token j              any router in three steps (``GatedRouter``)
    r~_i = (1 - blend) r_i + blend * sum_j S_ij r_j         S: rows sum to 1, within a sequence; what a subclass defines
    the base gate assigns by r~; token i's experts still process token i

Everything after the average is the base gate's: choice, weights, bias, groups, capacity, losses, state. It is given
logits with scores r~; where the scores do not tell the level of the logits (softmax), it stays that of the plain gate,
so that a z-loss means what it did.
"""

from typing import Any

import torch
from torch import Tensor

from .base import GatedRouter, Router, Routing, TokenContext, create_router, list_routers, router_class
from .topk import TopKRouter


class SmoothedRouter(Router):
    """``average`` is what a subclass defines.

    **Incremental decoding.** With ``context.cache``, a dict of the caller, each call's tokens follow those of the calls
    before, and decisions are those of one call over all of them. A router keeps its part under the key
    ``"{name}.{context.layer}"``: a dict of tensors [B, tokens so far, ...]. Whoever reorders samples (beams) reorders
    the first dimension of each; whoever drops tokens (speculative decoding) cuts the second. Nothing is kept of the
    graph.
    """

    evidence = "reconstruction"
    paper = "Graph of Tokens, arXiv:2505.00792"
    # of the default base gate, where no other is known; a router has its own gate's
    requires_by_option = TopKRouter.requires_by_option
    loss_names = TopKRouter.loss_names
    state_names = tuple(f"base.{name}" for name in TopKRouter.state_names)

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int | None,
        base: str,
        base_options: dict[str, Any] | None,
        left_to_right: bool,
        blend: float,
    ) -> None:
        if not 0 <= blend <= 1:
            raise ValueError(f"blend={blend}: choose 0 (the plain gate) to 1 (the average alone)")
        gate = _create_gate(base, base_options, dim, num_experts, top_k)
        super().__init__(num_experts=gate.num_experts, expert_kinds=gate.expert_kinds)
        self.base, self.left_to_right, self.blend = gate, left_to_right, blend
        self.requires_by_option, self.loss_names = gate.requires_by_option, gate.loss_names
        self.state_names = tuple(f"base.{name}" for name in gate.state_names)
        level_E = torch.zeros(1, gate.bank_size, device="cpu")
        self._scores_have_no_level = torch.equal(gate.scores(level_E), gate.scores(level_E + 1))

    @property
    def requires(self) -> tuple[str, ...]:
        return self.base.requires

    @property
    def causal(self) -> bool:
        return self.left_to_right and self.base.causal

    @property
    def causal_option(self) -> str:
        return self.base.causal_option if self.left_to_right else "causal=True"

    @property
    def batch_independent(self) -> bool:
        return self.base.batch_independent

    @property
    def without_gradient(self) -> tuple[str, ...]:
        return tuple(n if n in ("tokens", "weights") else f"base.{n}" for n in self.base.without_gradient)

    @property
    def reductions(self) -> dict[str, str]:
        return dict(self.base.reductions)

    @property
    def stateful(self) -> bool:
        return self.base.stateful

    def update(self, stats: dict[str, Tensor]) -> None:
        self.base.update(stats)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        logits_TE = self.base.logits(x_TD, context)
        scores_TE = self.base.scores(logits_TE)
        if not self.blend:
            return self.base.assign(logits_TE, scores_TE, context)
        # 0 * NaN would reach the tokens that may not see this one
        finite_TE = scores_TE.masked_fill(~scores_TE.isfinite(), 0)
        average_BLE = self.average(x_TD, finite_TE.unflatten(0, (context.batch_size, context.length)), context)
        smooth_TE = scores_TE.lerp(average_BLE.to(scores_TE.dtype).flatten(0, 1), self.blend)
        if context.real_T is not None:
            smooth_TE = torch.where(context.real_T[:, None], smooth_TE, scores_TE)
        smooth_logits_TE = self.base.logits_of(smooth_TE)
        if self._scores_have_no_level:
            level_T1 = logits_TE.logsumexp(1, keepdim=True)
            smooth_logits_TE = smooth_logits_TE + level_T1 - self.base.logits_of(scores_TE).logsumexp(1, keepdim=True)
        return self.base.assign(smooth_logits_TE, smooth_TE, context)

    def average(self, x_TD: Tensor, scores_BLE: Tensor, context: TokenContext) -> Tensor:
        """S applied to the scores, earlier tokens' included. [B, L, E]; padded tokens' rows are ignored."""
        raise NotImplementedError(f"{type(self).__name__} must define average(x, scores, context) -> [B, L, E]")

    def with_past(self, context: TokenContext, **new: Tensor) -> dict[str, Tensor]:
        """The tensors [B, L, ...] after those that earlier calls left in the cache, [B, S, ...], which the cache then
        holds for the next call. Without a cache they are returned as they are.

        Raises:
            ValueError: a cache in training, where decisions are not left to right, or of other samples or entries.
        """
        if context.cache is None:
            return new
        if self.training or not self.left_to_right:
            why = "call model.eval()" if self.training else "make the router with causal=True"
            raise ValueError(f'router "{self.name}" got a context.cache, which is for decoding left to right: {why}')
        key = f"{self.name}.{context.layer}"
        past = context.cache.get(key)
        if past is not None:
            if past.keys() != new.keys():
                raise ValueError(
                    f'context.cache["{key}"] holds {", ".join(past)}, and this call brings {", ".join(new)}: give '
                    "context.document in every call of a sequence or in none"
                )
            samples, given = past["scores"].shape[0], new["scores"].shape[0]
            if samples != given:
                raise ValueError(
                    f'context.cache["{key}"] holds {samples} samples, and the batch has {given}: select the same rows '
                    "of its tensors"
                )
            new = {name: torch.cat([past[name], now], dim=1) for name, now in new.items()}
        context.cache[key] = {name: now.detach() for name, now in new.items()}
        return new


def _create_gate(
    base: str, base_options: dict[str, Any] | None, dim: int, num_experts: int, top_k: int | None
) -> GatedRouter:
    """The base gate by its registered name."""
    if not can_be_base(base):
        works = ", ".join(name for name in list_routers() if can_be_base(name))
        raise ValueError(
            f'base="{base}" does not decide by scores of its own that could be averaged before it assigns '
            f"(GatedRouter, in three steps): choose one of {works}"
        )
    own = {"dim": dim, "num_experts": num_experts} | ({} if top_k is None else {"top_k": top_k})
    twice = sorted(own.keys() & (base_options or {}).keys())
    if twice:
        raise ValueError(f"base_options={base_options}: {', '.join(twice)} is an option of the router itself")
    return create_router(base, **own, **base_options or {})


def can_be_base(name: str) -> bool:
    """Whether the router is its three steps and nothing beside them, so that nothing of it is lost."""
    cls = router_class(name)[0]
    return issubclass(cls, GatedRouter) and cls.forward is GatedRouter.forward
