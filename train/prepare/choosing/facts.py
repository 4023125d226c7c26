"""What records and probe say of the pictures that are wanted, in columns: a dictionary would hold a gigabyte a million."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.probe import ok_files
from train.prepare.tables.units import stream_table

_PROBE = ["key", "width", "height", "sha256", "has_alpha", "exif_orientation"]
_RECORDS = ["key", "source", "uri", "member", "weight"]


class Facts(Mapping[str, Mapping[str, Any]]):
    """Rows by key, in the order of keys; `table` has one row per picture."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        self._columns = {name: self.table.column(name).combine_chunks() for name in table.column_names}
        self._keys = self._columns["key"]

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        """key, width, height, sha256, has_alpha, exif_orientation, source, uri, member, weight."""
        row = bisect.bisect_left(self._keys, key, key=lambda scalar: scalar.as_py())
        if row == len(self._keys) or self._keys[row].as_py() != key:
            raise KeyError(key)
        return {name: column[row].as_py() for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[str]:
        """Keys."""
        return (scalar.as_py() for scalar in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def column(self, name: str, keys: pa.Array) -> pa.Array:
        """A column's values for many keys."""
        return self._columns[name].take(pc.index_in(keys, value_set=self._keys))


def facts_of(settings: DatasetConfig, keys: pa.Array) -> Facts:
    """Facts of these keys, all of which probe found sound."""
    probe = ok_files(settings, _PROBE)
    probe = probe.filter(pc.is_in(probe.column("key"), value_set=keys))
    records = pa.concat_tables(among(part, keys) for part in stream_table(dataset_dir(settings), "records", _RECORDS))
    assert records.column("key").equals(probe.column("key")), "records and probe are sorted by key"
    for name in _RECORDS[1:]:
        probe = probe.append_column(name, records.column(name))
    return Facts(probe)


def among(part: pa.Table, keys: pa.Array) -> pa.Table:
    """The rows of one unit whose key is one of the rising `keys`."""
    return part.filter(pc.is_in(part.column("key"), value_set=between(keys, part.column("key"))))


def between(keys: pa.Array, part: pa.ChunkedArray) -> pa.Array:
    """Those of rising `keys` that lie between the first and last of `part`: what one unit can meet."""
    if len(part) == 0 or len(keys) == 0:
        return keys[:0]
    low, high = (bisect.bisect(keys, part[at].as_py(), key=lambda k: k.as_py()) for at in (0, -1))
    return keys[max(low - 1, 0) : high]

