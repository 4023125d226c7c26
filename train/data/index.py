"""The training set as memory-mapped columns: who is selected, where the latents lie, what the captions say.

`index.arrow` (uncompressed Arrow IPC) holds one row per (image, bucket) with its caption; `index_<stage>.arrow` names
the rows that a stage trains on. Both are derived from the parquet tables beside them, whose hashes they carry. Opening
them reads no caption and hashes no key: under a second for a million images. Numbers are mapped, texts are read row by
row, so a process that has seen every caption holds some megabytes of the file, not all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, read_json
from train.data.cells import CellError, CellFile
from train.recipe.captions import Caption, read_variant

INDEX, VERSION = "index.arrow", "2"
MARK = "remote.json"  # in a folder that stands for a set in a store (published.py): without the tables that this was made from
READ_VERSIONS = ("1", "2")  # 1: fixed and flex tags alone
CAPTION_COLUMNS = ("fixed_tags", "flex_tags")
MORE_COLUMNS = ("tail_tags", "prose", "tag_variants")  # lists of texts, written where any image has one
LABEL_COLUMNS = ("quality", "rating_tags", "year", "aesthetic")
NUMBERS = ("orig_w", "orig_h", "bucket_w", "bucket_h", "resized_w", "resized_h", "crop_top", "crop_left")
FLIP_COLUMNS = ("flip_shard", "flip_row")  # of the latent of the mirror image: "" and -1 for none; no columns where no image has one
WEIGHT = "weight"  # of an image's loss, float32; no column where all weigh 1
MASK = "mask"  # digest of an image's mask, uint64, 0 = none; no column where none has one
U64 = npt.NDArray[np.uint64]
_TEXTS, _DIGESTS = ("key", "shard"), ("image_digest", "caption_digest")
_CHECKED_ROWS = 1 << 17  # at a time: what is looked at becomes resident until it is given back


def _numbers(name: str) -> cached_property[npt.NDArray[Any]]:
    """A column of numbers of the selected rows, gathered when it is first asked for: many are asked by nobody.

    Where every row is selected it is the file's own pages.
    """
    return cached_property(lambda index: _gathered(column_of(index._file.table, name), index._rows))


class Index:
    """The selected images of one stage, in the order of their keys; position i is what the plan calls a row."""

    orig_w = _numbers("orig_w")
    orig_h = _numbers("orig_h")
    bucket_w = _numbers("bucket_w")
    bucket_h = _numbers("bucket_h")
    resized_w = _numbers("resized_w")
    resized_h = _numbers("resized_h")
    crop_top = _numbers("crop_top")
    crop_left = _numbers("crop_left")

    def __init__(
        self, file: CellFile, rows: npt.NDArray[np.integer[Any]], uids: U64, meta: Mapping[str, str]
    ) -> None:
        self._file, self._rows, self._meta = file, rows, meta
        self.uids = uids
        self.vae_id, self.content = meta["vae_id"], meta["content"]

    @classmethod
    def open(cls, dataset_dir: str | Path, stage: str) -> Index:
        """The selection `stage` of a prepared dataset. Raises Halt(MISMATCH) naming the step to run."""
        folder = Path(dataset_dir)
        if not (folder / "dataset.json").is_file():
            raise Halt(
                ExitCode.MISMATCH,
                f"data.path {folder} is not a prepared dataset (no dataset.json): run "
                "scripts/prepare.py all --config <dataset.yaml>",
            )
        selection = folder / f"index_{stage}.arrow"
        if not selection.is_file():
            known = sorted(path.stem.removeprefix("index_") for path in folder.glob("index_*.arrow"))
            raise Halt(
                ExitCode.MISMATCH,
                f"data.path {folder} has no selection {stage!r} (it has {', '.join(known) or 'none'}): add "
                f"select.{stage} to its dataset.yaml and run scripts/prepare.py select and latents, or set data.select",
            )
        refuse_changed(folder, (INDEX, selection.name))
        file, whole = _map(folder / INDEX)
        rows, meta = _map(selection)
        _require_fresh(folder, stage, whole, meta)
        more = [name for name in MORE_COLUMNS if file.table.schema.get_field_index(name) >= 0]  # a damaged name is no text
        flips = [name for name in FLIP_COLUMNS if file.table.schema.get_field_index(name) >= 0]
        refuse_damaged(
            file.path, file.table, file.give_back, lists=(*CAPTION_COLUMNS, *more), texts=(*_TEXTS, *flips[:1]),
            numbers=(*NUMBERS, "row", *_DIGESTS, *flips[1:]),
        )  # fmt: skip
        _refuse_strange_weights(file)
        if MASK in file.table.column_names and file.table.column(MASK).type != pa.uint64():
            raise Halt(ExitCode.MISMATCH, f"{file.path}: its masks are not named by numbers: run scripts/prepare.py latents")
        refuse_damaged(rows.path, rows.table, rows.give_back, numbers=("row", "uid"), rows_below=file.table.num_rows)
        return cls(file, column_of(rows.table, "row"), np.array(column_of(rows.table, "uid")), {**whole, **meta})

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        """`<source>:<id>` of image i."""
        return str(self._cell("key", i))

    def caption(self, i: int) -> tuple[list[str], list[str]]:
        """(fixed tags, flex tags) of image i."""
        fixed, flex = (self._cell(name, i) or [] for name in CAPTION_COLUMNS)
        return fixed, flex

    def record(self, i: int) -> Caption:
        """All that is said of image i."""
        fixed, flex = self.caption(i)
        if not self._has_more:
            return Caption(fixed, flex)
        tail, prose, variants = (
            (self._cell(name, i) or []) if name in self._has_more else [] for name in MORE_COLUMNS
        )
        return Caption(fixed, flex, tail, prose, [read_variant(text) for text in variants])

    @cached_property
    def _has_more(self) -> frozenset[str]:
        return frozenset(name for name in MORE_COLUMNS if self._file.table.schema.get_field_index(name) >= 0)

    def latent(self, i: int, *, flip: bool = False) -> tuple[str, int]:
        """(shard relative to the dataset directory, row in it) of image i, or of its mirror image."""
        shard, row = FLIP_COLUMNS if flip else ("shard", "row")
        return str(self._cell(shard, i)), int(self._cell(row, i))

    @cached_property
    def flips(self) -> npt.NDArray[np.bool_]:
        """Which images have a latent of their mirror image."""
        if FLIP_COLUMNS[1] not in self._file.table.column_names:
            return np.zeros(len(self), dtype=bool)
        has_one: npt.NDArray[np.bool_] = column_of(self._file.table, FLIP_COLUMNS[1])[self._rows] >= 0
        return has_one

    @property
    def flips_hash(self) -> str:
        """sha256 over which images have one."""
        order = np.argsort(self.uids)
        return hashlib.sha256(np.packbits(self.flips[order]).tobytes()).hexdigest()

    def labels(self, i: int) -> dict[str, Any]:
        """quality, rating_tags, year and aesthetic of image i."""
        return {name: self._cell(name, i) for name in LABEL_COLUMNS}

    def named(self, i: int) -> str:
        """What a message calls image i: its key, or its uid where not even that can be read."""
        try:
            return str(self._file.cell("key", int(self._rows[i])))
        except CellError:
            return f"the image of uid {int(self.uids[i]):016x}"

    def _cell(self, name: str, i: int) -> Any:
        try:
            return self._file.cell(name, int(self._rows[i]))
        except CellError as error:
            raise Halt(
                ExitCode.MISMATCH,
                f"{self._file.path}: column {name} of {self.named(i)} cannot be read ({error}): run scripts/prepare.py "
                "latents (seconds; nothing is encoded twice)",
            ) from error

    def digests(self) -> tuple[U64, U64]:
        """(image digest, caption digest) per image: what tells an edited dataset from the one trained on."""
        image, caption = (column_of(self._file.table, name)[self._rows] for name in ("image_digest", "caption_digest"))
        self._file.give_back()
        return image, caption

    def shards(self, *, flip: bool = False) -> list[str]:
        """The latent shards that these images lie in, or, where they have one, their mirror images."""
        rows, column = (self._rows[self.flips], FLIP_COLUMNS[0]) if flip else (self._rows, "shard")
        column = self._file.table.column(column).chunk(0)
        try:
            if not pa.types.is_dictionary(column.type):
                return sorted(set(column.take(pa.array(rows)).to_pylist()))
            used = np.unique(column.indices.to_numpy()[rows])
            return sorted(column.dictionary.take(pa.array(used)).to_pylist())
        except (IndexError, TypeError, ValueError) as error:  # a number that names no row or word, a shard that is null
            raise Halt(ExitCode.MISMATCH, f"{self._file.path} is damaged ({error}): run scripts/prepare.py latents") from error

    @cached_property
    def weights(self) -> npt.NDArray[np.float32] | None:
        """What each image's loss is multiplied by; None where all weigh 1."""
        if WEIGHT not in self._file.table.column_names:
            return None
        return _gathered(column_of(self._file.table, WEIGHT), self._rows)

    @cached_property
    def masked(self) -> npt.NDArray[np.bool_] | None:
        """Which images have a mask; None where none of the set's has."""
        if MASK not in self._file.table.column_names:
            return None
        found: npt.NDArray[np.bool_] = _gathered(column_of(self._file.table, MASK), self._rows) != 0
        return found

    @property
    def images(self) -> npt.NDArray[np.int64]:
        """A number per entry that is equal for the repeats of one image."""
        return self._rows.astype(np.int64)

    def select(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Index:
        """Those images alone."""
        if which.dtype == np.bool_ and which.all():
            return self
        meta = {name: value for name, value in self._meta.items() if name != "fingerprint"}
        return Index(self._file, self._rows[which], self.uids[which], meta)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over uid, bucket, size, crop, content and caption of every image, and the VAE.

        That of a whole selection stands in its file's header.
        """
        return self._meta.get("fingerprint") or selection_fingerprint(self.uids, *self.digests(), self._meta)

    @property
    def selection_hash(self) -> str:
        """sha256 over which images stand in which bucket."""
        order = np.argsort(self.uids)
        digest = hashlib.sha256()
        for column in (self.uids, self.bucket_w.astype(np.int32), self.bucket_h.astype(np.int32)):
            digest.update(np.ascontiguousarray(column[order]).tobytes())
        return digest.hexdigest()


def mask_shard(shard: str) -> str:
    """Where the masks of a latent shard's pictures lie, [N,1,H,W] in its rows."""
    return f"masks/{PurePosixPath(shard).name}"


def selection_fingerprint(uids: U64, image: U64, caption: U64, meta: Mapping[str, str]) -> str:
    """What `Index.fingerprint` says of these images; `meta` holds vae_id, content and buckets."""
    order = np.argsort(uids)
    digest = hashlib.sha256(f"{meta['vae_id']} {meta['content']} {meta.get('buckets', '')}".encode())
    for column in (uids, image, caption):
        digest.update(np.ascontiguousarray(column[order]).data)
    return digest.hexdigest()


def source_hashes(folder: Path, stage: str | None) -> dict[str, str]:
    """Hashes of the tables an arrow file is made from."""
    names = ["index.parquet"] if stage is None else [f"select_{stage}.parquet"]
    found = file_hashes(folder, (name for name in names if (folder / name).is_file()))
    if stage is None:
        labels = sorted(path.name for path in (folder / "labels").glob("*.parquet"))
        found["labels"] = hashlib.sha256("\n".join(labels).encode()).hexdigest()
    return found


def _require_fresh(folder: Path, stage: str, whole: Mapping[str, str], meta: Mapping[str, str]) -> None:
    if not {whole.get("version"), meta.get("version")} <= {*READ_VERSIONS} or not {"vae_id", "content"} <= whole.keys():
        raise Halt(ExitCode.MISMATCH, f"{folder}: its index is of another version: run scripts/prepare.py latents")
    if (folder / MARK).is_file():  # it was fresh when it was published, and is what was published
        return
    for found, wanted in ((whole, source_hashes(folder, None)), (meta, source_hashes(folder, stage))):
        changed = sorted(name for name, value in _sources(folder, found).items() if wanted.get(name) != value)
        if changed:
            raise Halt(
                ExitCode.MISMATCH,
                f"{folder}: {', '.join(changed)} changed after the index was made: run scripts/prepare.py latents "
                "(seconds; nothing is encoded twice)",
            )
    state = read_json(folder / "dataset.json") or {}
    if re.fullmatch(r"\d+", str(state.get("schema_version", ""))) is None:
        raise Halt(ExitCode.MISMATCH, f"{folder}/dataset.json is damaged: run scripts/prepare.py latents")


def _sources(folder: Path, meta: Mapping[str, str]) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError, KeyError):
        if isinstance(found := json.loads(meta["sources"]), dict):
            return found
    raise Halt(ExitCode.MISMATCH, f"{folder}: the header of an index file is damaged: run scripts/prepare.py latents")


def _map(path: Path) -> tuple[CellFile, dict[str, str]]:
    try:
        if not path.is_file():  # to open a pipe is to wait for who writes into it
            raise FileNotFoundError(path)
        file = CellFile(path)
        meta = {key.decode(): value.decode() for key, value in (file.table.schema.metadata or {}).items()}
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: an empty file, metadata that is no text
        raise Halt(ExitCode.MISMATCH, f"{path} is missing or damaged: run scripts/prepare.py latents") from error
    return file, meta


def _refuse_strange_weights(file: CellFile) -> None:
    """Halt(MISMATCH) where a weight is no finite number of at least 0: it would make every loss of its update so."""
    if WEIGHT not in file.table.column_names:
        return
    column = file.table.column(WEIGHT)
    sound = column.type == pa.float32() and column.null_count == 0
    if not sound or not (np.isfinite(weights := column_of(file.table, WEIGHT)).all() and (weights >= 0).all()):
        raise Halt(ExitCode.MISMATCH, f"{file.path}: a weight is not a finite number of at least 0: run scripts/prepare.py latents")


def column_of(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of numbers, without a copy where it lies in one piece."""
    column: npt.NDArray[Any] = table.column(name).to_numpy()
    return column


def _gathered(column: npt.NDArray[Any], rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
    if len(rows) == len(column) and np.array_equal(rows, np.arange(len(rows), dtype=rows.dtype)):
        return column
    gathered: npt.NDArray[Any] = column[rows]
    return gathered


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
