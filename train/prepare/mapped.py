"""Rows with a column map (`columns: ours: theirs`) as posts; shared by tables, imagefolders and WebDataset."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.exits import ExitCode, Halt
from train.prepare.danbooru import post_number
from train.prepare.layouts import find_image
from train.prepare.names import on_disk
from train.prepare.normalise import BadRecord, RawPost, is_missing, words
from train.prepare.records import TAG_GROUPS
from train.prepare.settings import SourceConfig

FIELDS = (
    "source_id", "file_ext", "md5", "file_size", "width", "height", "created_at", "media_at", "rating", "score",
    "up_score", "down_score", "fav_count", "is_deleted", "is_banned", "is_pending", "parent_id", "has_children",
    "pixel_hash_src",
)  # fmt: skip
TAG_COLUMNS = tuple(f"tags_{group}" for group in TAG_GROUPS)
_LIST_AS_TEXT = re.compile(r"\[\s*(['\"].*['\"]\s*)?\]", re.DOTALL)
_KNOWN = frozenset(["id", "uri", "image", "caption", "fallback_caption", "tags", *FIELDS, *TAG_COLUMNS])


def check_columns(source: SourceConfig) -> None:
    """Raises Halt(USAGE) for a column of ours that does not exist."""
    unknown = sorted(set(source.columns) - _KNOWN)
    if unknown:
        raise Halt(
            ExitCode.USAGE,
            f"sources {source.name}: columns names {', '.join(unknown)}; known are {', '.join(sorted(_KNOWN))}",
        )


def mapped_post(
    source: SourceConfig, row: Mapping[str, Any], place: str, root: Path,
    uri: str | None = None, member: str | None = None, row_id: str | None = None,
) -> RawPost:  # fmt: skip
    """One row as a post. `uri`, `member` and `row_id` win over the columns of the same meaning.

    Without an id column the id is the path. Raises BadRecord.
    """
    values = {ours: row.get(theirs) for ours, theirs in source.columns.items()}
    tags = _tag_lists(source, values)
    fields = {name: values[name] for name in FIELDS if name in values}
    number = _plain_id(values.get("id"))
    if number is not None and number.isascii() and number.isdigit() and len(number) < 19:
        fields.setdefault("source_id", int(number))
    uri = uri or _text(values.get("uri"), "uri")
    if uri is not None and member is None:
        uri = on_disk(root, uri)
    if uri is None:
        if "source_id" not in fields:
            raise BadRecord("neither a path (columns.uri) nor a whole number as id (columns.id)")
        uri = find_image(root, "", post_number(fields["source_id"]), fields, row)
    return RawPost(
        id=number or row_id or uri,
        place=place,
        uri=uri,
        member=member,
        fields=fields,
        tags=tags,
        caption=_text(values.get("caption"), "caption"),
    )


def _plain_id(value: Any) -> str | None:
    if is_missing(value):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value != value:
        raise BadRecord(f"id is {value!r}, expected a number or text")
    if isinstance(value, float):
        if value != int(value):
            raise BadRecord(f"id is {value!r}, expected a whole number")
        value = int(value)
    text = str(value).strip()
    return text.partition(".")[0] if re.fullmatch(r"[0-9]+\.0+", text) else text  # what floats leave in a CSV


def _text(value: Any, name: str) -> str | None:
    if value is None or (isinstance(value, float) and value != value):
        return None
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {value!r}, expected text")
    return value if value or name == "caption" else None


def _tag_lists(source: SourceConfig, values: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for column in (*TAG_COLUMNS, "tags"):
        tags = split_tags(source, values.get(column), column)
        if tags:
            # tags without a category are general: nothing tells names from tags
            found.setdefault("general" if column == "tags" else column.removeprefix("tags_"), []).extend(tags)
    return found


def _list_in(text: str, column: str) -> list[Any]:
    """A list that a table of texts holds as JSON. As Python prints it, its quotes would end up inside the tags."""
    try:
        return list(json.loads(text))
    except ValueError:
        raise BadRecord(f"{column} is a list as Python prints it ({text[:60]}): write JSON, or joined text") from None


def split_tags(source: SourceConfig, value: Any, column: str) -> list[Any]:
    """A list column as it is, one written as JSON too; a joined text split at the declared separator."""
    if is_missing(value):
        return []
    if isinstance(value, str) and _LIST_AS_TEXT.fullmatch(value):
        return _list_in(value, column)
    if isinstance(value, str):
        if source.tag_separator is None:
            raise Halt(
                ExitCode.USAGE,
                f"sources {source.name}: {column} is text: state tag_separator (such as ' ' or ', ')",
            )
        if not source.tag_separator.strip(" "):
            return list(words(value))
        return [tag.strip() for tag in value.split(source.tag_separator)]
    if not isinstance(value, list | tuple):
        raise BadRecord(f"{column} is {value!r}, expected a list or text")
    return list(value)
