"""WebDataset tars: members that share the name up to the FIRST dot of their base name are one sample.

Tars are streamed, regular members only, nothing is unpacked. A `.json` that is a Danbooru post is read as one, another
one through `columns`; a `.txt` is the caption.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from train.prepare.danbooru import danbooru_post
from train.prepare.filekinds import is_image, is_litter, media_kind
from train.prepare.files import UnsafePath, check_relative, is_plain, require_source, source_root
from train.prepare.jsonstream import MAX_VALUE_BYTES, Malformed, parse
from train.prepare.mapped import mapped_post
from train.prepare.normalise import MAX_CAPTION_BYTES, REFUSALS, BadRecord, RawPost, printable
from train.prepare.progress import read_so_far
from train.prepare.records import REST_UNREAD, ErrorReason, Quarantine
from train.prepare.settings import SourceConfig
from train.prepare.walking import not_a_picture, walk

Sample = dict[str, Any]  # images: member names, json and txt: bytes, about: the member that held one of them, other: a video or the like


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every image of every tar."""
    path = require_source(source)
    root = source_root(source)
    tars = [path.name] if path.is_file() else walk(source, path)
    for found in tars:
        if isinstance(found, Quarantine):
            yield found
        elif found.lower().endswith(".tar"):
            yield from _tar(source, root, found, path if path.is_file() else path / found)


def _tar(source: SourceConfig, root: Path, name: str, file: Path) -> Iterator[RawPost | Quarantine]:
    current, sample = None, Sample(images=[])
    try:
        with tarfile.open(file, "r:") as archive:
            done = 0
            for info in archive:
                read_so_far(info.offset - done)
                done = info.offset
                problem = _refused_member(source, name, info)
                if problem is not None:
                    yield problem
                if problem is not None or not is_plain(info) or is_litter(PurePosixPath(info.name).name):
                    continue
                key = sample_key(info.name)
                if key != current:
                    yield from _posts(source, root, name, sample)
                    current, sample = key, Sample(images=[])
                _add(sample, archive, info)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield _quarantine(source, name, "bad_record", f"{name}: {error}; {REST_UNREAD}", error)
    yield from _posts(source, root, name, sample)


def sample_key(member: str) -> str:
    """Folder and base name up to its first dot."""
    path = PurePosixPath(member)
    return str(path.parent / path.name.partition(".")[0])


def _refused_member(source: SourceConfig, name: str, info: tarfile.TarInfo) -> Quarantine | None:
    place = f"{name}/{info.name}"
    try:
        check_relative(info.name)
    except UnsafePath as error:
        return _quarantine(source, place, "outside_root", f"{printable(name)}: {error}", error)
    if is_plain(info) or info.isdir():
        return None
    problem = BadRecord(f"{place} is a link, a device or sparse, only regular members are read")
    reason: ErrorReason = "outside_root" if info.issym() or info.islnk() else "bad_record"
    return _quarantine(source, place, reason, str(problem), problem)


def _add(sample: Sample, archive: tarfile.TarFile, info: tarfile.TarInfo) -> None:
    suffix = PurePosixPath(info.name).suffix.lower()
    if is_image(info.name):
        sample["images"].append(info.name)
    elif (kind := media_kind(info.name)) is not None:
        sample["other"] = (info.name, kind)
    elif suffix in (".json", ".txt"):
        limit = MAX_VALUE_BYTES if suffix == ".json" else MAX_CAPTION_BYTES
        data = archive.extractfile(info)
        sample["about"] = info.name
        sample[suffix[1:]] = data.read(limit + 4) if data else b""


def _posts(source: SourceConfig, root: Path, name: str, sample: Sample) -> Iterator[RawPost | Quarantine]:
    if not sample["images"] and "other" in sample:
        member, kind = sample["other"]
        yield not_a_picture(source, f"{name}/{member}", kind)
    elif not sample["images"] and "about" in sample:
        place = f"{name}/{sample['about']}"
        error = BadRecord(f"{place} belongs to no picture in the tar")
        yield _quarantine(source, place, "missing_file", str(error), error)
    for member in sample["images"]:
        place = f"{name}/{member}"
        try:
            yield _post(source, root, name, member, place, sample)
        except UnicodeDecodeError as error:
            yield _quarantine(source, place, "bad_caption", f"{place}: {error}", error)
        except REFUSALS as error:
            yield _quarantine(source, place, "bad_record", f"{place}: {error}", error)


def _post(source: SourceConfig, root: Path, name: str, member: str, place: str, sample: Sample) -> RawPost | Quarantine:
    caption = sample["txt"].decode("utf-8-sig") if "txt" in sample else None
    if "json" not in sample:
        if caption is None and source.on_missing_caption == "error":
            error = BadRecord(f"{place} has neither .json nor .txt")
            return _quarantine(source, place, "missing_caption", str(error), error)
        return RawPost(id=place, place=place, uri=name, member=member, caption=caption)
    value = parse(sample["json"])
    if isinstance(value, Malformed) or not isinstance(value, dict):
        raise BadRecord(value.message if isinstance(value, Malformed) else "the .json is no object")
    if source.columns:
        post = mapped_post(source, value, place, root, name, member, place)
    else:
        post = danbooru_post(source, place, value, name, member)
    post.caption = caption if post.caption is None else post.caption
    return post


def _quarantine(source: SourceConfig, place: str, reason: ErrorReason, message: str, error: Exception) -> Quarantine:
    return Quarantine(printable(f"{source.name}:{place}"), "ingest", reason, printable(message), type(error).__name__)
