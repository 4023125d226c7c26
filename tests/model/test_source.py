"""Opening a model: few rooms, each entered for what is its own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tinysdxl

from train.config.stage import ModelConfig
from train.model import single_file, source

ROOT = Path(source.__file__).parents[1]


FINISHED = Path(__file__).parents[1] / "fixtures/c93b03a/finished"


@pytest.mark.parametrize("kind", ["folder", "single file", "run"])
def test_from_the_config_to_named_tensors_in_five_files(kind: str, tmp_path: Path) -> None:
    path = FINISHED if kind == "run" else tinysdxl.write(tmp_path / "folder", "least")
    if kind == "single file":
        single_file.to_single_file(path, tmp_path / "model.safetensors")
        path = tmp_path / "model.safetensors"
    entered: list[str] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(ROOT)):
            entered.append(str(Path(file).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        model = source.resolve(ModelConfig(init_from=str(path)))
    finally:
        sys.setprofile(None)
    assert len(model.weights) > 100 and model.sha256
    assert set(entered) - {"model/prediction.py", "model/other_kinds.py", "storage/revision.py"} == {"model/source.py", "model/layouts.py", "model/sdxl.py", "storage/tensor_files.py", "base/files.py"}  # those: what a file says that it predicts, refusals, the licence of its page
    moves = sum(one != other for one, other in zip(entered, entered[1:], strict=False))
    assert moves < len(model.weights), "no room is entered again for each tensor"
