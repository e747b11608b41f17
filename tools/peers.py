"""The layers that gatewright's is timed against, each behind the same few methods, on the same weights and tokens.

    layer(x)                    tokens [T, D] -> [T, D]: routing by softmax top-k, renormalised, and SwiGLU experts
    route(x)                    its router alone -> weights [T, K]
    experts(x, index, weight)   its experts alone, on a routing that is given
    gradients()                 what backward left, in our layout

A contestant that cannot run says why (``why_not``); what one does that the others do not is in its ``differs``, which
goes below every table. ``check`` compares each with a float64 reference before anything is timed.

Of the peers that need a GPU, ScatterMoE (2025-10), moe-ops 0.1.0 and Liger-Kernel 0.8.5 were run in Triton's
interpreter only, in float32, and agreed; SonicMoE and MegaBlocks were written from their public sources and not run.
"""

import abc
import dataclasses
import importlib.util
import math
import os
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.backend import choose_backend
from ..moe import DispatchPlan, ExpertSpec, FeedForward, MoELayer
from ..routers import TokenContext, create_router

ACTIVATION = "swiglu"
MARGIN = 0.02  # between the logits of the last expert chosen and the first left out: above what bfloat16 rounds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# of gradients and outputs, relative to the tensor's norm
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a layer and its batch.

    Attributes:
        tokens: T.
        dim: width of a token, D.
        hidden: width inside an expert, H.
        experts: E.
        top_k: experts a token, K.

    Raises:
        ValueError: a number below 1, or ``top_k`` outside 2 to E - 1.
    """

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.dim, self.hidden) < 1 or not 2 <= self.top_k < self.experts:
            raise ValueError(
                f"(T, D, H, E, K) = {self}: choose at least 1 of everything, and K from 2 (a single renormalised "
                "weight is 1, whatever the router says) to below E"
            )

    def __str__(self) -> str:
        return f"({self.tokens}, {self.dim}, {self.hidden}, {self.experts}, {self.top_k})"

    @property
    def rows(self) -> int:
        """Expert rows, T * K."""
        return self.tokens * self.top_k


class Weights(NamedTuple):
    """Of a layer, or their gradients."""

    gate: Tensor  # [E, D]
    w_in: Tensor  # [E, 2H, D], the gate's rows first
    w_out: Tensor  # [E, D, H]


def draw_weights(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Weights:
    """Each entry N(0, 1 / width of its input), so that logits and outputs are of order 1."""
    sizes = (
        (shape.experts, shape.dim),
        (shape.experts, 2 * shape.hidden, shape.dim),
        (shape.experts, shape.dim, shape.hidden),
    )
    return Weights(
        *(torch.randn(*size, generator=generator, device=device).div_(math.sqrt(size[-1])).to(dtype) for size in sizes)
    )


def draw_tokens(shape: Shape, weights: Weights, generator: torch.Generator) -> Tensor:
    """Tokens from N(0, 1) whose choice no rounding changes: every contestant routes them alike. [T, D]"""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < shape.tokens:
        x_TD = torch.randn(shape.tokens, shape.dim, generator=generator, device=weights.gate.device)
        x_TD = x_TD.to(weights.gate.dtype)
        best = (x_TD.float() @ weights.gate.float().T).topk(shape.top_k + 1).values
        kept.append(x_TD[best[:, -2] - best[:, -1] > MARGIN])
    return torch.cat(kept)[: shape.tokens]


def choose(x_TD: Tensor, gate_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The routing that all compute: ids and weights, each [T, K]."""
    dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    share_TE = F.linear(x_TD.to(dtype), gate_ED.to(dtype)).softmax(-1)
    weight_TK, index_TK = share_TE.topk(top_k, dim=-1)
    return index_TK, weight_TK / weight_TK.sum(-1, keepdim=True)


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what the package is in
        return False


class Contestant(abc.ABC):
    """A layer with the given weights.

    Attributes:
        name: in tables.
        package: what must be importable.
        gpu_only: whether it needs a GPU.
        differs: what it does that the others do not, for the reader of a table.
        parts: which of "router" (``route``) and "experts" can be timed alone, and are its own.
        leaves: the tensors that get gradients.
    """

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    gpu_only: ClassVar[bool] = False
    differs: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    leaves: list[Tensor]

    @abc.abstractmethod
    def __init__(self, shape: Shape, weights: Weights) -> None:
        """Takes the weights into its own layout."""

    @abc.abstractmethod
    def layer(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D], routing included."""

    def route(self, x_TD: Tensor) -> Tensor:
        """The weights alone, [T, K], in any order of the K."""
        raise NotImplementedError(f"{self.name} has no router of its own to time: parts={self.parts}")

    def experts(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Gather, experts and weighted sum, on a routing that is given."""
        raise NotImplementedError(f"{self.name} has no experts of its own to time: parts={self.parts}")

    def gradients(self) -> Weights:
        """Of the last backward, in our layout."""
        return Weights(*(leaf.grad for leaf in self.leaves))

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    @classmethod
    def why_not(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run, or None."""
        if cls.package is not None and not installed(cls.package):
            return f"{cls.package} is not installed"
        if cls.gpu_only and device.type != "cuda":
            return "needs a GPU"
        return None


class Gatewright(Contestant):
    """``MoELayer``; the backend is chosen by the library."""

    name = "gatewright"
    parts = ("router", "experts")
    backend: ClassVar[str | None] = None

    def __init__(self, shape: Shape, weights: Weights) -> None:
        router = create_router("topk", dim=shape.dim, num_experts=shape.experts, top_k=shape.top_k, renormalise=True)
        spec = ExpertSpec(shape.dim, shape.hidden, ACTIVATION)
        self.module = MoELayer(router, spec, backend=self.backend, device="meta")
        router.weight = nn.Parameter(weights.gate)
        bank = self.module.experts
        bank.w1, bank.w2 = nn.Parameter(weights.w_in), nn.Parameter(weights.w_out)
        bank.w3 = nn.Parameter(weights.w_in.new_zeros(bank.w3.shape))
        self.leaves = [router.weight, bank.w1, bank.w2]

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD)[0]

    def route(self, x_TD: Tensor) -> Tensor:
        return self.module.router(x_TD, TokenContext.for_tokens(x_TD)).weight

    def experts(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        tokens, slots = index_TK.shape
        token = torch.arange(tokens, device=x_TD.device).repeat_interleave(slots, output_size=tokens * slots)
        plan = DispatchPlan.build(
            num_rows=tokens, source=token, expert=index_TK.flatten(), weight=weight_TK.flatten(),
            num_experts=len(self.module.experts.ids), parallel=self.module.parallel,
        )  # fmt: skip
        bank = self.module.experts
        return plan.run(x_TD, lambda *args, **kwargs: bank(*args, backend=self.backend, **kwargs))[0]

    @classmethod
    def why_not(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        if cls.backend is None:
            return None
        try:
            choose_backend(cls.backend, device=device, dtype=dtype, widths=(shape.dim, 2 * shape.hidden, shape.hidden))
        except ValueError as error:
            return str(error)
        return None


class GatewrightTorch(Gatewright):
    """The same layer over torch.nn.functional.grouped_mm."""

    name = "torch grouped_mm"
    parts = ("experts",)
    backend = "torch"
    differs = 'gatewright\'s layer with backend="torch"'


class Dense(Contestant):
    """One feed-forward of the same activated FLOPs: the yardstick, no peer."""

    name = "dense"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        dtype, device = weights.w_in.dtype, weights.w_in.device
        spec = ExpertSpec(shape.dim, shape.top_k * shape.hidden, ACTIVATION)
        self.module = FeedForward(spec, device=device, dtype=dtype)
        self.leaves = list(self.module.parameters())

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD)


class Loop(Contestant):
    """The layer as it is first written: experts one after the other, each indexed out of the bank."""

    name = "loop over w[e]"
    parts = ("router", "experts")
    differs = "indexing the bank makes autograd allocate all of it once an expert"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.top_k = shape.top_k
        self.leaves = [nn.Parameter(weight) for weight in weights]

    def each(self, bank: Tensor) -> list[Tensor]:
        return [bank[e] for e in range(len(bank))]

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.experts(x_TD, *choose(x_TD, self.leaves[0], self.top_k))

    def route(self, x_TD: Tensor) -> Tensor:
        return choose(x_TD, self.leaves[0], self.top_k)[1]

    def experts(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for e, (w_in, w_out) in enumerate(zip(self.each(self.leaves[1]), self.each(self.leaves[2]), strict=True)):
            token, slot = torch.where(index_TK == e)
            gate, up = F.linear(x_TD[token], w_in).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, w_out) * weight_TK[token, slot, None]
            out_TD.index_add_(0, token, y.to(out_TD.dtype))
        return out_TD


class LoopUnbound(Loop):
    """The same loop over ``bank.unbind()``, which autograd stacks once."""

    name = "loop, unbind"
    parts = ("experts",)
    differs = ""

    def each(self, bank: Tensor) -> list[Tensor]:
        return list(bank.unbind(0))


class TransformersEager(Contestant):
    """Mixtral's block of transformers with its loop over experts."""

    name = "transformers eager"
    parts = ("router", "experts")
    package = "transformers"
    implementation: ClassVar[str] = "eager"
    differs = "its gate's logits are in the model's dtype; computes no auxiliary loss"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.module = mixtral_block(shape, weights, self.implementation)
        self.leaves = [
            self.module.gate.weight, self.module.experts.gate_up_proj, self.module.experts.down_proj,
        ]  # fmt: skip

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD[None])[0]

    def route(self, x_TD: Tensor) -> Tensor:
        return self.module.gate(x_TD)[1]

    def experts(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return self.module.experts(x_TD, index_TK, weight_TK)


class TransformersBatched(TransformersEager):
    name = "transformers batched_mm"
    parts = ("experts",)
    implementation = "batched_mm"
    differs = "copies an expert's weights for every row, so that few rows fit"

    @classmethod
    def why_not(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = super().why_not(shape, dtype, device)
        # the copies of both weights, and the gradients of those copies
        needed = 2 * shape.rows * 3 * shape.dim * shape.hidden * dtype.itemsize
        if reason is None and needed > (there := memory_bytes(device)) / 2:
            return (
                f"copies an expert's weights for every row: {needed / 2**30:.0f} GiB with their gradients, of "
                f"{there / 2**30:.0f} GiB here"
            )
        return reason


class TransformersGrouped(TransformersEager):
    name = "transformers grouped_mm"
    parts = ("experts",)
    implementation = "grouped_mm"


def mixtral_block(shape: Shape, weights: Weights, implementation: str = "eager") -> nn.Module:
    """transformers' block of a Mixtral, its experts run by one of its implementations."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.dim, intermediate_size=shape.hidden, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k, num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    block.gate.weight = nn.Parameter(weights.gate)
    block.experts.gate_up_proj = nn.Parameter(weights.w_in)
    block.experts.down_proj = nn.Parameter(weights.w_out)
    return block


class _SwiGLU(nn.Module):
    """One expert of a list."""

    def __init__(self, w_in: Tensor, w_out: Tensor) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(w_in), nn.Parameter(w_out)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w_out)


class DeepSpeedMoE(Contestant):
    """``deepspeed.moe.layer.MoE`` in one process, dropping nothing."""

    name = "DeepSpeed MoE"
    parts = ("router",)
    package = "deepspeed"
    differs = "pads every expert to the fullest one (drop_tokens=False); computes its balance loss in every forward"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from deepspeed.moe.layer import MoE

        small = _SwiGLU(weights.w_in[0, :2, :1], weights.w_out[0, :1, :1])  # is copied for every expert, then replaced
        self.module = MoE(
            hidden_size=shape.dim, expert=small, num_experts=shape.experts, k=shape.top_k, drop_tokens=False,
            use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        gate = self.module.deepspeed_moe.gate
        gate.wg.weight = nn.Parameter(weights.gate)
        self.bank = self.module.deepspeed_moe.experts.deepspeed_experts
        for expert, w_in, w_out in zip(self.bank, weights.w_in, weights.w_out, strict=True):
            expert.w_in, expert.w_out = nn.Parameter(w_in), nn.Parameter(w_out)
        self.leaves = [gate.wg.weight, *self.bank.parameters()]

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD)[0]

    def route(self, x_TD: Tensor) -> Tensor:
        return self.module.deepspeed_moe.gate(x_TD, None, True)[5].T

    def gradients(self) -> Weights:
        return Weights(
            self.leaves[0].grad,
            torch.stack([expert.w_in.grad for expert in self.bank]),
            torch.stack([expert.w_out.grad for expert in self.bank]),
        )


class DeepSpeedAutoEP(Contestant):
    """DeepSpeed's AutoEP layer in place of Mixtral's block, in one process."""

    name = "DeepSpeed AutoEP"
    parts = ("router",)
    package = "deepspeed"
    differs = "pads every expert's rows to a multiple of 8; holds gate and up projection apart"

    @classmethod
    def why_not(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = super().why_not(shape, dtype, device)
        return reason or (None if installed("transformers") else "transformers is not installed")

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.module = autoep_layer(mixtral_block(shape, weights), shape)
        bank = self.module.experts
        self.leaves = [self.module.router.gate.weight, bank.w1, bank.w3, bank.w2]

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD[None])[0]

    def route(self, x_TD: Tensor) -> Tensor:
        return self.module.router(x_TD)[0]

    def gradients(self) -> Weights:
        gate, w_gate, w_up, w_out = (leaf.grad for leaf in self.leaves)
        return Weights(gate, torch.cat([w_gate, w_up], dim=1), w_out)


def autoep_layer(
    block: nn.Module, shape: Shape, *, ranks: int = 1, rank: int = 0, kind: type[nn.Module] | None = None
) -> nn.Module:
    """DeepSpeed's AutoEP layer made of a Mixtral block.

    Args:
        block: has ``gate.weight``, ``experts.gate_up_proj`` and ``experts.down_proj`` as Mixtral's.
        ranks, rank: of the expert-parallel group.
        kind: a subclass of ``AutoEPMoELayer`` to make.
    """
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    spec = MoELayerSpec(
        moe_module_name="layer", model_family="mixtral", router_name="gate", experts_name="experts",
        expert_storage="fused_3d", expert_w1_name="gate_up_proj", expert_w2_name="down_proj", expert_w3_name=None,
        num_experts=shape.experts, top_k=shape.top_k, hidden_size=shape.dim, ffn_hidden_size=shape.hidden,
        score_func="softmax", score_apply="post", route_norm=True, gate_bias=False, return_router_logits=False,
        router_logits_capture_target="none", router_logits_capture_index=None, router_logits_capture_layer_name=None,
        has_shared_experts=False, shared_experts_name="",
    )  # fmt: skip
    kind = kind or AutoEPMoELayer
    return kind(spec, block, ep_size=ranks, ep_rank=rank, config=AutoEPConfig(enabled=True))


class Megatron(Contestant):
    """Megatron-Core's ``MoELayer`` over ``SequentialMLP`` and its all-gather dispatcher, in one process."""

    name = "Megatron-Core SequentialMLP"
    package = "megatron.core"
    differs = "its own router needs CUDA: softmax top-k in its dense form stands in for it; no auxiliary loss"

    @classmethod
    def why_not(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = super().why_not(shape, dtype, device)
        if reason is None and dist.is_initialized() and dist.get_world_size() > 1:
            return "is compared in one process"
        return reason

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
        from megatron.core.transformer.moe.moe_layer import MoESubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_config import TransformerConfig

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        config = TransformerConfig(
            num_layers=1, hidden_size=shape.dim, num_attention_heads=1, ffn_hidden_size=shape.hidden,
            moe_ffn_hidden_size=shape.hidden, num_moe_experts=shape.experts, moe_router_topk=shape.top_k,
            moe_token_dispatcher_type="allgather", moe_grouped_gemm=False, add_bias_linear=False,
            gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=False,
            gradient_accumulation_fusion=False, use_cpu_initialization=True, perform_initialization=False,
            params_dtype=weights.gate.dtype,
        )  # fmt: skip
        mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = ModuleSpec(module=SequentialMLP, submodules=mlp)

        def router(**_) -> nn.Module:
            return _MegatronRouter(weights.gate, shape.top_k)

        self.module = MegatronMoELayer(config, MoESubmodules(router=router, experts=experts), layer_number=1)
        self.bank = self.module.experts.local_experts
        for expert, w_in, w_out in zip(self.bank, weights.w_in, weights.w_out, strict=True):
            expert.linear_fc1.weight, expert.linear_fc2.weight = nn.Parameter(w_in), nn.Parameter(w_out)
        self.leaves = [self.module.router.weight, *self.bank.parameters()]

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD[:, None])[0][:, 0]

    def gradients(self) -> Weights:
        return Weights(
            self.leaves[0].grad,
            torch.stack([expert.linear_fc1.weight.grad for expert in self.bank]),
            torch.stack([expert.linear_fc2.weight.grad for expert in self.bank]),
        )


class _MegatronRouter(nn.Module):
    """Megatron's contract: tokens -> probabilities [T, E], zero where not chosen, and which are chosen."""

    def __init__(self, gate: Tensor, top_k: int) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(gate), top_k

    def set_layer_number(self, number: int) -> None:
        pass

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_TD = x.flatten(0, 1)
        index_TK, weight_TK = choose(x_TD, self.weight, self.top_k)
        share_TE = weight_TK.new_zeros(len(x_TD), len(self.weight))
        chosen_TE = torch.zeros_like(share_TE, dtype=torch.bool).scatter(1, index_TK, True)
        return share_TE.scatter(1, index_TK, weight_TK), chosen_TE


class _GPUPeer(Contestant):
    """What the kernels of a GPU share: our routing in plain torch, and their experts."""

    gpu_only = True
    parts = ("experts",)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)

    @classmethod
    def why_not(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = super().why_not(shape, dtype, device)
        if reason is None and dtype not in cls.dtypes:
            return f"is not compared in {dtype}"
        return reason

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.top_k = shape.top_k
        self.gate = nn.Parameter(weights.gate)

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.experts(x_TD, *choose(x_TD, self.gate, self.top_k))


class ScatterMoE(_GPUPeer):
    """``scattermoe.mlp.GLUMLP``, whose bank holds the gate's rows last."""

    name = "ScatterMoE"
    package = "scattermoe"
    dtypes = (torch.bfloat16, torch.float32)

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__(shape, weights)
        with torch.device("meta"):
            self.module = GLUMLP(shape.dim, shape.hidden, shape.experts, shape.top_k, activation=nn.SiLU())
        self.module.experts.weight = nn.Parameter(weights.w_in.roll(shape.hidden, dims=1))
        self.module.output_experts.weight = nn.Parameter(weights.w_out)
        self.leaves = [self.gate, self.module.experts.weight, self.module.output_experts.weight]

    def experts(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return self.module(x_TD, weight_TK.to(x_TD.dtype), index_TK)

    def gradients(self) -> Weights:
        gate, w_in, w_out = (leaf.grad for leaf in self.leaves)
        return Weights(gate, w_in.roll(w_in.shape[1] // 2, dims=1), w_out)


class SonicMoE(_GPUPeer):
    """``sonicmoe.MoE``, whose bank holds gate and up rows in turn."""

    name = "SonicMoE"
    parts = ()
    package = "sonicmoe"
    differs = "its router's weights are in the model's dtype; computes its balance loss in every forward"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        super().__init__(shape, weights)
        with torch.device("meta"):
            self.module = MoE(
                shape.experts, shape.top_k, shape.dim, shape.hidden, ActivationType.SWIGLU, add_bias=False, std=0.02
            )
        in_turn = weights.w_in.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()
        self.module.router.weight = self.gate
        self.module.c_fc.weight, self.module.c_proj.weight = nn.Parameter(in_turn), nn.Parameter(weights.w_out)
        self.leaves = [self.gate, self.module.c_fc.weight, self.module.c_proj.weight]

    def layer(self, x_TD: Tensor) -> Tensor:
        return self.module(x_TD)[0]

    def gradients(self) -> Weights:
        gate, w_in, w_out = (leaf.grad for leaf in self.leaves)
        return Weights(gate, w_in.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2), w_out)


class MoEOps(_GPUPeer):
    """moe-ops: permute, two grouped GEMMs with SwiGLU in torch between them, unpermute."""

    name = "moe-ops"
    package = "moe_ops"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        super().__init__(shape, weights)
        self.leaves = [self.gate, nn.Parameter(weights.w_in), nn.Parameter(weights.w_out)]

    def experts(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        from moe_ops import grouped_gemm, permute, unpermute

        _, w_in, w_out = self.leaves
        rows, place, ends = permute(x_TD, index_TK.int(), E=len(w_in))
        gate, up = grouped_gemm(rows, w_in, ends).chunk(2, dim=-1)
        return unpermute(grouped_gemm(F.silu(gate) * up, w_out, ends), place, weight_TK, *index_TK.shape)


class Liger(MoEOps):
    """Liger-Kernel's fused MoE function."""

    name = "Liger fused MoE"
    package = "liger_kernel"

    def experts(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        return LigerFusedMoEFunction.apply(x_TD, *self.leaves[1:], index_TK.int(), weight_TK)


class MegaBlocks(_GPUPeer):
    """``megablocks.layers.dmoe.dMoE`` over grouped GEMMs; its bank is [E H, D] three times."""

    name = "MegaBlocks dMoE"
    parts = ()
    package = "megablocks"
    differs = "its router's weights are in the model's dtype"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        super().__init__(shape, weights)
        self.shape = shape
        arguments = Arguments(
            hidden_size=shape.dim, ffn_hidden_size=shape.hidden, moe_num_experts=shape.experts, moe_top_k=shape.top_k,
            moe_normalize_expert_weights=1, mlp_type="glu", mlp_impl="grouped", memory_optimized_mlp=True, bias=False,
            return_bias=False, activation_fn=F.silu, fp16=False, bf16=True, device=weights.gate.device,
        )  # fmt: skip
        self.module = dMoE(arguments)
        mlp = self.module.experts.mlp
        gate, up = weights.w_in.chunk(2, dim=1)
        self.module.router.layer.weight = self.gate
        mlp.w1, mlp.v1 = (nn.Parameter(half.flatten(0, 1).contiguous()) for half in (gate, up))
        mlp.w2 = nn.Parameter(weights.w_out.mT.flatten(0, 1).contiguous())
        self.leaves = [self.gate, mlp.w1, mlp.v1, mlp.w2]

    def layer(self, x_TD: Tensor) -> Tensor:
        y = self.module(x_TD[:, None])
        return (y[0] if isinstance(y, tuple) else y)[:, 0]

    def gradients(self) -> Weights:
        gate, w1, v1, w2 = (leaf.grad for leaf in self.leaves)
        w1, v1, w2 = (w.unflatten(0, (self.shape.experts, -1)) for w in (w1, v1, w2))
        return Weights(gate, torch.cat([w1, v1], dim=1), w2.mT)


OURS, YARDSTICK = Gatewright, Dense
CONTESTANTS: dict[str, type[Contestant]] = {
    contestant.name: contestant
    for contestant in (
        Gatewright, Dense, GatewrightTorch, TransformersEager, TransformersBatched, TransformersGrouped, DeepSpeedMoE,
        DeepSpeedAutoEP, Megatron, Loop, LoopUnbound, ScatterMoE, SonicMoE, MoEOps, Liger, MegaBlocks,
    )
}  # fmt: skip


def memory_bytes(device: torch.device) -> int:
    """What the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(contestant: type[Contestant], shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """How far output and gradients are from a float64 loop's, relative to the norm, on a small copy of ``shape``.

    Raises:
        ValueError: further than ``TOLERANCE``: it computes something else, and its time would compare nothing.
    """
    small = dataclasses.replace(
        shape, tokens=min(shape.tokens, 256), dim=min(shape.dim, 128), hidden=min(shape.hidden, 128)
    )
    generator = torch.Generator(device).manual_seed(0)
    weights = draw_weights(small, dtype, device, generator)
    x_TD = draw_tokens(small, weights, generator)
    grad_TD = torch.randn(x_TD.shape, generator=generator, device=device).to(dtype)
    found, expected = (
        _output_and_gradients(made, x_TD.to(made_dtype), grad_TD.to(made_dtype))
        for made, made_dtype in (
            (contestant(small, weights), dtype),
            (LoopUnbound(small, Weights(*(weight.double() for weight in weights))), torch.float64),
        )
    )
    errors = {name: float((found[name].double() - value).norm() / value.norm()) for name, value in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise ValueError(f"computes other values in {dtype}: {listed} of the norm, allowed {TOLERANCE[dtype]:.0e}")
    return errors


def _output_and_gradients(contestant: Contestant, x_TD: Tensor, grad_TD: Tensor) -> dict[str, Tensor]:
    x_TD = x_TD.detach().requires_grad_()
    y_TD = contestant.layer(x_TD)
    y_TD.backward(grad_TD)
    gate, w_in, w_out = contestant.gradients()
    return {"y": y_TD.detach(), "dx": x_TD.grad, "d gate": gate, "d w_in": w_in, "d w_out": w_out}
