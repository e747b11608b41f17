"""Pruning of our own runs and exports: models with ``MoELayer``s, of any router that can be restricted.

    statistics = collect("runs/promoe_dit-1", [("demos.jsonl", None)])
    plan = make_plan(statistics, keep=0.5)
    apply(plan, "runs/promoe_dit-1", "threes")          an export like any other, and pruning_plan.json in it
    evaluate("runs/promoe_dit-1", {"easy-ep": plan})    {"full": {"0": 0.21, ...}, "easy-ep": {...}}

Layers may keep different numbers of experts. Policy "slice" makes tokens choose anew among the kept ones; policy
"keep-rows", which only this library's layers can run, leaves the routers whole, and a token that goes to a removed
expert gets nothing there ("no-reroute"; arXiv 2504.06792, appendix F.3). Only routed experts count: local (ProMoE's
unconditional one), zero, copy, constant and shared ones are never scored and never removed.

For a token t with residual stream ``h`` before the norm of the branch, and what the model really adds to it,

    h' = h + f * (sum_i w_i E_i(x) + shared(x))       f: the branch's factor; adaLN's gate in a DiT, else 1
    u_i = f * E_i(x)      g_i = |w_i|      r = sum_i w_i u_i      c_i = g_i |u_i|      s = max(0, 1 - cos(h, h + r))

so that c_i is the length of expert i's real summand. In a diffusion transformer f is a vector for each image and time:
taking it into u makes a token count by what reaches its residual stream. Weights may be negative there (ProMoE's are
cosines), hence |w_i|. Local experts are left out of r, as shared ones are.

What a demonstration is, how a run's losses are taken and how its configuration says how many experts there are is the
kind of model's to say: a class like ``Subject``, in ``KINDS`` or of the entry-point group ``gatewright.prune``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...moe import moe_layers
from ...moe.layer import MoELayerCode
from ...routers import Routing
from ..export import check_free, write_export
from ..runs import Run
from ..weights import CONFIG, WEIGHTS, Source, differences, load_model, read_description, read_weights
from .plan import Plan
from .restriction import masked, other_options, restrict
from .statistics import STANDARD, DomainStatistics, Statistics, exponents

KINDS = {"dit": "gatewright.recipes.models.dit_pruning:DiTSubject"}
ENTRY_POINTS = "gatewright.prune"
PLAN_FILE = "pruning_plan.json"
KEEP_ROWS = "keep-rows"
POLICIES = ("slice", "slice-equal-groups", KEEP_ROWS)
FULL = "full"


class Branch(NamedTuple):
    """Where a MoE layer stands in its block.

    Attributes:
        norm: the module whose input is h.
        gate: a module of which ``factor`` makes f, and that runs before the layer in every forward; None where f is 1.
        factor: its output -> f, [B, D] or a number.
    """

    norm: nn.Module
    gate: nn.Module | None = None
    factor: Callable[[Any], Tensor] | None = None


class Subject(Protocol):
    """A run's model with what its kind knows: constructed as ``Subject(model, run)``."""

    def branch(self, layer: MoELayerCode) -> Branch:
        """Where the layer stands."""

    def read_demo(self, record: Mapping[str, Any], where: str) -> Any:
        """A demonstration out of a line of JSON, checked, ``domain`` taken out.

        Raises:
            ValueError: it is none, with ``where``.
        """

    def run_demo(self, demo: Any) -> int:
        """One forward without gradient, all MoE layers included; returns how many tokens it had."""

    def losses(self, classes: Sequence[int] | None = None) -> dict[str, float]:
        """Held-out loss by what the run tells apart (classes), always of the same draws."""

    def answer(self) -> Tensor:
        """What the model answers to a fixed input: equal bits where the model is equal."""

    @staticmethod
    def resized(
        config: Mapping[str, Any],
        keep: Sequence[Sequence[int]],
        *,
        reroute: bool,
        router_options: Mapping[str, Any],
        top_k: float | None,
    ) -> dict[str, Any]:
        """The configuration whose MoE layers have the kept experts alone.

        Args:
            keep: of each MoE layer.
            reroute: the routers have the kept experts alone, too; otherwise they are as before (``leave_out``).
            router_options: what changes besides; ``top_k`` None as before.
        """


def subject_class(run: Run) -> type:
    """
    Raises:
        ValueError: nobody knows how to prune models of this kind.
    """
    offered = KINDS | {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if run.model not in offered:
        known = ", ".join(sorted(offered))
        raise ValueError(
            f'a model "{run.model}" cannot be pruned: nobody says what its demonstrations are. Known: {known}'
        )
    module, _, name = offered[run.model].partition(":")
    return getattr(importlib.import_module(module), name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A run or export, opened for pruning."""

    folder: Path
    model: nn.Module
    run: Run
    source: Source
    state: Mapping[str, Tensor]

    @property
    def subject(self) -> Subject:
        return subject_class(self.run)(self.model, self.run)

    @property
    def layers(self) -> list[MoELayerCode]:
        return moe_layers(self.model)

    def describe(self) -> dict[str, Any]:
        """What statistics and plans say about the model."""
        router = self.layers[0].router
        top_k = max((getattr(layer.router, "top_k", None) or 1 for layer in self.layers), default=1)
        shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in self.state.items()}
        experts = [layer.router.num_experts for layer in self.layers]
        return {
            "model_type": f"gatewright/{self.run.model}",
            "name": self.folder.name,
            "config_sha256": _sha256(self.run.config),
            # of which weights and step, too: another run of the same sizes is another model
            "header_hash": _sha256([shapes, *self.source, self.run.options.get("seed")]),
            "num_experts": max(experts),
            "top_k": top_k,
            "num_groups": getattr(router, "num_groups", 1),
            "topk_group": getattr(router, "top_groups", 1),
            "layers": [layer.layer for layer in self.layers],
            "experts_per_layer": experts,
        }


def open_run(folder: str | Path, *, weights: str | None = None, device: str = "cpu") -> Opened:
    """
    Args:
        folder: a run or an export.
        weights: "ema" or "model", see ``tools.weights.load_model``.

    Raises:
        FileNotFoundError, ValueError: it cannot be opened, has no experts, or is of a kind that cannot be pruned.
    """
    state, run, source = read_weights(folder, weights=weights)
    subject_class(run)
    model = run.make_model()
    model.load_state_dict(state)
    _check_whole(moe_layers(model), folder)
    model = model.to(device).eval()
    return Opened(folder=Path(folder), model=model, run=run, source=source, state=state)


def collect(
    folder: str | Path,
    files: Sequence[tuple[Path, str | None]],
    *,
    weights: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Statistics:
    """One pass over demonstrations of one or more domains.

    Args:
        folder: a run or an export.
        files: (demos.jsonl, domain): without a domain, each line's ``domain`` or else the file's name.
        weights: which of a run's.
        progress: show a bar on stderr.

    Raises:
        FileNotFoundError, ValueError: a folder or file that cannot be read, or a line that is no demonstration of this
            kind of model: nothing is run before all lines are checked.
    """
    opened = open_run(folder, weights=weights, device=device)
    subject = opened.subject
    demos = [
        (domain, subject.read_demo(record, where))
        for file, own in files
        for domain, record, where in _read_lines(Path(file), own)
    ]
    return collect_from(opened, demos, progress=progress)


def collect_from(opened: Opened, demos: Sequence[tuple[str, Any]], *, progress: bool = False) -> Statistics:
    """As ``collect``, of (domain, demonstration)s that were read."""
    if not demos:
        raise ValueError("no demonstrations: give at least one")
    subject, parts, bar = opened.subject, {}, demos
    if progress:
        from tqdm import tqdm

        bar = tqdm(demos, desc="demonstrations", unit="demo")
    description = opened.describe()
    shape = (len(description["layers"]), description["num_experts"])
    with torch.inference_mode(), _listening(opened, subject) as listeners:
        for domain, demo in bar:
            for listener in listeners:
                listener.clear()
            tokens = subject.run_demo(demo)
            sums = {name: np.zeros(shape) for name in STANDARD}
            max_norm = np.zeros(shape)
            for row, listener in enumerate(listeners):
                for name in STANDARD:
                    sums[name][row, : listener.experts] = listener.sums[name]
                max_norm[row, : listener.experts] = listener.max_norm
            parts.setdefault(domain, []).append(DomainStatistics.of_demo(sums, max_norm, tokens))
    return Statistics(
        model=description,
        options={"token_weight": "residual", "per_demo": "sum", "over": "all", "weights": opened.source.weights},
        domains={domain: DomainStatistics.total(own) for domain, own in parts.items()},
        weights={"aimer": _aimer(opened, shape)},
    )


def evaluate(
    folder: str | Path,
    plans: Mapping[str, Plan] | None = None,
    *,
    classes: Sequence[int] | None = None,
    mode: str | None = None,
    weights: str | None = None,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Held-out losses of the full model and, by mask, of it under each plan; nothing is written.

    Args:
        folder: a run or an export.
        plans: by name.
        classes: which of the run's; None = all.
        mode: "reroute" or "no-reroute"; None = what each plan's policy says.

    Returns:
        {"full": {class: loss}, name of the plan: {class: loss}}
    """
    opened = open_run(folder, weights=weights, device=device)
    for plan in (plans or {}).values():
        check_plan(plan, opened)
    subject = opened.subject
    found = {FULL: subject.losses(classes)}
    for name, plan in (plans or {}).items():
        with masked_by(opened.model, plan, mode):
            found[name] = subject.losses(classes)
    return found


def loss_table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The lines of what ``evaluate`` returned: a row a class, a column the full model and each plan."""
    width = max(len(name) for name in found)
    lines = ["  ".join([f"{'class':>8}", *(f"{name:>{width}}" for name in found)])]
    for label in found[FULL]:
        lines.append("  ".join([f"{label:>8}", *(f"{losses[label]:{width}.4f}" for losses in found.values())]))
    means = (sum(losses.values()) / len(losses) for losses in found.values())
    return [*lines, "  ".join([f"{'mean':>8}", *(f"{mean:{width}.4f}" for mean in means)])]


def size_table(sizes: Mapping[str, Any]) -> list[str]:
    """The lines of what ``inspect`` and ``dry_run`` return."""
    lines = [
        f"layer {layer}: router {about['router']}, {about['experts']} routed experts, {about['kept']} kept"
        for layer, about in sizes["layers"].items()
    ]
    for what, unit, scale in (("parameters", "M", 1e6), ("bytes", "MB", 1e6)):
        before, after = sizes[f"{what}_before"], sizes[f"{what}_after"]
        lines.append(f"{what}: {before / scale:.2f} {unit} -> {after / scale:.2f} {unit} ({after / before:.0%})")
    return lines


def masked_by(model: nn.Module, plan: Plan, mode: str | None = None):
    """``restriction.masked`` with what a plan says; by default in the mode that its policy makes files of."""
    mode = mode or ("no-reroute" if plan.policy == KEEP_ROWS else "reroute")
    if plan.policy == KEEP_ROWS and mode == "reroute":
        raise ValueError(f'policy "{KEEP_ROWS}" of a run sends no token elsewhere: measure it in mode "no-reroute"')
    return masked(model, plan.keep, mode, **_changes(plan))


def apply(plan: Plan, folder: str | Path, out: str | Path, *, weights: str | None = None) -> None:
    """Writes the pruned model as an export: bank rows and router rows sliced, the configuration's counts changed.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be opened, the plan is of another model, ``out`` holds
            something, or a router cannot be restricted; nothing is written.
        OSError: ``out`` cannot be written; nothing stays of it.
    """
    out, folder = Path(out), Path(folder)
    check_free(out)
    opened = open_run(folder, weights=weights)
    check_plan(plan, opened)
    state, run = pruned(opened, plan)
    write_export(out, state, run, opened.source, notes={PLAN_FILE: plan.text()})


def pruned(opened: Opened, plan: Plan) -> tuple[dict[str, Tensor], Run]:
    """The pruned state dict, and what rebuilds its model.

    Raises:
        ValueError: a router that cannot be restricted, or layers whose routers would need different options.
    """
    state, options, changes = dict(opened.state), [], _changes(plan)
    for name, layer in opened.model.named_modules():
        if not isinstance(layer, MoELayerCode):
            continue
        prefix, keep = f"{name}." if name else "", plan.keep[layer.layer]
        rows = torch.tensor(keep)
        for entry in ("w1", "w2", "w3"):
            state[f"{prefix}experts.{entry}"] = state[f"{prefix}experts.{entry}"].index_select(0, rows)
        if plan.policy == KEEP_ROWS:
            continue
        try:
            small = restrict(layer.router, keep, **changes)
        except ValueError as error:
            raise ValueError(f"layer {layer.layer}: {error}") from None
        for entry, tensor in small.state_dict().items():
            state[f"{prefix}router.{entry}"] = tensor.cpu()
        options.append({**other_options(layer.router, **changes), "top_k": None})
    if any(other != options[0] for other in options):
        raise ValueError(f"the layers' routers would need different options, {options}: a run has the same for all")
    config = subject_class(opened.run).resized(
        opened.run.config,
        list(plan.keep.values()),
        reroute=plan.policy != KEEP_ROWS,
        router_options={name: value for name, value in options[0].items() if name != "top_k"} if options else {},
        top_k=changes["top_k"],
    )
    run = dataclasses.replace(opened.run, config=config)
    with torch.device("meta"):
        problems = differences(run.make_model().state_dict(), state)
    if problems:
        raise ValueError(f"the pruned weights are not those of the configuration that would be written: {problems}")
    return state, run


def verify(plan: Plan, folder: str | Path, out: str | Path, *, weights: str | None = None) -> dict[str, bool]:
    """Holds a written pruned model to its source.

    Returns:
        "V0": every tensor's bytes are those of its source's slice; "V1": it opens, with no name missing or unexpected
        and every shape right; "V2": it answers as the masked full model, bit for bit; "V3": the plan beside it is this
        one.

    Raises:
        FileNotFoundError, ValueError: the source or the pruned folder is none.
    """
    opened = open_run(folder, weights=weights)
    check_plan(plan, opened)
    found: dict[str, bool] = {}
    expected, run = pruned(opened, plan)
    try:
        model, written = load_model(out)
        found["V1"] = written.config == run.config and written.model == run.model
    except ValueError:
        return {"V0": False, "V1": False, "V2": False, "V3": False}
    with safe_open(Path(out) / WEIGHTS, "pt") as file:
        names = set(file.keys())
        found["V0"] = names == expected.keys() and all(
            _same_bytes(file.get_tensor(name), tensor) for name, tensor in expected.items()
        )
    with torch.inference_mode():
        with masked_by(opened.model, plan):
            whole = opened.subject.answer()
        found["V2"] = _same_bytes(subject_class(run)(model, run).answer(), whole)
    try:
        found["V3"] = Plan.load(Path(out) / PLAN_FILE).hash == plan.hash
    except (OSError, ValueError):
        found["V3"] = False
    return dict(sorted(found.items()))


def inspect(folder: str | Path, *, keep: float | int | None = None) -> dict[str, Any]:
    """What a run or export is made of and what keeping some experts of every layer would leave; no weight is read.

    Args:
        keep: a share of the experts (a float up to 1.0, rounded up), or a count; None keeps all.

    Raises:
        ValueError: no such run, a dense one, a router that cannot be restricted, or a keep that it cannot have.
    """
    run = read_description(folder)
    with torch.device("meta"):
        model = run.make_model()
    layers = moe_layers(model)
    _check_whole(layers, folder)
    counts = {}
    for layer in layers:
        experts = layer.router.num_experts
        count = experts if keep is None else keep
        if isinstance(count, float):
            if not 0 < count <= 1:
                raise ValueError(f"keep is {keep!r}: give a count or a share up to 1.0")
            count = math.ceil(experts * count - 1e-9)
        counts[layer.layer] = range(count)
    return _sizes(Path(folder), run, model, counts, POLICIES[0], {})


def dry_run(plan: Plan, folder: str | Path) -> dict[str, Any]:
    """Bytes before and after a plan; no weight is read.

    Raises:
        ValueError: as ``inspect``, or a plan for other layers or counts.
    """
    run = read_description(folder)
    with torch.device("meta"):
        model = run.make_model()
    _check_layers(plan, moe_layers(model), folder)
    return _sizes(Path(folder), run, model, plan.keep, plan.policy, _changes(plan))


def _sizes(
    folder: Path,
    run: Run,
    model: nn.Module,
    keep: Mapping[int, Sequence[int]],
    policy: str,
    changes: Mapping[str, Any],
) -> dict[str, Any]:
    total = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    after = dict(total)
    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, MoELayerCode):
            continue
        experts, kept = layer.router.num_experts, keep[layer.layer]
        with torch.random.fork_rng(devices=[]):
            twin = type(layer.router)(**layer.router.options)
        prefix = f"{name}." if name else ""
        for entry in ("w1", "w2", "w3"):
            after[f"{prefix}experts.{entry}"] = total[f"{prefix}experts.{entry}"] // experts * len(kept)
        if policy != KEEP_ROWS:
            for entry, tensor in restrict(twin, kept, **changes).state_dict().items():
                after[f"{prefix}router.{entry}"] = tensor.numel()
        layers[layer.layer] = {"experts": experts, "kept": len(kept), "router": layer.router.name}
    width = _bytes_each(folder)
    return {
        "supported": True,
        "model_type": f"gatewright/{run.model}",
        "layers": layers,
        "parameters_before": sum(total.values()),
        "parameters_after": sum(after.values()),
        "bytes_before": width * sum(total.values()),
        "bytes_after": width * sum(after.values()),
    }


def _bytes_each(folder: Path) -> int:
    """Bytes of a weight: checkpoints hold float32."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return 4
    with safe_open(folder / WEIGHTS, "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).element_size()


def check_plan(plan: Plan, opened: Opened) -> None:
    """
    Raises:
        ValueError: the plan is of another model.
    """
    _check_layers(plan, opened.layers, opened.folder)
    if plan.policy not in POLICIES:
        raise ValueError(f'policy "{plan.policy}" is none for our own runs: plan with {" or ".join(POLICIES)}')
    description = opened.describe()
    for name in ("model_type", "config_sha256", "header_hash"):
        if plan.model[name] != description[name]:
            raise ValueError(
                f'the plan is of "{plan.model["name"]}", not of {opened.folder}: {name} differs; collect statistics of '
                "this run (and of the same weights) and plan again"
            )


def _check_whole(layers: Sequence[MoELayerCode], folder: str | Path) -> None:
    if not layers:
        raise ValueError(f"{folder} holds a dense model: it has no experts to remove")
    for layer in layers:
        if layer.router.expert_kinds.count("routed") != layer.router.num_experts:
            raise ValueError(
                f'{folder} was pruned with policy "{KEEP_ROWS}", so its routers know experts that are gone: plan anew '
                "for the model that it was made of"
            )


def _check_layers(plan: Plan, layers: Sequence[MoELayerCode], folder: str | Path) -> None:
    counts = {layer.layer: layer.router.num_experts for layer in layers}
    planned = dict(zip(plan.model["layers"], plan.model["experts_per_layer"], strict=True))
    if counts != planned or set(plan.keep) != set(counts):
        raise ValueError(f"the plan is for layers and experts {planned}, and {folder} has {counts}")


def _changes(plan: Plan) -> dict[str, Any]:
    """What besides the experts a plan changes: keyword arguments of ``restrict``."""
    ungroup = plan.model.get("num_groups", 1) > 1 and plan.num_groups == 1
    top_k = None if plan.top_k == plan.model["top_k"] else plan.top_k
    return {"ungroup": ungroup, "top_k": top_k}


def _read_lines(file: Path, domain: str | None) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(domain, record, where) of each line that is not empty."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text: give JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: no JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object")
        own = record.pop("domain", domain or file.stem)
        if not isinstance(own, str) or not own or (domain is not None and own != domain):
            raise ValueError(f'{where}: "domain" is {own!r}, expected {domain or "a name"}')
        yield own, record, where


class _Listener:
    """Adds up one layer's pairs while demonstrations run."""

    def __init__(self, layer: MoELayerCode, branch: Branch) -> None:
        self.layer, self.branch, self.experts = layer, branch, layer.router.num_experts
        self.before: Tensor | None = None
        self.factor: Tensor | float = 1.0
        self.clear()

    def clear(self) -> None:
        self.sums = {name: np.zeros(self.experts) for name in STANDARD}
        self.max_norm = np.zeros(self.experts)

    def hooks(self) -> list[Any]:
        found = [self.branch.norm.register_forward_pre_hook(self._norm_starts)]
        if self.branch.gate is not None:
            found.append(self.branch.gate.register_forward_hook(self._gate_ran))
        return [*found, self.layer.register_forward_hook(self._layer_ran)]

    def _norm_starts(self, module: nn.Module, args: tuple) -> None:
        self.before = args[0]

    def _gate_ran(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.factor = self.branch.factor(output)

    def _layer_ran(self, layer: MoELayerCode, args: tuple, output: tuple[Tensor, Routing]) -> None:
        routing, dim = output[1], layer.spec.dim
        if routing.dispatch is not None:
            raise ValueError(
                f'layer {layer.layer}: router "{layer.router.name}" mixes tokens into slots, so no token is an '
                "expert's and none can be scored"
            )
        x_TD, h_TD = args[0].reshape(-1, dim), self.before.reshape(-1, dim).double()
        token_N, expert_N, weight_N = routing.as_list()
        rows = torch.arange(len(token_N), device=token_N.device)
        routed_N = torch.tensor([kind == "routed" for kind in layer.router.expert_kinds], device=token_N.device)[
            expert_N
        ]
        rows = rows[routed_N]
        rows = rows[expert_N[rows].argsort(stable=True)]
        token_N, expert_N, weight_N = token_N[rows], expert_N[rows], weight_N[rows].double()
        inputs_ND = x_TD[token_N] if routing.rows is None else routing.rows[rows].to(x_TD.dtype)
        counts_E = torch.bincount(expert_N, minlength=self.experts)
        u_ND = layer.experts(inputs_ND, counts_E, backend=layer.backend).double()
        factor = self.factor
        if isinstance(factor, Tensor) and factor.dim() == 2:
            factor = factor.double().repeat_interleave(len(x_TD) // len(factor), 0)[token_N]
        u_ND = u_ND * factor
        r_TD = torch.zeros_like(h_TD).index_add_(0, token_N, weight_N[:, None] * u_ND)
        s_N = (1 - torch.cosine_similarity(h_TD, h_TD + r_TD, dim=-1)).clamp(min=0)[token_N]
        norm_N, g_N = u_ND.norm(dim=-1), weight_N.abs()
        for name in STANDARD:
            a, b, c = exponents(name)
            value_N = g_N**a * norm_N**b * s_N**c
            self.sums[name] += torch.bincount(expert_N, value_N, self.experts).cpu().numpy()
        most_E = torch.zeros(self.experts, dtype=torch.float64, device=norm_N.device)
        most_E.scatter_reduce_(0, expert_N, norm_N, "amax")
        self.max_norm = np.maximum(self.max_norm, most_E.cpu().numpy())


@contextlib.contextmanager
def _listening(opened: Opened, subject: Subject) -> Iterator[list[_Listener]]:
    """Hooks on every MoE layer for as long as the context lasts."""
    listeners = [_Listener(layer, subject.branch(layer)) for layer in opened.layers]
    handles = [handle for listener in listeners for handle in listener.hooks()]
    try:
        yield listeners
    finally:
        for handle in handles:
            handle.remove()


def _aimer(opened: Opened, shape: tuple[int, int]) -> np.ndarray:
    """mean |w| / sqrt(mean w^2) of each expert's two maps. [L, E]"""
    found = np.zeros(shape)
    for row, layer in enumerate(opened.layers):
        bank = layer.experts
        w_EN = torch.cat([bank.w_in.detach().flatten(1), bank.w_out.detach().flatten(1)], 1).double()
        found[row, : len(w_EN)] = (w_EN.abs().mean(1) / w_EN.square().mean(1).sqrt()).cpu().numpy()
    return found


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    )


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
