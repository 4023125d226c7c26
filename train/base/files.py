"""Files that are whole or not there: atomic writes, JSON, hashes."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fsync_dir(path: Path | str) -> None:
    """Make the names inside directory `path` durable (a rename is not, until its directory is synced)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of `data`; os.write alone may stop in the middle."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace_file(path: Path | str, data: bytes | str) -> None:
    """`path` holds `data` or what it held before, whenever the machine stops. Mode by umask. Raises OSError."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        # A message may name a file whose name is not UTF-8: that must not hide the message.
        write_all(fd, data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(tmp, path)
    fsync_dir(path.parent)


def write_json(path: Path | str, record: Mapping[str, Any]) -> None:
    """`record` as indented JSON, replaced atomically. NaN is refused (ValueError): it is not JSON."""
    replace_file(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str, max_bytes: int = 8 << 20) -> dict[str, Any] | None:
    """The object stored in `path`; None when it is absent, no regular file, too large, damaged or not an object."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe is to wait for who writes into it
            return None
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
        record = json.loads(data) if len(data) <= max_bytes else None
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def json_number(value: float) -> float | str:
    """`value`, or its name when JSON has no such number."""
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
