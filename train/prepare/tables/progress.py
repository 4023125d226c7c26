"""Bars with the time left, on the first process only.

While a source is read its bar counts bytes: adapters open files through `counted`, or say what they have read with
`read_so_far`, so that a single file of a hundred million posts has an end in sight too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

_READING: list[Any] = []  # the bar of the source that is being read; reading has one place per process


def bar(total: int, label: str, unit: str = "rows", **options: Any) -> Any:
    """A bar over `total` units; none for nothing to do, or on other processes than the first."""
    first = os.environ.get("RANK", "0") in ("", "0")
    return tqdm(total=total, desc=label, unit=unit if unit == "B" else f" {unit}", disable=not first or total == 0,
                leave=False, **options)  # fmt: skip


def say(line: str) -> None:
    """Print a line, on the first process only."""
    if os.environ.get("RANK", "0") in ("", "0"):
        print(line)


@contextmanager
def reading(total_bytes: int, label: str) -> Iterator[Any]:
    """The bar of a source of so many bytes, which `counted` and `read_so_far` move."""
    with bar(total_bytes, label, "B", unit_scale=True, unit_divisor=1024) as shown:
        _READING.append(shown)
        try:
            yield shown
        finally:
            _READING.pop()


def read_so_far(count: float) -> None:
    """So many bytes more have been read."""
    if _READING:
        shown = _READING[-1]
        shown.update(min(int(count), max((shown.total or 0) - shown.n, 0)))  # what is read twice counts once


def counted(path: Path) -> io.BufferedReader:
    """The file, open for reading; what is read moves the bar."""
    return io.BufferedReader(_Counted(path), 1 << 16)


class _Counted(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        """As FileIO.readinto."""
        found = super().readinto(buffer)
        read_so_far(found or 0)
        return found
