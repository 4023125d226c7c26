"""A checkout of the original trainer is found, named and imported; what its Python lacks is answered for or named."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from train.base.errors import ExitCode, Halt
from train.testing.parity import checkout, loader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sd/library").mkdir(parents=True)
    (tmp_path / "sd/library/__init__.py").write_text("")
    (tmp_path / "sd/library/sdxl_original_unet.py").write_text("from torchvision import transforms\nSHIFT = 1\n")
    return tmp_path / "sd"


@pytest.mark.slow
def test_its_modules_are_imported_from_the_folder(folder: Path) -> None:
    """In a process of its own: a checkout stays on sys.path."""
    code = (
        "import sys; from train.testing.parity import loader; peer = loader.load(sys.argv[1]); "
        "unet = peer.module('sdxl_original_unet'); print(unet.SHIFT, unet.__file__, *peer.stand_ins)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    shift, file, *stand_ins = done.stdout.split()
    assert (shift, Path(file).parent) == ("1", folder / "library")
    assert stand_ins == ([] if importlib.util.find_spec("torchvision") else ["torchvision"])


def test_a_commit_is_the_checkouts_own_and_not_of_what_lies_around_it(folder: Path) -> None:
    git = ["git", "-C", str(folder.parent), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "around"]):
        subprocess.run([*git, *words], check=True)
    assert loader.revision(folder) == ("unknown", "")
    commit, date = loader.revision(folder.parent)
    assert (len(commit), len(date)) == (40, 10)


@pytest.mark.parametrize(("path", "python", "words"), [
    (None, None, "SDSCRIPTS_DIR"), ("there", None, "no library/sdxl_original_unet.py"), ("sd", "nothing", "is no program"),
])  # fmt: skip
def test_what_is_no_checkout_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str | None, python: str | None, words: str
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.delenv(checkout.VARIABLE, raising=False)
    with pytest.raises(Halt, match=words) as halted:
        checkout.open_checkout(path, python)
    assert halted.value.code == ExitCode.USAGE


@pytest.mark.slow
def test_a_failure_over_there_is_told_in_its_own_words(folder: Path, tmp_path: Path) -> None:
    there = checkout.open_checkout(str(folder), None)
    with pytest.raises(Halt, match=r"No module named 'library\.train_util'") as halted:
        checkout.ask(there, "data", tmp_path / "asked")
    assert halted.value.code == ExitCode.MISMATCH


def test_the_stand_in_transforms_are_what_they_stand_for() -> None:
    steps = [loader.ToTensor(), loader.Normalize([0.5], [0.5])]
    picture = np.array([[[0, 51, 255], [102, 204, 153]]], np.uint8)
    wanted = torch.tensor([[[-1.0, -0.2]], [[-0.6, 0.6]], [[1.0, 0.2]]])
    torch.testing.assert_close(loader.Compose(steps)(picture), wanted)
