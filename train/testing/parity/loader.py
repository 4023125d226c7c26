"""A checkout of the original trainer (sd-scripts or a fork), its own modules imported as they are.

Runs in our Python and in the trainer's: standard library only, nothing of this project. Nothing of a checkout is copied.
    peer = loader.load("path/to/sd-scripts")
    unet = peer.module("sdxl_original_unet").SdxlUNet2DConditionModel()
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "library/sdxl_original_unet.py"  # what makes a folder a checkout that we can use
FIRST = ("torch", "transformers", "diffusers", "accelerate")  # they ask what is installed, so they come before stand-ins


@dataclass(frozen=True)
class Peer:
    """A checkout on sys.path. `stand_ins` names packages that are not installed and that we answer for."""

    path: Path
    commit: str  # 40 digits, or "unknown" where the folder is no repository
    date: str
    stand_ins: tuple[str, ...]

    def module(self, name: str) -> Any:
        """`library.<name>` of the checkout. Raises ImportError naming what its Python lacks."""
        return importlib.import_module(f"library.{name}")


def why_not(path: Path) -> str | None:
    """What is wrong with a folder that is said to be a checkout; None when it is one."""
    return None if (path / MARK).is_file() else f"{path} holds no {MARK}: it is no checkout of sd-scripts"


def revision(path: Path) -> tuple[str, str]:
    """(commit, date) of the checkout; ("unknown", "") where git does not know."""
    # without these a folder that is no repository would answer with the one around it
    ask = {**os.environ, "GIT_CEILING_DIRECTORIES": str(path.resolve().parent)}
    command = ["git", "-C", str(path), "log", "-1", "--format=%H %cs"]
    with contextlib.suppress(OSError):  # no git here
        commit, _, date = subprocess.run(command, capture_output=True, text=True, check=False, env=ask).stdout.strip().partition(" ")
        return commit or "unknown", date
    return "unknown", ""


def load(path: str | Path) -> Peer:
    """The checkout first on sys.path. Raises ValueError where it is none, ImportError where its Python lacks a framework."""
    folder = Path(path).resolve()
    if why := why_not(folder):
        raise ValueError(why)
    for name in FIRST:
        importlib.import_module(name)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    commit, date = revision(folder)
    return Peer(folder, commit, date, _stand_ins())


def _stand_ins() -> tuple[str, ...]:
    """torchvision where it does not import (no build of it goes with a CPU torch): the three transforms that are used."""
    try:
        importlib.import_module("torchvision.transforms")
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
        for module in (package, transforms):
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            sys.modules[module.__name__] = module
        for one in (Compose, ToTensor, Normalize):
            setattr(transforms, one.__name__, one)
        package.transforms = transforms  # type: ignore[attr-defined]
        return ("torchvision",)
    return ()


class Compose:
    """One transform after the other."""

    def __init__(self, steps: list[Any]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        """The last one's result."""
        for step in self.steps:
            value = step(value)
        return value


class ToTensor:
    """uint8 [H,W,C] to float [C,H,W] in 0..1."""

    def __call__(self, picture_HWC: Any) -> Any:
        """Divided by 255 in fp32."""
        import torch

        return torch.from_numpy(picture_HWC.copy()).permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    """(x - mean) / std for each channel; one value counts for all."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, picture_CHW: Any) -> Any:
        """Same shape."""
        import torch

        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (picture_CHW - mean) / std
