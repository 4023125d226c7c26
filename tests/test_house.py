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
L0 = {"config", "configrules", "schema", "exits", "rng", "schedule", "buckets", "captions", "labels", "plan", "memory", "faults",
      "exclusions", "scaler", "rundir", "masking", "quiet", "streams", "resume"}  # fmt: skip
L2 = {"run"}
SOURCES = sorted([*ROOT.glob("train/**/*.py"), *ROOT.glob("scripts/*.py")])


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


def own_modules() -> set[str]:
    return {path.stem for path in ROOT.glob("train/*.py") if path.stem != "__init__"} | {
        path.name for path in ROOT.glob("train/*/") if (path / "__init__.py").exists()
    }


@pytest.mark.parametrize("path", sorted(ROOT.glob("train/*.py")), ids=lambda p: p.stem)
def test_layers(path: Path) -> None:
    mine = own_modules()
    names = {name.split(".")[1] for name in imported(path) if name.startswith("train.")} & mine
    assert not names & {"prepare", "tools"}, "train/ never imports the preparation or the tools"
    if path.stem not in L2:
        assert not names & L2, "only run.py knows all the others"
    if path.stem in L0:
        assert names <= L0, f"L0 imports L0 only, not {names - L0}"
        heavy = {name.split(".")[0] for name in imported(path)} & {"torch", "diffusers", "transformers", "accelerate"}
        assert not heavy


def test_prepare_never_imports_tools() -> None:
    for path in ROOT.glob("train/prepare/*.py"):
        assert not [name for name in imported(path) if name.startswith("train.tools")], path


def test_core_does_not_load_torch() -> None:
    present = sorted(L0 & own_modules())
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(f'train.{m}' for m in present)}; " \
           "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_import_cycles() -> None:
    mine = own_modules()
    graph = {
        path.stem: {n.split(".")[1] for n in imported(path, top_only=True) if n.startswith("train.")} & mine - {path.stem}
        for path in ROOT.glob("train/*.py")
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


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
    assert len(lines) <= (80 if path.parent.name == "scripts" else 400)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = 80 if (path.name, node.name) == ("run.py", "main") else 60
            assert (node.end_lineno or 0) - node.lineno + 1 <= limit, f"{path.name}: {node.name}"


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
    """README's file tree names every module once, and nothing that does not exist."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```text\n(.*?)```", readme, re.DOTALL)
    assert block, "README has a ```text block with the file tree"
    named = set(re.findall(r"^\s*([\w./-]+\.(?:py|sh|yaml|toml|txt|md))\s{2,}", block.group(1), re.MULTILINE))
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("train/*.py")} - {"train/__init__.py"}
    modules |= {str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/*") if path.suffix in (".py", ".sh")}
    assert modules - named == set(), "missing in README"
    assert {name for name in named if not (ROOT / name).exists()} == set(), "in README but gone"


def test_nothing_names_a_machine_or_a_registry() -> None:
    words = ["/" + "work/", "/" + "farm/", "/ho" + "me/", "pypi." + "org", "pythonhosted" + ".org", "download.py" + "torch"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".sh", ".toml", ".txt", ".ipynb") and path.name != "test_config.py":
            text = path.read_text(errors="replace")
            assert not [word for word in words if word in text], name
