"""A forward through a checkpoint that does not fit: one decoder layer's weights in memory at a time.

    model = LayerwiseModel.open(folder)
    for place in model.run(list_of_ids):          # after each layer
        ...

The model's own forward runs, unchanged, once for each sequence, in a thread of its own; where it calls a decoder layer
the thread waits. When all of them wait for the same layer, that layer's weights are read from the shards, each sequence
goes through it, one after the other, in the thread that called ``run``, and the weights are let go. So masks, position
embeddings and whatever a family hands its layers are what the family computes, and the numbers are those of the whole
model: the same operations on the same values.

Weights are loaded by transformers' own conversion (stacked experts, renamed keys, dequantised FP8 and MXFP4), a layer's
keys at a time. In memory at once: what belongs to no layer (embeddings, last norm), one layer, and of each sequence its
hidden states [T, D] with its masks.
"""

from __future__ import annotations

import dataclasses
import queue
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import core_model_loading

from .checkpoint import Checkpoint
from .loading import DEQUANTISED, checkpoint_folder, load_config, loading_options, model_class, quantisation, quiet
from .model import moe_blocks


class LayerwiseModel:
    """A model of which only what is outside the decoder layers stays loaded.

    Attributes:
        model: of transformers; its layers' parameters are on the meta device except while they run.
        layers: the decoder layers, in order.
        outputs: of the last ``run``: what the model without its head gave for each sequence.
    """

    def __init__(
        self, model: nn.Module, *, stack: str, load_config: Any, files: Mapping[str, Path], device: torch.device
    ) -> None:
        self.model, self.device = model, device
        self.outputs: list[Any] = []
        self.layers = list(model.get_submodule(stack))
        self._stack, self._load_config = stack, load_config
        self._keys = _keys_by_layer(model, stack, load_config, files)
        self._files = files

    @classmethod
    def open(cls, folder: str | Path, *, dtype: str = "auto", device: str | torch.device = "cpu") -> LayerwiseModel:
        """Builds the model and loads what is outside its layers.

        Raises:
            ValueError: it cannot be run layer by layer; with the family's name and the reason.
        """
        folder = checkpoint_folder(folder)
        config = load_config(folder)
        kind = config.model_type
        method = quantisation(config).get("quant_method")
        if method is not None and method not in DEQUANTISED:
            raise ValueError(
                f'{kind}: weights quantised by "{method}" cannot be loaded layer by layer '
                f"(only {' and '.join(DEQUANTISED)} can): collect from the checkpoint before quantisation"
            )
        plain = model_class(config)
        Checkpoint.open(folder)  # says what is wrong with its files
        kept: dict[str, Any] = {}

        def defer(model, state_dict, checkpoint_files, load_config, expected_keys=None):
            files = _files_by_key(checkpoint_files)
            stack = _stack_of(model, kind)
            load_config = dataclasses.replace(load_config, device_map={"": device})
            kept.update(stack=stack, load_config=load_config, files=files)
            outside = _keys_by_layer(model, stack, load_config, files)[None]
            info = _load(model, load_config, files, outside)
            # what is in the layers comes later; transformers is not to draw it anew
            info.missing_keys = {key for key in info.missing_keys if not key.startswith(f"{stack}.")}
            return info, None

        deferred = type(plain.__name__, (plain,), {"_load_pretrained_model": staticmethod(defer)})
        deferred.__module__ = plain.__module__
        try:
            with quiet():
                model = deferred.from_pretrained(folder, **loading_options(config, dtype))
        except (ImportError, OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"{folder} cannot be loaded layer by layer: {error}") from None
        _move(model, torch.device(device))
        return cls(model.eval(), device=torch.device(device), **kept)

    def run(self, sequences: Sequence[Sequence[int]]) -> Iterator[int]:
        """Takes all sequences through one layer after the other; hooks see them in order, layer by layer.

        Yields:
            the layer's index, while its weights are there.

        Raises:
            ValueError: the model does not call its layers one by one, each once.
        """
        if not sequences:
            return
        walks = [_Walk(self.model, sequence, self.device) for sequence in sequences]
        classes = [type(layer) for layer in self.layers]
        try:
            for layer, kind in zip(self.layers, classes, strict=True):
                layer.__class__ = type(
                    kind.__name__, (kind,), {"__call__": _waiting_call, "__module__": kind.__module__}
                )
            for walk in walks:
                walk.start()
            for place, layer in enumerate(self.layers):
                self._load_layer(place)
                for walk in walks:
                    walk.step(layer, classes[place], place)
                yield place
                self._free_layer(place)
            self.outputs = [walk.finish() for walk in walks]
        finally:
            for layer, kind in zip(self.layers, classes, strict=True):
                layer.__class__ = kind
            for walk in walks:
                walk.stop()
            for place in range(len(self.layers)):
                self._free_layer(place)

    def _load_layer(self, place: int) -> None:
        info = _load(self.model, self._load_config, self._files, self._keys[place])
        prefix = f"{self._stack}.{place}."
        wanted = {f"{prefix}{name}" for name in self.layers[place].state_dict()}
        ignored = self.model._keys_to_ignore_on_load_missing or []
        missing = sorted(
            key for key in wanted & set(info.missing_keys) if not any(re.search(pattern, key) for pattern in ignored)
        )
        wrong = missing or sorted(str(key) for key in info.mismatched_keys) or list(info.conversion_errors.values())
        if wrong:
            raise ValueError(f"layer {place} cannot be loaded from the checkpoint: {wrong[0]}")

    def _free_layer(self, place: int) -> None:
        stored = set(self.layers[place].state_dict())
        for path, module in self.layers[place].named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta and prefix + name in stored:
                    module._buffers[name] = torch.empty_like(buffer, device="meta")


class _Walk:
    """One sequence's forward: a thread that waits at each decoder layer until it is told the layer's output."""

    def __init__(self, model: nn.Module, ids: Sequence[int], device: torch.device) -> None:
        self._model, self._ids, self._device = model, ids, device
        self._asks: queue.SimpleQueue = queue.SimpleQueue()  # (layer, args, kwargs), or what ended the forward
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._call: Any = None
        self._output: Any = None

    def start(self) -> None:
        """Runs to the first layer. One forward moves at a time: they share the model."""
        self._thread.start()
        self._call = self._asks.get()

    def step(self, layer: nn.Module, kind: type, place: int) -> None:
        self._check(layer, place)
        _, args, kwargs = self._call
        with torch.no_grad():
            output = kind.__call__(layer, *args, **kwargs)
        self._call = None
        self._answers.put(output)
        self._call = self._asks.get()

    def finish(self) -> Any:
        """The forward's result."""
        self._check(None, -1)
        self._thread.join()
        return self._output

    def stop(self) -> None:
        """Ends the thread wherever it waits."""
        if self._thread.is_alive():
            self._answers.put(_Stop)
            self._thread.join()

    def _check(self, layer: nn.Module | None, place: int) -> None:
        if isinstance(self._call, BaseException):
            raise self._call
        called = self._call[0] if self._call is not None else None
        if called is not layer:
            where = "ends" if called is None else "calls another layer"
            expected = f"layer {place} is next" if layer is not None else "all layers are done"
            raise ValueError(
                f"{type(self._model).__name__}: its forward {where} where {expected}: it does not go through its "
                "layers one by one, each once, and cannot be run layer by layer"
            )

    def _forward(self) -> None:
        _current.walk = self
        try:
            with torch.no_grad():
                ids = torch.tensor([list(self._ids)], device=self._device)
                self._output = backbone(self._model)(ids, use_cache=False)
            self._asks.put(None)
        except _Stop:
            pass
        except BaseException as error:
            self._asks.put(error)

    def ask(self, layer: nn.Module, args: tuple, kwargs: dict) -> Any:
        self._asks.put((layer, args, kwargs))
        answer = self._answers.get()
        if answer is _Stop:
            raise _Stop
        return answer


class _Stop(BaseException):
    """Unwinds a forward that is no longer wanted."""


_current = threading.local()


def _waiting_call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _current.walk.ask(layer, args, kwargs)


def _move(model: nn.Module, device: torch.device) -> None:
    """What is loaded goes to the device; ``Module.to`` refuses a model that is partly on the meta device."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head: no logits of a long sequence over a whole vocabulary are made."""
    base = model.base_model
    if base is not model:
        return base
    # Llama 4's classes name a base that they do not have
    inner = getattr(model, "model", None) or getattr(model, "language_model", None)
    return model if inner is None else backbone(inner)


def _stack_of(model: nn.Module, kind: str) -> str:
    """The name of the list that the decoder layers are in.

    Raises:
        ValueError: there is no such one list.
    """
    stacks = {name.rpartition(f".{block.layer}.")[0] for block in moe_blocks(model) for name in [f"{block.name}."]}
    stack = next(iter(stacks))
    if len(stacks) != 1 or not isinstance(model.get_submodule(stack), nn.ModuleList):
        raise ValueError(
            f"{kind}: its decoder layers are not in one list ({', '.join(sorted(stacks))}): it cannot be run layer by "
            "layer"
        )
    tied = [key for key in model.all_tied_weights_keys if key.startswith(f"{stack}.")]
    if tied:
        raise ValueError(
            f"{kind}: {tied[0]} is tied to another layer's weights, so one layer cannot be loaded without others"
        )
    return stack


def _files_by_key(checkpoint_files: Sequence[str] | None) -> dict[str, Path]:
    files = {}
    for file in checkpoint_files or []:
        with safetensors.safe_open(file, framework="pt") as stream:
            files |= dict.fromkeys(stream.keys(), Path(file))
    return files


def _keys_by_layer(
    model: nn.Module, stack: str, load_config: Any, files: Mapping[str, Path]
) -> dict[int | None, list[str]]:
    """The checkpoint's keys of each layer; under None those of no layer."""
    transforms = load_config.weight_mapping or []
    renamings = [entry for entry in transforms if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, core_model_loading.WeightConverter)]
    state = model.state_dict()
    keys: dict[int | None, list[str]] = {None: [], **{place: [] for place in range(len(model.get_submodule(stack)))}}
    for key in files:
        renamed, _ = core_model_loading.rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        place = None
        if renamed.startswith(f"{stack}."):
            place = int(renamed[len(stack) + 1 :].partition(".")[0])
        keys.setdefault(place, []).append(key)  # layers that the model does not build (multi-token prediction) too
    return keys


def _load(model: nn.Module, load_config: Any, files: Mapping[str, Path], keys: Sequence[str]) -> Any:
    streams: dict[Path, Any] = {}
    try:
        slices: dict[str, Tensor] = {}
        for key in keys:
            if files[key] not in streams:
                streams[files[key]] = safetensors.safe_open(files[key], framework="pt").__enter__()
            slices[key] = streams[files[key]].get_slice(key)
        with quiet():
            info, _ = core_model_loading.convert_and_load_state_dict_in_model(
                model=model, state_dict=slices, load_config=load_config
            )
        return info
    finally:
        for stream in streams.values():
            stream.__exit__(None, None, None)
