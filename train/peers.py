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
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from train.exits import ExitCode, Halt
from train.masking import mask

BEAT_S = 1.0
SILENT_S = 3.0  # without a beat while being looked at: lost
STALE_S = 60.0  # without a beat of the main process while it works alone: lost
GRACE_S = 5.0  # for the main thread to leave by itself once another process has failed
_COLLECTIVE_SIGNS = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Wait timeout",  # a new group's members did not come
)

_STOPPED = "stopped: "  # instead of "done", in the key that the others wait for

log = logging.getLogger("anix")


class Watch:
    """Owner of the beat of this process. `step` is kept up to date by the loop, for messages."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.rank, self.world, self.step = rank, world, 0
        self._store = store
        self._calls = 0
        self._leaving = threading.Event()
        self._lock = threading.Lock()  # store clients answer one caller at a time
        self._thread: threading.Thread | None = None
        if world > 1:
            self._beat(0)
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop beating: this process is about to end in good order."""
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_S)
            self._thread = None

    def failed(self, error: BaseException) -> BaseException:
        """Tell the others that this process leaves because of `error`; what to raise.

        The failure of a collective becomes Halt(PEER_LOST) naming the process that is gone or left a note.
        """
        if self.world == 1:
            return error
        self._leaving.set()
        if not is_collective_error(error):
            code = error.code if isinstance(error, Halt) else ExitCode.UNEXPECTED
            if code != ExitCode.STOPPED:
                self._leave_note(f"{type(error).__name__}: {error}")
            return error
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        cause = self._who_failed()
        self._leave_note(f"waited in vain: {cause}")
        return Halt(ExitCode.PEER_LOST, f"update {self.step}: {cause} (rank {self.rank} saw: {_first_line(error)})")

    @contextlib.contextmanager
    def main_only(self, what: str) -> Iterator[bool]:
        """`with watch.main_only("export") as mine: if mine: ...`; the others leave the block after the main one.

        They raise Halt(PEER_LOST) when the main process falls silent for 60 s or fails in it, and Halt(STOPPED) as it
        does when it was asked to stop inside.
        """
        self._calls += 1
        key = f"done/{self._calls}"  # every process comes by in the same order
        if self.world == 1 or self.rank == 0:
            try:
                yield True
            except Halt as halt:
                if halt.code == ExitCode.STOPPED and self.world > 1:
                    self._set(key, f"{_STOPPED}{halt.message}")
                raise
            if self.world > 1:
                self._set(key, "1")
            return
        yield False
        self._wait_for_main(what, key)

    def _wait_for_main(self, what: str, key: str) -> None:
        beat, heard = None, time.monotonic()
        while not self._has(key):
            note, now = self._note(), self._get("beat/0")
            if note is not None:
                raise Halt(ExitCode.PEER_LOST, f"{what}: {note}")
            if now != beat:
                beat, heard = now, time.monotonic()
            if time.monotonic() - heard > STALE_S:
                raise Halt(ExitCode.PEER_LOST, f"{what}: the main process has not been heard from for {STALE_S:.0f} s")
            time.sleep(0.05)
        said = self._get(key) or ""
        if said.startswith(_STOPPED):
            raise Halt(ExitCode.STOPPED, said.removeprefix(_STOPPED))

    def _who_failed(self) -> str:
        """The note of the process that failed first, else the ranks that do not beat."""
        before = self._beats()
        end = time.monotonic() + SILENT_S
        while time.monotonic() < end:
            if (note := self._note()) is not None:
                return note
            time.sleep(0.1)
        after = self._beats()
        silent = [rank for rank in range(self.world) if rank != self.rank and before[rank] == after[rank]]
        if silent:
            return f"rank {', '.join(map(str, silent))} is gone or silent"
        return "a collective did not complete although every process is alive"

    def _watch(self) -> None:
        count = 0
        while not self._leaving.wait(BEAT_S):
            count += 1
            self._beat(count)
            if self._note() is not None and not self._leaving.wait(GRACE_S):
                # The main thread is inside a collective that nobody will answer, or hangs.
                print(f"rank {self.rank} at update {self.step}: {self._note()}; leaving", file=sys.stderr)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(ExitCode.PEER_LOST)

    def _beat(self, count: int) -> None:
        self._set(f"beat/{self.rank}", str(count))

    def _beats(self) -> list[str | None]:
        return [self._get(f"beat/{rank}") for rank in range(self.world)]

    def _leave_note(self, text: str) -> None:
        if not self._has("note"):
            self._set("note", json.dumps({"rank": self.rank, "step": self.step, "text": mask(_first_line(text))}))

    def _note(self) -> str | None:
        """What another process said before it left."""
        text = self._get("note")
        if text is None:
            return None
        note = json.loads(text)
        return (
            None
            if note["rank"] == self.rank
            else f"rank {note['rank']} failed at update {note['step']}: {note['text']}"
        )

    def _set(self, key: str, value: str) -> None:
        with self._lock, contextlib.suppress(RuntimeError):  # the store went with the process that kept it
            self._store.set(f"anix/{key}", value)

    def _has(self, key: str) -> bool:
        with self._lock:
            try:
                return bool(self._store.check([f"anix/{key}"]))
            except RuntimeError:
                return False

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
def watching(rank: int, world: int) -> Iterator[Watch]:
    """The watch of this process for the length of a stage; an exception that leaves is told to the others."""
    watched = watch(rank, world)
    try:
        yield watched
    except BaseException as error:
        reason = watched.failed(error)
        if reason is error:
            raise
        raise reason from error
    finally:
        watched.close()


def is_collective_error(error: BaseException) -> bool:
    """Whether a collective failed, as opposed to code of ours."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _COLLECTIVE_SIGNS)


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]
