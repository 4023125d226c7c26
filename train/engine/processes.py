"""Processes that watch one another: who is lost, who is still working, and how all of them leave.

Nothing here is a collective. Every process beats into the rendezvous store; one that fails leaves a note there before
it goes, so that the others can name it; work of the main process alone is waited for by looking at its beats, not
inside a collective whose timeout belongs to the training.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.base.secrets import mask
from train.storage.rundir import RunDir

BEAT_S = 1.0
SILENT_S = 3.0  # without a beat while being looked at: lost
STALE_S = 60.0  # without a beat of the main process while it works alone: lost
GRACE_S = 5.0  # for the main thread to leave by itself once another process has failed
STORE_GONE_S = 2.0  # without a store, which goes with the launcher that keeps it; our signal comes at the same moment
_COLLECTIVE_SIGNS = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Wait timeout",  # a new group's members did not come
)

_NO_STORE = "the store is gone in which the processes met"
_STOPPED = "stopped: "  # instead of "done", in the key that the others wait for

log = logging.getLogger("anix")
LastWords = Callable[[ExitCode, str], object]


class Watch:
    """Owner of the beat of this process. `step` is kept up to date by the loop, for messages.

    `last_words` is called with code and reason before the process is ended from beside its main thread. `met` becomes
    true when every group of processes exists: until then none can do without the store.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.rank, self.world, self.step = rank, world, 0
        self._store = store
        self.last_words: LastWords = lambda code, reason: None
        self.met = False
        self._calls = 0
        self._alone = False  # the main process at work of its own: it ends that first, whoever else is gone
        self._processes: dict[int, tuple[str, int, str]] = {}  # rank: where it runs, its pid, when that began
        self._store_gone_at: float | None = None
        self._leaving = threading.Event()
        self._lock = threading.Lock()  # store clients answer one caller at a time
        self._thread: threading.Thread | None = None
        if world > 1:
            self._set(f"process/{rank}", json.dumps(_process(os.getpid())))
            self._beat(0)
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop beating: this process is about to end in good order."""
        if self.world > 1:
            self._set(f"left/{self.rank}", "1")
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_S)
            self._thread = None

    def failed(self, error: BaseException) -> BaseException:
        """Tell the others that this process leaves because of `error`; what to raise.

        The failure of a collective becomes a Halt naming the process that is gone or left a note: PEER_LOST, but on the
        main process, whose exit.json is the one that is read, with the code of the note.
        """
        if self.world == 1:
            return error
        self._leaving.set()
        if not is_collective_error(error):
            code = error.code if isinstance(error, Halt) else ExitCode.UNEXPECTED
            if code != ExitCode.STOPPED:
                kind = "" if isinstance(error, Halt) else f"{type(error).__name__}: "
                out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
                self._leave_note(ExitCode.OUT_OF_MEMORY if out_of_memory else code, f"{kind}{error}")
            return error
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._has("note")
        if self._store_gone_at is not None and signals.asked():  # others may have left before this one's last update
            return self._stopped()
        code, cause = self._who_failed()
        if code == ExitCode.PEER_LOST and self._stopped_while_starting():
            return self._stopped(cause)
        self._leave_note(ExitCode.PEER_LOST, f"waited in vain: {cause}")
        if code != ExitCode.PEER_LOST:  # known in full: what this process saw of it adds nothing
            return Halt(code, cause)
        return Halt(code, f"update {self.step}: {cause} (rank {self.rank} saw: {_first_line(error)})")

    @contextlib.contextmanager
    def main_only(self, what: str) -> Iterator[bool]:
        """`with watch.main_only("export") as mine: if mine: ...`; the others leave the block after the main one.

        They raise Halt(PEER_LOST) when the main process is gone, falls silent for 60 s or fails in it, and Halt(STOPPED)
        as it does when it was asked to stop inside.
        """
        self._calls += 1
        key = f"done/{self._calls}"  # every process comes by in the same order
        if self.world == 1 or self.rank == 0:
            self._alone = True
            try:
                yield True
            except Halt as halt:
                if halt.code == ExitCode.STOPPED and self.world > 1:
                    self._set(key, f"{_STOPPED}{halt.message}")
                raise
            finally:
                self._alone = False
            if self.world > 1:
                self._set(key, "1")
            return
        yield False
        self._wait_for_main(what, key)

    def _wait_for_main(self, what: str, key: str) -> None:
        beat, heard = None, time.monotonic()
        while not self._has(key):
            cause, now = self._cause(), self._get("beat/0")
            if cause is not None and not self._has(key):  # it may have ended in good order meanwhile
                if cause[0] == ExitCode.PEER_LOST and self._stopped_while_starting():
                    raise self._stopped(cause[1])
                raise Halt(ExitCode.PEER_LOST, f"{what}: {cause[1]}")
            if self._launcher_is_gone():
                raise self._stopped() if signals.asked() else Halt(ExitCode.PEER_LOST, f"{what}: {_NO_STORE}")
            if now != beat:
                beat, heard = now, time.monotonic()
            if time.monotonic() - heard > STALE_S:
                raise Halt(ExitCode.PEER_LOST, f"{what}: the main process has not been heard from for {STALE_S:.0f} s")
            time.sleep(0.05)
        said = self._get(key) or ""
        if said.startswith(_STOPPED):
            raise Halt(ExitCode.STOPPED, said.removeprefix(_STOPPED))

    def _who_failed(self) -> tuple[ExitCode, str]:
        """The note of the process that failed first, else the ranks that do not beat; the code to leave with."""
        before = self._beats()
        end = time.monotonic() + SILENT_S
        while time.monotonic() < end:
            if (cause := self._cause()) is not None:
                return cause
            time.sleep(0.1)
        after = self._beats()
        silent = [rank for rank in range(self.world) if rank != self.rank and before[rank] == after[rank]]
        if silent:
            return ExitCode.PEER_LOST, f"rank {', '.join(map(str, silent))} is gone or silent"
        return ExitCode.PEER_LOST, "a collective did not complete although every process is alive"

    def _watch(self) -> None:
        count, since = 0, None
        while not self._leaving.wait(BEAT_S):
            count += 1
            self._beat(count)
            cause = None if self._alone else self._cause()
            if not self.met and self._launcher_is_gone():  # the main thread may look for the store for many minutes
                stopped = self._stopped()
                self._end(*((stopped.code, stopped.message) if signals.asked() else (ExitCode.PEER_LOST, _NO_STORE)))
            since = None if cause is None else since or time.monotonic()
            if cause is not None and since is not None and time.monotonic() - since > GRACE_S:
                # The main thread is inside a collective that nobody will answer, or hangs.
                if cause[0] == ExitCode.PEER_LOST and self._stopped_while_starting():
                    self._end(ExitCode.STOPPED, self._stopped(cause[1]).message)
                self._leave_note(ExitCode.PEER_LOST, f"waited in vain: {cause[1]}")
                self._end(cause[0], f"update {self.step}: {cause[1]}" if cause[0] == ExitCode.PEER_LOST else cause[1])

    def _end(self, code: ExitCode, reason: str) -> None:
        """Leave from beside the main thread."""
        print(f"rank {self.rank} at update {self.step}: {reason}; leaving", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self.last_words(code, reason)
        sys.stderr.flush()
        os._exit(code)

    def _launcher_is_gone(self) -> bool:
        """Whether the store has been gone for a while: torchrun keeps it."""
        if self._store_gone_at is None:
            self._has("note")
        gone_at = self._store_gone_at
        return gone_at is not None and time.monotonic() - gone_at > STORE_GONE_S

    def _stopped_while_starting(self) -> bool:
        """Whether a lost process is part of a stop: one that has no handlers yet dies of the signal that all received."""
        return signals.asked() and not self.met

    def _stopped(self, seen: str = "the launcher is gone") -> Halt:
        when = f"after update {self.step}" if self.step else "before the first update"
        return Halt(ExitCode.STOPPED, f"stopped by a signal {when}; {seen}: the same command goes on")

    def _beat(self, count: int) -> None:
        self._set(f"beat/{self.rank}", str(count))

    def _beats(self) -> list[str | None]:
        return [self._get(f"beat/{rank}") for rank in range(self.world)]

    def _leave_note(self, code: ExitCode, text: str) -> None:
        if not self._has("note"):
            note = {"rank": self.rank, "step": self.step, "code": int(code), "text": mask(_first_line(text))}
            self._set("note", json.dumps(note))

    def _cause(self) -> tuple[ExitCode, str] | None:
        """Why this process cannot go on: what another said before it left, or who is gone without a word.

        With it the code to leave with, on the main process that of the one who found something out.
        """
        text = self._get("note")
        if text is not None:
            note = json.loads(text)
            if note["rank"] == self.rank:
                return None
            code = ExitCode(note["code"]) if self.rank == 0 else ExitCode.PEER_LOST
            return code, f"rank {note['rank']} failed at update {note['step']}: {note['text']}"
        gone = [rank for rank in range(self.world) if rank != self.rank and self._is_gone(rank)]
        return (ExitCode.PEER_LOST, f"rank {', '.join(map(str, gone))} is gone") if gone else None

    def _is_gone(self, rank: int) -> bool:
        """Whether a process on this machine ended without leaving in good order; others are known by their beats."""
        if rank not in self._processes:
            text = self._get(f"process/{rank}")
            if text is None:
                return False
            place, pid, began = json.loads(text)
            self._processes[rank] = (place, pid, began)
        place, pid, began = self._processes[rank]
        if not place or place != _place() or _process(pid)[2] == began:
            return False
        return not self._has(f"left/{rank}") and self._store_gone_at is None

    def _set(self, key: str, value: str) -> None:
        with self._lock:
            try:
                self._store.set(f"anix/{key}", value)
            except RuntimeError:  # the store went with the process that kept it
                self._store_gone_at = self._store_gone_at or time.monotonic()

    def _has(self, key: str) -> bool:
        with self._lock:
            try:
                found = bool(self._store.check([f"anix/{key}"]))
            except RuntimeError:
                self._store_gone_at = self._store_gone_at or time.monotonic()
                return False
            self._store_gone_at = None
            return found

    def _get(self, key: str) -> str | None:
        if not self._has(key):
            return None
        with self._lock:
            try:
                return bytes(self._store.get(f"anix/{key}")).decode()
            except RuntimeError:
                return None


def watch(rank: int, world: int) -> Watch:
    """The watch of this process; does nothing in a world of one. Call after the process group exists."""
    if world == 1:
        return Watch(None, 0, 1)
    store = dist.distributed_c10d._get_default_store()
    # Its own connection: the training's store operations must not wait behind a beat.
    return Watch(store.clone() if hasattr(store, "clone") else store, rank, world)


@contextlib.contextmanager
def watching(rank: int, world: int, last_words: LastWords = lambda code, reason: None) -> Iterator[Watch]:
    """The watch of this process for the length of a stage; an exception that leaves is told to the others."""
    watched = watch(rank, world)
    watched.last_words = last_words
    try:
        yield watched
    except BaseException as error:
        reason = watched.failed(error)
        if reason is error:
            raise
        raise reason from error
    finally:
        watched.close()


@contextlib.contextmanager
def joining(run: RunDir, last_words: LastWords) -> Iterator[None]:
    """While the processes meet: a launcher that dies takes the meeting place along, and torch looks for it for minutes.

    From then on the run directory is known to be this run's, on every process.
    """
    met, reason = threading.Event(), "the launcher is gone, before the first update: the same command goes on"
    if signals.orphaned():  # all are; a stop that only some have heard of is agreed upon after they met
        raise Halt(ExitCode.STOPPED, reason)

    def look() -> None:
        while not met.wait(BEAT_S):
            if signals.orphaned() and not met.wait(GRACE_S):
                print(reason, file=sys.stderr, flush=True)
                last_words(ExitCode.STOPPED, reason)
                os._exit(ExitCode.STOPPED)

    thread = threading.Thread(target=look, name="joining", daemon=True)
    thread.start()
    try:
        yield
        run.met = True
    finally:
        met.set()
        thread.join()


def is_collective_error(error: BaseException) -> bool:
    """Whether a collective failed, as opposed to code of ours."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _COLLECTIVE_SIGNS)


def _place() -> str:
    """Which processes can see each other's ids: those of one kernel and one namespace. Empty where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, int, str]:
    """(place, pid, when it began): ids are used again. An empty time for one that has ended, also if unreaped."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return _place(), pid, ""
    return _place(), pid, "" if state in "ZX" else rest[18]


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]
