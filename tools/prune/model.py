"""Where the experts of a transformers model are, and what they do in a forward.

    with torch.inference_mode(), observe(model, sums.add):
        model(input_ids)

A MoE block is found by its experts: a module that transformers' ``use_experts_implementation`` decorated (or Llama 4's,
which is not) beside the ``gate`` or ``router`` that feeds it. Every family of the installed transformers that shares
that interface is thereby found; where a family departs from the common shape its ``Memory`` entry in ``families`` says
so, and what cannot be told is refused by name.

For a token t, expert i of its K, with ``h`` the residual stream before the feed-forward's norm and ``x = norm(h)``:

    u_i  = E_i(x)                     the expert's output without its gate
    g_i  = the coefficient that the model multiplies u_i with: after top-k, renormalisation and scaling factors
    r    = sum_i g_i u_i              the routed output as it is added to h, without the shared expert
    s    = max(0, 1 - cos(h, h + r))  the token's contribution (EASY-EP, arXiv:2504.06792)

Where the paper's definition does not reach, ours: behind a norm of the block's output, u and r are their parts of that
norm's output (it is its input times a factor an element); with several residual streams (hyper-connections) h is the
mixture that the layer reads; what rescales or convolves the block's output afterwards by learned or depth-dependent
weights (Beam, Inkling, Muse Spark, ZAYA) is left out of r.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...moe.hosts.transformers_record import ROUTER_NAMES, experts_per_token
from .families import FAMILIES, Family, Memory

_PAIR_BYTES = 64 << 20  # of expert outputs recomputed at a time


@dataclass(frozen=True, eq=False)
class MoeBlock:
    """One layer's router and experts.

    Attributes:
        layer: the decoder layer's index in the model.
        name: of the module that holds both, in the model.
        holder: that module (Gemma 4: the decoder layer itself).
        decoder: the decoder layer.
        router_name: of the router in its holder.
        num_experts: N.
        top_k: K.
        num_groups, topk_group: of a grouped router, else 1 and 1.
    """

    layer: int
    name: str
    holder: nn.Module
    decoder: nn.Module
    router_name: str
    num_experts: int
    top_k: int
    num_groups: int
    topk_group: int
    family: Family

    @property
    def memory(self) -> Memory:
        return self.family.memory

    @property
    def router(self) -> nn.Module:
        return getattr(self.holder, self.router_name)

    @property
    def experts(self) -> nn.Module:
        return self.holder.experts

    @property
    def runs_all_experts(self) -> bool:
        """Llama 4: the gate multiplies the input, and every expert runs on every token."""
        return not _is_shared_interface(self.experts)


@dataclass(frozen=True, eq=False)
class LayerObservation:
    """What one MoE layer did in one forward; T = B * L tokens in row-major order, everything detached.

    Attributes:
        layer: as in ``MoeBlock``.
        shape: (B, L).
        hidden_before: h [T, D].
        mlp_input: x [T, D], what the block was given.
        index: the chosen experts [T, K] int64; -1 where there is none.
        gate: g [T, K] float32 (float64 in a model of that); 0 where there is none.
        output_norm: the L2 norm of u [T, K], as wide. Where the gate multiplies the expert's input (Llama 4) it is that
            of the actual summand divided by the gate, so that gate * output_norm is the summand's norm everywhere.
        routed_output: r [T, D].
    """

    layer: int
    shape: tuple[int, int]
    hidden_before: Tensor
    mlp_input: Tensor
    index: Tensor
    gate: Tensor
    output_norm: Tensor
    routed_output: Tensor

    @property
    def summand_norm(self) -> Tensor:
        """The L2 norm of what each expert adds, g_i u_i [T, K]."""
        return self.gate.abs() * self.output_norm


def token_contribution(before_TD: Tensor, after_TD: Tensor) -> Tensor:
    """max(0, 1 - cos(before, after)) [T] at least in float32: how far the routed experts turn the residual stream."""
    before_TD, after_TD = wide(before_TD), wide(after_TD)
    return (1 - torch.nn.functional.cosine_similarity(before_TD, after_TD, dim=-1)).clamp_min(0)


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def moe_blocks(model: nn.Module) -> tuple[MoeBlock, ...]:
    """The model's MoE blocks, by layer.

    Raises:
        ValueError: there are none, or one that cannot be told apart or listened to; names the module and the reason.
    """
    family = _family(model)
    kind = family.model_type
    modules = dict(model.named_modules())
    found: dict[int, MoeBlock] = {}
    for name, holder in modules.items():
        experts = getattr(holder, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        if not _is_shared_interface(experts) and type(experts).__name__ != "Llama4TextExperts":
            if type(experts).__name__ == "Mxfp4GptOssExperts":
                raise ValueError(
                    f"{name} holds MXFP4 experts whose kernel does not tell its routing: "
                    "load the model with quantization_config=Mxfp4Config(dequantize=True)"
                )
            continue
        block = _block(name, holder, modules, family)
        if block.layer in found:
            raise ValueError(
                f"{kind}: layer {block.layer} has two banks of experts, {found[block.layer].name} and {name}: "
                "which of them a plan would mean cannot be told"
            )
        found[block.layer] = block
    if not found:
        raise ValueError(
            f"{type(model).__name__} ({kind}) has no MoE block of transformers' shared experts interface: "
            "a dense model, or a family with an implementation of its own"
        )
    return tuple(found[layer] for layer in sorted(found))


@contextlib.contextmanager
def observe(
    model: nn.Module, callback: Callable[[LayerObservation], None], *, layers: Collection[int] | None = None
) -> Iterator[tuple[MoeBlock, ...]]:
    """Calls ``callback`` for each MoE layer of each forward, when that decoder layer ends.

    The index and the gate are those that the experts were called with, r is their real output; the norms of u come
    from running the model's own experts once more on the routed pairs alone, each pair as a token of its own with gate
    1, so that biases, quantised weights and every experts implementation count as they are. One layer's tensors live at
    a time.

    Args:
        layers: only these; by default all.

    Yields:
        the blocks that are observed.

    Raises:
        ValueError: as ``moe_blocks``; in a forward, a layer whose residual stream cannot be found.
    """
    blocks = [block for block in moe_blocks(model) if layers is None or block.layer in layers]
    handles: list[Any] = []
    try:
        for block in blocks:
            handles += _LayerListener(block, callback).listen()
        yield tuple(blocks)
    finally:
        for handle in handles:
            handle.remove()


class _LayerListener:
    """Follows one decoder layer through one forward."""

    def __init__(self, block: MoeBlock, callback: Callable[[LayerObservation], None]) -> None:
        self.block, self.callback = block, callback
        self._forget()

    def _forget(self) -> None:
        self.through: list[tuple[str, Tensor, Any]] = []  # (child, its input, its output), in order
        self.block_input: Tensor | None = None
        self.call: tuple[Tensor, Tensor, Tensor] | None = None  # experts' x, index, gate
        self.routing: tuple[Tensor, ...] | None = None
        self.routed: Tensor | None = None
        self.factor: Tensor | None = None  # of the norms behind the block

    def listen(self) -> list[Any]:
        block = self.block
        handles = [
            block.decoder.register_forward_pre_hook(self._starts, with_kwargs=True),
            block.decoder.register_forward_hook(self._ends),
            block.experts.register_forward_hook(self._experts_ran, with_kwargs=True),
        ]
        if block.holder is not block.decoder:
            handles.append(block.holder.register_forward_pre_hook(self._block_called, with_kwargs=True))
        if block.runs_all_experts:
            handles.append(block.router.register_forward_hook(self._router_ran))
        for name, child in block.decoder.named_children():
            if child is not block.holder and child is not block.experts and child is not block.router:
                handles.append(child.register_forward_hook(_named(self._child_ran, name), with_kwargs=True))
        for path in block.memory.post_norms:
            handles.append(_resolve(block, path).register_forward_hook(self._post_norm_ran))
        return handles

    def _starts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._forget()
        hidden = args[0] if args else kwargs["hidden_states"]
        self.shape = (hidden.shape[0], hidden.shape[1])

    def _child_ran(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if self.block_input is None and self.call is None and isinstance(first, Tensor):
            self.through.append((name, first, output))

    def _block_called(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.block_input = args[0] if args else kwargs["hidden_states"]

    def _router_ran(self, module: nn.Module, args: tuple, output: Any) -> None:
        scores_TE, logits_TE = output
        # a score of 0 is that of an expert that was not chosen
        index_TK = scores_TE.topk(min(self.block.top_k, scores_TE.shape[1]), dim=-1).indices
        self.routing = (index_TK, scores_TE.gather(1, index_TK))

    def _experts_ran(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        self.routed = output
        if self.block.runs_all_experts:
            self.call = (args[0], *self.routing)
        else:
            given = [*args, *kwargs.values()]
            index = next(t for t in given[1:] if not t.is_floating_point())
            gate = next(t for t in given[1:] if t.is_floating_point())
            self.call = (given[0], index, gate)

    def _post_norm_ran(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        # an RMS norm is its input times a factor per element; that factor is what carries over to the routed part
        before, after = wide(args[0]).flatten(0, -2), wide(output).flatten(0, -2)
        factor = torch.where(before == 0, 0, after / before)
        self.factor = factor if self.factor is None else self.factor * factor

    def _ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.call is None:
            self._forget()
            return
        try:
            self.callback(self._observation())
        finally:
            self._forget()

    @torch.no_grad()
    def _observation(self) -> LayerObservation:
        block, memory = self.block, self.block.memory
        mlp_input = self.block_input if self.block_input is not None else self.call[0]
        before = self._residual(mlp_input).detach()
        x_TD, index_TK, gate_TK = (part.detach() for part in self.call)
        inner = math.prod(_factor(block, path) for path in memory.gate_factors)
        outer = math.prod(_factor(block, path) for path in memory.residual_factors)
        project = _linear_part(_resolve(block, memory.projection)) if memory.projection else None
        if block.runs_all_experts:
            rows_ETD = self.routed.detach().view(-1, len(index_TK), self.routed.shape[-1])
            routed_TD = rows_ETD.sum(0)
            token = torch.arange(len(index_TK), device=index_TK.device)[:, None]
            norm_TK = wide(rows_ETD[index_TK, token]).norm(dim=-1) / wide(gate_TK).clamp_min(1e-38)
            if (kept := getattr(block.router, "kept_experts", None)) is not None:  # masked: rows of the kept ones alone
                index_TK = kept.to(index_TK.device)[index_TK]
        else:
            routed_TD = self.routed.detach().flatten(0, -2)
            norm_TK = _output_norms(block.experts, x_TD, index_TK, gate_TK.dtype, project, self.factor)
            if project is not None:
                routed_TD = project(routed_TD)
        routed_TD = routed_TD * (inner * outer)
        if self.factor is not None:
            routed_TD = wide(routed_TD) * self.factor
        index_TK = index_TK.long()
        gate_TK = wide(gate_TK) * inner
        if memory.zero_gate_is_none:
            index_TK = index_TK.masked_fill(gate_TK == 0, -1)
        before = before.flatten(0, -2)
        if memory.before_factor:
            before = before * _factor(block, memory.before_factor)
        return LayerObservation(
            layer=block.layer,
            shape=self.shape,
            hidden_before=before,
            mlp_input=mlp_input.detach().flatten(0, -2),
            index=index_TK,
            gate=gate_TK,
            output_norm=norm_TK,
            routed_output=routed_TD,
        )

    def _residual(self, mlp_input: Tensor) -> Tensor:
        """h: the input of the norm whose output is what the block was given."""
        if self.block.memory.residual == "block_input":
            return mlp_input
        for name, given, output in reversed(self.through):
            if output is mlp_input or name == self.block.memory.norm:
                return mlp_input if self.block.memory.residual == "norm_output" else given
        raise ValueError(
            f"layer {self.block.layer} of {type(self.block.decoder).__name__}: no module of the layer gives what its "
            "MoE block reads, so the residual stream before the norm cannot be found; the family's memory in "
            "gatewright.tools.prune.families must name it (norm=, or residual='block_input')"
        )


def _output_norms(
    experts: nn.Module,
    x_TD: Tensor,
    index_TK: Tensor,
    gate_dtype: torch.dtype,
    project: Callable[[Tensor], Tensor] | None,
    factor_TD: Tensor | None,
) -> Tensor:
    """The norm of E_i(x_t) for the routed pairs [T, K], a few tokens at a time."""
    tokens, width = index_TK.shape
    step = max(1, _PAIR_BYTES // (4 * width * x_TD.shape[-1]))
    norms = []
    for start in range(0, tokens, step):
        index_S1 = index_TK[start : start + step].reshape(-1, 1)
        x_SD = x_TD[start : start + step].repeat_interleave(width, dim=0)
        ones_S1 = torch.ones_like(index_S1, dtype=gate_dtype)
        u_SD = experts.forward(x_SD, index_S1, ones_S1)
        u_SD = wide(u_SD if project is None else project(u_SD))
        if factor_TD is not None:
            u_SD = u_SD * factor_TD[start : start + step].repeat_interleave(width, dim=0)
        norms.append(u_SD.norm(dim=-1).view(-1, width))
    return torch.cat(norms)


def _linear_part(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a projection behind the experts does to each summand: everything but its bias."""
    if isinstance(module, nn.Identity):
        return None
    return lambda rows: torch.nn.functional.linear(rows, module.weight)


def _block(name: str, holder: nn.Module, modules: dict[str, nn.Module], family: Family) -> MoeBlock:
    kind = family.model_type
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()]
    if not places:
        raise ValueError(f"{kind}: the MoE block {name or '(the model)'} is in no numbered layer")
    router_name = next((child for child in ROUTER_NAMES if isinstance(getattr(holder, child, None), nn.Module)), None)
    if router_name is None:
        raise ValueError(f"{kind}: the MoE block {name} has no module called {' or '.join(ROUTER_NAMES)}")
    router, experts = getattr(holder, router_name), holder.experts
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(
            f"{kind}: the experts of {name} are spread over devices: load the model without expert parallelism"
        )
    if hasattr(router, "tid2eid"):
        raise ValueError(
            f"{kind}: layer {parts[places[-1]]} is hash-routed (a table from token ids to experts): "
            "no expert of it can be removed, and transformers has one count for all layers"
        )
    groups, kept_groups = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    if getattr(router, "topk_method", None) == "greedy":
        groups, kept_groups = 1, 1
    return MoeBlock(
        layer=int(parts[places[-1]]),
        name=name,
        holder=holder,
        decoder=modules[".".join(parts[: places[-1] + 1])],
        router_name=router_name,
        num_experts=_count(experts, router),
        top_k=experts_per_token(router, holder),
        num_groups=groups,
        topk_group=kept_groups,
        family=family,
    )


def _is_shared_interface(experts: nn.Module) -> bool:
    """Whether ``use_experts_implementation`` decorated it: only then these are all set."""
    return all(hasattr(experts, name) for name in ("_apply_gate", "is_transposed", "has_gate", "_is_expert_parallel"))


def _count(experts: nn.Module, router: nn.Module) -> int:
    for owner in (experts, router):
        if isinstance(getattr(owner, "num_experts", None), int):
            return owner.num_experts
    raise ValueError(f"{type(experts).__name__} does not tell its number of experts")


def _family(model: nn.Module) -> Family:
    """The text model's entry, or the common shape's."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} is no model of transformers: it has no configuration")
    kind = config.get_text_config().model_type
    return FAMILIES.get(kind) or Family(model_type=kind, known=False)


def _resolve(block: MoeBlock, path: str) -> Any:
    """An attribute named from the block or the decoder layer: ``block.routed_scaling_factor``."""
    owner, _, rest = path.partition(".")
    value: Any = {"block": block.holder, "layer": block.decoder}[owner]
    for part in rest.split("."):
        value = getattr(value, part)
    return value


def _factor(block: MoeBlock, path: str) -> float:
    """The number there; Cohere 2 names how the routed and the shared output become one."""
    value = _resolve(block, path)
    if value in ("sum", "average"):
        return 0.5 if value == "average" and hasattr(block.holder, "shared_experts") else 1.0
    return float(value)


def _named(hook: Callable, name: str) -> Callable:
    return lambda *args: hook(name, *args)
