"""What may be selected at all: sound files, exact duplicates reduced, labelled, and past the hard exclusions' gate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.choosing.facts import among
from train.prepare.choosing.repeats import COLUMNS as REPEAT_COLUMNS
from train.prepare.choosing.repeats import visits_of
from train.prepare.probe import ok_files
from train.prepare.tables.progress import bar
from train.prepare.tables.refusals import SEEN_COLUMNS, refused_by
from train.prepare.tables.schemas import LABELS, PROBE, RECORDS, TAG_GROUPS
from train.prepare.tables.units import has_table, read_table, require_table, stream_table
from train.prepare.tagging.aliases import read_aliases
from train.prepare.tagging.corrections import read_corrections
from train.prepare.tagging.matching import (
    TAG_COLUMNS,
    columns_of,
    joined_lists,
    plain_tag,
    record_lists,
    searched_lists,
)
from train.recipe.exclusions import excluded_by

_CHUNK_ROWS = 50_000
_DERIVED = ("area", "aspect", "tags", "aesthetic_score", "near_duplicate")
_LABELLED = ("flex_tags", "tail_tags")  # what a policy's words may bring in; what a caption says is in the record's
_GATE_TAGS = ("tags_general", "tags_meta", "tags_species", *_LABELLED)


class Candidates:
    """Rows sorted by key. Columns are read when asked for, one at a time: a set may have ten million rows."""

    def __init__(self, settings: DatasetConfig) -> None:
        self.settings, self.dataset = settings, dataset_dir(settings)
        records = read_table(self.dataset, "records", ["key", "hard_exclusion"])
        self.counts: list[tuple[str, int]] = [("records", len(records))]
        open_records = records.filter(pc.is_null(records.column("hard_exclusion")))
        self.counts.append(("hard exclusions", len(open_records)))
        probe = ok_files(settings, ["key", "width", "height"])
        self.counts.append(("sound files", len(probe)))
        dupes = read_table(self.dataset, "dupes", ["key", "keep"])
        dropped = dupes.filter(pc.invert(dupes.column("keep"))).column("key").combine_chunks()
        probe = probe.filter(pc.invert(pc.is_in(probe.column("key"), value_set=dropped)))
        self.counts.append(("duplicates", len(probe)))
        labelled = read_table(self.dataset, "labels", ["key"]).column("key").combine_chunks()
        probe = probe.filter(pc.is_in(probe.column("key"), value_set=labelled))
        self.counts.append(("labels", len(probe)))
        self.refused = self._gate(probe.column("key").combine_chunks())
        gone = pa.array([key for key, _ in self.refused], pa.string())
        probe = probe.filter(pc.invert(pc.is_in(probe.column("key"), value_set=gone)))
        self.counts.append(("hard exclusions of final tags", len(probe)))
        self.keys: pa.StringArray = probe.column("key").combine_chunks()
        self.widths: npt.NDArray[np.int64] = probe.column("width").to_numpy().astype(np.int64)
        self.heights: npt.NDArray[np.int64] = probe.column("height").to_numpy().astype(np.int64)

    def known(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that some record has, selectable or not."""
        wanted = pa.array(list(keys), pa.string())
        if len(wanted) == 0:
            return set()
        parts = stream_table(self.dataset, "records", ["key"])
        return {
            key for part in parts
            for key in part.column("key").filter(pc.is_in(part.column("key"), value_set=wanted)).to_pylist()
        }  # fmt: skip

    def parts(self, name: str) -> Iterator[pa.Array]:
        """A column for predicates in parts, one value per candidate: where a tag is looked for, in one unit at a time."""
        yield from self._tag_lists(name, searched_lists) if name in TAG_COLUMNS else self.column(name).chunks

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, one value per candidate. Raises Halt(USAGE) for an unknown one."""
        if name == "area":
            return pa.chunked_array([pa.array(self.widths * self.heights)])
        if name == "aspect":
            long, short = np.maximum(self.widths, self.heights), np.minimum(self.widths, self.heights)
            return pa.chunked_array([pa.array(long / short)])
        if name == "aesthetic_score":
            return self._joined("aesthetic", "score", pa.float64())
        if name == "near_duplicate":
            dupes = read_table(self.dataset, "dupes", ["key", "method", "group_id"])
            return pa.chunked_array([pc.is_in(self.keys, value_set=_near_duplicates(dupes, self))])
        if name in TAG_COLUMNS:
            return pa.chunked_array(list(self._tag_lists(name, record_lists)), pa.list_(pa.string()))
        for table, schema in (("probe", PROBE), ("records", RECORDS), ("labels", LABELS)):
            if name in schema.names:
                return self._joined(table, name, schema.field(name).type)
        known_column(name)
        raise AssertionError(f"{name} is known and has no table")

    def visits(self) -> npt.NDArray[np.int64]:
        """int64[N]: how often its source wants each candidate visited."""
        if all(source.repeats == 1 for source in self.settings.sources):
            return np.ones(len(self.keys), np.int64)
        parts = stream_table(self.dataset, "records", REPEAT_COLUMNS)
        return np.concatenate([visits_of(self.settings.sources, self._of_unit(part)) for part in parts])

    def values(self, name: str, rows: npt.NDArray[np.int64]) -> Iterator[list[Any]]:
        """Values of `name`, or of `tags_<name>`, of each of the rows: for caps and quotas. Tags in their plain form."""
        name = f"tags_{name}" if name in TAG_GROUPS else name
        column = self.column(name)
        for start in range(0, len(rows), _CHUNK_ROWS):
            for value in column.take(pa.array(rows[start : start + _CHUNK_ROWS])).to_pylist():
                mine = value if isinstance(value, list) else [] if value is None else [value]
                yield list(dict.fromkeys(map(plain_tag, filter(None, mine)))) if name in TAG_COLUMNS else mine

    def _tag_lists(self, name: str, lists_of: Callable[[pa.Table, str], pa.Array]) -> Iterator[pa.Array]:
        """list<string> of the candidates of each unit. What a tagger found stands in the labels, beside the rest."""
        tagger = self.settings.tag.source != "none" and lists_of is searched_lists
        labels = stream_table(self.dataset, "labels", ["key", "fixed_tags", "flex_tags"]) if tagger else None
        corrections = read_corrections(self.settings.corrections, self.settings.separator)
        aliases = read_aliases(self.settings.aliases, self.settings.separator)
        for part in stream_table(self.dataset, "records", ["key", *columns_of(name)]):
            lists = [lists_of(corrections.applied(aliases.applied(self._of_unit(part))), name)]
            if labels is not None:
                words = self._of_unit(next(labels))
                lists += [words.column(column).combine_chunks() for column in ("fixed_tags", "flex_tags")]
            yield joined_lists(lists)

    def _of_unit(self, part: pa.Table) -> pa.Table:
        """The rows of candidates."""
        return among(part, self.keys).combine_chunks()

    def _joined(self, table: str, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        """The column of another table, null where it has no row of the key."""
        if not has_table(self.dataset, table):
            return pa.chunked_array([pa.nulls(len(self.keys), kind)])
        values = read_table(self.dataset, table, ["key", name])
        position = pc.index_in(self.keys, value_set=values.column("key").combine_chunks())
        column = values.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return pa.chunked_array([column.combine_chunks().take(position)])

    def _gate(self, keys: pa.Array) -> list[tuple[str, str]]:
        """(key, rule) of what the hard exclusions refuse when they see the final tags."""
        refused = []
        # `label` makes one unit of each unit of the records, so both can be read side by side.
        records = stream_table(self.dataset, "records", ["key", *SEEN_COLUMNS])
        shown = bar(len(require_table(self.dataset, "records")), "select: hard exclusions", "units")
        for part, labels in zip(records, stream_table(self.dataset, "labels", ["key", *_LABELLED]), strict=True):
            shown.update()
            part = among(part, keys)
            at = pc.index_in(part.column("key").combine_chunks(), value_set=labels.column("key").combine_chunks())
            assert at.null_count == 0, "candidates have labels"
            for name in _LABELLED:
                part = part.append_column(name, labels.column(name).combine_chunks().take(at))
            for row in part.filter(pa.array(_suspicious(part))).to_pylist():
                if (found := refused_by(row, self.settings, [tag for name in _LABELLED for tag in row[name] or ()])) is not None:
                    refused.append((row["key"], found[0]))
        shown.close()
        return refused


def known_column(name: str) -> None:
    """Raises Halt(USAGE) for a column that no table has, with the nearest."""
    known = sorted({*RECORDS.names, *PROBE.names, *LABELS.names, *_DERIVED})
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise Halt(ExitCode.USAGE, f"select.where: there is no column {name!r}{hint} There are {', '.join(known)}")


def _suspicious(rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Rows that a rule could refuse: with a tag or name refused on its own in the strictest setting, or a caption.

    A rule needs one such tag, so the others need no look at all their tags; most of a card-sized set's time.
    """
    found = pc.is_valid(rows.column("caption")).to_numpy().astype(bool)
    for name in (*_GATE_TAGS, "tags_character"):
        column = rows.column(name).combine_chunks()
        flat = pc.list_flatten(column)
        distinct = pc.unique(flat).to_pylist()
        as_name = name == "tags_character"
        bad = [
            word for word in distinct
            if excluded_by(rating="e", tags=[] if as_name else [word], characters=[word] if as_name else [], e621=True)
        ]  # fmt: skip
        hits = pc.is_in(flat, value_set=pa.array(bad, flat.type)).to_numpy(zero_copy_only=False)
        found[pc.list_parent_indices(column).to_numpy()[hits]] = True
    return found


def _near_duplicates(dupes: pa.Table, candidates: Candidates) -> pa.Array:
    """All but the first key of each perceptual group: first in the order largest area, then key."""
    near = dupes.filter(pc.equal(dupes.column("method"), "phash"))
    at = pc.index_in(near.column("key"), value_set=candidates.keys).to_pylist()
    sizes = candidates.widths * candidates.heights
    area = {key: int(sizes[row]) for key, row in zip(near.column("key").to_pylist(), at, strict=True) if row is not None}
    groups: dict[int, list[str]] = {}
    for row in near.to_pylist():
        if row["key"] in area:
            groups.setdefault(row["group_id"], []).append(row["key"])
    later = [key for group in groups.values() for key in sorted(group, key=lambda k: (-area[k], k))[1:]]
    return pa.array(sorted(later), pa.string())

