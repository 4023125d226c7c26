"""`pip install .` into an environment of its own, used from another folder: every room imports, shipped configs are found.

The packages it needs are lent by the environment that runs the test. With INSTALL_PYTHON (an interpreter, such as
python3.12) or INSTALL_VERSIONS (`lowest` = every lower bound of pyproject.toml, or a constraints file) pip gets them
instead, some GB, into INSTALL_ENV, a folder that is kept and used again (default: a temporary one); then the quick
tests run there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="what builds the wheel")
pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
QUICK = ("base", "config", "recipe", "storage", "data", "model", "prepare")
IMPORT_ALL = """
import importlib, json, pkgutil, sys, train
names = ["train", *(module.name for module in pkgutil.walk_packages(train.__path__, "train."))]
for name in names:
    importlib.import_module(name)
print(json.dumps([train.__file__, names]))
"""


def call(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def sources(folder: Path) -> Path:
    """A copy of what git would commit, since a build leaves files beside its sources."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("tests/fixtures/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder bin/ of an environment into which the built wheel was installed."""
    folder = tmp_path_factory.mktemp("install")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = call(folder, *pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sources(folder / "src"))
    assert built.returncode == 0, built.stderr
    venv.create(folder / "env", with_pip=False)
    done = call(folder, *pip, "--python", folder / "env/bin/python", "install", "-q", "--no-deps", *folder.glob("*.whl"))
    assert done.returncode == 0, done.stderr
    packages = next((folder / "env/lib").glob("python*/site-packages"))
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env/bin"


def test_every_room_imports_and_nothing_of_tests_is_there(installed: Path, tmp_path: Path) -> None:
    done = call(tmp_path, installed / "python", "-W", "ignore", "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    where, names = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(installed.parent)
    ours = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in ROOT.glob("train/**/*.py")}
    assert set(names) == {name for name in ours if not name.startswith("train.testing")}
    top = Path(where).parents[1]
    assert sorted(path.name for path in top.iterdir() if path.suffix != ".dist-info") == ["lent.pth", "train"]


def test_every_shipped_config_is_the_same(installed: Path) -> None:
    folder = next(installed.parent.glob("lib/python*/site-packages/train/config/yaml"))
    texts = [{path.relative_to(top): path.read_text() for path in top.rglob("*.yaml")} for top in (folder, ROOT / "configs")]
    assert texts[0] == texts[1]


def test_commands_from_another_folder(installed: Path, tmp_path: Path) -> None:
    use(installed / "anix", tmp_path)


def use(anix: Path, tmp_path: Path) -> None:
    """Every command that leads to a trained stage, from a folder that knows nothing of the sources."""
    listed = call(tmp_path, anix, "--help")
    assert listed.returncode == 0, listed.stderr
    plan = call(tmp_path, anix, "plan", "--config", "ft1.yaml", "--images", 1000, "--gpu", "H200", "--json")
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["total_updates"] == 200
    assert "train/config/yaml/ft1.yaml is taken" in plan.stderr
    drawn = call(tmp_path, anix, "tiny_world", "--out", "data/tiny_world", "--images", 48)
    assert drawn.returncode == 0, drawn.stderr
    made = call(tmp_path, anix, "prepare", "all", "--config", "configs/tiny/dataset.yaml")
    assert made.returncode == 0, made.stderr
    trained = call(tmp_path, anix, "train", "--config", "tiny/pretrain.yaml", "max_updates=2", "output_dir=runs/one")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs/one/DONE").exists()
    shown = call(tmp_path, anix, "show", "model", "runs/one/model", "--json")
    assert shown.returncode == 0, shown.stderr


def lower_bounds() -> list[str]:
    """`name==version` for every `name>=version` that pyproject.toml promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    return ["==".join(re.match(r"([\w.-]+)>=([\w.]+)", one).groups()) for one in wanted]  # type: ignore[union-attr]


@pytest.mark.skipif(not os.environ.keys() & {"INSTALL_PYTHON", "INSTALL_VERSIONS"}, reason="INSTALL_PYTHON, INSTALL_VERSIONS not set")
def test_another_python_or_other_versions(tmp_path: Path) -> None:
    python, versions = os.environ.get("INSTALL_PYTHON", sys.executable), os.environ.get("INSTALL_VERSIONS", "")
    folder = Path(os.environ.get("INSTALL_ENV", tmp_path / "env")).absolute()
    constraints = Path(versions).absolute() if versions not in ("", "lowest") else tmp_path / "constraints.txt"
    if versions in ("", "lowest"):
        constraints.write_text("\n".join(lower_bounds() if versions else []) + "\n")
    if not (folder / "bin/python").exists():
        made = call(tmp_path, python, "-m", "venv", folder)
        assert made.returncode == 0, made.stderr
    done = call(tmp_path, folder / "bin/python", "-m", "pip", "install", "-q", "-c", constraints, f"{sources(tmp_path / 'src')}[dev]")
    assert done.returncode == 0, done.stderr
    use(folder / "bin/anix", tmp_path)
    tests = [ROOT / "tests" / name for name in QUICK]
    ran = call(ROOT, folder / "bin/python", "-m", "pytest", "-q", "-n", 0, "-m", "not slow and not gpu", "-p", "no:cacheprovider", *tests)
    assert ran.returncode == 0, ran.stdout[-4000:]
