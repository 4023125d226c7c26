"""A tiny stage to break: real launches of `train/run.py`, forked from one warm process, on one or more gloo ranks."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.testing.chaos import kills, ranks
from train.testing.chaos import world as chaos_world

UPDATES = 10
CANARY = "canary-3c1f9e-secret"


class Lab:
    """Owner of the world, the reference run and every launch made from them."""

    def __init__(self, folder: Path) -> None:
        ranks.warm_up()
        self.folder = folder
        self.yaml = chaos_world.write_chaos_world(folder)
        self.reference = folder / "reference"
        assert self.start("reference").wait() == [0]

    def start(self, name: str, *overrides: str, world: int = 1, fault: str = "", timeout_s: float = 30, **more: Any) -> ranks.Ranks:
        env = {"ANIX_FAULT": fault, "MY_HUB_TOKEN": CANARY, "HF_HUB_OFFLINE": "1"}
        arguments = ["--config", str(self.yaml), f"output_dir={self.folder / name}", f"max_updates={UPDATES}"]
        return ranks.Ranks(
            [*arguments, *overrides], self.folder / f"logs-{name}", world=world, env=env, timeout_s=timeout_s, **more
        )

    def run(self, name: str, *overrides: str, world: int = 1, fault: str = "", timeout_s: float = 30) -> list[int]:
        self.last = self.start(name, *overrides, world=world, fault=fault, timeout_s=timeout_s)
        return self.last.wait()

    def in_fork(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function` returned in a forked child: it may leave process-wide state behind."""
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                answer.write_text(json.dumps(function(*args, **kwargs)))
            except BaseException:
                answer.write_text(json.dumps(traceback.format_exc()))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        return json.loads(answer.read_text())

    def exit(self, name: str, rank: int = 0) -> dict:
        path = self.folder / name / ("exit.json" if rank == 0 else f"exit.{rank}.json")
        return json.loads(path.read_text())

    def must_equal_reference(self, name: str, world: int = 1, *overrides: str) -> None:
        """Restart without fault and compare everything."""
        assert self.run(name, *overrides, world=world) == [0] * world, self.last.text()
        assert kills.compare_runs(self.reference, self.folder / name) == []

    def wait_for_update(self, launch: ranks.Ranks, name: str, update: int) -> None:
        end = time.monotonic() + 240
        while len(kills.metrics(self.folder / name)) < update:
            assert not launch.poll(), launch.text()
            assert time.monotonic() < end
            time.sleep(0.01)
