"""Does the pruned checkpoint load, and is it the masked model? (Levels V1 and V2 of ``gatewright prune verify``.)

V1   stock ``from_pretrained`` of the pruned folder finds every tensor that the model wants, no other, each of the
     wanted shape. Nothing is read but headers: the model is built on the meta device.
V2   the logits of the pruned files equal those of the whole model ``masked`` by the plan, bit for bit on a CPU, under
     each experts implementation that the family has. One of the two models is in memory at a time; where even one
     is too large, both go layer by layer, under the model's own choice of implementation alone, and what is compared
     is the last hidden state, from which an untouched head makes the logits.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .layerwise import LayerwiseModel
from .layout import Layout
from .loading import checkpoint_folder, load_config, loading_options, model_class, quantisation, quiet
from .mask import masked_by
from .plan import Plan
from .verify import Check

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_SHARE = 0.7  # of the free memory that a model may take
_COLLECTED = 1 << 28
_GROWTH = {"fp8": 2, "mxfp4": 4}  # of what is stored, once it is plain numbers


def check_loads(pruned: str | Path) -> Check:
    """V1."""
    folder = checkpoint_folder(pruned)
    kind = model_class(load_config(folder))
    try:
        with quiet():
            _, found = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, device_map="meta", **_options(folder)
            )
    except (ValueError, ImportError, OSError, RuntimeError, KeyError) as error:
        return Check("V1", False, f"{kind.__name__} cannot load it", (str(error),))
    unread = _mtp_keys(folder, found.get("unexpected_keys", ()))
    problems = [
        f"{_WORDS[what]}: {key}" for what in _WORDS for key in sorted(map(str, set(found.get(what, ())) - unread))
    ]
    problems += [str(error) for error in found.get("error_msgs", ())]
    if problems:
        return Check("V1", False, f"{kind.__name__} loads it with {len(problems)} keys amiss", tuple(problems))
    beside = f", beside {len(unread)} of MTP layers, which no class of transformers reads" if unread else ""
    return Check("V1", True, f"{kind.__name__} loads it: no missing, unexpected or mismatched key{beside}")


def _mtp_keys(folder: Path, unexpected: Iterable[str]) -> set[str]:
    """Those of MTP layers, as they are called once experts are stacked: stock classes do not read them, and where they
    do not know of them (DeepSeek-V3's knows layer 61 alone), report them as unexpected, of the whole model too."""
    try:
        layout = Layout.of(Checkpoint.open(folder))
    except ValueError:  # damaged: then nothing is excused
        return set()
    layers = tuple(f"{layer.prefix.rpartition('.')[0]}." for layer in layout.mtp_layers)
    return {key for key in unexpected if key in layout.mtp_tensors or (layers and key.startswith(layers))}


_WORDS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "mismatched"}


def check_logits(
    plan: Plan,
    model: str | Path,
    pruned: str | Path,
    *,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    layerwise: bool | None = None,
    tokens: tuple[int, int] = (2, 24),
    seed: int = 0,
) -> Check:
    """V2.

    Args:
        implementations: of the experts; those that the family does not have are left out.
        layerwise: one decoder layer's weights in memory at a time; by default where a whole model would not fit.
        tokens: batch and length of the random text that both are given.
    """
    model, pruned = checkpoint_folder(model), checkpoint_folder(pruned)
    if plan.policy == "keep-rows":
        return Check("V2", False, "policy keep-rows has no checkpoint of a stock engine to compare with", ())
    need, free = memory_needed(model), free_memory()
    if layerwise is None:
        layerwise = need > _SHARE * free
    ids = random_ids(load_config(model), *tokens, seed=seed)
    run = _run_layerwise if layerwise else _run_whole
    try:
        want = run(model, ids, implementations, plan)
        got = run(pruned, ids, tuple(want), None)
    except (ValueError, RuntimeError, MemoryError) as error:
        return Check("V2", False, "the models could not be compared", (str(error),))
    problems = tuple(
        f"{name}: {_difference(want[name], got[name])}" for name in want if not torch.equal(want[name], got[name])
    )
    if not want:
        return Check("V2", False, f"{model} itself runs under none of {', '.join(implementations)}", ())
    said = ", ".join(want)
    if layerwise:
        how = (
            f"layer by layer ({need / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB free), final hidden states or logits "
            f"under the experts implementation {said}"
        )
    else:
        how = f"logits under {said}"
    if problems:
        return Check("V2", False, f"differs from the masked model: {how}", problems)
    return Check("V2", True, f"equals the masked model bit for bit on {ids.numel()} tokens: {how}")


def implementations_of(model: nn.Module, among: Sequence[str] = IMPLEMENTATIONS) -> tuple[str, ...]:
    """Those of ``among`` that the model can be set to."""
    if not model._can_set_experts_implementation():
        return ("eager",)
    return tuple(among)


def random_ids(config: Any, batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Tokens [B, L] without those that stand for images and the like, or for padding."""
    plain = config.to_dict() | config.get_text_config(decoder=True).to_dict()
    special = {value for name, value in plain.items() if name.endswith(("token_id", "token_index"))}
    special = {value for value in special if isinstance(value, int)} if special else set()
    vocabulary = config.get_text_config(decoder=True).vocab_size
    allowed = torch.tensor([token for token in range(min(vocabulary, 50_000)) if token not in special])
    return allowed[torch.randint(len(allowed), (batch, length), generator=torch.Generator().manual_seed(seed))]


def memory_needed(folder: Path) -> int:
    """Bytes of the checkpoint's weights once they are loaded as they are stored."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return stored * _GROWTH.get(quantisation(load_config(folder)).get("quant_method"), 1)


def free_memory() -> int:
    """Bytes that this machine could still give out."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # where the system does not say: half of all


def _options(folder: Path) -> dict[str, Any]:
    return loading_options(load_config(folder), "auto")


@contextlib.contextmanager
def _maybe_masked(model: nn.Module, plan: Plan | None) -> Iterator[None]:
    with masked_by(model, plan) if plan is not None else contextlib.nullcontext():
        yield


def _run_whole(folder: Path, ids: Tensor, names: Sequence[str], plan: Plan | None) -> dict[str, Tensor]:
    with quiet():
        model = model_class(load_config(folder)).from_pretrained(folder, **_options(folder)).eval()
    _align(model)
    outputs = {}
    for name in implementations_of(model, names):
        if model._can_set_experts_implementation():
            model.set_experts_implementation(name)
        try:
            with torch.inference_mode(), _maybe_masked(model, plan):
                outputs[name] = main_output(model(input_ids=ids))
        except RuntimeError:
            # sizes that a kernel does not take; the pruned model has to run wherever the whole one does
            if plan is None or _runs(model, ids):
                raise
    del model
    if memory_needed(folder) > _COLLECTED:
        gc.collect()  # before the other model comes
    return outputs


def _runs(model: nn.Module, ids: Tensor) -> bool:
    try:
        with torch.inference_mode():
            model(input_ids=ids)
    except RuntimeError:
        return False
    return True


def _run_layerwise(folder: Path, ids: Tensor, names: Sequence[str], plan: Plan | None) -> dict[str, Tensor]:
    model = LayerwiseModel.open(folder)
    _align(model.model)
    config = model.model.config.get_text_config(decoder=True)
    name = getattr(config, "_experts_implementation", None) or "eager"
    for layer in model.layers:  # when its weights are there
        layer.register_forward_pre_hook(lambda module, args: _align(module))
    with _maybe_masked(model.model, plan):
        for _ in model.run(ids.tolist()):
            pass
    return {name: torch.cat([main_output(output) for output in model.outputs])}


def _align(module: nn.Module) -> None:
    """Tensors that do not start at a multiple of 64 bytes are moved to where they do."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def main_output(output: Any) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state


def _difference(want: Tensor, got: Tensor) -> str:
    if want.shape != got.shape:
        return f"shapes {tuple(want.shape)} and {tuple(got.shape)}"
    apart = (want.float() - got.float()).abs()
    return f"{int((apart > 0).sum())} of {apart.numel()} numbers differ, by at most {apart.max().item():.3g}"
