"""The way of tiles to the device: the same for any number of workers, and after workers die."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tilesets import make

from train.base.errors import ExitCode, Halt
from train.config.stage import DataConfig
from train.data.loader import Loader, PlaceSampler, _shortage
from train.diffusion.objective import Batch
from train.engine.ending import as_halt

CPU = torch.device("cpu")


def loader(data: Path, *, first: int = 0, last: int = 4, tiles: range = range(4), **settings: object) -> Loader:
    dataset = make(data)
    config = replace(DataConfig(path=str(data)), **{"workers": 0, **settings})  # type: ignore[arg-type]
    dataset.data = config
    return Loader(dataset, config, CPU, tiles=tiles, first_step=first, last_step=last)


def drain(source: Loader, updates: int) -> list[list[Batch]]:
    try:
        return [list(source.next_update()) for _ in range(updates)]
    finally:
        source.close()


def same(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    flat_a, flat_b = [x for update in a for x in update], [x for update in b for x in update]
    assert [len(update) for update in a] == [len(update) for update in b]
    return all(
        x.step == y.step and all(torch.equal(t, y.tensors()[name]) for name, t in x.tensors().items())
        for x, y in zip(flat_a, flat_b, strict=True)
    )


@pytest.fixture(scope="module")
def wanted(dataset: Path) -> list[list[Batch]]:
    """Four updates, made in this process."""
    return drain(loader(dataset), 4)


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 5), (3, 2)])
def test_workers_and_prefetch_change_nothing(
    workers: int, prefetch: int, dataset: Path, wanted: list[list[Batch]]
) -> None:
    assert same(drain(loader(dataset, workers=workers, prefetch=prefetch), 4), wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_starts_anywhere(workers: int, dataset: Path, wanted: list[list[Batch]]) -> None:
    assert same(drain(loader(dataset, first=2, workers=workers), 2), wanted[2:])


def test_processes_take_neighbouring_tiles(dataset: Path, wanted: list[list[Batch]]) -> None:
    parts = [drain(loader(dataset, tiles=range(r, r + 2)), 4) for r in (0, 2)]
    assert same([a + b for a, b in zip(*parts, strict=True)], wanted)


def test_slow_workers_change_nothing(
    dataset: Path, wanted: list[list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANIX_FAULT", "worker@1:sleep=0.05;read@2:sleep=0.1")
    assert same(drain(loader(dataset, workers=2), 4), wanted)


def test_a_killed_worker_is_replaced_in_the_middle_of_an_update(dataset: Path, wanted: list[list[Batch]]) -> None:
    source = loader(dataset, workers=2, prefetch=1)
    found: list[list[Batch]] = []
    try:
        for update in range(4):
            batches = source.next_update()
            first = [next(batches), next(batches)]
            if update in (1, 2):
                for worker in source._loader._workers:  # type: ignore[union-attr]
                    os.kill(worker.pid, signal.SIGKILL)
            found.append(first + list(batches))
    finally:
        source.close()
    assert same(found, wanted)


@pytest.mark.parametrize("fault", ["worker@*:raise=OSError", "worker@1:raise=OSError", "worker@*:enospc"])
def test_workers_without_shared_memory_become_fewer_and_nothing_changes(
    fault: str, dataset: Path, wanted: list[list[Batch]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ANIX_FAULT", fault)
    source = loader(dataset, workers=3, prefetch=2)
    assert same(drain(source, len(wanted)), wanted)
    assert source.workers == 0
    told = [record.getMessage() for record in caplog.records if "shared memory" in record.getMessage()]
    assert ["one worker" in text for text in told] == [True, False]
    assert "no workers from here on" in told[1]


@pytest.mark.parametrize(
    ("error", "short"),
    [(OSError(24, "Too many open files"), True), (RuntimeError("unable to write to file </torch_1>: shm"), True),
     (ConnectionResetError(104, "Connection reset by peer"), False), (RuntimeError("killed by signal: Killed"), False),
     (EOFError(), False)],
)  # fmt: skip
def test_a_death_is_not_taken_for_a_shortage(error: Exception, short: bool) -> None:
    assert _shortage(error) is short


# torch's handler may raise inside a callback of the garbage collector (hypothesis has one), where it is swallowed; the
# loader then finds the dead worker by itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_keep_dying_end_the_run_with_the_images_in_flight(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANIX_FAULT", "worker@1:kill")
    source = loader(dataset, workers=1)
    with pytest.raises(Halt) as halted:
        drain(source, 2)
    assert halted.value.code == ExitCode.UNEXPECTED
    named = set(re.findall(r"\b[0-9a-f]{16}\b", halted.value.message))
    # the tile that was due: the worker may die over a later one while that is still on its way
    tiles = [tile for step in (0, 1) for tile in source.dataset.plan.update(step)]
    hit = [tile for tile in tiles if named == {f"{uid:016x}" for uid in tile.uids.tolist()}]
    assert hit
    assert all(source.dataset.index.key(row) in halted.value.message for row in hit[0].rows.tolist())
    assert "fewer data.workers" in halted.value.message


def test_a_setting_that_holds_already_is_not_recommended(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANIX_FAULT", "read@0:eio")
    with pytest.raises(Halt) as halted:
        drain(loader(dataset, workers=0), 1)
    assert "test:" in halted.value.message
    assert "data.workers" not in halted.value.message


@pytest.mark.slow  # torch gives a pool 5 s to end, three times
def test_a_silent_worker_is_noticed(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANIX_FAULT", "worker@0:hang")
    source = loader(dataset, workers=1, worker_timeout_s=0.5)
    started = time.monotonic()
    try:
        with pytest.raises(Halt, match="timed out"):
            list(source.next_update())
    finally:
        source.close()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: ECC")])
@pytest.mark.parametrize("where", ["copy", "pinning"])
def test_an_error_of_the_device_is_not_one_of_the_data(
    where: str, error: RuntimeError, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It surfaces where data reaches the device, or in the thread that pins memory, whatever has caused it."""
    source = loader(dataset)
    source.device = torch.device("meta")  # anything but the CPU: batches are copied

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(*((Batch, "to") if where == "copy" else (type(source.dataset), "__getitem__")), fails)
    with pytest.raises(type(error)) as caught:
        drain(source, 1)
    assert caught.value is error
    expected = ExitCode.OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else ExitCode.UNEXPECTED
    assert as_halt(caught.value).code == expected and "data" not in as_halt(caught.value).message


def test_a_refusal_in_a_worker_keeps_its_code(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(dataset, folder)
    (folder / "latents/64x64-00000.safetensors").unlink()
    source = loader(folder, workers=1)
    try:
        with pytest.raises(Halt) as halted:
            list(source.next_update())
    finally:
        source.close()
    assert halted.value.code == ExitCode.MISMATCH
    assert "64x64-00000" in halted.value.message


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_generator_is_touched(workers: int, dataset: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[union-attr]
    drain(loader(dataset, workers=workers), 2)
    after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[union-attr]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_workers_end_with_the_loader(dataset: Path) -> None:
    source = loader(dataset, workers=2)
    next(source.next_update())
    workers = list(source._loader._workers)  # type: ignore[union-attr]
    assert all(worker.is_alive() for worker in workers)
    source.close()
    source.close()
    assert not any(worker.is_alive() for worker in workers)


def test_places_are_the_plans() -> None:
    places = PlaceSampler(3, 5, range(2, 4))
    assert list(places) == [(3, 2), (3, 3), (4, 2), (4, 3)]
    assert len(places) == 4
    assert len(PlaceSampler(5, 3, range(2))) == 0
