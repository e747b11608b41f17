"""The harness itself: results by rank, failures with their traceback, nobody left waiting, and a fresh start after."""

import os
import threading
import time

import distributed
import pytest
import torch
import torch.distributed as dist
from distributed import RankDied, RankFailed, Ranks

pytestmark = pytest.mark.distributed


def check_sum(value):
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return total.item()


def check_one_fails():
    print("about to fail")
    if dist.get_rank() == 1:
        raise ValueError("rank 1 says no")
    dist.barrier()


def check_one_dies():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def check_sleep():
    time.sleep(60)


def check_threads(count):
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return os.getpid()


def test_processes_with_many_threads_are_replaced(monkeypatch):
    monkeypatch.setattr(distributed, "MANY_THREADS", 100)
    ranks = Ranks(1)
    try:
        first = ranks.run(check_threads, 3)
        assert ranks.run(check_threads, 150) == first
        assert ranks.run(check_threads, 0) != first
    finally:
        ranks.close()


def test_results_failures_and_fresh_starts():
    ranks = Ranks(2)
    try:
        assert ranks.run(check_sum, 5) == [11, 11]
        assert ranks.run(check_sum, value=1) == [3, 3]
        with pytest.raises(RankFailed, match=r"rank 1 of 2:[\s\S]*rank 1 says no[\s\S]*about to fail"):
            ranks.run(check_one_fails)
        with pytest.raises(RankDied, match="rank 0 of 2:\nthe process ended with 7"):
            ranks.run(check_one_dies)
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not finish within 1 s"):
            ranks.run(check_sleep, timeout=1)
        assert ranks.run(check_sum, 0) == [1, 1]
    finally:
        ranks.close()
