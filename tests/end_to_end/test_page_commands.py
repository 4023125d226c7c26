"""Commands on the pages, README and docs/: programs and options that exist, and each of them run, or said why not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from train.config import schema
from train.config.stage import StageConfig

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests/fixtures/c93b03a"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ("scripts/", "accelerate launch", "anix ")

# What is not run here, and who runs it or why nobody does.
ELSEWHERE = {
    r"scripts/quickstart\.sh": "ten minutes: test_tiny_recipe.py runs its stages",
    r"scripts/fetch\.py": "a network: tests/tools/test_fetch.py asks a stand-in of the hub",
    r"scripts/publish\.py .* --go": "a network: tests/tools/test_publish.py and tests/data/test_published.py send to stand-ins",
    r"(scripts/tiny_world\.py --character|accelerate launch .*runs/mirelle)": "the own-pictures walk: test_own_pictures.py",
    r"accelerate launch .*configs/(ft1|lora)\.yaml": "a whole SDXL on a card: test_run.py launches the tiny stages by the same line",
    r"scripts/recipe\.py --configs configs/pretrain": "two cards: test_recipe.py runs the tiny stages",
    r"scripts/prepare\.py all --config configs/dataset\.yaml": "needs a VAE of SDXL: test_matrix.py prepares every layout",
    r"scripts/demo\.py": "serves until it is ended: tests/tools/test_demo.py",
    r"(scripts|anix) ?/?(new|recipe)(\.py)?": "a folder of pictures: test_own_pictures.py, the own-pictures walk",
}  # fmt: skip
# Words of the pages -> what stands for them in the tiny world.
STANDS_FOR = {
    "animagine-xl-3.0-base.safetensors": "model", "animagine-xl-3.1.safetensors": "model", "start=animagine-xl-3.0-base.safetensors": "start=model",
    "released=animagine-xl-3.1.safetensors": "released=model", "data/animagine31": "data/mine", "2048": "4", "0.01": "0.5",
    "BASE": "model", "A": "model", "B": "runs/ft2", "C": "model", "x.safetensors": "a.safetensors", "32": "4",
    "runs/lora/lora-lora.safetensors:0.8": "a.safetensors:0.8",
}  # fmt: skip


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks that start a program of ours, without comments."""
    found = []
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.split("  #")[0].strip()
            if line.startswith(OURS):
                found.append(line)
    return found


ALL = list(dict.fromkeys((page.name, line) for page in PAGES for line in commands(page)))


@cache
def help_of(program: str, *parts: str) -> str:
    done = subprocess.run([sys.executable, str(ROOT / program), *parts, "--help"], capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout + done.stderr


def test_there_are_commands() -> None:
    assert len(ALL) > 25 and {"README.md", "adapters.md", "data.md"} <= {name for name, _ in ALL}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), ALL)
def test_programs_files_and_options_exist(page: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "accelerate":
        words = words[words.index("train/run.py") :]
        assert set(words[1::2]) >= {"--config"}
    elif words[0] == "anix":
        words = [f"scripts/{words[1]}.py", *words[2:]]
    assert (ROOT / words[0]).is_file(), words[0]
    keys = schema.keys_of(StageConfig)
    for word in words[1:]:
        if word.startswith("configs/"):
            assert (ROOT / word).exists() or "mine" in word, word
        if re.fullmatch(r"[a-z_.]+=\S+", word) and "." in word.split("=")[0]:
            assert word.split("=")[0] in keys, word
    options = [word for word in words if word.startswith("--")]
    if words[0].endswith(".py") and words[0] != "train/run.py" and options:
        parts = [word for word in words[1:2] if re.fullmatch("[a-z]+", word) and words[0] in ("scripts/convert.py", "scripts/show.py", "scripts/quality.py")]
        told = help_of(words[0], *parts)
        for option in options:
            assert re.search(rf"{option}\b", told), f"{words[0]} knows no {option}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the pages' names mean something tiny."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("scripts", "configs", "train", "pyproject.toml"):
        os.symlink(ROOT / name, folder / name)
    shutil.copytree(FIXTURE / "model", folder / "model")
    (folder / "data").mkdir()
    shutil.copytree(FIXTURE / "set", folder / "data" / "mine")
    (folder / "runs").mkdir()
    for stage in ("pretrain", "ft1", "ft2"):
        shutil.copytree(FIXTURE / "finished", folder / "runs" / stage)
    for name in ("a.safetensors", "b.safetensors"):
        run(folder, f"scripts/convert.py extract runs/ft2 --base model --rank 2 {name}")
    return folder


def run(folder: Path, line: str) -> str:
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line)]
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


HERE = [(page, line) for page, line in ALL if not any(re.match(pattern, line) for pattern in ELSEWHERE)]


@pytest.mark.long
@pytest.mark.parametrize(("page", "line"), HERE)
def test_it_runs_on_the_tiny_world(page: str, line: str, world: Path) -> None:
    run(world, line)


def test_what_is_run_elsewhere_is_on_a_page() -> None:
    for pattern in ELSEWHERE:
        assert any(re.match(pattern, line) for _, line in ALL) or "new|recipe" in pattern, pattern
