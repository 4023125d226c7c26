"""The text that ends a caption's fixed part is a matter of the set: what it is changes nothing that is trained."""

from __future__ import annotations

import json
from pathlib import Path

import anysource
import pytest
import synthetic
from onesource import MODEL, prepared_from
from stages import clean_process, result

from train import run
from train.base.errors import ExitCode
from train.data.index import Index


def trained(folder: Path, separator: str, *overrides: str) -> Path:
    """Three updates on the same pictures, with that separator in their captions and in dataset.yaml."""
    source = {"name": "s", **anysource.write("sidecar", folder / "source", "nothing")}
    for file in (folder / "source").glob("*.txt"):
        file.write_text(file.read_text().replace("|||", separator))
    data = prepared_from(folder, source, separator=separator)
    yaml = synthetic.stage_yaml(folder / "stage.yaml", data=data, model=MODEL, output=folder / "run")
    small = ("epochs=6", "max_updates=3", "batch.micro=1", "batch.effective=2", "data.max_tokens=75",
             "model.train_text_encoders=false", "optimizer.text_encoder_lr=null", "batch.determinism=strict")  # fmt: skip
    with clean_process({}):
        assert run.main(["--config", str(yaml), *small, *overrides]) == ExitCode.DONE
    return folder


@pytest.mark.slow
def test_two_separators_give_equal_traces_and_equal_weights(tmp_path: Path) -> None:
    pipes = trained(tmp_path / "pipes", "|||", "data.separator='|||'")
    hashes = trained(tmp_path / "hashes", "###", "data.separator='###'")
    assert result(hashes / "run") == result(pipes / "run")
    one, other = (Index.open(folder / "data" / "set", "pretrain") for folder in (pipes, hashes))
    assert one.fingerprint == other.fingerprint
    captions = [one.caption(i) for i in range(len(one))]
    assert captions == [other.caption(i) for i in range(len(other))]
    assert all("1girl" in fixed and "smile" in flex for fixed, flex in captions)
    states = [json.loads(next((f / "run/checkpoints").glob("step-*3/state.json")).read_text()) for f in (pipes, hashes)]
    assert states[0]["facts"]["plan"] == states[1]["facts"]["plan"]
