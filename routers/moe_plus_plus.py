"""MoE++: beside feed-forwards, experts that cost nothing: nothing, the token itself, or a learned vector.

    L = W x + W_g L'                   L' the logits of the MoE layer before, from the second one on (``residual``)
    p = softmax(L);  the K highest;  the weight of a zero expert is set to 0, then all are divided by their sum
    zero(x) = 0    copy(x) = x    constant(x) = a_0 x + a_1 v,  (a_0, a_1) = softmax(W_c x)
    balance = sum_e eta_e f_e P_e                 eta = 1 for a feed-forward, tau for the others;
                                                  f_e = assignments / T, P_e = mean of p
    C_e     = gamma K T eta'_e / (tau N + Z)      eta' = tau for a feed-forward, 1 for the others

Ids: N feed-forwards, constants, copies, zeros, as the code orders them. A constant chosen with weight w becomes two
assignments: w a_1 at its own id, whose expert is v, and w a_0 at one id more, the last, of kind "copy", which collects
that of all constants. Nothing is chosen there: its logit is -inf, and ``Routing.selected`` leaves it out of the load.

Sources: arXiv:2410.07348, and the released inference code, ``MoE++/moe_plus_plus_layer.py``, to which gate, weights and
experts were held. Balance loss and capacity are the paper's (equations 7 and 8): no training code is released. With the
paper's C, all experts together take gamma T of the K T assignments; the K here is ours.

What to know: with K = 1 every weight is 1, and only the balance loss teaches the router. The released code multiplies
the experts' input by K, in place and after the gate has read it (unless ``moe_feature_no_mul_topk``); here experts see
x, so its weights need W_1, W_c and what copies return multiplied by K. Its constants start as N(0, 1). The model hands
on ``TokenContext.previous_logits`` = ``Routing.logits`` of the layer before, with its gradient.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, count_experts, register_router, router_dtype
from .selection import check_drop, check_not_negative, check_top_k, drop_padding, keep_within_capacity


@register_router("moe_plus_plus")
class MoEPlusPlusRouter(Router):
    evidence = "code"
    paper = "MoE++, arXiv:2410.07348"
    requires_by_option = ("previous_logits",)
    loss_names = ("balance",)
    causal_option = 'drop_policy="position"'

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        constant_experts: int = 2,
        copy_experts: int = 1,
        zero_experts: int = 1,
        residual: bool = False,
        gate: Literal["linear", "mlp"] = "linear",
        tau: float = 0.75,
        balance_weight: float = 0.01,
        capacity_factor: float | None = None,
        drop_policy: Literal["position", "probability", "choice"] = "position",
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: feed-forwards, N.
            top_k: experts a token, K, those without computation among them.
            constant_experts, copy_experts, zero_experts: Z in all.
            residual: add W_g L'; False in the first MoE layer.
            gate: "linear" as in the paper, or "mlp", W_2 tanh(W_1 x) of width 8 (N + Z), the released code's default.
            tau: in the balance loss and the capacity; a smaller one sends more tokens to experts without computation.
            balance_weight: of the loss ``balance`` (beta of the paper).
            capacity_factor: gamma (the paper's 1.1); None drops nothing, as the released code.
            drop_policy: which assignments a full expert keeps: the first, those of highest weight, or every token's
                first choice before any second. The paper does not say.
            init_std: deviation of the initial weights.

        Raises:
            ValueError: an option outside its range.
        """
        free = {"constant": constant_experts, "copy": copy_experts, "zero": zero_experts}
        for kind, count in free.items():
            if count < 0:
                raise ValueError(f"{kind}_experts={count}: choose at least 0")
        chosen = ("routed",) * num_experts + tuple(kind for kind, count in free.items() for _ in range(count))
        # where the constants' shares of the token are collected
        kinds = chosen + ("copy",) * (constant_experts > 0)
        super().__init__(num_experts=num_experts, expert_kinds=kinds)
        self.num_chosen = len(chosen)
        check_top_k(top_k, self.num_chosen)
        check_drop(capacity_factor, drop_policy)
        check_not_negative(balance_weight=balance_weight, init_std=init_std)
        if gate not in ("linear", "mlp"):
            raise ValueError(f'gate="{gate}": choose "linear" or "mlp"')
        if not 0 < tau < math.inf:
            raise ValueError(f"tau={tau}: choose above 0")
        self.top_k, self.residual, self.tau, self.balance_weight = top_k, residual, tau, balance_weight
        self.constant_experts, self.first_zero = constant_experts, self.num_chosen - zero_experts
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).normal_(0, init_std))

        hidden = 8 * self.num_chosen
        self.weight = drawn(self.num_chosen, dim if gate == "linear" else hidden)
        self.hidden_weight = drawn(hidden, dim) if gate == "mlp" else None
        self.residual_weight = drawn(self.num_chosen, self.num_chosen) if residual else None
        self.share_weight = drawn(constant_experts, 2, dim) if constant_experts else None

    @property
    def requires(self) -> tuple[str, ...]:
        return ("previous_logits",) if self.residual else ()

    @property
    def without_gradient(self) -> tuple[str, ...]:
        # one weight divided by itself is 1 whatever the token is
        if self.top_k > 1 or self.balance_weight:
            return ()
        gate = ("weight", "hidden_weight", "residual_weight")
        here = tuple(name for name in gate if getattr(self, name) is not None)
        return here if self.constant_experts else ("tokens", *here)

    @property
    def causal(self) -> bool:
        return self.capacity_factor is None or self.drop_policy == "position"

    @property
    def batch_independent(self) -> bool:
        return self.capacity_factor is None

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        real_T = context.real_T
        x_TD = x_TD.to(router_dtype(x_TD))
        logits_TM = self._logits(x_TD, context)
        scores_TM = logits_TM.softmax(-1)
        index_TK = scores_TM.detach().topk(self.top_k, dim=-1).indices
        index_TK, weight_TK = drop_padding(index_TK, self._weights(logits_TM, index_TK), real_T)
        load_M = count_experts(index_TK, self.num_chosen)
        tokens = torch.full((), len(x_TD), device=x_TD.device) if real_T is None else real_T.sum()

        requested = None
        if self.capacity_factor is not None:
            requested, capacity_M = index_TK, self._capacity(tokens)
            keep_TK = keep_within_capacity(index_TK, weight_TK, self.num_chosen, capacity_M, self.drop_policy)
            index_TK, weight_TK = index_TK.masked_fill(~keep_TK, -1), weight_TK.masked_fill(~keep_TK, 0)
        losses = {}
        if self.balance_weight:
            losses["balance"] = self.balance_weight * self._balance(scores_TM, load_M, tokens, real_T)
        fields = {"logits": logits_TM, "scores": scores_TM, "requested": requested, "losses": losses}
        if self.constant_experts:
            index_TK, weight_TK, fields["selected"] = self._split_constants(x_TD, index_TK, weight_TK)
            fields["logits"] = F.pad(logits_TM, (0, 1), value=-torch.inf)
            fields["scores"] = F.pad(scores_TM, (0, 1))
        return Routing.from_topk(index_TK, weight_TK, bank_size=self.bank_size, **fields)

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        previous_TE = torch.arange(16 * 9).view(16, 9).double().sin().float()
        previous_TE[:, -1] = -torch.inf  # as such a router returns them
        return options, context.replace(previous_logits=previous_TE)

    def _logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        """[T, M], M the experts that can be chosen."""
        if self.hidden_weight is not None:
            x_TD = F.linear(x_TD, self.hidden_weight.to(x_TD.dtype)).tanh()
        logits_TM = F.linear(x_TD, self.weight.to(x_TD.dtype))
        if not self.residual:
            return logits_TM
        columns = context.previous_logits.shape[1]
        if columns not in (self.num_chosen, self.bank_size):
            given = f"context.previous_logits has {columns} columns"
            raise ValueError(f"{given}: expected {self.bank_size}, of a router with the same numbers of experts")
        # where nothing is chosen the logit is -inf, and -inf * 0 is NaN
        previous_TM = context.previous_logits[:, : self.num_chosen]
        if context.real_T is not None:
            previous_TM = previous_TM.masked_fill(~context.real_T[:, None], 0)
        return logits_TM + F.linear(previous_TM.to(x_TD.dtype), self.residual_weight.to(x_TD.dtype))

    def _weights(self, logits_TM: Tensor, index_TK: Tensor) -> Tensor:
        """p over the sum of the chosen p, zero experts left out: the softmax over the other chosen logits."""
        zero_TK = index_TK >= self.first_zero
        kept_TK = logits_TM.gather(1, index_TK).masked_fill(zero_TK, -torch.inf)
        # a row of -inf would put NaN into the gradient
        return kept_TK.masked_fill(zero_TK.all(1, keepdim=True), 0).softmax(-1).masked_fill(zero_TK, 0)

    def _per_kind(self, routed: float, other: float, tokens: Tensor) -> Tensor:
        """[M] float64: one number for the feed-forwards, one for the experts without computation."""
        value_M = torch.full((self.num_chosen,), other, dtype=torch.float64, device=tokens.device)
        value_M[: self.num_experts] = routed
        return value_M

    def _capacity(self, tokens: Tensor) -> Tensor:
        share_M = self._per_kind(self.tau, 1.0, tokens)
        return self.capacity_factor * self.top_k * tokens * share_M / share_M.sum()

    def _balance(self, scores_TM: Tensor, load_M: Tensor, tokens: Tensor, real_T: Tensor | None) -> Tensor:
        if real_T is not None:
            scores_TM = scores_TM.masked_fill(~real_T[:, None], 0)
        tokens = tokens.clamp(min=1)
        of_kind_M = self._per_kind(1.0, self.tau, tokens).to(scores_TM.dtype)
        return (of_kind_M * (load_M.to(scores_TM.dtype) / tokens) * (scores_TM.sum(0) / tokens)).sum()

    def _split_constants(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A constant's weight w as w a_1; the sum of the w a_0 in one slot more, [T, K + 1]; what counts as load."""
        first, last = self.num_experts, self.num_experts + self.constant_experts
        collect = self.num_chosen
        share_TC2 = F.linear(x_TD, self.share_weight.to(x_TD.dtype).flatten(0, 1)).unflatten(1, (-1, 2)).softmax(-1)
        token_TM = F.pad(share_TC2[..., 0], (first, collect - last))
        own_TM = F.pad(share_TC2[..., 1], (first, collect - last), value=1)
        place_TK = index_TK.clamp(min=0)
        own_TK = weight_TK * own_TM.gather(1, place_TK)
        collected_T1 = (weight_TK * token_TM.gather(1, place_TK)).sum(1, keepdim=True)
        any_T1 = ((index_TK >= first) & (index_TK < last)).any(1, keepdim=True)
        index = torch.cat([index_TK, torch.where(any_T1, collect, -1)], dim=1)
        selected = torch.zeros(len(x_TD), self.bank_size, dtype=torch.bool, device=x_TD.device)
        selected = selected.scatter(1, torch.where(index_TK < 0, collect, index_TK), True)
        selected[:, collect] = False
        return index, torch.cat([own_TK, collected_T1], dim=1), selected
