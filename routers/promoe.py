"""ProMoE: conditional tokens go to the prototypes nearest in direction, unconditional ones to an expert of their own.

    z_ij = cos(x_i, p_j)                                   prototypes p [E, D], one a routed expert
    gate = z (identity), softmax over the experts, or sigmoid
    token choice    token i goes to the K highest gates, with the raw gate as weight: not renormalised, maybe negative
    expert choice   in each image, expert j takes its max(1, min(int(L / E * K), L)) highest tokens
    unconditional   every token of a sample without a label goes to the last id, a "local" expert, with weight 1, and
                    nowhere else

    loss routing_contrastive = contrastive_weight * L_RCL  in training, over conditional tokens
                               (``losses.contrastive_loss``)

The centroid of an expert is the mean of its tokens in this forward, over the local micro-batch (token choice), or per
image (expert choice); gradient flows through it into the tokens. There is no balance loss and no capacity.

Source: "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance", arXiv:2510.24711v2,
equations 4 to 6, and the released code. The code's null label is the number 1000; here ``context.null_mask`` says which
samples are unconditional.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.cosine import cosine
from .base import Router, Routing, TokenContext, register_router, router_dtype
from .losses import contrastive_loss
from .selection import check_not_negative, check_top_k, experts_take, tokens_per_expert


@register_router("promoe")
class ProMoERouter(Router):
    evidence = "code"
    paper = "ProMoE, arXiv:2510.24711"
    loss_names = ("routing_contrastive",)

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        gate: Literal["identity", "softmax", "sigmoid"] = "identity",
        unconditional: bool = True,
        contrastive_weight: float = 1.0,
        temperature: float = 0.07,
        selection: Literal["token_choice", "expert_choice"] = "token_choice",
        init_std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E, without the unconditional one.
            top_k: experts a token, K; with expert choice, on average.
            gate: what the cosine becomes. With expert choice the softmax is over the tokens of the image.
            unconditional: unconditional samples have an expert of their own; otherwise all tokens are routed alike.
            contrastive_weight: of the loss ``routing_contrastive``; 0 = no such loss.
            temperature: tau of that loss.
            selection: who chooses.
            init_std: deviation of the initial prototypes. Only their direction enters; their length sets how fast they
                turn.

        Raises:
            ValueError: an option outside its range.
        """
        kinds = ("routed",) * num_experts + ("local",) * bool(unconditional)
        super().__init__(num_experts=num_experts, expert_kinds=kinds)
        check_top_k(top_k, num_experts)
        check_not_negative(contrastive_weight=contrastive_weight, init_std=init_std)
        if gate not in ("identity", "softmax", "sigmoid"):
            raise ValueError(f'gate="{gate}": choose "identity", "softmax" or "sigmoid"')
        if selection not in ("token_choice", "expert_choice"):
            raise ValueError(f'selection="{selection}": choose "token_choice" or "expert_choice"')
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: choose a positive number")
        self.top_k, self.gate, self.choice = top_k, gate, selection
        self.unconditional, self.contrastive_weight, self.temperature = unconditional, contrastive_weight, temperature
        self.prototypes = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))

    @property
    def requires(self) -> tuple[str, ...]:
        return ("null_mask",) if self.unconditional else ()

    @property
    def causal(self) -> bool:
        return self.choice == "token_choice"

    batch_independent = True

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype = router_dtype(x_TD)
        x_TD, prototypes_ED = x_TD.to(dtype), self.prototypes.to(dtype)
        cosine_TE = cosine(x_TD, prototypes_ED)
        real_T = context.real_T
        if real_T is None:
            real_T = torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)
        null_T = real_T & context.null_T if self.unconditional else torch.zeros_like(real_T)

        logits_TE = cosine_TE / self.temperature
        if self.unconditional:
            own_T1 = torch.where(null_T[:, None], 0.0, -torch.inf).to(dtype)
            logits_TE = torch.cat([logits_TE.masked_fill(null_T[:, None], -torch.inf), own_T1], dim=1)
        choose = self._token_choice if self.choice == "token_choice" else self._expert_choice
        routing = choose(x_TD, cosine_TE, prototypes_ED, real_T & ~null_T, null_T, context)
        # on a CPU a softmax over the few columns of many rows is ten times slower than over the rows of their transpose
        return routing.replace(logits=logits_TE, scores=logits_TE.T.contiguous().softmax(0).T)

    def _token_choice(self, x_TD, cosine_TE, prototypes_ED, routed_T, null_T, context) -> Routing:
        weight_TK, index_TK = self._gate(cosine_TE, dim=-1).topk(self.top_k, dim=-1)
        index_TK = index_TK.masked_fill(~routed_T[:, None], -1)
        weight_TK = weight_TK.masked_fill(~routed_T[:, None], 0)
        losses = {}
        if self.training and self.contrastive_weight:
            assigned_TK = (index_TK >= 0).to(cosine_TE.dtype)
            chosen_TE = torch.zeros_like(cosine_TE).scatter(1, index_TK.clamp(min=0), assigned_TK)
            losses["routing_contrastive"] = self._contrastive(prototypes_ED, chosen_TE[None], x_TD[None])
        if self.unconditional:
            own_TK = null_T[:, None] & (torch.arange(self.top_k, device=null_T.device) == 0)
            index_TK = index_TK.masked_fill(own_TK, self.num_experts)
            weight_TK = weight_TK.masked_fill(own_TK, 1)
        return Routing.from_topk(index_TK, weight_TK, bank_size=self.bank_size, losses=losses)

    def _expert_choice(self, x_TD, cosine_TE, prototypes_ED, routed_T, null_T, context) -> Routing:
        shape = (context.batch_size, context.length)
        cosine_BLE, routed_BL = cosine_TE.unflatten(0, shape), routed_T.view(shape)
        if self.gate == "softmax":
            # a finite floor, so that the columns of an image without a routed token stay finite
            cosine_BLE = cosine_BLE.masked_fill(~routed_BL[:, :, None], torch.finfo(cosine_BLE.dtype).min)
        gates_BLE = self._gate(cosine_BLE, dim=1)
        k_B = tokens_per_expert(routed_BL.sum(1), self.num_experts, self.top_k)
        taken_BLE = experts_take(gates_BLE, k_B[:, None].expand(-1, self.num_experts), routed_BL)
        losses = {}
        if self.training and self.contrastive_weight:
            chosen_BLE, x_BLD = taken_BLE.to(x_TD.dtype), x_TD.unflatten(0, shape)
            losses["routing_contrastive"] = self._contrastive(prototypes_ED, chosen_BLE, x_BLD)
        taken_TE, gates_TE = taken_BLE.flatten(0, 1), gates_BLE.flatten(0, 1)
        if self.unconditional:
            own_T1 = null_T[:, None]
            taken_TE, gates_TE = torch.cat([taken_TE, own_T1], 1), torch.cat([gates_TE, own_T1.to(gates_TE.dtype)], 1)
        return Routing.from_mask(taken_TE, gates_TE, losses=losses)

    def _gate(self, cosine: Tensor, dim: int) -> Tensor:
        if self.gate == "identity":
            return cosine
        return cosine.softmax(dim) if self.gate == "softmax" else cosine.sigmoid()

    def _contrastive(self, prototypes_ED: Tensor, chosen_GME: Tensor, x_GMD: Tensor) -> Tensor:
        count_GE = chosen_GME.sum(1)
        centroids_GED = chosen_GME.transpose(1, 2) @ x_GMD / count_GE.clamp(min=1)[..., None]
        return self.contrastive_weight * contrastive_loss(prototypes_ED, centroids_GED, count_GE > 0, self.temperature)

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        return {"dim": 16, "num_experts": 4, "top_k": 1}, TokenContext(
            batch_size=3, length=8, null_mask=torch.tensor([False, True, False])
        )
