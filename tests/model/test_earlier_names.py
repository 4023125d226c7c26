"""Scripts written for the flat house open model files by the names that it had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def test_a_vae_is_opened_by_the_earlier_names(tmp_path: Path) -> None:
    from train.exits import Halt

    from train import sdxl, singlefile, weightfile

    links = [link for link in sdxl.links(sdxl.STANDARD) if link.single.startswith("first_stage_model.")]
    file = tmp_path / "vae.safetensors"
    save_file({link.single.removeprefix("first_stage_model."): torch.zeros(link.shape, dtype=torch.float16) for link in links}, file)
    weights = singlefile.vae_weights(weightfile.open_file(file))
    assert {name.partition(".")[0] for name in weights} == {"vae"}
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(Halt):
        singlefile.vae_weights(weightfile.open_file(file))


def test_other_names_are_not_there() -> None:
    import train

    with pytest.raises(AttributeError, match="no attribute 'hub'"):
        train.hub  # noqa: B018
