"""Dates in every form that dumps hold: API text, mail headers, seconds or milliseconds since 1970, objects of exports.

Only the year and the offset as written matter later; a date that cannot be read costs its post no more than the year.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from train.recipe.tag_policy import parse_date

_UNITS_PER_S = (1, 10**3, 10**6, 10**9)  # of a count since 1970: seconds, milli-, micro-, nanoseconds
_MOST_S = 10**10  # more of a unit is a finer unit: 10^10 s is the year 2286, 10^10 ms is in 1970
_NUMBER = re.compile(r"[+-]?\d{1,20}(\.\d{0,9})?")
_PARTIAL = re.compile(r"(\d{4})(?:[-/.](\d{1,2})(?:[-/.](\d{1,2}))?)?")  # a year, a month, a day with other dots
_SLASHES = re.compile(r"^(\d{4})[/.](\d{2})[/.](\d{2})(?=[ T])")
_WORDED = ("%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d %B %Y", "%a %b %d %H:%M:%S %Y", "%a %b %d %H:%M:%S %Z %Y",
           "%Y:%m:%d %H:%M:%S")  # fmt: skip


def read_date(value: Any) -> datetime | date | None:
    """The date in its own offset, or None where there is none to be read. Raises nothing."""
    try:
        return _read(value)
    except (ValueError, OverflowError, OSError, TypeError):
        return None


def _read(value: Any) -> datetime | date | None:
    if isinstance(value, date):  # also datetime
        return None if value != value else value  # pandas' missing time is a date that is not itself
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return _of_number(value)
    if isinstance(value, Mapping):
        return _of_object(value)
    return _of_text(value.strip()) if isinstance(value, str) else None


def _of_number(value: int | float) -> datetime | date | None:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if 1900 <= value <= 2100 and value == int(value):  # no site is as old as its first hour: a year
        return date(int(value), 1, 1)
    if 19000101 <= value <= 21001231 and value == int(value):
        text = str(int(value))
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    per_s = next((unit for unit in _UNITS_PER_S if abs(value) < _MOST_S * unit), None)
    return None if per_s is None else datetime.fromtimestamp(value / per_s, UTC)


def _of_object(value: Mapping[str, Any]) -> datetime | date | None:
    """`{"$date": ...}` of MongoDB, `{"json_class": "Time", "s": ...}` of old boorus, and their like."""
    if "$date" in value:
        inner = value["$date"]
        if isinstance(inner, Mapping):
            inner = int(inner["$numberLong"]) if "$numberLong" in inner else None
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            return datetime.fromtimestamp(inner / 1000, UTC)  # milliseconds by definition, however small
        return _read(inner)
    for name in ("s", "seconds", "_seconds"):
        if name in value:
            return datetime.fromtimestamp(float(value[name]), UTC)
    return _read(value.get("date"))  # PHP's


def _of_text(text: str) -> datetime | date | None:
    if (whole := _PARTIAL.fullmatch(text)) is not None:
        year, month, day = (int(part or 1) for part in whole.groups())
        return date(year, month, day)
    if (found := parse_date(_SLASHES.sub(r"\1-\2-\3", text))) is not None:
        return found
    if _NUMBER.fullmatch(text):
        return _of_number(float(text) if "." in text else int(text))
    for form in _WORDED:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    return parsedate_to_datetime(text)
