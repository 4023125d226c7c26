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
from train.prepare.folders.files import source_root
from train.prepare.folders.layouts import find_image
from train.prepare.folders.walking import each_file
from train.prepare.formats.jsonstream import Malformed, iter_values
from train.prepare.posts.census import note
from train.prepare.posts.normalise import REFUSALS, BadRecord, Found, RawPost, refusal
from train.prepare.posts.tag_groups import tag_groups

MakePost = Callable[[SourceConfig, Path, str, str, Mapping[str, Any]], RawPost]
_ESCAPE = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|amp|lt|gt|quot);")
_FIELDS = {  # our column: names in the API, in gallery-dl, in old dumps
    "source_id": "id", "file_ext": "file_ext extension", "width": "image_width width", "height": "image_height height",
    "created_at": "created_at date",
    **{name: name for name in ("md5", "file_size", "rating", "score", "up_score", "down_score", "fav_count", "is_deleted",
                               "is_banned", "is_pending", "parent_id", "has_children")},
}  # fmt: skip


def read(source: SourceConfig) -> Iterator[Found]:
    """Every post of the source, files in sorted order."""
    yield from json_posts(source, _post)


def json_posts(source: SourceConfig, make: MakePost) -> Iterator[Found]:
    """What `make` makes of every post in the JSON files of the source."""
    root = source_root(source)

    def posts_of(name: str, file: Path) -> Iterator[Found]:
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

    yield from each_file(source, posts_of)


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
    fields = fields_of(post, _FIELDS)
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
    listed = (tag for tags in groups.values() if isinstance(tags, list) for tag in tags)
    if found := next((tag for tag in listed if isinstance(tag, str) and "&" in tag and _ESCAPE.search(tag)), None):
        note("escapes", f"{found!r} in {place}")  # no tag of Danbooru has one
    return RawPost(
        id=str(fields["source_id"]), place=place, uri=mapped or uri, member=member, fields=fields, tags=groups,
    )  # fmt: skip


def fields_of(post: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """Our columns from a post: of each column's paths, which blanks part, the first that says something.

    `file.md5` is a member of a group. Raises BadRecord for a group that is none.
    """
    return {
        column: next((value for path in names.split() if (value := _at(post, path)) is not None and value != ""), None)
        for column, names in paths.items()
    }


def _at(post: Mapping[str, Any], path: str) -> Any:
    name, dot, member = path.partition(".")
    part = post.get(name)
    if not dot:
        return part
    if part is None or isinstance(part, dict):
        return (part or {}).get(member)
    if name == "score":  # gallery-dl keeps e621's groups, exports write the score as one number
        return part if member == "total" else None
    raise BadRecord(f"{name} is {part!r}, expected an object")


def url_suffix(post: Mapping[str, Any]) -> str | None:
    """The ending of the address that a post without `file_ext` gives of its file."""
    url = fields_of(post, {"url": "file_url large_file_url"})["url"]
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
