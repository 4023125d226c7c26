"""A process, or the machine it runs on, falls silent: all leave within the limit, each naming the other, nothing is lost.

gloo's pairs connect the processes directly, so a proxy cuts the store alone; what a cut does to a collective is what a
process does that stands still: the other waits for it inside C, where no signal and no exception gets to it.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from lab import Lab
from proxy import Proxy, hosted

from train.engine import loop, processes
from train.engine.session import Session
from train.testing.chaos import kills
from train.testing.chaos.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STALE_S, GRACE_S = 8.0, 1.0
SILENT = f"has not been heard from for {STALE_S:g} s"
LONG = "launch.collective_timeout_s=600"  # the default: no collective gives up while we look


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 s are 8 here, until the restart; the children inherit it."""
    monkeypatch.setattr(processes, "STALE_S", STALE_S)
    monkeypatch.setattr(processes, "GRACE_S", GRACE_S)


@contextmanager
def proxied(lab: Lab, name: str, *settings: str, fault: str = "") -> Iterator[tuple[Ranks, Proxy]]:
    """Two ranks over a store like an agent's, the second behind a proxy."""
    with hosted() as port:
        proxy = Proxy(port)

        def store(rank: int) -> dist.Store:
            limit = datetime.timedelta(seconds=600)
            return dist.TCPStore("127.0.0.1", proxy.port if rank else port, 2, False, limit)

        launch = lab.start(name, LONG, *settings, world=2, fault=fault, timeout_s=600, store=store)
        try:
            yield launch, proxy
        finally:
            launch.send(signal.SIGKILL)
            launch.wait()
            proxy.close()


def test_a_silent_cut_ends_both_sides_each_naming_the_other(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(lab, "cut", fault="forward@5:1:hang") as (launch, proxy):
        lab.wait_for_update(launch, "cut", 5)
        proxy.cut()
        began = time.monotonic()
        assert launch.wait(60) == [9, 9], launch.text()
        assert time.monotonic() - began < STALE_S + GRACE_S + 15
    main, other = lab.exit("cut"), lab.exit("cut", 1)
    assert main["reason"].startswith(f"update 5: rank 1 {SILENT}")
    assert other["reason"] == f"update 5: the machine of rank 0 cannot be reached: no answer for {STALE_S:g} s"
    assert (main["update"], main["checkpoint"]) == (5, "checkpoints/step-00000005") and "lost" not in main
    assert 'File "' in launch.text(0) and 'File "' in launch.text(1)
    monkeypatch.undo()
    lab.must_equal_reference("cut", 2)


def test_a_short_cut_changes_nothing(lab: Lab) -> None:
    with proxied(lab, "short", fault="forward@*:1:sleep=0.3") as (launch, proxy):
        lab.wait_for_update(launch, "short", 3)
        proxy.cut()
        time.sleep(STALE_S / 2)
        proxy.heal()
        assert launch.wait(60) == [0, 0], launch.text()
    assert kills.compare_runs(lab.reference, lab.folder / "short") == []


def test_one_that_stands_still_is_lost_though_its_connections_are_open(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = lab.start("still", LONG, world=2, fault="forward@6:1:sleep=1", timeout_s=600)
    lab.wait_for_update(launch, "still", 6)
    launch.send(signal.SIGSTOP, 1)
    began = time.monotonic()
    while not launch.poll() and launch.codes[0] is None:
        time.sleep(0.05)
    assert launch.codes[0] == 9 and time.monotonic() - began < STALE_S + GRACE_S + 15, launch.text()
    launch.send(signal.SIGCONT, 1)  # and learns what became of the run
    assert launch.wait(30) == [9, 9], launch.text()
    main, other = lab.exit("still"), lab.exit("still", 1)
    assert main["reason"] == f"update 6: rank 1 {SILENT}" and main["checkpoint"] == "checkpoints/step-00000006"
    assert "rank 1" in other["reason"] or "rank 0" in other["reason"]
    monkeypatch.undo()
    lab.must_equal_reference("still", 2)


def blocked_in_c(*_: Any, **__: Any) -> None:
    """Never returns, to no signal and no exception: as a read of the device behind a collective that nobody answers."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


@pytest.mark.parametrize("sharding", ["none", "zero1"])
def test_the_last_update_is_saved_though_the_main_thread_never_returns(
    sharding: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL: the collective of a process that died ends neither with an error nor at all."""
    real, name, settings = dist.all_reduce, f"blocked-{sharding}", (LONG, f"optimizer.sharding={sharding}")

    def all_reduce(*arguments: Any, **named: Any) -> Any:
        if os.environ["RANK"] == "0" and len(kills.metrics(lab.folder / name)) >= 6:
            blocked_in_c()
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        launch = lab.start(name, *settings, world=2, timeout_s=600)
    lab.wait_for_update(launch, name, 6)
    launch.send(signal.SIGKILL, 1)
    began = time.monotonic()
    assert launch.wait(60) == [9, -signal.SIGKILL], launch.text()
    assert time.monotonic() - began < GRACE_S + 15
    assert "blocked_in_c" in launch.text(0)
    record = lab.exit(name)
    assert record["reason"] == "update 6: rank 1 is gone" and record["update"] == 6
    if sharding == "none":
        assert record["checkpoint"] == "checkpoints/step-00000006" and "lost" not in record
    else:
        assert record["checkpoint"] == "checkpoints/step-00000004"
        assert record["lost"].startswith("update 6 cannot be saved after a failure: with optimizer.sharding: zero1")
    monkeypatch.undo()
    lab.must_equal_reference(name, 2, *settings[1:])


def test_a_collective_that_hangs_among_the_living_ends_before_nccl_ends_the_process(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its timeout NCCL aborts without exit.json; on a card the watching thread is earlier, and saves."""
    real = loop.train

    def train(session: Session) -> None:
        session.run.watch.limit_s = 4.0
        real(session)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", train)
        launch = lab.start("living", LONG, world=2, fault="forward@6:1:hang", timeout_s=600)
    assert launch.wait(60) == [9, 9], launch.text()
    record = lab.exit("living")
    assert "update 6: " in record["reason"], record  # whoever of the two said it first
    assert "a collective did not end in 4 s although every process is alive" in record["reason"], record
    assert record["checkpoint"] == "checkpoints/step-00000006"
    monkeypatch.undo()
    lab.must_equal_reference("living", 2)


def test_between_two_updates_nothing_is_saved(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread hangs inside the optimizer's step: those weights are of no update."""
    fault = "optimizer@6:0:hang;optimizer@6:1:kill"
    launch = lab.start("stepping", LONG, world=2, fault=fault, timeout_s=600)
    assert launch.wait(60) == [9, -signal.SIGKILL], launch.text()
    record = lab.exit("stepping")
    assert record["checkpoint"] == "checkpoints/step-00000004"
    assert record["lost"] == "update 6 cannot be saved after a failure: its successor was being applied"
    monkeypatch.undo()
    lab.must_equal_reference("stepping", 2)
