"""Dates as dumps write them: one year, whatever the form; what cannot be read is named and counted, and loses its year."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from train.prepare.posts.dates import read_date

S = 1246456800  # 2009-07-01T14:00:00+00:00
FORMS: dict[str, Any] = {
    "iso": "2009-07-01T10:00:00-04:00", "api": "2009-07-01T10:00:00.123-04:00", "zulu": "2009-07-01T14:00:00Z",
    "dump": "2009-07-01 14:00:00 UTC", "fraction and offset": "2009-07-01 10:00:00.123456 -0400",
    "old gelbooru": "Wed Jul 01 10:00:00 -0400 2009", "mail": "Wed, 01 Jul 2009 10:00:00 -0400",
    "mail without day": "01 Jul 2009 14:00:00 GMT", "epoch": S, "epoch text": str(S), "epoch fraction": S + 0.5,
    "epoch fraction text": f"{S}.5", "milliseconds": S * 1000, "milliseconds text": str(S * 1000),
    "microseconds": S * 10**6, "nanoseconds": S * 10**9,
    "mongo text": {"$date": "2009-07-01T14:00:00Z"}, "mongo number": {"$date": S * 1000},
    "mongo long": {"$date": {"$numberLong": str(S * 1000)}}, "ruby": {"json_class": "Time", "s": S, "n": 5},
    "moebooru": {"n": 5, "s": str(S)}, "protobuf": {"seconds": S, "nanos": 0},
    "php": {"date": "2009-07-01 14:00:00.000000", "timezone_type": 3, "timezone": "UTC"},
    "day": "2009-07-01", "compact": "20090701", "compact number": 20090701, "slashes": "2009/07/01 14:00:00",
    "slashed day": "2009/7/1", "month": "2009-07", "words": "Jul 1, 2009", "EXIF": "2009:07:01 14:00:00",
    "date": date(2009, 7, 1),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_first_of_july(form: str) -> None:
    found = read_date(FORMS[form])
    assert found is not None
    assert (found.year, found.month, found.day) == (2009, 7, 1)
    hour = getattr(found, "hour", None)
    assert hour in (None, 0, 10, 14), hour


def test_the_offset_is_kept_as_written() -> None:
    for text in ("2020-12-31T23:30:00-05:00", "Thu, 31 Dec 2020 23:30:00 -0500", "2020-12-31 23:30:00.25 -0500"):
        found = read_date(text)
        assert found is not None
        assert found.year == 2020  # 2021 only in UTC


def test_a_year_alone_is_a_year() -> None:
    assert [getattr(read_date(value), "year", None) for value in (2019, "2019", 2019.0)] == [2019] * 3
    small = read_date({"$date": 86_400_000})
    assert small is not None
    assert (small.year, small.day) == (1970, 2)


@pytest.mark.parametrize(
    "value",
    ["", "soon", "0000-00-00", "0000-00-00 00:00:00", None, True, [2009], {}, {"$date": None}, {"s": "x"}, 1e300, float("nan"),
     float("inf"), 10**30, "9" * 20, {"$date": 1e300}, {"$date": {"$date": 5}}, b"2009", "13/32/2009"],
)  # fmt: skip
def test_what_is_no_date(value: Any) -> None:
    assert read_date(value) is None
