"""Records the routing of transformers' own MoE families: Mixtral, Qwen-MoE, OLMoE, DeepSeek, GPT-OSS and the like.

    trainer = Trainer(model, ..., callbacks=[RoutingCallback()])              the log is OUTPUT_DIR/routing
    recorder = TransformersRecorder(model, "runs/1")                          in a loop of one's own, as ``Recorder``

It listens to the modules called ``gate`` or ``router`` that know their ``top_k``. Their forward returns, across the
families, the logits [T, E], the weights [T, k] and the ids [T, k]; what differs is in ``_READERS``:

    Llama 4             sigmoids of the chosen and the logits: ids are those of the k largest logits
    DBRX                logits alone, of which the layer takes the k largest
    Switch              a one-hot choice after capacity [B, L, E]: what was requested is the largest logit
    Gemma 4             probabilities in the place of logits, which are their logarithms up to a constant

Padding is read from the model's ``attention_mask`` [B, L]. Scores are shares of sigmoids where the router's own code
takes sigmoids of its logits and no softmax, without the bias that steers the choice. A forward in training mode counts
once, under either kind of gradient checkpointing. JetMoe and NLLB-MoE tell too little and are refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...routers.base import Routing, TokenContext
from ..layer import is_recomputing, moe_layers
from ..record import Recorder
from ..record_log import LayerInfo
from ..record_sums import Bank

ROUTER_NAMES = ("gate", "router")


class TransformersRecorder(Recorder):
    """A ``Recorder``, with its arguments and methods, for a model of transformers.

    Raises:
        ValueError: no router in the model that it can listen to; at the first forward, one that tells too little.
    """

    _looked_for = "router of transformers' MoE families"

    def _find_layers(self) -> tuple[list[nn.Module], list[LayerInfo], list[Bank]]:
        modules, layers, banks = [], [], []
        config = getattr(self.model, "config", None)
        for name, parent in self.model.named_modules():
            for child in ROUTER_NAMES:
                router = getattr(parent, child, None)
                top_k = experts_per_token(router, parent) if isinstance(router, nn.Module) else None
                size = _bank_size(router) if top_k is not None else None
                if size is None:
                    continue
                others = getattr(config, "zero_expert_num", None) or 0
                kinds = ("routed",) * (size - others) + ("copy",) * others
                modules.append(router)
                layers.append(
                    LayerInfo(
                        name=f"{name}.{child}" if name else child,
                        layer=len(layers),
                        experts=size - others,
                        top_k=math.nan if others else float(top_k),
                        router=type(router).__name__,
                        options={"num_experts": size - others, "top_k": top_k},
                        kinds=kinds,
                    )
                )
                banks.append(Bank(tuple(range(size - others)), size))
        return modules, layers, banks

    def _listen(self) -> list[Any]:
        self._read = [_READERS.get(type(module).__name__, _read_triple) for module in self.modules]
        self._top_k = [layer.options["top_k"] for layer in self.layers]
        self._sigmoid = [_takes_sigmoids(module) for module in self.modules]
        self._shape: tuple[int, int] | None = None
        self._ids: Tensor | None = None
        self._real: Tensor | None = None
        return [*super()._listen(), self.model.register_forward_pre_hook(self._model_called, with_kwargs=True)]

    def _model_called(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keeps what the routers are not told: the shape of the batch, and its padding."""
        if is_recomputing():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        inputs = ids if ids is not None else kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._shape = tuple(inputs.shape[:2]) if isinstance(inputs, Tensor) else None
        self._ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and tuple(mask.shape) == self._shape
        self._real = mask.detach().bool() if fits else None

    def _heard(self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        counts = not self._paused and module.training and not is_recomputing()
        if self._probed is None and not counts:
            return
        routing = self._read[layer](module, output, self._top_k[layer])
        tokens = routing.num_tokens
        # a part of a model may see other tokens than the batch's
        same = self._shape is not None and math.prod(self._shape) == tokens
        if self._probed is not None:
            batch, length = self._shape if same else (1, tokens)
            fields = {"padding_mask": self._real, "token_ids": self._ids} if same else {}
            self._probed.add(layer, routing, TokenContext(batch_size=batch, length=length, **fields))
        else:
            real_T = self._real.flatten() if same and self._real is not None else None
            if real_T is not None:
                routing = routing.replace(
                    index=routing.index.masked_fill(~real_T[:, None], -1),
                    requested=None
                    if routing.requested is None
                    else routing.requested.masked_fill(~real_T[:, None], -1),
                )
            self._sums.add(layer, routing, real_T, self._shape[1] if same else tokens, sigmoid=self._sigmoid[layer])

    def _router(self, layer: int) -> nn.Module:
        return self.modules[layer]


class RoutingCallback(TrainerCallback):
    """Records while a ``Trainer`` trains: one window every few steps, what it logs beside them; written out with each
    checkpoint, and gone on with by ``resume_from_checkpoint``. ``recorder.summary()`` is for other loggers.

    Args:
        run: the folder; by default the trainer's ``output_dir``.
        options: of the ``Recorder``.
    """

    def __init__(self, run: str | Path | None = None, **options: Any) -> None:
        self.run, self.options = run, options
        self.recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        kind = Recorder if moe_layers(model) else TransformersRecorder
        self.recorder = kind(model, self.run or args.output_dir, **self.options)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder is not None:
            self.recorder.step(state.global_step - 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.recorder is not None:
            numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
            self.recorder.log(max(0, state.global_step - 1), **numbers)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder is not None:
            self.recorder.close()


def experts_per_token(router: nn.Module, parent: nn.Module) -> int | None:
    """Experts a token, where the router or its layer knows: what tells a router from other gates."""
    config = getattr(router, "config", None)
    for owner, name in ((router, "top_k"), (parent, "top_k"), (config, "top_k_experts")):
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 1 if type(router).__name__ == "SwitchTransformersTop1Router" else None


def _bank_size(router: nn.Module) -> int | None:
    """E: the rows of the router's matrix."""
    size = getattr(router, "num_experts", None)
    rows = [p.shape[0] for p in router.parameters() if p.dim() == 2]
    if not rows:
        return None
    return size if isinstance(size, int) and size in rows else rows[0]


def _takes_sigmoids(router: nn.Module) -> bool:
    try:
        source = inspect.getsource(type(router))
    except (OSError, TypeError):
        return False
    return "sigmoid" in source and "softmax" not in source


def _read_triple(router: nn.Module, output: Any, top_k: int) -> Routing:
    """(logits [T, E], weights [T, k], ids [T, k])"""
    if not (isinstance(output, tuple) and len(output) >= 3 and all(isinstance(part, Tensor) for part in output[:3])):
        raise _unknown(router)
    logits, weight, index = output[:3]
    whole = not index.is_floating_point() and index.dtype != torch.bool
    if not whole or logits.dim() != 2 or index.shape != weight.shape or len(index) != len(logits):
        raise _unknown(router)
    return Routing.from_topk(index.long(), weight.detach(), bank_size=logits.shape[1], logits=logits.detach())


def _read_probabilities(router: nn.Module, output: Any, top_k: int) -> Routing:
    """(probabilities [T, E], weights, ids)"""
    routing = _read_triple(router, output, top_k)
    return routing.replace(scores=routing.logits, logits=routing.logits.log())


def _read_logits(router: nn.Module, output: Any, top_k: int) -> Routing:
    """logits [T, E], alone or last"""
    logits = output[-1] if isinstance(output, tuple) else output
    logits = logits.detach()
    weight, index = logits.topk(top_k, dim=-1)
    return Routing.from_topk(index, weight, bank_size=logits.shape[1], logits=logits)


def _read_switch(router: nn.Module, output: Any, top_k: int) -> Routing:
    """(one-hot choice after capacity [B, L, E], probability [B, L, 1], logits [B, L, E])"""
    chosen_TE, weight_T1, logits_TE = (part.detach().flatten(0, 1) for part in output)
    requested = logits_TE.argmax(-1, keepdim=True)
    index = requested.masked_fill(chosen_TE.sum(-1, keepdim=True) == 0, -1)
    return Routing.from_topk(index, weight_T1, bank_size=logits_TE.shape[1], logits=logits_TE, requested=requested)


_READERS: dict[str, Callable[[nn.Module, Any, int], Routing]] = {
    "Llama4Router": _read_logits,
    "DbrxRouter": _read_logits,
    "SwitchTransformersTop1Router": _read_switch,
    "Gemma4TextRouter": _read_probabilities,
    "DiffusionGemmaTextRouter": _read_probabilities,
}


def _unknown(router: nn.Module) -> ValueError:
    return ValueError(
        f"{type(router).__name__} does not return logits, weights and ids: its routing cannot be recorded here"
    )
