"""Files with a value for each key, which the steps `score` and `tag` take over: `key` and one column, parquet or CSV."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.prepare.formats.columns import did_you_mean, listed
from train.prepare.formats.csvfile import cells, csv_form

_CHUNK_ROWS = 50_000
_MISSING = pa.array(["", "nan", "NaN", "null", "None"])


def read_column(path: Path, column: str, section: str) -> pa.Table:
    """Columns `key` and `value` of a parquet or CSV file. Raises Halt(USAGE) naming what is missing."""
    where = f"{section}.path {path}"
    try:
        if path.suffix.lower() == ".parquet":
            _check_names(where, pq.read_schema(path).names, column, section)
            table = pq.read_table(path, columns=list(dict.fromkeys(["key", column])))
        else:
            table = _csv_table(where, path, column, section)
    except (OSError, pa.ArrowInvalid, csv.Error, UnicodeError) as error:
        raise Halt(ExitCode.USAGE, f"{where} must be parquet or CSV with the columns key and {column}: {error}") from error
    table = pa.table({"key": table["key"].cast(pa.string()), "value": table[column]})
    if table["key"].null_count or len(pc.unique(table["key"])) != len(table):
        raise Halt(ExitCode.USAGE, f"{where}: a key is missing or stands there twice{_double(table['key'])}")
    return table


def _check_names(where: str, names: list[str], column: str, section: str) -> None:
    for wanted, hint in (("key", ""), (column, f"{section}.column")):
        if wanted not in names:
            fix = f": set {hint}{did_you_mean(wanted, names)}" if hint else f"{did_you_mean(wanted, names)}"
            raise Halt(
                ExitCode.USAGE,
                f"{where} must have the columns key and {column}, and has no {wanted}{fix} It has {listed(names)}. "
                "A key is <source name>:<id>, as in the records",
            )


def _csv_table(where: str, path: Path, column: str, section: str) -> pa.Table:
    form = csv_form(where, path)
    _check_names(where, list(form.names), column, section)
    parts: list[pa.Table] = []
    rows: list[dict[str, str]] = []
    schema = pa.schema({name: pa.string() for name in ("key", column)})
    for number, row in cells(form, path):
        if isinstance(row, str):
            raise Halt(ExitCode.USAGE, f"{where} row {number}: {row}")
        rows.append(row)
        if len(rows) == _CHUNK_ROWS:
            parts.append(pa.Table.from_pylist(rows, schema=schema))
            rows = []
    return pa.concat_tables([*parts, pa.Table.from_pylist(rows, schema=schema)])


def _double(keys: pa.ChunkedArray) -> str:
    counts = pc.value_counts(keys.drop_null())
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    return f": {twice[0]['values'].as_py()!r}" if len(twice) else ""


def of_records(table: pa.Table, known: pa.Array, where: str) -> pa.Table:
    """The rows whose keys are among `known`; how many are not is printed.

    Raises Halt(MISMATCH) where none is, with a key of each side.
    """
    mine = pc.is_in(table["key"], value_set=known)
    kept, strange = table.filter(mine), table.filter(pc.invert(mine))["key"]
    if len(strange) == 0:
        return kept
    key = strange[0].as_py()
    record, fix = _nearest(key, known)
    if len(kept) == 0:
        raise Halt(
            ExitCode.MISMATCH,
            f"{where}: none of its {len(table)} keys is the key of a record: there {key!r}, in the records {record!r}: {fix}",
        )
    print(f"{where}: {len(strange)} of its {len(table)} keys belong to no record, such as {key!r} (a record's key: {record!r})")
    return kept


def _nearest(key: str, known: pa.Array) -> tuple[str | None, str]:
    """(a record's key that may be meant, or any; what to write)."""
    fix = "write keys as the records have them, <source name>:<id>, the id of a file being its path below the source"
    if len(known) == 0:
        return None, fix
    path = re.sub(r"^.*:(?!\\)", "", key.strip()).replace("\\", "/")
    base = path.rpartition("/")[2]
    for wanted in (path, base, base.rpartition(".")[0] or base):
        found = known.filter(pc.match_substring(known, wanted)) if wanted else known[:0]
        if len(found):
            record = found[0].as_py()
            source, _, rest = record.partition(":")
            return record, f"write {source}: before each" if rest == key else fix
    return known[0].as_py(), fix


def numbers(table: pa.Table, where: str) -> pa.ChunkedArray:
    """float64 of column `value`, null for an empty text or NaN; float32 widens exactly.

    Raises Halt(USAGE) for anything else, with its key.
    """
    column = table["value"]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.is_in(text, value_set=_MISSING.cast(text.type)), None, text)
    try:
        values = column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise Halt(ExitCode.USAGE, f"{where}: {_no_number(table, column) or error}") from error
    return pc.if_else(pc.is_nan(values), None, values)


def _no_number(table: pa.Table, column: pa.ChunkedArray) -> str | None:
    """Which cell is no number, and what it may be."""
    for key, value in zip(table["key"], column, strict=True):
        cell = value.as_py()
        if cell is None:
            continue
        if not isinstance(cell, str):
            return f"{key.as_py()} has {str(cell)[:60]} ({column.type}), expected one number"
        try:
            float(cell)
        except ValueError:
            hint = f": write {cell.replace(',', '.')}" if re.fullmatch(r"-?\d+,\d+", cell) else ""
            hint = ": a collection, write its number alone" if cell[:1] in tuple("[{(") else hint
            return f"{key.as_py()} has {cell[:60]!r}, which is no number{hint}"
    return None
