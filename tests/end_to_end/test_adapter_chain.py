"""recipe.py over a full stage and two of an adapter, then what a full finetune keeps as an adapter. Minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic
import tinysdxl

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.long


def run(script: str, *words: str | Path) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / script), *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_stages_of_an_adapter_in_a_recipe(tmp_path: Path) -> None:
    """The second goes on with the first's adapter; the same command again does nothing; a full stage may follow."""
    model = tinysdxl.write(tmp_path / "base", "two levels")
    data = synthetic.make_dataset(tmp_path / "set", (12, 8, 6), buckets=((64, 64), (64, 96), (96, 64)))
    adapter = "adapter: {type: lora, rank: 4}\n"
    places = [tmp_path / "runs" / name for name in ("full", "one", "two", "last")]
    yamls = []
    for place, start, stage in zip(places, (model, *places), ("ft1", "ft1", "ft2", "ft2"), strict=False):
        yamls.append(synthetic.stage_yaml(tmp_path / f"{place.name}.yaml", data=data, model=start, output=place, stage=stage))
        if place.name in ("one", "two"):
            yamls[-1].write_text(yamls[-1].read_text() + adapter)
    words = ("data.max_tokens=75", "max_updates=3", "batch.micro=2", "batch.effective=8")
    run("recipe.py", "--configs", *yamls, *words)
    assert (places[2] / "ft2-lora.safetensors").is_file() and not (places[2] / "model").exists()
    assert (places[3] / "model/model_index.json").is_file()
    lineage = json.loads((places[3] / "lineage.json").read_text())
    assert [bool(one.get("adapter")) for one in lineage["ancestors"]] == [False, True, True]
    assert "already done" in run("recipe.py", "--configs", *yamls, *words)
