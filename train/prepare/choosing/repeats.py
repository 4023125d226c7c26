"""How often each picture is visited: `sources[].repeats`, a number or what kohya's folder names say.

In that layout a folder is called `10_name`, and the pictures below it are visited ten times an epoch. The nearest such
folder of a picture decides, the source's own included; a picture in none is visited once, one in `0_name` not at all.
Computed from the records at selection, so that another number encodes nothing anew.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode, Halt
from train.config.dataset import MAX_REPEATS, DatasetConfig, SourceConfig, dataset_dir
from train.prepare.folders.files import source_root
from train.prepare.tables.units import stream_table

COLUMNS = ["key", "source", "uri", "member"]
_FOLDER = r"^(?:.*/)?(?P<folder>(?P<number>[0-9]+)_[^/]*)/(?:[^/]*/)*$"  # greedy: the nearest one
_EXAMPLES = 3


def visits_of(sources: Sequence[SourceConfig], records: pa.Table) -> npt.NDArray[np.int64]:
    """int64[N] visits an epoch of each record (COLUMNS). Raises Halt(MISMATCH) naming a folder whose number is too large."""
    visits = np.ones(len(records), np.int64)
    names = records.column("source").to_numpy(zero_copy_only=False)
    for source in sources:
        mine = np.flatnonzero(names == source.name)
        if source.repeats == "kohya":
            visits[mine] = _numbers(source, records.take(pa.array(mine)))
        else:
            visits[mine] = source.repeats
    return visits


def _numbers(source: SourceConfig, records: pa.Table) -> npt.NDArray[np.int64]:
    folders, texts = _folders(source, records)
    numbers = texts.dictionary_encode()
    values = [1 if text is None else min(int(text), MAX_REPEATS + 1) for text in numbers.dictionary.to_pylist()]
    codes = numbers.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
    visits = np.array([*values, 1], np.int64)[codes]
    if (visits > MAX_REPEATS).any():
        folder = folders[int(np.argmax(visits))].as_py()
        raise Halt(
            ExitCode.MISMATCH,
            f"sources {source.name}: repeats: kohya: folder {folder} asks for more than {MAX_REPEATS} visits: rename it, or "
            "set repeats to a number",
        )
    return visits


def _folders(source: SourceConfig, records: pa.Table) -> tuple[pa.Array, pa.Array]:
    """(name, number as text) of each record's nearest folder that begins with a number; null where there is none."""
    inside, within = (pc.replace_substring_regex(records.column(name), "[^/]*$", "") for name in ("uri", "member"))
    own = Path(os.path.abspath(source_root(source))).name + "/"
    folders = pc.binary_join_element_wise(own, inside, pc.fill_null(within, ""), "")
    found = pc.extract_regex(folders, _FOLDER)
    folder, number = (pc.struct_field(found, name).combine_chunks() for name in ("folder", "number"))
    return folder, number


def tell_unread_folders(settings: DatasetConfig) -> None:
    """One line per source whose folders have such names while `repeats` has its default."""
    waiting = {source.name: source for source in settings.sources if source.repeats == 1}
    counts: dict[str, Counter[str]] = {name: Counter() for name in waiting}
    for part in stream_table(dataset_dir(settings), "records", COLUMNS):
        for name, source in waiting.items():
            mine = part.filter(pc.equal(part.column("source"), name))
            for entry in pc.value_counts(_folders(source, mine)[0].drop_null()).to_pylist():
                counts[name][entry["values"]] += entry["counts"]
    for name, folders in counts.items():
        if any(int(folder.partition("_")[0]) != 1 for folder in folders):
            shown = ", ".join(folder for folder, _ in folders.most_common(_EXAMPLES)) + (" ..." if len(folders) > _EXAMPLES else "")
            print(
                f"ingest {name}: {folders.total()} pictures lie in folders that begin with a number ({shown}): it is not read. "
                "If it is the repeats of kohya's layout, set `repeats: kohya` in this source"
            )
