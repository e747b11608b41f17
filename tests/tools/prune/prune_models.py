"""Tiny checkpoints of the thirteen families as folders on disk, and safetensors files written by hand.

    folder = tiny("deepseek_v3", num_experts=8, n_group=2, topk_group=1)

Made once a session and shared: nobody writes into them. `copied` gives a copy to spoil.
"""

import atexit
import functools
import itertools
import json
import math
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
