"""The other side of a comparison: a checkout of the original trainer, asked in a process of its own Python.

Both sides exchange a folder: `in.safetensors` and `in.json` are what is asked, `out.safetensors` and `out.json` the answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.testing.parity import loader

VARIABLE = "SDSCRIPTS_DIR"
CHILD = "train.testing.parity.child.main"  # what runs in the other Python; it loads nothing else of ours
ROOT = Path(__file__).resolve().parents[3]
LAST_LINES = 12  # of what the other side said before it failed


@dataclass(frozen=True)
class Checkout:
    """Where the original's code lies, which commit it is, and the Python that runs it."""

    path: Path
    python: Path
    commit: str
    date: str  # of the commit


@dataclass(frozen=True)
class Answer:
    """What the other side computed."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def open_checkout(path: str | None, python: str | None) -> Checkout:
    """The checkout that `path`, else SDSCRIPTS_DIR names. Raises Halt(USAGE) where there is none."""
    named = path or os.environ.get(VARIABLE)
    if not named:
        raise Halt(ExitCode.USAGE, f"--sd-scripts names a checkout of sd-scripts or of a fork (default: ${VARIABLE})")
    folder = Path(named).resolve()
    if why := loader.why_not(folder):
        raise Halt(ExitCode.USAGE, f"--sd-scripts: {why}")
    program = Path(python or sys.executable)
    if not os.access(program, os.X_OK) or program.is_dir():
        raise Halt(ExitCode.USAGE, f"--python {program} is no program: give the Python of an environment with that trainer's requirements")
    return Checkout(folder, program, *loader.revision(folder))


def ask(
    checkout: Checkout,
    task: str,
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """What `task` of the child answers. Raises Halt(MISMATCH) with the other side's last words where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in (tensors or {}).items()}, folder / "in.safetensors")
    (folder / "in.json").write_text(json.dumps(dict(facts or {})))
    done = subprocess.run(
        [str(checkout.python), "-m", CHILD, str(checkout.path), task, str(folder)],
        env={**_clean(os.environ), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-LAST_LINES:])
        raise Halt(ExitCode.MISMATCH, f"{checkout.path} in {checkout.python}: {task} ended with {done.returncode}\n{said}")
    out = folder / "out.safetensors"
    return Answer(load_file(out) if out.is_file() else {}, json.loads((folder / "out.json").read_text()))


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would lead the other Python to our installed packages."""
    return {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
