"""What a process thinks of the others: by their beats, by the store's silence, and by what they said before they left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from train.base.errors import ExitCode, Halt
from train.engine import processes
from train.engine.processes import Watch

SOON_S = 1.5


class Line:
    """A connection to a real store that can be cut without a word: calls do not come back."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.passes = store, threading.Event()
        self.passes.set()

    def __getattr__(self, name: str) -> object:
        self.passes.wait()
        return getattr(self.store, name)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Line, Watch, Line, Watch]]:
    """The watches of a main process and another one; nobody is ended here."""
    monkeypatch.setattr(processes, "STALE_S", SOON_S)
    monkeypatch.setattr(processes, "GRACE_S", 1000.0)
    store = dist.HashStore()
    lines = Line(store), Line(store)
    watches = [Watch(line, rank, 2) for rank, line in enumerate(lines)]
    yield lines[0], watches[0], lines[1], watches[1]
    for line, watch in zip(lines, watches, strict=True):
        line.passes.set()
        watch.close()


def cause(watch: Watch, within_s: float = 10.0) -> tuple[ExitCode, str]:
    end = time.monotonic() + within_s
    while (found := watch._cause()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_a_cut_is_seen_from_both_sides_and_each_names_the_other(pair: tuple[Line, Watch, Line, Watch]) -> None:
    _, main, line, other = pair
    time.sleep(1.2)
    assert main._cause() is None and other._cause() is None
    line.passes.clear()
    assert cause(main) == (ExitCode.PEER_LOST, "rank 1 has not been heard from for 1.5 s")
    assert cause(other) == (ExitCode.PEER_LOST, "the machine of rank 0 cannot be reached: no answer for 1.5 s")


def test_a_main_process_that_is_silent_while_the_store_answers_is_named(pair: tuple[Line, Watch, Line, Watch]) -> None:
    line, main, _, other = pair
    line.passes.clear()
    assert cause(other) == (ExitCode.PEER_LOST, "rank 0 has not been heard from for 1.5 s")
    assert cause(main)[1].startswith("the store in which the processes met cannot be reached")


def test_a_short_cut_changes_nothing(pair: tuple[Line, Watch, Line, Watch]) -> None:
    _, main, line, other = pair
    for _ in range(3):
        line.passes.clear()
        time.sleep(SOON_S / 2)
        line.passes.set()
        other._board.fresh(10)
        main._board.fresh(10)
        assert main._cause() is None and other._cause() is None


def test_one_that_left_in_good_order_is_not_waited_for(pair: tuple[Line, Watch, Line, Watch]) -> None:
    _, main, _, other = pair
    other.close()
    time.sleep(SOON_S + 1)
    assert main._cause() is None


def test_a_failed_collective_on_a_cut_line_is_answered_without_the_store(pair: tuple[Line, Watch, Line, Watch]) -> None:
    """The main thread used to wait for a lock that the watching thread held inside the store: it stayed for ever."""
    _, main, line, other = pair
    line.passes.clear()
    began = time.monotonic()
    reason = other.failed(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms for recv"))
    assert time.monotonic() - began < 3 * processes.SILENT_S
    assert isinstance(reason, Halt) and reason.code == ExitCode.PEER_LOST
    assert "the machine of rank 0 cannot be reached" in reason.message and "Timed out waiting" in reason.message
    reason = main.failed(RuntimeError("gloo: Connection closed by peer"))
    assert isinstance(reason, Halt) and "rank 1" in reason.message and reason.code == ExitCode.PEER_LOST


def test_a_note_is_read_before_silence(pair: tuple[Line, Watch, Line, Watch]) -> None:
    _, main, _, other = pair
    other.failed(Halt(ExitCode.NON_FINITE, "the loss of 3 images is not finite"))
    found = cause(main)
    assert found == (ExitCode.NON_FINITE, "rank 1 failed at update 0: the loss of 3 images is not finite")


def test_one_thread_ends_the_process_and_the_other_waits(pair: tuple[Line, Watch, Line, Watch]) -> None:
    """While the last save is made beside the main thread, that one must not come back and change the weights."""
    _, main, _, _ = pair
    first = threading.Thread(target=main._claim)
    first.start()
    first.join()
    second = threading.Thread(target=lambda: main.failed(RuntimeError("gloo")), daemon=True)
    second.start()
    second.join(2.5)
    assert second.is_alive()
    main._leaver = None
