"""R4: a signal at any moment of any phase loses no completed update, and the same command goes on."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import preparedset
import pytest
from lab import UPDATES, Lab

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.testing.chaos import kills

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Every phase wide enough to be hit: loading, updates, previews, export.
WIDER = "handoff@*:sleep=0.3;forward@*:sleep=0.02;sample@*:sleep=0.3;export@*:sleep=0.4"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def previews(lab: Lab) -> tuple[str, str]:
    prompts = lab.folder / "prompts.yaml"
    prompts.write_text("steps: 2\nprompts:\n  - {text: 1girl, width: 64, height: 64, seed: 3}\n")
    return "sampling.every_steps=3", f"sampling.prompts={prompts}"


def stop_once(lab: Lab, name: str, overrides: tuple[str, ...], number: int, delay_s: float, world: int) -> str:
    """Signal all ranks after `delay_s`; where it struck, from exit.json."""
    launch = lab.start(name, *overrides, world=world, fault=WIDER)
    folder = lab.folder / name
    end = time.monotonic() + delay_s
    while time.monotonic() < end and not launch.poll():
        time.sleep(0.005)
    launch.send(number)
    codes = launch.wait()
    if -number in codes and set(codes) <= {-number, ExitCode.STOPPED}:
        return "before the handlers"  # of some: the others stop as well
    assert set(codes) in ({ExitCode.STOPPED}, {ExitCode.DONE}), (codes, launch.text())
    record = lab.exit(name)
    assert record["code"] == codes[0]
    updates = {json.loads((folder / f"exit.{rank}.json").read_text())["update"] for rank in range(1, world)}
    assert updates <= {record["update"]}, "all processes stop at the same update"
    assert len(kills.metrics(folder)) == max(kills.steps_of(folder), default=0) == record["update"]
    if codes[0] == ExitCode.DONE:
        return "done"
    assert record["status"] == ("requeue" if number == signal.SIGUSR1 else "stopped")
    assert not (folder / "DONE").exists()
    for sign in ("before the first update", "during the export", "which is saved", "saved: the same"):
        if sign in record["reason"]:
            return sign
    raise AssertionError(record["reason"])


@pytest.mark.long
def test_twenty_stops_at_random_moments_of_loading_training_previews_export(lab: Lab, previews: tuple[str, str]) -> None:
    draw = random.Random(7)
    started = time.monotonic()
    assert lab.run("measure", *previews, fault=WIDER) == [0]
    length_s = time.monotonic() - started
    struck: Counter[str] = Counter()
    number = runs = 0
    while number < 20:
        name = f"stops-{runs}"
        while number < 20 and not (lab.folder / name / "DONE").exists():
            # The later starts of a run have less to do: aim at the whole of what can be left.
            delay_s = draw.uniform(0, length_s if number % 2 else 0.4 * length_s)
            struck[stop_once(lab, name, previews, draw.choice(SIGNALS), delay_s, draw.choice((1, 2)))] += 1
            number += 1
        lab.must_equal_reference(name)
        runs += 1
    print(dict(struck), runs, "runs")
    assert struck["saved: the same"] + struck["which is saved"] >= 4
    assert len(struck) >= 3, struck


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_during_the_export_leaves_the_export_to_the_next_start(lab: Lab, number: int) -> None:
    name = f"export-{number}"
    launch = lab.start(name, world=2, fault="export@*:0:sleep=1.5")
    lab.wait_for_update(launch, name, UPDATES)
    time.sleep(0.7)
    launch.send(number)
    assert launch.wait() == [85, 85], launch.text()
    assert "during the export" in lab.exit(name)["reason"]
    assert lab.exit(name)["update"] == lab.exit(name, 1)["update"] == UPDATES
    assert not list((lab.folder / name).glob("*.tmp"))
    lab.must_equal_reference(name)
    assert len(kills.metrics(lab.folder / name)) == UPDATES
    assert not (lab.folder / name / "metrics.discarded.jsonl").exists()  # no update was made twice


def test_a_stop_while_loading_costs_nothing_and_saves_nothing(lab: Lab) -> None:
    launch = lab.start("loading", world=2, fault="handoff@*:sleep=1")
    time.sleep(0.6)
    launch.send(signal.SIGTERM, 1)  # one process alone: both leave
    assert launch.wait() == [85, 85], launch.text()
    assert "before the first update" in lab.exit("loading")["reason"]
    assert kills.steps_of(lab.folder / "loading") == []
    assert kills.metrics(lab.folder / "loading") == []
    lab.must_equal_reference("loading")


@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_dies_of_the_signal_before_its_handlers_leaves_a_stop(
    lab: Lab, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = signals.install

    def install(**named: bool) -> signals.StopFlag:
        if os.environ.get("RANK") == str(late):
            time.sleep(3600)
        return real(**named)

    monkeypatch.setattr(signals, "install", install)  # the forked processes inherit it
    launch = lab.start(f"late-{late}", "launch.collective_timeout_s=5", world=2, timeout_s=5)
    time.sleep(1.5)
    launch.send(signal.SIGTERM)
    expected = [int(ExitCode.STOPPED)] * 2
    expected[late] = -signal.SIGTERM
    assert launch.wait(60) == expected, launch.text()
    assert "before the first update" in lab.exit(f"late-{late}", 1 - late)["reason"]
    monkeypatch.undo()
    lab.must_equal_reference(f"late-{late}", 2)


# --- preparing latents ---------------------------------------------------------------------------------


def prepare_and_stop(folder: Path, number: int, delay_s: float, world: int, workers: int) -> list[int]:
    """`prepare all` on forked processes, all signalled after `delay_s`; their exit codes."""
    settings = preparedset.settings_of(folder, workers=workers)
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
            code = 1
            try:
                signals.install()
                preparedset.prepare(settings)
                code = 0
            except Halt as halt:
                code = int(halt.code)
                print(halt.message, file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        pids.append(pid)
    time.sleep(delay_s)
    for pid in pids:
        with_group = os.getpgid(pid) == pid
        os.killpg(pid, number) if with_group else os.kill(pid, number)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def made(folder: Path) -> dict[str, str]:
    found = (path for ending in ("parquet", "safetensors", "arrow") for path in (folder / "data").rglob(f"*.{ending}"))
    kept = (path for path in found if not path.name.startswith(".") and ".parsed" not in str(path))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def test_preparation_stops_at_random_moments_with_85_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    import train.prepare.latents
    import train.prepare.report  # noqa: F401  (once, here: the children start at once)

    preparedset.write_posts(tmp_path / "pictures", 16)
    preparedset.write_vae(tmp_path / "vae")
    started = time.monotonic()
    assert prepare_and_stop(tmp_path, 0, 0.0, 1, 0) == [0]  # signal 0 is none
    length_s = time.monotonic() - started
    straight = made(tmp_path)
    shutil.rmtree(tmp_path / "data")
    draw, codes = random.Random(3), []
    for _ in range(8):
        codes += prepare_and_stop(tmp_path, draw.choice(SIGNALS), draw.uniform(0.02, 0.6) * length_s, draw.choice((1, 2)), 0)
        if 0 in codes[-2:]:
            shutil.rmtree(tmp_path / "data")
    # Two worker processes in the same group as the one that is signalled, as a terminal does it.
    codes += prepare_and_stop(tmp_path, signal.SIGINT, length_s, 1, 2)
    handled = [code for code in codes if code >= 0]
    assert set(handled) <= {0, ExitCode.STOPPED}, codes
    assert handled.count(ExitCode.STOPPED) >= 4, codes
    assert prepare_and_stop(tmp_path, 0, 0.0, 1, 0) == [0]
    assert made(tmp_path) == straight
