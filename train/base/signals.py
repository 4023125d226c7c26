"""Being asked to stop: handlers set a flag, the loop reads it once per update. Standard library only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from train.base.errors import ExitCode, Halt

SECOND_INTERRUPT_S = 2.0  # a terminal and a launcher may both deliver one Ctrl-C
_PR_SET_PDEATHSIG = 1
_IMPORTED_BY = (os.getpid(), os.getppid())  # so early that the parent was certainly alive
# Only these start us as their child and vanish without a word; a shell's end must not stop a run under nohup.
_LAUNCHER_MARKS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "ANIX_LAUNCHED")


_latest: StopFlag | None = None  # signals are the process's, so is the flag that they set


class StopFlag:
    """Owner of the signal handlers. `name` is the first stop signal that arrived, None before."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.asked = False  # whether a stop was asked for
        self.stop_now: Callable[[], object] | None = None  # last words before an immediate stop
        self._interrupted_at: float | None = None
        self._before: dict[int, object] = {}

    @property
    def status(self) -> str:
        """For exit.json: `requeue` after SIGUSR1 (a scheduler's warning), else `stopped`."""
        return "requeue" if self.name == "SIGUSR1" else "stopped"

    def ask(self, name: str) -> None:
        """Ask for a stop as a signal of that name would."""
        self.name, self.asked = self.name or name, True

    def install(self) -> StopFlag:
        """Handle SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless it is ignored (nohup). Main thread only."""
        global _latest
        _latest = self
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Put the former handlers back."""
        global _latest
        _latest = None if _latest is self else _latest
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > SECOND_INTERRUPT_S:
                if self.stop_now is not None:
                    self.stop_now()
                os._exit(ExitCode.STOPPED)  # the last committed checkpoint stays valid whatever was under way
            self._interrupted_at = self._interrupted_at or now
        self.ask(signal.Signals(number).name)


def install(*, orphan: bool = False) -> StopFlag:
    """Handlers in place; with `orphan` also SIGTERM when a launcher dies. Main thread only."""
    stop = StopFlag().install()
    if orphan:
        pid, parent = _IMPORTED_BY
        watch_parent(stop, parent if pid == os.getpid() else os.getppid())
    return stop


def asked() -> bool:
    """Whether the last installed flag was asked to stop."""
    return _latest is not None and _latest.asked


def raise_if_asked(what: str) -> None:
    """Halt(STOPPED) when the last installed flag was asked to stop: for work in pieces that are kept."""
    if _latest is not None and _latest.asked:
        kept = "what is finished is kept, the same command goes on"
        raise Halt(ExitCode.STOPPED, f"{what}: stopped by a signal ({_latest.name}); {kept}")


def reset_in_worker() -> None:
    """For a worker: it inherits our handlers where it is forked, and would ignore its pool's SIGTERM and die of Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def orphaned() -> bool:
    """Whether a launcher started this process and is gone; known in any thread, before a handler had its turn."""
    pid, parent = _IMPORTED_BY
    return pid == os.getpid() and parent != os.getppid() and any(mark in os.environ for mark in _LAUNCHER_MARKS)


def watch_parent(stop: StopFlag, parent_pid: int) -> bool:
    """Ask Linux for SIGTERM when the launcher dies; True when it is being watched.

    `accelerate launch` with one process dies of a SIGTERM without passing it on, and the trainer would run on as
    an orphan. `parent_pid` is os.getppid() as the process began: a parent that died before this call is noticed.
    """
    if not sys.platform.startswith("linux") or not any(mark in os.environ for mark in _LAUNCHER_MARKS):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        return False
    if os.getppid() != parent_pid:
        stop.ask("SIGTERM")
    return True


def grace_warning(update_s: float, save_s: float, grace_s: float) -> str | None:
    """A warning when one update and one save do not fit between SIGTERM and SIGKILL."""
    if update_s + save_s <= grace_s:
        return None
    return (
        f"a stop needs {update_s:.0f} s for the update under way and {save_s:.0f} s to save, launch.grace_s says "
        f"{grace_s:.0f} s: raise what kills the run (TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300, Slurm --signal=USR1@300, "
        "Kubernetes terminationGracePeriodSeconds 300), then launch.grace_s"
    )
