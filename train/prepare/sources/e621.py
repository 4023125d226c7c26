"""e621 posts as JSON: API pages, arrays, one per line, or a file per post beside its image.

Three ratings (s is safe), `score.total`, tags by category; lore goes with meta, contributors with artists. Tags that
the site itself calls invalid are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config.dataset import SourceConfig
from train.prepare.folders.files import require_source, source_root
from train.prepare.folders.layouts import find_image
from train.prepare.posts.normalise import BadRecord, RawPost
from train.prepare.sources.danbooru import json_posts, post_number
from train.prepare.tables.schemas import Quarantine

_GROUPS = {  # theirs: ours
    "general": "general", "species": "species", "character": "character", "copyright": "copyright", "artist": "artist",
    "contributor": "artist", "meta": "meta", "lore": "meta",
}  # fmt: skip
_FIELDS = {  # ours: theirs, a group and its member
    "file_ext": ("file.ext", "extension"), "md5": ("file.md5",), "file_size": ("file.size",), "width": ("file.width",),
    "height": ("file.height",), "created_at": ("created_at",), "rating": ("rating",), "score": ("score.total",),
    "up_score": ("score.up",), "down_score": ("score.down",), "fav_count": ("fav_count",), "is_deleted": ("flags.deleted",),
    "is_pending": ("flags.pending",), "parent_id": ("relationships.parent_id",), "has_children": ("relationships.has_children",),
}  # fmt: skip


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every post of the source."""
    path = require_source(source)
    yield from json_posts(source, path, _post)


def _post(source: SourceConfig, root: Path, name: str, place: str, post: Mapping[str, Any]) -> RawPost:
    fields = e621_fields(post)
    post_id = fields["source_id"]
    uri = find_image(source_root(source), name, post_id, fields, post)
    return RawPost(
        id=str(post_id), place=place, uri=uri, fields=fields, tags=_tags(post), scheme="sqe", e621=True,
    )  # fmt: skip


def e621_fields(post: Mapping[str, Any]) -> dict[str, Any]:
    """Our columns from the nested groups of the API. Raises BadRecord."""
    found = {ours: next(filter(_is_said, (_at(post, path) for path in paths)), None) for ours, paths in _FIELDS.items()}
    return {"source_id": post_number(post.get("id")), **found}


def _is_said(value: Any) -> bool:
    return value is not None and value != ""


def _at(post: Mapping[str, Any], path: str) -> Any:
    group, _, name = path.rpartition(".")
    return (_part(post, group) if group else post).get(name)


def _part(post: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = post.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        # gallery-dl keeps the API's groups, exports write the score as one number
        if name == "score":
            return {"total": part}
        raise BadRecord(f"{name} is {part!r}, expected an object")
    return part


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
