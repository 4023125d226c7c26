"""A start that is refused says everything that is wrong in one message, within seconds, before torch is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages import SMALL, Stage

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.engine import refusals
from train.storage.rundir import open_run_dir

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import sys
from train import run
from train.base.console import Halt
try:
    run.main(sys.argv[1:])
except Halt as halt:
    print(halt.message)
    print("code", int(halt.code), "heavy", [m for m in ("torch", "transformers", "diffusers") if m in sys.modules])
"""


@pytest.fixture
def stage(dataset: Path, base_model: Path, tmp_path: Path) -> Stage:
    return Stage(tmp_path, dataset, base_model)


def test_everything_at_once_before_torch(stage: Stage, tmp_path: Path) -> None:
    """Processes, launch config, model, VAE pin, dataset, prompts, acceptance, lock: eight faults, one message."""
    holder = open_run_dir(stage.output, "pretrain")
    wrong = ["model.init_from=/nowhere/model", "data.path=/nowhere/set", "sampling.every_steps=3",
             "sampling.prompts=/nowhere/prompts.yaml", "resume.accept=[dta]", "batch.accumulation=3"]  # fmt: skip
    environment = {**os.environ, "WORLD_SIZE": "3", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *stage.arguments(*wrong)], cwd=ROOT,
                          env=environment, capture_output=True, text=True)  # fmt: skip
    holder.close()
    assert time.monotonic() - started < 10
    assert "code 2 heavy []" in done.stdout, done.stdout + done.stderr
    for word in ("is in use by pid", "3 processes cannot share", "FSDP", "model.init_from /nowhere/model",
                 "data.path /nowhere/set", "/nowhere/prompts.yaml", "resume.accept: 'dta'"):  # fmt: skip
        assert done.stdout.count(word) == 1, (word, done.stdout)
    assert "7 things are wrong with this start" in done.stdout


def test_a_sound_model_does_not_load_torch_where_something_else_is_wrong(stage: Stage) -> None:
    for wrong in ("data.path=/nowhere/set", "output_dir=/dev/null/run"):
        done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *stage.arguments(wrong)], cwd=ROOT,
                              capture_output=True, text=True)  # fmt: skip
        assert "heavy []" in done.stdout, done.stdout + done.stderr


def test_what_only_the_files_can_tell_is_told_together_too(stage: Stage, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    shutil.copytree(dataset, copy)
    shard = next((copy / "latents").iterdir())
    shard.unlink()
    changes = (f"data.path={copy}", "export.license=null", "schedule.min_lr=1", f"model.init_sha256={'a' * 64}",
               f"model.tokenizers={tmp_path}")  # fmt: skip
    assert stage.run(*changes) == ExitCode.MISMATCH
    assert f"model.init_sha256 says {'a' * 64}" in stage.message
    assert f"lacks 1 latent shards: latents/{shard.name}" in stage.message
    assert stage.run(*changes[1:3], changes[4]) == ExitCode.USAGE
    assert "schedule.min_lr" in stage.message
    assert stage.run(changes[1], changes[4]) == ExitCode.USAGE
    for word in ("declares no licence", "model.tokenizers"):
        assert word in stage.message
    left = json.loads((stage.output / "exit.json").read_text())
    assert (left["code"], left["reason"]) == (2, stage.message)


def test_a_disk_too_small_is_known_from_the_headers(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.storage.space.free_bytes", lambda path: 1000)
    config = load_stage([stage.yaml], [*SMALL, "model.tokenizers=/nowhere"])
    run = open_run_dir(config.output_dir, "pretrain")
    messages = [halt.message for halt in refusals.refusals(config.start, run, 1)]
    run.close()
    assert any("checkpoints need" in message and "the disk has 1 kB" in message for message in messages)
    assert any("model.tokenizers" in message for message in messages)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
def test_the_estimate_never_exceeds_what_a_checkpoint_takes(
    stage: Stage, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("ema.decay=0.9",) if optimizer == "adamw" else ()
    seen = []
    monkeypatch.setattr("train.storage.space.lacking_space", lambda run, one, settings: seen.append(one))
    assert stage.run(f"optimizer.name={optimizer}", *more, "max_updates=1") == ExitCode.DONE, stage.message
    held = sum(f.stat().st_size for f in (stage.output / "checkpoints/step-00000001").glob("*.safetensors"))
    least = seen[0] * 1.05
    assert (0.85 if optimizer == "adamw" else 0.5) * held < least <= held  # small tensors keep more


@pytest.mark.parametrize("kind", ["model in output", "data in output", "output in model", "output in data", "same", "linked"])
def test_what_is_read_and_what_is_written_lie_apart(
    kind: str, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    data, model = tmp_path / "set", tmp_path / "model"
    shutil.copytree(dataset, data)
    shutil.copytree(base_model, model)
    output = {"model in output": tmp_path, "data in output": tmp_path, "output in model": model / "run",
              "output in data": data / "run", "same": data, "linked": tmp_path / "link" / "run"}[kind]  # fmt: skip
    (tmp_path / "link").symlink_to(model)
    stage = Stage(tmp_path / "yaml", data, model)
    stage.output = output
    assert stage.run(f"output_dir={output}") == ExitCode.MISMATCH
    word = {"model in output": f"model.init_from {model} lies in output_dir", "same": f"data.path {data} lies in output_dir",
            "data in output": f"data.path {data} lies in output_dir", "output in data": f"lies in data.path {data}"}  # fmt: skip
    assert word.get(kind, f"lies in model.init_from {model}") in stage.message
    assert {p.name for p in data.iterdir()} == {p.name for p in dataset.iterdir()}
    assert {p.name for p in model.iterdir()} == {p.name for p in base_model.iterdir()}
    assert stage.run(f"output_dir={tmp_path / 'apart'}", "max_updates=1") == ExitCode.DONE, stage.message


def test_a_start_ends_with_the_code_that_waiting_does_not_mend() -> None:
    locked, wrong = Halt(ExitCode.LOCKED, "in use"), Halt(ExitCode.MISMATCH, "no dataset")
    assert refusals.together([locked]) is locked
    assert refusals.together([locked, wrong]).code == ExitCode.MISMATCH
    assert refusals.together([wrong, Halt(ExitCode.MISMATCH, "no dataset")]) is wrong
    assert refusals.together([locked, wrong]).message.splitlines()[1:] == ["  1. in use", "  2. no dataset"]
