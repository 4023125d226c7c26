"""Single cells of an Arrow file, read from their place in it instead of through the map of its pages.

Reading, because one look at a mapped file may make 2 MB around it resident: a process that has seen every caption
would hold the whole file.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

_WORDS_KEPT = 50_000  # per column, 5 MB; sentences, which never repeat, must not fill a worker's memory


class CellError(Exception):
    """A cell that cannot be read; the message says why. Who knows the row's picture names it."""


@dataclass(frozen=True)
class _Place:
    """Where a column's buffers lie in the file, in bytes, -1 for none; `words` of a column of numbered words.

    A column of another make than `train.data.index_writer` writes has no place: pyarrow reads it.
    """

    column: pa.Array
    known: bool = False
    valid: int = -1
    starts: int = -1
    values: int = -1
    words: pa.Array | None = None
    many: bool = False
    told: dict[int, str] = field(default_factory=dict)  # words asked for before: making one costs as much as a read

    def text(self, number: int) -> str:
        """The word of that number."""
        word = self.told.get(number)
        if word is None:
            if len(self.told) >= _WORDS_KEPT:
                self.told.clear()
            word = self.told[number] = self.words[number].as_py()  # type: ignore[index]
        return word


class CellFile:
    """An Arrow file of one record batch: numbers are views of its mapped pages, single cells are read."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, ValueError or pa.ArrowInvalid for a file that is missing, empty or damaged."""
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        buffer = pa.py_buffer(self._map)
        self._start = buffer.address
        self.table = pa.ipc.open_file(buffer).read_all()
        self._places: dict[str, _Place] = {}

    def cell(self, name: str, row: int) -> Any:
        """A text, a list of texts, a whole number or None. Raises CellError for a column or cell that is not there."""
        try:
            place = self._places.get(name) or self._place(name)
            return self._cell(place, row) if place.known else place.column[row].as_py()
        except (OSError, ValueError, IndexError, struct.error, pa.ArrowException) as error:  # ValueError: no UTF-8
            raise CellError(str(error) or type(error).__name__) from error

    def give_back(self) -> None:
        """Unmap the pages that were looked at: the next look maps them again, from the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _cell(self, place: _Place, row: int) -> Any:
        if place.valid >= 0 and not self._read(place.valid + row // 8, 1)[0] >> row % 8 & 1:
            return None
        first, end = row, row + 1
        if place.starts >= 0:
            first, end = struct.unpack("<2i", self._read(place.starts + 4 * row, 8))
        if place.starts >= 0 and place.words is None:
            return self._read(place.values + first, end - first).decode()
        numbers = struct.unpack(f"<{end - first}i", self._read(place.values + 4 * first, 4 * (end - first)))
        if place.words is None:
            return numbers[0]
        return [place.text(number) for number in numbers] if place.many else place.text(numbers[0])

    def _place(self, name: str) -> _Place:
        if name not in self.table.column_names:
            raise CellError("the file has no such column")
        column = self.table.column(name).chunk(0)
        place = _Place(column)
        if column.offset == 0 and (kind := _kind(column.type)) is not None:
            at = [self._at(buffer) for buffer in column.buffers()]
            if kind == "words":  # validity, starts, validity of the values, values
                if column.values.offset == 0 and at[2] < 0:
                    place = _Place(column, True, at[0], at[1], at[3], column.values.dictionary, many=True)
            elif kind == "word":
                place = _Place(column, True, at[0], -1, at[1], column.dictionary)
            elif kind == "text":
                place = _Place(column, True, at[0], at[1], at[2])
            else:
                place = _Place(column, True, at[0], -1, at[1])
        self._places[name] = place
        return place

    def _at(self, buffer: pa.Buffer | None) -> int:
        # One without bytes lies nowhere: its address is that of any other thing, outside the file.
        return -1 if buffer is None or buffer.size == 0 else int(buffer.address) - self._start

    def _read(self, at: int, count: int) -> bytes:
        if count == 0:  # of a column without a single value there is no place to read at
            return b""
        data = os.pread(self._fd, count, at)
        if len(data) != count:
            raise CellError("the file was cut off while in use")
        return data


def _kind(kind: pa.DataType) -> str | None:
    """How a column of that type is read here; None where pyarrow does it."""

    def numbered(inner: pa.DataType) -> bool:
        return pa.types.is_dictionary(inner) and inner.index_type == pa.int32() and pa.types.is_string(inner.value_type)

    if pa.types.is_list(kind):
        return "words" if numbered(kind.value_type) else None
    if numbered(kind):
        return "word"
    if pa.types.is_string(kind):
        return "text"
    return "number" if kind == pa.int32() else None
