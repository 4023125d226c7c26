"""A run of all steps asks for what the late ones need before the first one works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, LatentsConfig, ScoreConfig, SelectConfig, SourceConfig, check_paths


def test_every_missing_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    here, gone = str(tmp_path / "here"), str(tmp_path / "gone")
    settings = DatasetConfig(
        name="d", sources=[SourceConfig("s", "gelbooru", here, dictionary=gone)], tokenizers=here,
        score=ScoreConfig("hf_image_classification", model=gone, path=gone), select={"ft1": SelectConfig(allow=gone)},
    )  # fmt: skip
    with pytest.raises(Halt) as stopped:
        check_paths(settings)
    assert stopped.value.code == ExitCode.USAGE
    named = [problem.partition(": ")[0] for problem in stopped.value.message.split("; ")]
    assert named == ["score.model", "select.ft1.allow", "sources s.dictionary", "latents.vae is not set"]
    check_paths(DatasetConfig(name="d", sources=[SourceConfig("s", "sidecar", here)], latents=LatentsConfig(vae=here)))


def test_all_finds_a_filter_that_cannot_be_read_before_the_first_step(tmp_path: Path) -> None:
    """A typing error that only `select` met would be told after hours of probing."""
    root = Path(__file__).resolve().parents[2]
    here = str(tmp_path)
    command = [sys.executable, str(root / "scripts/prepare.py"), "all", "--config", str(root / "configs/dataset.yaml"),
               f"root={here}/out", f"sources.0.path={here}", f"latents.vae={here}", "select.ft1.where=[quality]"]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, (tmp_path / "out").exists()) == (2, False)
    assert "select.ft1.where: 'quality'" in done.stderr
