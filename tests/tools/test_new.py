"""new.py: what it sees in a folder, what it decides, and that it leaves edited files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from train.config.dataset import load_settings
from train.config.prompts import load_prompts
from train.config.stage import load_stage
from train.tools.new.make import Wish, make

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data/tiny_world/model"


def drawn(folder: Path, count: int, caption: str = "mirelle, 1girl, solo, {n} hair, smile", size: tuple[int, int] = (96, 64)) -> Path:
    """Pictures of different colours, each with a text beside it."""
    folder.mkdir(parents=True)
    for n in range(count):
        Image.effect_noise(size, 40 + n).convert("RGB").save(folder / f"{n:04d}.png")
        if caption:
            (folder / f"{n:04d}.txt").write_text(caption.format(n=n))
    return folder


@pytest.mark.skipif(not TINY.is_dir(), reason="needs the tiny world")
def test_a_folder_becomes_a_recipe_and_edited_files_stay(tmp_path: Path) -> None:
    pictures, out = drawn(tmp_path / "mirelle", 24), tmp_path / "out"
    wish = Wish(pictures, str(TINY), out)
    said = make(wish, "python scripts/")
    assert said[-1] == f"  python scripts/recipe.py {out}"
    dataset, stage, prompts = load_settings([out / "dataset.yaml"]), load_stage([out / "train.yaml"]), load_prompts(out / "prompts.yaml")
    assert (dataset.root, dataset.name, dataset.sources[0].path) == (str(out), "set", str(pictures))
    assert (stage.output_dir, stage.data.path, stage.data.trigger) == (str(out / "run"), str(out / "set"), "mirelle")
    assert stage.sampling.prompts == str(out / "prompts.yaml")
    assert any("mirelle" in prompt.text for prompt in prompts.prompts)

    edited = (out / "train.yaml").read_text().replace("epochs: ", "epochs: 1")
    (out / "train.yaml").write_text(edited)
    (pictures / "0000.txt").unlink()
    said = make(wish, "python scripts/")
    assert (out / "train.yaml").read_text() == edited
    assert "written anew" in next(line for line in said if line.startswith(f"{out}/dataset.yaml"))
    assert str(out / "cache/new/train.yaml") in next(line for line in said if line.startswith(f"{out}/train.yaml"))
