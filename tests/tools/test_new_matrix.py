"""new.py over folders, bases and cards: every decision with its reason is a golden text, and every result a recipe that loads and fits.

`REGOLD=1 pytest tests/tools/test_new_matrix.py` writes the texts anew; read the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from newfolders import MATRIX, Row

from train.base.errors import ExitCode, Halt
from train.config.dataset import load_settings
from train.config.prompts import load_prompts
from train.config.stage import load_stage
from train.tools.estimate import estimate, page
from train.tools.new import told
from train.tools.new.facts import Facts
from train.tools.new.make import Recipe, Wish, decide, facts_of, texts_of
from train.tools.new.write import write_all

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/new"
TINY = ROOT / "data/tiny_world/model"


Made = tuple[str, Row, Facts, Recipe, Path]
LARGE = ("two_thousand",)  # whose drawing takes longer than all others


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.long if name in LARGE else ()) for name in MATRIX])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    row, name, folder = MATRIX[request.param], request.param, tmp_path_factory.mktemp(request.param)
    prior = row.prior(folder / "class") if row.prior else None
    wish = Wish(row.make(folder), row.base.path, folder / "out", prior=prior, **dict(row.wish))  # type: ignore[arg-type]
    facts = facts_of(wish, row.base, row.machine)
    return name, row, facts, decide(facts), folder


def test_decisions_and_reasons(made: Made) -> None:
    name, row, facts, recipe, folder = made
    texts = texts_of(facts, recipe, "python scripts/")
    told_all = ["\n".join([*told.seen(facts), *told.decided(facts, recipe.course)]), *(texts[file] for file in recipe.files)]
    found = "\n----\n".join(told_all).replace(str(folder), "FOLDER").rstrip() + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("REGOLD"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()

    out = folder / "out"
    write_all(out, texts)
    load_settings([out / "dataset.yaml"])
    assert load_prompts(out / "prompts.yaml").prompts
    stage = load_stage([out / "train.yaml"])
    request = estimate.Request(images=recipe.course.visits, gpu=row.machine.gpu or "A100", memory_gib=row.machine.free_gib, disk_gb=row.machine.disk_gb)
    if not recipe.course.adapter and row.base.standard:  # an adapter's plan loads torch: the test below
        assert page.problems(estimate.plan_stage(stage.start, request)) == []
    for lines in recipe.files.values():
        assert len({line.key for line in lines}) == len(lines), "no line says again what another says"


@pytest.mark.long
def test_adapters_fit_their_cards(made: Made) -> None:
    """What was taken to fit by one figure fits by the planner's count of this adapter."""
    _, row, facts, recipe, folder = made
    if not recipe.course.adapter:
        pytest.skip("no adapter")
    write_all(folder / "out", texts_of(facts, recipe, "anix "))
    stage = load_stage([folder / "out/train.yaml"])
    plan = estimate.plan_stage(stage.start, estimate.Request(images=recipe.course.visits, gpu=row.machine.gpu, memory_gib=row.machine.free_gib, disk_gb=200))
    assert page.problems(plan) == []


def test_a_card_that_is_too_small_is_refused(tmp_path: Path) -> None:
    row = MATRIX["five_caption"]
    from newfolders import card

    facts = facts_of(Wish(row.make(tmp_path), row.base.path, tmp_path / "out"), row.base, card("GTX-1650", 3.6, bf16=False))
    with pytest.raises(Halt, match=r"GTX-1650, 3.6 GiB free: the smallest way .* wants 6.8 GiB") as stopped:
        decide(facts)
    assert stopped.value.code == ExitCode.MISMATCH


@pytest.mark.long
@pytest.mark.skipif(not TINY.is_dir(), reason="needs the tiny world")
@pytest.mark.parametrize("name", [name for name in MATRIX if name != "two_thousand"])
def test_every_folder_trains_three_updates(name: str, tmp_path: Path) -> None:
    """The command itself with the tiny base, all steps of prepare, and a run of three updates."""
    row = MATRIX[name]
    place, prior = row.make(tmp_path), row.prior(tmp_path / "class") if row.prior else None
    for file in tmp_path.rglob("*.png"):  # as large as the tiny base wants them
        from PIL import Image

        with Image.open(file) as image:
            image.resize((image.width // 8, image.height // 8)).save(file)
    out = tmp_path / "out"
    words = [str(place), "--base", str(TINY), "--out", str(out), *(["--prior", str(prior)] if prior else [])]
    words += [word for key, value in row.wish for word in (f"--{key}", value)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = ["train/run.py", "--config", f"{out}/train.yaml", "max_updates=3", "sampling.every_steps=0"]
    for command in (["scripts/new.py", *words], ["scripts/prepare.py", "all", "--config", f"{out}/dataset.yaml"], ["scripts/plan.py", "--config", f"{out}/train.yaml"], run):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert len((out / "run/metrics.jsonl").read_text().splitlines()) >= 3
    assert list((out / "run").glob("*.safetensors"))
