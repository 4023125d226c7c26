"""The board: what is put is heard, who beats is seen to, and a store that does not come back holds up nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from train.base.board import LEFT, Board


class Shelf:
    """A store of one process: connections to it by name, each of which can be cut or closed."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}


class Line:
    """One connection: while it is cut, a call does not come back; once it is closed, every call fails."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf, self.passes, self.closed = shelf, threading.Event(), False
        self.passes.set()

    def _go(self) -> None:
        self.passes.wait()
        if self.closed:
            raise RuntimeError("Connection reset by peer")

    def set(self, key: str, value: str, /) -> None:
        self._go()
        self.shelf.held[key] = value

    def get(self, key: str, /) -> bytes:
        self._go()
        return self.shelf.held[key].encode()

    def check(self, keys: list[str], /) -> bool:
        self._go()
        return all(key in self.shelf.held for key in keys)

    def compare_set(self, key: str, expected: str, desired: str, /) -> None:
        self._go()
        if self.shelf.held.get(key, "") == expected:
            self.shelf.held[key] = desired


@pytest.fixture
def pair() -> Iterator[tuple[Line, Board, Line, Board]]:
    shelf = Shelf()
    lines = Line(shelf), Line(shelf)
    boards = [Board(line, f"beat/{rank}") for rank, line in enumerate(lines)]
    yield lines[0], boards[0], lines[1], boards[1]
    for line, board in zip(lines, boards, strict=True):
        line.passes.set()
        board.close(10)


def test_what_is_put_is_heard_once_and_by_the_first(pair: tuple[Line, Board, Line, Board]) -> None:
    _, one, _, other = pair
    one.put("note", "first", once=True)
    assert one.fresh(10)
    other.put("note", "second", once=True)
    assert other.look("note") is None  # never asked for before
    assert other.fresh(10)
    heard = other.look("note")
    assert heard is not None and heard.value == "first"
    assert other.fresh(10) and other.look("note") == heard  # the time is that of the change


def test_beats_go_on_by_themselves_and_the_last_says_so(pair: tuple[Line, Board, Line, Board]) -> None:
    _, one, _, other = pair
    other.look("beat/0")
    seen = set()
    end = time.monotonic() + 20
    while len(seen) < 3:
        assert time.monotonic() < end
        other.fresh(10)
        seen.add(other.read("beat/0"))
    one.close(10)
    assert other.fresh(10) and other.read("beat/0") == LEFT


def test_a_store_that_does_not_come_back_holds_up_nobody(pair: tuple[Line, Board, Line, Board]) -> None:
    """A call into it may take a quarter of an hour: nobody else is inside it, and no lock is held meanwhile."""
    _, one, line, other = pair
    other.look("beat/0")
    assert other.fresh(10)
    line.passes.clear()
    began = time.monotonic()
    assert not other.fresh(0.5)
    before = other.answered_at
    other.put("note", "in vain")
    assert other.look("beat/0") is not None and other.read("never") is None
    assert time.monotonic() - began < 5
    time.sleep(0.2)
    assert other.answered_at == before and other.gone_at is None, "silent is not gone"
    other.close(0.2)
    assert time.monotonic() - began < 10
    line.passes.set()  # healed: what was put arrives
    one.look("note")
    end = time.monotonic() + 10
    while one.read("note") is None:
        assert time.monotonic() < end
        one.fresh(10)


def test_a_store_that_is_gone_is_told_from_one_that_is_silent(pair: tuple[Line, Board, Line, Board]) -> None:
    _, _, line, other = pair
    line.closed = True
    assert not other.fresh(10) and other.gone_at is not None


def test_somebody_who_waits_hears_sooner_than_the_next_beat(pair: tuple[Line, Board, Line, Board]) -> None:
    _, one, _, other = pair
    with other.hurrying():
        other.look("done/1")
        other.fresh(10)
        one.put("done/1", "1")
        one.fresh(10)
        began = time.monotonic()
        while other.read("done/1", fixed=True) is None:
            time.sleep(0.01)
            assert time.monotonic() - began < 0.9
