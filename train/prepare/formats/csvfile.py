"""CSV files as people have them: commas or what a spreadsheet writes instead, a mark in front, blanks in the header."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from train.base.errors import ExitCode, Halt
from train.prepare.tables.progress import counted, say
from train.prepare.tables.schemas import REST_UNREAD

if TYPE_CHECKING:
    import _csv

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class CsvForm:
    """How one file is written."""

    delimiter: str
    names: tuple[str, ...]  # of the columns, without blanks around them
    blanks: bool  # behind each delimiter
    skipped_lines: int  # before the header: `sep=;`, which spreadsheets write

    def reader(self, lines: Iterable[str]) -> _csv.Reader:
        """The cells of each row, the header's among them; quotes as in RFC 4180."""
        rest = itertools.islice(lines, self.skipped_lines, None)
        return csv.reader(rest, delimiter=self.delimiter, skipinitialspace=self.blanks, strict=True)


def csv_form(where: str, file: Path) -> CsvForm:
    """The form of a file, told by its header; said once where it is not that of its ending.

    Raises Halt(USAGE) naming `where` for a file that is no text in UTF-8, OSError, and csv.Error for a broken header.
    """
    return _form(where, file, file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _form(where: str, file: Path, mtime_ns: int) -> CsvForm:
    require_text(where, file)
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        lines = io.StringIO(opened.read(_HEAD_BYTES), newline="").readlines()
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    told = lines[0].strip().lower() if lines else ""
    skipped = int(len(told) == 5 and told.startswith("sep="))
    header = lines[skipped:]
    found = {told[4]: _header(header, told[4])} if skipped else {one: _header(header, one) for one in (usual, *_DELIMITERS)}
    delimiter = max(found, key=lambda one: len(found[one] or ()))  # the first of equals: the usual one
    names = found[delimiter]
    if names is None:
        raise csv.Error("the header cannot be read")
    if delimiter != usual:
        say(f"{where}: {file.name} divides its columns by {_DELIMITERS.get(delimiter, repr(delimiter))}, and is read so")
    return CsvForm(delimiter, tuple(name.strip() for name in names), any(name.startswith(" ") for name in names[1:]), skipped)


def _header(lines: list[str], delimiter: str) -> list[str] | None:
    try:
        return next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None


def require_text(where: str, file: Path) -> None:
    """Raises Halt(USAGE) for a file that is UTF-16, as spreadsheets and PowerShell write it, or no text at all."""
    with open(file, "rb") as opened:
        head = opened.readline(_HEAD_BYTES)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        kind = "no text" if head.startswith((b"PK", b"\x89", b"SQLite")) else "UTF-16, not UTF-8"
        raise Halt(ExitCode.USAGE, f"{where}: {file.name} is {kind}: save it as `CSV UTF-8` (or convert it to UTF-8)")


def cells(form: CsvForm, file: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(row number, cells by column, or what is wrong with the row).

    Bytes that are not UTF-8 become marks that the record's checks refuse, so only their row is lost.
    """
    with io.TextIOWrapper(counted(file), "utf-8-sig", "surrogateescape", newline="") as lines:
        reader = form.reader(lines)
        next(reader, None)
        number, line = 0, reader.line_num
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                first, last = line + 1, reader.line_num
                if last > first:  # one entry for unknown many rows: that no share of refusals may hide
                    yield number, f"lines {first} to {last}: {error}: a quote is not closed or not doubled; {REST_UNREAD}"
                    return
                yield number, f"{error}: quotes inside a text are doubled"
                number, line = number + 1, last
                continue
            line = reader.line_num
            if row and len(row) != len(form.names):
                yield number, (
                    f"{len(row)} columns, the header has {len(form.names)}: a text with the delimiter "
                    f"{form.delimiter!r} in it stands in quotes"
                )
            elif row:
                yield number, dict(zip(form.names, row, strict=True))
            number += 1

