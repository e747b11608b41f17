"""The diffusion transformer, with the feed-forward injected.

    c = embed(t) + embed(label)                                                   one vector an image
    x = patches(image) + positions                                                [B, L, D]
    every block, with (shift, scale, gate) twice = W silu(c) + b:
        x = x + gate_1 * attention(norm(x) * (1 + scale_1) + shift_1)
        x = x + gate_2 * mlp(norm(x) * (1 + scale_2) + shift_2)                   mlp: a feed-forward, or a MoE layer
    out = unpatch(W (norm(x) * (1 + scale) + shift) + b)

The weights that make the gates, the final shift and scale, and the output start at zero (adaLN-Zero): a new model is
the identity in every block and answers 0. A router sees the modulated tokens, so time and class are in them, and its
``TokenContext`` says which samples have no label, the time, the grid of patches, the key of the noise, and, where the
router asks for it, the attention before.

Sources: DiT, arXiv:2212.09748; ProMoE, arXiv:2510.24711v2, and its released code, whose parameter names the dense
parts have.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewright.kernels.attention import AttentionWeights
from gatewright.moe import ExpertParallel, ExpertSpec, FeedForward, MoELayer
from gatewright.routers import Routing, TokenContext, create_router, router_options
from gatewright.tools.prune.restriction import leave_out
from gatewright.tools.weights import load_model

from .dit_config import DiTConfig
from .seeding import named_seed

ACTIVATION = "gelu_tanh"
TIME_FEATURES = 256
MAX_PERIOD = 10_000


class DiT(nn.Module):
    """
    Args:
        config: the model.
        layer_factory: makes a MoE layer, called as ``layer_factory(router, spec, shared=..., parallel=..., seed=...,
            layer=...)``: ``MoELayer``, or the class of a host.
        parallel: where the routed experts live; by default all here.
        seed: of the initial weights. Each is drawn from (seed, its name), or by the bank from (seed, block, expert):
            the same on every rank layout, and the parts that two models share are equal whatever their routers.
        checkpoint_blocks: compute each block again in the backward instead of keeping its activations.

    Raises:
        ValueError: an option that the router does not know, or experts that do not divide over ``parallel``.
    """

    def __init__(
        self,
        config: DiTConfig,
        layer_factory: Callable[..., nn.Module] = MoELayer,
        parallel: ExpertParallel | None = None,
        seed: int = 0,
        *,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.checkpoint_blocks = config, checkpoint_blocks
        with torch.random.fork_rng(devices=[]):
            self.x_embedder = PatchEmbedder(config)
            self.t_embedder = TimeEmbedder(config.dim)
            self.y_embedder = LabelEmbedder(config.num_classes, config.dim)
            self.register_buffer("pos_embed", position_table(config.dim, config.grid)[None])
            self.blocks = nn.ModuleList(
                Block(config, self._feed_forward(index, layer_factory, parallel, seed)) for index in range(config.depth)
            )
            self.final_layer = FinalLayer(config)
        self._initialise(seed)

    def _feed_forward(self, index: int, layer_factory, parallel: ExpertParallel | None, seed: int) -> nn.Module:
        config = self.config
        if index not in config.moe_blocks:
            return FeedForward(ExpertSpec(config.dim, config.hidden, ACTIVATION, bias=True))
        spec = ExpertSpec(config.dim, config.expert_hidden, ACTIVATION, bias=True)
        torch.manual_seed(named_seed(seed, f"blocks.{index}.mlp.router"))  # a router draws from the global generator
        place = config.moe_blocks.index(index)
        sizes = {"dim": config.dim, "num_experts": config.experts_per_block[place], "top_k": config.top_k}
        if "top_k" not in router_options(config.router):
            del sizes["top_k"]
        router = create_router(config.router, **sizes, **config.router_options)
        if config.kept_experts:
            leave_out(router, config.kept_experts[place])
        shared = FeedForward(spec) if config.shared_expert else None
        return layer_factory(router, spec, shared=shared, parallel=parallel, seed=seed, layer=index)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Xavier for linear layers, N(0, 0.02^2) for the two embedders, zero for what adaLN-Zero keeps shut."""
        for name, module in self._own_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
                generator = torch.Generator().manual_seed(named_seed(seed, name))
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and not module.weight.is_meta:
                generator = torch.Generator().manual_seed(named_seed(seed, name))
                nn.init.normal_(module.weight, std=0.02, generator=generator)

    def _own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module by name but routers, which drew their own weights."""
        for name, module in self.named_modules():
            if ".mlp.router" not in name:
                yield name, module

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        *,
        sample_id: Tensor | None = None,
        seed: int | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """
        Args:
            x: [B, C, H, W] noisy images.
            t: [B] time, 0 to 1000.
            labels: [B] int64; ``num_classes`` where there is none, or where training hides it.
            sample_id, seed, step: the key of the routers' noise: [B] int64, the run's seed, the optimizer step.

        Returns:
            [B, out_channels, H, W], and the decisions of the MoE layers, in order.

        Raises:
            ValueError: an input of another shape.
        """
        config = self.config
        if x.dim() != 4 or tuple(x.shape[1:]) != config.input_shape or len(t) != len(x) or len(labels) != len(x):
            raise ValueError(
                f"x {tuple(x.shape)}, t {tuple(t.shape)}, labels {tuple(labels.shape)}: expected "
                f"[B, {', '.join(map(str, config.input_shape))}], [B] and [B]"
            )
        context = TokenContext(
            batch_size=len(x),
            length=config.num_tokens,
            null_mask=labels == config.num_classes,
            timestep=t,
            grid=config.grid,
            seed=seed,
            step=step,
            sample_id=sample_id,
        )
        weight = self.x_embedder.proj.weight
        x = self.x_embedder(x.to(weight.dtype)) + self.pos_embed.to(weight.dtype)
        c = self.t_embedder(t) + self.y_embedder(labels)
        routings = []
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, c, context, use_reentrant=False)
            else:
                x, routing = block(x, c, context)
            if routing is not None:
                routings.append(routing)
        return unpatch(self.final_layer(x, c), config.patch, config.grid), routings


class Block(nn.Module):
    def __init__(self, config: DiTConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config.dim), _norm(config.dim)
        self.attn = Attention(config)
        self.mlp = mlp
        self.routes = not isinstance(mlp, FeedForward)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))

    def forward(self, x: Tensor, c: Tensor, context: TokenContext) -> tuple[Tensor, Routing | None]:
        """x [B, L, D], c [B, D] -> x of the same shape, and the decision where there is one."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        attended, weights = self.attn(modulate(self.norm1(x), shift_1, scale_1))
        x = x + gate_1 * attended
        h = modulate(self.norm2(x), shift_2, scale_2)
        if self.routes and "attention" in self.mlp.router.requires:
            context = context.replace(attention=weights)
        y, routing = self.mlp(h, context) if self.routes else (self.mlp(h), None)
        return x + gate_2 * y, routing


class Attention(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.q_norm = nn.LayerNorm(config.dim // config.heads) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(config.dim // config.heads) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> tuple[Tensor, AttentionWeights]:
        """[B, L, D] -> [B, L, D], and the weights for a router that asks for them."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim))
        return y, AttentionWeights(q, k, causal=False, v=v, w_out=self.proj.weight)


class PatchEmbedder(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.input_shape[0], config.dim, kernel_size=config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, D]"""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B, D]"""
        weight = self.mlp[0].weight
        # half types cannot tell 999 from 1000, so the angles are made in float32 at least
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return self.mlp(time_features(t.to(dtype)).to(weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)  # the last row: no label

    def forward(self, labels: Tensor) -> Tensor:
        """[B] -> [B, D]"""
        return self.embedding_table(labels)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = _norm(config.dim)
        self.linear = nn.Linear(config.dim, config.patch**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, patch * patch * out_channels]"""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def time_features(t: Tensor) -> Tensor:
    """cos and sin of t * MAX_PERIOD^(-i / half), cosines first. [B] -> [B, TIME_FEATURES]"""
    half = TIME_FEATURES // 2
    # float32 whatever t is, as in the released code
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_table(dim: int, grid: tuple[int, int]) -> Tensor:
    """The frozen 2-D table: half of the width for the column, half for the row, each sines then cosines. -> [L, D]"""
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    frequencies = MAX_PERIOD ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def patches(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, L, patch * patch * C], the inverse of ``unpatch``."""
    return F.pixel_unshuffle(x, patch).unflatten(1, (x.shape[1], -1)).flatten(3).permute(0, 3, 2, 1).flatten(2)


def unpatch(x: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """[B, L, patch * patch * C] -> [B, C, H, W]"""
    cells = x.view(len(x), *grid, patch, patch, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, grid[0] * patch, grid[1] * patch)


class ParameterCount(NamedTuple):
    """Parameters, the frozen position table included, as the papers count.

    Attributes:
        total: all.
        activated: what one token uses: of the experts that are chosen among, top_k.
    """

    total: int
    activated: int


def count_parameters(config: DiTConfig) -> ParameterCount:
    """Counts without making the model."""
    with torch.device("meta"):
        model = DiT(config)
    total = sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()
    idle = 0
    for index in config.moe_blocks:
        layer = model.blocks[index].mlp
        there = sum(kind in ("routed", "local") for kind in layer.router.expert_kinds)
        idle += max(0, there - config.top_k) * layer.spec.num_parameters
    return ParameterCount(total, int(total - idle))


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def load(config: Mapping[str, Any]) -> DiT:
    """The model of a configuration out of JSON: what tools open runs by (``gatewright.tools.runs``)."""
    return DiT(DiTConfig.from_dict(config))


def load_dit(path: str | Path, *, weights: str | None = None) -> DiT:
    """A trained model out of a run or an export, in plain PyTorch, all experts on this process.

    Args:
        weights: "ema" or "model"; by default a run's "ema", and what an export holds.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: a damaged or foreign folder, or one of another kind of model.
    """
    model, run = load_model(path, weights=weights)
    if not isinstance(model, DiT):
        raise ValueError(f'{path} holds a model "{run.model}": expected "dit"')
    return model
