"""What lies below a source's root: every file once, links between folders included, litter passed over."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from train.config.dataset import SourceConfig
from train.prepare.folders.files import UnsafePath, check_relative, is_inside, require_source, resolve_inside
from train.prepare.folders.kinds import ENDINGS, is_image, is_litter, media_kind
from train.prepare.posts.census import note
from train.prepare.posts.normalise import Found, printable
from train.prepare.tables.schemas import ErrorReason, Quarantine

_MOST_LISTED = 20_000  # entries behind a link that leads out, which may be the whole disk
_FOLLOW = "a link that leaves the source root: follow_links: true reads it"


def walk(source: SourceConfig, root: Path) -> Iterator[str | Quarantine]:
    """Relative paths of all regular files below `root`; unreadable names, pipes and what links lead out to as Quarantine.

    Hidden folders and litter are skipped. A linked folder is read where its files are not met at home: one inside the
    root that is hidden, or with `follow_links` one outside. Refused links outside count once for each picture there.
    """
    met: set[str] = set()
    links: list[str] = []
    yield from _below(source, root, "", met, links)
    while links:  # when all that is at home is known; a linked folder may hold further links
        uri = links.pop(0)
        real = os.path.realpath(root / uri)
        if real in met:
            note("linked_home", uri)
        elif source.follow_links or is_inside(root, real):
            yield from _below(source, root, uri, met, links)
        else:
            met.add(real)
            yield from _refused_folder(source, root, uri)


def each_file(source: SourceConfig, read: Callable[[str, Path], Iterator[Found]]) -> Iterator[Found]:
    """What `read` makes of (name, path) of the source's one file, or of each below it that its adapter reads.

    What the walk refuses is passed on. Raises Halt(USAGE) for a source that is not there.
    """
    path = require_source(source)
    if path.is_file():
        yield from read(path.name, path)
        return
    for found in walk(source, path):
        if isinstance(found, Quarantine):
            yield found
        elif found.lower().endswith(ENDINGS[source.adapter]):
            yield from read(found, path / found)


def not_a_picture(source: SourceConfig, uri: str, kind: str) -> Quarantine:
    """The quarantine row of a video, an archive and their like: left out by rule, not broken."""
    return Quarantine(printable(f"{source.name}:{uri}"), "ingest", "not_a_picture", printable(f"{uri} is no picture: {kind}"))


def pictures(source: SourceConfig, root: Path) -> Iterator[str | Quarantine]:
    """The pictures that `walk` meets, and its refusals; videos, archives and their like as such."""
    for found in walk(source, root):
        if isinstance(found, Quarantine) or is_image(found):
            yield found
        elif (kind := media_kind(found)) is not None:
            yield not_a_picture(source, found, kind)


def _below(source: SourceConfig, root: Path, top: str, met: set[str], links: list[str]) -> Iterator[str | Quarantine]:
    """Files of a folder and of the real folders in it that are not in `met`; linked ones are left in `links`."""
    waiting, masks = [(top, os.path.realpath(root / top))], mask_folder(source)
    while waiting:
        folder, real = waiting.pop()
        if real in met:
            note("linked_home", folder)
            continue
        met.add(real)
        try:
            with os.scandir(root / folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield _refused(source, folder, "bad_record", error)
            continue
        for entry in ordered:
            uri = f"{folder}/{entry.name}" if folder else entry.name
            if is_litter(entry.name) or (entry.name.startswith(".") and os.path.isdir(entry.path)):
                note("litter", printable(uri))
            elif entry.is_dir(follow_symlinks=False):
                if f"{real}/{entry.name}" == masks:  # which are no pictures to train on
                    continue
                if (refused := _bad_name(source, uri)) is None:
                    waiting.append((uri, f"{real}/{entry.name}"))
                else:
                    yield refused
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append(uri)
            else:
                yield _file(source, root, uri, entry)


def mask_folder(source: SourceConfig) -> str | None:
    """Where the source's masks lie, without links; None where it has none of their own."""
    return None if source.mask in (None, "alpha") else os.path.realpath(str(source.mask))


def _bad_name(source: SourceConfig, uri: str) -> Quarantine | None:
    try:
        check_relative(uri)
    except UnsafePath as error:
        return _refused(source, uri, "bad_record", error)
    return None


def _file(source: SourceConfig, root: Path, uri: str, entry: os.DirEntry[str]) -> str | Quarantine:
    """The file's path, or why it is not read. A link to nothing is met by the probe, as any file that went away."""
    if (refused := _bad_name(source, uri)) is not None:
        return refused
    try:
        if entry.is_symlink():
            resolve_inside(root, uri, source.follow_links)
        if not stat.S_ISREG(entry.stat().st_mode):
            return _refused(source, uri, "bad_record", UnsafePath("not a regular file"))
    except UnsafePath as error:
        return _refused(source, uri, "outside_root", error)
    except FileNotFoundError:
        return uri
    except OSError as error:  # a link to itself
        return _refused(source, uri, "bad_record", error)
    return uri


def _refused_folder(source: SourceConfig, root: Path, top: str) -> Iterator[Quarantine]:
    """One row for each picture behind a link that leads out; one where there is none: other files are not ours to list."""
    found: list[str] = []
    looked = 0
    for folder, folders, files in os.walk(root / top):
        folders[:] = sorted(
            name for name in folders
            if not is_litter(name) and not name.startswith(".") and not is_inside(root, os.path.realpath(os.path.join(folder, name)))
        )  # fmt: skip
        for name in sorted(files):
            if is_image(name) and not is_litter(name):
                found.append(os.path.relpath(os.path.join(folder, name), root / top))
        looked += len(folders) + len(files)
        if looked > _MOST_LISTED:
            break
    for name in found or [""]:
        uri = f"{top}/{name}".rstrip("/")
        yield _refused(source, uri, "outside_root", UnsafePath(f"behind {top}, {_FOLLOW}"))


def _refused(source: SourceConfig, uri: str, reason: ErrorReason, error: Exception) -> Quarantine:
    shown = printable(uri)
    return Quarantine(f"{source.name}:{shown}", "ingest", reason, f"{shown}: {error}", type(error).__name__)
