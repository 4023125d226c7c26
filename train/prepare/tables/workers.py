"""The other processes that fill the same folders: who owns a unit, who is still alive, whose work to take over.

RANK and WORLD_SIZE come from the environment, as every launcher sets them. Processes do not talk; each touches a
heartbeat file, and one whose file stands still is considered gone. Doing a unit twice is harmless: same bytes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.prepare.tables.progress import bar

BEAT_S = 2.0
LOST_S = 20.0  # a peer that has not moved for so long is gone


class Peers:
    """This process among `world`; a context manager while the heartbeat runs."""

    def __init__(self, dataset: Path, rank: int | None = None, world: int | None = None) -> None:
        self.rank = rank_here() if rank is None else rank
        self.world = _from_environment("WORLD_SIZE", 1) if world is None else world
        if not 0 <= self.rank < self.world:
            raise Halt(ExitCode.USAGE, f"RANK is {self.rank}, must be below WORLD_SIZE {self.world}")
        self.folder = dataset / ".peers"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: dict[int, tuple[int, float]] = {}
        self._started = time.monotonic()
        self._bar = bar(0, "")

    def __enter__(self) -> Peers:
        if self.world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._path(self.rank).unlink(missing_ok=True)
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if not path.name.endswith(f"-of-{self.world}"):  # of a killed group
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # peers are still at work
                self.folder.rmdir()

    def owns(self, unit: int) -> bool:
        """Whether unit number `unit` is this process's."""
        return unit % self.world == self.rank

    def progress(self, total: int, label: str, unit: str = "rows") -> Any:
        """A bar with the time left, on the first process only."""
        self._bar = bar(total if self.rank == 0 else 0, label, unit)
        return self._bar

    def tick(self, rows: int = 1) -> None:
        """Move the bar from inside a unit, which may take minutes."""
        self._bar.update(rows)

    def wait_for(
        self, files: Sequence[tuple[int, Path]], make: Callable[[int], None], ready: Callable[[int, Path], bool] | None = None
    ) -> None:
        """Return when every (unit, file) is there, or `ready`; units of peers that are gone are made here."""
        done = ready or (lambda _, path: path.exists())
        waiting = [(unit, path) for unit, path in files if not done(unit, path)]
        while waiting:
            signals.raise_if_asked("waiting for the other processes")
            lost = next((unit for unit, _ in waiting if not self._alive(unit % self.world)), None)
            if lost is not None:
                make(lost)
            else:
                time.sleep(0.1)
            waiting = [(unit, path) for unit, path in waiting if not done(unit, path)]

    def _alive(self, rank: int) -> bool:
        if rank == self.rank:
            return False
        now = time.monotonic()
        try:
            beat = self._path(rank).stat().st_mtime_ns
        except FileNotFoundError:
            beat = 0
        # Only changes count, timed by our own clock: the machines' clocks need not agree. A file left behind by a
        # killed process looks alive for LOST_S once.
        last, since = self._seen.get(rank, (0, self._started))
        if beat != last:
            self._seen[rank] = (beat, now)
            return True
        self._seen[rank] = (last, since)
        return now - since < LOST_S

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}-of-{self.world}"

    def _beat(self) -> None:
        while not self._stop.is_set():
            path = self._path(self.rank)
            with contextlib.suppress(FileNotFoundError):  # a peer that leaves removes the folder: next time then
                self.folder.mkdir(parents=True, exist_ok=True)
                path.touch()
                os.utime(path)
            self._stop.wait(BEAT_S)


def rank_here() -> int:
    """This process among those of the launcher. Raises Halt(USAGE)."""
    return _from_environment("RANK", 0)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise Halt(ExitCode.USAGE, f"{name} is {text!r}, must be a whole number")
    return int(text)
