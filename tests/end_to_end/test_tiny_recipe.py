"""The whole recipe on the drawn world: it learns, and what it learnt follows the tags. Minutes, hence slow."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from train.config.prompts import load_prompts
from train.tools.tiny.check import SETTINGS, STAGES, check_model, first_and_last_loss

ROOT = Path(__file__).resolve().parents[2]
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' schedulers
pytestmark = [pytest.mark.slow, pytest.mark.long, NUMPY_2]


def run(folder: Path, script: str, *arguments: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.setdefault("OMP_NUM_THREADS", "2")
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/tiny` after drawing, preparing and the three stages, as the quickstart does it."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "configs").symlink_to(ROOT / "configs")
    run(folder, "tiny_world.py")
    run(folder, "prepare.py", "all", "--config", "configs/tiny/dataset.yaml")
    run(folder, "recipe.py", "--configs", *(f"configs/tiny/{stage}.yaml" for stage in STAGES))
    return folder / "runs" / "tiny"


def test_pretraining_loss_falls_at_least_fourfold(runs: Path) -> None:
    _, first, last = first_and_last_loss(runs / "pretrain" / "metrics.jsonl")
    assert first / last >= 4


def test_hair_colour_follows_the_tag_for_combinations_never_drawn(runs: Path, tmp_path: Path) -> None:
    found = check_model(runs / "ft2" / "model", out=tmp_path)
    assert found.total == 48
    # 143 of 144 over three draws of the noise, on two processes; chance is 0.17.
    assert found.share >= 0.9, found.wrong
    assert (tmp_path / "sheet.png").is_file()


CONVERSIONS = {
    "flow": ("loss.prediction=flow", "noise.law=logit_normal", "noise.stratified=true"),
    "v": ("loss.prediction=v", "noise.zero_terminal_snr=true"),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_colours_follow_the_tag_after_a_conversion(kind: str, runs: Path, tmp_path: Path) -> None:
    """48 of 48 with each of the three samplers, when it was measured; its parent, an epsilon model, 47."""
    folder = runs.parents[1]
    changes = (f"stage={kind}", "data.select=pretrain", "model.init_from=runs/tiny/pretrain", f"output_dir=runs/tiny/{kind}",
               "loss.convert=true", "epochs=16", "schedule.cycles=16", *CONVERSIONS[kind])  # fmt: skip
    run(folder, "../train/run.py", "--config", "configs/tiny/pretrain.yaml", *changes)
    for sampler in ("euler_a", "euler", "dpmpp_2m"):
        found = check_model(runs / kind / "model", replace(load_prompts(SETTINGS), sampler=sampler), out=tmp_path)
        print(f"{sampler}: colours follow the tag in {found.right} of {found.total} pictures")
        assert found.right >= 40, (sampler, found.wrong)


def test_stock_diffusers_makes_a_picture_of_the_result(runs: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(str(runs / "ft2" / "model"), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("1girl, solo, red hair", width=96, height=128, num_inference_steps=4).images[0]
    assert image.size == (96, 128)
    assert image.getextrema() != ((0, 0),) * 3


def test_a_second_run_skips_every_stage(runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.suffix == ".safetensors"}
    run(runs.parents[1], "recipe.py", "--configs", *(f"configs/tiny/{stage}.yaml" for stage in STAGES))
    assert {path: path.stat().st_mtime_ns for path in before} == before
