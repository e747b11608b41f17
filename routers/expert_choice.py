"""Expert choice: each expert takes the tokens that score highest for it, so that all have the same load.

    scores = softmax over the experts of W x
    k      = max(1, min(int(M / E * top_k), M))        M tokens of the group: the sample (EC-DiT), or the whole batch
    expert e takes the k highest of its column in each group; weight = score

A token may be taken by several experts or by none. No balance loss. The same rule at inference. A decision depends on
every token of the group: not causal.

Sources: Zhou et al., arXiv:2202.09368; EC-DIT, arXiv:2410.02098, read in the re-implementations beside ProMoE and
DiffMoE (capacity 1 there; the paper's is 2): ``pool="sample"`` is theirs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Router, Routing, TokenContext, register_router, router_dtype
from .selection import check_mean_top_k, check_not_negative, experts_take, tokens_per_expert


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    evidence = "code"
    paper = "Zhou et al., arXiv:2202.09368; EC-DIT, arXiv:2410.02098"
    selection = "expert"

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: float = 1.0,
        pool: Literal["sample", "batch"] = "sample",
        init_std: float = 0.006,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token on average (the capacity factor).
            pool: among whom an expert chooses: the tokens of each sample, or of the local batch.
            init_std: deviation of the initial weight.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_not_negative(init_std=init_std)
        check_mean_top_k(top_k, num_experts)
        if pool not in ("sample", "batch"):
            raise ValueError(f'pool="{pool}": choose "sample" or "batch"')
        self.top_k, self.pool = top_k, pool
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0, init_std))

    @property
    def batch_independent(self) -> bool:
        return self.pool == "sample"

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype = router_dtype(x_TD)
        logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        scores_TE = logits_TE.softmax(-1)
        groups = (context.batch_size, context.length) if self.pool == "sample" else (1, context.num_tokens)
        if context.real_T is None:
            real_GM = torch.ones(groups, dtype=torch.bool, device=x_TD.device)
        else:
            real_GM = context.real_T.view(groups)
        k_G = tokens_per_expert(real_GM.sum(1), self.num_experts, self.top_k)
        taken_GME = experts_take(scores_TE.unflatten(0, groups), k_G[:, None].expand(-1, self.num_experts), real_GM)
        return Routing.from_mask(taken_GME.flatten(0, 1), scores_TE, logits=logits_TE, scores=scores_TE)
