"""What the tests of the DeepSpeed host train: a small model with two MoE layers, and loops that train it on any layout.

A step sees ``MICRO_BATCHES`` micro-batches, each drawn from (step, number): on one rank they are accumulated, on four
each rank takes one. So every layout sees the same data, and has to give the same losses, gradients and weights.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewright.kernels.attention import AttentionWeights
from gatewright.moe import ExpertParallel, ExpertSpec, FeedForward, MoELayer, finish_step
from gatewright.moe.parallel import clip_gradients, grad_norm
from gatewright.routers import TokenContext, create_router

MICRO_BATCHES, BATCH, LENGTH, FEATURES, DIM = 4, 2, 6, 5, 16
CLIP = 0.5

ROUTERS = {
    "topk": {"top_k": 2, "bias_rate": 0.01, "balance_weight": 0.01},
    "promoe": {"top_k": 1},
    "expert_choice": {},
    "diffmoe": {"init_std": 0.5},
    "race": {},
    "aoe": {"rank": 4},
    "attention_aware": {"top_k": 2},
    "base": {},
    "cosine": {"top_k": 2, "projection_dim": 8},
    "densemixer": {"top_k": 2},
    "hash": {"vocabulary": 8, "top_k": 2},
    "longcat": {"top_k": 2},
    "moe_plus_plus": {"top_k": 2},
    "noisy_topk": {"top_k": 2},
    "remoe": {"top_k": 2},
    "segment": {"segment_size": 4},
    "similarity_aware": {"top_k": 2, "base_options": {"bias_rate": 0.01}, "learn_temperature": True},
    "soft_moe": {"slots": 2},
    "sparsemixer": {"jitter": 1.0},
    "union": {"gate": "ste"},
}


class Block(nn.Module):
    """Attention, then a MoE layer with a shared feed-forward."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.moe = moe

    def forward(self, x: Tensor, context: TokenContext) -> tuple[Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y, routing = self.moe(self.norm2(x), context.replace(attention=AttentionWeights(q, k, causal=False)))
        return x + y, routing.loss


class Toy(nn.Module):
    def __init__(
        self,
        router: str,
        layer: type,
        parallel: ExpertParallel,
        num_experts: int = 4,
        recompute: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.embed, self.head = nn.Linear(FEATURES, DIM), nn.Linear(DIM, FEATURES)
        self.position = nn.Parameter(torch.randn(LENGTH, DIM), requires_grad=False)
        options = ROUTERS[router] | options
        self.blocks = nn.ModuleList(
            Block(
                layer(
                    create_router(router, dim=DIM, num_experts=num_experts, **options),
                    ExpertSpec(DIM, 24, activation, bias=bias),
                    shared=FeedForward(ExpertSpec(DIM, 8, "gelu")),
                    parallel=parallel,
                    layer=i,
                )
            )
            for i, (activation, bias) in enumerate([("gelu", True), ("swiglu", False)])
        )

    def forward(self, x: Tensor, null: Tensor) -> Tensor:
        """The loss of giving back x; what a batch is worth depends on ``null`` through the router alone."""
        hidden = self.embed(x) + self.position
        # whatever a router may ask for follows from x, so that every layout sees the same
        numbers = (x.detach().float() * 64).long()
        context = TokenContext.for_tokens(
            x, null_mask=null, token_ids=numbers[..., 0] % 8, seed=0, step=0, sample_id=numbers.flatten(1).sum(1)
        )
        total = 0.0
        for block in self.blocks:
            if self.recompute:
                hidden, loss = checkpoint(block, hidden, context, use_reentrant=False)
            else:
                hidden, loss = block(hidden, context)
            total = total + loss
        return F.mse_loss(self.head(hidden), x) + 0.1 * total


def micro_batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + number)
    x = torch.randn(BATCH, LENGTH, FEATURES, generator=generator)
    return x, torch.arange(BATCH) % 2 == number % 2


def train_plainly(router: str, steps: int, clip: float = CLIP, lr: float = 1e-4) -> dict[str, Any]:
    """The definition of right: plain PyTorch, one process, micro-batches accumulated."""
    model = Toy(router, MoELayer, ExpertParallel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses, norms = [], []
    for step in range(steps):
        losses.append(0.0)
        for number in range(MICRO_BATCHES):
            loss = model(*micro_batch(step, number)) / MICRO_BATCHES
            loss.backward()
            losses[-1] += loss.item()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = clip_gradients(trained, clip, ExpertParallel()) if clip else grad_norm(trained, ExpertParallel())
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
        finish_step(model)
    return {
        "losses": losses,
        "norms": norms,
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def without_key_bias(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what has a true gradient of zero: there is only rounding in it, which Adam blows up."""
    kept = {name: value.clone() for name, value in parameters.items()}
    for name, value in kept.items():
        if name.endswith("qkv.bias"):
            value[DIM : 2 * DIM] = 0
    return kept


# ---- on the ranks ----------------------------------------------------------------------------------------------------


class Run:
    """An engine on the toy, with the loop around it."""

    def __init__(
        self,
        router: str = "promoe",
        *,
        stage: int = 0,
        ep: int = 1,
        dtype: str = "float32",
        clip: float = CLIP,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        ema: float | None = None,
        scheduler: bool = False,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        import deepspeed
        from deepspeed.utils import groups

        from gatewright.moe.hosts.deepspeed import EMA, DeepSpeedMoELayer, default_config

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        for made in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
            made.clear()  # of engines before in this process, at another expert parallelism
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        settings = default_config(
            zero_stage=stage,
            dtype=dtype,
            micro_batch=BATCH,
            accumulation=MICRO_BATCHES // self.world,
            clip=clip,
            lr=lr,
            weight_decay=weight_decay,
        )
        # so that ZeRO-3 really splits, into several parts that are stepped apart
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}
        if scheduler:
            settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 30, "warmup_max_lr": lr}}
        settings |= config or {}
        model = Toy(router, DeepSpeedMoELayer, ExpertParallel.create(ep), **options)
        self.dtype = getattr(torch, dtype)
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        self.ema = None if ema is None else EMA(self.engine, decay=ema)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        self.engine.destroy()
        self.engine = self.ema = None
        gc.collect()

    def micro_batch(self) -> tuple[Tensor, Tensor]:
        x, null = micro_batch(0, self.rank)
        return x.to(self.dtype), null

    def train(self, first: int, last: int) -> dict[str, list[float]]:
        """Steps first to last - 1; the losses are the mean over all micro-batches of a step."""
        from gatewright.moe.hosts.deepspeed import global_grad_norm

        losses, norms = [], []
        for step in range(first, last):
            total = torch.zeros((), dtype=torch.float64)
            for number in range(self.rank, MICRO_BATCHES, self.world):
                x, null = micro_batch(step, number)
                loss = self.engine(x.to(self.dtype), null)
                self.engine.backward(loss)
                self.engine.step()
                total += loss.item() / MICRO_BATCHES
            assert self.engine.was_step_applied()
            finish_step(self.engine.module)
            if self.ema is not None:
                self.ema.update(step + 1)
            dist.all_reduce(total)
            losses.append(total.item())
            norms.append(global_grad_norm(self.engine))
        return {"losses": losses, "norms": norms}

    def parameters(self) -> dict[str, Tensor]:
        from gatewright.moe.hosts.deepspeed import full_parameters

        return {name: value.clone() for name, value in full_parameters(self.engine)}

    def average(self) -> dict[str, Tensor]:
        from gatewright.moe.hosts.deepspeed import ema_parameters

        return {name: value.clone() for name, value in ema_parameters(self.engine)}

    def buffers(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self.engine.module.named_buffers()}

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from, whole, by name."""
        from gatewright.moe.hosts.deepspeed_ema import _full_parameters
        from gatewright.moe.hosts.deepspeed_state import kinds, scalars, shares

        whole = {
            kind: {n: v.clone() for n, v in _full_parameters(self.engine, kind)}
            for kind in ["master", *kinds(self.engine)]
        }
        steps = {name: scalars(self.engine, share) for name, share in shares(self.engine).items() if share.trainable}
        return whole | {"scalars": steps, "buffers": self.buffers()}
