"""Workers that hang, crash, grow or fail: one job lost, the others in order; none outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.prepare.tables.pool import Lost, Pool


def work(job: int) -> int:
    if job == 3:
        time.sleep(60)
    if job == 5:
        os._exit(11)
    if job == 7:
        try:
            return len(bytearray(2 << 30))
        except MemoryError:
            return -1
    if job == 9:
        raise ValueError("no picture")
    return job * job


@pytest.mark.parametrize("workers", [1, 2])
def test_one_job_lost_each(workers: int) -> None:
    started = time.monotonic()
    with Pool(workers, work, 1.5, 512 << 20) as pool:
        results = list(pool.map(range(30)))
    assert time.monotonic() - started < 30
    assert isinstance(results[3], Lost)
    assert results[3].kind == "timeout"
    assert isinstance(results[5], Lost)
    assert results[5].kind == "crash"
    assert results[7] == -1
    assert results[9] == Lost("crash", "the decoder failed (ValueError: no picture)")
    odd = (3, 5, 7, 9)
    assert [r for n, r in enumerate(results) if n not in odd] == [n * n for n in range(30) if n not in odd]


def test_in_this_process() -> None:
    with Pool(0, work, 1, 0) as pool:
        assert list(pool.map([1, 2])) == [1, 4]


def test_jobs_are_taken_as_needed() -> None:
    """A generator of a million jobs must not be read ahead."""
    taken = []

    def jobs() -> object:
        for number in range(10, 1_000_000):
            taken.append(number)
            yield number

    with Pool(1, work, 10, 0) as pool:
        results = pool.map(jobs())  # type: ignore[arg-type]
        assert next(results) == 100
        assert len(taken) < 20


def test_a_stop_does_not_wait_for_a_job_that_hangs() -> None:
    stop = signals.install()
    try:
        with Pool(2, work, 60, 0) as pool:
            results = pool.map([2, 3, 4])
            assert next(results) == 4
            asked = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Halt) as halt:
                next(results)
    finally:
        stop.restore()
    assert halt.value.code == ExitCode.STOPPED
    assert time.monotonic() - asked < 5
    assert multiprocessing.active_children() == []


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    """They end with their input."""
    program = (
        "import multiprocessing, os, time\nfrom train.prepare.tables.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    with Pool(2, os.path.getsize, 60, 0) as pool:\n"
        "        list(pool.map([__file__] * 8))\n"
        "        print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(program)
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in workers):
        time.sleep(0.05)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
