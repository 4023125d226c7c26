"""Units: byte-identical tables whatever is interrupted, whoever works, and as little work as possible twice."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.base.errors import Halt
from train.prepare.tables import workers as peers_module
from train.prepare.tables.schemas import Quarantine
from train.prepare.tables.units import (
    Step,
    cut,
    finalize,
    merge_quarantine,
    read_table,
    require_table,
    row_hash,
    run_units,
    run_whole,
    write_parquet,
)
from train.prepare.tables.workers import Peers

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])


def rows_of(count: int, first: int = 0) -> pa.Table:
    return pa.table({"key": [f"k:{n:04d}" for n in range(first, first + count)], "n": list(range(first, first + count))})


class Worker:
    """Squares; every seventh row is quarantined. Counts the rows it is given, and stops after `limit` of them."""

    def __init__(self, limit: int | None = None) -> None:
        self.seen: list[str] = []
        self.limit = limit

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Quarantine]]:
        self.seen += rows["key"].to_pylist()
        if self.limit is not None and len(self.seen) > self.limit:
            raise KeyboardInterrupt
        values = [n * n for n in rows["n"].to_pylist()]
        bad = [Quarantine(key, "probe", "truncated", f"{key}.png") for key, n in
               zip(rows["key"].to_pylist(), rows["n"].to_pylist(), strict=True) if n % 7 == 0]  # fmt: skip
        return pa.table({"key": rows["key"], "value": pa.array(values, pa.int64())}), bad


def run(dataset: Path, rows: pa.Table, work: Callable[..., Any], *, rank: int = 0, world: int = 1, size: int = 10,
        config: str = "c", changed: frozenset[str] = frozenset()) -> None:  # fmt: skip
    hashes = [row_hash(key, key in changed) for key in rows["key"].to_pylist()]
    with Peers(dataset, rank, world) as peers:
        run_units(Step(dataset, "probe", SCHEMA, config), cut(rows, hashes, size), work, peers)
    merge_quarantine(dataset)


def content(dataset: Path) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*")) if path.is_file()
    }  # fmt: skip


def test_plain_run(tmp_path: Path) -> None:
    run(tmp_path, rows_of(25), Worker())
    assert read_table(tmp_path, "probe")["value"].to_pylist() == [n * n for n in range(25)]
    assert [path.name[:5] for path in require_table(tmp_path, "probe")] == ["00000", "00001", "00002"]
    assert pq.read_table(tmp_path / "quarantine.parquet")["key"].to_pylist() == ["k:0000", "k:0007", "k:0014", "k:0021"]
    again = Worker()
    before = content(tmp_path)
    run(tmp_path, rows_of(25), again)
    assert again.seen == []
    assert content(tmp_path) == before


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=4), st.integers(1, 13))
def test_interruptions_leave_no_trace(tmp_path_factory: pytest.TempPathFactory, limits: list[int], size: int) -> None:
    straight = tmp_path_factory.mktemp("straight")
    run(straight, rows_of(40), Worker(), size=size)
    broken = tmp_path_factory.mktemp("broken")
    for limit in limits:
        try:
            run(broken, rows_of(40), Worker(limit), size=size)
        except KeyboardInterrupt:
            continue
    run(broken, rows_of(40), Worker(), size=size)
    assert content(broken) == content(straight)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_same_bytes(tmp_path: Path, world: int) -> None:
    run(tmp_path / "one", rows_of(95), Worker())
    workers = [Worker() for _ in range(world)]
    threads = [
        threading.Thread(target=run, args=(tmp_path / "many", rows_of(95), worker), kwargs={"rank": r, "world": world})
        for r, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ours = {name: value for name, value in content(tmp_path / "many").items() if not name.startswith(".peers")}
    assert ours == content(tmp_path / "one")
    assert sorted(key for worker in workers for key in worker.seen) == rows_of(95)["key"].to_pylist()


def test_a_silent_peer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "LOST_S", 0.5)
    run(tmp_path / "one", rows_of(45), Worker())
    alone = Worker()
    run(tmp_path / "many", rows_of(45), alone, rank=1, world=3)  # ranks 0 and 2 never come
    assert len(alone.seen) == 45
    assert {k: v for k, v in content(tmp_path / "many").items() if ".peers" not in k} == content(tmp_path / "one")


def test_one_new_row_costs_one_row(tmp_path: Path) -> None:
    """New keys move the units' borders; the rows themselves are copied."""
    old = rows_of(100)
    run(tmp_path, old, Worker())
    new = pa.concat_tables([old, pa.table({"key": ["k:0049a"], "n": [1000]})]).sort_by("key")
    again = Worker()
    run(tmp_path, new, again)
    assert again.seen == ["k:0049a"]
    fresh = tmp_path / "fresh"
    run(fresh, new, Worker())
    assert read_table(tmp_path, "probe").equals(read_table(fresh, "probe"))
    for path in require_table(fresh, "probe"):
        assert (tmp_path / "probe" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "quarantine.parquet").read_bytes() == (fresh / "quarantine.parquet").read_bytes()
    assert len(list((tmp_path / "probe").glob("*.parquet"))) == 11
    assert list((tmp_path / "probe" / "stale").glob("*.parquet"))


def test_a_changed_row_is_made_again_and_another_config_makes_all(tmp_path: Path) -> None:
    run(tmp_path, rows_of(30), Worker())
    again = Worker()
    run(tmp_path, rows_of(30), again, changed=frozenset(["k:0011"]))
    assert again.seen == ["k:0011"]
    other = Worker()
    run(tmp_path, rows_of(30), other, config="another")
    assert len(other.seen) == 30
    back = Worker()
    run(tmp_path, rows_of(30), back)  # its files are in stale/: nothing to do but copy
    assert back.seen == []


def test_wrong_results_and_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Halt, match="0 results for 5 rows"):
        run(tmp_path, rows_of(5), lambda rows: (SCHEMA.empty_table(), []))
    double = pa.table({"key": ["a", "b", "b"], "value": [1, 2, 3]})
    step = Step(tmp_path, "probe", SCHEMA, "c")
    write_parquet(tmp_path / "probe" / "00000-x.parquet", double)
    with pytest.raises(Halt, match="key b is repeated or out of order"):
        finalize(step, ["00000-x.parquet"])
    finalize(step, ["00000-x.parquet"], unique=False)


def test_table_made_from_other_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Halt, match=r"run scripts/prepare.py probe"):
        require_table(tmp_path, "probe")
    step = Step(tmp_path, "dupes", SCHEMA, "c", ("probe",))

    def make() -> tuple[pa.Table, list[Quarantine]]:
        return pa.table({"key": ["a"], "value": [1]}), []

    run(tmp_path, rows_of(5), Worker())
    with Peers(tmp_path, 0, 1) as peers:
        run_whole(step, make, peers)
    assert len(read_table(tmp_path, "dupes")) == 1
    run(tmp_path, rows_of(6), Worker())
    with pytest.raises(Halt, match=r"was made from other probe: run scripts/prepare.py dedupe"):
        read_table(tmp_path, "dupes")
    with Peers(tmp_path, 0, 1) as peers:
        run_whole(step, make, peers)
    assert len(read_table(tmp_path, "dupes")) == 1


def test_damaged_unit_is_removed_and_named(tmp_path: Path) -> None:
    run(tmp_path, rows_of(20), Worker())
    path = require_table(tmp_path, "probe")[1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Halt, match=f"{path.name} was unreadable"):
        run(tmp_path, rows_of(20), Worker())
    again = Worker()
    run(tmp_path, rows_of(20), again)
    assert len(again.seen) == 10


@pytest.mark.parametrize("world", ["0", "x", "-1"])
def test_bad_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(Halt, match="WORLD_SIZE"):
        Peers(tmp_path)


def test_units_are_cut_from_rows_alone() -> None:
    units = cut(rows_of(25), np.arange(25), 10)
    assert [(unit.number, len(unit.rows), unit.hashes.tolist()[:1]) for unit in units] == [(0, 10, [0]), (1, 10, [10]),
                                                                                          (2, 5, [20])]  # fmt: skip
