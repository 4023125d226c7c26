"""The notebook is clean and asks only for commands, options and files that exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "docs/recipe.ipynb").read_text())
SOURCES = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
EVERYTHING = "\n".join(SOURCES)


def test_structure() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("source", SOURCES)
def test_python_lines_parse(source: str) -> None:
    ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("!")))


@pytest.mark.parametrize("step", ["tiny_world", "prepare", "recipe", "sample", "report"])
def test_every_step_is_there(step: str) -> None:
    assert f"scripts/{step}.py" in EVERYTHING


def test_commands_options_and_configs_exist() -> None:
    commands = [line for line in EVERYTHING.splitlines() if line.startswith("!") and "scripts/" in line]
    assert len(commands) >= 6
    for line in commands:
        (script,) = re.findall(r"scripts/\w+\.py", line)
        text = (ROOT / script).read_text()
        for option in re.findall(r"(?<= )--[\w-]+", line):
            assert f'"{option}"' in text, f"{script} has no {option}"
    for config in re.findall(r"configs/[\w/]+\.yaml", EVERYTHING):
        assert (ROOT / config).is_file(), config
