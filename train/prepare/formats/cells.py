"""Cells that hold a collection as a program printed it: Python, numpy, JSON or PostgreSQL. Nothing is evaluated.

Split like ordinary text, such a cell would give tags such as `['1girl'`: it is read, or refused by name.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.prepare.posts.normalise import BadRecord

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_BYTES = re.compile(rf"b(?:{_QUOTED})", re.DOTALL)
_QUOTES = re.compile(_QUOTED, re.DOTALL)
_CALL = re.compile(r"(?:np\.|numpy\.)?(?:array|set|frozenset|tuple|list|deque|Index|dict_keys|dict_values|OrderedDict|Counter)\((.*)\)", re.DOTALL)
_OTHER_CALL = re.compile(r"[A-Za-z_][\w.]*\((?:<[^>]*>,\s*)?[\[{(].*['\"].*[\]})].*\)", re.DOTALL)  # of a type not known here
_DTYPE = re.compile(r",\s*dtype=[\w'\".<>|]+\s*$")
_SCALAR = re.compile(rf"\b(?:np|numpy)\.\w+\(({_QUOTED}|[-+.\deE]+)\)", re.DOTALL)
_SPACED = re.compile(r"\[\s*S(?:\s+S)+\s*\]")  # numpy puts no commas
_ITEM = r"""(?:"((?:[^"\\]|\\.)*)"|([^\s,{}"\\'][^\s,{}"\\]*))"""
_POSTGRES = re.compile(rf"\{{{_ITEM}(?:,{_ITEM})*\}}", re.DOTALL)
_VALUES = re.compile(r":\s*[-+.\d]+\s*[,}]")  # of a map without quotes
_BARE = re.compile(r"\[[^\[\]'\"]*\]", re.DOTALL)
_OPEN, _CLOSE = "[{(", "]})"


def collection(text: str, column: str, *, of_tags: bool) -> list[Any] | dict[Any, Any] | None:
    """The collection that a text prints, in its printed order; None for a text that is none.

    Raises BadRecord for one that cannot be read. Brackets without quotes are a list in a column of tags, a manner of
    writing in a caption.
    """
    body = text.strip()
    if body[:2] in ("b'", 'b"') and _BYTES.fullmatch(body):
        raise BadRecord(f"{column} is printed bytes, {body[:80]!r}: decode them to text first")
    if not body or (body[0] not in _OPEN and body[-1] != ")"):  # nearly every cell
        return None
    if called := _CALL.fullmatch(body):
        body = _DTYPE.sub("", called[1]).strip() or "[]"
    elif _OTHER_CALL.fullmatch(body):
        raise BadRecord(f"{column} looks like a collection that a program printed and cannot be read: {text[:80]!r}: write JSON, or "
                        "text joined by commas")  # fmt: skip
    body = _SCALAR.sub(r"\1", body)
    skeleton = _QUOTES.sub("S", body)
    if not _is_one_bracket(skeleton):
        if re.match(r"[\[{]\s*S\s*[,:]", skeleton) and skeleton[-1] not in _CLOSE:
            raise BadRecord(f"{column} begins like a list and is cut off: ...{text[-40:]!r}")
        return None
    if not skeleton[1:-1].strip():
        return []
    if _SPACED.fullmatch(skeleton):
        return [ast.literal_eval(quoted) for quoted in _QUOTES.findall(body)]
    if _POSTGRES.fullmatch(body) and not _VALUES.search(skeleton):
        return _postgres(body)
    if not re.search(r"S\s*S", skeleton):  # Python would glue neighbours together
        for read in (json.loads, _literal):
            try:
                return _listed(read(body))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
    if of_tags and _BARE.fullmatch(body):
        return [item.strip() for item in body[1:-1].split(",")]
    printed = skeleton[1:].lstrip().startswith("S") or called is not None
    listed = skeleton[0] == "[" or (of_tags and skeleton[0] == "{")
    if printed or (listed and "," in body):
        raise BadRecord(f"{column} looks like a collection that a program printed and cannot be read: {text[:80]!r}: "
                        "write JSON, or text joined by commas")  # fmt: skip
    return None


def tags_in(value: str | Sequence[Any] | Mapping[Any, Any], column: str) -> list[str] | None:
    """The tags of a collection, or of a text that prints one; None for a text that prints none. Raises BadRecord."""
    found = collection(value, column, of_tags=True) if isinstance(value, str) else value
    if found is None:
        return None
    pairs = tags_with_values(found)
    if pairs is not None:
        raise BadRecord(
            f"{column} gives each tag a value ({str(value)[:60]}), and a source has no threshold: write a list of the "
            "tags that hold, or name the file in tag.path (tag.source: column), where thresholds apply"
        )
    return texts_of(found, column)


def lines_in(value: Any, column: str) -> str | None:
    """A caption: text as it is; a list of captions, or a text that prints one, as its lines. Raises BadRecord."""
    found = collection(value, column, of_tags=False) if isinstance(value, str) else value
    if found is None:
        return value
    if not isinstance(found, list | tuple | Mapping):
        hint = ": map a column of words" if isinstance(found, int | float) else ""
        raise BadRecord(f"{column} is {str(found)[:80]!r} ({type(found).__name__}), expected text{hint}")
    return "\n".join(texts_of(found, column))


def tags_with_values(found: Sequence[Any] | Mapping[Any, Any]) -> list[tuple[str, float]] | None:
    """(tag, number) of a map of tags to numbers, or of a list of such pairs; None for anything else."""
    pairs = list(found.items()) if isinstance(found, Mapping) else list(found)
    numbered = all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        and isinstance(pair[1], int | float) and not isinstance(pair[1], bool)
        for pair in pairs
    )  # fmt: skip
    return [(str(tag), float(number)) for tag, number in pairs] if pairs and numbered else None


def texts_of(found: Sequence[Any] | Mapping[Any, Any], column: str) -> list[str]:
    """The texts of a list, nulls left out. Raises BadRecord for a map and for a list of anything else."""
    if isinstance(found, Mapping):
        raise BadRecord(f"{column} is a map with the keys {', '.join(map(str, list(found)[:5]))}: write one list of texts")
    strange = next((one for one in found if one is not None and not isinstance(one, str)), None)
    if strange is not None:
        raise BadRecord(f"{column} holds {str(strange)[:60]!r} ({type(strange).__name__}), expected texts")
    return [one for one in found if one is not None]


def _is_one_bracket(skeleton: str) -> bool:
    """Whether the bracket that opens the text closes at its very end."""
    if len(skeleton) < 2 or skeleton[0] not in _OPEN or skeleton[-1] != _CLOSE[_OPEN.index(skeleton[0])]:
        return False
    depth = 0
    for place, letter in enumerate(skeleton):
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth == 0:
            return place == len(skeleton) - 1
    return False


def _literal(text: str) -> Any:
    """A literal of Python's; the elements of a set in the order in which they stand, which a set would lose."""
    node = ast.parse(text, mode="eval").body
    return [ast.literal_eval(one) for one in node.elts] if isinstance(node, ast.Set) else ast.literal_eval(node)


def _listed(value: Any) -> list[Any] | dict[Any, Any]:
    if isinstance(value, str):  # ('a') is no tuple in Python, and was meant as one
        return [value]
    if not isinstance(value, list | tuple | dict):
        raise ValueError("no collection")
    return value if isinstance(value, dict) else list(value)


def _postgres(body: str) -> list[str | None]:
    found = []
    for quoted, bare in re.findall(_ITEM, body[1:-1], re.DOTALL):
        found.append(bare or re.sub(r"\\(.)", r"\1", quoted))
    return [None if one == "NULL" else one for one in found]
