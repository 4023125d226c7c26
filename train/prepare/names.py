"""A file that metadata names, as the disk spells it: composed letters, letter case and endings differ between systems.

macOS writes decomposed letters, Windows does not tell cases apart, and people convert their pictures and keep the
metadata. What is found under another name is counted, and nothing is guessed where two files could be meant.
"""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

from train.prepare.census import note
from train.prepare.filekinds import is_image
from train.prepare.files import UnsafePath, check_relative

_FIRST = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")  # of several endings of one post
_Listing = tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]


def on_disk(root: Path, uri: str) -> str:
    """Path below `root` of the picture that `uri` names: itself, another spelling, another ending, or itself if none."""
    try:
        check_relative(uri)
    except UnsafePath:
        return uri  # refused with its record
    return same_name(root, uri) or other_ending(root, uri) or uri


def same_name(root: Path, uri: str) -> str | None:
    """`uri`, or the one path that differs from it by letter case or Unicode form alone; None where there is none."""
    found = _spelled(root, uri)
    if found not in (None, uri):
        note("spelling", f"{found} for {uri}")
    return found


def other_ending(root: Path, uri: str, *, any_of: bool = False) -> str | None:
    """The picture beside `uri` that has its name up to the last dot; None where there is none.

    Where there are several it is none of them, unless `any_of` says that they are all the same picture.
    """
    folder, name = _parts(uri)
    place = _spelled(root, folder)
    if place is None:
        return None
    found = _listing(f"{root}/{place}")[1].get(_folded(os.path.splitext(name)[0]), ())
    if not found or (len(found) > 1 and not any_of):
        return None
    chosen = min(found, key=lambda one: (_rank(one), one))
    note("ending", f"{chosen} for {name}")
    return f"{place}/{chosen}" if place else chosen


def _rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return _FIRST.index(suffix) if suffix in _FIRST else len(_FIRST)


def _parts(uri: str) -> tuple[str, str]:
    folder, _, name = uri.rpartition("/")
    return folder, name


def _spelled(root: Path, uri: str) -> str | None:
    if not uri or os.path.lexists(f"{root}/{uri}"):
        return uri
    folder, name = _parts(uri)
    place = _spelled(root, folder)
    if place is None:
        return None
    found = _listing(f"{root}/{place}")[0].get(_folded(name), ())
    composed = unicodedata.normalize("NFC", name)
    alike = [one for one in found if unicodedata.normalize("NFC", one) == composed] or found
    return None if len(alike) != 1 else f"{place}/{alike[0]}" if place else alike[0]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _listing(folder: str) -> _Listing:
    try:
        return _listed(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return {}, {}


@lru_cache(maxsize=1024)  # posts by id pass through a thousand folders in turn
def _listed(folder: str, mtime_ns: int) -> _Listing:
    """(names by folded name, pictures by folded stem). Read only where a file was not under its own name."""
    names: dict[str, tuple[str, ...]] = {}
    stems: dict[str, tuple[str, ...]] = {}
    for name in sorted(os.listdir(folder)):
        names[_folded(name)] = (*names.get(_folded(name), ()), name)
        if is_image(name):
            stem = _folded(os.path.splitext(name)[0])
            stems[stem] = (*stems.get(stem, ()), name)
    return names, stems
