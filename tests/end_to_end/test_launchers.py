"""Where the launcher is the subject: a signal to torchrun and to accelerate ends in a saved run and an exit.json."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.testing.chaos import kills, world

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[2]
UPDATES = 2000  # never reached


@pytest.fixture(scope="module")
def yaml(tmp_path_factory):
    return world.write_chaos_world(tmp_path_factory.mktemp("launchers"))


def launch(yaml: Path, output: Path, *launcher: str, **env: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", *launcher, "train/run.py", "--config", str(yaml), f"output_dir={output}",
        f"max_updates={UPDATES}", "epochs=999", "schedule.decay=1.0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
    output.mkdir()
    with open(output / "launch.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env={**environment, **env}, stdout=log, stderr=log, process_group=0)


def wait_until(
    what, process: subprocess.Popen, output: Path, timeout_s: float = 240, number: int | None = None
) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > end or (number is None and process.poll() is not None):
            process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError((output / "launch.log").read_text()[-3000:])
        time.sleep(0.05)


def stopped(process: subprocess.Popen, output: Path, number: int) -> dict:
    """Send the signal to the launcher once training is under way; what exit.json says."""
    wait_until(lambda: len(kills.metrics(output)) >= 3, process, output)
    process.send_signal(number)
    wait_until((output / "exit.json").is_file, process, output, 60, number)
    process.wait(60)
    return json.loads((output / "exit.json").read_text())


def nothing_lost(output: Path) -> bool:
    return max(kills.steps_of(output)) == len(kills.metrics(output))


def test_f3_accelerate_with_one_process_dies_and_the_orphan_saves(yaml, tmp_path):
    output = tmp_path / "run"
    process = launch(
        yaml, output, "accelerate.commands.launch", "--num_processes", "1", "--cpu", "--mixed_precision", "no"
    )
    record = stopped(process, output, signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM  # the launcher says nothing of what its worker did
    assert (record["code"], record["status"]) == (85, "stopped")
    assert nothing_lost(output)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, "requeue"), pytest.param(signal.SIGTERM, "stopped", marks=pytest.mark.long)])
def test_f3_f5_torchrun_forwards_what_it_is_told_to(yaml, tmp_path, number, status):
    output = tmp_path / "run"
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    process = launch(
        yaml, output, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", PET_SIGNALS_TO_HANDLE=handled
    )
    record = stopped(process, output, number)
    assert process.returncode not in (0, 85)  # hidden
    assert (record["code"], record["status"]) == (85, status)
    assert nothing_lost(output)
    assert json.loads((output / "exit.1.json").read_text())["update"] == record["update"]
