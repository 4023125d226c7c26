"""Whether the sources changed since the last ingest: a hash over their settings and what their folders list.

Pictures count by name, because ingest never reads them; every other file by name, size and time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from train.prepare.files import is_image
from train.prepare.settings import SourceConfig


def sources_mark(sources: list[SourceConfig], version: str) -> str:
    """Equal marks: ingest would write the records that are there."""
    digest = hashlib.sha256(version.encode())
    for source in sources:
        digest.update(repr(dataclasses.astuple(source)).encode("utf-8", "backslashreplace"))
        for place in dict.fromkeys(filter(None, (source.path, source.images, source.dictionary))):
            for line in _listing(Path(place)):
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _listing(path: Path) -> Iterator[str]:
    """One line per file, in an order that depends on the names alone."""
    if not path.is_dir():
        yield _line(str(path), path)
        return
    waiting = [str(path)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield f"{folder}\0{type(error).__name__}\0"
            continue
        for entry in ordered:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif is_image(entry.name) and not entry.is_symlink():
                yield f"{entry.path}\0"
            else:
                yield _line(entry.path, Path(entry.path))


def _line(name: str, path: Path) -> str:
    link = os.readlink(path) if path.is_symlink() else ""
    try:
        info = path.stat()
        return f"{name}\0{link}\0{info.st_size}\0{info.st_mtime_ns}\0"
    except OSError as error:
        return f"{name}\0{link}\0{type(error).__name__}\0"
