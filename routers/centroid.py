"""Centroid routing (Moirai-MoE): a token goes to the experts whose fixed centroids are farthest from it, or nearest.

    d_te = |x_t - c_e|                                centroids c [E, D]: a buffer, not trained
    faithful   logits = d      as the released checkpoints run: the K largest distances, the farthest weighs most
    nearest    logits = -d     the K smallest distances, the nearest weighs most
    weight = softmax over the K chosen logits

Nothing is learned: a decision is a function of x alone, and there is no loss. Gradient reaches x through the weights,
which for K = 1 are 1.

The centroids are those of k-means over the representations of a model trained before: ``fit`` them, or
``set_centroids``, or load them with the state; a router without any refuses to decide. ``seed`` draws them from N(0, 1)
instead, which is not Moirai-MoE but what it is to be compared with.

Source: Moirai-MoE, arXiv:2410.10469, and its released inference code, uni2ts src/uni2ts/module/ffn.py
(``MoEFeedForward``) and module/transformer.py, whose buffer ``centroid`` [layers, 32, D] holds a [E, D] for each layer.
How they were fitted is not in the code.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import GatedRouter, Routing, TokenContext, register_router, router_dtype
from .selection import check_top_k, drop_padding


@register_router("centroid")
class CentroidRouter(GatedRouter):
    evidence = "code"
    paper = "Moirai-MoE, arXiv:2410.10469"
    causal = True
    batch_independent = True

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        mode: Literal["faithful", "nearest"] = "faithful",
        seed: int | None = None,
    ) -> None:
        """
        Args:
            dim: token width, D.
            num_experts: routed experts, E.
            top_k: experts a token, K.
            mode: "faithful" takes the farthest centroids, as released; "nearest" the nearest.
            seed: draws random centroids; None = there are none until they are set, fitted or loaded.

        Raises:
            ValueError: an option outside its range.
        """
        super().__init__(num_experts=num_experts)
        check_top_k(top_k, num_experts)
        if mode not in ("faithful", "nearest"):
            raise ValueError(f'mode="{mode}": choose "faithful" or "nearest"')
        self.top_k, self.mode = top_k, mode
        # NaN and not empty memory, so that a state saved without centroids is known for what it is
        centroids_ED = torch.full((num_experts, dim), torch.nan, dtype=torch.float64)
        if seed is not None:
            # on the CPU, so that a default device changes nothing
            generator = torch.Generator("cpu").manual_seed(seed)
            centroids_ED.copy_(torch.randn(num_experts, dim, generator=generator, dtype=torch.float64, device="cpu"))
        self.register_buffer("centroids", centroids_ED)
        self._has_centroids = seed is not None

    @property
    def without_gradient(self) -> tuple[str, ...]:
        return ("tokens",) if self.top_k == 1 else ()

    @torch.no_grad()
    def set_centroids(self, centroids_ED: Tensor) -> None:
        """
        Args:
            centroids_ED: one row an expert.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        if centroids_ED.shape != self.centroids.shape or not centroids_ED.isfinite().all():
            given = f"centroids of shape {tuple(centroids_ED.shape)}"
            raise ValueError(f"{given}: expected {tuple(self.centroids.shape)} finite numbers, one row an expert")
        self.centroids.copy_(centroids_ED)
        self._has_centroids = True

    @torch.no_grad()
    def fit(self, x_ND: Tensor, *, seed: int = 0, iterations: int = 100) -> None:
        """Sets the centroids to those of k-means (``k_means``) over representations x [N, D] of what the layer will
        see. The same x on every rank gives the same centroids; they are not sent between ranks.

        Raises:
            ValueError: x of another width, not finite, or with fewer different rows than experts.
        """
        if x_ND.dim() != 2 or x_ND.shape[1] != self.centroids.shape[1] or not x_ND.isfinite().all():
            expected = f"expected finite [N, {self.centroids.shape[1]}]"
            raise ValueError(f"representations of shape {tuple(x_ND.shape)}: {expected}, tokens as the layer gets them")
        self.set_centroids(k_means(x_ND, self.num_experts, seed=seed, iterations=iterations))

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        if not self._has_centroids:
            self._look_for_centroids()
        dtype = router_dtype(x_TD)
        # by matrix products for every number of tokens, so that padding more of them changes nothing; what is nearer to
        # a centroid than 1e-3 of its length (in float32) is not told from it
        distance_TE = torch.cdist(x_TD.to(dtype), self.centroids.to(dtype), compute_mode="use_mm_for_euclid_dist")
        return distance_TE if self.mode == "faithful" else -distance_TE

    def assign(self, logits_TE: Tensor, scores_TE: Tensor, context: TokenContext) -> Routing:
        # logits rank as scores do, and differ where far scores are all 0
        weight_TK, index_TK = logits_TE.topk(self.top_k, dim=-1)
        index_TK, weight_TK = drop_padding(index_TK, weight_TK.softmax(-1), context.real_T)
        return Routing.from_topk(index_TK, weight_TK, bank_size=self.bank_size, logits=logits_TE, scores=scores_TE)

    def _look_for_centroids(self) -> None:
        """They may have been loaded into the buffer by anyone; asked once, because the answer waits for the device."""
        if not self.centroids.isfinite().all():
            raise ValueError(
                'router "centroid" has no centroids: router.fit(x) or router.set_centroids(c), or load a state that '
                "has them; seed=0 draws random ones"
            )
        self._has_centroids = True

    @classmethod
    def example(cls) -> tuple[dict, TokenContext]:
        options, context = super().example()
        return options | {"seed": 0}, context


def k_means(x_ND: Tensor, clusters: int, *, seed: int = 0, iterations: int = 100) -> Tensor:
    """Lloyd's algorithm from a k-means++ start, in float64: [N, D] -> [clusters, D]

    Deterministic in x and seed. Ends when no row changes its cluster. A cluster that loses every row keeps its centre.

    Raises:
        ValueError: fewer different rows than clusters.
    """
    x_ND = x_ND.double()
    # on the CPU, so that every device draws the same
    draws = torch.rand(clusters, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")
    centre_ED, nearest_N = x_ND.new_empty(0, x_ND.shape[1]), x_ND.new_ones(len(x_ND))
    for draw in draws.tolist():
        # a row is the next centre with a probability that grows with its squared distance from the nearest one
        sums_N = nearest_N.cumsum(0)
        if len(x_ND) == 0 or sums_N[-1] <= 0:
            raise ValueError(f"{clusters} clusters of {len(centre_ED)} different rows: give more representations")
        row = torch.searchsorted(sums_N, draw * sums_N[-1:], right=True).clamp(max=len(x_ND) - 1)
        centre_ED = torch.cat([centre_ED, x_ND[row]])
        square_N = (x_ND - x_ND[row]).square().sum(1)
        nearest_N = square_N if len(centre_ED) == 1 else torch.minimum(nearest_N, square_N)

    before_N = None
    for _ in range(iterations):
        cluster_N = torch.cdist(x_ND, centre_ED).argmin(1)
        if before_N is not None and torch.equal(cluster_N, before_N):
            break
        member_NE = F.one_hot(cluster_N, clusters).double()
        count_E1 = member_NE.sum(0)[:, None]
        centre_ED = torch.where(count_E1 > 0, member_NE.T @ x_ND / count_E1.clamp(min=1), centre_ED)
        before_N = cluster_N
    return centre_ED
