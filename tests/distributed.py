"""Several processes for tests: started once, then given one check after the other, because a start costs seconds.

    def check_sum(value):                       # at module level: the processes import it by name
        total = torch.tensor(value + torch.distributed.get_rank())
        torch.distributed.all_reduce(total)
        return total.item()

    @pytest.mark.distributed
    def test_sum(ranks):
        assert ranks(2).run(check_sum, 5) == [11, 11]

``ranks(n)`` is n processes on gloo, one thread each, the same for every test of the session. ``run`` returns what the
check returned on each rank, and raises what it raised on the first that failed; the others are then ended and started
anew for the next check, since they may be waiting for it.

Process groups are never taken down (DeepSpeed keeps its own), and each has threads that wake now and then: a thousand
of them take both cores. So processes with too many threads are replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

TIMEOUT = 300.0
GRACE = 5.0
MANY_THREADS = 400


class RankFailed(AssertionError):
    """A check failed on a rank: its traceback, and the end of what it printed."""


class RankDied(RankFailed):
    """A process ended by itself, or was killed."""


class Ranks:
    """``size`` processes that run checks together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory()

    def run(self, check: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        """Runs ``check(*args, **kwargs)`` on every rank; returns the results in the order of ranks."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((check, args, kwargs))
        results: dict[int, Any] = {}
        threads = 0
        deadline = monotonic() + timeout
        failure = None
        while len(results) < self.size:
            waiting = [rank for rank in range(self.size) if rank not in results]
            ready = wait([self._pipes[rank] for rank in waiting], timeout=max(0.0, deadline - monotonic()))
            if not ready:
                break
            for rank in waiting:
                if self._pipes[rank] not in ready:
                    continue
                try:
                    good, results[rank], count = self._pipes[rank].recv()
                    threads = max(threads, count)
                except EOFError:
                    self._processes[rank].join(GRACE)
                    good, results[rank] = None, f"the process ended with {self._processes[rank].exitcode}"
                if not good and failure is None:
                    failure = (rank, good, results[rank])
                    deadline = min(deadline, monotonic() + GRACE)
        if failure is None and len(results) == self.size:
            if threads > MANY_THREADS:
                self.close()
            return [results[rank] for rank in range(self.size)]
        printed = self._printed()
        self.close()
        if failure is None:
            missing = [rank for rank in range(self.size) if rank not in results]
            raise TimeoutError(f"ranks {missing} of {self.size} did not finish within {timeout:.0f} s\n{printed}")
        rank, good, message = failure
        kind = RankDied if good is None else RankFailed
        raise kind(f"rank {rank} of {self.size}:\n{message}\n{printed}")

    def close(self) -> None:
        """Ends the processes; the next ``run`` starts them anew."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE if process.exitcode is None else 0)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            output = str(Path(self._folder.name) / f"rank-{rank}.txt")
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port, output), daemon=True)
            # read by libraries while the process starts, so before it does
            before = os.environ.get("OMP_NUM_THREADS")
            os.environ["OMP_NUM_THREADS"] = "1"
            try:
                process.start()
            finally:
                os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _printed(self) -> str:
        parts = []
        for rank in range(self.size):
            file = Path(self._folder.name) / f"rank-{rank}.txt"
            text = file.read_text(errors="replace") if file.exists() else ""
            parts.append(f"---- what rank {rank} printed last ----\n{text[-2000:]}")
        return "\n".join(parts)


def _serve(pipe: Connection, rank: int, size: int, port: int, output: str) -> None:
    """What a process does: joins the others, then runs check after check until the pipe closes."""
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, sys.stdout.fileno())
    os.dup2(sink, sys.stderr.fileno())
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    # where pip put ninja, which DeepSpeed looks for on the path
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if os.access(sys.prefix, os.W_OK):
        # what DeepSpeed compiles fits one environment: two that share the default folder compile again and again
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    while True:
        try:
            check, args, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, check(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        sys.stdout.flush()
        pipe.send((*answer, _count_threads()))


def _count_threads() -> int:
    """Of this process, those outside Python included; 1 where the system does not say."""
    tasks = Path("/proc/self/task")
    return sum(1 for _ in tasks.iterdir()) if tasks.exists() else 1


@pytest.fixture(scope="session")
def ranks():
    """``ranks(n)``: n processes, the same for every test."""
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        return pools.setdefault(size, Ranks(size))

    yield get
    for pool in pools.values():
        pool.close()
