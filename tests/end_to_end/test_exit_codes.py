"""R19: every exit code can be reached, is the process's code, and stands in exit.json with its reason and update.

Code: test. 0, 1, 2, 3, 4, 5, 7, 8, 9, 85: here. 6: here (the other process's exit.json is left alone).
Behind a launcher, which hides it: test_launchers.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab

from train.base.errors import ExitCode
from train.testing.chaos import kills

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def no_checkpoint(lab: Lab, name: str) -> list[int]:
    assert lab.run(name, fault="forward@5:exit=1") == [1]
    (lab.folder / name / "checkpoints/step-00000004/state.json").write_text("{}")
    return lab.run(name)


def storage_full(lab: Lab, name: str) -> list[int]:
    return lab.run(name, "checkpoint.every_steps=1", fault="save.write@*:enospc")


# code: (how, what the reason says, updates done)
CODES: dict[ExitCode, tuple[Callable[[Lab, str], list[int]], str, int | None]] = {
    ExitCode.DONE: (lambda lab, name: lab.run(name), "", 10),
    ExitCode.UNEXPECTED: (lambda lab, name: lab.run(name, fault="backward@3:raise=KeyError"), "KeyError", 3),
    ExitCode.USAGE: (lambda lab, name: lab.run(name, "model.init_from=/nowhere"), "model.init_from", 0),
    ExitCode.NO_CHECKPOINT: (no_checkpoint, "step-00000004: state.json", 0),
    ExitCode.NON_FINITE: (lambda lab, name: lab.run(name, fault="loss@2:nan"), "not finite", 2),
    ExitCode.OUT_OF_MEMORY: (lambda lab, name: lab.run(name, fault="forward@2:oom"), "out of memory", 2),
    ExitCode.MISMATCH: (lambda lab, name: lab.run(name, "data.path=/nowhere"), "prepare", 0),
    ExitCode.CANNOT_WRITE: (storage_full, "checkpoints in a row", None),
    ExitCode.PEER_LOST: (lambda lab, name: lab.run(name, world=2, fault="backward@3:1:kill")[:1], "rank 1 is gone", 3),
    ExitCode.STOPPED: (lambda lab, name: lab.run(name, fault="control@3:term"), "saved", 4),
}


@pytest.mark.parametrize("code", CODES, ids=lambda code: f"{int(code)}")
def test_code(lab: Lab, code: ExitCode) -> None:
    make, words, updates = CODES[code]
    name = f"code-{int(code)}"
    assert make(lab, name) == [code], lab.last.text()
    record = lab.exit(name)
    assert record["code"] == code
    assert words in record["reason"]
    assert record["status"] == {0: "done", 85: "stopped"}.get(int(code), "failed")
    assert updates is None or record["update"] == updates
    newest = max(kills.steps_of(lab.folder / name), default=None)
    assert record["checkpoint"] == (f"checkpoints/step-{newest:08d}" if newest else None)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_code_6_leaves_the_owner_alone(lab: Lab, world: int) -> None:
    name = f"code-6-{world}"
    first = lab.start(name, fault="forward@3:0:sleep=8")
    lab.wait_for_update(first, name, 3)
    codes = lab.run(name, "launch.collective_timeout_s=3", world=world, timeout_s=3)
    assert codes[0] == ExitCode.LOCKED
    assert set(codes) <= {ExitCode.LOCKED, ExitCode.PEER_LOST}, lab.last.text()
    assert f"pid {first.pids[0]} on host" in lab.last.text(0)
    assert first.poll() or not (lab.folder / name / "exit.json").exists()
    assert first.wait() == [0]
    assert kills.compare_runs(lab.reference, lab.folder / name) == []


def test_all_codes_are_covered() -> None:
    assert {*CODES, ExitCode.LOCKED} == set(ExitCode)


def test_done_again_is_0_and_says_so(lab: Lab) -> None:
    copy = Path(shutil.copytree(lab.reference, lab.folder / "copy"))
    before = json.loads((copy / "exit.json").read_text())
    assert lab.run("copy", world=2) == [0, 0]
    assert "already done" in lab.last.text()
    assert json.loads((copy / "exit.json").read_text()) == before
