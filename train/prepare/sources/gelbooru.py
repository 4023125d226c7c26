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
from train.prepare.folders.layouts import find_image
from train.prepare.posts.normalise import Found, RawPost
from train.prepare.posts.tag_groups import CATEGORIES, tag_groups
from train.prepare.sources.danbooru import fields_of, json_posts, post_number, url_suffix

_FIELDS = {
    "file_ext": "file_ext extension", "md5": "md5 hash", "created_at": "created_at date",
    **{name: name for name in ("file_size", "width", "height", "rating", "score", "fav_count", "parent_id", "has_children")},
}  # fmt: skip


def read(source: SourceConfig) -> Iterator[Found]:
    """Every post of the source."""
    categories = read_dictionary(Path(source.dictionary)) if source.dictionary else {}

    def post(source: SourceConfig, root: Path, name: str, place: str, post: Mapping[str, Any]) -> RawPost:
        fields = fields_of(post, _FIELDS)
        post_id = fields["source_id"] = post_number(post.get("id"))
        status = post.get("status")
        fields["is_deleted"], fields["is_pending"] = status == "deleted", status == "pending"
        image, listed = post.get("image"), post
        if isinstance(image, str) and image:
            fields["file_ext"] = fields["file_ext"] or PurePosixPath(image).suffix.lstrip(".")
            listed = {**post, "filename": PurePosixPath(image).stem}
        fields["file_ext"] = fields["file_ext"] or url_suffix(post)
        groups = tag_groups(post, categories, html.unescape)  # once: a tag may itself spell an escape
        return RawPost(str(post_id), place, find_image(root, name, post_id, fields, listed), fields, groups, scheme="sqe")

    yield from json_posts(source, post)


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
