"""The routing recorder: what the routers of a model do while it trains, written into the run's folder.

    recorder = Recorder(model, "runs/1")
    ...
    finish_step(model)
    recorder.step(step, loss=loss)                   # after the optimizer step; every rank calls it
    ...
    recorder.close()

It listens to the MoE layers by forward hooks, adds up on their device (``record_sums.py``), and every ``every`` steps
sums over ranks, copies one tensor to the host without waiting for it, and appends a window to the log
(``record_log.py``) from rank 0. What counts:

    a training forward with gradient, once: its recomputation under activation checkpointing does not
    all micro-batches until ``step``, so that a window is of whole optimizer steps
    real tokens that can take a routed expert; padding does not, nor what a rule sends elsewhere
    routed experts: the others have no load

Apart from training, ``probe`` keeps the exact decisions for one frozen batch with labels: training tokens differ from
step to step, so what moves, and what experts are for, can only be seen there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..routers.base import Routing, TokenContext
from . import metrics
from .layer import MoELayerCode, is_recomputing
from .record_log import MARGIN_EDGES, LayerInfo, LogWriter, ProbeInputs, Window
from .record_sums import Bank, RoutingSums

Labels = Sequence[Any] | np.ndarray | Tensor

# what is kept of a probe's inputs: enough for the eye, little in the log
SHOWN_IMAGES, SHOWN_PIXELS = 16, 64
SHOWN_SERIES, SHOWN_POINTS = 8, 1024
SHOWN_TEXTS = 4096


class Recorder:
    """Records the routing of every ``MoELayer`` of a model, from now until ``close``.

    Args:
        model: the model, or the engine's ``module``; before it is compiled, since a compiled graph does not call hooks
            that come later.
        run: the run's folder; the log is ``run/routing``. Where there is one of the same model, it is gone on with.
        every: optimizer steps a window.
        structure_every: optimizer steps between two looks at which experts occur together; 0 = never.
        sample: tokens of a layer and forward whose logits and scores are looked at; 0 = all. Counts are always of all.
        sample_every: optimizer steps between two such looks; the first step of a window has one.
        group: the ranks that share the batch; by default all.

    Raises:
        ValueError: no MoE layer in the model, an option outside its range, a log of another model.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        run: str | Path,
        *,
        every: int = 10,
        structure_every: int = 500,
        sample: int = 256,
        sample_every: int = 10,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        options = {"every": every, "structure_every": structure_every, "sample": sample, "sample_every": sample_every}
        for name, value in options.items():
            least = 1 if name in ("every", "sample_every") else 0
            if value < least:
                raise ValueError(f"{name}={value}: choose at least {least}")
        self.model, self.group = model, group
        self.every, self.structure_every, self.sample_every = every, structure_every, sample_every
        self.modules, self.layers, banks = self._find_layers()
        if not self.modules:
            raise ValueError(f"{type(model).__name__} has no {self._looked_for}: there is no routing to record")
        self.window: Window | None = None
        self._before: Window | None = None
        self._sums = RoutingSums(banks, sample)
        self._scalars: dict[str, list[tuple[int, Any]]] = {}
        self._first: int | None = None
        self._last: int | None = None
        self._started = self._closed = self._paused = False
        self._steps = 0
        self._structure_step: int | None = None
        self._loss_keys: list[tuple[int, str]] | None = None
        self._in_flight: list[_Copy] = []
        self._probed: _Probed | None = None
        self._probe: tuple[Callable[[], Any], Mapping[str, Labels], Tensor | Sequence[str] | None, int] | None = None
        self._log: LogWriter | None = None
        self._ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        error = None
        if self._ranks == 1 or dist.get_rank(group) == 0:
            try:
                self._log = LogWriter(run, self.layers, options | {"ranks": self._ranks})
            except (OSError, ValueError) as raised:
                error = raised
        self._raise_everywhere(error)
        self._hooks = self._listen()
        self._sums.with_structure = structure_every > 0

    _looked_for = "MoELayer"

    def _find_layers(self) -> tuple[list[nn.Module], list[LayerInfo], list[Bank]]:
        modules, layers, banks = [], [], []
        for name, module in self.model.named_modules():
            if not isinstance(module, MoELayerCode):
                continue
            router, kinds = module.router, module.router.expert_kinds
            options = dict(getattr(router, "options", {}))
            top_k = options.get("top_k", getattr(router, "top_k", None))
            # where others compete with the routed ones, how many of these a token has is seen and not told
            told = isinstance(top_k, int | float) and not set(kinds) - {"routed", "local"}
            modules.append(module)
            layers.append(
                LayerInfo(
                    name=name,
                    layer=module.layer,
                    experts=router.num_experts,
                    top_k=float(top_k) if told else math.nan,
                    router=router.name or type(router).__name__,
                    options=_plain(options),
                    kinds=kinds,
                )
            )
            routed = tuple(i for i, kind in enumerate(kinds) if kind == "routed")
            banks.append(Bank(routed, router.bank_size, always="local" not in kinds))
        return modules, layers, banks

    def _listen(self) -> list[Any]:
        return [
            module.register_forward_hook(_Hook(self, layer), with_kwargs=True)
            for layer, module in enumerate(self.modules)
        ]

    def _heard(self, layer: int, module: MoELayerCode, args: tuple, kwargs: dict, output: Any) -> None:
        """A MoE layer's forward has ended."""
        x = args[0] if args else kwargs["x"]
        context = args[1] if len(args) > 1 else kwargs.get("context")
        context = TokenContext.for_tokens(x) if context is None else context
        if self._probed is not None:
            self._probed.add(layer, output[1], context)
        elif not self._paused and module.training and torch.is_grad_enabled() and not is_recomputing():
            self._sums.add(layer, output[1], context.real_T, context.length, counts_E=module.routed_counts_E)

    def step(self, step: int, **scalars: float | Tensor) -> None:
        """Ends optimizer step ``step``, counted from 0. Collective where ``torch.distributed`` is initialised.

        Args:
            scalars: what belongs beside the routing (loss, learning rate), as numbers or tensors of one element, of
                rank 0; a tensor is not waited for.
        """
        self._begin(step)
        if self._last is not None and step <= self._last:
            # gone back: what was recorded from there on is void
            self.flush()
            self._write("start", step)
        self._sums.end_forward()
        self._first = step if self._first is None else self._first
        self._last = step
        self._steps += 1
        self.log(step, **scalars)
        if self._sums.with_structure:
            self._structure_step = step
        self._sums.with_structure = self.structure_every > 0 and self._steps % self.structure_every == 0
        if (step + 1) % self.every == 0:
            self._send()
        else:
            self._sums.look_closely = (step + 1 - self._first) % self.sample_every == 0
        self._receive(wait=False)
        if self._probe is not None and (step + 1) % self._probe[-1] == 0:
            self.run_probe(step + 1)

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """Points of curves, as ``step`` takes them, at any time."""
        if self._log is not None:
            for name, value in scalars.items():
                value = value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
                self._scalars.setdefault(name, []).append((int(step), value))

    def flush(self) -> Window | None:
        """Ends the window where it is, waits for it and writes it; returns the last one, None before the first.
        Collective. Before a checkpoint is saved, so that going on from there loses no step."""
        if self._first is not None:
            self._send()
        self._receive(wait=True)
        return self.window

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside are not counted: training forwards that are no training."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def probe(
        self,
        run: Callable[[], Any],
        *,
        labels: Mapping[str, Labels] | None = None,
        show: Tensor | Sequence[str] | None = None,
        every: int,
    ) -> None:
        """From now on runs a frozen batch every ``every`` steps, and records each layer's exact decisions for it.

        Args:
            run: runs the model on the same data whenever it is called: ``lambda: model(batch)``. It is called in
                evaluation mode, without gradient, and leaves the random state as it was; on every rank, which all give
                it the same data.
            labels: by name one class for each token or sample: numbers or texts. What the context tells is added:
                "token" (ids), "position", or "patch" where there is a grid, and quarters of the "timestep"s' range.
            show: what the tokens were cut from, for the report to draw the first samples with the tokens of an expert
                marked: images [B, C, H, W] with 1 or 3 channels, uint8 or stretched to their range; time series [B, P];
                or texts, one string a token.
        """
        if every < 1:
            raise ValueError(f"every={every}: choose at least 1")
        self._probe = run, labels or {}, show, every

    def run_probe(self, step: int) -> None:
        """Runs the batch of ``probe`` now, after ``step`` optimizer steps: once before the first, and at the end."""
        if self._probe is None:
            raise ValueError("there is no batch to run: give one by recorder.probe(run, labels=..., every=...)")
        run, labels, show, _ = self._probe
        with self.probing(step, labels, show):
            run()

    @contextlib.contextmanager
    def probing(
        self, step: int, labels: Mapping[str, Labels] | None = None, show: Tensor | Sequence[str] | None = None
    ) -> Iterator[None]:
        """Records every forward inside as the probe after ``step`` optimizer steps: in evaluation mode, without
        gradient; the random state and the modules' modes are restored."""
        self._begin(step)
        modes = [(module, module.training) for module in self.model.modules()]
        devices = sorted({p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"})
        self._probed = probed = _Probed(self._sums.banks)
        try:
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                yield
        finally:
            self._probed = None
            for module, mode in modes:
                module.training = mode
        # on every rank, so that what is wrong is so on all
        self._write("probe", step, probed.index(), probed.labels(labels or {}), probed.inputs(show))

    def summary(self) -> dict[str, float]:
        """The last window in at most 20 numbers of stable names, for any logger; {} before the first. Waits for the
        window that is on its way. NaN where a router gives no scores, or nothing was routed."""
        self._receive(wait=True)
        if self.window is None:
            return {}
        per_layer = measures(self.window, self.layers, self._before)

        def over_layers(name: str, how: Callable[[np.ndarray], Any] = np.nanmean) -> float:
            values = per_layer[name]
            return float(how(values)) if not np.isnan(values).all() else math.nan

        return {
            "routing/entropy": over_layers("entropy"),
            "routing/entropy_least": over_layers("entropy", np.nanmin),
            "routing/max_violation": over_layers("max_violation"),
            "routing/max_violation_most": over_layers("max_violation", np.nanmax),
            "routing/dead": over_layers("dead"),
            "routing/dead_most": over_layers("dead", np.nanmax),
            "routing/effective_share": over_layers("effective_share"),
            "routing/dropped": over_layers("dropped"),
            "routing/dropped_most": over_layers("dropped", np.nanmax),
            "routing/load_drift": over_layers("load_drift"),
            "routing/balance": over_layers("balance"),
            "routing/z": over_layers("z"),
            "routing/token_entropy": over_layers("token_entropy"),
            "routing/information": over_layers("information"),
            "routing/information_least": over_layers("information", np.nanmin),
            "routing/top_k_mass": over_layers("top_k_mass"),
            "routing/margin_below_0.1": over_layers("margin_below"),
            "routing/logit_rms_most": over_layers("logit_rms", np.nanmax),
            "routing/experts_per_token": over_layers("active"),
            "routing/tokens": float(self.window.tokens.sum()),
        }

    def close(self, complete: bool = True) -> None:
        """Writes what is left and stops listening. Collective.

        Args:
            complete: whether the run came to its end, which readers are told.
        """
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        self.flush()
        points, tensors = self._take_scalars()
        self._write_scalars(points, [value.item() for value in tensors])
        self._write("close", complete)

    def _raise_everywhere(self, error: Exception | None) -> None:
        """What is wrong on the rank that writes is so on all, or the others would wait for it."""
        if self._ranks == 1 and error is not None:
            raise error
        messages = self._gather(None if error is None else str(error)) if self._ranks > 1 else []
        for message in filter(None, messages):
            raise ValueError(f"{message}: nothing is recorded") from error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # other ranks may not come: what is on its way is lost, what is written is not
            self._closed = True
            for hook in self._hooks:
                hook.remove()
            self._write("close", False)

    def _begin(self, step: int) -> None:
        """The log is told where this process begins, before anything else."""
        if not self._started:
            self._started = True
            self._write("start", step)

    def _send(self) -> None:
        """Sums the window over ranks and starts its way to the host."""
        sums = self._sums
        sums.allocate(self._device())
        sums.reduce()
        parts = list(sums.sums.values())
        keys = self._agreed_losses()
        if keys:
            device = parts[0].device
            losses = torch.zeros(2, len(keys), dtype=torch.float64, device=device)
            mine = [key for key in sums.loss_keys if key in keys]
            if mine == keys and mine == sums.loss_keys:
                losses += sums.losses
            else:
                for key in mine:
                    losses[:, keys.index(key)] += sums.losses[:, sums.loss_keys.index(key)]
            parts.append(losses)
        structure = None
        if self._structure_step is not None:
            sums.allocate_structure(parts[0].device)
            structure, self._structure_step = self._structure_step, None
            parts += sums.structure.values()
        shapes = [part.shape for part in parts]
        flat = torch.cat([part.flatten() for part in parts])
        if self._ranks > 1:
            dist.all_reduce(flat, group=self.group)
        scalars, values = self._take_scalars()
        rows = self._similarity(flat.device) if structure is not None else None
        if rows is not None:
            shapes.append(rows.shape)
            flat = torch.cat([flat, rows.flatten()])
        if values:
            flat = torch.cat([flat, torch.stack([v.to(flat.device, torch.float64) for v in values])])
        span, self._first = (self._first, self._last), None
        self._in_flight.append(_Copy(flat, shapes, list(sums.sums), keys, structure, span, scalars))
        sums.clear()
        sums.structure, sums.look_closely = {}, True

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _agreed_losses(self) -> list[tuple[int, str]]:
        """The losses of a window, in an order that is the same on every rank."""
        keys = sorted(self._sums.loss_keys)
        if self._ranks == 1:
            return keys
        if self._loss_keys is None:
            # once: ranks may not wait for each other at every window
            self._loss_keys = sorted({tuple(key) for other in self._gather(keys) for key in other})
        elif new := set(keys) - set(self._loss_keys):
            warnings.warn(f"losses that began after the first window are not recorded: {sorted(new)}", stacklevel=4)
        return self._loss_keys

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _similarity(self, device: torch.device) -> Tensor | None:
        """[L, E, E] cosines between the router's rows, NaN for a layer that has none here."""
        if self._log is None:
            return None
        experts = self._sums.experts
        cosines = torch.full((len(self.modules), experts, experts), torch.nan, dtype=torch.float64, device=device)
        for layer, bank in enumerate(self._sums.banks):
            rows = self._router_rows(layer, bank)
            if rows is not None:
                own = len(bank.routed)
                cosines[layer] = 0
                cosines[layer, :own, :own] = metrics.cosines(rows.detach()).to(device)
        return cosines

    def _router_rows(self, layer: int, bank: Bank) -> Tensor | None:
        """The one vector that a router has for each routed expert, where it has one."""
        for parameter in self._router(layer).parameters(recurse=False):
            if parameter.dim() == 2 and parameter.shape[0] in (len(bank.routed), bank.size) and parameter.shape[1] > 1:
                return parameter if len(parameter) == len(bank.routed) else bank.columns(parameter.T).T
        return None

    def _router(self, layer: int) -> nn.Module:
        return self.modules[layer].router

    def _receive(self, wait: bool) -> None:
        """Writes the windows that have come to the host."""
        while self._in_flight and (wait or self._in_flight[0].arrived()):
            copy = self._in_flight.pop(0)
            values = copy.values()
            window = copy.window(values, len(self.modules), self._sums.experts)
            self._before, self.window = self.window, window
            self._write("window", window)
            self._write_scalars(copy.scalars, values[copy.size :].tolist())
            if copy.structure is not None:
                self._write_structure(copy, values)

    def _write_structure(self, copy: _Copy, values: np.ndarray) -> None:
        if self._log is not None:
            parts = copy.parts(values)
            *_, coactivation, flow, similarity = parts
            self._write("structure", copy.structure, _whole(coactivation), _whole(flow), similarity)

    def _take_scalars(self) -> tuple[dict[str, list[tuple[int, float | None]]], list[Tensor]]:
        """The points so far, None in place of tensors, and these in order."""
        points, tensors = {}, []
        for name, values in self._scalars.items():
            points[name] = [(step, None if isinstance(value, Tensor) else value) for step, value in values]
            tensors += [value for _, value in values if isinstance(value, Tensor)]
        self._scalars = {}
        return points, tensors

    def _write_scalars(self, points: dict[str, list[tuple[int, float | None]]], values: list[float]) -> None:
        came = iter(values)
        curves = {
            name: ([step for step, _ in curve], [next(came) if value is None else value for _, value in curve])
            for name, curve in points.items()
        }
        if curves:
            self._write("scalars", curves)

    def _write(self, what: str, *content: Any) -> None:
        """Into the log. A full disk ends the recording and not the training."""
        if self._log is None:
            return
        try:
            getattr(self._log, what)(*content)
        except OSError as error:
            self._log = None
            warnings.warn(f"the routing is not recorded any more: {error}", stacklevel=3)


class _Hook:
    """What a layer's forward calls. It hears no layer of a copied model, and a pickled model does not have it."""

    def __init__(self, recorder: Recorder, layer: int) -> None:
        self.recorder, self.layer = recorder, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.recorder.modules[self.layer] is module:
            self.recorder._heard(self.layer, module, args, kwargs, output)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self

    def __reduce__(self) -> tuple:
        return _NoHook, ()


class _NoHook:
    def __call__(self, *_: Any) -> None:
        return None


class _Copy:
    """A window on its way to the host."""

    def __init__(
        self,
        flat: Tensor,
        shapes: list[torch.Size],
        names: list[str],
        losses: list[tuple[int, str]],
        structure: int | None,
        span: tuple[int, int],
        scalars: dict[str, list[tuple[int, float | None]]],
    ) -> None:
        self.shapes, self.names, self.losses, self.structure, self.span = shapes, names, losses, structure, span
        self.scalars = scalars
        self.size = sum(shape.numel() for shape in shapes)
        self._event = None
        self._host = flat
        if flat.device.type == "cuda":
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flat.device))

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def values(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu().numpy()

    def parts(self, values: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([shape.numel() for shape in self.shapes])
        return [
            part.reshape(shape)
            for part, shape in zip(np.split(values[: self.size], ends[:-1]), self.shapes, strict=True)
        ]

    def window(self, values: np.ndarray, layers: int, experts: int) -> Window:
        parts = self.parts(values)
        window = Window.zeros(*self.span, layers, experts)
        sums = dict(zip(self.names, parts, strict=False))
        sums["requested"] = sums["counts"] + sums.pop("dropped")
        for name, part in sums.items():
            setattr(window, name, _whole(part) if getattr(window, name).dtype.kind == "i" else part.copy())
        if self.losses:
            total, number = parts[len(self.names)]
            for place, (layer, name) in enumerate(self.losses):
                row = window.losses.setdefault(name, np.full(layers, np.nan))
                if number[place]:
                    row[layer] = total[place] / number[place]
        return window


class _Probed:
    """The decisions of the forwards of one probe."""

    def __init__(self, banks: list[Bank]) -> None:
        self.banks = banks
        self._ids: list[list[Tensor]] = [[] for _ in banks]
        self._shapes: list[tuple[int, int]] = []
        self._context: dict[str, list[Tensor]] = {}
        self._grid: tuple[int, int] | None = None

    def add(self, layer: int, routing: Routing, context: TokenContext) -> None:
        self._ids[layer].append(_ranked_ids(routing, self.banks[layer], context.real_T).cpu())
        if layer == 0:
            shape = context.batch_size, context.length
            self._shapes.append(shape)
            self._grid = context.grid
            position = torch.arange(context.length).expand(shape).flatten()
            self._context.setdefault("patch" if context.grid else "position", []).append(position)
            if context.token_ids is not None:
                self._context.setdefault("token", []).append(context.token_ids.flatten().cpu())
            if context.timestep is not None:
                timestep = context.timestep.detach().float().cpu().repeat_interleave(context.length)
                self._context.setdefault("timestep", []).append(timestep)

    def index(self) -> list[np.ndarray]:
        """[N, K] a layer, the forwards one after the other."""
        joined = []
        for ids in self._ids:
            width = max((part.shape[1] for part in ids), default=0)
            wide = [nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in ids]
            joined.append((torch.cat(wide) if wide else torch.zeros(0, 0)).numpy().astype(np.int16))
        return joined

    def labels(self, given: Mapping[str, Labels]) -> dict[str, tuple[np.ndarray, list[str]]]:
        """One class a token, and the classes' names.

        Raises:
            ValueError: as many labels as there are neither tokens nor samples.
        """
        tokens = sum(batch * length for batch, length in self._shapes)
        samples = sum(batch for batch, _ in self._shapes)
        lengths = np.array([length for batch, length in self._shapes for _ in range(batch)], dtype=np.int64)
        labels = {}
        for name, values in given.items():
            values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
            values = values.reshape(-1)
            if len(values) not in (tokens, samples):
                raise ValueError(
                    f"the probe's label {name!r} has {len(values)} entries: give one for each of the {samples} samples "
                    f"or {tokens} tokens"
                )
            labels[name] = _classes(values if len(values) == tokens else np.repeat(values, lengths))
        for name, values in self._context.items():
            joined = torch.cat(values).numpy()
            if name == "patch" and self._grid is not None:
                names = [
                    f"row {row}, column {column}" for row in range(self._grid[0]) for column in range(self._grid[1])
                ]
                labels.setdefault(name, (joined.astype(np.int32), names))
            elif name == "timestep":
                labels.setdefault(name, _quarters(joined))
            else:
                labels.setdefault(name, (joined.astype(np.int32), []))
        return labels

    def inputs(self, show: Tensor | Sequence[str] | None) -> ProbeInputs | None:
        """The first samples of what the tokens were cut from.

        Raises:
            ValueError: it is none of the three kinds, or not of as many samples or tokens as were run.
        """
        if show is None:
            return None
        lengths = [length for batch, length in self._shapes for _ in range(batch)]
        if not isinstance(show, Tensor):
            texts = [str(text) for text in show]
            if len(texts) != sum(lengths):
                raise ValueError(f"show has {len(texts)} texts: give one for each of the {sum(lengths)} tokens")
            ends = np.cumsum(lengths)
            number = max(1, int(np.searchsorted(ends, SHOWN_TEXTS, side="right")))
            return ProbeInputs("texts", lengths[:number], texts[: sum(lengths[:number])])
        images = show.dim() == 4 and show.shape[1] in (1, 3)
        if not images and show.dim() != 2:
            raise ValueError(
                f"show has shape {tuple(show.shape)}: give images [B, 1 or 3, H, W], series [B, P], or one text a token"
            )
        if len(show) != len(lengths):
            raise ValueError(f"show has {len(show)} samples: give each of the {len(lengths)} that were run")
        if images and self._grid is None:
            raise ValueError("images are shown by patch, and the context has no grid: set TokenContext.grid")
        show = show.detach().cpu()
        shown = show[: SHOWN_IMAGES if images else SHOWN_SERIES].float()
        if not images:
            points = min(shown.shape[1], SHOWN_POINTS)
            values = nn.functional.adaptive_avg_pool1d(shown[:, None], points)[:, 0]
            return ProbeInputs("series", lengths[: len(shown)], values.numpy())
        if show.dtype != torch.uint8:
            low, high = shown.min(), shown.max()
            shown = (shown - low) / (high - low).clamp(min=torch.finfo(shown.dtype).tiny) * 255
        scale = min(1.0, SHOWN_PIXELS / max(shown.shape[2:]))
        size = [max(1, round(scale * side)) for side in shown.shape[2:]]
        pixels = nn.functional.adaptive_avg_pool2d(shown, size).round().to(torch.uint8)
        return ProbeInputs("images", lengths[: len(shown)], pixels.permute(0, 2, 3, 1).contiguous().numpy(), self._grid)


def _ranked_ids(routing: Routing, bank: Bank, real_T: Tensor | None) -> Tensor:
    """The routed experts of each token, numbered 0 to E - 1, by falling weight; -1 fills up. [T, K]"""
    if routing.dispatch is not None:
        return torch.zeros(routing.num_tokens, 0, dtype=torch.int64)
    if routing.selected is not None:
        routing = Routing.from_mask(
            routing.selected, routing.scores if routing.scores is not None else routing.selected
        )
    index, weight = routing.as_topk()
    place = torch.full((bank.size + 1,), -1, device=index.device)
    place[list(bank.routed)] = torch.arange(len(bank.routed), device=index.device)
    ids = place[index]  # -1 is the last entry
    if real_T is not None:
        ids = ids.masked_fill(~real_T[:, None], -1)
    order = weight.detach().double().masked_fill(ids < 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order)


def _classes(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers as they are; texts numbered, and their names."""
    if values.dtype.kind in "iub":
        return values.astype(np.int32), []
    names, places = np.unique(values.astype(str), return_inverse=True)
    return places.astype(np.int32), names.tolist()


def _quarters(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which quarter of their range numbers lie in, and what the quarters are called."""
    edges = np.linspace(values.min(), values.max(), 5)
    names = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges.tolist())]
    return np.searchsorted(edges[1:-1], values, side="right").astype(np.int32), names


def measures(window: Window, layers: Sequence[LayerInfo], before: Window | None = None) -> dict[str, np.ndarray]:
    """The measures of a window that tell how routing goes: by name one number a layer, [L]; NaN = not known.

    Args:
        before: the window that ``load_drift`` compares with.
    """
    rows = []
    for place, layer in enumerate(layers):
        own = slice(0, layer.experts)
        counts, requested, scores = (array[place, own] for array in (window.counts, window.requested, window.score_sum))
        tokens, sampled = window.tokens[place], window.sampled[place]
        seen = float(metrics.mean_active(requested, tokens)) if tokens else math.nan
        top_k = layer.top_k if not math.isnan(layer.top_k) else min(seen, layer.experts)
        rows.append(
            {
                "entropy": metrics.collapse_aware_entropy(counts, 1.0 if math.isnan(top_k) else top_k),
                "effective_share": metrics.effective_experts(counts) / layer.experts,
                "max_violation": metrics.max_violation(counts),
                "min_violation": metrics.min_violation(counts),
                "variation": metrics.coefficient_of_variation(counts),
                "dead": metrics.dead_fraction(counts),
                "dropped": metrics.drop_rate(counts, requested),
                "load_drift": math.nan if before is None else metrics.load_drift(counts, before.counts[place, own]),
                "active": metrics.mean_active(counts, tokens),
                "balance": metrics.score_balance(requested, scores),
                "token_entropy": metrics.token_entropy(window.entropy_sum[place], sampled, layer.experts),
                "information": metrics.routing_information(scores, window.entropy_sum[place], sampled),
                "top_k_mass": metrics.top_k_mass(window.mass_sum[place], sampled),
                "margin_below": metrics.margin_below(window.margin_histogram[place], MARGIN_EDGES, 0.1),
                "logit_rms": metrics.logit_rms(window.logit_square_sum[place], sampled),
                "z": metrics.z_loss(window.z_sum[place], sampled),
            }
        )
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def _whole(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int64)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them."""
    simple = (str, int, float, bool, type(None), list, tuple, dict)
    return {name: value if isinstance(value, simple) else repr(value) for name, value in options.items()}
