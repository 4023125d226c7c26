"""The grammar of `select.<stage>.where`: an oracle in plain Python, and refusals that quote the predicate."""

from __future__ import annotations

import operator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.base.errors import ExitCode, Halt
from train.prepare.choosing.predicates import Predicate, holds, parse

OPS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("aesthetic_score > 0.71", ("aesthetic_score", ">", (0.71,))),
        ("area >= 1048576", ("area", ">=", (1048576,))),
        ("rating == g", ("rating", "==", ("g",))),
        ("near_duplicate == false", ("near_duplicate", "==", (False,))),
        ("quality in [masterpiece, best quality]", ("quality", "in", ("masterpiece", "best quality"))),
        ('tags has_none [comic, "a, b", 4koma]', ("tags", "has_none", ("comic", "a, b", "4koma"))),
        ('  tags has "ai-generated" ', ("tags", "has", ("ai-generated",))),
        ("year not_in [oldest]", ("year", "not_in", ("oldest",))),
        ("score<=-5", ("score", "<=", (-5,))),
    ],
)
def test_parse(text: str, wanted: tuple[Any, ...]) -> None:
    assert parse(text) == Predicate(text.strip(), *wanted)


@pytest.mark.parametrize(
    "text",
    ["", "area", "area > ", "> 3", "area != 3", "area > 3 and area < 5", "area > [1]", "quality in masterpiece", "tags has_any []",
     "__import__('os').system('x')", "area = 3", "lambda: 0", "quality in [a", "area >> 3", "a.b > 3", "tags has_any [a] or x"],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(Halt) as halt:
        parse(text)
    assert halt.value.code == ExitCode.USAGE
    assert repr(text) in halt.value.message


values = st.lists(st.one_of(st.none(), st.integers(-5, 5)), max_size=12)


@given(values, st.sampled_from(sorted(OPS)), st.one_of(st.integers(-5, 5), st.sampled_from([0.5, -1.5])))
def test_comparisons(column: list[int | None], op: str, value: float) -> None:
    found = holds(parse(f"x {op} {value}"), pa.chunked_array([pa.array(column, pa.int32())]))
    assert found.tolist() == [v is not None and OPS[op](v, value) for v in column]


@given(st.lists(st.one_of(st.none(), st.sampled_from("gsqe")), max_size=12), st.sets(st.sampled_from("gsqe"), min_size=1))
def test_membership(column: list[str | None], wanted: set[str]) -> None:
    chunked = pa.chunked_array([pa.array(column, pa.string())])
    text = ", ".join(sorted(wanted))
    assert holds(parse(f"x in [{text}]"), chunked).tolist() == [v in wanted for v in column]
    assert holds(parse(f"x not_in [{text}]"), chunked).tolist() == [v not in wanted for v in column]
    encoded = pa.chunked_array([pa.array(column, pa.string()).dictionary_encode()])
    assert holds(parse(f"x in [{text}]"), encoded).tolist() == [v in wanted for v in column]


lists = st.lists(st.one_of(st.none(), st.lists(st.sampled_from("abcd"), max_size=4)), max_size=12)


@given(lists, st.sets(st.sampled_from("abcd"), min_size=1), st.integers(0, 12))
def test_lists(column: list[list[str] | None], wanted: set[str], split: int) -> None:
    kind = pa.list_(pa.string())
    chunked = pa.chunked_array([pa.array(column[:split], kind), pa.array(column[split:], kind)])
    text = ", ".join(sorted(wanted))
    hits = [bool(wanted & set(v or [])) for v in column]
    assert holds(parse(f"x has_any [{text}]"), chunked).tolist() == hits
    assert holds(parse(f"x has_none [{text}]"), chunked).tolist() == [not hit for hit in hits]
    one = min(wanted)
    assert holds(parse(f"x has {one}"), chunked).tolist() == [one in (v or []) for v in column]


@pytest.mark.parametrize(
    ("text", "column"),
    [("x has a", pa.array(["a"])), ("x > 3", pa.array([["a"]])), ("x == word", pa.array([1])), ("x > word", pa.array([1.5]))],
)
def test_types_that_do_not_fit(text: str, column: pa.Array) -> None:
    with pytest.raises(Halt, match=r"select\.where"):
        holds(parse(text), pa.chunked_array([column]))
