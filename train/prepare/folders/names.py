"""A file that metadata names, as the disk spells it: composed letters, letter case and endings differ between systems.

macOS writes decomposed letters, Windows does not tell cases apart, and people convert their pictures and keep the
metadata. What is found under another name is counted, and nothing is guessed where two files could be meant.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from train.prepare.folders.files import UnsafePath, check_relative
from train.prepare.folders.kinds import is_image
from train.prepare.posts.census import note

_FIRST = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")  # of several endings of one post
_Listing = tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]


def on_disk(root: Path, uri: str) -> str:
    """Path below `root` of the picture that `uri` names: itself, another spelling, another ending, or itself if none."""
    if os.path.lexists(f"{root}/{uri}"):
        return uri
    try:
        check_relative(uri)
    except UnsafePath:
        return uri  # refused with its record
    return first_like(root, [uri]) or uri


def other_ending(root: Path, uri: str) -> str | None:
    """The picture beside `uri` that has its name up to the last dot; None where there is none, or several."""
    folder, _, name = uri.rpartition("/")
    place = _spelled(root, folder)
    return None if place is None else _ending(place, name, _listing(root, place), any_of=False)


def first_like(root: Path, uris: Iterable[str], *, any_of: bool = False) -> str | None:
    """Of paths that are not there, what the first one must mean: another spelling, or the one picture of its name.

    Where several pictures differ by their endings it is none of them, unless `any_of` says that all are the same picture.
    """
    places: dict[str, tuple[str, _Listing] | None] = {}
    for uri in uris:
        folder, _, name = uri.rpartition("/")
        if folder not in places:
            place = _spelled(root, folder)
            places[folder] = None if place is None else (place, _listing(root, place))
        where = places[folder]
        if where is None:
            continue
        if (found := _alike(name, where[1])) is not None:
            note("spelling", f"{found} for {name}")
            return _joined(where[0], found)
        if (ended := _ending(where[0], name, where[1], any_of=any_of)) is not None:
            return ended
    return None


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _spelled(root: Path, uri: str) -> str | None:
    if not uri or os.path.lexists(f"{root}/{uri}"):
        return uri
    folder, _, name = uri.rpartition("/")
    place = _spelled(root, folder)
    found = None if place is None else _alike(name, _listing(root, place))
    return None if place is None or found is None else _joined(place, found)


def _alike(name: str, listing: _Listing) -> str | None:
    """The one name that differs by case or form, by form alone where several do."""
    found = listing[0].get(_folded(name), ())
    composed = unicodedata.normalize("NFC", name)
    alike = [one for one in found if unicodedata.normalize("NFC", one) == composed] or found
    return alike[0] if len(alike) == 1 else None


def _ending(place: str, name: str, listing: _Listing, *, any_of: bool) -> str | None:
    found = listing[1].get(_folded(os.path.splitext(name)[0]), ())
    if not found or (len(found) > 1 and not any_of):
        return None
    chosen = min(found, key=lambda one: (_rank(one), one))
    note("ending", f"{chosen} for {name}")
    return _joined(place, chosen)


def _rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return _FIRST.index(suffix) if suffix in _FIRST else len(_FIRST)


def _folded(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", name).casefold()


def _listing(root: Path, place: str) -> _Listing:
    folder = f"{root}/{place}"
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
