"""Worker processes for files that may hang, crash or eat memory: each job has a time limit, and a lost worker costs
one job. Results come in the order of the jobs, with a bounded number of them waiting.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from pebble import ProcessExpired, ProcessPool

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig

J = TypeVar("J")
R = TypeVar("R")
LOOK_S = 0.5  # how often a wait looks whether a signal came


@dataclass(frozen=True)
class Lost:
    """A job without result, and why: `timeout` or `crash`."""

    kind: str
    message: str


class Pool(Generic[J, R]):
    """`workers` processes that apply `function`, a function of a module; 0 = in this process, without limits."""

    def __init__(self, workers: int, function: Callable[[J], R], timeout_s: float, memory_bytes: int) -> None:
        self.count, self.function, self.timeout_s = workers, function, timeout_s
        # spawn, not fork: what torch and libvips hold in threads does not survive one. With `function` among the
        # arguments its imports are done before a worker takes its first job, whose clock they would eat.
        self._pool = ProcessPool(
            max(workers, 1),
            initializer=_begin,
            initargs=(memory_bytes, function),
            context=multiprocessing.get_context("spawn"),
        )

    @classmethod
    def of_pictures(cls, function: Callable[[J], R], settings: DatasetConfig) -> Pool[J, R]:
        """Workers that decode pictures: room for RGBA, its copy, RGB and one more channel set of the largest allowed."""
        return cls(settings.workers, function, settings.probe.timeout_s, 512 * 2**20 + 14 * settings.probe.max_pixels)

    def __enter__(self) -> Pool[J, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def map(self, jobs: Iterable[J]) -> Iterator[R | Lost]:
        """The result of every job, in order. Raises Halt: STOPPED between two when a signal asked for it, PEER_LOST
        when workers end that had nothing to do.
        """
        source = iter(jobs)
        if self.count == 0:
            for job in source:
                signals.raise_if_asked("pictures")
                yield self.function(job)
            return
        given: deque[Future[R]] = deque()
        while True:
            for job in islice(source, 4 * self.count - len(given)):
                given.append(self._pool.schedule(self.function, (job,), timeout=self.timeout_s))
            if not given:
                return
            yield self._result(given.popleft())

    def _result(self, future: Future[R]) -> R | Lost:
        while not wait([future], LOOK_S).done:
            signals.raise_if_asked("pictures")
        signals.raise_if_asked("pictures")  # before a worker that died of the same signal is taken for a crash
        try:
            return future.result()
        except TimeoutError:
            return Lost("timeout", f"not decoded within {self.timeout_s:g} s")
        except ProcessExpired as error:
            return Lost("crash", f"the decoder crashed (exit {error.exitcode})")
        except BrokenProcessPool as error:
            raise Halt(ExitCode.PEER_LOST, f"the processes that decode pictures were ended from outside ({error}); "
                       "what is finished is kept, the same command goes on") from error  # fmt: skip
        except Exception as error:
            return Lost("crash", f"the decoder failed ({type(error).__name__}: {error})")


def _begin(memory_bytes: int, _: object) -> None:
    signals.reset_in_worker()  # a decoder that hangs dies of the pool's SIGTERM, Ctrl-C is the parent's affair
    used = _virtual_bytes()
    if used and memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))


def _virtual_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
