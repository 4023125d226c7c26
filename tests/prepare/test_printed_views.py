"""Cells that a program printed instead of writing text: read where the form is known, refused by the column's name elsewhere."""

from __future__ import annotations

import pytest

from train.prepare.formats.cells import lines_in, tags_in
from train.prepare.posts.normalise import BadRecord


@pytest.mark.parametrize("cell", ["dict_keys(['1girl', 'hat'])", "dict_values(['1girl', 'hat'])", "frozenset({'1girl', 'hat'})"])
def test_views_and_sets_are_read(cell: str) -> None:
    assert tags_in(cell, "tags") == ["1girl", "hat"]
    assert lines_in(cell, "text") == "1girl\nhat"


@pytest.mark.parametrize(
    "cell",
    ["defaultdict(<class 'float'>, {'1girl': 0.9})", "Series(['1girl'])", "OrderedDict([('1girl', 0.9)])", "b'1girl, hat'", 'b"it\'s"'],
)
def test_what_has_no_known_form_is_refused_by_its_column(cell: str) -> None:
    for read in (tags_in, lines_in):
        with pytest.raises(BadRecord, match=r"^text "):
            read(cell, "text")


@pytest.mark.parametrize("cell", ["smile (happy)", "(smile)", "ganyu (genshin impact)", "b, 'quoted'", "fate (series)", "sign (see [1])"])
def test_text_with_brackets_stays_text(cell: str) -> None:
    assert tags_in(cell, "tags") is None
    assert lines_in(cell, "text") == cell
