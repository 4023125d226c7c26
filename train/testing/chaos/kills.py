"""Random kills against a straight run: the result must be the same to the last bit, and little must be done twice.

Every launch draws its world size, the signal (SIGKILL or SIGTERM to all ranks) and the moment from the seed. A run
that reaches its end is compared with the uninterrupted one, and the next begins, until the kills are used up.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.observe.times import OF_THE_MACHINE
from train.storage import manifest
from train.testing.chaos import ranks
from train.testing.chaos import world as chaos_world

WORLDS = (1, 2)


@dataclass
class Tally:
    """What happened, for the report; `problems` is empty when every promise was kept."""

    kills: int = 0
    terms: int = 0
    launches: int = 0
    finished_runs: int = 0
    most_lost: int = 0  # updates done twice after one SIGKILL
    lost_on_term: int = 0
    worlds: dict[int, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report."""
        return [
            f"{self.kills} SIGKILL, {self.terms} SIGTERM in {self.launches} launches (world size: launches "
            f"{dict(sorted(self.worlds.items()))}), {self.finished_runs} runs brought to their end",
            f"updates lost: at most {self.most_lost} after SIGKILL (interval {chaos_world.EVERY_STEPS}), "
            f"{self.lost_on_term} after SIGTERM",
            *(f"PROBLEM: {problem}" for problem in self.problems),
        ]


def run_chaos(
    kills: int, seed: int, work: Path, say: Callable[[str], None], worlds: Sequence[int] = WORLDS
) -> Tally:
    """Interrupt `kills` times, each launch on one of `worlds` processes; the tally.

    `work` receives the world, the runs and the logs.
    """
    ranks.warm_up()
    yaml = chaos_world.write_chaos_world(work)
    draw, tally = random.Random(seed), Tally()
    reference = work / "reference"
    duration_s = _straight_run(yaml, reference, work)
    say(f"straight run: {chaos_world.UPDATES} updates in {duration_s:.1f} s")
    number = 0
    while tally.kills + tally.terms < kills or number == 0:
        run = work / f"run-{seed}-{number}"
        shutil.rmtree(run, ignore_errors=True)
        _interrupted_run(yaml, run, work, draw, tally, kills, duration_s, worlds)
        tally.problems += compare_runs(reference, run)
        tally.finished_runs += 1
        number += 1
        say(f"run {number}: {tally.kills} SIGKILL, {tally.terms} SIGTERM so far, {len(tally.problems)} problems")
    return tally


def compare_runs(reference: Path, run: Path) -> list[str]:
    """How a finished run differs from the reference in weights, optimizer state, metrics and trace; [] if nowise."""
    problems = []
    for name, read in (("weights and optimizer", final_hashes), ("metrics.jsonl", metrics), ("trace.txt", _trace)):
        if read(reference) != read(run):
            problems.append(f"{run.name}: {name} differ from the straight run's")
    return problems


def final_hashes(run: Path) -> dict[str, str]:
    """sha256 of the tensor files of the newest checkpoint, verified."""
    newest = max(steps_of(run))
    found = manifest.verify(run / "checkpoints" / f"step-{newest:08d}")
    return {name: record.sha256 for name, record in found.files.items() if name.endswith(".safetensors")}


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed; a torn last line is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key not in OF_THE_MACHINE} for record in records]


def steps_of(run: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [step for name in names if (step := manifest.step_of(name)) is not None]


def _trace(run: Path) -> str:
    return (run / "trace.txt").read_text()


def _straight_run(yaml: Path, output: Path, work: Path) -> float:
    shutil.rmtree(output, ignore_errors=True)
    launch = ranks.Ranks(["--config", str(yaml), f"output_dir={output}"], work / "logs-reference")
    if launch.wait(600) != [ExitCode.DONE]:
        raise Halt(ExitCode.UNEXPECTED, f"the straight run failed:\n{launch.text()[-2000:]}")
    return time.monotonic() - launch.started


def _interrupted_run(
    yaml: Path,
    run: Path,
    work: Path,
    draw: random.Random,
    tally: Tally,
    kills: int,
    duration_s: float,
    worlds: Sequence[int],
) -> None:
    """Launch and interrupt until the run is done or nothing is left to interrupt with."""
    while not (run / "DONE").exists():
        world = draw.choice(worlds)
        tally.launches += 1
        tally.worlds[world] = tally.worlds.get(world, 0) + 1
        found = _stamp(run)
        launch = ranks.Ranks(["--config", str(yaml), f"output_dir={run}"], work / "logs", world=world)
        number, delay_s = draw.choice((signal.SIGKILL, signal.SIGTERM)), draw.uniform(0.02, 0.8) * duration_s
        if tally.kills + tally.terms < kills and not _ended_within(launch, delay_s):
            before = _last_step(run)
            launch.send(number)
            codes = launch.wait(120)
            _count(run, number, codes, before, tally, launch, began=_stamp(run) != found)
        else:
            codes = launch.wait(600)
            if set(codes) != {ExitCode.DONE}:
                raise Halt(ExitCode.UNEXPECTED, f"{run.name}: ended with {codes}:\n{launch.text()[-3000:]}")


def _count(
    run: Path, number: int, codes: list[int], before: int, tally: Tally, launch: ranks.Ranks, *, began: bool
) -> None:
    saved, logged = max(steps_of(run), default=0), _last_step(run)
    # A launch that ended before it wrote a line has lost nothing: the lines without a checkpoint are an earlier kill's.
    lost = max(0, logged - saved) if began else 0
    if number == signal.SIGKILL:
        tally.kills += 1
        tally.most_lost = max(tally.most_lost, lost)
        if lost > chaos_world.EVERY_STEPS:
            tally.problems.append(f"{run.name}: SIGKILL after update {logged} lost {lost} updates")
        return
    tally.terms += 1
    tally.lost_on_term = max(tally.lost_on_term, lost)
    # Before the handlers are in place a process may die of the signal: nothing is lost then either.
    allowed = {int(ExitCode.STOPPED), int(ExitCode.DONE), -signal.SIGTERM}
    if lost or not set(codes) <= allowed:
        tally.problems.append(
            f"{run.name}: SIGTERM at update {before}: codes {codes}, {lost} updates lost\n{launch.text()}"
        )


def _stamp(run: Path) -> tuple[int, int] | None:
    """Changes whenever a launch cuts or continues the record of its updates."""
    path = run / "metrics.jsonl"
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


def _last_step(run: Path) -> int:
    records = metrics(run)
    return int(records[-1]["step"]) if records else 0


def _ended_within(launch: ranks.Ranks, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if launch.poll():
            return True
        time.sleep(0.005)
    return launch.poll()
