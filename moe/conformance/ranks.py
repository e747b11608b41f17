"""Expert parallelism: two real processes beside one.

    one   two micro-batches, one after the other, every expert here
    two   each rank has one of them, and half of the experts

must agree in decision, output, gradients and the state after ``finish_step``. ``TwoRanks`` starts the processes once
and gives them one router after the other, because a start costs seconds.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layer import MoELayer, finish_step
from ..parallel import ExpertParallel
from .observe import difference, everything, objective, state_of
from .probe import Probe
from .registry import NotChecked, Violation, check
from .subject import Subject, mode, needs

TIMEOUT = 60.0
START = 120.0
GRACE = 5.0


@check
def two_ranks(subject: Subject) -> None:
    """On two ranks, each with a part of the batch and half of the experts, the decision, the output, the gradients and
    the state are those of one process that sees both parts."""
    needs(dist.is_available(), "this torch has no torch.distributed")
    needs(not dist.is_initialized(), "this process is a rank itself: run the kit outside torchrun")
    ranks = subject.ranks or TwoRanks.shared()
    routed = subject.router().expert_kinds.count("routed")
    sizes = (2, 1) if subject.long and routed % 2 == 0 else (2,) if routed % 2 == 0 else (1,)
    if routed % 2:
        subject.note(
            f"expert parallelism 2: {routed} routed experts do not divide over two ranks; data parallelism was"
        )
    for size in sizes:
        for training in (True, False):
            router = subject.router(training, torch.float64)
            parts = [
                subject.probe(samples=(0, 1, 2), length=6, seed=1, dtype=torch.float64),
                subject.probe(samples=(3, 4), length=6, seed=1, lengths=(6, 3), dtype=torch.float64),
            ]
            try:
                held = pickle.dumps(router)
            except Exception as error:
                raise NotChecked(f"another process cannot be given the router: {error}") from error
            job = {"router": held, "parts": parts, "size": size, "dim": subject.dim}
            where = f"{mode(router)}, two ranks at expert parallelism {size}: {parts[0]}; {parts[1]}"
            answers = ranks.run(job)
            for answer in answers:
                if answer["kind"] == "import":
                    raise NotChecked(
                        f"another process cannot import the router ({answer['text']}): put its class in a module"
                    )
            for rank, answer in enumerate(answers):
                if answer["kind"] == "error":
                    raise Violation(
                        on=where,
                        expected="a forward, a backward and finish_step on both ranks",
                        got=f"rank {rank}: {answer['text']}",
                        advice="the decision must not depend on the rank, and every rank must take part in every "
                        "collective",
                    )
            for rank in range(2):
                expected = _alone(job, rank)
                seen = answers[rank]["seen"]
                found = difference(seen, expected, 1e-9, parts[rank].length)
                if found:
                    raise Violation(
                        on=f"{where}, rank {rank}",
                        expected="what one process with every expert gives for both parts",
                        got=found,
                        advice="decide by the tokens and the context alone, never by the rank, the number of ranks or "
                        "the experts that live here; noise comes from context.noise",
                    )


def _layer(job: dict[str, Any], parallel: ExpertParallel) -> MoELayer:
    from ..experts import ExpertSpec

    layer = MoELayer(pickle.loads(job["router"]), ExpertSpec(job["dim"], 6, bias=True), parallel=parallel).double()
    return layer.train(layer.router.training)


def _step(layer: MoELayer, probe: Probe) -> dict[str, Tensor]:
    y, routing = layer(probe.x, probe.context)
    (objective(routing, probe) + y.square().sum()).backward()
    return everything(routing, probe) | {"output": y.detach()}


def _gradients(layer: MoELayer, mine: range) -> dict[str, Tensor | None]:
    grads = {f"gradient of router.{name}": p.grad for name, p in layer.router.named_parameters()}
    for name, parameter in layer.experts.named_parameters():
        grad = parameter.grad
        if grad is None:
            grad = torch.zeros_like(parameter)
        grads[f"gradient of experts.{name}"] = grad[mine.start : mine.stop] if len(grad) != len(mine) else grad
    return grads


def _alone(job: dict[str, Any], rank: int) -> dict[str, Tensor | None]:
    """What rank ``rank`` should see, computed in this process."""
    together, own = _layer(job, ExpertParallel()), _layer(job, ExpertParallel())
    seen: dict[str, Tensor | None] = {}
    for number, probe in enumerate(job["parts"]):
        part = _step(together, probe)
        if number == rank:
            seen |= part
    _step(own, job["parts"][rank])
    size, routed = job["size"], together.router.expert_kinds.count("routed")
    share = routed // size
    mine = range(rank % size * share, (rank % size + 1) * share)
    # a replicated parameter has the gradient of the own part until somebody averages; an expert has everybody's
    experts = _gradients(together if size == 2 else own, mine)
    seen |= {n: g for n, g in experts.items() if ".experts." in n or n.startswith("gradient of experts")}
    seen |= {n: g for n, g in _gradients(own, mine).items() if n.startswith("gradient of router")}
    finish_step(together)
    return seen | {f"buffer {name}": value for name, value in state_of(together.router).items()}


def _on_a_rank(job: dict[str, Any], parallel: ExpertParallel, rank: int) -> dict[str, Tensor | None]:
    layer = _layer(job, parallel)
    seen: dict[str, Tensor | None] = dict(_step(layer, job["parts"][rank]))
    seen |= _gradients(layer, range(len(layer.experts.w1)))
    finish_step(layer)
    return seen | {f"buffer {name}": value for name, value in state_of(layer.router).items()}


class RanksFailed(NotChecked):
    """The two processes did not start."""


class TwoRanks:
    """Two processes on gloo that serve one job after the other, through a folder of their own."""

    _shared: TwoRanks | None = None

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._jobs = 0

    @classmethod
    def shared(cls) -> TwoRanks:
        """The pair that every check of this process uses; ended with it."""
        import atexit

        if cls._shared is None:
            cls._shared = cls()
            atexit.register(cls._shared.close)
        return cls._shared

    def run(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """What each rank answers: {"kind": "seen" | "error" | "import", ...}.

        Raises:
            RanksFailed: the processes did not start.
        """
        if not self._processes:
            self._start()
        self._jobs += 1
        folder = Path(self._folder.name)
        _write(folder / f"job-{self._jobs}", job | {"path": [str(Path(entry).resolve()) for entry in sys.path]})
        for process in self._processes:
            process.stdin.write(f"{self._jobs}\n")
            process.stdin.flush()
        deadline = time.monotonic() + TIMEOUT
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < 2 and time.monotonic() < deadline:
            for rank in (0, 1):
                file = folder / f"answer-{self._jobs}-{rank}"
                if rank not in answers and file.exists():
                    answers[rank] = pickle.loads(file.read_bytes())
                    if answers[rank]["kind"] != "seen":
                        deadline = min(deadline, time.monotonic() + GRACE)  # the other may be waiting for it
                elif rank not in answers and self._processes[rank].poll() is not None:
                    answers[rank] = {"kind": "error", "text": f"the process ended\n{self._printed(rank)}"}
                    deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.005)
        if len(answers) < 2 or any(answer["kind"] == "error" for answer in answers.values()):
            late = [rank for rank in (0, 1) if rank not in answers]
            self.close()  # they may wait for each other
            failed = any(answer["kind"] == "error" for answer in answers.values())
            for rank in late:
                text = "waited for the other rank" if failed else f"no answer within {TIMEOUT:.0f} s"
                answers[rank] = {"kind": "seen", "seen": {}} if failed else {"kind": "error", "text": text}
        return [answers[0], answers[1]]

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gatewright-ranks-")
        folder = Path(self._folder.name)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if "lo" in [name for _, name in socket.if_nameindex()]:
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        # found as it was here, installed or not
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
        for rank in (0, 1):
            with open(folder / f"printed-{rank}", "w") as printed:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", __name__, str(folder), str(rank)],
                        stdin=subprocess.PIPE,
                        stdout=printed,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=folder,
                        text=True,
                    )
                )
        deadline = time.monotonic() + START
        while not all((folder / f"ready-{rank}").exists() for rank in (0, 1)):
            ended = [rank for rank in (0, 1) if self._processes[rank].poll() is not None]
            if ended or time.monotonic() > deadline:
                said = self._printed(ended[0] if ended else 0)
                self.close()
                raise RanksFailed(f"the two processes did not start: {said}")
            time.sleep(0.02)

    def _printed(self, rank: int) -> str:
        return (Path(self._folder.name) / f"printed-{rank}").read_text(errors="replace")[-1500:].strip()


def _write(file: Path, value: Any) -> None:
    """Whole or not at all, since another process waits for the file."""
    part = file.with_suffix(".part")
    part.write_bytes(pickle.dumps(value))
    part.rename(file)


def _serve(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    parallel = {size: ExpertParallel.create(size) for size in (1, 2)}
    _write(folder / f"ready-{rank}", rank)
    for line in sys.stdin:
        number = int(line)
        job = pickle.loads((folder / f"job-{number}").read_bytes())
        sys.path += [entry for entry in job["path"] if entry not in sys.path]
        try:
            pickle.loads(job["router"])
        except Exception as error:
            answer: dict[str, Any] = {"kind": "import", "text": f"{type(error).__name__}: {error}"}
        else:
            try:
                answer = {"kind": "seen", "seen": _on_a_rank(job, parallel[job["size"]], rank)}
            except Exception:
                answer = {"kind": "error", "text": traceback.format_exc(limit=-4)}
        _write(folder / f"answer-{number}-{rank}", answer)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # gloo's threads would wait for each other
