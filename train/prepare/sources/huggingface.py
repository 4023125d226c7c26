"""What `load_dataset` and `load_from_disk` open, from local files: `datasets` says which files make the set, and its splits.

Rows of files that hold any are read where they lie, by the readers of the other adapters: through `datasets` one broken row
would end its file, text would become numbers and dates, and a picture would have no place to be read from again. Pictures in
class folders come through its stream. Nothing is copied into a cache, downloaded or executed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.files import check_relative, source_root
from train.prepare.folders.walking import walk
from train.prepare.formats.columns import Columns, check_caption, check_header, check_mapped, wants_caption
from train.prepare.formats.mapping import mapped_post
from train.prepare.posts.normalise import REFUSALS, BadRecord, Found
from train.prepare.sources import imagefolder, webdataset
from train.prepare.sources.table import captioned, refused, schema_of
from train.prepare.tables.progress import say
from train.prepare.tables.schemas import Quarantine

_TABLES = ("parquet", "arrow", "json", "csv")  # builders of `datasets` whose files hold rows
_ENDINGS = (".parquet", ".arrow", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tar")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` writes beside them


@dataclass(frozen=True)
class _Part:
    """A split: how its files are read, and their paths relative to the source."""

    split: str
    kind: str  # of the builder that `datasets` would use
    names: list[str]
    builder: Any = None  # None: a saved set


def read(source: SourceConfig) -> Iterator[Found]:
    """Every row of every split."""
    path, root = _local(source), source_root(source)
    with _library() as (library, cache):
        parts = _parts(source, path, root, library, cache)
        if len(parts) > 1:
            splits = ", ".join(f"{part.split} ({len(part.names)} files)" for part in parts)
            say(f"sources {source.name}: all splits are read: {splits}; for one of them, name its folder or file in path")
        names = {name for part in parts for name in part.names}
        if any(part.kind == "imagefolder" for part in parts) and any(map(imagefolder.lists_pictures, names)):
            yield from imagefolder.read(source)  # which also tells of pictures that no metadata file names
            return
        met = names
        if path.is_dir():
            met = yield from _met(source, root, names)
        for part in parts:
            yield from _read(source, root, replace(part, names=[name for name in part.names if name in met]), library)


def _local(source: SourceConfig) -> Path:
    path = Path(source.path)
    if not path.exists():
        raise Halt(
            ExitCode.USAGE,
            f"sources {source.name}: path {source.path} does not exist here, and nothing is downloaded: where it is the name of a "
            f"set on a hub, fetch it first (`hf download {source.path} --repo-type dataset --local-dir DIR`) and name DIR in path",
        )
    return path


@contextmanager
def _library() -> Iterator[tuple[Any, str]]:
    """(`datasets`, silent and offline, a folder for its lock files, which is removed)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read where it is imported first; addresses are refused before it sees them
    import datasets

    shown, level = datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory(prefix="anix-datasets-") as cache:
            yield datasets, cache
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()


def _parts(source: SourceConfig, path: Path, root: Path, library: Any, cache: str) -> list[_Part]:
    """The splits that `datasets` finds. Raises Halt(MISMATCH) with its words where it finds none."""
    try:
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = library.load_from_disk(str(path))
            splits = saved if isinstance(saved, Mapping) else {"the set": saved}
            return [
                _Part(split, "arrow", [_inside(source, root, file["filename"]) for file in one.cache_files])
                for split, one in splits.items()
            ]
        _refuse_addresses(source, path, library)
        where, files = (path, None) if path.is_dir() else (path.parent, path.name)
        builder = library.load_dataset_builder(str(where.resolve()), data_files=files, cache_dir=cache)
        kind = type(builder).__module__.rpartition(".")[2]
        return [
            _Part(str(split), kind, [_inside(source, root, file) for file in names], builder)
            for split, names in builder.config.data_files.items()
        ]
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError, AttributeError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())[:200]
        raise Halt(
            ExitCode.MISMATCH,
            f"sources {source.name}: `datasets` cannot open {source.path}: {type(error).__name__}: {words}: mend it, or name in "
            "path the folder or file of one part",
        ) from error


def _refuse_addresses(source: SourceConfig, path: Path, library: Any) -> None:
    """Raises Halt(MISMATCH) where the set's card lists files by address: nothing is downloaded."""
    cards = [path / "README.md", path / ".huggingface.yaml"]
    for card in cards if path.is_dir() else ():
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        head = text.partition("---")[2].partition("\n---")[0] if card.suffix == ".md" else text
        told = yaml.safe_load(head) if head.strip() else None
        configs = told.get("configs") if isinstance(told, dict) else None
        if "://" in repr([one.get("data_files") for one in configs or [] if isinstance(one, dict)]):
            raise Halt(
                ExitCode.MISMATCH,
                f"sources {source.name}: {card.name} of {source.path} lists data_files by address, and nothing is downloaded: "
                "fetch them, and name their folder in path",
            )


def _inside(source: SourceConfig, root: Path, file: str) -> str:
    """A data file relative to the source. Raises Halt(MISMATCH) for one that lies elsewhere."""
    for base in (root, root.resolve()):
        if Path(file).is_relative_to(base):
            return Path(file).relative_to(base).as_posix()
    raise Halt(ExitCode.MISMATCH, f"sources {source.name}: its file {file} does not lie in {root}: name a folder in path that holds all")


def _met(source: SourceConfig, root: Path, names: set[str]) -> Generator[Quarantine, None, set[str]]:
    """Those of the files that lie inside the source; what the walk refuses, and how many data files are no part of the set."""
    met, others = set(), []
    for found in walk(source, root):
        if isinstance(found, Quarantine):
            yield found
        elif found in names:
            met.add(found)
        elif found.lower().endswith(_ENDINGS) and found.rpartition("/")[2] not in _ABOUT:
            others.append(found)
    if others:
        say(f"sources {source.name}: {len(others)} data files are no part of the set as `datasets` opens it, and are not read, "
            f"such as {others[0]}: name one in path to read it")  # fmt: skip
    return met


def _read(source: SourceConfig, root: Path, part: _Part, library: Any) -> Iterator[Found]:
    if part.kind == "imagefolder":
        yield from _class_folders(source, root, part, library)
    elif part.kind == "webdataset":
        yield from webdataset.read_tars(source, root, part.names)
    elif part.kind in _TABLES:
        yield from _tables(source, root, part, library)
    else:
        hint = ". Pictures with .txt beside them are adapter: sidecar" if part.kind == "text" else ""
        raise Halt(
            ExitCode.MISMATCH,
            f"sources {source.name}: {source.path} is a set of kind {part.kind} ({', '.join(part.names[:1])}), which holds no pictures "
            f"that are read: an imagefolder, webdataset, {', '.join(_TABLES)} or a saved set does{hint}",
        )


def _tables(source: SourceConfig, root: Path, part: _Part, library: Any) -> Iterator[Found]:
    seen = Columns()
    for name in part.names:
        if not name.lower().endswith(_ENDINGS):
            raise Halt(ExitCode.MISMATCH, f"sources {source.name}: {name} is compressed: unpack it")
        try:
            schema = schema_of(root / name)
        except (OSError, pa.ArrowInvalid) as error:
            yield refused(source, name, 0, error)
            continue
        if schema is not None and _holds_pictures(source, schema):
            features = part.builder.info.features if part.builder is not None else None
            labels = _labels(features or library.Features.from_arrow_schema(schema), library)
            yield from imagefolder.embedded_rows(source, root, name, labels)
        else:
            yield from imagefolder.metadata_rows(source, root, name, seen)
    if seen.rows:
        check_mapped(source, "any row of its JSON files", seen)


def _holds_pictures(source: SourceConfig, schema: pa.Schema) -> bool:
    """Whether the pictures stand in the rows themselves."""
    return "image" in source.columns or ("uri" not in source.columns and "file_name" not in schema.names)


def _labels(features: Any, library: Any) -> dict[str, list[str]]:
    """Names of the classes of each column, or list, that holds numbers of classes."""
    found = {}
    for column, feature in features.items():
        one = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
        if isinstance(one, library.ClassLabel):
            found[column] = list(one.names)
    return found


def _class_folders(source: SourceConfig, root: Path, part: _Part, library: Any) -> Iterator[Found]:
    """Pictures in folders named after what they show: `label` is that name."""
    stream = part.builder.as_streaming_dataset(split=part.split)
    labels = _labels(stream.features, library)
    if not labels and wants_caption(source):
        raise Halt(
            ExitCode.MISMATCH,
            f"sources {source.name}: {len(part.names)} pictures, and neither metadata nor class folders (all at one depth, more "
            "than one): no caption. Pictures with .txt beside them are adapter: sidecar",
        )
    columns = Columns(stream.features)
    columns.words |= dict.fromkeys(labels, True)
    check_header(source, source.path, list(stream.features))
    check_caption(source, source.path, columns, "text")
    mapped = replace(source, columns={ours: theirs for ours, theirs in source.columns.items() if ours not in ("uri", "image")})
    names = set(part.names)
    for number, row in enumerate(stream.cast_column("image", library.Image(decode=False))):
        place = str(row["image"]["path"])
        try:
            if "://" in place:
                raise BadRecord(f"{place} lies in an archive: unpack it")
            if (uri := check_relative(_inside(source, root, place))) not in names:
                continue  # refused by the walk
            post = mapped_post(mapped, imagefolder.with_labels(row, labels), uri, root, uri)
            yield captioned(source, uri, number, post)
        except REFUSALS as error:
            yield refused(source, place, number, error)
