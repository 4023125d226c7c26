"""Whether the sources changed since the last ingest: a hash over their settings and what their folders list.

The same walk tells how many bytes of metadata each has, for the bar.
Pictures count by name, because ingest never reads them; every other file by name, size and time.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from train.config.dataset import SourceConfig
from train.prepare.folders.files import is_inside, source_root
from train.prepare.folders.kinds import ENDINGS, is_image
from train.prepare.folders.walking import mask_folder
from train.prepare.posts.caption_text import caption_endings

_READ = ENDINGS | {"danbooru2023": ("post.parquet", "posts.parquet")}  # of a folder; the table of tags is small


def sources_mark(sources: list[SourceConfig], version: str) -> tuple[str, list[int]]:
    """(mark, bytes that each source's adapter will read). Equal marks: ingest would write the records that are there."""
    digest = hashlib.sha256(version.encode())
    sizes = []
    for source in sources:
        size, endings = 0, _READ[source.adapter] if source.adapter != "sidecar" else caption_endings(source)
        read = dataclasses.asdict(dataclasses.replace(source, repeats=1))  # which only `select` looks at
        del read["weight"], read["mask"]  # which only `latents` does; a folder of masks in the source is passed over
        if (masks := mask_folder(source)) is not None and is_inside(source_root(source), masks):
            read["mask"] = masks
        if read["class_tokens"] is None:  # an earlier version did not know it
            del read["class_tokens"]
        digest.update(repr(tuple(read.values())).encode("utf-8", "backslashreplace"))
        for place in dict.fromkeys(filter(None, (source.path, source.images, source.dictionary))):
            for line, count in _listing(Path(place), source.follow_links):
                digest.update(line.encode("utf-8", "surrogateescape"))
                name = line.partition("\0")[0]
                if place == source.path and (name == str(Path(place)) or name.lower().endswith(endings)):
                    size += count
        sizes.append(size)
    return digest.hexdigest(), sizes


def _listing(path: Path, follow_links: bool) -> Iterator[tuple[str, int]]:
    """(one line, bytes) per file, in an order that depends on the names alone."""
    if not path.is_dir():
        beside = path.parent.glob(f"{glob.escape(path.stem)}.*") if is_image(path.name) else [path]  # its caption too
        yield from (_line(str(file), file) for file in sorted(beside))
        return
    waiting, met = [str(path)], set[str]()
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield f"{folder}\0{type(error).__name__}\0", 0
            continue
        for entry in ordered:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif follow_links and entry.is_symlink() and os.path.isdir(entry.path):
                if (real := os.path.realpath(entry.path)) not in met:  # of a loop each link is listed once
                    met.add(real)
                    waiting.append(entry.path)
            elif is_image(entry.name) and not entry.is_symlink():
                yield f"{entry.path}\0", 0
            else:
                yield _line(entry.path, Path(entry.path))


def _line(name: str, path: Path) -> tuple[str, int]:
    link = os.readlink(path) if path.is_symlink() else ""
    try:
        info = path.stat()
        return f"{name}\0{link}\0{info.st_size}\0{info.st_mtime_ns}\0", info.st_size
    except OSError as error:
        return f"{name}\0{link}\0{type(error).__name__}\0", 0
