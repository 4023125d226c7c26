"""Saving in the background: copy the state to the host, go on training, write from a thread.

One save is in flight at most. A failure is reported at the next update and the third in a row ends the run.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.config.stage import CheckpointConfig
from train.storage import checkpoint
from train.storage.checkpoint import Progress, Tensors
from train.storage.manifest import committed
from train.storage.rundir import RunDir

log = logging.getLogger("anix")
FAILURES_ALLOWED = 2  # in a row; the next one ends the run
_HOST_MARGIN = 1.1  # of what the copy takes must be available on the host, else the save is a foreground one
_ARENA, _LEAST_ARENA = 1 << 30, 1 << 20  # bytes
_ALIGNMENT = 64  # bytes: a cache line, and any dtype's


@dataclass(frozen=True)
class SaveReport:
    """What became of one save. `stall_s` is what the training loop waited for it."""

    step: int
    path: Path | None  # None: not written
    reason: str  # empty when written
    bytes: int
    stall_s: float
    write_s: float


_Key = tuple[str, str]  # file of a checkpoint, name of the tensor


def arenas(sizes: Mapping[_Key, int]) -> list[tuple[int, dict[_Key, int]]]:
    """Few pieces of memory that hold `sizes` bytes by key: of each its bytes, a power of two, and its keys' offsets.

    Page-locked memory is handed out in powers of two and under a lock of the driver: one piece for each of a stage's 9,572
    tensors would take a third more than they hold. Largest first, so that small ones fill what is left over.
    """
    found, left = [], sorted(sizes, key=lambda key: -sizes[key])
    while left:
        rest = sum(_aligned(sizes[key]) for key in left)
        whole = max(_LEAST_ARENA, min(_ARENA, 1 << (rest.bit_length() - 1)), 1 << (_aligned(sizes[left[0]]) - 1).bit_length())
        offsets: dict[_Key, int] = {}
        end, later = 0, []
        for key in left:
            if end + _aligned(sizes[key]) <= whole:
                offsets[key] = end
                end += _aligned(sizes[key])
            else:
                later.append(key)
        found.append((whole, offsets))
        left = later
    return found


def _aligned(size: int) -> int:
    return max(1, -(-size // _ALIGNMENT)) * _ALIGNMENT


class HostCopy:
    """Owner of reusable host memory (pinned when the tensors live on a GPU), in which each tensor has its place."""

    def __init__(self) -> None:
        self.bytes = 0  # of the arenas
        self._buffers: dict[_Key, torch.Tensor] = {}  # views into them
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    def take(self, tensors: Tensors) -> Tensors:
        """Copies of all tensors. GPU copies may still be under way: see `wait_on_device` and `wait`."""
        named = _by_key(tensors)
        if self._stale(named):
            self.bytes, self._buffers = 0, {}
        self._make(named)
        if any(tensor.is_cuda for tensor in named.values()):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # None: a no-op
            for key, tensor in named.items():
                self._buffers[key].copy_(tensor.detach(), non_blocking=True)
        if self._stream is not None:
            self._event = torch.cuda.Event()
            self._event.record(self._stream)
        return {group: {name: self._buffers[group, name] for name in members} for group, members in tensors.items()}

    def missing_bytes(self, tensors: Tensors) -> int:
        """Host memory that `take` would still have to allocate."""
        named = _by_key(tensors)
        if self._stale(named):
            return max(0, sum(size for size, _ in arenas({key: t.nbytes for key, t in named.items()})) - self.bytes)
        return sum(size for size, _ in arenas(self._without_place(named)))

    def wait_on_device(self) -> None:
        """The GPU's next work on this stream starts after the copy; the host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def wait(self) -> None:
        """Returns when the copies are complete."""
        if self._event is not None:
            self._event.synchronize()

    def reserve(self, tensors: Tensors) -> None:
        """Allocate the memory and touch every page of it: the kernel hands it out at the first write.

        Places that exist stay as they are: a save may be being written from them.
        """
        self._make(_by_key(tensors), touch=True)

    def _make(self, named: Mapping[_Key, torch.Tensor], *, touch: bool = False) -> None:
        pinned = any(tensor.is_cuda for tensor in named.values())  # then its pages are there at once
        for size, offsets in arenas(self._without_place(named)):
            arena = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            if touch and not pinned:
                arena.zero_()
            self.bytes += size
            for key, offset in offsets.items():
                tensor = named[key]
                self._buffers[key] = arena[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _without_place(self, named: Mapping[_Key, torch.Tensor]) -> dict[_Key, int]:
        return {key: tensor.nbytes for key, tensor in named.items() if key not in self._buffers}

    def _stale(self, named: Mapping[_Key, torch.Tensor]) -> bool:
        """Whether a place belongs to no tensor, or to one of another shape or dtype: then all is laid out anew."""
        return any(
            key not in named or (named[key].shape, named[key].dtype) != (buffer.shape, buffer.dtype)
            for key, buffer in self._buffers.items()
        )


def _by_key(tensors: Tensors) -> dict[_Key, torch.Tensor]:
    return {(group, name): tensor for group, members in tensors.items() for name, tensor in members.items()}


class Saver:
    """Owner of the writer thread, the host buffers and the count of failures; lives on rank 0."""

    def __init__(
        self,
        run: RunDir,
        settings: CheckpointConfig,
        *,
        permanent_every: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run, self.settings, self.permanent_every = run, settings, permanent_every
        self.busy_skips = 0
        self.last_write_s = 0.0
        self._stopping, self._finishing = stopping, threading.Event()
        self._copy, self._told = HostCopy(), False
        self._saving = threading.Lock()  # the last save may come from beside the main thread
        self._reserving: threading.Thread | None = None
        self._thread: threading.Thread | None = None
        self._reports: list[SaveReport] = []
        self._error: BaseException | None = None  # of the writer thread, not a failed write
        self._failures_in_a_row = 0

    @property
    def reserved(self) -> bool:
        """Whether `reserve` was called."""
        return self._reserving is not None

    def reserve(self, tensors: Tensors) -> None:
        """Allocate the host buffers of the first background save beside the training, which else takes thrice as long.

        Only shapes and dtypes of `tensors` are looked at. After a save there is nothing left to allocate.
        """
        self._reserving = threading.Thread(target=self._reserve, args=(tensors,), name="checkpoint-buffers")
        self._reserving.start()

    def _reserve(self, tensors: Tensors) -> None:
        with contextlib.suppress(RuntimeError, MemoryError):  # then the save itself tries, and tells
            if self.settings.background and self._fits(tensors):
                self._copy.reserve(tensors)

    def _fits(self, tensors: Tensors) -> bool:
        return self._copy.missing_bytes(tensors) * _HOST_MARGIN <= available_host_bytes()

    def save(self, progress: Progress, tensors: Tensors, state: Mapping[str, Any]) -> bool:
        """Start the save of an interval; False when one is still in flight and `when_busy` is skip."""
        with self._saving:
            return self._save(progress, tensors, state)

    def save_whole(self, progress: Progress, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """As `save`, after the one in flight, and return once it is written; a failure is reported like any other."""
        with self._saving:
            self._join()
            self._save(progress, tensors, state)
            self._join()

    def _save(self, progress: Progress, tensors: Tensors, state: Mapping[str, Any]) -> bool:
        start = time.perf_counter()
        if self._thread is not None and self._thread.is_alive() and self.settings.when_busy == "skip":
            self.busy_skips += 1
            self._reports.append(SaveReport(progress.step, None, "the previous save is still being written", 0, 0, 0))
            return False
        self._join()
        self.raise_failures()
        faults.at("snapshot", progress.step)
        state = copy.deepcopy(dict(state))
        copies = self._copies(tensors) if self.settings.background else None
        if copies is None:
            self._write(progress, tensors, state, start, background=False)
            self.raise_failures()
            return True
        self._thread = threading.Thread(
            target=self._write, args=(progress, copies, state, start, time.perf_counter()), name="checkpoint-writer"
        )
        self._thread.start()
        return True

    def _copies(self, tensors: Tensors) -> Tensors | None:
        """What to write from in the background; None where the host has no memory for it, which is said once."""
        try:
            if self._fits(tensors):
                return self._copy.take(tensors)
            why = f"{self._copy.missing_bytes(tensors) / 1e9:.1f} GB more are needed"
        except Exception as failure:  # page-locked memory may be refused where ordinary memory is plenty
            self._copy, why = HostCopy(), f"{type(failure).__name__}: {failure}"
        if not self._told:
            log.warning("no host memory for saving in the background (%s): the training waits for each save", why)
        self._told = True
        return None

    def save_now(
        self, progress: Progress, tensors: Tensors, state: Mapping[str, Any], *, permanent: bool = False
    ) -> Path:
        """Write in the foreground, after the one in flight: at a stop and at a stage's end.

        Raises Halt(CANNOT_WRITE) when it fails.
        """
        with self._saving:
            self._join()
            permanent = permanent or self._first_past_a_multiple(progress.step)
            try:
                return checkpoint.save(
                    self.run, progress, tensors, state, self.settings, permanent=permanent, give_up=self._give_up
                )
            except checkpoint.SaveFailed as failure:
                raise Halt(ExitCode.CANNOT_WRITE, failure.strerror or str(failure)) from failure

    def reports(self) -> list[SaveReport]:
        """Saves that ended since the last call, failed ones with their reason."""
        found, self._reports = self._reports, []
        return found

    def raise_failures(self) -> None:
        """Call once per update: Halt(CANNOT_WRITE) after the third failed save in a row."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._failures_in_a_row > FAILURES_ALLOWED:
            last = next((r.reason for r in reversed(self._reports) if r.reason), "see the log")
            raise Halt(
                ExitCode.CANNOT_WRITE, f"{self._failures_in_a_row} checkpoints in a row could not be written: {last}"
            )

    def before_step(self) -> None:
        """Call before the weights change: they must not while they are being copied."""
        self._copy.wait_on_device()

    def finish(self) -> None:
        """Wait for the save in flight. Leaving the run any other way would lose it."""
        self._finishing.set()
        self._join()

    def _first_past_a_multiple(self, step: int) -> bool:
        """Whether the first checkpoint at or after a multiple of `permanent_every`, which saves seldom meet exactly."""
        steps = (other for other, _, m in committed(self.run.checkpoints) if m.run_id == self.run.run_id)
        before = max((other for other in steps if other < step), default=0)
        return step // self.permanent_every > before // self.permanent_every

    def _give_up(self) -> bool:
        return self._finishing.is_set() or self._stopping() or not threading.main_thread().is_alive()

    def _join(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self, progress: Progress, tensors: Tensors, state: Mapping[str, Any], start: float,
        copied: float | None = None, *, background: bool = True,
    ) -> None:  # fmt: skip
        path, reason = None, ""
        try:
            if background:
                self._copy.wait()
            permanent = self._first_past_a_multiple(progress.step)
            path = checkpoint.save(
                self.run, progress, tensors, state, self.settings, permanent=permanent, give_up=self._give_up
            )
            self._failures_in_a_row = 0
        except OSError as failure:  # SaveFailed, or the checkpoints cannot be listed
            reason = failure.strerror or str(failure)
            self._failures_in_a_row += 1
        except BaseException as error:
            if not background:
                raise
            self._error = error
            reason = f"{type(error).__name__}: {error}"
        end = time.perf_counter()
        self.last_write_s = end - start
        stall = (copied if copied is not None else end) - start
        size = checkpoint.checkpoint_bytes(tensors)
        self._reports.append(SaveReport(progress.step, path, reason, size, stall, end - start))


def available_host_bytes() -> int:
    """Host memory that can still be taken: the kernel's estimate, or the control group's limit where lower."""
    available = 1 << 62
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kb = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
        available = kb * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            available = min(available, int(limit) - used)
    except (OSError, ValueError, StopIteration):
        pass  # not Linux, or no control group: nothing to refuse by
    return available
