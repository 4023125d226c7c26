"""Rows with a column map (`columns: ours: theirs`) as posts; shared by tables, imagefolders and WebDataset."""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.files import UnsafePath
from train.prepare.folders.layouts import find_image
from train.prepare.folders.names import on_disk
from train.prepare.formats.cells import lines_in, tags_in
from train.prepare.formats.columns import TAG_COLUMNS
from train.prepare.posts.caption_remarks import likely_separator
from train.prepare.posts.census import note
from train.prepare.posts.normalise import BadRecord, RawPost, is_missing, words
from train.prepare.sources.danbooru import post_number

FIELDS = (
    "source_id", "file_ext", "md5", "file_size", "width", "height", "created_at", "media_at", "rating", "score",
    "up_score", "down_score", "fav_count", "is_deleted", "is_banned", "is_pending", "parent_id", "has_children",
    "pixel_hash_src", "weight",
)  # fmt: skip
# What pandas, Python and databases print for a missing value; as a caption each would be a word to learn.
_PRINTED_MISSING = frozenset(["nan", "NaN", "None", "null", "NULL", "<NA>", "NaT", "\\N"])
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ABSOLUTE = re.compile(r"/|[A-Za-z]:/")
_KNOWN = frozenset(["id", "uri", "image", "caption", "fallback_caption", "tags", *FIELDS, *TAG_COLUMNS])


def check_columns(source: SourceConfig) -> None:
    """Raises Halt(USAGE) for a column of ours that does not exist."""
    unknown = sorted(set(source.columns) - _KNOWN)
    if unknown:
        close = difflib.get_close_matches(unknown[0], _KNOWN, 1)
        swapped = [f"{ours}: {theirs}" for theirs, ours in source.columns.items() if theirs in unknown and ours in _KNOWN]
        hint = f" (did you mean {(swapped or close)[0]}?)" if swapped or close else ""
        raise Halt(
            ExitCode.USAGE,
            f"sources {source.name}: columns names {', '.join(unknown)}{hint}; known are {', '.join(sorted(_KNOWN))}",
        )


def mapped_post(
    source: SourceConfig, row: Mapping[str, Any], place: str, root: Path,
    uri: str | None = None, member: str | None = None, row_id: str | None = None,
) -> RawPost:  # fmt: skip
    """One row as a post. `uri`, `member` and `row_id` win over the columns of the same meaning.

    Without an id column the id is the path. Raises BadRecord.
    """
    values = {ours: _said(ours, row.get(theirs)) for ours, theirs in source.columns.items()}
    tags = _tag_lists(source, values)
    fields = {name: values[name] for name in FIELDS if name in values}
    number = _plain_id(values.get("id"))
    if number is not None and number.isascii() and number.isdigit() and len(number) < 19:
        fields.setdefault("source_id", int(number))
    if uri is None and (named := _text(values.get("uri"), "uri")) is not None:
        uri = below(root, named)
    if uri is not None and member is None:
        uri = on_disk(root, uri)
    if uri is None:
        if "source_id" not in fields:
            raise BadRecord("no path (columns.uri), no whole number as id (columns.id), no embedded picture (columns.image)")
        uri = find_image(root, "", post_number(fields["source_id"]), fields, row)
    return RawPost(
        id=number or row_id or uri,
        place=place,
        uri=uri,
        member=member,
        fields=fields,
        tags=tags,
        caption=_caption(values.get("caption"), source.columns.get("caption", "caption")),
    )


def _said(ours: str, value: Any) -> Any:
    """The value, None for one that only says that there is none, which is counted; a path may be called so."""
    if not isinstance(value, str) or value.strip() not in _PRINTED_MISSING or ours in ("id", "uri", "image"):
        return value
    note("missing", f"{value.strip()!r} in {ours}")
    return None


def below(root: Path, text: str, folder: str = "") -> str:
    """A path that a table names, relative to `root`; it is meant relative to `folder`, itself relative to `root`.

    Backslashes of a table made on Windows are slashes. Raises BadRecord for an address, UnsafePath for another disk's path.
    """
    if "://" in text and _ADDRESS.match(text):
        raise BadRecord(f"{text[:200]!r} is an address, and nothing is downloaded: fetch the pictures, and map a column "
                        "with their file names to columns.uri")  # fmt: skip
    if "\\" in text and not (root / folder / text).exists():
        text = text.replace("\\", "/")
    if _ABSOLUTE.match(text):
        inside = (Path(text).relative_to(base) for base in (root, root.resolve()) if Path(text).is_relative_to(base))
        if (found := next(inside, None)) is not None:
            return found.as_posix()
        raise UnsafePath(f"{text!r} is not a path inside the source root: write it relative to the pictures' folder, and set "
                         "images to that folder")  # fmt: skip
    return posixpath.normpath(posixpath.join(folder, text))


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
    return value or None


def _caption(value: Any, column: str) -> str | None:
    """A caption; a list of captions as its lines, of which `caption_lines` decides."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    return lines_in(value, column)


def _tag_lists(source: SourceConfig, values: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for column in TAG_COLUMNS:
        if column not in values:
            continue
        tags = split_tags(source, values[column], source.columns[column])
        if tags:
            # tags without a category are general: nothing tells names from tags
            found.setdefault("general" if column == "tags" else column.removeprefix("tags_"), []).extend(tags)
    return found


def split_tags(source: SourceConfig, value: Any, column: str) -> list[str]:
    """A list as it is, one that a program printed too; a joined text split at the declared separator."""
    if is_missing(value):
        return []
    if not isinstance(value, str | list | tuple | Mapping):
        raise BadRecord(f"{column} is {value!r}, expected a list or text")
    listed = tags_in(value, column)
    if listed is not None or not isinstance(value, str):
        return listed or []
    if source.tag_separator is None:
        raise Halt(
            ExitCode.USAGE,
            f"sources {source.name}: {column} is text: state tag_separator (such as ' ' or ', ')",
        )
    if not source.tag_separator.strip(" "):
        return list(words(value))
    # no tag holds a comma: `a,b` and `a, b,` are meant alike
    separator = "," if source.tag_separator.strip() == "," else source.tag_separator
    tags = [tag.strip() for tag in value.split(separator)]
    if len(tags) == 1 and likely_separator(value) is not None:
        note("one_tag", repr(value[:60]))
    return tags[:-1] if not tags[-1] else tags
