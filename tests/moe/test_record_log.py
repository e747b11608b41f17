"""The routing log: what is written is read, torn, damaged or resumed; foreign folders are refused in words."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from gatewright.moe import record_log
from gatewright.moe.record_log import LayerInfo, LogWriter, Window, read_log

LAYERS = [LayerInfo(name=f"blocks.{i}.mlp", layer=i, experts=e, top_k=2.0, router="topk") for i, e in enumerate((4, 3))]


def window(first: int, last: int | None = None, seed: int | None = None) -> Window:
    made = np.random.default_rng(first if seed is None else seed)
    new = Window.zeros(first, first if last is None else last, 2, 4)
    for field in dataclasses.fields(Window):
        value = getattr(new, field.name)
        if isinstance(value, np.ndarray):
            # float32 is what the log keeps of matrices of sums
            drawn = made.integers(0, 1000, value.shape)
            value[...] = drawn if value.dtype.kind == "i" else np.float32(drawn / 7)
    new.losses = {"balance": np.array([0.5 + first, np.nan])}
    return new


def record(run, steps, *, start=0, **more) -> LogWriter:
    writer = LogWriter(run, LAYERS, **more)
    writer.start(start)
    for step in steps:
        writer.window(window(step))
    return writer


def test_what_is_written_is_read(tmp_path):
    writer = record(tmp_path, [0, 1, 2], options={"every": 1})
    writer.scalars({"loss": ([0, 1, 2], [3.0, 2.0, np.nan]), "lr": ([1], [1e-3])})
    coactivation, flow = np.arange(32).reshape(2, 4, 4) * 1000, np.arange(16).reshape(1, 4, 4)
    similarity = np.full((2, 4, 4), 0.5)
    writer.structure(1, coactivation, flow, similarity)
    index = [np.array([[0, 3], [1, -1]]), np.array([[2], [0]])]
    labels = {"class": (np.array([7, 1]), ["<b>cat</b>", "dog"])}
    writer.probe(0, index, labels)
    writer.probe(2, index, labels)
    assert not read_log(tmp_path).complete
    writer.close()
    log = read_log(tmp_path)
    assert log.complete and log.notices == [] and log.session_starts == [0] and log.options == {"every": 1}
    assert log.layers == tuple(LAYERS) and log.name == tmp_path.name and log.path == tmp_path / "routing"
    assert log.first_steps.tolist() == log.steps.tolist() == [0, 1, 2]
    for slot, step in enumerate(log.steps):
        for field in dataclasses.fields(Window):
            expected = getattr(window(int(step)), field.name)
            if isinstance(expected, np.ndarray):
                read = getattr(log, field.name)
                assert read.dtype == expected.dtype and np.array_equal(read[slot], expected), field.name
    assert np.array_equal(log.losses["balance"], [[0.5, np.nan], [1.5, np.nan], [2.5, np.nan]], equal_nan=True)
    steps, values = log.scalars["loss"]
    assert steps.tolist() == [0, 1, 2] and values[:2].tolist() == [3.0, 2.0] and np.isnan(values[2])
    (step, together, onwards), (_, cosines) = log.structure[0], log.similarity[0]
    assert step == 1 and np.array_equal(together, coactivation) and np.array_equal(onwards, flow)
    assert np.array_equal(cosines, similarity)
    assert [probe.step for probe in log.probes] == [0, 2] and log.probes[1].index[0].tolist() == [[0, 3], [1, -1]]
    assert log.probe_labels["class"][0].tolist() == [7, 1] and log.probe_labels["class"][1] == ["<b>cat</b>", "dog"]
    assert read_log(tmp_path / "routing").steps.tolist() == [0, 1, 2]


def test_cut_off_at_every_byte(tmp_path):
    """No exception, no lost frame but the torn one, and a sentence about it."""
    writer = LogWriter(tmp_path, LAYERS)
    writer.start(0)
    part = tmp_path / "routing" / "part-000001.routing"
    ends = [part.stat().st_size]
    for step in range(3):
        small = Window.zeros(step, step, 2, 4)
        small.counts[:] = 1 + step
        writer.window(small)
        ends.append(part.stat().st_size)
    writer.close(complete=False)
    whole = part.read_bytes()
    for cut in range(len(whole)):
        part.write_bytes(whole[:cut])
        log = read_log(tmp_path)
        assert log.steps.tolist() == list(range(sum(cut >= end for end in ends[1:])))
        torn = any("no whole entry" in notice for notice in log.notices)
        assert torn == (cut not in (0, *ends))
        assert not log.complete


def test_damage_in_the_middle_costs_its_frame_only(tmp_path):
    writer = LogWriter(tmp_path, LAYERS)
    writer.start(0)
    part = tmp_path / "routing" / "part-000001.routing"
    begin = part.stat().st_size
    writer.window(window(0))
    end = part.stat().st_size
    writer.window(window(1))
    writer.close()
    whole = part.read_bytes()
    for place in range(begin, end, 7):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        log = read_log(tmp_path)
        assert log.steps.tolist() == [1] and np.array_equal(log.counts[0], window(1).counts)
        assert any("damaged" in notice for notice in log.notices)


def test_reading_while_writing(tmp_path):
    """Every frame is there at once, and a reader disturbs nothing."""
    writer = LogWriter(tmp_path, LAYERS)
    assert read_log(tmp_path).steps.size == 0 and "no window is recorded yet" in read_log(tmp_path).notices
    writer.start(0)
    for step in range(5):
        writer.window(window(step))
        assert read_log(tmp_path).steps.tolist() == list(range(step + 1))
    writer.close()


def test_resuming_counts_nothing_twice(tmp_path):
    first = record(tmp_path, [0, 1, 2, 3])
    first.scalars({"loss": ([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0])})
    first.close(complete=False)
    again = LogWriter(tmp_path, LAYERS)
    again.start(2)
    for step in (2, 3, 4):
        again.window(window(step, seed=100 + step))
    again.scalars({"loss": ([2, 3, 4], [20.0, 30.0, 40.0])})
    again.close()
    log = read_log(tmp_path)
    assert log.steps.tolist() == [0, 1, 2, 3, 4] and log.session_starts == [0, 2] and log.notices == []
    assert np.array_equal(log.counts[1], window(1).counts) and np.array_equal(log.counts[2], window(0, seed=102).counts)
    assert log.scalars["loss"][1].tolist() == [4.0, 3.0, 20.0, 30.0, 40.0]
    assert len(list((tmp_path / "routing").glob("part-*"))) == 2


def test_a_restart_from_the_beginning_after_an_earlier_restart(tmp_path):
    for start, steps in ((0, [0, 1, 2, 3]), (2, [2, 3]), (0, [0])):
        record(tmp_path, steps, start=start).close()
    assert read_log(tmp_path).steps.tolist() == [0]


def test_a_window_that_reaches_beyond_a_restart_is_left_out_and_said(tmp_path):
    writer = LogWriter(tmp_path, LAYERS)
    writer.start(0)
    writer.window(window(0, 9))
    writer.window(window(10, 19))
    writer.close(complete=False)
    again = LogWriter(tmp_path, LAYERS)
    again.start(13)
    again.window(window(13, 19))
    again.close()
    log = read_log(tmp_path)
    assert log.first_steps.tolist() == [0, 13] and log.steps.tolist() == [9, 19]
    assert any("3 steps before a restart" in notice for notice in log.notices)


def test_a_probe_of_another_batch_is_left_out_and_said(tmp_path):
    writer = LogWriter(tmp_path, LAYERS)
    writer.start(0)
    for step, tokens in ((0, 2), (1, 3), (2, 3)):
        writer.probe(step, [np.zeros((tokens, 2)), np.zeros((tokens, 1))], {"class": (np.arange(tokens), [])})
    writer.close()
    log = read_log(tmp_path)
    assert [probe.step for probe in log.probes] == [1, 2] and len(log.probe_labels["class"][0]) == 3
    assert any("1 probes of another batch" in notice for notice in log.notices)


def test_many_windows_are_added_up_exactly(tmp_path):
    record(tmp_path, range(25)).close()
    whole, short = read_log(tmp_path), read_log(tmp_path, max_windows=10)
    assert len(short.steps) == 9 and short.steps[-1] == 24 and short.first_steps.tolist() == list(range(0, 25, 3))
    assert np.array_equal(short.counts.sum(0), whole.counts.sum(0))
    assert np.array_equal(short.counts[1], whole.counts[3:6].sum(0)) and short.losses["balance"][1, 0] == 4.5
    assert any("25 windows are shown as 9" in notice for notice in short.notices)
    assert len(read_log(tmp_path, max_bytes=1).steps) == 1


def test_many_looks_at_structure_are_thinned_and_said(tmp_path):
    writer = record(tmp_path, [0])
    for step in range(9):
        writer.structure(step, np.full((2, 4, 4), step), np.zeros((1, 4, 4), dtype=int))
    writer.close()
    log = read_log(tmp_path, max_bytes=3 * 24 * 2 * 16)
    assert [step for step, *_ in log.structure] == [0, 4, 8]
    assert "of 9 looks at structure, 3 are shown" in log.notices


def test_parts_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(record_log, "PART_BYTES", 3000)
    record(tmp_path, range(20)).close()
    parts = sorted((tmp_path / "routing").glob("part-*"))
    assert len(parts) > 3 and all(part.stat().st_size <= 3000 for part in parts)
    assert read_log(tmp_path).steps.tolist() == list(range(20))


def test_folders_that_are_no_log(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is empty"):
        read_log(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no routing log.*Recorder\(model"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        read_log(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "other", "version": 1}', 'expected "gatewright-routing"'),
        ('{"format": "gatewright-routing", "version": 99}', "version 99.*reads up to 1; use a newer one"),
        ('{"format": "gatewright-routing", "version": 1, "layers": [3]}', "its layers are not"),
    ],
)
def test_headers_that_are_refused(tmp_path, content, message):
    (tmp_path / "routing").mkdir()
    (tmp_path / "routing" / "header.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path)
    with pytest.raises(ValueError, match=message):
        LogWriter(tmp_path, LAYERS)


def test_another_model_is_not_recorded_into_the_same_log(tmp_path):
    record(tmp_path, [0]).close()
    with pytest.raises(ValueError, match="another model.*4 routed experts.*Record into another folder"):
        LogWriter(tmp_path, [dataclasses.replace(LAYERS[0], experts=8), LAYERS[1]])
    with pytest.raises(ValueError, match="of 2 MoE layers, not 1"):
        LogWriter(tmp_path, LAYERS[:1])


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the routing log cannot be written"):
        LogWriter(tmp_path / "file", LAYERS)

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(record_log, "write_text", refuse)
    with pytest.raises(PermissionError, match="cannot be written.*Permission denied"):
        LogWriter(tmp_path / "run", LAYERS)


def test_a_log_that_may_only_be_read_is_read(tmp_path):
    record(tmp_path, [0, 1]).close()
    for entry in (tmp_path / "routing").iterdir():
        entry.chmod(0o444)
    (tmp_path / "routing").chmod(0o555)
    try:
        assert read_log(tmp_path).steps.tolist() == [0, 1]
    finally:
        (tmp_path / "routing").chmod(0o755)


def test_entries_that_this_version_does_not_know_are_passed_over(tmp_path):
    writer = record(tmp_path, [0])
    writer._append({"kind": "something new"}, {"x": np.arange(3)})
    writer.window(window(1))
    writer.close()
    log = read_log(tmp_path)
    assert log.steps.tolist() == [0, 1] and log.notices == []


def test_counts_take_the_bytes_that_they_need(tmp_path):
    """A window of balanced counts: about a byte or two a count, and nothing for what is zero."""
    layers = [LayerInfo(name=str(i), layer=i, experts=64) for i in range(12)]
    new = Window.zeros(0, 9, 12, 64)
    new.counts[:] = new.requested[:] = 640
    writer = LogWriter(tmp_path, layers)
    assert writer.window(new) < 12 * 64 * 2 + 500
    writer.close()
    assert json.loads((tmp_path / "routing" / "header.json").read_text())["format"] == "gatewright-routing"
    assert np.array_equal(read_log(tmp_path).requested[0], new.counts)


WRITER = """
import sys, itertools
import numpy as np
from gatewright.moe.record_log import LayerInfo, LogWriter, Window

writer = LogWriter(sys.argv[1], [LayerInfo(name="0", layer=0, experts=4)])
writer.start(0)
for step in itertools.count():
    window = Window.zeros(step, step, 1, 4)
    window.counts[:] = window.requested[:] = step + 1
    writer.window(window)
    if step == 20:
        print("running", flush=True)
"""


def test_read_while_another_process_writes_and_after_it_was_killed(tmp_path):
    """kill -9 in the middle of writing: every window that was read is still there, and what is there is whole."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "running\n"
        seen = [len(read_log(tmp_path).steps) for _ in range(5)]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    log = read_log(tmp_path)
    assert 20 < seen[0] <= seen[-1] <= len(log.steps) and seen == sorted(seen)
    assert log.steps.tolist() == list(range(len(log.steps)))
    assert np.array_equal(log.counts[:, 0, 0], log.steps + 1) and not log.complete
