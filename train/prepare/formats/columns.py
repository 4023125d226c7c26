"""Whether a layout's columns hold what the config says, asked about before anything is made of them.

A column that is misspelt, or called otherwise than the layout's own, would empty a field of every row: the captions of
a whole set, noticed after all latents.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.tables.progress import say
from train.prepare.tables.schemas import TAG_GROUPS

LOOK_ROWS = 1000  # rows of a file without header after which missing captions are asked about
_MOST_SHOWN = 30
TAG_COLUMNS = (*(f"tags_{group}" for group in TAG_GROUPS), "tags")
WORDS = ("caption", "fallback_caption", *TAG_COLUMNS)  # our columns that become captions
# Names that captions have elsewhere, the likeliest first; then any other column of words is offered.
_USUAL = ("text", "caption", "captions", "prompt", "prompts", "description", "txt", "tags", "tag_string")
_NEVER = frozenset(
    ["file_name", "filename", "file", "image", "img", "path", "uri", "url", "id", "key", "__key__", "__url__", "md5", "sha256",
     "hash", "split", "rating", "created_at", "date", "ext", "file_ext", "format", "source", "license", "mode", "status"]
)  # fmt: skip


class Columns:
    """Names of columns, and which of them hold words: from a schema at once, from rows without header as they come."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = list(names)  # of a header, as it stands there
        self.words: dict[str, bool] = dict.fromkeys(self.names, False)
        self.rows = 0

    @classmethod
    def of_schema(cls, schema: pa.Schema) -> Columns:
        """Those of a parquet or Arrow file."""
        found = cls(schema.names)
        found.words |= {field.name: True for field in schema if _holds_words(field.type)}
        return found

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a row."""
        self.rows += 1
        for name, value in row.items():
            if not self.words.get(name):
                self.words[name] = _is_words(value)

    def listed(self) -> str:
        """The names, for messages."""
        return f"It has {listed(self.words)}"


def with_defaults(source: SourceConfig, names: Collection[str], usual: Mapping[str, Sequence[str]]) -> SourceConfig:
    """The source with a layout's own names, of `usual` the first that is there, where its map leaves a column out."""
    found = {ours: next((name for name in theirs if name in names), None) for ours, theirs in usual.items()}
    there = {ours: name for ours, name in found.items() if name is not None}
    return dataclasses.replace(source, columns=there | source.columns)


def check_mapped(source: SourceConfig, name: str, columns: Columns, ours: Iterable[str] | None = None) -> None:
    """Raises Halt(USAGE) for a mapped column (of `ours`, of all) that `name` lacks, with what it may have been."""
    for mine in source.columns if ours is None else ours:
        theirs = source.columns[mine]
        if theirs not in columns.words:
            raise Halt(
                ExitCode.USAGE,
                f"sources {source.name}: columns.{mine} is {theirs!r}: no such column in {name}"
                f"{did_you_mean(theirs, columns.words)} {columns.listed()}",
            )


def check_header(source: SourceConfig, name: str, names: list[str]) -> None:
    """`check_mapped` for a header. Raises Halt(USAGE) also for a mapped column that stands there twice."""
    check_mapped(source, name, Columns(names))
    for mine, theirs in source.columns.items():
        if names.count(theirs) > 1:
            raise Halt(ExitCode.USAGE, f"sources {source.name}: columns.{mine}: {name} has {names.count(theirs)} columns {theirs!r}")


def check_names(source: SourceConfig, name: str, columns: Columns, usual: str) -> None:
    """Raises Halt(USAGE) where no column has the pictures' names: neither the mapped one nor `usual`, the layout's own."""
    if "uri" in source.columns:
        check_mapped(source, name, columns, ["uri"])
    elif usual not in columns.words:
        raise Halt(
            ExitCode.USAGE,
            f"sources {source.name}: {name} has no column {usual!r} with the names of the pictures: set columns.uri"
            f"{did_you_mean(usual, columns.words)} {columns.listed()}",
        )


def check_caption(source: SourceConfig, name: str, columns: Columns, usual: str) -> None:
    """Asks which column holds the captions where no mapped one is there, nor `usual`, the layout's own name.

    Raises Halt(USAGE) naming the columns and a suggestion. Nothing is asked where no column holds words, or where
    `on_missing_caption: take` says that the pictures shall come without: that is printed.
    """
    mapped = [mine for mine in WORDS if mine in source.columns]
    if any(source.columns[mine] in columns.words for mine in mapped) or (not mapped and usual in columns.words):
        return
    if mapped:
        check_mapped(source, name, columns, mapped)
    offered = _offered(columns, usual)
    if source.on_missing_caption == "take":
        also = f"; its column {offered[0]!r} is not read" if offered else ""
        say(f"sources {source.name}: {name} has no column {usual!r}: pictures without captions are taken{also}")
    elif offered:
        mine = "tags" if offered[0].casefold().startswith("tag") else "caption"
        raise Halt(
            ExitCode.USAGE,
            f"sources {source.name}: {name} has no column {usual!r} with captions: set columns.{mine}: {offered[0]}? "
            f"{columns.listed()}; pictures without captions are taken with on_missing_caption: take",
        )


def wants_caption(source: SourceConfig) -> bool:
    """Whether a row without caption is refused: not where tags are mapped, or pictures without captions taken."""
    return source.on_missing_caption == "error" and not any(ours in source.columns for ours in TAG_COLUMNS)


def likely_captions(columns: Columns | None = None, rows: Iterable[Mapping[str, Any]] = ()) -> list[str]:
    """Columns that may hold captions, the likeliest first, of a header or of rows without one."""
    columns = columns or Columns()
    for row in rows:
        columns.add(row)
    return _offered(columns, "text")


def _offered(columns: Columns, usual: str) -> list[str]:
    """Columns that may hold captions, the likeliest first."""
    def rank(name: str) -> tuple[int, int]:
        plain = name.casefold().strip()
        alike = [place for place, word in enumerate((usual, *_USUAL)) if word in plain]
        return (min(alike, default=len(_USUAL) + 1), len(name))

    words = [name for name, holds in columns.words.items() if holds and name.casefold().strip() not in _NEVER]
    return sorted(words, key=rank)


def listed(names: Iterable[str]) -> str:
    """Names of columns in a message, which a wide table would fill."""
    shown = [str(name)[:60] for name in names]
    more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return (", ".join(shown[:_MOST_SHOWN]) or "none") + more


def did_you_mean(wanted: str, names: Iterable[str]) -> str:
    """`, did you mean x?` for the name that is most like it, `.` where none is."""
    folded = {name.casefold().strip(): name for name in map(str, names)}
    close = difflib.get_close_matches(wanted.casefold().strip(), list(folded), 1)
    return f", did you mean {folded[close[0]]}?" if close else "."


def _holds_words(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_words(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(one, str) for one in value)
    return isinstance(value, str) and any(letter.isalpha() for letter in value)
