"""Which keys each adapter reads, and what values a source may hold.

A key that an adapter does not read must hold its default: set, it would promise what nothing does.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config.dataset import DatasetConfig, SourceConfig

_METADATA = (".json", ".jsonl", ".ndjson", ".xml", ".csv", ".parquet")
_EVERY = ("name", "adapter", "path", "images", "assume_rating", "escaped", "on_bad_tag", "repeats", "follow_links")
_CAPTIONS = ("tag_separator", "on_second_separator", "caption_lines", "keep_tokens")
_FILES = ("caption_ext", "on_missing_caption")  # a caption of its own, which may be missing
READS: dict[str, frozenset[str]] = {  # adapter: the keys of a source that it reads
    "danbooru": frozenset((*_EVERY, "columns", "rating_scheme", "npz_vae")),
    "table": frozenset((*_EVERY, *_CAPTIONS, "columns", "rating_scheme", "npz_vae")),
    "sidecar": frozenset((*_EVERY, *_CAPTIONS, *_FILES, "npz_vae")),
    "sd_scripts": frozenset((*_EVERY, *_CAPTIONS, "npz_vae")),
    "imagefolder": frozenset((*_EVERY, *_CAPTIONS, "on_missing_caption", "columns", "rating_scheme", "npz_vae")),
    "webdataset": frozenset((*_EVERY, *_CAPTIONS, *_FILES, "columns", "rating_scheme")),
    "huggingface": frozenset((*_EVERY, *_CAPTIONS, *_FILES, "columns", "rating_scheme", "npz_vae")) - {"images"},
    "danbooru2023": frozenset((*_EVERY, "rating_scheme", "npz_vae")),
    "e621": frozenset((*_EVERY, "rating_scheme", "npz_vae")),
    "gelbooru": frozenset((*_EVERY, "dictionary", "rating_scheme", "npz_vae")),
    "deepghs": frozenset((*_EVERY, "columns", "rating_scheme", "npz_vae")),
    "simpletuner": frozenset((*_EVERY, *_CAPTIONS, "on_missing_caption", "columns", "rating_scheme", "npz_vae")),
}


def source_problems(settings: DatasetConfig) -> list[str]:
    """Every problem of the sources' keys and of the separator of their captions."""
    found = []
    if (problem := separator_problem(settings.separator)) is not None:
        found.append(f"separator is {settings.separator!r}: {problem}")
    for source in settings.sources:
        found += [f"sources {source.name}: {problem}" for problem in (*_unread(source), *_captions(source, settings.separator))]
    return found


def _unread(source: SourceConfig) -> list[str]:
    """Keys that hold something else than their default and that the adapter does not read."""
    found = []
    for field in dataclasses.fields(source):
        plain = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.name in READS[source.adapter] or getattr(source, field.name) == plain:
            continue
        readers = ", ".join(adapter for adapter, keys in READS.items() if field.name in keys)
        found.append(
            f"{field.name} is {getattr(source, field.name)!r}, which adapter {source.adapter} does not read: leave it out "
            f"(read by {readers})"
        )
    return found


def _captions(source: SourceConfig, separator: str) -> list[str]:
    parts, ending = source.tag_separator, source.caption_ext
    bad_ending = ending is not None and (not ending.strip(".") or not ending.isprintable() or set(ending) & set(' /\\*?"'))
    rules = [
        (source.caption_lines == "variants",
         "caption_lines: variants (each line a caption of its own) comes with a later version: use join or first"),
        (source.keep_tokens < 0, f"keep_tokens is {source.keep_tokens}, must be at least 0"),
        (parts == "", "tag_separator is empty: name what stands between tags, such as ' ', or leave it out"),
        (parts is not None and parts.strip() == separator,
         f"tag_separator is {parts!r}, as separator: one stands between tags, the other between fixed and flexible ones"),
        (ending is not None and f".{ending.lower()}".endswith(_METADATA),
         f"caption_ext is {ending!r}, the ending of metadata, whose whole text would be the caption: choose the adapter that reads it"),
        (bad_ending, f"caption_ext is {ending!r}: the ending of caption files, such as .caption"),
    ]  # fmt: skip
    return [message for broken, message in rules if broken]


def separator_problem(separator: str) -> str | None:
    """What is wrong with a text as a separator, None for a good one."""
    if not separator or separator != separator.strip():
        return "not empty, and without spaces around it"
    if "," in separator or not separator.isprintable() or "\\" in separator:
        return "no comma, line break, control character or backslash"
    return None
