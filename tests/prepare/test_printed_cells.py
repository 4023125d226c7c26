"""Cells that hold a printed collection are read or refused by name, and never become tags such as `['1girl'`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.prepare.formats.cells import lines_in, tags_in
from train.prepare.posts.normalise import BadRecord

TAGS = ["1girl", "long hair", "it's", 'say "hi"']
READ = {
    "Python list": repr(TAGS), "Python tuple": repr(tuple(TAGS)), "a tuple of one": "('1girl',)", "brackets around one": "('1girl')",
    "JSON": '["1girl", "long hair", "it\'s", "say \\"hi\\""]', "numpy": str(np.array(TAGS)), "numpy repr": repr(np.array(TAGS)),
    "numpy of objects": repr(np.array(TAGS, dtype=object)), "numpy scalars": "[np.str_('1girl'), np.str_('long hair')]",
    "PostgreSQL": '{1girl,"long hair",it\'s,"say \\"hi\\""}', "PostgreSQL of one": "{1girl}", "set": "{'1girl', 'long hair'}",
    "frozenset": "frozenset({'1girl'})", "without quotes": "[1girl, long hair]", "nulls": '["1girl", null, "long hair"]',
    "PostgreSQL with null": '{1girl,NULL,"long hair"}',
}  # fmt: skip
REFUSED = {
    "a map of probabilities": "{'1girl': 0.9, 'smile': 0.2}", "the same as JSON": '{"1girl": 0.9}', "pairs": "[('1girl', 0.9)]",
    "numpy's numbers": "{'1girl': np.float32(0.9)}", "tags by category": "{'general': {'1girl': 0.9}}", "numbers": "[12, 13]",
    "shortened by numpy": "['1girl' 'smile' ... 'hat']", "cut off": "['1girl', 'smile', 'long ha", "lists in a list": "[['1girl'], ['hat']]",
    "SQL quotes": "['it''s', 'hat']", "a missing one": "['1girl', nan]", "a set without quotes": "{1girl, smile}",
}  # fmt: skip
PLAIN = ["1girl, long hair", "(o)_(o)", "[x], smile, [y]", ":{", "}:(", "(1girl:1.2), hat", "", "a [b] c"]


@pytest.mark.parametrize("kind", READ)
def test_a_printed_collection_is_read(kind: str) -> None:
    found = tags_in(READ[kind], "tags")
    assert found in (TAGS, TAGS[:2], TAGS[:1])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(kind: str) -> None:
    with pytest.raises(BadRecord, match=r"^tags "):
        tags_in(REFUSED[kind], "tags")


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_is_no_collection(text: str) -> None:
    assert tags_in(text, "tags") is None
    assert lines_in(text, "caption") == text


def test_probabilities_are_refused_with_where_they_are_read() -> None:
    with pytest.raises(BadRecord, match=r"tag\.path"):
        tags_in("{'1girl': 0.9}", "tags")


def test_a_set_keeps_its_printed_order() -> None:
    assert tags_in("{'c', 'a', 'b', 'e', 'd'}", "tags") == ["c", "a", "b", "e", "d"]


def test_several_captions_are_lines_and_brackets_in_prose_stay() -> None:
    assert lines_in(["a girl", None, "a hat"], "text") == "a girl\na hat"
    assert lines_in("['a girl', 'a hat']", "text") == "a girl\na hat"
    for text in ("[photo:drawing:0.5]", "(a girl, smiling)", "{{1girl, smile}}", "[sign] a girl"):
        assert lines_in(text, "text") == text
    for value in ("[1girl, smile]", '{"en": "a girl"}', {"en": "a girl"}, 5, ["a", 3]):
        with pytest.raises(BadRecord, match=r"^text "):
            lines_in(value, "text")


_TAG = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters=",\x7f"), min_size=1).filter(str.strip)


@given(st.lists(_TAG, min_size=1, max_size=6))
def test_whatever_python_prints_comes_back(tags: list[str]) -> None:
    assert tags_in(repr(tags), "tags") == tags
    assert tags_in(repr(tuple(tags)), "tags") == tags
