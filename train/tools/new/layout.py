"""What lies in a folder of pictures, and which adapter reads it. Names and first values only; records are read by the adapters."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.kinds import JSON, is_image, media_kind
from train.prepare.folders.walking import walk
from train.prepare.formats.columns import likely_captions
from train.prepare.formats.jsonstream import Malformed, iter_members, iter_values
from train.prepare.posts.caption_text import KOHYA_FOLDER, TEXT_ENDINGS
from train.prepare.sources.table import columns_of, schema_of
from train.prepare.tables.schemas import Quarantine
from train.tools.convert import dataset as convert_dataset
from train.tools.convert import kinds
from train.tools.new.facts import Layout

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SAVED = ("state.json", "dataset_dict.json")  # of save_to_disk
_ABOUT = (*_SAVED, "dataset_info.json", "dataset_infos.json")
_FULL = 0.9  # of the pictures have such a text: it belongs to the set
_LOOK_FILES = 20  # metadata files whose first value is asked what it is


@dataclass
class _Met:
    """Files by what their names say."""

    pictures: list[str] = field(default_factory=list)
    json: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    databases: list[str] = field(default_factory=list)
    tomls: list[str] = field(default_factory=list)
    texts: dict[str, set[str]] = field(default_factory=dict)  # ending: stems, and whole names of pictures
    names: set[str] = field(default_factory=set)  # of files that say what the folder is
    media: Counter[str] = field(default_factory=Counter)
    refused: int = 0


def layouts(place: Path) -> list[Layout]:
    """The sources that a folder, or one file, is. Raises Halt(USAGE) where there is nothing to train on."""
    if not place.exists():
        raise Halt(ExitCode.USAGE, f"{place} does not exist: name a folder of pictures, or the file that lists them")
    if place.suffix.lower() == ".toml":
        return _of_toml(place)
    met = _meet(place)
    if place.is_dir() and (toml := _dataset_toml(place, met)) is not None:
        return _of_toml(toml)
    return [_one(place, met)]


def _meet(place: Path) -> _Met:
    met = _Met()
    source = SourceConfig(name="look", adapter="sidecar", path=str(place))
    for found in walk(source, place) if place.is_dir() else [place.name]:
        if isinstance(found, Quarantine):
            met.refused += 1
            continue
        name, suffix = found.rpartition("/")[2], PurePosixPath(found).suffix.lower()
        if is_image(found):
            met.pictures.append(found)
        elif name in (*_METADATA, *_ABOUT):
            met.names.add(name)
            (met.tables if name in _METADATA else []).append(found)
        elif suffix in JSON:
            met.json.append(found)
        elif suffix in (".parquet", ".csv", ".tsv", ".arrow"):
            met.tables.append(found)
        elif suffix == ".tar":
            met.tars.append(found)
        elif suffix in (".db", ".sqlite", ".sqlite3"):
            met.databases.append(found)
        elif suffix == ".toml":
            met.tomls.append(found)
        elif (kind := media_kind(found)) is not None:
            met.media[kind] += 1
        elif suffix:
            met.texts.setdefault(suffix, set()).add(found[: -len(suffix)])
    return met


def _dataset_toml(place: Path, met: _Met) -> Path | None:
    """The one dataset TOML at the folder's root, if there is one."""
    found = [place / name for name in met.tomls if "/" not in name and "datasets" in kinds.read_table(place / name)]
    return found[0] if len(found) == 1 else None


def _of_toml(file: Path) -> list[Layout]:
    """The subsets of an sd-scripts dataset TOML, or of the training TOML that names them."""
    stage, dataset = kinds.parts(file, kinds.read_table(file))
    if dataset is None:
        raise Halt(ExitCode.USAGE, f"{file} names no pictures: name the folder, or a TOML with [[datasets]]")
    made = convert_dataset.convert(dataset, stage or {}, "set")
    found = []
    for source in made.config["sources"]:
        keys = {key: value for key, value in source.items() if key != "name"}
        for key in ("path", "images"):
            if key in keys:
                keys[key] = str((file.parent / keys[key]).resolve())
        seen = dict.fromkeys(keys, f"as {file.name} says")
        met = _meet(Path(keys.get("images", keys["path"]))) if Path(keys.get("images", keys["path"])).is_dir() else _Met()
        remarks = tuple(f"{file.name}: {key}: {told}" for key, told in made.notes.items() if not key.startswith("(ours)"))
        found.append(Layout(keys, seen, len(met.pictures), _kohya(met.pictures, ""), remarks, made.config.get("separator")))
    return found


def _one(place: Path, met: _Met) -> Layout:
    path = str(place.resolve())
    for rule in (_saved, _metadata, _tar, _database, _posts, _table, _beside):
        if (found := rule(place, met)) is not None:
            keys, seen, count = found
            remarks = [f"{count_} files are no pictures ({kind}) and are left out" for kind, count_ in sorted(met.media.items())]
            if met.refused:
                remarks.append(f"{met.refused} names lead out of the folder or cannot be read")
            folders = _kohya(met.pictures, place.name)
            if folders and keys["adapter"] == "sidecar":
                keys["repeats"] = "kohya"
                told = ", ".join(f"{name} ({pictures} pictures)" for name, pictures in list(folders.items())[:3])
                seen["repeats"] = f"folders named as kohya's trainers name them: {told}"
            return Layout({"adapter": keys.pop("adapter"), "path": path, **keys}, seen, count, folders, tuple(remarks))
    raise Halt(ExitCode.USAGE, f"{place} holds no picture and no list of pictures{_nearly(met)}: name a folder of pictures")


_Rule = tuple[dict[str, Any], dict[str, str], int] | None


def _saved(place: Path, met: _Met) -> _Rule:
    if not met.names & set(_SAVED):
        return None
    return {"adapter": "huggingface"}, {"adapter": "saved by save_to_disk of `datasets`"}, 0


def _metadata(place: Path, met: _Met) -> _Rule:
    listing = [name for name in met.tables if name.rpartition("/")[2] in _METADATA]
    if not listing:
        return None
    keys: dict[str, Any] = {"adapter": "huggingface"}
    seen = {"adapter": f"{listing[0]} lists the pictures, as Hugging Face's image folders do"}
    if columns := _columns(place / listing[0], ("file_name",)):
        keys["columns"], seen["columns"] = columns, f"columns of {listing[0]}"
    return keys, seen, len(met.pictures)


def _tar(place: Path, met: _Met) -> _Rule:
    if not met.tars:
        return None
    return {"adapter": "webdataset"}, {"adapter": f"{len(met.tars)} tars of pictures (WebDataset)"}, 0


def _database(place: Path, met: _Met) -> _Rule:
    if not met.databases:
        return None
    return {"adapter": "danbooru2023"}, {"adapter": f"{met.databases[0]}: a database of posts"}, len(met.pictures)


def _posts(place: Path, met: _Met) -> _Rule:
    """Booru posts or sd-scripts' metadata, by what the first values look like."""
    found = Counter[str]()
    for name in met.json[:_LOOK_FILES]:
        if (kind := _kind_of(place / name if place.is_dir() else place)) is not None:
            found[kind] += 1
    if not found:
        return None
    adapter, files = found.most_common(1)[0]
    texts = sum(len(stems) for ending, stems in met.texts.items() if ending in TEXT_ENDINGS)
    if adapter == "sd_scripts" and files < len(met.json[:_LOOK_FILES]) and texts >= len(met.pictures) > 0:
        return None
    what = "metadata of sd-scripts" if adapter == "sd_scripts" else f"posts as {adapter} writes them"
    return {"adapter": adapter}, {"adapter": f"{len(met.json)} JSON files of {what}"}, len(met.pictures)


def _kind_of(file: Path) -> str | None:
    """The adapter that reads a JSON file, by its first values."""
    for _, value in itertools.islice(iter_values(file), 3):
        if isinstance(value, Malformed) or not isinstance(value, dict):
            continue
        if any(isinstance(value.get(key), list) and value[key] and isinstance(value[key][0], dict) for key in ("posts", "post")):
            value = next(value[key][0] for key in ("posts", "post") if isinstance(value.get(key), list))
        if (kind := _kind_of_post(value)) is not None:
            return kind
    members = [(key, value) for key, value in itertools.islice(_members(file), 3) if isinstance(value, dict)]
    return "sd_scripts" if members and all({"caption", "tags", "train_resolution"} & set(value) for _, value in members) else None


def _members(file: Path) -> Iterator[tuple[str, Any]]:
    return iter(()) if file.suffix.lower() in (".jsonl", ".ndjson") else iter_members(file)


def _kind_of_post(post: Mapping[str, Any]) -> str | None:
    tags, names = post.get("tags"), set(post)
    if any(key in names for key in ("image_path", "image_key")) and {"caption", "tags"} & names:
        return "sd_scripts"
    if "id" not in names:
        return None
    if isinstance(tags, dict) and {"species", "general"} & set(tags):
        return "e621"
    if any(name.startswith(("tag_string", "tags_general")) for name in names) or "media_asset" in names:
        return "e621" if "tags_species" in names else "danbooru"
    if isinstance(tags, list) and any(isinstance(tag, dict) for tag in tags):
        return "danbooru"
    if isinstance(tags, str) and ({"directory", "change", "sample_url", "file_url", "preview_url"} & names):
        return "gelbooru"
    return "danbooru" if isinstance(tags, str | list) else None


def _table(place: Path, met: _Met) -> _Rule:
    if not met.tables:
        return None
    name = sorted(met.tables)[0]
    file = place / name if place.is_dir() else place
    schema = _schema(file)
    if schema is not None and any(pa.types.is_struct(field.type) or pa.types.is_binary(field.type) for field in schema):
        keys: dict[str, Any] = {"adapter": "huggingface"}
        seen = {"adapter": f"{len(met.tables)} parquet or Arrow files that hold their pictures"}
        if columns := _columns(file, ()):
            keys["columns"], seen["columns"] = columns, f"columns of {name}"
        return keys, seen, 0
    if not met.pictures and place.is_dir():
        return None
    adapter = "simpletuner" if file.suffix.lower() == ".parquet" and schema is not None and "filename" in schema.names else "table"
    columns = _columns(file, ("file_name", "filename", "image", "path"))
    if "uri" not in columns or len(columns) < 2:
        return None
    return {"adapter": adapter, "columns": columns}, {"adapter": f"{name} lists the pictures", "columns": f"columns of {name}"}, len(met.pictures)


def _schema(file: Path) -> pa.Schema | None:
    try:
        return schema_of(file)
    except (OSError, pa.ArrowInvalid):
        return None


def _columns(file: Path, of_pictures: tuple[str, ...]) -> dict[str, str]:
    """Our column: theirs, where the layout's own names are not there."""
    if file.suffix.lower() in JSON:
        rows = [value for _, value in itertools.islice(iter_values(file), 20) if isinstance(value, dict)]
        names = list(dict.fromkeys(name for row in rows for name in row))
        found = likely_captions(rows=rows)
    else:
        columns = columns_of(SourceConfig(name="look", adapter="table", path=str(file)), file)
        if columns is None:
            return {}
        names, found = columns.names or list(columns.words), likely_captions(columns=columns)
    made = {}
    uri = next((name for name in of_pictures if name in names), None)
    if uri is not None and (uri != "file_name" or file.name not in _METADATA):
        made["uri"] = uri
    if found and "text" not in names:
        made["tags" if found[0].casefold().startswith("tag") else "caption"] = found[0]
    return made


def _beside(place: Path, met: _Met) -> _Rule:
    """Pictures with a text beside each, or with none."""
    if not met.pictures:
        return None
    stems = [os.path.splitext(name)[0] for name in met.pictures]
    covers = {
        ending: sum(stem in texts or name in texts for stem, name in zip(stems, met.pictures, strict=True))
        for ending, texts in met.texts.items()
        if ending in TEXT_ENDINGS or len(texts) >= len(stems) / 2
    }
    ending, covered = max(covers.items(), key=lambda one: (one[1], one[0] == ".txt"), default=(".txt", 0))
    count = len(met.pictures)
    full = sorted((other for other, found in covers.items() if found >= _FULL * count), key=lambda other: (other != ".txt", other))
    keys: dict[str, Any] = {"adapter": "sidecar"}
    seen = {"adapter": f"{count:,} picture{'s' if count != 1 else ''}, {covered:,} of them with a {ending} beside them"}
    if not covered:
        seen["adapter"] = f"{count:,} picture{'s' if count != 1 else ''} and no captions"
    elif len(full) > 1:
        keys["caption_ext"], seen["caption_ext"] = full, f"most pictures have {' and '.join(full)}: all are captions of theirs"
    elif ending != ".txt":
        keys["caption_ext"], seen["caption_ext"] = ending, f"the ending of {covered:,} captions"
    if covered < count:
        keys["on_missing_caption"] = "take"
        seen["on_missing_caption"] = f"{count - covered:,} of {count:,} have no caption"
    others = {other: found for other, found in covers.items() if other not in (ending, *full) and found}
    if others:
        told = ", ".join(f"{found:,} {other}" for other, found in sorted(others.items()))
        seen["adapter"] += f"; {told} beside them are not read"
    return keys, seen, count


def _kohya(pictures: list[str], own: str) -> dict[str, int]:
    """Pictures by their nearest folder of kohya's kind, where most lie in one."""
    found = Counter[str]()
    for name in pictures:
        folders = [own, *name.split("/")[:-1]]
        near = next((folder for folder in reversed(folders) if KOHYA_FOLDER.fullmatch(folder)), None)
        if near is not None:
            found[near] += 1
    return dict(found.most_common()) if found and 2 * found.total() > len(pictures) else {}


def _nearly(met: _Met) -> str:
    told = [f"{count} {kind} files" for kind, count in sorted(met.media.items())]
    told += [f"{len(names)} {what}" for what, names in (("JSON files of no known kind", met.json), ("tables without pictures", met.tables)) if names]
    return f" ({', '.join(told)})" if told else ""
