"""Headers as the safetensors library reads them, and every way in which a folder can be wrong, refused by name."""

import json
import shutil
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_models import copied, header_of, tiny, write, write_folder
from safetensors import safe_open

from gatewright.tools.prune.checkpoint import Checkpoint, read_shard

CONFIG = {"model_type": "qwen3_moe", "num_experts": 2}
A = ("F32", (2, 3), bytes(24))
B = ("BF16", (5,), bytes(10))


@pytest.fixture
def sharded(tmp_path):
    """Three files of a real checkpoint."""
    return copied(tiny("mixtral", shard_size="200KB"), tmp_path / "model")


def test_entries_are_those_of_the_library():
    folder = tiny("gpt_oss")
    checkpoint = Checkpoint.open(folder)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        for name in file.keys():
            part, entry = file.get_slice(name), checkpoint.tensors[name]
            assert (part.get_dtype(), tuple(part.get_shape())) == (entry.dtype, entry.shape)
            content = (folder / entry.file).read_bytes()[entry.start : entry.end]
            assert content == file.get_tensor(name).tobytes() and entry.nbytes == len(content)
    assert checkpoint.index is None and checkpoint.shards["model.safetensors"].metadata == {"format": "pt"}
    assert checkpoint.config["model_type"] == "gpt_oss"
    assert checkpoint.file_bytes == (folder / "model.safetensors").stat().st_size


def test_several_files_are_one_checkpoint(sharded):
    checkpoint, whole = Checkpoint.open(sharded), Checkpoint.open(tiny("mixtral"))
    assert len(checkpoint.shards) > 2 and checkpoint.tensors.keys() == whole.tensors.keys()
    assert checkpoint.header_hash == whole.header_hash and checkpoint.data_bytes == whole.data_bytes
    assert checkpoint.index["metadata"]["total_size"] == checkpoint.data_bytes


def test_the_hash_is_of_names_types_and_shapes(tmp_path):
    def digest(**tensors):
        return Checkpoint.open(write_folder(tmp_path, CONFIG, {"model.safetensors": tensors})).header_hash

    first = digest(a=A, b=B)
    assert first == digest(b=B, a=A)
    assert len({first, digest(c=A, b=B), digest(a=("I32", *A[1:]), b=B), digest(a=("F32", (3, 2), A[2]), b=B)}) == 4


def test_other_files_are_carried_and_other_weights_are_not(tmp_path):
    write_folder(tmp_path, CONFIG, {"model.safetensors": {"a": A}})
    for name in ("tokenizer.json", "modeling_x.py", "original/params.json", "assets/a.png", ".git/config", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "q4.gguf"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "assets/around").symlink_to(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.others) == {"tokenizer.json", "modeling_x.py", "assets/a.png"}
    assert set(checkpoint.left_out) == {
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "original/params.json",  # it describes those
        "consolidated.safetensors",
        "q4.gguf",
    }


# --- refusals


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def test_missing_shard(sharded):
    gone = first_shard(sharded)
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone.name} is missing, though the index names it"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_truncated_shard(sharded, left):
    file = first_shard(sharded)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{file.name} is truncated.*fetch {file.name} again"):
        Checkpoint.open(sharded)


def test_pointer_in_the_place_of_a_file(sharded):
    first_shard(sharded).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 10\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        Checkpoint.open(sharded)


def spoil_header(file, change):
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    new = change(raw[8 : 8 + length])
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: b"{" * len(raw), "not JSON"),
        (lambda raw: b"[]", "not a JSON object"),
        (lambda raw: raw.replace(b'"b"', b'"a"'), "names a twice"),
        (lambda raw: raw.replace(b"BF16", b"X9"), "has the type X9"),
        (lambda raw: raw.replace(b"[5]", b"[6]"), r"shape \[6\] and type BF16 does not take 10 bytes"),
        (lambda raw: raw.replace(b"[5]", b"[-5]"), "entry of b is malformed"),
        (lambda raw: raw.replace(b"[5]", b'"5"'), "entry of b is malformed"),
        (lambda raw: raw.replace(b"[24,34]", b"[14,24]"), "share bytes: tied tensors"),
        (lambda raw: raw.replace(b"[24,34]", b"[26,36]"), "2 bytes before b belong to no tensor"),
    ],
)
def test_header_that_contradicts_itself(tmp_path, change, says):
    file = tmp_path / "model.safetensors"
    write(file, {"a": A, "b": B})
    spoil_header(file, change)
    with pytest.raises(ValueError, match=says):
        read_shard(tmp_path, file.name)


def test_bytes_behind_the_last_tensor(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, {"a": A})
    file.write_bytes(file.read_bytes() + b"..")
    with pytest.raises(ValueError, match="2 bytes after the last tensor"):
        read_shard(tmp_path, file.name)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=64), cut=st.integers(0, 200), at=st.integers(0, 200))
def test_no_file_makes_it_fail_in_another_way(tmp_path_factory, content, cut, at):
    tensors = {"a": A, "b": B}
    whole = header_of(tensors, [24, 10]) + bytes(34)
    spoilt = whole[:at] + content + whole[at + cut :]
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "x.safetensors").write_bytes(spoilt)
    try:
        shard = read_shard(folder, "x.safetensors")
    except ValueError:
        return
    assert shard.size == len(spoilt)


def test_name_in_two_files(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="stands in model-00001.* and again in model-00002"):
        Checkpoint.open(sharded)


def test_index_that_disagrees(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = sorted(index["weight_map"])

    def spoilt(change):
        weight_map = dict(index["weight_map"])
        change(weight_map)
        file.write_text(json.dumps(index | {"weight_map": weight_map}))
        return Checkpoint.open(sharded)

    other = {
        name: next(f for f in set(index["weight_map"].values()) if f != index["weight_map"][name]) for name in names
    }
    with pytest.raises(ValueError, match="index disagrees with its shards: it does not name"):
        spoilt(lambda weight_map: weight_map.pop(names[0]))
    with pytest.raises(ValueError, match="index disagrees with its shards: .* does not hold ghost"):
        spoilt(lambda weight_map: weight_map.update(ghost=index["weight_map"][names[0]]))
    with pytest.raises(ValueError, match=f"index disagrees with its shards: {names[0]} is in"):
        spoilt(lambda weight_map: weight_map.update({names[0]: other[names[0]]}))
    with pytest.raises(ValueError, match="names ../x.safetensors"):
        spoilt(lambda weight_map: weight_map.update({names[0]: "../x.safetensors"}))
    file.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(ValueError, match="names a twice"):
        Checkpoint.open(sharded)
    file.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        Checkpoint.open(sharded)


def test_shard_that_the_index_forgot(sharded):
    shutil.copy(first_shard(sharded), sharded / "model-00009-of-00009.safetensors")
    with pytest.raises(ValueError, match="model-00009-of-00009.safetensors belongs to no checkpoint"):
        Checkpoint.open(sharded)


def test_several_files_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="no model.safetensors.index.json: fetch the index too"):
        Checkpoint.open(sharded)


def test_two_checkpoints_in_one_folder(sharded):
    shutil.copy(tiny("mixtral") / "model.safetensors", sharded)
    with pytest.raises(ValueError, match="two checkpoints in one folder"):
        Checkpoint.open(sharded)


def test_pickled_weights_are_refused_with_the_conversion(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match=r"pickled weights .*A.from_pretrained\(.*save_pretrained\("):
        Checkpoint.open(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no safetensors weights"):
        Checkpoint.open(tmp_path)
    write(tmp_path / "model.safetensors", {"a": A})
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        Checkpoint.open(tmp_path)
