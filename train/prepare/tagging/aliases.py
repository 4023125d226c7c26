"""Other sites' and taggers' names of a tag: a table of (alias, tag), applied to what records say before the policy reads it.

Records on disk stay as they are, so the hard exclusions have seen the alias; whoever applies the table shows them the tag too.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode, Halt
from train.prepare.posts.caption_text import bad_in_tag
from train.prepare.tagging.matching import GROUP_COLUMNS, caption_lists, plain_tag
from train.recipe.captions import SEPARATOR, join, read_stored, render, stored


@dataclass(frozen=True)
class Aliases:
    """Tags by the plain form of their alias; a tag keeps the group that its record has the alias in."""

    tags: Mapping[str, str] = field(default_factory=dict)
    between: Mapping[str, list[str]] = field(default_factory=dict)  # of an alias of an alias: what it is called on the way to its tag

    @property
    def identity(self) -> str | None:
        """sha256 of the table, None of an empty one."""
        text = json.dumps([sorted(self.tags.items()), sorted(self.between.items())])
        return hashlib.sha256(text.encode()).hexdigest() if self.tags else None

    def touched(self, records: pa.Table) -> npt.NDArray[np.int64]:
        """Rows of which a tag, in a column of tags or the caption, is an alias."""
        found = np.zeros(len(records), bool)
        for name in (name for name in (*GROUP_COLUMNS, "caption") if self.tags and name in records.column_names):
            column = records[name].combine_chunks()
            lists = caption_lists(column) if name == "caption" else column
            flat = pc.list_flatten(lists).dictionary_encode()
            hits = np.array([plain_tag(text or "") in self.tags for text in flat.dictionary.to_pylist()], bool)
            found[pc.list_parent_indices(lists).to_numpy()[hits[flat.indices.to_numpy()]]] = True
        return np.flatnonzero(found)

    def applied(self, records: pa.Table) -> pa.Table:
        """Rows of `records`, of whose tags and captions those columns that are there have tags for aliases."""
        rows = self.touched(records).tolist()
        for name in (name for name in (*GROUP_COLUMNS, "caption") if rows and name in records.column_names):
            kind, values = records.schema.field(name).type, records[name].to_pylist()
            for row in rows:
                values[row] = self._caption(values[row]) if name == "caption" else self._named(values[row])
            records = records.set_column(records.column_names.index(name), name, pa.array(values, kind))
        return records

    def on_the_way(self, tags: Iterable[str], caption: str | None) -> list[str]:
        """What a record's aliases are called between themselves and their tags: the hard exclusions see it too."""
        ways = read_stored(caption)[0] if caption else []
        every = [*tags, *(tag for way in ways for part in way for tag in part)]
        return [name for tag in every for name in self.between.get(plain_tag(tag), ())]

    def _named(self, tags: list[str]) -> list[str]:
        return [self.tags.get(plain_tag(tag), tag) for tag in tags]

    def _caption(self, text: str | None) -> str | None:
        """A record's stored captions with tags for aliases; sentences stay."""
        if text is None:
            return None
        ways, prose = read_stored(text)
        lines = [(self._named(fixed), self._named(flex), self._named(tail)) for fixed, flex, tail in ways]
        return stored([(render(fixed, flex) if fixed else join(flex), tail) for fixed, flex, tail in lines], prose)


def read_aliases(path: str | None, separator: str = SEPARATOR) -> Aliases:
    """The table of a CSV: rows `alias, tag`, or a tag dictionary's `name, category, count, aliases`.

    An alias of an alias is followed to its tag. Raises Halt(USAGE) naming the row of what is none.
    """
    found: dict[str, str] = {}
    bad = bad_in_tag(separator)
    for number, alias, tag in _rows(Path(path)) if path else ():
        plain, where = plain_tag(alias), f"aliases: {path} row {number}"
        if not plain or not plain_tag(tag) or bad.search(tag):
            raise Halt(ExitCode.USAGE, f"{where}: {alias!r} and {tag!r} are no two tags: no comma, separator or line break, and not empty")
        if plain_tag(found.get(plain, tag)) != plain_tag(tag):
            raise Halt(ExitCode.USAGE, f"{where}: {alias!r} is an alias of {found[plain]!r} and of {tag!r}: keep one")
        if plain != plain_tag(tag):
            found[plain] = tag
    ways = {alias: _way(alias, found, f"aliases: {path}") for alias in found}
    return Aliases({alias: way[-1] for alias, way in ways.items()}, {alias: way[:-1] for alias, way in ways.items() if len(way) > 1})


def _way(alias: str, table: Mapping[str, str], where: str) -> list[str]:
    """From an alias to its tag, which is no alias."""
    way = [table[alias]]
    while (further := plain_tag(way[-1])) in table:
        if further == alias or len(way) > len(table):
            raise Halt(ExitCode.USAGE, f"{where}: {alias!r} is an alias of itself, by way of {way[-1]!r}")
        way.append(table[further])
    return way


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                cells = [cell.strip() for cell in row]
                if not any(cells) or (number == 1 and cells[:2] in (["alias", "tag"], ["name", "category"])):
                    continue
                if len(cells) == 2:
                    yield number, cells[0], cells[1]
                elif len(cells) == 4 and cells[1].lstrip("-").isdigit():
                    yield from ((number, alias.strip(), cells[0]) for alias in cells[3].split(",") if alias.strip())
                else:
                    raise Halt(ExitCode.USAGE, f"aliases: {path} row {number} has {len(cells)} cells: expected alias, tag or name, category, count, aliases")
    except (OSError, csv.Error, UnicodeError) as error:
        raise Halt(ExitCode.USAGE, f"aliases: {path} cannot be read: {error}") from error
