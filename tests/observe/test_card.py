"""The model card: what it says of each objective, a licence that is read back, and text that cannot break it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from train.model import layouts, sdxl
from train.observe import card

RECORD: dict[str, Any] = {
    "stage": "ft2", "license": "Fair AI Public License 1.0-SD", "updates": 4275, "images": 205200, "weights_sha256": "a" * 64,
    "parent": {"stage": "ft1", "sha256": "b" * 64, "title": "ft1"},
    "ancestors": [{"stage": "ft1", "updates": 2850, "images": 136800, "weights_sha256": "c" * 64, "parent": {"title": "base"}}],
}  # fmt: skip
METADATA = {"modelspec.title": "Mine", "modelspec.resolution": "1024x1024", "modelspec.tags": "anime, mine"}


def made(prediction: str = "epsilon", zero: bool = False, vae: dict[str, Any] | None = None, **changes: Any) -> str:
    vae = {**sdxl.STANDARD["vae"], **(vae or {})}
    return card.text({**RECORD, **changes}, METADATA, prediction=prediction, zero_terminal_snr=zero, vae=vae)


@pytest.mark.parametrize(
    ("prediction", "zero", "said", "unsaid"),
    [
        ("epsilon", False, ["the noise (epsilon)"], ["InvokeAI", "from_single_file", "trailing", "VAE"]),
        ("v", False, ["InvokeAI", "from_single_file", "`v_pred`,"], ["ztsnr", "trailing"]),
        ("v", True, ["InvokeAI", "from_single_file", "`v_pred` and `ztsnr`", "trailing", "zero terminal SNR"], []),
    ],
)
def test_what_a_program_cannot_know(prediction: str, zero: bool, said: list[str], unsaid: list[str]) -> None:
    text = made(prediction, zero)
    assert [words for words in said if words not in text] == []
    assert [words for words in unsaid if words in text] == []


def test_another_vae_and_conventions_of_the_original_trainer_are_told() -> None:
    text = made(vae={"scaling_factor": 0.1406, "shift_factor": -0.4743})
    assert "scaling_factor 0.1406 and shift_factor -0.4743" in text
    both = made(conditioning={"pooled_projection": "sd_scripts", "timestep_embedding": "sd_scripts"})
    assert "untransposed" in both
    assert "shifted by one" in both
    neither = made(conditioning={"pooled_projection": "correct", "timestep_embedding": "correct"})
    assert "untransposed" not in neither
    assert "shifted by one" not in neither


def test_the_head_is_yaml_and_its_licence_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(made())
    head = yaml.safe_load(made().split("---")[1])
    assert head["license_name"] == RECORD["license"]
    assert head["tags"] == ["stable-diffusion-xl", "text-to-image", "anime", "mine"]
    assert layouts._license_in_readme(tmp_path / "README.md") == RECORD["license"]


def test_lineage_is_a_table_that_no_name_can_break() -> None:
    text = made(parent={"title": "a|b\n\n# c <script>`x`"}, ancestors=[*RECORD["ancestors"], "no record"])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1] == "| ft1 | base | 2850 | 136800 | cccccccccccc |"
    assert rows[2] == "| ft2 | a/b  # c  script  x | 4275 | 205200 | aaaaaaaaaaaa |"
    assert len(rows) == 3
    assert "<script>" not in text
    assert made(ancestors=None).count("\n| ft") == 1
