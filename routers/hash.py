"""Hash routing: a token id always goes to the same experts.

    expert(t, j) = table[token_id(t), j]        weight = 1 / K

No parameters, no loss, and no gradient through the weights: balance comes from the table. ``kind="random"`` draws each
id's experts at random; ``kind="balanced"`` deals the ids, most frequent first, to the experts with the least load so
far, so that the expected load is even for a corpus with the given frequencies.

Source: Roller et al., "Hash Layers for Large Sparse Models", arXiv:2106.04426. Its released code (``facebookresearch/
ParlAI`` projects/params_vs_compute/hash_ladder/hash_ladder.py, read) has the random table, for one expert a token. The
balanced table is reconstructed from descriptions of the paper's by others; its code was not released. Several experts
a token, all different and each of weight 1 / K, are ours: the paper's MultiHash splits the experts' weights instead.
"""

import heapq
import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .base import Router, Routing, TokenContext, register_router, router_dtype
from .selection import check_top_k, drop_padding, known_ids

KINDS = ("random", "balanced")


@register_router("hash")
class HashRouter(Router):
    evidence = "reconstruction"
    paper = "Hash Layers, arXiv:2106.04426"
    requires = ("token_ids",)
    causal = True
    batch_independent = True
    without_gradient = ("tokens", "weights")
    unused_options = ("dim",)

    def __init__(
        self,
        *,
        dim: int | None = None,
        num_experts: int,
        vocabulary: int,
        top_k: int = 1,
        kind: Literal["random", "balanced"] = "random",
        frequencies: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dim: token width; not used, taken so that routers are interchangeable.
            num_experts: routed experts, E.
            vocabulary: number of token ids, V.
            top_k: experts a token id, K, all different.
            kind: how the table is made.
            frequencies: V numbers, the counts of the ids in the corpus, as a list, so that the options are JSON; for
                ``kind="balanced"`` only. None = all alike, so that every expert gets as many ids.
            seed: of the random table, and of the order of equally loaded experts in a balanced one, so that every rank
                makes the same.

        Raises:
            ValueError: an option outside its range, or ``frequencies`` superfluous or not V of them.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        if vocabulary < 1:
            raise ValueError(f"vocabulary={vocabulary}: choose at least 1 token id")
        if kind not in KINDS:
            raise ValueError(f'kind="{kind}": choose one of {KINDS}')
        if kind == "random" and frequencies is not None:
            raise ValueError('kind="random" takes no frequencies: choose kind="balanced", which deals by them')
        self.top_k, self.vocabulary = top_k, vocabulary
        if kind == "balanced":
            counts = [1.0] * vocabulary if frequencies is None else _checked(frequencies, vocabulary)
            table_VK = _deal(counts, num_experts, top_k, random.Random(seed))
        else:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            draw_VE = torch.rand(vocabulary, num_experts, generator=generator, device="cpu")
            table_VK = draw_VE.topk(top_k).indices
        self.register_buffer("table_VK", table_VK)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        """x [T, D] is not looked at, but for its dtype and device.

        Raises:
            RuntimeError: a real token's id is not 0 to V - 1. On a GPU it comes with the next wait for the device, so
                that nothing waits here.
        """
        real_T = context.real_T
        id_T = known_ids(context.token_ids, self.vocabulary, real_T, "context.token_ids", "vocabulary")
        index_TK = self.table_VK[id_T]
        weight_TK = torch.full(index_TK.shape, 1 / self.top_k, dtype=router_dtype(x_TD), device=x_TD.device)
        scores_TE = weight_TK.new_zeros(len(id_T), self.bank_size).scatter(1, index_TK, weight_TK)
        index_TK, weight_TK = drop_padding(index_TK, weight_TK, real_T)
        return Routing.from_topk(
            index_TK, weight_TK, bank_size=self.bank_size, logits=scores_TE.log(), scores=scores_TE
        )

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        ids_BL = torch.arange(context.num_tokens).view(context.batch_size, context.length)
        return options | {"vocabulary": context.num_tokens}, context.replace(token_ids=ids_BL)


def _checked(frequencies: Sequence[float], vocabulary: int) -> list[float]:
    if isinstance(frequencies, Tensor):
        raise ValueError("frequencies is a tensor: give frequencies.tolist(), so that the options can be saved as JSON")
    values = [float(value) for value in frequencies]
    if len(values) != vocabulary:
        raise ValueError(f"frequencies has {len(values)} numbers: expected vocabulary={vocabulary}, one a token id")
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError("frequencies must be finite and at least 0: they are counts or shares of the token ids")
    return values


def _deal(frequencies: list[float], num_experts: int, top_k: int, draw: random.Random) -> Tensor:
    """Gives each id, most frequent first, to the ``top_k`` experts with the least load so far. -> [V, K]

    An id that was never seen counts like the rarest one that was, so that such ids spread too. Ties are drawn, so that
    ids do not share the same sets of experts.
    """
    rarest = min((value for value in frequencies if value > 0), default=1.0)
    least_loaded = [(0.0, draw.random(), expert) for expert in range(num_experts)]
    heapq.heapify(least_loaded)
    table = torch.empty(len(frequencies), top_k, dtype=torch.int64, device="cpu")
    for token_id in sorted(range(len(frequencies)), key=lambda i: -frequencies[i]):
        taken = [heapq.heappop(least_loaded) for _ in range(top_k)]
        table[token_id] = torch.tensor([expert for _, _, expert in taken])
        for load, _, expert in taken:
            heapq.heappush(least_loaded, (load + (frequencies[token_id] or rarest), draw.random(), expert))
    return table
