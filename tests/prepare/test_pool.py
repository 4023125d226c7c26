"""Workers that hang, crash or grow: one job lost, the others in order."""

from __future__ import annotations

import os
import time

import pytest

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
    assert [r for n, r in enumerate(results) if n not in (3, 5, 7)] == [n * n for n in range(30) if n not in (3, 5, 7)]


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
