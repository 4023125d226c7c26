"""The closed grammar of `select.<stage>.where`: `column op value`, nothing evaluated.

op: `> >= < <= ==` with a number, word or "quoted text"; `in`, `not_in` with a list in brackets; on list columns
`has` with one value, `has_any` and `has_none` with a list. `true` and `false` are truth values. Words of several
words need no quotes inside a list (`[best quality, masterpiece]`). A comparison with a missing value is false;
`not_in` and `has_none` are true for it. With ` if known` at its end a predicate is passed over, aloud, where no picture
has any value of the column; without it such a predicate can never hold, and says so.

Columns: those of `probe` (so width and height are the upright file's), `records` and `labels` by their names,
`aesthetic_score`, `area` (pixels), `aspect` (longer by shorter side), `tags` (all tags of the source),
`near_duplicate` (looks like a larger one). Tags are compared as `tagmatch` says: `long hair` is `long_hair`, and those of
captions count in `tags` and in every `tags_*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode, Halt
from train.prepare.tagging.matching import occurring, tagged

_PATTERN = re.compile(r"\s*([a-z_0-9]+)\s*(>=|<=|==|>|<|\bnot_in\b|\bin\b|\bhas_any\b|\bhas_none\b|\bhas\b)\s*(\S|\S.*\S)\s*")
_IF_KNOWN = re.compile(r"(.*\S)\s+if\s+known\s*", re.DOTALL)
_LIST_OPS = ("in", "not_in", "has_any", "has_none")
_COMPARE = {">": pc.greater, ">=": pc.greater_equal, "<": pc.less, "<=": pc.less_equal, "==": pc.equal}
Value = str | float | int | bool


@dataclass(frozen=True)
class Predicate:
    """One condition on one column."""

    text: str  # as written
    column: str
    op: str
    values: tuple[Value, ...]  # one, but for the operators that take a list
    if_known: bool = False  # passed over where no row has a value

    @property
    def negative(self) -> bool:
        """Whether rows without a value pass."""
        return self.op in ("not_in", "has_none")


@dataclass(frozen=True)
class Outcome:
    """What a predicate says of all rows."""

    holds: npt.NDArray[np.bool_]  # bool[N]
    known: int  # rows that have a value at all
    absent: tuple[Value, ...]  # those of the predicate's words that no row has


def parse(text: str) -> Predicate:
    """Raises Halt(USAGE) quoting the predicate and saying what is wrong with it."""
    condition = _IF_KNOWN.fullmatch(text)
    match = _PATTERN.fullmatch(condition[1] if condition else text)
    if match is None:
        raise _bad(text, "must read `column op value` with op one of > >= < <= == in not_in has has_any has_none")
    column, op, rest = match.groups()
    is_list = rest.startswith("[") and rest.endswith("]")
    if is_list != (op in _LIST_OPS):
        raise _bad(text, f"{op} takes {'a list in brackets' if op in _LIST_OPS else 'one value'}")
    values = tuple(_value(part, text) for part in _split(rest[1:-1])) if is_list else (_value(rest, text),)
    if not values:
        raise _bad(text, "the list is empty")
    return Predicate(text.strip(), column, op, values, condition is not None)


def evaluate(predicate: Predicate, parts: Iterable[pa.Array]) -> Outcome:
    """The predicate over a column that comes in parts. Raises Halt(USAGE) when the types do not fit."""
    masks, known, present = [np.zeros(0, bool)], 0, set[Value]()
    words = predicate.values if predicate.op.startswith("has") or predicate.op in ("in", "not_in", "==") else ()
    named = {word_of(word): word for word in words}
    for part in parts:
        masks.append(holds(predicate, part))
        filled = pc.list_value_length(part) if pa.types.is_list(part.type) else part
        known += len(part) - filled.null_count
        if pa.types.is_list(part.type):
            known -= pc.sum(pc.equal(filled, 0)).as_py() or 0
            present |= {named[text] for text in occurring(part, named)}
        else:
            present |= {word for word in words if holds(Predicate("", "", "==", (word,)), part).any()}
    return Outcome(np.concatenate(masks), known, tuple(word for word in words if word not in present))


def holds(predicate: Predicate, column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """bool[N]: for which rows the predicate is true. Raises Halt(USAGE) when the types do not fit."""
    kind = column.type
    listed = pa.types.is_list(kind)
    if predicate.op.startswith("has") != listed:
        wanted = "has, has_any or has_none" if listed else "a comparison, in or not_in"
        raise _bad(predicate.text, f"{predicate.column} is {kind}, use {wanted}")
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    try:
        if listed:
            return _has(predicate, column)
        if predicate.op in ("in", "not_in"):
            found = pc.is_in(column, value_set=_typed(predicate.values, column.type))
            return _bools(found) ^ (predicate.op == "not_in")
        result = _COMPARE[predicate.op](column, _typed(predicate.values, column.type)[0])
        return _bools(pc.fill_null(result, False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise _bad(predicate.text, f"{predicate.column} is {kind}: {error}") from error


def _has(predicate: Predicate, column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    wanted = [word_of(value) for value in predicate.values]
    hits = np.concatenate([np.zeros(0, bool), *(tagged(chunk, wanted) >= 0 for chunk in chunks)])
    return hits ^ (predicate.op == "has_none")


def _bools(values: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = np.asarray(values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array)
                                               else values.to_numpy(), dtype=bool)  # fmt: skip
    return result


def _typed(values: tuple[Value, ...], kind: pa.DataType) -> pa.Array:
    if pa.types.is_integer(kind):
        # 0.5 must compare as it is written, so integers compare with numbers of either kind.
        return pa.array(values, pa.int64() if all(isinstance(v, int) for v in values) else pa.float64())
    if pa.types.is_string(kind):
        return pa.array([word_of(value) for value in values], kind)
    return pa.array(values, kind)


def word_of(value: Value) -> str:
    """A value as a text column holds it."""
    return value if isinstance(value, str) else str(value).lower()


def _split(inner: str) -> list[str]:
    """Parts between commas that stand outside quotes."""
    parts = re.findall(r'\s*("[^"]*"|[^,"]+)\s*(?:,|$)', inner)
    return [part.strip() for part in parts if part.strip()]


def _value(text: str, predicate: str) -> Value:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if any(mark in text for mark in "[]\"'<>="):
        raise _bad(predicate, f"{text!r} is neither a number nor a word")
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.?\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return text


def _bad(text: str, why: str) -> Halt:
    return Halt(ExitCode.USAGE, f"select.where: {text!r}: {why}")
