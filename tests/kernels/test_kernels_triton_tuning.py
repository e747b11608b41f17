"""The choice of tile sizes, with made-up times: once a kernel and magnitude of rows, and kept on disk."""

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from gatewright.kernels import triton_tuning
from gatewright.kernels.triton_tuning import choose

CHOICES = triton_tuning._HALF["rows"]


class Timed:
    """Runs of which the ``fastest``-th candidate takes least; ``too_large`` ones do not start."""

    def __init__(self, fastest, too_large=()):
        self.milliseconds = {config: float(config != CHOICES[fastest]) + 1 for config in CHOICES}
        self.too_large = [CHOICES[i] for i in too_large]
        self.runs = []

    def __call__(self, config):
        if config in self.too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")
        self.runs.append(config)
        Timed.last = self.milliseconds[config]


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(triton_tuning, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_tuning, "_path", lambda device: tmp_path / "cache" / "choices.json")
    monkeypatch.setattr(triton_tuning, "_chosen", {})

    def do_bench(work, **options):
        work()
        return Timed.last

    monkeypatch.setattr(triton_tuning, "do_bench", do_bench)


def ask(run, num_rows=1000, sizes=(64, 128, 8)):
    return choose("rows", torch.bfloat16, "ieee", sizes, num_rows, run)


def forget_all_but_the_file():
    triton_tuning._chosen.clear()


def test_the_fastest_is_taken_and_remembered():
    run = Timed(2)
    assert ask(run) == CHOICES[2]
    tried = len(run.runs)
    assert {*run.runs} == {*CHOICES}
    for num_rows in (1000, 512, 1023):  # the same power of two
        assert ask(run, num_rows) == CHOICES[2]
    assert len(run.runs) == tried
    assert ask(Timed(1), 1024) == CHOICES[1] and ask(Timed(3), sizes=(64, 256, 8)) == CHOICES[3]


def test_what_does_not_fit_is_left_out():
    assert ask(Timed(0, too_large=(0, 1))) == CHOICES[2]


def test_the_file_spares_another_process_the_timing():
    assert ask(Timed(2)) == CHOICES[2] and ask(Timed(1), 5000) == CHOICES[1]
    forget_all_but_the_file()
    silent = Timed(0)
    assert ask(silent) == CHOICES[2] and ask(silent, 5000) == CHOICES[1] and not silent.runs


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', "{"])
def test_a_file_that_is_not_ours_is_ignored(text):
    path = triton_tuning._path(0)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert ask(Timed(2)) == CHOICES[2]
    forget_all_but_the_file()
    assert ask(Timed(0)) == CHOICES[2]


def test_a_choice_holds_where_no_file_can_be_written(tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert ask(Timed(2)) == CHOICES[2] and ask(Timed(1)) == CHOICES[2]


@pytest.mark.parametrize("why", ["captured", "deterministic"])
def test_the_first_that_fits_is_taken_untimed(why, monkeypatch):
    if why == "captured":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run = Timed(3, too_large=(0,))
    assert ask(run) == CHOICES[1] and run.runs == [CHOICES[1]]
    assert not triton_tuning._path(0).exists()
