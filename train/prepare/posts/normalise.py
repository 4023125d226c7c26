"""One canonical record from what an adapter read, or the reason why there is none.

An adapter hands over the fields under our column names with the source's own values; here numbers, dates, ratings,
tags and captions are brought to one form, so that the same post gives the same record from every layout.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from train.config.dataset import SourceConfig
from train.prepare.folders.files import UnsafePath, check_relative
from train.prepare.folders.kinds import media_kind
from train.prepare.posts.caption_remarks import CaptionTally
from train.prepare.posts.caption_text import (
    ESCAPED,
    MAX_TAGS,
    SURROGATE,
    BadCaption,
    CaptionRules,
    caption_rules,
    class_caption,
    mended,
    read_caption,
)
from train.prepare.posts.dates import read_date
from train.prepare.tables.schemas import TAG_GROUPS, ErrorReason, Quarantine
from train.recipe.exclusions import excluded_by
from train.recipe.tag_policy import RATING_WORDS

MAX_MESSAGE_CHARS = 1000
MAX_WEIGHT = 1e6  # of a picture's loss: a slip of the comma, not a wish
# What reading one hostile record may raise; anything else is a defect of ours and must show.
REFUSALS = (ValueError, TypeError, OverflowError, OSError, RecursionError)
_INT32 = ("width", "height", "up_score", "down_score", "fav_count")
_INT64 = ("source_id", "file_size", "parent_id")
_FLAGS = ("is_deleted", "is_banned", "is_pending", "has_children")
_UNPRINTABLE = re.compile("[\x00-\x1f\ud800-\udfff]")
_SUSPECT = re.compile("[\ud800-\udfff\\\\]")
_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0", "")


class BadRecord(ValueError):
    """A record that cannot be taken as it is; the message says what and where."""


@dataclass
class RawPost:
    """One post as an adapter found it."""

    id: str  # second half of the key
    place: str  # file and row, for messages
    uri: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # our column names, their values
    tags: Mapping[str, Any] = field(default_factory=dict)  # group: list of tags, or None
    caption: str | Sequence[str] | None = None  # several texts are read one after another
    beside: str | None = None  # ending of a text beside the picture that is not read
    member: str | None = None
    scheme: str = "gsqe"  # the adapter's; the source's `rating_scheme` wins
    e621: bool = False


Found = RawPost | Quarantine  # what adapters yield


def to_record(
    post: RawPost, source: SourceConfig, rules: CaptionRules | None = None, tally: CaptionTally | None = None
) -> dict[str, Any] | Quarantine:
    """A row of the table `records`, or a Quarantine row. Never raises for bad data.

    `rules`: how captions are read, the source's with `|||` if not given; `tally` counts what is to be said of them.
    """
    key = f"{source.name}:{post.id}"
    try:
        return _record(key, post, source, rules or caption_rules(source), CaptionTally() if tally is None else tally)
    except REFUSALS as error:
        return refusal(key, post.place, error)


def refusal(key: str, place: str, error: Exception) -> Quarantine:
    """The quarantine row of a record that raised one of REFUSALS."""
    reason: ErrorReason = "bad_record"
    if isinstance(error, UnsafePath):
        reason = "outside_root"
    elif isinstance(error, BadCaption):
        reason = "bad_caption"
    message = printable(f"{place}: {error}")
    return Quarantine(printable(key), "ingest", reason, message[:MAX_MESSAGE_CHARS], type(error).__name__)


def printable(text: str) -> str:
    """`text` with what a table cannot hold written as escapes."""
    if not _UNPRINTABLE.search(text):
        return text
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if ord(letter) >= 32 else repr(letter)[1:-1] for letter in text)


def _record(
    key: str, post: RawPost, source: SourceConfig, rules: CaptionRules, tally: CaptionTally
) -> dict[str, Any] | Quarantine:
    check_relative(post.uri)
    if (kind := media_kind(post.member or post.uri)) is not None:
        return Quarantine(printable(key), "ingest", "not_a_picture", printable(f"{post.place}: {post.uri} is no picture: {kind}"))
    if not post.id or printable(key) != key or printable(post.member or "") != (post.member or ""):
        raise BadRecord(f"id {post.id!a} is empty or holds control characters")
    row: dict[str, Any] = {"key": key, "source": source.name, "uri": post.uri, "member": post.member}
    fields = post.fields
    row["file_ext"] = _extension(fields.get("file_ext"), post.member or post.uri)
    row["md5"] = _md5(fields.get("md5"))
    row |= {name: _whole(fields.get(name), name, 31) for name in _INT32}
    row |= {name: _whole(fields.get(name), name, 63) for name in _INT64}
    row["parent_id"] = row["parent_id"] or None  # old dumps write 0 for none
    row |= {name: _flag(fields.get(name), name) for name in _FLAGS}
    row["created_at"], row["created_year"] = _date(fields.get("created_at"))
    row["media_year"] = _date(fields.get("media_at"))[1]
    row["rating"] = _rating(fields.get("rating"), source.rating_scheme or post.scheme)
    row["score"], row["score_real"] = _score(fields.get("score"))
    row |= {f"tags_{group}": _tags(post.tags.get(group), rules) for group in TAG_GROUPS}
    caption = post.caption if post.caption is not None or any(post.tags.values()) else class_caption(source, post.uri)
    row["caption"], seen = (None, None) if caption is None else read_caption(caption, rules, tally)
    row["pixel_hash_src"] = _text(fields.get("pixel_hash_src"))
    if (weight := _weight(fields.get("weight"))) is not None:  # without one the hash is as it was before there were weights
        row["weight"] = weight
    row["raw_hash"] = _raw_hash(row)
    row["hard_exclusion"] = excluded_by(  # the first gate: every tag list, and all of the caption's text
        rating=row["rating"],
        tags=[*row["tags_general"], *row["tags_meta"], *row["tags_species"]],
        characters=row["tags_character"],
        caption=seen,
        assume_rating=source.assume_rating,
        e621=post.e621,
    )
    return row


def _raw_hash(row: Mapping[str, Any]) -> str:
    """Hash of the content, not of the place: a moved file is the same record."""
    content = {name: value for name, value in row.items() if name not in ("uri", "member")}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _extension(value: Any, name: str) -> str:
    suffix = PurePosixPath(name).suffix
    text = (value if isinstance(value, str) and value else suffix).lower().lstrip(".")
    return text if re.fullmatch(r"[a-z0-9]{0,10}", text) else suffix.lower().lstrip(".")


def _md5(value: Any) -> str | None:
    text = _text(value)
    return text.lower() if text and re.fullmatch(r"[0-9a-fA-F]{32}", text) else None


def _text(value: Any) -> str | None:
    return printable(value[:200]) if isinstance(value, str) and value else None


def words(text: str) -> list[str]:
    """Tags of a text that spaces join, as sites write it. Other white space is part of a tag: tags may hold U+3000."""
    return [word for word in text.strip(" \t\r\n").split(" ") if word]


def is_missing(value: Any) -> bool:
    """None, an empty text, or NaN: what tables write for `no value`."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any, name: str, bits: int) -> int | None:
    if is_missing(value):
        return None
    number = _number(value, name)
    if number != int(number):
        raise BadRecord(f"{name} is {value!r}, expected a whole number")
    if abs(number) >= 1 << bits:
        raise BadRecord(f"{name} is {value!r}, too large")
    return int(number)


def _number(value: Any, name: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadRecord(f"{name} is {value!r}, expected a number")
    if isinstance(value, str):
        text = value.strip()
        if not re.fullmatch(r"[+-]?\d{1,20}(\.\d{0,20})?([eE][+-]?\d{1,3})?", text):
            raise BadRecord(f"{name} is {value[:80]!r}, expected a number")
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRecord(f"{name} is {value!r}, expected a finite number")
    return value


def _score(value: Any) -> tuple[int | None, float | None]:
    if is_missing(value):
        return None, None
    number = _number(value, "score")
    if number == int(number):
        return _whole(int(number), "score", 31), None
    return None, float(number)


def _weight(value: Any) -> float | None:
    if is_missing(value):
        return None
    number = float(_number(value, "weight"))
    if not 0 <= number <= MAX_WEIGHT:
        raise BadRecord(f"weight is {value!r}, expected 0 to {MAX_WEIGHT:g}")
    return number


def _flag(value: Any, name: str) -> bool:
    if is_missing(value):
        return False
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise BadRecord(f"{name} is {value!r}, expected true or false")


def _date(value: Any) -> tuple[str | None, int | None]:
    """(ISO text in the date's own offset, its year); a date that cannot be read is kept as it is, without a year."""
    if is_missing(value):
        return None, None
    found = read_date(value)
    if found is None:
        return printable(str(value))[:200], None
    return found.isoformat(), found.year


def _rating(value: Any, scheme: str) -> str | None:
    """g, s, q, e, or None for a missing or unknown rating. In a scheme of three, s is for safe."""
    if not isinstance(value, str):
        return None
    word = value.strip().lower()
    letter = RATING_WORDS.get(word) or (word if word in ("g", "s", "q", "e") else None)
    return "g" if scheme == "sqe" and word == "s" else letter


def _tags(value: Any, rules: CaptionRules) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise BadRecord(f"tags are {value!r}, expected a list")
    tags = list(value)
    if len(tags) > MAX_TAGS:
        raise BadRecord(f"{len(tags)} tags, expected at most {MAX_TAGS}")
    try:
        text = " ".join(tags)
        if not _SUSPECT.search(text) and not rules.bad_in_tag.search(text):
            return tags
    except TypeError as error:
        raise BadRecord(f"a tag is not text: {error}") from error
    return [tag for tag in (_tag(tag, rules) for tag in tags) if tag is not None]


def _tag(tag: str, rules: CaptionRules) -> str | None:
    """A tag with something suspect in it: unescaped, refused, replaced, or None to drop it."""
    if rules.escaped:
        tag = ESCAPED.sub(r"\1", tag)
    if SURROGATE.search(tag):
        raise BadRecord(f"tag {tag!a} holds broken characters")
    if not rules.bad_in_tag.search(tag):
        return tag
    if rules.on_bad_tag == "error":
        raise BadRecord(f"tag {tag!r} holds a comma, a separator, a line break or a control character: see on_bad_tag")
    return mended(tag, rules.bad_in_tag, rules.on_bad_tag)
