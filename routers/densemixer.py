"""DenseMixer: the output of sparse top-k, with the router's gradient of the dense mixture.

    p = softmax(W x)              chosen = the K highest of p           w_e = p_e,  or p_e / (sum of the chosen p)

    forward     y = sum over the chosen of w_e f_e(x)
    backward    d y / d w_e = f_e(x) for EVERY expert; an expert's parameters, and x through the expert, have a gradient
                only where it is chosen

In training every expert computes every token: those not chosen with a weight of value 0 whose gradient is that of p_e
(renormalised: p_e over the detached sum). Weight 0 makes the gradient of expert and input exactly 0, so nothing is left
to mask. It costs E / K times the experts' work, forward and backward; evaluation, and training without gradient, is
plain top-k. The load is that of the chosen (``Routing.selected``).

Source: the released code, yaof20/DenseMixer, densemixer/models/olmoe_custom.py and qwen3_moe_custom.py, read and run:
same output and gradients, renormalised ("partscale_fix_expert") or not. Its qwen2_moe_custom.py renormalises only the
forward: its gradients, the experts' too, are those of the raw p. A later qwen3_moe_custom.py runs the dense forward in
the backward, without graph, which a router cannot: it never sees the experts. ``balance`` is the models' loss, not its.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import GatedRouter, Routing, TokenContext, register_router, router_dtype
from .losses import balance_loss
from .selection import check_not_negative, check_top_k, drop_padding


@register_router("densemixer")
class DenseMixerRouter(GatedRouter):
    evidence = "code"
    paper = "DenseMixer; yaof20/DenseMixer"
    loss_names = ("balance",)
    causal = True
    batch_independent = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        renormalise: bool = False,
        balance_weight: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token in the forward, K.
            renormalise: divide the weights by the sum of the K chosen scores (``norm_topk_prob``).
            balance_weight: of the loss ``balance``.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        check_not_negative(balance_weight=balance_weight, init_std=init_std)
        self.top_k, self.renormalise, self.balance_weight = top_k, renormalise, balance_weight
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        dtype = router_dtype(x_TD)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        real_T = context.real_T
        chosen_TK = scores_TE.detach().topk(self.top_k).indices
        selected_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
        weight_TE = scores_TE
        if self.renormalise:
            sum_T1 = scores_TE.gather(1, chosen_TK).sum(1, keepdim=True)
            weight_TE = scores_TE / torch.where(selected_TE, sum_T1, sum_T1.detach())
        if self.training and torch.is_grad_enabled():
            index = torch.arange(self.bank_size, device=scores_TE.device).expand_as(scores_TE)
            # the value of the chosen, the gradient of all
            weight = weight_TE - (weight_TE * ~selected_TE).detach()
        else:
            index, weight = chosen_TK, weight_TE.gather(1, chosen_TK)
        index, weight = drop_padding(index, weight, real_T)
        if real_T is not None:
            selected_TE = selected_TE & real_T[:, None]
        losses = {}
        if self.balance_weight:
            losses["balance"] = self.balance_weight * balance_loss(scores_TE, selected_TE.sum(0), real_T)
        return Routing.from_topk(
            index,
            weight,
            bank_size=self.bank_size,
            logits=logits_TE,
            scores=scores_TE,
            selected=selected_TE,
            losses=losses,
        )
