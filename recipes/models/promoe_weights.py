"""Weights in the names of the released ProMoE code, and in ours: both ways, without changing a bit.

| released | ours |
|---|---|
| ``blocks.i.mlp.fc1``, ``.fc2`` | ``blocks.i.mlp.up``, ``.down`` |
| ``blocks.i.mlp.cluster_centers`` | ``blocks.i.mlp.router.prototypes`` |
| ``blocks.i.mlp.experts.e.{up,down}_proj.weight``, e < E | row e of ``blocks.i.mlp.experts.w1``, ``.w2`` |
| ``blocks.i.mlp.experts.e.{up,down}_proj.bias`` | row e of ``blocks.i.mlp.experts.w3``, one after the other |
| ``blocks.i.mlp.experts.E.*``, the unconditional expert | ``blocks.i.mlp.local_experts.*`` |
| ``blocks.i.mlp.shared_expert.up_proj``, ``.down_proj`` | ``blocks.i.mlp.shared.up``, ``.down`` |

All other names are equal, and are those of DiT (arXiv:2212.09748). A released checkpoint is a pickled dict with
``model_state_dict`` and ``ema_model_state_dict``; it is read as weights only, so it can run no code.

    model = load_released("ckpt_step_500000.pth")
    save_released(model.state_dict(), model.config, "back.safetensors")

    python -m gatewright.recipes.models.promoe_weights ckpt_step_500000.pth FOLDER      makes an export
    python -m gatewright.recipes.models.promoe_weights RUN back.safetensors             takes a run or an export
"""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gatewright.recipes.console import MISTAKES, Parser, describe, fail
from gatewright.tools.export import check_free, write_export
from gatewright.tools.runs import Run
from gatewright.tools.weights import Source, differences

from .dit import DiT, count_parameters, load_dit
from .dit_config import DENSE, DiTConfig

HEADS = {384: 6, 768: 12, 960: 16, 1024: 16, 1152: 16}  # by width, in the released configurations
RENAMED = {
    ".mlp.fc1.": ".mlp.up.",
    ".mlp.fc2.": ".mlp.down.",
    ".mlp.cluster_centers": ".mlp.router.prototypes",
    ".mlp.shared_expert.up_proj.": ".mlp.shared.up.",
    ".mlp.shared_expert.down_proj.": ".mlp.shared.down.",
}
PROGRAM = "promoe_weights"
# what the released weights were trained for; the file does not tell at which step
RELEASED_OPTIONS = {"objective": "flow", "data": "latents:imagenet"}
KEYS = {"ema": "ema_model_state_dict", "model": "model_state_dict"}


def load_released(
    path: str | os.PathLike, *, weights: Literal["ema", "model"] = "ema", heads: int | None = None, **overrides: Any
) -> DiT:
    """Opens a released checkpoint as a model in plain PyTorch.

    Args:
        path: ``.safetensors``, or the pickled ``.pth``.
        weights: which of a ``.pth``; the papers' numbers are from the running average.
        heads: attention heads, which no shape tells; known for the released widths.
        overrides: other fields of ``DiTConfig`` that no shape tells, such as ``top_k``.

    Raises:
        ValueError: no such checkpoint in the file, or names and shapes that do not make one.
    """
    released = read_released(path, weights=weights)
    config = infer_config(released, heads=heads, **overrides)
    state = from_released(released, config)
    model = DiT(config)
    model.load_state_dict(state)
    return model


def save_released(state: Mapping[str, Tensor], config: DiTConfig, path: str | os.PathLike) -> None:
    """Writes a state dict of ours as a released checkpoint, ``.safetensors`` or ``.pth``, whole or not at all.

    Raises:
        ValueError: another ending, or a model that the released code has no names for.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{path}: choose a name that ends in .safetensors or .pth")
    released = {name: tensor.detach().cpu().contiguous() for name, tensor in to_released(state, config).items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            save_file(released, partial)
        else:
            torch.save(dict.fromkeys(KEYS.values(), released), partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_released(path: str | os.PathLike, *, weights: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """The state dict in a file, in the released names.

    Raises:
        ValueError: another ending, a damaged file, one that holds more than tensors and plain data, or no state dict.
    """
    path = Path(path)
    if weights not in KEYS:
        raise ValueError(f'weights="{weights}": choose one of {", ".join(KEYS)}')
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: expected a .safetensors or a .pth file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as weights alone: it is damaged, or would run code: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(content, dict) and KEYS[weights] in content:
        content = content[KEYS[weights]]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} holds no "{KEYS[weights]}" and is no state dict itself; it holds {found[:200]}')
    return dict(content)


def infer_config(released: Mapping[str, Tensor], *, heads: int | None = None, **overrides: Any) -> DiTConfig:
    """The configuration that the shapes tell, for a square input.

    Raises:
        ValueError: a key that is needed is not there, or ``heads`` cannot be known.
    """
    needed = ["x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "pos_embed"]
    routed = [int(match[1]) for name in released if (match := re.match(r"blocks\.(\d+)\.mlp\.cluster_centers", name))]
    if routed:
        mlp = f"blocks.{min(routed)}.mlp"
        needed.append(f"{mlp}.experts.0.up_proj.weight")
    missing = [name for name in needed if name not in released]
    depth = 1 + max((int(match[1]) for name in released if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if missing or not depth:
        raise ValueError(f"these are no weights of a DiT: {', '.join(missing) or 'blocks.*'} missing")
    dim, channels, patch, _ = released["x_embedder.proj.weight"].shape
    if heads is None and dim not in HEADS:
        raise ValueError(f"no shape tells the attention heads of a model of width {dim}: give heads=")
    side = round(released["pos_embed"].shape[1] ** 0.5) * patch
    values = {
        "input_shape": (channels, side, side),
        "num_classes": released["y_embedder.embedding_table.weight"].shape[0] - 1,
        "patch": patch,
        "dim": dim,
        "depth": depth,
        "heads": heads or HEADS[dim],
        "learn_sigma": released["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in released,
        "router": DENSE,
    }
    if "blocks.0.mlp.fc1.weight" in released:
        values["mlp_ratio"] = released["blocks.0.mlp.fc1.weight"].shape[0] / dim
    if routed:
        num_experts = released[f"{mlp}.cluster_centers"].shape[0]
        values |= {
            "router": "promoe",
            "router_options": {"unconditional": f"{mlp}.experts.{num_experts}.up_proj.weight" in released},
            "num_experts": num_experts,
            "top_k": 1,
            "expert_hidden": released[f"{mlp}.experts.0.up_proj.weight"].shape[0],
            "shared_expert": f"{mlp}.shared_expert.up_proj.weight" in released,
            "moe_every": min(routed) + 1,
        }
    return DiTConfig.from_dict(values | overrides)


def from_released(released: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """From the released names to ours.

    Raises:
        ValueError: missing or unexpected names, or shapes of another size, by name.
    """
    check_released(released, config)
    state = {}
    for name, tensor in released.items():
        if ".mlp.experts." not in name:
            state[_replace(name, RENAMED)] = tensor
    for index in config.moe_blocks:
        mlp = f"blocks.{index}.mlp"
        kinds = {"experts": range(config.num_experts)}
        if _has_unconditional(config):
            kinds["local_experts"] = range(config.num_experts, config.num_experts + 1)
        for kind, ids in kinds.items():
            stacked = {
                part: torch.stack([released[f"{mlp}.experts.{e}.{part}"] for e in ids])
                for part in ("up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias")
            }
            state[f"{mlp}.{kind}.w1"] = stacked["up_proj.weight"]
            state[f"{mlp}.{kind}.w2"] = stacked["down_proj.weight"]
            state[f"{mlp}.{kind}.w3"] = torch.cat([stacked["up_proj.bias"], stacked["down_proj.bias"]], dim=1)[:, None]
    return state


def to_released(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """From our names to the released ones; ``state`` holds all experts.

    Raises:
        ValueError: a model that the released code has no names for.
    """
    if config.router not in ("promoe", DENSE):
        raise ValueError(f'the released code has names for routers "promoe" and "dense", not for "{config.router}"')
    if isinstance(config.num_experts, tuple) or config.kept_experts:
        raise ValueError("the released code has the same experts in every layer, and this pruned model has not")
    back = {ours: theirs for theirs, ours in RENAMED.items()}
    released = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(blocks\.\d+\.mlp)\.(local_)?experts\.(w[123])", name):
            mlp, local, part = match.groups()
            for row, value in enumerate(tensor):
                expert = f"{mlp}.experts.{config.num_experts + row if local else row}"
                if part == "w3":
                    released[f"{expert}.up_proj.bias"] = value[0, : config.expert_hidden]
                    released[f"{expert}.down_proj.bias"] = value[0, config.expert_hidden :]
                else:
                    released[f"{expert}.{'up_proj' if part == 'w1' else 'down_proj'}.weight"] = value
        else:
            released[_replace(name, back)] = tensor
    return released


def check_released(released: Mapping[str, Tensor], config: DiTConfig) -> None:
    """
    Raises:
        ValueError: names or shapes other than a model of this configuration has.
    """
    with torch.device("meta"):
        expected = to_released(DiT(config).state_dict(), config)
    problems = differences(expected, released)
    if problems:
        raise ValueError(
            f"the weights do not fit a model of depth {config.depth}, width {config.dim}, {config.num_experts} routed "
            f"experts and {config.num_classes} classes: {problems}"
        )


def _has_unconditional(config: DiTConfig) -> bool:
    return config.router_options.get("unconditional", True)


def _replace(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if old in name:
            return name.replace(old, new)
    return name


def main(argv: list[str] | None = None) -> None:
    """From a released file to an export, or from a run or an export to a released file."""
    parser = Parser(prog=PROGRAM, description=main.__doc__)
    parser.add_argument("source", type=Path, help="a .safetensors or .pth file, or the folder of a run or an export")
    parser.add_argument("out", type=Path, help="a new folder for a file, a .safetensors or .pth file for a folder")
    parser.add_argument("--weights", default="ema", help='"ema" (default) or "model"')
    parser.add_argument("--heads", type=int, help="attention heads, for a file of a width that was not released")
    args = parser.parse_args(argv)
    try:
        if args.source.is_dir():
            model = load_dit(args.source, weights=args.weights)
            save_released(model.state_dict(), model.config, args.out)
        else:
            check_free(args.out)
            model = load_released(args.source, weights=args.weights, heads=args.heads)
            run = Run(path=args.out, model="dit", config=model.config.as_dict(), options=dict(RELEASED_OPTIONS))
            write_export(args.out, model.state_dict(), run, Source(args.weights, 0))
    except MISTAKES as error:
        fail(PROGRAM, describe(error))
    total, activated = count_parameters(model.config)
    print(f"{args.out}: router {model.config.router}, {total / 1e6:.1f}M parameters, {activated / 1e6:.1f}M activated")


if __name__ == "__main__":
    main()
