"""Which pictures get a second latent of their mirror image: not those whose tags say that left and right are not alike."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from train.base.errors import ExitCode, Halt
from train.config import shipped
from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.choosing.facts import among
from train.prepare.tables.units import stream_table
from train.prepare.tagging.matching import columns_of, plain_tag, record_lists

_LABELLED = ("fixed_tags", "flex_tags", "tail_tags")  # what a tagger or a correction added stands here
_SHOWN = 5


def forbidding_tags(given: Any) -> re.Pattern[str]:
    """What the tags that forbid a flip look like, in the plain form: of `latents.flip_not`, a list or a file that holds one.

    Raises Halt(USAGE) naming the key.
    """
    tags = given
    if isinstance(given, str):
        path = shipped.find(Path(given))
        try:
            tags = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise Halt(ExitCode.USAGE, f"latents.flip_not {given} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise Halt(ExitCode.USAGE, f"latents.flip_not {given}: a list of tags, such as [speech bubble, 'asymmetrical *'], or a YAML file that holds one")
    return re.compile("|".join(fnmatch.translate(plain_tag(tag)) for tag in tags) or r"(?!)")


def without_flip(settings: DatasetConfig, keys: pa.Array) -> tuple[set[str], list[tuple[str, int]]]:
    """(those of the rising `keys` that have a tag of `latents.flip_not`, how many pictures each such tag has, the commonest first)."""
    forbidding = forbidding_tags(settings.latents.flip_not)
    found: dict[str, set[str]] = {}  # tag -> keys
    for part, lists in _tag_lists(settings, keys):
        flat = pc.list_flatten(lists).dictionary_encode()
        words = [plain_tag(text or "") for text in flat.dictionary.to_pylist()]
        bad = np.array([forbidding.fullmatch(word) is not None for word in words], bool)
        numbers = flat.indices.to_numpy(zero_copy_only=False)
        hits = np.flatnonzero(bad[numbers]) if len(words) else np.zeros(0, np.int64)
        rows = pc.list_parent_indices(lists).to_numpy()[hits]
        for number, key in zip(numbers[hits].tolist(), part.column("key").take(pa.array(rows)).to_pylist(), strict=True):
            found.setdefault(words[number], set()).add(key)
    counts = Counter({tag: len(members) for tag, members in found.items()})
    return set().union(*found.values()), sorted(counts.items(), key=lambda one: (-one[1], one[0]))


def _tag_lists(settings: DatasetConfig, keys: pa.Array) -> Iterator[tuple[pa.Table, pa.Array]]:
    """(rows, their tags) of what the sources say, dropped from captions or not, and of the captions."""
    dataset = dataset_dir(settings)
    for part in stream_table(dataset, "records", ["key", *columns_of("tags")]):
        part = among(part, keys).combine_chunks()
        yield part, record_lists(part, "tags")
    for part in stream_table(dataset, "labels", ["key", *_LABELLED]):
        part = among(part, keys).combine_chunks()
        for name in _LABELLED:
            yield part, part.column(name).combine_chunks()


def told(flips: int, without: int, tags: list[tuple[str, int]]) -> str:
    """`flips of 90 pictures; 10 have none for their tags (speech bubble 6, signature 4)`."""
    shown = ", ".join(f"{tag} {count}" for tag, count in tags[:_SHOWN]) + (", ..." if len(tags) > _SHOWN else "")
    return f"flips of {flips} pictures; {without} have none for their tags" + (f" ({shown})" if tags else "")
