"""The rules of the house, read from the source: layers, names, sizes, scripts, README."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A package imports packages of lower floors only, the same floor never. Everything above `engine` is called, not imported.
FLOORS = {
    "base": 1, "config": 2, "recipe": 3, "storage": 3, "model": 4, "optim": 4, "diffusion": 5, "data": 6,
    "observe": 7, "prepare": 7, "engine": 8, "tools": 9, "run": 9, "testing": 10,
}  # fmt: skip
LIGHT = ("base", "config", "recipe", "engine.ending", "engine.refusals", "run")  # answer before torch is loaded
SOURCES = sorted([*ROOT.glob("train/**/*.py"), *ROOT.glob("scripts/*.py")])
ROOMS = [path for path in SOURCES if path.is_relative_to(ROOT / "train") and path.name != "__init__.py"]


def module_of(path: Path) -> str:
    """`engine.loop` of `train/engine/loop.py`."""
    return ".".join(path.relative_to(ROOT / "train").with_suffix("").parts)


MODULES = {module_of(path) for path in ROOMS}


def imported(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Modules imported by a file, `train.x` for both import forms."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.split(".")[0] == "train":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: Path, *, top_only: bool = False) -> set[str]:
    """Rooms of this house that a file imports."""
    return {name.removeprefix("train.") for name in imported(path, top_only=top_only)} & MODULES


@pytest.mark.parametrize("path", ROOMS, ids=module_of)
def test_imports_go_to_lower_floors(path: Path) -> None:
    mine = module_of(path).split(".")[0]
    for name in own(path):
        package = name.split(".")[0]
        assert package == mine or FLOORS[package] < FLOORS[mine], f"{mine} (floor {FLOORS[mine]}) imports {name}"


# Beside config/, run.py and the commands: a room that loads a run's config itself, and two that speak of the schema.
KNOW_THE_STAGE = {"tools.show.run", "tools.show.keys", "tools.convert.toml"}


@pytest.mark.parametrize("path", ROOMS, ids=module_of)
def test_a_room_takes_what_it_uses_of_a_stage(path: Path) -> None:
    """Not the whole `StageConfig`, by its name or under the type that says nothing; tests/config/test_key_readers.py sees the rest."""
    name = module_of(path)
    if name.startswith(("config.", "tools.commands.")) or name == "run" or name in KNOW_THE_STAGE:
        return
    tree = ast.parse(path.read_text())
    assert "train.config.stage.StageConfig" not in set(imported(path)), "take a section, or a record of config/derived.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in ("config", "stage", "settings") and node.annotation is not None:
            assert name.startswith("testing.") or ast.unparse(node.annotation) != "Any", f"line {node.lineno}: say which section"


def test_the_light_rooms_load_no_torch() -> None:
    names = [name for name in sorted(MODULES) if name.split(".")[0] in LIGHT or name in LIGHT]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(f'train.{name}' for name in names)}; " \
           "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers', 'accelerate')))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_ground_floor_is_standard_library() -> None:
    for path in ROOMS:
        if module_of(path).startswith("base."):
            foreign = {name.split(".")[0] for name in imported(path)} - {"train", "__future__"} - sys.stdlib_module_names
            assert not foreign, f"{path.name} imports {foreign}"


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Every way that comes back to where it began, written with arrows."""
    done: set[str] = set()
    found = []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return found


def test_no_import_cycles() -> None:
    assert cycles({module_of(path): own(path, top_only=True) - {module_of(path)} for path in ROOMS}) == []


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """(lines, name) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}"


def test_numbers_of_the_house() -> None:
    """What `pytest tests/test_house.py -k numbers -s` prints, each held to its limit where it has one."""
    testing = (ROOT / "train/testing", ROOT / "scripts/bench.py", ROOT / "scripts/chaos.py")
    product = [path for path in SOURCES if not any(path.is_relative_to(place) for place in testing)]
    lines = {path: len(path.read_text().splitlines()) for path in product}
    imports = {module_of(path): {name for name in own(path) if name != module_of(path)} for path in ROOMS}
    edges = [(room, other) for room, others in imports.items() for other in others]
    across = {(a.split(".")[0], b.split(".")[0]) for a, b in edges if a.split(".")[0] != b.split(".")[0]}
    packages = {path.parent for path in ROOMS} - {ROOT / "train"}
    longest_file = max((count, str(path.relative_to(ROOT))) for path, count in lines.items())
    longest_function = max(found for path in product for found in functions(path))
    table: list[tuple[str, int, int | None, str]] = [  # what, number, limit, where
        ("names at the first level of train/", len(FLOORS), 14, ""),
        ("packages, inner ones too", len(packages), None, ""),
        ("floors", len(set(FLOORS.values())), 10, ""),
        ("rooms", len(ROOMS), None, ""),
        ("imports between rooms", len(edges), None, ""),
        ("arrows between packages", len(across), None, ""),
        ("arrows that do not go down", sum(FLOORS[a] <= FLOORS[b] for a, b in across), 0, ""),
        ("cycles of rooms", len(cycles({module_of(path): own(path, top_only=True) - {module_of(path)} for path in ROOMS})), 0, ""),
        ("lines of the longest file", longest_file[0], 400, longest_file[1]),
        ("lines of the longest function", longest_function[0], 60, longest_function[1]),
        ("lines of the product, without testing", sum(lines.values()), None, ""),
    ]
    for what, number, limit, where in table:
        print(f"{number:>7,}  {what}{f', at most {limit:,}' if limit is not None else ''}{f' ({where})' if where else ''}")
    assert [(what, number) for what, number, limit, _ in table if limit is not None and number > limit] == []


def test_packages_have_a_size_one_can_read() -> None:
    first = [path for path in (ROOT / "train").iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert len(first) <= 14, sorted(path.name for path in first)
    assert {path.stem for path in first} == set(FLOORS)
    for folder in sorted({path.parent for path in ROOMS} - {ROOT / "train"}):
        rooms = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        packages = [path for path in folder.iterdir() if (path / "__init__.py").exists()]
        assert len(rooms) <= 14 and len(packages) <= 14, f"{folder.relative_to(ROOT)}: {len(rooms)} rooms, {len(packages)} packages"
        assert len(rooms) + len(packages) >= 3, folder
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text, f"{folder.name}: one sentence on what lives there and what does not"


@pytest.mark.parametrize("folder", ["train", "scripts"])
def test_names_shadow_nothing(folder: str) -> None:
    """Both folders land first on sys.path when a file in them is started."""
    installed = {name.lower() for name in importlib.metadata.packages_distributions()} - {"train"}
    for path in (ROOT / folder).glob("*"):
        if path.suffix in ("", ".py") and path.stem not in ("__init__", "__pycache__"):
            assert path.stem not in sys.stdlib_module_names, path
            # A package may list a module that it does not bring: pyvips-binary says "wheelhouse".
            assert path.stem.lower() not in installed or importlib.util.find_spec(path.stem) is None, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    lines = path.read_text().splitlines()
    short = path.parent.name == "scripts" or path == ROOT / "train" / "run.py"
    assert len(lines) <= (80 if short else 400)
    assert [found for found in functions(path) if found[0] > 60] == []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert len(node.args.posonlyargs) + len(node.args.args) <= 8, f"{path.name}: {node.name}: say what they are"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_runs_what_it_reads(path: Path) -> None:
    """No pickles, no evaluated text, no shells, no code from a hub; whatever the input, it stays data."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "compile", "torch.load", "yaml.load", "os.system", "os.popen"), node.lineno
            assert name.rpartition(".")[2] not in ("save_state", "load_state", "load_custom_state") or (
                not name.startswith("accelerator")
            )
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                forbidden = ("shell", "allow_pickle", "trust_remote_code")
                assert not (keyword.arg in forbidden and value == "True"), node.lineno
    modules = {name.split(".")[0] for name in imported(path)}
    assert not modules & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


def test_tests_share_through_support() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if not path.is_relative_to(ROOT / "tests/fixtures"):  # made with old code, kept as it was
            assert not [name for name in imported(path) if name.split(".")[0].startswith("test_")], path


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.py")), ids=lambda p: p.name)
def test_scripts_answer_help_from_anywhere(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert script.read_text().startswith("#!/usr/bin/env python\n")
    assert os.access(script, os.X_OK), "README calls it by its name"
    result = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


def test_readme_tree_is_true() -> None:
    """README's tree names every package, in at most twenty lines, and nothing that does not exist."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"## What is where\n```text\n(.*?)```", readme, re.DOTALL)
    assert block, "README has a ```text block under `What is where`"
    lines = block.group(1).splitlines()
    assert len(lines) <= 20
    named = [line.split()[0] for line in lines]
    assert {f"train/{name}" + (".py" if name == "run" else "/") for name in FLOORS} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_nothing_names_a_machine_or_a_registry() -> None:
    words = ["/" + "work/", "/" + "farm/", "/ho" + "me/", "pypi." + "org", "pythonhosted" + ".org", "download.py" + "torch"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".sh", ".toml", ".txt", ".ipynb") and path.name != "test_stage.py":
            text = path.read_text(errors="replace")
            assert not [word for word in words if word in text], name
