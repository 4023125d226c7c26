"""Danbooru posts as JSON: one file per post beside its image (as gallery-dl writes), arrays, or one post per line.

Reads today's API, gallery-dl's additions and old dumps (numbers as strings, `tags` as {name, category}).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config.dataset import SourceConfig
from train.prepare.folders.files import require_source, source_root
from train.prepare.folders.layouts import find_image
from train.prepare.folders.walking import walk
from train.prepare.formats.jsonstream import Malformed, iter_values
from train.prepare.posts.census import note
from train.prepare.posts.normalise import REFUSALS, BadRecord, RawPost, refusal
from train.prepare.posts.tag_groups import tag_groups
from train.prepare.tables.schemas import Quarantine

MakePost = Callable[[SourceConfig, Path, str, str, Mapping[str, Any]], RawPost]
_ESCAPE = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|amp|lt|gt|quot);")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_FIELDS = {  # our column: names in the API, in gallery-dl, in old dumps
    "source_id": ("id",),
    "file_ext": ("file_ext", "extension"),
    "md5": ("md5",),
    "file_size": ("file_size",),
    "width": ("image_width", "width"),
    "height": ("image_height", "height"),
    "created_at": ("created_at", "date"),
    "rating": ("rating",),
    "score": ("score",),
    "up_score": ("up_score",),
    "down_score": ("down_score",),
    "fav_count": ("fav_count",),
    "is_deleted": ("is_deleted",),
    "is_banned": ("is_banned",),
    "is_pending": ("is_pending",),
    "parent_id": ("parent_id",),
    "has_children": ("has_children",),
}


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every post of the source, files in sorted order."""
    yield from json_posts(source, require_source(source), _post)


def json_posts(source: SourceConfig, path: Path, make: MakePost) -> Iterator[RawPost | Quarantine]:
    """What `make` makes of every post in the JSON files of a file or folder."""
    for name, file in json_files(source, path):
        if isinstance(file, Quarantine):
            yield file
        else:
            yield from _posts(source, name, file, make)


def json_files(source: SourceConfig, path: Path) -> Iterator[tuple[str, Path | Quarantine]]:
    """(name relative to the source, file) of the JSON files of a file or folder."""
    if path.is_file():
        yield path.name, path
        return
    for found in walk(source, path):
        if isinstance(found, Quarantine):
            yield found.key, found
        elif found.lower().endswith(JSON_SUFFIXES):
            yield found, path / found


def _posts(source: SourceConfig, name: str, file: Path, make: MakePost) -> Iterator[RawPost | Quarantine]:
    root = source_root(source)
    posts = (found for row, value in iter_values(file) for found in _unwrapped(f"{name} row {row}", value))
    try:
        first = list(itertools.islice(posts, 2))
        # Only a post that has the file for itself may have its picture beside it: 1.jpg is no picture of page 1.json.
        beside = name if len(first) == 1 else name.rpartition("/")[0] + "/"
        for place, post in itertools.chain(first, posts):
            try:
                if isinstance(post, Malformed):
                    raise BadRecord(post.message)
                if not isinstance(post, dict):
                    raise BadRecord(f"expected a post, found {type(post).__name__}")
                yield make(source, root, beside, place, post)
            except REFUSALS as error:
                yield refusal(f"{source.name}:{place.replace(' row ', '#')}", place, error)
    except OSError as error:
        yield refusal(f"{source.name}:{name}", name, error)


def _unwrapped(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The posts of an API page, `{"posts": [...]}`, or the value itself."""
    if isinstance(value, dict) and "id" not in value:
        for key in ("posts", "post"):
            if isinstance(value.get(key), list):
                yield from ((f"{place} {key} {number}", post) for number, post in enumerate(value[key]))
                return
    yield place, value


def _post(source: SourceConfig, root: Path, name: str, place: str, post: Mapping[str, Any]) -> RawPost:
    found = danbooru_post(source, place, post, "", None)
    if not found.uri:
        found.uri = find_image(root, name, int(found.id), found.fields, post)
    return found


def danbooru_post(
    source: SourceConfig, place: str, post: Mapping[str, Any], uri: str, member: str | None
) -> RawPost:
    """A post's JSON as a record; `uri` may be empty where the image is still to be found. Raises BadRecord."""
    fields = {column: first_of(post, names) for column, names in _FIELDS.items()}
    fields |= {column: post.get(theirs) for column, theirs in source.columns.items() if column != "uri"}
    asset = post.get("media_asset")
    if isinstance(asset, dict):
        fields["media_at"] = asset.get("created_at")
        fields["pixel_hash_src"] = asset.get("pixel_hash")
    fields["source_id"] = post_number(fields["source_id"])
    fields["file_ext"] = fields["file_ext"] or url_suffix(post)
    mapped = post.get(source.columns["uri"]) if "uri" in source.columns else None
    if mapped is not None and not isinstance(mapped, str):
        raise BadRecord(f"{source.columns['uri']} is {mapped!r}, expected a path")
    groups = tag_groups(post)
    if found := _escaped(groups):
        note("escapes", f"{found!r} in {place}")
    return RawPost(
        id=str(fields["source_id"]), place=place, uri=mapped or uri, member=member, fields=fields, tags=groups,
    )  # fmt: skip


def _escaped(groups: Mapping[str, Any]) -> str | None:
    """The first tag with an HTML escape in it, which no tag of Danbooru has."""
    listed = (tag for tags in groups.values() if isinstance(tags, list) for tag in tags)
    return next((tag for tag in listed if isinstance(tag, str) and "&" in tag and _ESCAPE.search(tag)), None)


def first_of(post: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first value that is there."""
    return next((post[name] for name in names if post.get(name) is not None), None)


def url_suffix(post: Mapping[str, Any]) -> str | None:
    """The ending of the address that a post without `file_ext` gives of its file."""
    url = first_of(post, ("file_url", "large_file_url"))
    found = re.search(r"\.(\w{1,10})(?:[?#].*)?$", url) if isinstance(url, str) else None
    return found[1].lower() if found else None


def post_number(value: Any) -> int:
    """A post's id; 1.0 and "1.0", as tables make of whole numbers, are 1. Raises BadRecord for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRecord(f"id is {value!r}, expected a whole number")
    text = f"{value:f}" if isinstance(value, float) else str(value).strip()
    whole = re.fullmatch(r"([0-9]{1,18})(\.0*)?", text)
    if whole is None or (isinstance(value, float) and value >= 2**53):
        raise BadRecord(f"id is {str(value)[:80]!r}, expected a whole number")
    return int(whole[1])
