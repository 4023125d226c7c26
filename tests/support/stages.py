"""Runs a stage of the trainer in this process, small: 26 images, 8 per update in 4 tiles of 2, 9 updates."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import synthetic
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from train import run
from train.base.errors import Halt
from train.base.signals import StopFlag
from train.config.stage import load_stage
from train.engine import handoff
from train.engine import setup as assemble
from train.engine.session import Session, closing, open_session
from train.storage.rundir import open_run_dir

SMALL = ("batch.micro=2", "batch.effective=8", "data.max_tokens=75")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stage:
    """One stage config over `data` and `model` with its own run directory below `folder`."""

    def __init__(self, folder: Path, data: Path, model: Path, stage: str = "pretrain") -> None:
        self.output = folder / "runs" / stage
        folder.mkdir(parents=True, exist_ok=True)
        self.yaml = synthetic.stage_yaml(
            folder / f"{stage}.yaml", data=data, model=model, output=self.output, stage=stage
        )
        self.message = ""

    def arguments(self, *overrides: str) -> list[str]:
        """What stands behind `train/run.py`."""
        return ["--config", str(self.yaml), *SMALL, *overrides]

    def run(self, *overrides: str, **environment: str) -> int:
        """The exit code; `message` keeps what was said."""
        self.message = ""
        with clean_process(environment):
            try:
                return int(run.main(self.arguments(*overrides)))
            except Halt as halt:
                self.message = halt.message
                return int(halt.code)


@contextmanager
def clean_process(environment: Mapping[str, str]) -> Iterator[None]:
    """Environment, signal handlers, accelerate's singletons and determinism as they were, however the run ends."""
    before, handlers = dict(os.environ), {number: signal.getsignal(number) for number in SIGNALS}
    os.environ |= environment
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.use_deterministic_algorithms(False)


def result(output: Path) -> dict[str, Any]:
    """What must be equal between two runs: metrics, trace, and the final checkpoint's bytes."""
    newest = max((output / "checkpoints").glob("step-????????"))
    files = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
    return {
        "metrics": synthetic.metrics(output),
        "trace": (output / "trace.txt").read_text().splitlines(),
        "checkpoint": newest.name,
        **{name: sha256(newest / name) for name in files if (newest / name).exists()},
    }


def weights(output: Path, group: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint."""
    return load_file(max((output / "checkpoints").glob("step-????????")) / f"{group}.safetensors")


def losses(output: Path) -> list[float]:
    """Loss of every update."""
    return [line["loss"] for line in synthetic.metrics(output)]


def state(output: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint."""
    return dict(json.loads((max((output / "checkpoints").glob("step-????????")) / "state.json").read_text()))


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` and its hash: equal trees mean that nothing was written."""
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def opened(stage: Stage, *overrides: str) -> Iterator[Session]:
    """The stage's session before its first update, closed afterwards."""
    config = load_stage([stage.yaml], [*SMALL, *overrides])
    with clean_process({}):
        directory = open_run_dir(config.output_dir, config.stage)
        try:
            machine = assemble.open_machine(config.batch, config.launch)
            source, components = handoff.open_source(config.origin)
            data = assemble.open_data(config.images, source)
            networks = assemble.open_model(config.running, config.objective, machine, data.plan, source, components)
            session = open_session(config.owners, directory, StopFlag(), machine, data, networks)
            with closing(session):
                yield session
        finally:
            directory.close()
