"""Pruning on disk beside copying: small here, at full size with `make evidence`."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from gatewright.recipes import prune_speed_disk as program
from gatewright.tools.prune.checkpoint import Checkpoint


def check(found):
    assert found["peak_bytes"] < 100_000_000 and not found["torch_imported"]
    assert found["different_after_kills"] == [] and found["source_untouched"]
    assert 0.49 < found["bytes_after"] / found["bytes_before"] < 0.56


def test_small(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    program.main(
        [
            "--gigabytes",
            "0.04",
            "--shards",
            "6",
            "--pairs",
            "2",
            "--kills",
            "3",
            "--folder",
            str(tmp_path),
            "--out",
            str(out),
        ]
    )
    found = json.loads(out.read_text())
    check(found)
    assert found["kills"] == 3 and len(found["ratios"]) == 2 and found["shards"] == 6
    assert found["bytes_before"] > 0.04e9
    assert "files that differ: none" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.json"}


def test_checkpoint_is_what_it_says(tmp_path):
    made, copied = tmp_path / "made", tmp_path / "copied"
    made.mkdir()
    program.make_checkpoint(made, 0.01, 3, seed=0)
    checkpoint = Checkpoint.open(made)
    assert len(checkpoint.shards) == 3 and checkpoint.index["metadata"]["total_size"] == checkpoint.data_bytes
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"F8_E4M3", "F32", "BF16"}
    shutil.copytree(made, copied)
    assert program.different(made, copied) == []
    file = copied / "model-00002-of-00003.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    (copied / "more").touch()
    assert program.different(made, copied) == [file.name, "more"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pairs", "3"], "for both orders"),
        (["--gigabytes", "1e9"], "are needed: use --folder"),
        (["--shard", "2"], "--shards"),
    ],
)
def test_bad_requests(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit):
        program.main([*options, "--folder", str(tmp_path)])
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.evidence
def test_eight_gigabytes():
    """At no less than 0.7 of the speed of copying, in less than 100 MB, killed ten times."""
    found = program.measure(Path(tempfile.gettempdir()), gigabytes=8, shards=20, pairs=4, kills=10)
    print(program.show(found))
    check(found)
    assert found["kills"] == 10 and found["bytes_before"] > 8e9
    assert found["ratio"] >= 0.7
