"""Files that are whole or not there: atomic writes, JSON, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
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
    # A message may name a file whose name is not UTF-8: that must not hide the message.
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with replacing(path) as tmp:
        tmp.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path | str, tmp: Path | None = None, *, peers: bool = False) -> Iterator[Path]:
    """A new file's temporary path; synced, it becomes `path` at the end, and vanishes with an error.

    tmp: where it grows if not at `path` + ".tmp". peers: other processes may be writing the same content, and may clear
    away what they take for left over; then the name is this writer's own, and a peer's whole file serves as well.
    """
    path = Path(path)
    if peers:
        tmp = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    tmp = tmp or path.with_name(path.name + ".tmp")
    tmp.unlink(missing_ok=True)
    try:
        yield tmp
        try:
            _sync(tmp)
            os.replace(tmp, path)
        except FileNotFoundError:
            if not (peers and path.exists()):
                raise
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_sha256(path: Path | str) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def free_bytes(path: Path | str) -> int:
    """Bytes an ordinary user may still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
