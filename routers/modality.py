"""Modality routing: a token goes to the expert of its modality, with weight 1.

    expert(t) = modality_t              text, image, speech, ...: ``context.modality``

Nothing is learned and nothing balanced: the data decide. With ``moe.attention.ModalityAttention`` it makes the block of
Mixture-of-Transformers (arXiv:2411.04996) and of BAGEL (arXiv:2505.14683), whose code was read.
"""

import torch
from torch import Tensor

from .base import Router, Routing, TokenContext, register_router, router_dtype
from .selection import drop_padding, known_ids


@register_router("modality")
class ModalityRouter(Router):
    evidence = "code"
    paper = "Mixture-of-Transformers, arXiv:2411.04996; BAGEL, arXiv:2505.14683"
    requires = ("modality",)
    causal = True
    batch_independent = True
    without_gradient = ("tokens", "weights")
    unused_options = ("dim",)

    def __init__(self, *, num_experts: int, dim: int | None = None) -> None:
        """
        Args:
            num_experts: modalities, E; their ids are 0 to E - 1.
            dim: token width; not used, taken so that routers are interchangeable.
        """
        super().__init__(num_experts=num_experts)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        """x [T, D] is not looked at, but for its dtype and device.

        Raises:
            RuntimeError: a real token's modality is not 0 to E - 1. On a GPU it comes with the next wait for the
                device, so that nothing waits here.
        """
        id_T = known_ids(context.modality, self.num_experts, context.real_T, "context.modality", "num_experts")
        index_T1 = id_T[:, None]
        scores_TE = torch.eye(self.num_experts, dtype=router_dtype(x_TD), device=x_TD.device)[id_T]
        index_T1, weight_T1 = drop_padding(index_T1, torch.ones_like(scores_TE[:, :1]), context.real_T)
        return Routing.from_topk(
            index_T1, weight_T1, bank_size=self.bank_size, logits=scores_TE.log(), scores=scores_TE
        )

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        return {"dim": 16, "num_experts": 4}, TokenContext(
            batch_size=2, length=8, modality=torch.arange(16).view(2, 8) % 4
        )
