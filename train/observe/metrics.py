"""Files with lines for every update (metrics.jsonl, validation.jsonl, trace.txt): appended to, cut back on a resume, read.

trace.txt: which images an update used, with their timesteps. Two runs train alike when these lines are equal.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt

from train.recipe.order import Tile

log = logging.getLogger("anix")
TRACE = "trace.txt"


class MetricsFile:
    """Appends whole lines, flushed one by one; a torn last line of a killed run is cut off at the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[str] = []
        self._warned = False
        self._file: IO[bytes] = path.open("ab", buffering=0)
        self._good_bytes = _end_of_last_line(path)
        self._file.truncate(self._good_bytes)

    def append(self, line: str) -> None:
        """Write `line`, after those that could not be written before."""
        self._pending.append(line + "\n")
        data = "".join(self._pending).encode()
        try:
            written = self._file.write(data) or 0
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes written")
        except OSError as error:
            self._undo_partial_write()
            if not self._warned:
                log.warning("%s cannot be written (%s): its lines are kept and tried again", self.path, error)
            self._warned = True
            return
        self._good_bytes += len(data)
        self._pending.clear()
        self._warned = False

    def close(self) -> None:
        """Close the file; lines that never could be written are counted in a warning."""
        if self._pending:
            log.warning("%s lacks its last %d lines: they could not be written", self.path, len(self._pending))
        self._file.close()

    def _undo_partial_write(self) -> None:
        try:
            self._file.truncate(self._good_bytes)
        except OSError as error:
            log.debug("cannot cut %s back: %s", self.path, error)


def cut(metrics: Path, step: int) -> int:
    """Move the lines of plan steps beyond `step` (steps done) to `<name>.discarded.jsonl`; how many they were.

    Lines stand in the order of their steps, so the cut is one place in the file: the tail is copied and synced
    first, then cut off. A torn last line, left by a kill, goes with it.
    """
    return _cut(metrics, lambda line: _belongs(line, step), metrics.with_suffix(".discarded.jsonl"))


def _cut(path: Path, belongs: Callable[[bytes], bool], discarded: Path | None = None) -> int:
    """Cut a file off before the first line that does not belong; how many lines went, into `discarded` where it is given."""
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = sum(1 for _ in itertools.takewhile(belongs, lines))
    if kept == len(lines):
        return 0
    tail = b"".join(lines[kept:])
    if discarded is not None:
        with open(discarded, "ab") as file:
            file.write(tail if tail.endswith(b"\n") else tail + b"\n")
            file.flush()
            os.fsync(file.fileno())
    with open(path, "r+b") as file:
        file.truncate(sum(map(len, lines[:kept])))
        os.fsync(file.fileno())
    return len(lines) - kept


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that are torn or no objects are left out."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def _end_of_last_line(path: Path) -> int:
    """Bytes up to and including the last newline."""
    size = path.stat().st_size
    with path.open("rb") as file:
        position = size
        while position > 0:
            start = max(position - 65536, 0)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0


def _belongs(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and int(record["step"]) <= step
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False


class Trace:
    """Owner of a run's trace.txt."""

    def __init__(self, run_path: Path) -> None:
        self._file = MetricsFile(run_path / TRACE)

    def write(self, step: int, tiles: Sequence[Tile], timesteps: Sequence[int] | npt.NDArray[Any]) -> None:
        """The lines of plan step `step`; `timesteps` holds one number per slot, in plan order."""
        lines, start = "", 0
        for tile in tiles:
            lines += trace_lines(step, tile, timesteps[start : start + len(tile.rows)])
            start += len(tile.rows)
        self._file.append(lines.removesuffix("\n"))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def trace_lines(s: int, tile: Tile, timesteps: Sequence[int] | npt.NDArray[Any]) -> str:
    """`s wxh uid epoch t`, one line per slot, uid in 16 hex digits."""
    slots = zip(tile.uids.tolist(), tile.epochs.tolist(), timesteps, strict=True)
    return "".join(f"{s} {tile.width}x{tile.height} {uid:016x} {epoch} {int(t)}\n" for uid, epoch, t in slots)


def cut_trace(trace: Path, step: int) -> int:
    """Drop the lines of plan steps from `step` on from trace.txt: they will be written again; how many they were."""
    return _cut(trace, lambda line: _traces_before(line, step))


def _traces_before(line: bytes, step: int) -> bool:
    number = line.split(b" ", 1)[0]
    return line.endswith(b"\n") and number.isdigit() and int(number) < step
