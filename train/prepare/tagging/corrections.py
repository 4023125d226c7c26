"""What somebody who looked at the pictures says of their tags: a CSV of (key, tag, add | drop).

A drop takes the tag out of everything that a record says, its caption too; an add puts it among the general tags, so the
policy writes it as any other. Records on disk stay as they are: what the hard exclusions saw of one they still see.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode, Halt
from train.prepare.formats.csvfile import cells, csv_form
from train.prepare.posts.caption_text import bad_in_tag
from train.prepare.tagging.matching import GROUP_COLUMNS, plain_tag
from train.recipe.captions import SEPARATOR, join, read_stored, render, stored

OPERATIONS = ("add", "drop")
Row = tuple[str, str, str]  # key, tag, add or drop


@dataclass(frozen=True)
class Change:
    """What changes in one record."""

    add: list[str] = field(default_factory=list)  # as written
    drop: dict[str, str] = field(default_factory=dict)  # plain form: as written


@dataclass(frozen=True)
class Corrections:
    """Changes by key."""

    changes: Mapping[str, Change]

    def within(self, low: str, high: str) -> Corrections:
        """Those of the keys from `low` to `high`."""
        return Corrections({key: change for key, change in self.changes.items() if low <= key <= high})

    def rows(self) -> list[Row]:
        """As the file would say them, in order of keys."""
        return [
            (key, tag, operation)
            for key, change in sorted(self.changes.items())
            for operation, tags in (("drop", change.drop.values()), ("add", change.add))
            for tag in tags
        ]

    def touched(self, keys: pa.ChunkedArray) -> list[tuple[int, Change]]:
        """(row, what changes in it) of those of `keys` that have corrections."""
        if not self.changes:
            return []
        found = pc.indices_nonzero(pc.is_in(keys, value_set=pa.array(list(self.changes), pa.string()))).to_pylist()
        return [(row, self.changes[keys[row].as_py()]) for row in found]

    def applied(self, records: pa.Table) -> pa.Table:
        """Rows of `records`, of whose tags and captions those columns that are there are corrected."""
        if not (touched := self.touched(records["key"])):
            return records
        for name in {*GROUP_COLUMNS, "caption"} & set(records.column_names):
            kind, values = records.schema.field(name).type, records[name].to_pylist()
            for row, change in touched:
                if name == "caption":
                    values[row] = _caption(values[row], change)
                else:
                    kept = [tag for tag in values[row] if plain_tag(tag) not in change.drop]
                    values[row] = kept + (change.add if name == "tags_general" else [])
            records = records.set_column(records.column_names.index(name), name, pa.array(values, kind))
        return records

    def idle(self, records: pa.Table) -> Iterator[Row]:
        """What changes nothing in those of its records that are here: a drop of no tag of it, an add of one that it has."""
        for row, change in self.touched(records["key"]):
            tags = [tag for name in GROUP_COLUMNS for tag in records[name][row].as_py()]
            written, prose = read_stored(records["caption"][row].as_py() or "")
            has = {plain_tag(tag) for tag in (*tags, *prose, *(tag for one in written for part in one for tag in part))}
            key = records["key"][row].as_py()
            yield from ((key, tag, "drop") for plain, tag in change.drop.items() if plain not in has)
            yield from ((key, tag, "add") for tag in change.add if plain_tag(tag) in has)


def _caption(text: str | None, change: Change) -> str | None:
    """A record's stored captions without what is dropped."""
    if text is None:
        return None
    tags, prose = read_stored(text)
    kept = [tuple([tag for tag in part if plain_tag(tag) not in change.drop] for part in one) for one in tags]
    return stored([_line(*one) for one in kept], [text for text in prose if plain_tag(text) not in change.drop])


def _line(fixed: Sequence[str], flex: Sequence[str], tail: Sequence[str]) -> tuple[str, Sequence[str]]:
    return (render(fixed, flex) if fixed else join(flex)), tail


def read_corrections(path: str | None, separator: str = SEPARATOR) -> Corrections:
    """The file's changes, none without one. Raises Halt(USAGE) naming the row of what is none."""
    changes: dict[str, Change] = defaultdict(Change)
    bad = bad_in_tag(separator)
    for number, (key, tag, operation) in enumerate(_rows(Path(path)) if path else (), 1):
        where, plain = f"corrections: {path}, correction {number}", plain_tag(tag)
        change = changes[key]
        if operation not in OPERATIONS:
            raise Halt(ExitCode.USAGE, f"{where}: {operation!r} is neither add nor drop")
        if not plain or (operation == "add" and bad.search(tag)):
            raise Halt(ExitCode.USAGE, f"{where}: {tag!r} is no tag: no comma, separator or line break, and not empty")
        added = {plain_tag(one) for one in change.add}
        if plain in (added if operation == "drop" else change.drop):
            raise Halt(ExitCode.USAGE, f"{where}: {tag!r} is both added to {key} and dropped from it: remove one of the two")
        if operation == "drop":
            change.drop.setdefault(plain, tag)
        elif plain not in added:
            change.add.append(tag)
    return Corrections(dict(changes))


def _rows(path: Path) -> Iterator[Row]:
    where = f"corrections: {path}"
    try:
        form = csv_form(where, path)
        names = [name.lower() for name in form.names]
        if len(names) == 3 and names[2] in OPERATIONS:  # a file without a header
            order, first = form.names, [dict(zip(form.names, form.names, strict=True))]
        elif len(names) == 3 and {"key", "tag"} <= set(names):
            operation = next(at for at, name in enumerate(names) if name not in ("key", "tag"))
            order, first = tuple(form.names[at] for at in (names.index("key"), names.index("tag"), operation)), []
        elif not form.names:
            return
        else:
            raise Halt(ExitCode.USAGE, f"{where}: its columns are {', '.join(form.names)}: it needs key, tag and add or drop")
        for number, row in _numbered(first, cells(form, path)):
            if isinstance(row, str):
                raise Halt(ExitCode.USAGE, f"{where} row {number}: {row}")
            key, tag, said = (row[name].strip() for name in order)
            yield key, tag, said.lower()
    except (OSError, csv.Error, UnicodeError) as error:
        raise Halt(ExitCode.USAGE, f"{where} cannot be read: {error}") from error


def _numbered(
    first: Iterable[dict[str, str]], rest: Iterable[tuple[int, dict[str, str] | str]]
) -> Iterator[tuple[int, dict[str, str] | str]]:
    yield from ((0, row) for row in first)
    yield from rest
