"""Notes between processes over the store in which they met: one thread talks to it, everybody else reads what it heard.

A call into the store may not come back for a quarter of an hour: the connection to a machine that is cut off without a
word stays open. So nobody waits for the store but that thread, and whoever decides looks at when it answered last.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BEAT_S = 1.0
HURRY_S = 0.1  # between two rounds while somebody waits for a key
LEFT = "left"  # instead of a count, as the last beat of a process that ends in good order


class Store(Protocol):
    """What is asked of torch's stores. RuntimeError: it went with the process that kept it."""

    def set(self, key: str, value: str, /) -> object:
        """Write."""

    def get(self, key: str, /) -> bytes:
        """Read what exists."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all exist."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> object:
        """Write unless there is another than `expected`; "" = none."""


@dataclass(frozen=True)
class Heard:
    """The last value of a key, and when it was heard first (monotonic seconds)."""

    value: str
    since: float


class Board:
    """Owner of the thread that talks to the store: it writes this process's beat, what was put, and looks up what was asked.

    `answered_at` is when the store answered last, `began_at` when it was asked for that; `gone_at` since when it refuses,
    which is what a launcher's death looks like. The lock is never held inside a store call.
    """

    def __init__(self, store: Store, beat: str) -> None:
        self.began_at = self.answered_at = self.opened_at = time.monotonic()
        self.gone_at: float | None = None
        self._store, self._beat = store, beat
        self._heard: dict[str, Heard] = {}
        self._wanted: set[str] = set()
        self._out: list[tuple[str, str, bool]] = []
        self._begun = self._ended = 0  # rounds
        self._asked = self._closing = False
        self._hurry = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._talk, name="store", daemon=True)
        self._thread.start()

    def put(self, key: str, value: str, *, once: bool = False) -> None:
        """Have it written; with `once` only where nobody wrote before."""
        with self._changed:
            self._out.append((key, value, once))
            self._changed.notify_all()

    def look(self, key: str, *, fixed: bool = False) -> Heard | None:
        """What the last round heard of a key, which from then on is looked up in every round; `fixed`: until it is there."""
        with self._changed:
            heard = self._heard.get(key)
            (self._wanted.discard if fixed and heard else self._wanted.add)(key)
            return heard

    def read(self, key: str, *, fixed: bool = False) -> str | None:
        """The value of `look`."""
        heard = self.look(key, fixed=fixed)
        return None if heard is None else heard.value

    def fresh(self, within_s: float) -> bool:
        """Returns when a round is over that began after this call and wrote what was put before.

        False: not in time, or the store refuses, which it will not stop to do.
        """
        with self._changed:
            goal, self._asked = self._begun + 1, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended >= goal or self.gone_at is not None, within_s)
            return self._ended >= goal and self.gone_at is None

    @contextlib.contextmanager
    def hurrying(self) -> Iterator[None]:
        """Inside, rounds follow one another quickly."""
        with self._changed:
            self._hurry += 1
            self._asked = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._hurry -= 1

    def close(self, within_s: float) -> None:
        """Write what was put and the last beat, and end the thread; one that is inside the store is left there."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(within_s)

    def _talk(self) -> None:
        count, beat_at = 0, time.monotonic()
        while True:
            with self._changed:
                pause_s = beat_at - time.monotonic()
                if self.gone_at is not None:  # every refusal costs torch a printed stack
                    self._changed.wait_for(lambda: self._closing, max(pause_s, 0.0))
                else:
                    pause_s = min(HURRY_S, pause_s) if self._hurry else pause_s
                    self._changed.wait_for(lambda: self._asked or self._closing or bool(self._out), max(pause_s, 0.0))
                out, self._out, self._asked, closing = self._out, [], False, self._closing
                wanted, self._begun = sorted(self._wanted), self._begun + 1
            if closing:
                out.append((self._beat, LEFT, False))
            elif time.monotonic() >= beat_at:
                out.append((self._beat, str(count), False))
                count, beat_at = count + 1, time.monotonic() + BEAT_S
            self._round(out, wanted)
            if closing:
                return

    def _round(self, out: list[tuple[str, str, bool]], wanted: list[str]) -> None:
        found: dict[str, str] | None = {}
        began = time.monotonic()
        try:
            self._store.check([f"anix/{self._beat}"])  # a round with nothing to say asks all the same
            for key, value, once in out:
                if once:
                    self._store.compare_set(f"anix/{key}", "", value)
                else:
                    self._store.set(f"anix/{key}", value)
            found = {k: bytes(self._store.get(f"anix/{k}")).decode() for k in wanted if self._store.check([f"anix/{k}"])}
        except RuntimeError:
            found = None
        now = time.monotonic()
        with self._changed:
            if found is None:
                self.gone_at = self.gone_at or now
            else:
                self.began_at, self.answered_at, self.gone_at = began, now, None
                for key, value in found.items():
                    if key not in self._heard or self._heard[key].value != value:
                        self._heard[key] = Heard(value, now)
            self._ended = self._begun
            self._changed.notify_all()
