"""e621 posts as JSON: API pages, arrays, one per line, or a file per post beside its image.

Three ratings (s is safe), `score.total`, tags by category; lore goes with meta, contributors with artists. Tags that
the site itself calls invalid are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config.dataset import SourceConfig
from train.prepare.folders.layouts import find_image
from train.prepare.posts.normalise import BadRecord, Found, RawPost
from train.prepare.sources.danbooru import fields_of, json_posts, post_number

_GROUPS = {  # theirs: ours
    "general": "general", "species": "species", "character": "character", "copyright": "copyright", "artist": "artist",
    "contributor": "artist", "meta": "meta", "lore": "meta",
}  # fmt: skip
_FIELDS = {  # ours: theirs, a group and its member
    "file_ext": "file.ext extension", "md5": "file.md5", "file_size": "file.size", "width": "file.width", "height": "file.height",
    "created_at": "created_at", "rating": "rating", "score": "score.total", "up_score": "score.up", "down_score": "score.down",
    "fav_count": "fav_count", "is_deleted": "flags.deleted", "is_pending": "flags.pending",
    "parent_id": "relationships.parent_id", "has_children": "relationships.has_children",
}  # fmt: skip


def read(source: SourceConfig) -> Iterator[Found]:
    """Every post of the source."""
    yield from json_posts(source, _post)


def _post(source: SourceConfig, root: Path, name: str, place: str, post: Mapping[str, Any]) -> RawPost:
    post_id = post_number(post.get("id"))
    fields = {"source_id": post_id, **fields_of(post, _FIELDS)}
    uri = find_image(root, name, post_id, fields, post)
    return RawPost(str(post_id), place, uri, fields, _tags(post), scheme="sqe", e621=True)


def _tags(post: Mapping[str, Any]) -> dict[str, list[str]]:
    tags = post.get("tags")
    if not isinstance(tags, dict):
        raise BadRecord("no tags by category: is this an e621 post?")
    found: dict[str, list[str]] = {}
    for theirs, ours in _GROUPS.items():
        group = tags.get(theirs) or []
        if not isinstance(group, list):
            raise BadRecord(f"tags.{theirs} is {group!r}, expected a list")
        found.setdefault(ours, []).extend(group)
    unknown = sorted(set(tags) - set(_GROUPS) - {"invalid"})
    if unknown:
        raise BadRecord(f"tags have the unknown categories {', '.join(map(str, unknown))}")
    return found
