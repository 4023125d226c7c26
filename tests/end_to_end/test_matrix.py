"""Every adapter, with as little as people have: prepared, indexed and trained on, whatever column is empty throughout.

In CI in one process up to the index and one batch, and one launched row per adapter: two updates, a stop, the rest, a
picture. `long` launches every row.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import anysource
import numpy as np
import pytest
import synthetic
from omegaconf import OmegaConf
from onesource import MODEL, prepared_from

from train.config.stage import DataConfig, NoiseConfig
from train.data.dataset import TileDataset
from train.data.index import Index
from train.data.shards import ShardReader
from train.diffusion.objective import Batch
from train.model.text import load_tag_tokenizer
from train.model.vae_file import LatentScale
from train.recipe.order import Plan
from train.testing.chaos import ranks

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
ROWS = [(adapter, lacks) for adapter in anysource.ADAPTERS for lacks in anysource.LACKS]
CAPTIONED = ("sidecar", "sd_scripts", "imagefolder", "simpletuner", "huggingface")


def prepared(folder: Path, adapter: str, lacks: str, **overrides: Any) -> Path:
    """`prepare all` over that source; the set's folder."""
    return prepared_from(folder, {"name": "s", **anysource.write(adapter, folder / "source", lacks)}, **overrides)


def first_batches(data: Path) -> list[Batch]:
    """Every tile of the first updates, as training would read them."""
    index = Index.open(data, "pretrain")
    plan = Plan(index.uids, index.bucket_w, index.bucket_h, seed=3, tile_images=1, tiles_per_update=1, epochs=1)
    config = DataConfig(path=str(data), max_tokens=75, workers=0)
    tiles = TileDataset(index, plan, ShardReader(data), load_tag_tokenizer(MODEL), seed=3, data=config,
                        noise=NoiseConfig(), scale=LatentScale(0.13), total_updates=plan.total_updates)  # fmt: skip
    updates = ((step, plan.update(step)) for step in range(plan.total_updates))
    return [tiles.make(update, number, step) for step, update in updates for number in range(len(update))]


def section(adapter: str) -> str:
    return PAGE.split(f"## `{adapter}`\n")[1].split("\n## ")[0]


def source_on_the_page(adapter: str) -> Any:
    """The source as docs/data.md has a user write it."""
    (yaml,) = re.findall(r"```yaml\n(.*?)```", section(adapter), re.DOTALL)
    return OmegaConf.to_container(OmegaConf.create(yaml))["sources"][0]  # type: ignore[index,call-overload]


def caption_on_the_page(adapter: str) -> tuple[str, str]:
    """(fixed part, flexible part) that docs/data.md promises of the second picture."""
    (line,) = re.findall(r"^> (.*)$", section(adapter), re.MULTILINE)
    fixed, _, flex = line.partition("|||")
    return fixed.strip(), flex.strip()


@pytest.mark.parametrize(("adapter", "lacks"), ROWS, ids=[f"{adapter}-no-{lacks}" for adapter, lacks in ROWS])
def test_is_prepared_and_read(adapter: str, lacks: str, tmp_path: Path) -> None:
    data = prepared(tmp_path, adapter, lacks)
    index = Index.open(data, "pretrain")
    posts = anysource.posts(lacks)
    assert len(index) == len(posts)
    if lacks == "nothing":
        source = {"name": "s", **anysource.write(adapter, tmp_path / "pictures", lacks)}
        assert source_on_the_page(adapter) == json.loads(json.dumps(source).replace(f"{tmp_path}/", "")) | {"name": "mine"}
        assert caption_on_the_page(adapter) == tuple(map(", ".join, index.caption(1)))
    assert [index.key(i).startswith("s:") for i in range(len(index))] == [True] * len(posts)
    captions = [index.caption(i) for i in range(len(index))]
    assert all("smile" in flex for _, flex in captions), captions
    if lacks == "tags" or (lacks == "separator" and adapter in (*CAPTIONED, "webdataset")):
        assert [fixed for fixed, _ in captions] == [[]] * len(posts)
    else:
        assert any("hero a" in (*fixed, *flex) for fixed, flex in captions)
    labels = [index.labels(i) for i in range(len(index))]
    if lacks == "rating":
        assert [label["rating_tags"] or [] for label in labels] == [[]] * len(posts)
    if lacks in ("score", "date"):
        assert [label[{"score": "quality", "date": "year"}[lacks]] for label in labels] == [None] * len(posts)
    batches = first_batches(data)
    assert len(batches) == len(posts)
    assert all(bool(np.isfinite(batch.latents_BCHW.numpy()).all()) for batch in batches)


class Launched:
    """Rows as a user runs them, each process forked from this one, which has paid for the imports."""

    def __init__(self, folder: Path) -> None:
        ranks.warm_up()
        self.folder = folder

    def run(self, name: str, arguments: list[str], fault: str = "") -> tuple[int, str]:
        launch = ranks.Ranks(arguments, self.folder / f"logs-{name}", env={"ANIX_FAULT": fault, "HF_HUB_OFFLINE": "1"})
        (code,) = launch.wait(120)
        return code, launch.text()

    def row(self, adapter: str, lacks: str) -> Path:
        """Two updates, a stop, the third, one picture; the run directory."""
        folder = self.folder / f"{adapter}-{lacks}"
        folder.mkdir()
        data = prepared(folder, adapter, lacks)
        yaml = synthetic.stage_yaml(folder / "stage.yaml", data=data, model=MODEL, output=folder / "run")
        arguments = ["--config", str(yaml), "epochs=6", "max_updates=3", "batch.micro=2", "batch.effective=2",
                     "data.max_tokens=75", "model.train_text_encoders=false", "optimizer.text_encoder_lr=null"]  # fmt: skip
        for fault, wanted in (("control@1:term", 85), ("", 0)):
            code, text = self.run(folder.name, arguments, fault)
            assert code == wanted, text
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
        draw_one(folder / "run", folder / "samples")
        return folder / "run"


def draw_one(model: Path, out: Path) -> None:
    from train.config.prompts import load_prompts
    from train.observe.inference import adjusted, draw, open_model

    prompts = load_prompts(Path(__file__).parents[2] / "configs" / "prompts.yaml")
    settings = adjusted(prompts, texts=["smile"], size="64x64", steps=2)
    (image,) = draw(open_model(str(model), device="cpu"), settings)
    assert image.size == (64, 64)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return Launched(tmp_path_factory.mktemp("launched"))


# One row per adapter, each kind of lack at least once, those that a column is empty by first.
CHOSEN = dict(zip(anysource.ADAPTERS, ("rating", "score", "separator", "separator", "tags", "tags", "date", "pictures",
                                       "rating", "score", "separator", "rating"), strict=True))  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", anysource.ADAPTERS)
def test_two_updates_a_stop_the_rest_and_a_picture(adapter: str, launched: Launched) -> None:
    launched.row(adapter, CHOSEN[adapter])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("adapter", "lacks"), [row for row in ROWS if CHOSEN[row[0]] != row[1]])
def test_the_whole_matrix_launched(adapter: str, lacks: str, launched: Launched) -> None:
    shutil.rmtree(launched.row(adapter, lacks).parent)
