"""The first minute on a card: a tiny stage trains in fp16, checkpoints, is killed inside an update, and resumes.

All that no CPU test can see lies on its way: pinned copies and the prefetch onto the card, side streams of a background
save, the trial of every shape, loss scaling, the events of an update's parts, and reading a checkpoint back to the card.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from train.data.shards import write_shard
from train.observe.metrics import read_metrics
from train.testing.loop import NOTHING_SHOWN
from train.testing.references import write_index
from train.tools.tiny.model import write_model

ROOT = Path(__file__).resolve().parents[3]
IMAGES, UPDATES, EVERY, KILLED_AT = 96, 12, 4, 10  # saves after 4 and 8, so 8 and 9 are made twice
CLOSE = 1e-2  # relative, of the losses of an update made twice: kernels of a card may add in another order


def run(limit_s: float) -> dict[str, Any]:
    """{"seconds", "error", "resumed_from", "repeated", "exits"}; `error` is None where all of it went well."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="anix-first-minute-") as temporary:
        folder = Path(temporary)
        command = _prepare(folder)
        found: dict[str, Any] = {"exits": []}
        try:
            for fault in (f"optimizer@{KILLED_AT}:kill", ""):
                left = limit_s - (time.monotonic() - started)
                done = _train(command, fault, left)
                found["exits"].append(done.returncode)
                found["error"] = _wrong(done, killed=bool(fault))
                if found["error"]:
                    break
            else:
                found |= compare(folder / "run")
        except subprocess.TimeoutExpired:
            found["error"] = f"not through after {limit_s:.0f} s"
    return found | {"seconds": time.monotonic() - started}


def _prepare(folder: Path) -> list[str]:
    """Model, latents and index of the tiny stage, and the command that trains on them."""
    torch.manual_seed(0)
    write_model(folder / "model")
    write_index(folder / "data", IMAGES, [("latents.safetensors", IMAGES)], (128, 128))
    write_shard(folder / "data" / "latents.safetensors", torch.randn(IMAGES, 4, 16, 16).half(), {})
    return [
        sys.executable, str(ROOT / "train" / "run.py"), "--config", str(ROOT / "configs" / "tiny" / "pretrain.yaml"),
        f"output_dir={folder / 'run'}", f"model.init_from={folder / 'model'}", f"data.path={folder / 'data'}",
        "data.select=bench", "data.workers=2", "precision=fp16", "batch.micro=8", "batch.effective=16", "epochs=10",
        f"max_updates={UPDATES}", f"checkpoint.every_steps={EVERY}", "checkpoint.background=true",
        *NOTHING_SHOWN, "tracking.times_every=1",
    ]  # fmt: skip


def _train(command: list[str], fault: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ANIX_FAULT"}
    if fault:
        environment["ANIX_FAULT"] = fault
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(limit_s, 1.0), env=environment, check=False
    )


def _wrong(done: subprocess.CompletedProcess[str], *, killed: bool) -> str | None:
    if done.returncode == (-9 if killed else 0):
        return None
    last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")
    return f"{'before it was killed' if killed else 'resumed'}: exit {done.returncode}: {last[:300]}"


def compare(run: Path) -> dict[str, Any]:
    """Whether the resumed run made every update, and those that the killed one had made already alike."""
    kept = read_metrics(run / "metrics.jsonl")
    cut = run / "metrics.discarded.jsonl"
    twice = {record["step"]: record["loss"] for record in (read_metrics(cut) if cut.is_file() else [])}
    losses = {record["step"]: record["loss"] for record in kept}
    told: dict[str, Any] = {"resumed_from": min(twice, default=0) - 1, "repeated": len(twice), "error": None}
    unlike = [step for step, loss in twice.items() if abs(losses.get(step, 0.0) - loss) > CLOSE * abs(loss)]
    if [record["step"] for record in kept] != list(range(1, UPDATES + 1)):
        told["error"] = f"metrics.jsonl holds the updates {[record['step'] for record in kept]}"
    elif not twice:
        told["error"] = "no update was made twice: the run did not resume from a checkpoint before the kill"
    elif unlike:
        told["error"] = f"updates {unlike} have other losses after the resume"
    return told | {"seconds_of_parts": kept[-1].get("seconds") if kept else None}
