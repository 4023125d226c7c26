"""Processes that watch one another: who is lost, who is still working, and how all of them leave.

Nothing here is a collective. Every process beats on a board (`train.base.board`); one that fails leaves a note there
before it goes, so that the others can name it; work of the main process alone is waited for by looking at its beats, not
inside a collective whose timeout belongs to the training. The main process looks at the beats of all, the others at its.
A launcher ends the processes of its own machine when one of them ends; of other machines it knows nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from train.base import signals
from train.base.board import BEAT_S, LEFT, Board
from train.base.errors import ExitCode, Halt
from train.base.secrets import mask
from train.engine import postmortem
from train.storage.rundir import RunDir

SILENT_S = 3.0  # without a beat after a collective has failed: lost
STALE_S = 30.0  # without a beat, or without an answer of the store, at any time: lost
GRACE_S = 5.0  # for the main thread to leave by itself once another process has failed
STORE_GONE_S = 2.0  # without a store, which goes with the launcher that keeps it; our signal comes at the same moment
HANGS_AT = 0.9  # of launch.collective_timeout_s, on a card: the rest is for the last save
RESCUE_S = 600.0  # for the last save, beside a main thread that does not come back; a disk may hang too
CLOSE_S = 5.0  # for the last words to reach the store
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

    A process is ended from beside its main thread when that one does not come back: then `rescue` saves what there is to
    save, and `last_words` is called with code and reason; `written` leaves what is known of the collectives. `met` becomes
    true when every group of processes exists: until then none can do without the store. An update that takes longer than
    `limit_s` from `updating_at` on hangs.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.rank, self.world, self.step = rank, world, 0
        self.last_words: LastWords = lambda code, reason: None
        self.rescue: Callable[[], object] = lambda: None
        self.written: Callable[[], object] = lambda: None
        self.met = False
        self.updating_at: float | None = None
        self.limit_s = float("inf")
        self._calls = 0
        self._said = ""  # by the main process, when it was done with work of its own
        self._alone = False  # the main process at work of its own: it ends that first, whoever else is gone
        self._leaving = threading.Event()
        self._leaver: int | None = None  # the thread that ends this process
        self._claims = threading.Lock()
        self._dead_at: dict[int, float] = {}
        if world > 1:
            self._board = Board(store, f"beat/{rank}")
            self._board.put(f"process/{rank}", json.dumps([socket.gethostname(), *_process(os.getpid())]))
            self._cause()  # names what the board shall look for
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def close(self) -> None:
        """Stop beating: this process is about to end in good order."""
        if self.world > 1:
            self._claim()
            self._leaving.set()
            self._board.close(CLOSE_S)

    def failed(self, error: BaseException) -> BaseException:
        """Tell the others that this process leaves because of `error`; what to raise.

        The failure of a collective becomes a Halt naming the process that is gone or left a note: PEER_LOST, but on the
        main process, whose exit.json is the one that is read, with the code of the note.
        """
        if self.world == 1:
            return error
        self._claim()
        self._leaving.set()
        if not is_collective_error(error):
            code = error.code if isinstance(error, Halt) else ExitCode.UNEXPECTED
            if code != ExitCode.STOPPED:
                kind = "" if isinstance(error, Halt) else f"{type(error).__name__}: "
                out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
                self._leave_note(ExitCode.OUT_OF_MEMORY if out_of_memory else code, f"{kind}{error}")
            return error
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self.written()
        self._board.fresh(SILENT_S)
        if self._board.gone_at is not None and signals.asked():  # others may have left before this one's last update
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

        They raise Halt(PEER_LOST) when the main process is gone, falls silent for 30 s or fails in it, and Halt(STOPPED)
        as it does when it was asked to stop inside.
        """
        self._calls += 1
        key, self._said = f"done/{self._calls}", ""  # every process comes by in the same order
        if self.world == 1 or self.rank == 0:
            self._alone = True
            try:
                yield True
            except Halt as halt:
                if halt.code == ExitCode.STOPPED and self.world > 1:
                    self._board.put(key, f"{_STOPPED}{halt.message}")
                raise
            finally:
                self._alone = False
            if self.world > 1:
                self._board.put(key, self._said or "1")
            return
        yield False
        with self._board.hurrying():
            self._wait_for_main(what, key)

    def _wait_for_main(self, what: str, key: str) -> None:
        while (said := self._board.read(key, fixed=True)) is None:
            if (cause := self._cause()) is not None:
                self._board.fresh(SILENT_S)
                if self._board.read(key, fixed=True) is not None:  # it ended in good order meanwhile
                    continue
                if cause[0] == ExitCode.PEER_LOST and self._stopped_while_starting():
                    raise self._stopped(cause[1])
                raise Halt(ExitCode.PEER_LOST, f"{what}: {cause[1]}")
            if self._launcher_is_gone():
                raise self._stopped() if signals.asked() else Halt(ExitCode.PEER_LOST, f"{what}: {_NO_STORE}")
            time.sleep(0.05)
        if said.startswith(_STOPPED):
            raise Halt(ExitCode.STOPPED, said.removeprefix(_STOPPED))
        self._said = said

    def from_main(self, what: str, make: Callable[[], str]) -> str:
        """What `make` gives on the main process, for every process; the others wait as in `main_only`."""
        with self.main_only(what) as mine:
            if mine:
                self._said = make()
        return self._said

    def _who_failed(self) -> tuple[ExitCode, str]:
        """The note of the process that failed first, else the ranks that do not beat; the code to leave with."""
        began = time.monotonic()
        others = [rank for rank in range(self.world) if rank != self.rank]
        while time.monotonic() < began + SILENT_S:
            if (cause := self._cause()) is not None:
                return cause
            for rank in others:
                self._board.look(f"beat/{rank}")
            time.sleep(0.1)
        if self._board.gone_at is None and self._board.answered_at < began:
            return ExitCode.PEER_LOST, self._unreachable(SILENT_S)
        beats = {rank: self._board.look(f"beat/{rank}") for rank in others}
        silent = [rank for rank, beat in beats.items() if beat is None or beat.since < began]
        if silent:
            return ExitCode.PEER_LOST, f"rank {', '.join(map(self._named, silent))} is gone or silent"
        return ExitCode.PEER_LOST, "a collective did not complete although every process is alive"

    def _watch(self) -> None:
        since: float | None = None
        while not self._leaving.wait(BEAT_S):
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

    def _end(self, code: ExitCode, reason: str) -> NoReturn:
        """Leave from beside the main thread."""
        self._claim()
        print(f"rank {self.rank} at update {self.step}: {reason}; leaving", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        rescue = threading.Thread(target=self.rescue, name="rescue", daemon=True)
        rescue.start()
        rescue.join(RESCUE_S)
        self.written()
        self.last_words(code, reason)
        sys.stderr.flush()
        os._exit(code)

    def _claim(self) -> None:
        """Returns for the first thread that asks, which is the one to end this process; the other sleeps until it has."""
        with self._claims:
            self._leaver = self._leaver or threading.get_ident()
        while self._leaver != threading.get_ident():
            time.sleep(BEAT_S)

    def _launcher_is_gone(self) -> bool:
        """Whether the store has been gone for a while: torchrun keeps it."""
        gone_at = self._board.gone_at
        return gone_at is not None and time.monotonic() - gone_at > STORE_GONE_S

    def _stopped_while_starting(self) -> bool:
        """Whether a lost process is part of a stop: one that has no handlers yet dies of the signal that all received."""
        return signals.asked() and not self.met

    def _stopped(self, seen: str = "the launcher is gone") -> Halt:
        when = f"after update {self.step}" if self.step else "before the first update"
        return Halt(ExitCode.STOPPED, f"stopped by a signal {when}; {seen}: the same command goes on")

    def _leave_note(self, code: ExitCode, text: str) -> None:
        note = {"rank": self.rank, "step": self.step, "code": int(code), "text": mask(_first_line(text))}
        self._board.put("note", json.dumps(note), once=True)

    def _cause(self) -> tuple[ExitCode, str] | None:
        """Why this process cannot go on: what another said before it left, or who is gone without a word.

        With it the code to leave with, on the main process that of the one who found something out.
        """
        text, heard_at = self._board.read("note"), self._board.answered_at
        if text is not None:
            note = json.loads(text)
            if note["rank"] == self.rank:
                return None
            code = ExitCode(note["code"]) if self.rank == 0 else ExitCode.PEER_LOST
            return code, f"rank {note['rank']} failed at update {note['step']}: {note['text']}"
        others = [rank for rank in range(self.world) if rank != self.rank]
        if gone := [rank for rank in others if self._is_gone(rank)]:
            return ExitCode.PEER_LOST, f"rank {', '.join(map(str, gone))} is gone"
        if self._board.gone_at is None and time.monotonic() - heard_at > STALE_S:
            return ExitCode.PEER_LOST, self._unreachable(STALE_S)
        # By the clock of the last answer: a store that is silent says nothing about who beats.
        watched = others if self.rank == 0 else others[:1]
        if silent := [rank for rank in watched if heard_at - self._beat_at(rank) > STALE_S]:
            return ExitCode.PEER_LOST, f"rank {', '.join(map(self._named, silent))} has not been heard from for {STALE_S:g} s"
        if self.updating_at is not None and time.monotonic() - self.updating_at > self.limit_s:
            return ExitCode.PEER_LOST, f"a collective did not end in {self.limit_s:g} s although every process is alive"
        return None

    def _beat_at(self, rank: int) -> float:
        """When the beat of a process changed last; now for one that left in good order."""
        beat = self._board.look(f"beat/{rank}")
        if beat is None:
            return self._board.opened_at
        return time.monotonic() if beat.value == LEFT else beat.since

    def _unreachable(self, silent_s: float) -> str:
        """What a store that does not answer means: it stands where rank 0 runs."""
        where = "the store in which the processes met" if self.rank == 0 else f"the machine of rank {self._named(0)}"
        return f"{where} cannot be reached: no answer for {silent_s:g} s"

    def _named(self, rank: int) -> str:
        """The rank, with its host where that is not this one."""
        host = json.loads(self._board.read(f"process/{rank}", fixed=True) or '[""]')[0]
        return f"{rank} on {host}" if host and host != socket.gethostname() else str(rank)

    def _is_gone(self, rank: int) -> bool:
        """Whether a process on this machine ended without leaving in good order; others are known by their beats."""
        text = self._board.read(f"process/{rank}", fixed=True)
        if text is None:
            return False
        _, place, pid, began = json.loads(text)
        if not place or place != _place() or _process(pid)[2] == began:
            return False
        dead_at = self._dead_at.setdefault(rank, time.monotonic())
        if self._board.gone_at is not None:
            return False
        # Its last words may be newer than what the board knows.
        return self._board.began_at > dead_at and self._board.read(f"beat/{rank}") != LEFT


def watch(rank: int, world: int) -> Watch:
    """The watch of this process; does nothing in a world of one. Call after the process group exists."""
    if world == 1:
        return Watch(None, 0, 1)
    store = dist.distributed_c10d._get_default_store()
    # Its own connection: the training's store operations must not wait behind a beat.
    return Watch(store.clone() if hasattr(store, "clone") else store, rank, world)


@contextlib.contextmanager
def watching(
    rank: int, world: int, last_words: LastWords = lambda code, reason: None, run: RunDir | None = None
) -> Iterator[Watch]:
    """The watch of this process for the length of a stage; an exception that leaves is told to the others."""
    watched = watch(rank, world)
    watched.last_words = last_words
    if run is not None:
        watched.written = partial(postmortem.write_collectives, run)
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        postmortem.record_collectives(run)
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
