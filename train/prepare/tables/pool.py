"""Worker processes for files that may hang, crash or eat memory: each job has a time limit, and a lost worker costs
one job. Results come in the order of the jobs, with a bounded number of them waiting.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from train.base import signals

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Lost:
    """A job without result, and why: `timeout` or `crash`."""

    kind: str
    message: str


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: int | None = None
    deadline: float = 0.0


class Pool(Generic[J, R]):
    """`workers` processes that apply `function`, a function of a module; 0 = in this process, without limits."""

    def __init__(self, workers: int, function: Callable[[J], R], timeout_s: float, memory_bytes: int) -> None:
        self.count, self.function, self.timeout_s, self.memory_bytes = workers, function, timeout_s, memory_bytes
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool[J, R]:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()  # idle workers end by themselves at the end of their input
            worker.process.kill()  # they ignore what asks politely, see signals.ignore_in_worker
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def map(self, jobs: Iterable[J]) -> Iterator[R | Lost]:
        """The result of every job, in order. Raises Halt(STOPPED) between two when a signal asked for it."""
        if self.count == 0:
            for job in jobs:
                signals.raise_if_asked("pictures")
                yield self.function(job)
            return
        source = enumerate(jobs)
        done: dict[int, R | Lost] = {}
        given, taken, more = 0, 0, True
        while more or taken < given:
            while more and given < taken + 4 * self.count and (worker := self._idle()) is not None:
                item = next(source, None)
                if item is None:
                    more = False
                    break
                given += 1
                worker.job, worker.deadline = item[0], time.monotonic() + self.timeout_s
                worker.pipe.send(item[1])
            if taken < given and taken not in done:
                self._collect(done)
            signals.raise_if_asked("pictures")  # before a worker that died of the same signal is taken for a crash
            while taken in done:
                yield done.pop(taken)
                taken += 1

    def _idle(self) -> _Worker | None:
        free = next((worker for worker in self._workers if worker.job is None), None)
        if free is None and len(self._workers) < self.count:
            free = self._start()
        return free

    def _start(self) -> _Worker:
        # spawn, not fork: a forked worker would keep its siblings' pipes open and outlive a killed parent.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.function, self.memory_bytes), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        try:
            worker.pipe.recv()  # its imports are done: the clock of the first job starts now
        except EOFError:
            signals.raise_if_asked("pictures")
            raise
        return worker

    def _collect(self, done: dict[int, R | Lost]) -> None:
        """Wait for a result, or for the next time limit."""
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        nearest = min(worker.deadline for worker in busy.values())
        for pipe in wait(list(busy), max(nearest - time.monotonic(), 0)):
            worker = busy[pipe]  # type: ignore[index]
            assert worker.job is not None
            try:
                done[worker.job] = worker.pipe.recv()
                worker.job = None
            except EOFError:
                worker.process.join()
                self._lose(worker, Lost("crash", f"the decoder crashed (exit {worker.process.exitcode})"), done)
        now = time.monotonic()
        for worker in busy.values():
            if worker.job is not None and now >= worker.deadline and not worker.pipe.poll():
                worker.process.kill()
                worker.process.join()
                self._lose(worker, Lost("timeout", f"not decoded within {self.timeout_s:g} s"), done)

    def _lose(self, worker: _Worker, lost: Lost, done: dict[int, R | Lost]) -> None:
        assert worker.job is not None
        done[worker.job] = lost
        worker.pipe.close()
        self._workers.remove(worker)


def _serve(pipe: Connection, function: Callable[[Any], Any], memory_bytes: int) -> None:
    signals.ignore_in_worker()
    used = _virtual_bytes()
    if used and memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    pipe.send(None)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):  # the parent is gone
            return
        pipe.send(function(job))


def _virtual_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
