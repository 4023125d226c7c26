"""scripts/sample.py from the command line to PNGs, and what it refuses."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.prompts import NEGATIVE, QUALITY_PREFIX, Prompt, PromptsFile, checked
from train.diffusion.sampling import RECIPE
from train.model.sdxl import vae_factor
from train.observe import inference
from train.observe.inference import adjusted, draw, open_model

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = checked(PromptsFile(prompts=[Prompt(text="1girl", seed=3), Prompt(text="1boy", width=64, height=32)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from train.tools.tiny.model import write_model

    made = tmp_path_factory.mktemp("tiny") / "model"
    write_model(made)
    return made


def test_adjusted_changes_what_is_given_and_nothing_else() -> None:
    assert adjusted(SETTINGS, steps=None, negative=None) == SETTINGS
    changed = adjusted(SETTINGS, texts=["a", "b", "c"], size="64x96", seed=9, steps=4, negative="")
    assert [(p.text, p.width, p.height, p.seed, p.index) for p in changed.prompts] == [
        ("a", 64, 96, 9, 0), ("b", 64, 96, 9, 1), ("c", 64, 96, 9, 2)
    ]  # fmt: skip
    assert (changed.steps, changed.negative, changed.quality_prefix) == (4, "", QUALITY_PREFIX)
    assert adjusted(SETTINGS, texts=["a"]).prompts[0].seed == 0
    assert (adjusted(SETTINGS, texts=["a"]).prompts[0].width, SETTINGS.negative) == (832, NEGATIVE)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"size": "64"}, "--size 64"),
        ({"size": "axb"}, "--size"),
        ({"size": "63x64"}, r"prompts\[0\].width is 63"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": -1.0}, "guidance"),
        ({"seed": -5}, "seed is -5"),
        ({"texts": ["a", "a\udcff b"]}, r"prompts\[1\].text holds what cannot be written as UTF-8"),
        ({"negative": "\ud800"}, "negative holds"),
        ({"quality_prefix": "\udfff"}, "quality_prefix holds"),
    ],
)
def test_adjusted_refuses(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(Halt, match=names) as caught:
        adjusted(SETTINGS, **changes)
    assert caught.value.code == ExitCode.USAGE


def test_folder_draws(folder: Path) -> None:
    model = open_model(folder, device="cpu")
    assert model.trained_as == RECIPE
    assert len(model.sha256) == 64
    (image,) = draw(model, adjusted(SETTINGS, texts=["1girl, smile"], size="64x32", steps=2))
    assert image.size == (64, 32)


def test_little_memory_draws_in_tiles_and_says_what_that_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inference, "TILE_PX", 32)
    wish = adjusted(SETTINGS, texts=["1girl, smile"], size="64x64", steps=2)
    (whole,) = draw(open_model(folder, device="cpu"), wish)
    with caplog.at_level(logging.INFO):
        model = open_model(folder, device="cpu", small=True)
    assert "in tiles" in caplog.text and "differ" in caplog.text
    seen: list[tuple[int, ...]] = []
    model.components.vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    (tiled,) = draw(model, wish)
    factor = vae_factor(model.components.vae.config)
    assert len(seen) > 1 and max(max(shape) for shape in seen) <= 32 // factor  # never the whole at once
    assert tiled.size == whole.size
    assert np.abs(np.asarray(tiled, int) - np.asarray(whole, int)).mean() < 40  # of 255: the same picture, blended


def test_bad_devices(folder: Path) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(Halt, match=f"--device {device}") as caught:
            open_model(folder, device=device)
        assert caught.value.code == ExitCode.USAGE


@pytest.mark.slow
def test_command_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/sample.py"), "--model", str(folder), "--out", str(tmp_path / "o")]
    made = subprocess.run(
        [*command, "--prompt", "1girl", "1boy", "--size", "64x64", "--steps", "2", "--seed", "4"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert [Path(line).name for line in made.stdout.split()] == ["00.png", "01.png", "grid.png"]
    with Image.open(tmp_path / "o" / "01.png") as image:
        record = image.info["parameters"]
    assert record.startswith(f"{QUALITY_PREFIX}, 1boy\nNegative prompt: {NEGATIVE}\nSteps: 2, Sampler: Euler a, CFG")
    assert "Model hash: " in record
    (tmp_path / "file").write_text("")
    early = [*command[:2], "--model", str(tmp_path / "no-model"), "--out", str(tmp_path / "file")]
    stopped = subprocess.run(early, capture_output=True, text=True)
    assert stopped.returncode == ExitCode.CANNOT_WRITE, "before the model is looked at"
    assert f"--out {tmp_path / 'file'}" in stopped.stderr
    byte = subprocess.run([*map(os.fsencode, command), b"--prompt", b"a\xff b"], capture_output=True, text=True)
    assert byte.returncode == ExitCode.USAGE
    assert "prompts[0].text holds what cannot be written as UTF-8" in byte.stderr
    refused = subprocess.run([*command, "--steps", "0"], capture_output=True, text=True)
    assert refused.returncode == ExitCode.USAGE
    assert "steps is 0" in refused.stderr
    assert "Traceback" not in refused.stderr
