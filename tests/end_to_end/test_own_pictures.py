"""As a new user would: 40 drawn pictures with their texts and a tiny base; two commands to a model that knows the character. Minutes.

The base is a finished tiny recipe: OWN_PICTURES_BASE names one (runs/tiny/ft2 after scripts/quickstart.sh), else it is trained here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.tools.tiny.character import PROMPTS
from train.tools.tiny.check import check_character

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S, ADAPTER_LIMIT_S = 600, 180  # on two cores that nobody else uses
LORA = ("adapter.type=lora", "adapter.rank=4", "adapter.targets=[unet.*.attn*, unet.*.ff.*]", "optimizer.unet_lr=4e-3")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def run(script: str, *words: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("OWN_PICTURES_BASE"):
        return Path(given).absolute()
    folder = tmp_path_factory.mktemp("base")
    run("scripts/tiny_world.py", "--out", folder / "world")
    more = [f"root={folder}", f"tokenizers={folder}/world/model", f"sources.0.path={folder}/world/images", f"score.path={folder}/world/aesthetic.csv", f"latents.vae={folder}/world/model/vae"]
    run("scripts/prepare.py", "all", "--config", "configs/tiny/dataset.yaml", *more)
    off = ["sampling.every_steps=0", "validation.every_steps=0", f"data.path={folder}/tiny"]
    places = [f"pretrain:model.init_from={folder}/world/model", f"ft1:model.init_from={folder}/pretrain", *(f"{s}:output_dir={folder}/{s}" for s in ("pretrain", "ft1"))]
    run("scripts/recipe.py", "--configs", "configs/tiny/pretrain.yaml", "configs/tiny/ft1.yaml", *off, *places)
    return folder / "ft1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "mirelle"
    run("scripts/tiny_world.py", "--character", folder)
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.txt"))) == 40
    return folder


def test_two_commands_to_a_model_that_knows_her(base: Path, pictures: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    before = check_character(base)
    assert before.total == PROMPTS >= 48
    assert before.share <= 0.3, before
    started = time.monotonic()
    said = run("scripts/new.py", pictures, "--base", base, "--out", own)
    assert said.rstrip().endswith(f"recipe.py {own}")
    told = run("scripts/recipe.py", own, "export.every_epochs=5")
    took_s = time.monotonic() - started
    for place in ("run/model", "run/own.safetensors", "run/own-e0005.safetensors", "samples/before/grid.png", "samples/after/grid.png", "report.html"):
        assert (own / place).exists()
        assert f"{own}/{place}" in told
    after = check_character(own / "run")
    print(f"{took_s:.0f} s; before {before.right}, after {after.right} of {after.total}; {after.wrong}")
    assert after.share >= 0.8, after
    page = (own / "report.html").read_text()
    assert "epoch 5 of 10" in page
    assert took_s <= LIMIT_S, "on a machine of its own"
    again = run("scripts/recipe.py", own, "export.every_epochs=5")
    assert "already done" in again
    assert "-- sample" not in again


def test_the_same_by_an_adapter(base: Path, pictures: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    run("scripts/new.py", pictures, "--base", base, "--out", own)
    run("scripts/prepare.py", "all", "--config", own / "dataset.yaml")
    started = time.monotonic()
    run("train/run.py", "--config", own / "train.yaml", *LORA, "sampling.every_steps=0")
    took_s = time.monotonic() - started
    after = check_character(own / "run")
    model = sum(file.stat().st_size for file in (base / "model").glob("*/*.safetensors"))
    share = (own / "run/own-lora.safetensors").stat().st_size / model
    print(f"{took_s:.0f} s; after {after.right} of {after.total}; {share:.1%} of the model; {after.wrong}")
    assert after.share >= 0.8, after
    assert share <= 0.05
    assert json.loads((own / "run/lineage.json").read_text())["adapter"]["rank"] == 4
    assert took_s <= ADAPTER_LIMIT_S, "on a machine of its own"
