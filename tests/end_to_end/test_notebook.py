"""The notebook is clean and asks only for commands, options and files that exist."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("step", ["tiny_world", "prepare", "plan", "recipe", "sample", "quality", "report"])
def test_every_step_is_there(step: str) -> None:
    assert f"scripts/{step}.py" in EVERYTHING


def test_commands_options_and_configs_exist() -> None:
    commands = [line for line in EVERYTHING.splitlines() if line.startswith("!") and "scripts/" in line]
    assert len(commands) >= 9
    assert EVERYTHING.count("assert not _exit_code") == EVERYTHING.count("\n!") + EVERYTHING.startswith("!")
    for line in commands:
        (script,) = re.findall(r"scripts/\w+\.py", line)
        room = ROOT / "train/tools/commands" / Path(script).name
        text = (room if room.is_file() else ROOT / script).read_text()
        for option in re.findall(r"(?<= )--[\w-]+", line):
            assert f'"{option}"' in text, f"{script} has no {option}"
    for config in re.findall(r"configs/[\w/]+\.yaml", EVERYTHING):
        assert (ROOT / config).is_file(), config


SHOWN = """
class _Shown:
    def __init__(self, data, width=None):
        self.data = data
HTML = Image = _Shown
def display(shown):
    print("shown", len(shown.data))
"""


def as_script(source: str) -> str:
    """A cell as plain Python: what the notebook hands to the shell becomes a process whose code is kept."""
    lines = [
        f"_exit_code = subprocess.run(shlex.split(f{line[1:]!r})).returncode" if line.startswith("!") else line
        for line in source.splitlines()
        if "pip install" not in line
    ]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.long
def test_cells_run_in_order_from_an_empty_folder(tmp_path: Path) -> None:
    """As on a bare machine: the first cell clones, the others follow; the stages are cut to a few updates.

    Only `pip install` is left out, because the tests run without network.
    """
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython" / "__init__.py").write_text("")
    (tmp_path / "IPython" / "display.py").write_text(SHOWN)
    script = "import shlex\n_exit_code = 0\n" + "\n".join(as_script(source) for source in SOURCES)
    script = script.replace('REPOSITORY = ""', f'REPOSITORY = "file://{ROOT}"')
    script = script.replace("{LOOK}", "{LOOK} max_updates=6")
    (tmp_path / "cells.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("shown") == 3, "two pictures and the report"
    report = (tmp_path / "recipe" / "runs" / "tiny" / "report.html").read_text()
    for words in ("Stage comparison", "Held-out loss", "Quality of the samples", "base → pretrain", "pretrain → ft2"):
        assert words in report, words
