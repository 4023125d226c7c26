"""The tiny recipe, shortened, looked at as a user would: held-out loss stage by stage, the report, the judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.observe.runs import read_run
from train.observe.validation import paired_change
from train.tools.tiny.check import STAGES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.long]
LOOK = (
    "validation.share=0.2", "validation.every_steps=100", "validation.select=ft2", "sampling.every_steps=150",
    "sampling.prompts=configs/tiny/prompts.yaml",
)  # fmt: skip
EPOCHS = {"pretrain": ("epochs=12", "schedule.cycles=12", "schedule.decay=0.9"), "ft1": ("epochs=6",), "ft2": ()}


def run(folder: Path, script: str, *arguments: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three stages under `runs/tiny`, and the base model's pictures."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "configs").symlink_to(ROOT / "configs")
    run(folder, "scripts/tiny_world.py")
    run(folder, "scripts/prepare.py", "all", "--config", "configs/tiny/dataset.yaml")
    base = ("--model", "data/tiny_world/model", "--prompts", "configs/tiny/prompts.yaml")
    run(folder, "scripts/sample.py", *base, "--out", "runs/tiny/base")
    for stage in STAGES:
        run(folder, "train/run.py", "--config", f"configs/tiny/{stage}.yaml", *LOOK, *EPOCHS[stage])
    return folder / "runs" / "tiny"


def test_held_out_loss_falls_from_stage_to_stage_on_the_curated_images(runs: Path) -> None:
    """All stages measure ft2's held-out images, which none trains on; from the first to the last the interval leaves
    0 out, and every stage's last measurement is of its final weights."""
    found = [read_run(runs / stage) for stage in STAGES]
    losses = [one.validation[-1]["losses"] for one in found]
    assert losses[0].keys() == losses[1].keys() == losses[2].keys()
    assert [one.validation[-1]["step"] for one in found] == [one.metrics[-1]["step"] for one in found]
    assert found[0].validation[0]["loss"] > found[0].validation[-1]["loss"]
    change = paired_change(losses[0], losses[2])
    assert change is not None
    assert change["images"] >= 10
    assert change["loss"] + change["interval"] < 0, change
    assert losses_of(found[2]) < losses_of(found[1]) < losses_of(found[0])
    print("held-out loss:", ", ".join(f"{stage} {losses_of(one):.4f}" for stage, one in zip(STAGES, found, strict=True)))
    for first, last in ((0, 1), (1, 2), (0, 2)):
        change = paired_change(losses[first], losses[last])
        assert change is not None
        told = f"{change['loss']:+.4f} +- {change['interval']:.4f} over {change['images']} images"
        print(f"{STAGES[first]} -> {STAGES[last]}: {told}")


def losses_of(one: object) -> float:
    return float(one.validation[-1]["loss"])  # type: ignore[attr-defined]


def test_report_and_judge(runs: Path) -> None:
    folder, stages = runs.parents[1], [f"runs/tiny/{stage}" for stage in STAGES]
    run(folder, "scripts/quality.py", "base=runs/tiny/base", *stages, "--tagger", "tiny_world", "--out", "q.json")
    record = json.loads((folder / "q.json").read_text())
    hair = {name: stage["statistics"]["tag_recall"]["value"] for name, stage in record["stages"].items()}
    assert hair["base"] < hair["ft2"]
    run(folder, "scripts/report.py", *stages, "--samples", "base=runs/tiny/base", "--quality", "q.json")
    page = (folder / "report.html").read_text()
    for words in ("Stage comparison", "base → ft2", "Lineage", "pretrain → ft2", "Quality of the samples"):
        assert words in page, words
    assert page.count("<figcaption>base</figcaption>") == 9
