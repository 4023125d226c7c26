"""scripts/recipe.py under signals: the trainer is told, waited for, and its own exit code returned."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from train.testing.chaos import kills, world

ROOT = Path(__file__).resolve().parents[2]

# The parts of a stage that matter here, without torch: a launcher that dies of any signal, hiding every code, and a
# trainer that outlives it, needs a second to save and then says 85.
LAUNCHER = "import subprocess, sys; sys.exit(1 if subprocess.Popen([sys.executable, *sys.argv[1:]]).wait() else 0)"
TRAINER = """
import os, signal, sys, time
from pathlib import Path
sys.path[0] = os.environ["ANIX_ROOT"]
from train.base import signals
from train.base.console import Halt, run_cli
from train.storage.rundir import open_run_dir

def main():
    run = open_run_dir(os.environ["ANIX_OUTPUT"], "pretrain")
    stop = signals.install(orphan=True)
    (run.path / "ready").touch()
    while not stop.asked:
        time.sleep(0.02)
    time.sleep(1)
    run.write_exit(85, stop.status, "saved", 3)
    run.close()
    return 85

run_cli(main)
"""
RECIPE = """
import sys
sys.path[0] = sys.argv[1]
from pathlib import Path
from train.base.console import run_cli
from train.tools import stages
stages.RUN_PY = Path(sys.argv[2])
stages.launch_command = lambda launch, processes: [sys.executable, "-c", sys.argv[3]]
run_cli(lambda: stages.run_stages([Path(path) for path in sys.argv[4:]], [], None, 1))
"""


def start(folder: Path, *, stages: int = 1) -> tuple[subprocess.Popen[bytes], Path]:
    trainer, output = folder / "trainer.py", folder / "run"
    trainer.write_text(TRAINER)
    configs = []
    for number in range(stages):
        config = folder / f"stage{number}.yaml"
        where = output if number == 0 else folder / f"run{number}"
        config.write_text(world.STAGE + f"output_dir: {where}\nmodel: {{init_from: m, train_text_encoders: true}}\ndata: {{path: d}}\n")
        configs.append(str(config))
    command = [sys.executable, "-c", RECIPE, str(ROOT), str(trainer), LAUNCHER, *configs]
    environment = {**os.environ, "ANIX_ROOT": str(ROOT), "ANIX_OUTPUT": str(output)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE), output


def until(what: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def free(output: Path) -> bool:
    with open(output / ".lock", "rb+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_reaches_a_trainer_whose_launcher_dies_of_it(number: int, tmp_path: Path) -> None:
    recipe, output = start(tmp_path, stages=2)
    until(lambda: (output / "ready").is_file() or recipe.poll() is not None)
    recipe.send_signal(number)
    told = recipe.communicate(timeout=60)[1].decode()
    assert recipe.returncode == 85, told
    assert free(output), "no trainer is left behind"
    status = "requeue" if number == signal.SIGUSR1 else "stopped"
    assert json.loads((output / "exit.json").read_text())["status"] == status
    assert not (tmp_path / "run1").exists(), "the next stage was not started"


def test_a_recipe_that_is_killed_leaves_no_trainer(tmp_path: Path) -> None:
    recipe, output = start(tmp_path)
    until(lambda: (output / "ready").is_file() or recipe.poll() is not None)
    recipe.kill()
    recipe.wait(20)
    until(lambda: free(output), 10)
    assert recipe.stderr is not None
    recipe.stderr.close()
    assert json.loads((output / "exit.json").read_text())["code"] == 85


@pytest.mark.parametrize(("damage", "code"), [("locked", 6), ("another stage", 7), ("a file", 8)])
def test_a_refused_run_directory_has_its_own_code(damage: str, code: int, tmp_path: Path) -> None:
    output = tmp_path / "run"
    if damage == "a file":
        output.write_text("x")
    else:
        output.mkdir()
        (output / "exit.json").write_text('{"code": 4}')
    if damage != "a file":
        stage = {"locked": "pretrain", "another stage": "ft9"}[damage]
        (output / "run.json").write_text(json.dumps({"stage": stage, "run_id": "0123456789abcdef"}))
    if damage == "another stage":
        (output / "metrics.jsonl").write_text('{"step": 1}\n')
    with open(tmp_path / "other", "w") if damage != "locked" else open(output / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        recipe, _ = start(tmp_path)
        told = recipe.communicate(timeout=60)[1].decode()
    assert recipe.returncode == code, told
    if damage != "a file":
        assert (output / "exit.json").read_text() == '{"code": 4}', "it belongs to somebody else"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_real_stage_saves_and_says_85(number: int, tmp_path: Path) -> None:
    yaml, output = world.write_chaos_world(tmp_path), tmp_path / "run"
    more = (f"output_dir={output}", "max_updates=2000", "epochs=999", "schedule.decay=1.0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    recipe = subprocess.Popen(
        [sys.executable, "scripts/recipe.py", "--configs", str(yaml), *more], cwd=ROOT, env=environment
    )
    until(lambda: len(kills.metrics(output)) >= 3 or recipe.poll() is not None, 240)
    recipe.send_signal(number)
    assert recipe.wait(120) == 85
    record = json.loads((output / "exit.json").read_text())
    assert record["status"] == ("requeue" if number == signal.SIGUSR1 else "stopped")
    assert max(kills.steps_of(output)) == len(kills.metrics(output))
    assert free(output)
