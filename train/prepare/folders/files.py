"""Files of a source: where its root is, and reading one without leaving it.

User files are only ever read. Paths in tables are relative to the source root with forward slashes; the root stands in
the config alone, so a dataset can be moved.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig

_UNPRINTABLE = re.compile("[\x00-\x1f\ud800-\udfff]")
_CLIMBS = re.compile(r"^[\\/]|^[A-Za-z]:[\\/]|(^|[\\/])\.\.([\\/]|$)")
MAX_IMAGE_BYTES = 1 << 30


class UnsafePath(ValueError):
    """A path that is absolute, leaves the source root, or holds characters no table can hold."""


def source_root(source: SourceConfig) -> Path:
    """The folder that `uri` is relative to: `images`, else `path`, or the folder of `path` where it is a file."""
    if source.images is not None:
        return Path(source.images)
    path = Path(source.path)
    return path if path.is_dir() else path.parent


def require_source(source: SourceConfig) -> Path:
    """`path` as a Path. Raises Halt(USAGE) when it, or `images`, does not exist."""
    for key, value in (("path", source.path), ("images", source.images)):
        if value is not None and not Path(value).exists():
            raise Halt(ExitCode.USAGE, f"sources {source.name}: {key} {value} does not exist")
    return Path(source.path)


def check_relative(uri: str) -> str:
    """`uri` itself, if it is a relative path of printable text that does not climb. Raises UnsafePath."""
    if not uri or _UNPRINTABLE.search(uri):
        raise UnsafePath(f"{uri!a} is empty or holds control characters or bytes that are not UTF-8")
    if _CLIMBS.search(uri):
        raise UnsafePath(f"{uri!r} is not a relative path inside the source root")
    return uri


def resolve_inside(root: Path, uri: str, follow_links: bool = False) -> Path:
    """The file below `root`, symbolic links followed. Raises UnsafePath when one leads out and `follow_links` is false."""
    path = root / check_relative(uri)
    if not follow_links and not is_inside(root, os.path.realpath(path)):
        raise UnsafePath(f"{uri!r} is a link that leaves the source root: follow_links: true reads it")
    return path


def is_inside(root: Path, real: str) -> bool:
    """Whether a path without links is the root or below it."""
    base = _real_root(str(root))
    return real == base or real.startswith(base.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=64)
def _real_root(root: str) -> str:
    return os.path.realpath(root)


def read_image(source: SourceConfig, uri: str, member: str | None = None) -> bytes:
    """The bytes of a record's image, wherever it is kept.

    `member` is a name inside the tar `uri`, or `row:<n>:<column>` of the parquet file `uri`. Raises UnsafePath,
    FileNotFoundError, or OSError.
    """
    path = resolve_inside(source_root(source), uri, source.follow_links)
    if member is None:
        return _read_file(path)
    if member.startswith("row:"):
        return _read_cell(path, member)
    return _read_member(path, member)


def is_plain(info: tarfile.TarInfo) -> bool:
    """Whether a tar's member is an ordinary file whose bytes lie in one piece."""
    return info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)


def _read_file(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block
        raise OSError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        if info.st_size > MAX_IMAGE_BYTES:
            raise OSError(f"{path} holds {info.st_size} bytes, more than {MAX_IMAGE_BYTES}")
        return file.read()


def _read_member(path: Path, member: str) -> bytes:
    """One regular file of a tar; the table of contents is kept for the tar read last."""
    offset, size = tar_members(path).get(member, (-1, 0))
    if offset < 0:
        raise FileNotFoundError(f"{member} is not a regular file in {path}")
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"{path} ends inside {member}")
    return data


def tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, size) of the regular members of a tar by name; kept for the tars read last."""
    return _members(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _members(path: str, mtime_ns: int) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            if is_plain(info) and info.size <= MAX_IMAGE_BYTES:
                found.setdefault(info.name, (info.offset_data, info.size))
    return found


def _read_cell(path: Path, member: str) -> bytes:
    """The bytes of a `{bytes, path}` cell, or of a binary cell, of a parquet or Arrow file."""
    _, row_text, column = member.split(":", 2)
    row, group, stamp = int(row_text), 0, path.stat().st_mtime_ns
    for first, rows in enumerate(_group_sizes(str(path), stamp)):
        if row < rows:
            group = first
            break
        row -= rows
    else:
        raise FileNotFoundError(f"{path} has no {member}")
    value = _column_of_group(str(path), stamp, group, column)[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise FileNotFoundError(f"{member} of {path} holds no image")
    return data


@lru_cache(maxsize=64)
def _group_sizes(path: str, mtime_ns: int) -> tuple[int, ...]:
    if not path.lower().endswith(".parquet"):
        with pa.memory_map(path) as data, pa.ipc.open_stream(data) as stream:
            return tuple(batch.num_rows for batch in stream)
    metadata = pq.read_metadata(path)
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


@lru_cache(maxsize=1)  # rows are read in order: the group of the last one is kept
def _column_of_group(path: str, mtime_ns: int, group: int, column: str) -> Any:
    if path.lower().endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column]).column(column)
    with pa.ipc.open_stream(pa.memory_map(path)) as stream:
        for _ in range(group):
            stream.read_next_batch()
        return stream.read_next_batch().column(column)
