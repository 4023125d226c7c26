"""Whether index files are those that were written, and whether their columns may be read at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, read_json

_CHECKED_ROWS = 1 << 17  # at a time: what is looked at becomes resident until it is given back


def refuse_changed(folder: Path, names: Iterable[str]) -> None:
    """Halt(MISMATCH) for index files other than those that were written, as far as dataset.json says which."""
    written = (read_json(folder / "dataset.json") or {}).get("index")
    if not isinstance(written, dict):  # a set of an earlier version
        return
    for name, value in file_hashes(folder, (name for name in names if (folder / name).is_file())).items():
        if written.get(name) != value:
            raise Halt(
                ExitCode.MISMATCH,
                f"{folder / name} is not as it was written (its sha256 is {value[:12]}...): run scripts/prepare.py latents "
                "(seconds; nothing is encoded twice)",
            )


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of index files: dataset.json keeps them, because a flipped bit in one would shift the plan silently."""
    return {name: file_sha256(folder / name) for name in names}


def refuse_damaged(
    path: Path,
    table: pa.Table,
    give_back: Callable[[], None],
    *,
    lists: tuple[str, ...] = (),
    texts: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
    rows_below: int | None = None,
) -> None:
    """Halt(MISMATCH) for a file whose columns are not what readers take them for: they would crash or read elsewhere.

    Every offset, word number and text is held against its bounds: 0.1 s for a million images. `give_back` releases
    the pages that were looked at.
    """
    try:
        for name in (*lists, *texts, *numbers):
            column = table.column(name)
            of_kind = pa.types.is_integer(column.type) if name in numbers else not pa.types.is_integer(column.type)
            if not of_kind or column.num_chunks > 1 or (name not in lists and column.null_count):
                raise ValueError(f"column {name} is {column.type} in {column.num_chunks} pieces")
        for start in range(0, table.num_rows, _CHECKED_ROWS):
            table.slice(start, _CHECKED_ROWS).validate(full=True)
            give_back()
        if rows_below is not None and table.num_rows:
            rows = table.column("row").to_numpy()
            if int(rows.min()) < 0 or int(rows.max()) >= rows_below:
                raise ValueError(f"it names rows from {rows.min()} to {rows.max()}, there are {rows_below}")
    except (ValueError, KeyError, pa.ArrowException) as error:
        told = " ".join(str(error).split())[:200]
        raise Halt(ExitCode.MISMATCH, f"{path} is damaged ({told}): run scripts/prepare.py latents") from error
