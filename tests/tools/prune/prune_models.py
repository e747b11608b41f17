"""Tiny checkpoints of the thirteen families as folders on disk, and safetensors files written by hand.

    folder = tiny("deepseek_v3", num_experts=8, n_group=2, topk_group=1)

Made once a session and shared: nobody writes into them. `copied` gives a copy to spoil.
"""

import atexit
import functools
import itertools
import json
import math
import random
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

THIRTEEN = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "phimoe",
    "llama4_text",
    "ernie4_5_moe",
    "minimax",
    "minimax_m2",
)
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SIZES = {"F8_E4M3": 1, "U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> type, shape, content


@functools.cache
def _home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="prune_models"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


@functools.cache
def tiny(family: str, num_experts: int = 8, *, shard_size: str = "5GB", seed: int = 0, **changes: object) -> Path:
    """A folder as `save_pretrained` writes it: random weights, biases and correction biases; float32."""
    from gatewright.tools.prune.tiny import config_class, tiny_model

    text = config_class(family)()
    counts = {key: num_experts for key in COUNTS if hasattr(getattr(text, "text_config", text), key)}
    folder = _home() / f"{len(list(_home().iterdir()))}-{family}"
    model = tiny_model(family, seed, **(counts | changes))
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    return folder


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def read(file: Path) -> Tensors:
    """Every tensor of a file."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = memoryview(raw)[8 + length :]
    return {
        name: (what["dtype"], tuple(what["shape"]), bytes(data[slice(*what["data_offsets"])]))
        for name, what in header.items()
    }


def read_folder(folder: Path) -> Tensors:
    return {name: what for file in sorted(folder.glob("*.safetensors")) for name, what in read(file).items()}


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...], object]], sizes: Iterable[int]) -> bytes:
    ends = list(itertools.accumulate(sizes, initial=0))
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [ends[i], ends[i + 1]]}
        for i, (name, (dtype, shape, _)) in enumerate(tensors.items())
    }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write(file: Path, tensors: Tensors) -> None:
    """One safetensors file, tensors in the order given."""
    sizes = [len(content) for _, _, content in tensors.values()]
    file.write_bytes(header_of(tensors, sizes) + b"".join(content for _, _, content in tensors.values()))


def write_sparse(file: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of the right length that takes no room on the disk: its tensors are holes."""
    tensors = {name: (dtype, shape, b"") for name, (dtype, shape) in shapes.items()}
    sizes = [math.prod(shape) * SIZES[dtype] for dtype, shape in shapes.values()]
    header = header_of(tensors, sizes)
    file.write_bytes(header)
    with open(file, "r+b") as stream:
        stream.truncate(len(header) + sum(sizes))


def write_folder(folder: Path, config: Mapping, files: Mapping[str, Tensors]) -> Path:
    """A checkpoint: its configuration, its files, and an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file, tensors in files.items():
        write(folder / file, tensors)
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        total = sum(len(content) for tensors in files.values() for _, _, content in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def edited(folder: Path, **changes: object) -> Path:
    """Changes keys of a folder's config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}, indent=2) + "\n")
    return folder


def plan_of(folder: Path, count: int = 4, *, seed: int = 0, **changes: object):
    """A plan that keeps other random experts in every layer; `changes` are the plan's fields."""
    from gatewright.tools.prune.checkpoint import Checkpoint
    from gatewright.tools.prune.layout import Layout
    from gatewright.tools.prune.plan import Plan

    checkpoint = Checkpoint.open(folder)
    model = Layout.of(checkpoint).describe(checkpoint)
    chance = random.Random(seed)

    def some() -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(model["num_experts"]), count)))

    fields = {
        "model": model,
        "criterion": "random",
        "domains": {},
        "policy": "slice",
        "keep": {layer: some() for layer in model["layers"]},
        "top_k": model["top_k"],
        "mtp": "strip" if model["mtp_layers"] else "none",
    }
    return Plan(**(fields | changes))


def with_mtp(source: Path, folder: Path) -> Path:
    """The checkpoint with a fifth layer that predicts a further token, as DeepSeek-V3 and GLM-4 store it."""
    content = read_folder(source)
    head = {name.replace("layers.3", "layers.4"): what for name, what in content.items() if ".layers.3." in name}
    head["model.layers.4.eh_proj.weight"] = ("F32", (2, 2), bytes(range(16)))
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    return write_folder(folder, config, {"model.safetensors": content | head})


def quantised(source: Path, folder: Path, method: str, shards: int = 1) -> Path:
    """The checkpoint with its experts as quantisers store them: made-up numbers under their names and types.

    Args:
        method: "fp8" (weight, weight_scale_inv), "int4" (weight_packed, weight_scale, weight_shape) or "mxfp4"
            (fused blocks and scales, of gpt_oss).
    """
    chance = random.Random(0)
    made: Tensors = {}

    def put(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        made[name] = (dtype, shape, chance.randbytes(math.prod(shape) * SIZES[dtype]))

    for name, (dtype, shape, content) in read_folder(source).items():
        if ".experts." not in name or name.endswith("_bias"):
            made[name] = (dtype, shape, content)
        elif method == "fp8":
            put(name, "F8_E4M3", shape)
            put(f"{name}_scale_inv", "F32", (1, 1))
        elif method == "int4":
            stem = name.removesuffix(".weight")
            put(f"{stem}.weight_packed", "I32", (shape[0], shape[1] // 8))
            put(f"{stem}.weight_scale", "BF16", (shape[0], max(1, shape[1] // 32)))
            put(f"{stem}.weight_shape", "I64", (2,))
        else:
            put(f"{name}_blocks", "U8", (shape[0], shape[2], max(1, shape[1] // 32), 16))
            put(f"{name}_scales", "U8", (shape[0], shape[2], max(1, shape[1] // 32)))
    kinds = {
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "int4": {"quant_method": "compressed-tensors", "ignore": ["lm_head"]},
        "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    }
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": kinds[method]}
    names = sorted(made)
    files = {
        f"model-{i + 1:05}-of-{shards:05}.safetensors": {name: made[name] for name in names[i::shards]}
        for i in range(shards)
    }
    if shards == 1:
        files = {"model.safetensors": made}
    return write_folder(folder, config, files)
