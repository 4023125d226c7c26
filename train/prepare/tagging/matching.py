"""Which pictures have a tag, however it is written: in a column of its category, or in a caption.

A filter names tags as people do: `long hair`, `long_hair`, `Long Hair` and `(long hair:1.2)` are one tag. Captions tell no
categories, so their tags count in every one of them; a site's tag has one category, so a name found among the general
tags of a source that knows no categories is meant by a filter of any. Each distinct text is looked at once.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from train.prepare.tables.schemas import TAG_GROUPS

Mask = npt.NDArray[np.bool_]
GROUP_COLUMNS = tuple(f"tags_{group}" for group in TAG_GROUPS)
TAG_COLUMNS = ("tags", *GROUP_COLUMNS)  # that a caption's tags belong to
_WEIGHT = re.compile(r":\s*[+-]?\d*\.?\d+(?=\s*[)\]}])")
_SEPARATOR = "|||"  # of captions as our tables hold them, whatever the source's is
_CLOSING = {")": "(", "]": "[", "}": "{"}


@lru_cache(maxsize=1 << 18)
def plain_tag(text: str) -> str:
    """The form in which tags are compared: NFKC, lower case, spaces for underscores, no escapes, weights or emphasis."""
    plain = unicodedata.normalize("NFKC", html.unescape(text).replace("\\", "")).lower()
    plain = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf")
    if re.search(r"[^\W_]{2}", plain):  # an emoticon is made of what would be taken off
        plain = _without_emphasis(plain)
    return " ".join(plain.replace("_", " ").split()) or plain


def _without_emphasis(text: str) -> str:
    """Without weights and without brackets that enclose all of it, or whose other half stands in another tag."""
    text = _WEIGHT.sub("", text).strip()
    while text[:1] in _CLOSING.values() and _closed_at(text) in (None, len(text) - 1):
        text = (text[1:] if _closed_at(text) is None else text[1:-1]).strip()
    while text[-1:] in _CLOSING and text.count(_CLOSING[text[-1]]) < text.count(text[-1]):
        text = text[:-1].strip()
    return text


def _closed_at(text: str) -> int | None:
    """Where the bracket that `text` begins with is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == text[0]) - (_CLOSING.get(letter) == text[0])
        if depth == 0:
            return place
    return None


def caption_lists(captions: pa.Array) -> pa.Array:
    """list<string>[N]: the tags of each caption, and what commas part of its prose; null where there is no caption."""
    return pc.split_pattern(pc.replace_substring_regex(pc.replace_substring(captions, _SEPARATOR, ","), r"\n\t?", ","), ",")


def record_lists(records: pa.Table, name: str) -> pa.Array:
    """list<string>[N]: the values of one of TAG_COLUMNS; a caption's tags are general ones."""
    groups = GROUP_COLUMNS if name == "tags" else (name,)
    parts = [records.column(group).combine_chunks() for group in groups]
    if name in ("tags", "tags_general"):
        parts.append(caption_lists(records.column("caption").combine_chunks()))
    return joined_lists(parts)


def searched_lists(records: pa.Table, name: str) -> pa.Array:
    """list<string>[N]: where a tag that a filter on one of TAG_COLUMNS names is looked for."""
    own = record_lists(records, name)
    return own if name in ("tags", "tags_general") else joined_lists([own, record_lists(records, "tags_general")])


def columns_of(name: str) -> list[str]:
    """The columns of `records` that `searched_lists` reads."""
    return [*(GROUP_COLUMNS if name == "tags" else dict.fromkeys([name, "tags_general"])), "caption"]


def tagged(lists: pa.Array, wanted: Sequence[str]) -> npt.NDArray[np.int64]:
    """int64[N]: the number in `wanted` of a tag that each row has, the least one, -1 for none."""
    numbers = {form: place for place, tag in reversed([*enumerate(wanted)]) if (form := plain_tag(tag))}
    flat = pc.list_flatten(lists).dictionary_encode()
    place = np.array([numbers.get(plain_tag(text or ""), len(wanted)) for text in flat.dictionary.to_pylist()], np.int64)
    of_each = place[flat.indices.to_numpy(zero_copy_only=False)]
    hits = np.flatnonzero(of_each < len(wanted))
    found = np.full(len(lists), len(wanted), np.int64)
    np.minimum.at(found, pc.list_parent_indices(lists).to_numpy()[hits], of_each[hits])
    return np.where(found == len(wanted), -1, found)


def occurring(lists: pa.Array, wanted: Iterable[str]) -> set[str]:
    """Those of `wanted` that some row has."""
    present = {plain_tag(text) for text in pc.unique(pc.list_flatten(lists)).to_pylist() if text} - {""}
    return {tag for tag in wanted if plain_tag(tag) in present}


def joined_lists(parts: Sequence[pa.Array]) -> pa.Array:
    """Row by row, the lists of all parts one after the other."""
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([pc.list_parent_indices(array).to_numpy() for array in parts])
    values = pa.concat_arrays([pc.list_flatten(array) for array in parts])
    order = np.argsort(rows, kind="stable")
    lengths = np.bincount(rows, minlength=len(parts[0]))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.take(pa.array(order)))
