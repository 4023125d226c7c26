"""trace.txt: which images an update used, with their timesteps. Two runs train alike when these lines are equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from train.observe.metrics import MetricsFile
from train.recipe.order import Tile

FILE = "trace.txt"


class Trace:
    """Owner of a run's trace.txt."""

    def __init__(self, run_path: Path) -> None:
        self._file = MetricsFile(run_path / FILE)

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


def cut(trace: Path, step: int) -> int:
    """Drop the lines of plan steps from `step` on from trace.txt: they will be written again; how many they were."""
    if not trace.is_file():
        return 0
    with open(trace, "rb") as file:
        lines = file.readlines()
    kept = 0
    while kept < len(lines) and _traces_before(lines[kept], step):
        kept += 1
    with open(trace, "r+b") as file:
        file.truncate(sum(map(len, lines[:kept])))
    return len(lines) - kept


def _traces_before(line: bytes, step: int) -> bool:
    number = line.split(b" ", 1)[0]
    return line.endswith(b"\n") and number.isdigit() and int(number) < step
