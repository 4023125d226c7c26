"""Gelbooru and moebooru posts as JSON: HTML-escaped tags, rating words, dates of their own.

Posts that carry categories of their own (`tag_info`, a list of {tag, type}, gallery-dl's `tags_artist`) use them. Tags
without one have the category of `dictionary`, a CSV of (name, category, count, aliases) with Danbooru's category numbers;
without it they are general, and names cannot be told from tags.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.files import require_source
from train.prepare.folders.layouts import find_image
from train.prepare.posts.normalise import RawPost
from train.prepare.posts.tag_groups import CATEGORIES, tag_groups
from train.prepare.sources.danbooru import first_of, json_posts, post_number, url_suffix
from train.prepare.tables.schemas import Quarantine

_FIELDS = {
    "file_ext": ("file_ext", "extension"), "md5": ("md5", "hash"), "file_size": ("file_size",),
    "width": ("width",), "height": ("height",), "created_at": ("created_at", "date"), "rating": ("rating",),
    "score": ("score",), "fav_count": ("fav_count",), "parent_id": ("parent_id",), "has_children": ("has_children",),
}  # fmt: skip


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every post of the source."""
    path = require_source(source)
    categories = read_dictionary(Path(source.dictionary)) if source.dictionary else {}

    def post(source: SourceConfig, root: Path, name: str, place: str, value: Mapping[str, Any]) -> RawPost:
        return _post(source, root, name, place, value, categories)

    yield from json_posts(source, path, post)


def _post(
    source: SourceConfig, root: Path, name: str, place: str, post: Mapping[str, Any], categories: Mapping[str, str]
) -> RawPost:
    fields = {column: first_of(post, names) for column, names in _FIELDS.items()}
    post_id = fields["source_id"] = post_number(post.get("id"))
    status = post.get("status")
    fields["is_deleted"], fields["is_pending"] = status == "deleted", status == "pending"
    image = post.get("image")
    if not fields["file_ext"] and isinstance(image, str):
        fields["file_ext"] = PurePosixPath(image).suffix.lstrip(".")
    fields["file_ext"] = fields["file_ext"] or url_suffix(post)
    groups = tag_groups(post, categories, html.unescape)  # once: a tag may itself spell an escape
    listed = {**post, "filename": PurePosixPath(image).stem} if isinstance(image, str) and image else post
    uri = find_image(root, name, post_id, fields, listed)
    return RawPost(id=str(post_id), place=place, uri=uri, fields=fields, tags=groups, scheme="sqe")


def read_dictionary(path: Path) -> dict[str, str]:
    """Our group of each tag and alias. Raises Halt(USAGE) naming the line that cannot be read."""
    groups: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file)):
                if not row or (number == 0 and not row[1:2][0].strip().isdigit()):
                    continue  # header
                category = CATEGORIES.get(int(row[1]))
                if category is None:
                    raise ValueError(f"category {row[1]} of {row[0]!r} is not one of {sorted(CATEGORIES)}")
                groups[row[0]] = category
                for alias in row[3].split(",") if len(row) > 3 else []:
                    groups.setdefault(alias.strip(), category)
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise Halt(ExitCode.USAGE, f"dictionary {path}: {error}: expected name, category, count, aliases") from error
    return groups
