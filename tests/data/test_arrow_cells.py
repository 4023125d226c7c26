"""A cell says what pyarrow says of it, whatever the column is made of, and reads nothing where there is nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from train.base.errors import ExitCode, Halt
from train.data.cells import CellError, CellFile
from train.data.index import Index
from train.data.index_writer import encoded, write_arrow

TEXTS, MANY = pa.string(), pa.list_(pa.string())
COLUMNS: dict[str, pa.Array] = {
    "texts": pa.array(["a", "", None, "b c ü"], TEXTS),
    "texts, all empty": pa.array(["", "", ""], TEXTS),
    "texts, all null": pa.array([None, None], TEXTS),
    "words": encoded(pa.array(["a", None, "a", "b"], TEXTS)),
    "words, all null": encoded(pa.array([None, None, None], TEXTS)),
    "lists": encoded(pa.array([["a", "b"], [], ["b"]], MANY)),
    "lists, one null": encoded(pa.array([["a"], None, ["b"]], MANY)),
    "lists, all empty": encoded(pa.array([[], [], []], MANY)),
    "lists, all null": encoded(pa.array([None, None], MANY)),
    "lists with a null inside": pa.array([["a", None], [None]], pa.list_(pa.dictionary(pa.int32(), TEXTS))),
    "lists of texts": pa.array([["a"], [], None], MANY),
    "nothing": pa.nulls(3),
    "lists of nothing": pa.array([[], [None], None], pa.list_(pa.null())),
    "large texts": pa.array(["a", None], pa.large_string()),
    "large lists": pa.array([["a"], []], pa.large_list(TEXTS)),
    "numbers": pa.array([1, -2, None], pa.int32()),
    "numbers, all null": pa.array([None, None], pa.int32()),
    "small numbers": pa.array([1, -2, 3], pa.int16()),
    "long numbers": pa.array([1 << 40, None], pa.int64()),
    "truths": pa.array([True, None, False]),
    "a part of words": encoded(pa.array(["a", "b", None, "c"], TEXTS)).slice(1, 2),
    "a part of lists": encoded(pa.array([["a"], [], ["b", "a"], None], MANY)).slice(1, 3),
    "a part without values": encoded(pa.array([["a", "b"], [], []], MANY)).slice(1, 2),
}


def written(folder: Path, column: pa.Array) -> CellFile:
    write_arrow(folder / "x.arrow", pa.table({"x": column}), {})
    return CellFile(folder / "x.arrow")


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_cell_is_what_pyarrow_reads(kind: str, tmp_path: Path) -> None:
    column = COLUMNS[kind]
    file = written(tmp_path, column)
    assert [file.cell("x", row) for row in range(len(column))] == column.to_pylist()


def test_a_part_of_a_longer_column_in_memory_is_read_from_its_own_rows(tmp_path: Path) -> None:
    file = written(tmp_path, COLUMNS["lists"])
    file.table = file.table.slice(1)
    assert [file.cell("x", row) for row in range(2)] == [[], ["b"]]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    file = written(tmp_path, COLUMNS["texts"])
    with pytest.raises(CellError, match="no such column"):
        file.cell("y", 0)
    with open(tmp_path / "x.arrow", "r+b") as handle:
        handle.truncate(8)
    with pytest.raises(CellError, match="cut off"):
        file.cell("x", 0)


def test_a_failed_read_names_file_column_and_picture(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(dataset, "pretrain")
    key, read = index.key(3), CellFile.cell

    def fails(self: CellFile, name: str, row: int) -> Any:
        if name == "flex_tags":
            raise CellError("the disk says no")
        return read(self, name, row)

    monkeypatch.setattr(CellFile, "cell", fails)
    with pytest.raises(Halt) as halted:
        index.caption(3)
    assert halted.value.code == ExitCode.MISMATCH
    for told in ("index.arrow", "flex_tags", key, "the disk says no", "scripts/prepare.py latents"):
        assert told in halted.value.message


@pytest.mark.parametrize("column", ["fixed_tags", "flex_tags", "rating_tags", "quality", "year", "aesthetic"])
@pytest.mark.parametrize("value", [None, "empty"])
def test_a_set_without_any_value_in_a_column_is_read(column: str, value: str | None, tmp_path: Path) -> None:
    from indexes import built, row, selection_of

    many = column.endswith("_tags")
    given: Any = ([] if many else "") if value == "empty" else None
    rows = [row(f"a:{number}", row=number, **{column: given}) for number in range(3)]
    folder = built(tmp_path / "set", rows, ft=selection_of(*((f"a:{number}", 1, 128, 96) for number in range(3))))
    index = Index.open(folder, "ft")
    for i in range(3):
        expected = {name: rows[i][name] for name in ("quality", "rating_tags", "year", "aesthetic")}
        # A list without a value is none: nobody asks which of the two the table held.
        assert {name: value or None for name, value in index.labels(i).items()} == {n: v or None for n, v in expected.items()}
        assert index.caption(i) == (rows[i]["fixed_tags"] or [], rows[i]["flex_tags"] or [])
