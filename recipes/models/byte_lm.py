"""A small language model over bytes with a MoE layer in every block: what routers of text are compared in.

    x_t = embed(byte t) + embed_before(byte t-1)                                  [B, L, D]
    every block:
        x = x + attention(norm(x))                      causal, rotary positions
        x = x + mlp(norm(x))                            a MoE layer, or a feed-forward of its activated width
    logits = W norm(x)                                                            [B, L, 256]: of the next byte

W starts at zero, so that a new model answers ln 256 nats a byte. The ``TokenContext`` of a layer holds all that a
router of text may ask for: the bytes, their positions, that the model decodes left to right, the attention of the
block, the logits of the MoE layer before, and the key of the noise.

Sources: pre-normalised transformer with RMSNorm, arXiv:1910.07467, and rotary positions, arXiv:2104.09864.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.kernels.attention import AttentionWeights
from gatewright.moe import ExpertParallel, ExpertSpec, FeedForward, MoELayer
from gatewright.routers import Routing, TokenContext, create_router

from .seeding import named_seed

VOCABULARY = 256
DENSE = "dense"
ACTIVATION = "swiglu"
ROTARY_BASE = 10_000
# what a router may ask for here; "noise" stands for its key
CONTEXT_FIELDS = ("token_ids", "position", "attention", "previous_logits", "noise", "causal", "layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteLMConfig:
    """What rebuilds a model.

    Attributes:
        dim: token width, D.
        depth: blocks.
        heads: attention heads.
        router: a router's name, or "dense": feed-forwards of hidden width ``activated * expert_hidden``.
        router_options: all of the router's but ``dim``.
        later_options: more of them from the second block on, where there is a MoE layer before.
        expert_hidden: hidden width of an expert.
        activated: experts whose width a dense feed-forward has.

    Raises:
        ValueError: a value outside its range, or options where there is no router.
    """

    dim: int = 96
    depth: int = 2
    heads: int = 4
    router: str = DENSE
    router_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    later_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    expert_hidden: int = 96
    activated: int = 2

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "expert_hidden", "activated"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose at least 1")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(f"dim={self.dim} over heads={self.heads}: a head's width must be whole and even")
        options = [*self.router_options, *self.later_options]
        if self.router == DENSE and options:
            raise ValueError(f'router="dense" has no options: leave out {", ".join(options)}')


class ByteLM(nn.Module):
    """
    Args:
        config: the model.
        layer_factory: makes a MoE layer, called as ``layer_factory(router, spec, parallel=..., seed=..., layer=...)``.
        parallel: where the routed experts live; by default all here.
        seed: of the initial weights. Each is drawn from (seed, its name), or by the bank from (seed, block, expert):
            the parts that two models share are equal whatever their routers.

    Raises:
        ValueError: an option that the router does not know.
    """

    def __init__(
        self,
        config: ByteLMConfig,
        layer_factory: Callable[..., nn.Module] = MoELayer,
        parallel: ExpertParallel | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            self.embed = nn.Embedding(VOCABULARY, config.dim)
            self.embed_before = nn.Embedding(VOCABULARY, config.dim)
            self.blocks = nn.ModuleList(
                Block(config, self._feed_forward(index, layer_factory, parallel, seed)) for index in range(config.depth)
            )
            self.norm = nn.RMSNorm(config.dim)
            self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self._initialise(seed)

    def _feed_forward(self, index: int, layer_factory, parallel: ExpertParallel | None, seed: int) -> nn.Module:
        config = self.config
        torch.manual_seed(named_seed(seed, f"blocks.{index}.mlp"))  # routers draw from the global generator
        if config.router == DENSE:
            return FeedForward(ExpertSpec(config.dim, config.activated * config.expert_hidden, ACTIVATION))
        options = {**config.router_options, **(config.later_options if index else {})}
        router = create_router(config.router, dim=config.dim, **options)
        spec = ExpertSpec(config.dim, config.expert_hidden, ACTIVATION)
        return layer_factory(router, spec, parallel=parallel, seed=seed, layer=index)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """N(0, 1 / D) for the maps of attention, N(0, 1) for the embedding, zero for the output."""
        for name, module in self.named_modules():
            if ".mlp" in name:
                continue
            generator = torch.Generator().manual_seed(named_seed(seed, name))
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        token_ids: Tensor,
        *,
        sample_id: Tensor | None = None,
        seed: int | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """
        Args:
            token_ids: [B, L] int64 bytes.
            sample_id, seed, step: the key of the routers' noise: [B] int64, the run's seed, the optimizer step.

        Returns:
            logits [B, L, 256] of the next byte, and the decisions of the MoE layers, in order.

        Raises:
            ValueError: bytes of another shape, or a router that looks at later tokens.
        """
        if token_ids.dim() != 2:
            raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}: expected [B, L]")
        batch, length = token_ids.shape
        position_BL = torch.arange(length, device=token_ids.device).expand(batch, length)
        context = TokenContext(
            batch_size=batch,
            length=length,
            token_ids=token_ids,
            position=position_BL,
            causal=True,
            seed=seed,
            step=step,
            sample_id=sample_id,
        )
        # the byte before spares the first block from learning to look there, which small runs spend themselves on
        x, routings = self.embed(token_ids) + F.pad(self.embed_before(token_ids[:, :-1]), (0, 0, 1, 0)), []
        for block in self.blocks:
            previous = routings[-1].logits if routings else None
            x, routing = block(x, context.replace(previous_logits=previous))
            if routing is not None:
                routings.append(routing)
        return self.head(self.norm(x)), routings


class Block(nn.Module):
    def __init__(self, config: ByteLMConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attn = CausalAttention(config)
        self.mlp = mlp
        self.routes = not isinstance(mlp, FeedForward)

    def forward(self, x: Tensor, context: TokenContext) -> tuple[Tensor, Routing | None]:
        """x [B, L, D] -> x of the same shape, and the decision where there is one."""
        y, weights = self.attn(self.norm1(x), context.position)
        x = x + y
        h = self.norm2(x)
        y, routing = self.mlp(h, context.replace(attention=weights)) if self.routes else (self.mlp(h), None)
        return x + y, routing


class CausalAttention(nn.Module):
    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, position_BL: Tensor) -> tuple[Tensor, AttentionWeights]:
        """[B, L, D] -> [B, L, D], and the weights that made it, for a router that averages over them."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, position_BL), rotate(k, position_BL)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        weights = AttentionWeights(q, k, causal=True, v=v, w_out=self.out.weight)
        return self.out(y.transpose(1, 2).flatten(2)), weights


def rotate(x_BHLC: Tensor, position_BL: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + C/2}) by the angle position * base^(-2i / C)."""
    half = x_BHLC.shape[-1] // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, device=x_BHLC.device, dtype=torch.float32) / half)
    angle = position_BL[:, None, :, None] * frequency
    cos, sin = angle.cos().to(x_BHLC.dtype), angle.sin().to(x_BHLC.dtype)
    a, b = x_BHLC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
