"""Which keys each adapter reads, and what values a source may hold.

A key that an adapter does not read must hold its default: set, it would promise what nothing does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from train.config.key import default_of
from train.config.sound import judged

if TYPE_CHECKING:
    from train.config.dataset import DatasetConfig, SourceConfig

_METADATA = (".json", ".jsonl", ".ndjson", ".xml", ".csv", ".parquet")
_EVERY = ("name", "adapter", "path", "images", "assume_rating", "escaped", "on_bad_tag", "repeats", "weight", "follow_links",
          "mask")
_CAPTIONS = ("tag_separator", "on_second_separator", "caption_lines", "keep_tokens", "prose")
_MISSING = ("on_missing_caption", "class_tokens")
_FILES = ("caption_ext", *_MISSING)  # a caption of its own, which may be missing
READS: dict[str, frozenset[str]] = {  # adapter: the keys of a source that it reads
    "danbooru": frozenset((*_EVERY, "columns", "rating_scheme", "npz_vae")),
    "table": frozenset((*_EVERY, *_CAPTIONS, "columns", "rating_scheme", "npz_vae")),
    "sidecar": frozenset((*_EVERY, *_CAPTIONS, *_FILES, "npz_vae")),
    "sd_scripts": frozenset((*_EVERY, *_CAPTIONS, "npz_vae")),
    "imagefolder": frozenset((*_EVERY, *_CAPTIONS, *_MISSING, "columns", "rating_scheme", "npz_vae")),
    "webdataset": frozenset((*_EVERY, *_CAPTIONS, *_FILES, "columns", "rating_scheme")),
    "huggingface": frozenset((*_EVERY, *_CAPTIONS, *_FILES, "columns", "rating_scheme", "npz_vae")) - {"images"},
    "danbooru2023": frozenset((*_EVERY, "rating_scheme", "npz_vae")),
    "e621": frozenset((*_EVERY, "rating_scheme", "npz_vae")),
    "gelbooru": frozenset((*_EVERY, "dictionary", "rating_scheme", "npz_vae")),
    "deepghs": frozenset((*_EVERY, "columns", "rating_scheme", "npz_vae")),
    "simpletuner": frozenset((*_EVERY, *_CAPTIONS, *_MISSING, "columns", "rating_scheme", "npz_vae")),
}


def source_problems(settings: DatasetConfig) -> Iterator[str]:
    """Every problem of the sources' keys and of the separator of their captions."""
    if (problem := separator_problem(settings.separator)) is not None:
        yield f"separator is {settings.separator!r}: {problem}"
    for source in settings.sources:
        rules: list[Callable[[SourceConfig], str | None]] = [partial(_unread, field=field) for field in dataclasses.fields(source)]
        rules += [*_CAPTION_RULES, partial(_same_mark, separator=settings.separator)]
        yield from (f"sources {source.name}: {problem}" for problem in judged(source, rules))


def _unread(source: SourceConfig, field: dataclasses.Field[Any]) -> str | None:
    """A key that holds something else than its default and that the adapter does not read."""
    value = getattr(source, field.name)
    if field.name in READS[source.adapter] or value == default_of(field):
        return None
    readers = ", ".join(adapter for adapter, keys in READS.items() if field.name in keys)
    return f"{field.name} is {value!r}, which adapter {source.adapter} does not read: leave it out (read by {readers})"


def _same_mark(source: SourceConfig, separator: str) -> str | None:
    if source.tag_separator is None or source.tag_separator.strip() != separator:
        return None
    return f"tag_separator is {source.tag_separator!r}, as separator: one stands between tags, the other between fixed and flexible ones"


def _endings(source: SourceConfig) -> str | None:
    said = source.caption_ext
    several = isinstance(said, list | tuple)
    endings = [] if said is None else list(said) if several else [said]
    if several and (not endings or (len(endings) > 1 and source.adapter != "sidecar")):
        return f"caption_ext is {said!r}: " + ("an ending at least" if not endings else "adapter sidecar alone reads several files a picture")
    return next(filter(None, (_ending(ending) for ending in endings)), None)


def _ending(ending: object) -> str | None:
    if not isinstance(ending, str):
        return f"caption_ext is {ending!r}: the ending of caption files, such as .caption, or a list of them"
    if f".{ending.lower()}".endswith(_METADATA):
        return (f"caption_ext is {ending!r}, the ending of metadata, whose whole text would be the caption: "
                "choose the adapter that reads it")  # fmt: skip
    bad = not ending.strip(".") or not ending.isprintable() or set(ending) & set(' /\\*?"')
    return f"caption_ext is {ending!r}: the ending of caption files, such as .caption" if bad else None


_CAPTION_RULES: tuple[Callable[[SourceConfig], str | None], ...] = (
    lambda s: "tag_separator is empty: name what stands between tags, such as ' ', or leave it out"
    if s.tag_separator == "" else None,
    _endings,
    lambda s: f"mask is {s.mask!r}: pictures in a table have no names to look for in a folder; alpha is read from them"
    if s.mask not in (None, "alpha") and s.adapter == "huggingface" else None,
    lambda s: f"class_tokens {s.class_tokens!r} is the caption of pictures that have none: set on_missing_caption: take"
    if s.class_tokens is not None and s.on_missing_caption != "take" else None,
)  # fmt: skip


def separator_problem(separator: str) -> str | None:
    """What is wrong with a text as a separator, None for a good one."""
    if not separator or separator != separator.strip():
        return "not empty, and without spaces around it"
    if "," in separator or not separator.isprintable() or "\\" in separator:
        return "no comma, line break, control character or backslash"
    return None
