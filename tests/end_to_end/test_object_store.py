"""A stage over a set in an S3 store, a fiftieth of whose reads fail: the trace and the bits of one over the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import synthetic
from objectstore import BUCKET, served
from onesource import MODEL

from train.base.files import read_json
from train.data.published import publish
from train.storage.objects import Store
from train.testing.chaos import ranks

SET = Path(__file__).parents[1] / "fixtures/c93b03a/set"


def run(folder: Path, name: str, data: str, *overrides: str) -> dict[str, Any]:
    yaml = synthetic.stage_yaml(folder / f"{name}.yaml", data=Path("unused"), model=MODEL, output=folder / name)
    arguments = ["--config", str(yaml), f"data.path={data}", "epochs=4", "max_updates=6", "batch.micro=2", "batch.effective=2",
                 "data.max_tokens=75", "data.workers=2", "model.train_text_encoders=false", "optimizer.text_encoder_lr=null",
                 "tracking.trace=true", "batch.determinism=strict", "validation.share=0.2", "validation.every_steps=3",
                 *overrides]  # fmt: skip
    launch = ranks.Ranks(arguments, folder / f"logs-{name}", env={"HF_HUB_OFFLINE": "1"})
    (code,) = launch.wait(240)
    assert code == 0, launch.text()
    lineage = read_json(folder / name / "lineage.json")
    assert lineage is not None
    return {"weights": lineage["weights_sha256"], "trace": (folder / name / "trace.txt").read_text(), "told": launch.text()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_set_in_a_store_trains_as_the_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as server:
        publish(SET, Store(f"s3://{BUCKET}/set"))
        ranks.warm_up()
        here = run(tmp_path, "here", str(SET))
        server.share = 0.02
        server.failed.clear()
        there = run(tmp_path, "there", f"s3://{BUCKET}/set", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gb=0.000001")
        assert (there["weights"], there["trace"]) == (here["weights"], here["trace"])
        assert "0 of" in there["told"] and "images of the others are read one by one" in there["told"]
        assert not list(tmp_path.glob("cache/*/latents/*"))
        whole = run(tmp_path, "whole", f"s3://{BUCKET}/set", f"data.cache_dir={tmp_path / 'cache'}")
        assert (whole["weights"], whole["trace"]) == (here["weights"], here["trace"])
