"""docs/troubleshooting.md: the messages that it explains are messages of ours, word by word."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)


@cache
def texts() -> str:
    """Every string of the product; what is filled in stands as a NUL."""
    found = []
    for path in (ROOT / "train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_on_the_page_is_one_of_ours(message: str) -> None:
    parts = [part.strip() for part in message.split("...")]
    assert max(map(len, parts)) >= 10
    assert re.search("[^\n]*".join(map(re.escape, parts)), texts()), message


def test_each_is_explained() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) >= 30
