"""Step `tag`: tags for pictures that have none, from a column or from a WD tagger v3 (ONNX).

The table keeps every tag above a low floor with its category and probability; the thresholds are applied by `label`, so
changing one rewrites labels only. The tagger's rating is kept too, but no rating is ever taken from it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256
from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.encoding.batching import Batches, own_device
from train.prepare.formats.cells import collection, tags_with_values, texts_of
from train.prepare.formats.keyed import of_records, read_column
from train.prepare.posts.caption_text import bad_in_tag
from train.prepare.posts.normalise import BadRecord
from train.prepare.score import run_model
from train.prepare.tables import units
from train.prepare.tables.quarantine import judge
from train.prepare.tables.schemas import TAG_GROUPS, TAGS
from train.prepare.tables.workers import rank_here

TAG_VERSION = 1
FLOOR = 0.1  # lowest probability worth keeping; thresholds below it are refused
SIDE_PX = 448


def run(settings: DatasetConfig) -> None:
    """Write `tags/`, or nothing with `tag.source: none`."""
    config, dataset = settings.tag, dataset_dir(settings)
    if config.source == "none":
        print("tag: tag.source is none: no tags are added")
        return
    if min(config.general_threshold, config.character_threshold) < FLOOR:
        raise Halt(ExitCode.USAGE, f"tag: thresholds below {FLOOR} are refused, the table keeps nothing under it")
    wanted = untagged(dataset) if config.use == "missing" else None
    if config.source == "column":
        _from_column(settings, dataset, wanted)
    else:
        _from_wd(settings, dataset, wanted)
    units.merge_quarantine(dataset)
    judge(settings, "tag")


def untagged(dataset: Path) -> pa.Array:
    """Keys of the records without any tag or caption."""
    columns = [f"tags_{group}" for group in TAG_GROUPS]
    found = []
    for unit in units.stream_table(dataset, "records", ["key", "caption", "hard_exclusion", *columns]):
        empty = pc.and_(pc.is_null(unit["hard_exclusion"]), pc.equal(pc.coalesce(unit["caption"], ""), ""))
        for column in columns:
            empty = pc.and_(empty, pc.equal(pc.list_value_length(unit[column]), 0))
        found.append(unit["key"].filter(empty).combine_chunks())
    return pa.concat_arrays(found) if found else pa.array([], pa.string())


def _from_column(settings: DatasetConfig, dataset: Path, wanted: pa.Array | None) -> None:
    """Precomputed tags: a list, a text joined by commas, or a map of tags to probabilities, which the thresholds judge.

    A tag without category is general, one without probability certain.
    """
    config, bad_marks = settings.tag, bad_in_tag(settings.separator)
    where = f"tag.path {config.path}"
    known = units.read_table(dataset, "records", ["key"])["key"].combine_chunks()
    table = of_records(read_column(Path(config.path or ""), config.column, "tag"), known, where)
    total = len(table)
    if wanted is not None:
        table = table.filter(pc.is_in(table["key"], value_set=wanted))
        if len(table) < total:
            print(f"tag: {total - len(table)} rows belong to records that have tags already (tag.use: all adds to them)")
    table = table.sort_by("key")
    _check_joined(table["value"], where)
    rows, hashes, judged = [], [], 0
    for key, value in zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True):
        try:
            found = column_tags(value, config.column)
        except BadRecord as error:
            raise Halt(ExitCode.USAGE, f"{where}: {key}: {error}") from error
        tags, certain = [one["tag"] for one in found], all(one["prob"] == 1 for one in found)
        bad = next((tag for tag in tags if bad_marks.search(tag)), None)
        if bad is not None:
            raise Halt(ExitCode.USAGE, f"{where}: {key} has the tag {bad!r}")
        rows.append({"key": key, "model": config.model or "column", "tags": found})
        hashes.append(units.row_hash(key, *tags, *(() if certain else [(one["category"], one["prob"]) for one in found])))
        judged += not certain
    if judged:
        print(f"tag: {judged} rows give probabilities: tag.general_threshold and tag.character_threshold decide which tags count")
    step = units.Step(dataset, "tags", TAGS, units.config_id(code=TAG_VERSION, model=config.model), ("records",))
    units.take_rows(step, pa.Table.from_pylist(rows, schema=TAGS), hashes)
    print(f"tag: {len(rows)} records have tags of the column")


def column_tags(value: Any, column: str) -> list[dict[str, Any]]:
    """Tags of one cell with category and probability; those of no more than the floor are left out. Raises BadRecord."""
    found = collection(value, column, of_tags=True) if isinstance(value, str) else value
    if found is None:
        found = value.split(",") if isinstance(value, str) else []
    if not isinstance(found, list | tuple | dict):
        raise BadRecord(f"{column} is {str(value)[:60]} ({type(value).__name__}), expected tags")
    rows = list(found)
    if rows and all(isinstance(one, dict) and isinstance(one.get("prob"), int | float) and "tag" in one for one in rows):
        # as our own table has them
        tags = [(str(one["tag"]), int(one.get("category") or 0), float(one["prob"])) for one in rows]
    elif (pairs := tags_with_values(found)) is not None:
        tags = [(tag, 0, value) for tag, value in pairs]
    else:
        tags = [(tag, 0, 1.0) for tag in texts_of(found, column)]
    if strange := [f"{tag} {prob}" for tag, _, prob in tags if not 0 <= prob <= 1]:
        raise BadRecord(f"{column} has {strange[0]}, expected a probability between 0 and 1")
    return [{"tag": tag.strip(), "category": kind, "prob": prob} for tag, kind, prob in tags if tag.strip() and prob > FLOOR]


def _check_joined(column: pa.ChunkedArray, where: str) -> None:
    """Raises Halt(USAGE) where the texts hold several words with underscores and never a comma: each would be one tag."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return
    several = column.filter(pc.match_substring_regex(pc.fill_null(column, ""), r"\S[ ;]\s*\S"))
    spaced = several.filter(pc.match_substring(several, "_"))
    if len(spaced) and not pc.any(pc.match_substring(several, ",")).as_py():
        raise Halt(ExitCode.USAGE, f"{where}: {spaced[0].as_py()[:60]!r} would be one tag: join tags with commas, or write a JSON list")


def _from_wd(settings: DatasetConfig, dataset: Path, wanted: pa.Array | None) -> None:
    folder = Path(settings.tag.model or "")
    see, vocabulary = load_tagger(folder, "tag.model")
    model = f"{folder.name}@{file_sha256(folder / 'model.onnx')[:16]}"

    def predict(images: list[Image.Image]) -> list[tuple[Any, ...]]:
        return [(above_floor(row, vocabulary),) for row in see(images)] if images else []

    def row(key: str, tags: list[dict[str, Any]] | None) -> dict[str, Any]:
        return {"key": key, "model": model, "tags": tags or []}

    config = units.config_id(code=TAG_VERSION, model=model, floor=FLOOR)
    step = units.Step(dataset, "tags", TAGS, config, ("records", "probe"))
    batches = Batches(settings.tag.batch, "tag.batch", own_device("auto", rank_here()).type)
    run_model(settings, step, batches, predict, row, "tag", wanted)


def load_tagger(folder: Path, option: str) -> tuple[Callable[[Sequence[Image.Image]], np.ndarray], list[tuple[str, int]]]:
    """(float32 probabilities [B,T] of pictures, tag and category of each of T) of a WD tagger v3.

    Raises Halt, which names `option`: as `load_session` and `read_vocabulary`, and MISMATCH when the two do not fit.
    """
    session, vocabulary = load_session(folder, option), read_vocabulary(folder / "selected_tags.csv")
    name = session.get_inputs()[0].name

    def see(images: Sequence[Image.Image]) -> np.ndarray:
        pixels_BHWC = np.stack([tagger_pixels(image) for image in images])
        found_BT = np.asarray(session.run(None, {name: pixels_BHWC})[0], np.float32)
        if found_BT.shape[1] != len(vocabulary):
            raise Halt(ExitCode.MISMATCH, f"{option} {folder}: {found_BT.shape[1]} outputs, selected_tags.csv has {len(vocabulary)} tags")
        return found_BT

    return see, vocabulary


def load_session(folder: Path, option: str = "tag.model") -> Any:
    """The ONNX session; needs the extra `tag`. Raises Halt, which names `option`: USAGE (what is missing), MISMATCH
    (cannot be loaded)."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Halt(ExitCode.USAGE, "tag.source: wd needs onnxruntime: pip install -e .[tag]") from error
    for name in ("model.onnx", "selected_tags.csv"):
        if not (folder / name).is_file():
            raise Halt(ExitCode.USAGE, f"{option} {folder} has no {name}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Others are listed too, such as remote ones and TensorRT, which compiles for minutes. Each process has its own card.
    wanted = {"CUDAExecutionProvider": {"device_id": own_device("cuda", rank_here()).index}, "CPUExecutionProvider": {}}
    here = onnxruntime.get_available_providers()
    providers = [(name, options_of) for name, options_of in wanted.items() if name in here]
    try:
        return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
    except Exception as error:  # the runtime's own family, without a common base
        raise Halt(ExitCode.MISMATCH, f"{option} {folder / 'model.onnx'} cannot be loaded: {error}") from error


def read_vocabulary(path: Path) -> list[tuple[str, int]]:
    """(tag, category) of each output: 0 general, 4 character, 9 rating. Raises Halt(USAGE)."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [(row["name"], int(row["category"])) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise Halt(ExitCode.USAGE, f"{path} must be CSV with name and category: {error}") from error


def tagger_pixels(image: Image.Image) -> np.ndarray:
    """float32 [448, 448, 3], BGR 0..255: padded to a white square, then resized."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = square.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, np.float32)[:, :, ::-1])


def above_floor(probabilities: np.ndarray, vocabulary: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Tags above the floor in the vocabulary's order."""
    chosen = np.flatnonzero(probabilities > FLOOR).tolist()
    return [
        {"tag": vocabulary[n][0], "category": vocabulary[n][1], "prob": float(probabilities[n])} for n in chosen
    ]
