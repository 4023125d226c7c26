"""Runs the stages of a recipe one after the other, each under `accelerate launch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from train.config import load_stage
from train.exits import ExitCode, Halt
from train.rundir import read_done

RUN_PY = Path(__file__).resolve().parents[1] / "run.py"


def run_stages(configs: Sequence[Path], overrides: Sequence[str], launch: Path | None, processes: int) -> int:
    """Run every stage in order and return the first code that is not 0.

    All configs are loaded before the first stage starts, so that a typo in the last costs nothing.
    """
    stages = [load_stage([config], overrides) for config in configs]
    directories = [stage.output_dir for stage in stages]
    if len(set(directories)) != len(directories):
        raise Halt(ExitCode.USAGE, f"two stages share an output_dir: {directories}")
    for config, stage in zip(configs, stages, strict=True):
        if read_done(stage.output_dir) is not None:
            print(f"stage {stage.stage}: already done ({stage.output_dir})", file=sys.stderr)
            continue
        code = launch_stage(config, overrides, launch, processes, Path(stage.output_dir))
        if code != 0:
            print(f"stage {stage.stage} ended with code {code}; the stages after it were not started", file=sys.stderr)
            return code
    return 0


def launch_stage(
    config: Path, overrides: Sequence[str], launch: Path | None, processes: int, output_dir: Path
) -> int:
    """Start one stage and return the trainer's own exit code, which launchers replace by 1."""
    command = launch_command(launch, processes) + [str(RUN_PY), "--config", str(config), *overrides]
    # Ours from an earlier start must not be mistaken for the answer of this one.
    (output_dir / "exit.json").unlink(missing_ok=True)
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", **os.environ}  # time for the last save
    child = subprocess.Popen(command, env=environment)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        code = child.wait()  # the terminal sent Ctrl-C to the trainer too: let it save
    try:
        told = json.loads((output_dir / "exit.json").read_text())
        return int(told["code"])
    except (OSError, ValueError, KeyError):
        return code if 0 <= code < 128 else int(ExitCode.UNEXPECTED)


def launch_command(launch: Path | None, processes: int) -> list[str]:
    """The launcher's command line up to the script."""
    base = [sys.executable, "-m", "accelerate.commands.launch"]
    if launch is not None:
        return [*base, "--config_file", str(launch)]
    if processes == 1:
        one = ["--num_processes", "1", "--num_machines", "1"]
        return [*base, *one, "--mixed_precision", "no", "--dynamo_backend", "no"]
    if not _has_gpu():
        # accelerate's CPU mode starts one process whatever it is told; torchrun starts as many as asked.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    return [*base, *several, "--mixed_precision", "no", "--dynamo_backend", "no"]


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
