"""WebDataset tars: a picture and what belongs to it by name, in any order within the tar.

A text belongs to the picture of its own name up to the LAST dot (`x.v1.png`, `x.v1.txt`). One that has the sample's name,
which ends at the FIRST dot, also belongs to the only picture of that sample (`a.left.png`, `a.txt`). None is shared: what
two pictures would have in common is refused. Tars are read in place, regular members only, nothing is unpacked. A `.json`
that is a Danbooru post is read as one, another one through `columns`; a `.txt`, or what `caption_ext` names, is the caption.
"""

from __future__ import annotations

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from train.config.dataset import SourceConfig
from train.prepare.folders.files import UnsafePath, check_relative, is_plain, require_source, source_root
from train.prepare.folders.kinds import is_image, is_litter, media_kind
from train.prepare.folders.walking import not_a_picture, walk
from train.prepare.formats.columns import Columns, check_mapped, listed, wants_caption
from train.prepare.formats.jsonstream import MAX_VALUE_BYTES, Malformed, parse
from train.prepare.formats.mapping import mapped_post
from train.prepare.posts.caption_text import MAX_CAPTION_BYTES, caption_ending
from train.prepare.posts.census import note
from train.prepare.posts.normalise import REFUSALS, BadRecord, Found, RawPost, printable
from train.prepare.sources.danbooru import danbooru_post
from train.prepare.tables.progress import read_so_far, say
from train.prepare.tables.schemas import REST_UNREAD, ErrorReason, Quarantine

_COMPRESSED = (".tgz", ".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2")


@dataclass
class _Sample:
    """Members that share the name up to its first dot."""

    pictures: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    posts: list[str] = field(default_factory=list)  # .json
    others: list[str] = field(default_factory=list)


@dataclass
class _Tar:
    """One tar: where its members are, and which names stand in it more than once."""

    name: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)

    def read(self, file: IO[bytes], member: str, limit: int) -> bytes:
        """The member, cut a little behind `limit`. Raises BadRecord."""
        offset, size = self.places[member]
        file.seek(offset)
        data = file.read(min(size, limit + 4))
        if len(data) < min(size, limit + 4):
            raise BadRecord(f"{self.name} ends inside {member}")
        return data


class _Told:
    """What was passed over, said once at the end, and the keys of the .json."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.columns = Columns()

    def passed_over(self, what: str, member: str) -> None:
        """One more of a kind."""
        self.counts[what] += 1
        self.first.setdefault(what, member)


def read(source: SourceConfig) -> Iterator[Found]:
    """Every image of every tar."""
    path = require_source(source)
    yield from read_tars(source, source_root(source), [path.name] if path.is_file() else walk(source, path))


def read_tars(source: SourceConfig, root: Path, tars: Iterable[str | Quarantine]) -> Iterator[Found]:
    """Every image of these files, relative to `path`, or to its folder where it is a file."""
    path, told = Path(source.path), _Told()
    base = path.parent if path.is_file() else path
    for found in tars:
        if isinstance(found, Quarantine):
            yield found
        elif found.lower().endswith(".tar"):
            yield from _tar(source, root, found, base / found, told)
        elif found.lower().endswith(_COMPRESSED):
            told.passed_over("compressed tars are not read (unpack them to .tar)", found)
    for what, count in sorted(told.counts.items()):
        say(f"sources {source.name}: {count} {what}, such as {told.first[what]}")
    if told.columns.rows:
        check_mapped(source, "any .json of its tars", told.columns)
    elif source.columns:
        say(f"sources {source.name}: columns are mapped, and its tars hold no .json that has them")


def _tar(source: SourceConfig, root: Path, name: str, file: Path, told: _Told) -> Iterator[Found]:
    tar, samples, done = _Tar(name), defaultdict[str, _Sample](_Sample), 0
    try:
        with tarfile.open(file, "r:") as archive:
            for info in archive:
                read_so_far(info.offset - done)
                done = info.offset
                problem = _refused_member(source, name, info)
                if problem is not None:
                    yield problem
                elif is_plain(info):
                    _add(source, samples, tar, info)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield _quarantine(source, name, "bad_record", error, f"{error}; {REST_UNREAD}")
    if samples:  # only now is it known what belongs to what: members of a sample may lie far apart
        with open(file, "rb") as data:
            for key, sample in samples.items():
                yield from _posts(source, root, tar, data, key, sample, told)


def sample_key(member: str) -> str:
    """Folder and base name up to its first dot."""
    path = PurePosixPath(member)
    return str(path.parent / path.name.partition(".")[0])


def _refused_member(source: SourceConfig, name: str, info: tarfile.TarInfo) -> Quarantine | None:
    place = f"{name}/{info.name}"
    try:
        check_relative(info.name)
    except UnsafePath as error:
        return Quarantine(printable(f"{source.name}:{place}"), "ingest", "outside_root", printable(f"{name}: {error}"), "UnsafePath")
    if is_plain(info) or info.isdir():
        return None
    problem = BadRecord("a link, a device or sparse, only regular members are read")
    return _quarantine(source, place, "outside_root" if info.issym() or info.islnk() else "bad_record", problem)


def _add(source: SourceConfig, samples: dict[str, _Sample], tar: _Tar, info: tarfile.TarInfo) -> None:
    base, name = PurePosixPath(info.name).name, info.name
    if base.startswith(".") or any(map(is_litter, PurePosixPath(name).parts)):
        note("litter", f"{tar.name}/{name}")
        return
    if name in tar.places:
        tar.twice.add(name)
        return
    tar.places[name] = (info.offset_data, info.size)
    sample = samples[sample_key(name)]
    if is_image(name):
        sample.pictures.append(name)
    elif base.lower().endswith(caption_ending(source)):
        sample.captions.append(name)
    elif base.lower().endswith(".json"):
        sample.posts.append(name)
    else:
        sample.others.append(name)


def _stem(member: str, ending: str | None = None) -> str:
    """The name without its ending, or up to its last dot."""
    name = str(PurePosixPath(member))
    return name[: -len(ending)] if ending else name.rpartition(".")[0]


def _paired(sample: _Sample, key: str, texts: list[str], ending: str) -> tuple[dict[str, str], dict[str, str]]:
    """({picture: its text}, {picture: why it cannot have the text that would be its own})."""
    found: dict[str, str] = {}
    refused: dict[str, str] = {}
    for text in texts:
        stem = _stem(text, ending)
        owners = [picture for picture in sample.pictures if _stem(picture) == stem]
        if not owners and stem == key:
            owners = [picture for picture in sample.pictures if not any(_stem(picture) == _stem(one, ending) for one in texts)]
            if len(owners) == 1 < len(sample.pictures):
                refused[owners[0]] = f"{text} may be its text or that of the whole sample: name it after the picture"
                continue
        if len(owners) == 1 and owners[0] not in found:
            found[owners[0]] = text
        elif owners:
            shared = f"{text} would belong to {' and '.join(owners)}: give each a text of its own name"
            also = f"{text} and {found.get(owners[0])} have one name"
            refused |= dict.fromkeys(owners, shared if len(owners) > 1 else also)
    return found, refused


def _posts(
    source: SourceConfig, root: Path, tar: _Tar, data: IO[bytes], key: str, sample: _Sample, told: _Told
) -> Iterator[Found]:
    media = [(member, kind) for member in sample.others if (kind := media_kind(member)) is not None]
    if not sample.pictures and media:
        for member, kind in media:
            yield not_a_picture(source, f"{tar.name}/{member}", kind)
        return
    if not sample.pictures and (sample.captions or sample.posts):
        place = f"{tar.name}/{(sample.captions + sample.posts)[-1]}"
        yield _quarantine(source, place, "missing_file", BadRecord("belongs to no picture in the tar"))
        return
    captions, no_caption = _paired(sample, key, sample.captions, caption_ending(source))
    posts, no_post = _paired(sample, key, sample.posts, ".json")
    refused, used = no_caption | no_post, {*captions.values(), *posts.values()}
    main = any(_stem(picture) == key and (picture in captions or picture in posts) for picture in sample.pictures)
    for member in sample.pictures:
        place = f"{tar.name}/{member}"
        caption, post = captions.get(member), posts.get(member)
        try:
            if (again := tar.twice & {member, caption, post}) or member in refused:
                raise BadRecord(refused.get(member) or f"{min(filter(None, again))} stands in the tar more than once")
            if caption is None and post is None and source.on_missing_caption == "error":
                if main:  # masks, depths and other parts of a sample beside its picture
                    told.passed_over("pictures beside that of their sample, without a text, are passed over", place)
                else:
                    yield _missing(source, sample, member, place)
                continue
            found = _post(source, root, tar, data, member, caption, post, told)
            if found.caption is None and source.columns and wants_caption(source):
                problem = BadRecord(f"no caption in {post}: see columns.caption and on_missing_caption")
                yield _quarantine(source, place, "missing_caption", problem)
                continue
            yield found
        except REFUSALS as error:
            yield _quarantine(source, place, "bad_caption" if isinstance(error, UnicodeDecodeError) else "bad_record", error)
    for text in [*sample.captions, *sample.posts]:
        if text not in used and not refused:
            told.passed_over("texts in tars have the name of no picture and are not read (see caption_ext)", f"{tar.name}/{text}")


def _missing(source: SourceConfig, sample: _Sample, member: str, place: str) -> Quarantine:
    stem = _stem(member)
    beside = [name for name in (*sample.captions, *sample.posts, *sample.others) if str(PurePosixPath(name)).startswith(f"{stem}.")]
    ending = f", but {beside[0]} does: set caption_ext: {str(PurePosixPath(beside[0]))[len(stem) :]}" if beside else ""
    problem = BadRecord(f"neither .json nor {caption_ending(source)} has its name{ending or ': see on_missing_caption'}")
    return _quarantine(source, place, "missing_caption", problem)


def _post(
    source: SourceConfig, root: Path, tar: _Tar, data: IO[bytes], member: str, caption: str | None, post: str | None,
    told: _Told,
) -> RawPost:  # fmt: skip
    place = f"{tar.name}/{member}"
    text = tar.read(data, caption, MAX_CAPTION_BYTES).decode("utf-8-sig") if caption is not None else None
    plain = RawPost(id=place, place=place, uri=tar.name, member=member, caption=text)
    if post is None:
        return plain
    value = parse(tar.read(data, post, MAX_VALUE_BYTES))
    if isinstance(value, Malformed) or not isinstance(value, dict):
        raise BadRecord(value.message if isinstance(value, Malformed) else "the .json is no object")
    if source.columns:
        told.columns.add(value)
        found = mapped_post(source, value, place, root, tar.name, member, place)
    elif any(name.startswith("tag") for name in value):
        try:
            found = danbooru_post(source, place, value, tar.name, member)
        except BadRecord as error:
            raise BadRecord(f"{error}; a .json that is no post is read through columns, such as columns.caption: caption") from error
    elif text is not None:
        told.passed_over("members .json are no posts and are not read beside a caption (columns maps them)", f"{tar.name}/{post}")
        return plain
    else:
        raise BadRecord(f"the .json is no Danbooru post: map its keys, such as columns.caption: caption. It has {listed(value)}")
    if found.caption is None:
        found.caption = text
    elif text is not None and text.strip() != found.caption:
        told.passed_over("texts in tars are not read, since columns.caption takes the captions from their .json", f"{tar.name}/{caption}")
    return found


def _quarantine(source: SourceConfig, place: str, reason: ErrorReason, error: Exception, message: str = "") -> Quarantine:
    told = printable(f"{place}: {message or error}")
    return Quarantine(printable(f"{source.name}:{place}"), "ingest", reason, told, type(error).__name__)
