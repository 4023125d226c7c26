"""Brings the tiles of this process to its device, in plan order, from any plan step on.

The order comes from the plan alone; worker count, prefetch depth and restarts of the worker pool cannot change it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.config.stage import DataConfig
from train.data.dataset import TileDataset
from train.diffusion.objective import Batch

log = logging.getLogger("anix")
POOL_RETRIES = 2


class PlaceSampler(Sampler[tuple[int, int]]):
    """Places (plan step, tile number) of one process from `first_step` on."""

    def __init__(self, first_step: int, last_step: int, tiles: range) -> None:
        self.first_step, self.last_step, self.tiles = first_step, last_step, tiles

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.first_step, self.last_step):
            for number in self.tiles:
                yield step, number

    def __len__(self) -> int:
        return max(self.last_step - self.first_step, 0) * len(self.tiles)


class Loader:
    """Owner of the worker pool. `next_update()` gives the batches of the next plan step for this process.

    A worker that dies or stays silent is replaced together with its pool, from the place reached; after
    two such repairs in a row it is Halt(UNEXPECTED) naming the images in flight. Where workers lack shared memory
    or descriptors, there are fewer of them from then on, at last none.
    """

    def __init__(
        self,
        dataset: TileDataset,
        data: DataConfig,
        device: torch.device,
        *,
        tiles: range,
        first_step: int,
        last_step: int,
    ) -> None:
        self.dataset, self.data, self.device, self.tiles = dataset, data, device, tiles
        self.last_step = last_step
        self.step = first_step
        self.wait_s = 0.0  # time the training waited for data in the last update
        self._number = 0  # tiles of `step` already handed out
        self._waiting: Batch | None = None
        self._first = first_step
        self._loader: Iterator[Batch | Halt] | None = None
        self._deaths = Deaths()
        self._lean = 0  # 1: one worker, one batch ahead; 2: batches are made in this process

    @property
    def workers(self) -> int:
        """Worker processes of the next pool."""
        return (self.data.workers, min(self.data.workers, 1), 0)[self._lean]

    def next_update(self) -> Iterator[Batch]:
        """The batches of the next plan step, on the device, one copy ahead of use."""
        self.wait_s = 0.0
        for number in range(len(self.tiles)):
            started = time.perf_counter()
            batch = self._waiting if self._waiting is not None else self._take()
            last = self.step + 1 >= self.last_step and number + 1 == len(self.tiles)
            # The next copy is queued before this batch is computed on, so it overlaps with the computation.
            self._waiting = None if last or self.device.type != "cuda" else self._take()
            self.wait_s += time.perf_counter() - started
            if batch.substituted:
                log.warning("unreadable images replaced in update %d: %s", batch.step, ", ".join(batch.substituted))
            yield batch
        self.step += 1

    def close(self) -> None:
        """Stop the workers."""
        loader, self._loader = self._loader, None
        if loader is not None and hasattr(loader, "_shutdown_workers"):
            loader._shutdown_workers()
        self._deaths.restore()

    def _take(self) -> Batch:
        batch = self._made()
        self._number += 1
        # A device tells of an error at whatever call comes next, often this one: it says nothing about the data.
        return batch.to(self.device) if self.device.type != "cpu" else batch

    def _made(self) -> Batch:
        """The next batch on the host."""
        for attempt in range(POOL_RETRIES + 1):
            try:
                if self._loader is None:
                    self._loader = self._open()
                with self._deaths.raised_here():
                    batch = next(self._loader)
                if isinstance(batch, Halt):
                    raise batch
                return batch
            except (Halt, torch.OutOfMemoryError, torch.AcceleratorError):  # the device's, by way of pinned memory
                self.close()
                raise
            except (RuntimeError, OSError, EOFError) as error:
                self.close()
                if not _pool_failure(error) or attempt == POOL_RETRIES:
                    raise self._explain(error) from error
                if self.workers and _shortage(error) and not (self._lean and "Bus error" in str(error)):
                    # A bus error may also come from a file cut under its map: never take that into this process.
                    self._lean += 1
                    less = "one worker, one batch ahead" if self.workers else "no workers"
                    lower = " and ".join(name for name in ("workers", "prefetch") if getattr(self.data, name) > 1)
                    log.warning(
                        "data workers lack shared memory or files (%s): %s from here on; enlarge /dev/shm%s",
                        _first_line(error), less, f" or lower data.{lower}" if lower else "",
                    )  # fmt: skip
                else:
                    log.warning("data workers failed (%s); starting them again", _first_line(error))
        raise AssertionError("unreachable")

    def _place(self) -> tuple[int, int]:
        """(plan step, index into this process's tiles) of the next batch to take."""
        return self._first + self._number // len(self.tiles), self._number % len(self.tiles)

    def _open(self) -> Iterator[Batch | Halt]:
        """An iterator over the places that have not been handed out yet."""
        step, skip = self._place()
        places = _Tail(PlaceSampler(step, self.last_step, self.tiles), skip)
        # The loader would draw its workers' seed from the global generator.
        generator = torch.Generator().manual_seed(0)
        workers: dict[str, Any] = {}
        if self.workers:
            workers = {
                "prefetch_factor": 1 if self._lean else self.data.prefetch,
                "timeout": self.data.worker_timeout_s,
                "multiprocessing_context": "fork",
                "worker_init_fn": _start_worker,
            }
        loader = iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                sampler=places,
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                generator=generator,
                **workers,
            )
        )
        if self.workers:
            self._deaths.guard()
        return loader

    def _explain(self, error: Exception) -> Halt:
        step, number = self._place()
        tile = self.dataset.plan.update(step)[self.tiles[number]]
        listed = ", ".join(
            f"{self.dataset.index.named(row)} (uid {uid:016x})"
            for row, uid in zip(tile.rows.tolist(), tile.uids.tolist(), strict=True)
        )
        help = "; fewer data.workers or data.workers=0 may help" if self.workers else ""
        return Halt(
            ExitCode.UNEXPECTED,
            f"data for update {step} could not be made: {_first_line(error)}; images in flight: {listed}{help}",
        )


class Deaths:
    """Owner of the signal that tells of a dead worker. torch raises at once, wherever the main thread happens to be,
    even between two parameters inside optimizer.step(); here it is raised where data is taken and nowhere else.
    """

    def __init__(self) -> None:
        self._raise: Callable[[int, FrameType | None], Any] | None = None  # torch's handler
        self._taking = self._seen = False

    def guard(self) -> None:
        """Stand before the handler that torch installed with the pool."""
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current != self._handle:
            self._raise = current
            signal.signal(signal.SIGCHLD, self._handle)

    def restore(self) -> None:
        """Give the signal back to torch."""
        if self._raise is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._raise)

    @contextlib.contextmanager
    def raised_here(self) -> Iterator[None]:
        """Inside, a worker's death is a RuntimeError at once, one seen since the last time included."""
        self._taking = True
        try:
            if self._seen and self._raise is not None:
                self._seen = False
                self._raise(signal.SIGCHLD, None)
            yield
        finally:
            self._taking = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._taking and self._raise is not None:
            self._raise(number, frame)
        else:
            self._seen = True


class _Tail(Sampler[tuple[int, int]]):
    """A sampler without its first `skip` places: where a replaced pool goes on inside an update."""

    def __init__(self, inner: PlaceSampler, skip: int) -> None:
        self.inner, self.skip = inner, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = iter(self.inner)
        for _ in range(self.skip):
            next(places)
        return places

    def __len__(self) -> int:
        return len(self.inner) - self.skip


def _start_worker(_: int) -> None:
    # Workers only slice memory maps and draw numbers; more threads would fight with the training for cores.
    torch.set_num_threads(1)
    gc.enable()  # which the training switches off
    signals.reset_in_worker()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _shortage(error: Exception) -> bool:
    """Whether workers could not hand over what they made; the loader gives their errors back without the number."""
    signs = ("shared memory", "Bus error", "shm", "Too many open files", "Cannot allocate memory")
    # A broken connection is a worker that died while handing over, not one that could not.
    plain = isinstance(error, OSError) and not isinstance(error, ConnectionError)
    return plain or any(sign in str(error) for sign in signs)


def _pool_failure(error: Exception) -> bool:
    """Whether the pool broke (dead or silent worker, no shared memory), as opposed to an error in our code."""
    text = str(error)
    # EOFError: the worker died between announcing a batch and handing over the file that holds it.
    return "DataLoader" in text or "shared memory" in text or isinstance(error, OSError | EOFError)
