"""Runs the stages of a recipe one after the other, each under `accelerate launch`; signals reach the trainer."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from train.base.console import EXIT_NOTE, noted_codes
from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.config import shipped
from train.config.derived import Start
from train.config.stage import load_stage, overrides_of
from train.engine.finished import answer

RUN_PY = Path(__file__).resolve().parents[1] / "run.py"
LAUNCHER = Path(__file__).with_name("launcher.py")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
HELPERS_S = 10.0  # for what a trainer leaves behind to end by itself
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Stops:
    """Owner of the stop signals while stages run: each is passed on to the launched stage, which saves and leaves.

    A launcher may die of the signal at once and leave the trainer behind: on Linux its orphans become our children,
    so that a signal still reaches them and their end is waited for.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # the first that arrived
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._handle)
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def run(self, command: Sequence[str], environment: dict[str, str] | None, done: Callable[[], bool]) -> int:
        """Start the launcher in a process group of its own; its code once it and the trainer have ended.

        `done`: whether the trainer needs no more waiting for although helpers of it still run.
        """
        # A group of its own: a terminal's Ctrl-C would reach the trainer beside ours, and count as a second one.
        child = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_end_with_parent)
        self._child = child
        if self.name is not None:  # it arrived while the launcher was being started
            self._pass_on(signal.Signals[self.name])
        code = child.wait()
        self._wait_for_orphans(done)
        self._child = None
        return code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._child is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, number)
        for pid in _children():  # orphans, those of torchrun in groups of their own
            if pid != self._child.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _wait_for_orphans(self, done: Callable[[], bool]) -> None:
        end: float | None = None
        while True:
            try:
                ended = os.waitpid(-1, os.WNOHANG)[0]
            except ChildProcessError:
                return
            if ended == 0:
                if end is None and done():
                    end = time.monotonic() + HELPERS_S
                if end is not None and time.monotonic() > end:
                    return
                time.sleep(0.05)


def _end_with_parent() -> None:
    """In the launcher before it begins: SIGTERM when recipe.py dies, so that not even SIGKILL leaves a run behind."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def run_stages(configs: Sequence[Path], overrides: Sequence[str], launch: Path | None, processes: int) -> int:
    """Run every stage in order and return the first code that is not 0; 85 after a stop signal.

    `overrides`: for every stage, or for one as `ft1:key=value`. All configs are loaded before the first stage starts, so
    that a typo in the last costs nothing.
    """
    own = overrides_of(configs, overrides)
    stages = [load_stage([config], its) for config, its in zip(configs, own, strict=True)]
    directories = [stage.output_dir for stage in stages]
    if len(set(directories)) != len(directories):
        raise Halt(ExitCode.USAGE, f"two stages share an output_dir: {directories}")
    with Stops() as stops:
        for config, stage, its in zip(configs, stages, own, strict=True):
            try:
                code = run_unless_done(config, its, stage.start, launch_command(launch, processes), stops)
            except Halt as halt:  # made under other settings: as a start of that stage would end
                raise Halt(halt.code, f"{halt.message}\nThe stages from {stage.stage} on were not started") from halt
            if code != 0:
                if stops.name is None or code != ExitCode.STOPPED:
                    print(f"stage {stage.stage} ended with code {code}; the stages after it were not started", file=sys.stderr)
                return code
    return 0


def run_unless_done(config: Path, overrides: Sequence[str], stage: Start, launcher: Sequence[str], stops: Stops) -> int:
    """The trainer's code, 0 for a stage that is finished, which is said; 85 where a stop came before it.

    Raises Halt(MISMATCH) for one that was finished under other settings.
    """
    finished = answer(stage)
    if finished is not None and not finished.goes_on:
        print(finished.text, file=sys.stderr)
        return ExitCode.DONE
    if stops.name is not None:
        print(f"stopped by {stops.name} before stage {stage.identity.stage}: the same command goes on", file=sys.stderr)
        return ExitCode.STOPPED
    return launch_stage([config], overrides, launcher, Path(stage.identity.output_dir), stops)


def run_stage(
    configs: Sequence[Path], overrides: Sequence[str], launch: Path | None, processes: int, options: Sequence[str] = ()
) -> int:
    """Run one stage of several config files, with `options` for the launcher; the trainer's code, 85 after a stop signal."""
    stage = load_stage(configs, overrides)
    launcher = [*launch_command(launch, processes), *options]
    with Stops() as stops:
        return launch_stage(configs, overrides, launcher, Path(stage.output_dir), stops)


def launch_stage(
    configs: Sequence[Path], overrides: Sequence[str], launcher: Sequence[str], output_dir: Path, stops: Stops
) -> int:
    """Start one stage and return the trainer's own exit code, which launchers replace by 1."""
    files = [word for config in configs for word in ("--config", str(shipped.find(config)))]
    command = [*launcher, str(RUN_PY), *files, *overrides]
    before = _version(output_dir / "exit.json")  # of an earlier start, or of a run that owns the directory
    with tempfile.TemporaryDirectory(prefix="recipe-") as folder:
        note = Path(folder) / "code"
        environment = {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",  # time for the last save
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # torchrun dies of USR1 else
            "ANIX_LAUNCHED": "1",  # its end is the trainer's end
            **os.environ,
            EXIT_NOTE: str(note),
        }

        def told() -> int | None:
            noted = noted_codes(note).get(0)
            record = read_json(output_dir / "exit.json") if _version(output_dir / "exit.json") != before else None
            return noted if noted is not None or record is None else _code_in(record)

        code = stops.run(command, environment, lambda: told() is not None or not _in_use(output_dir))
        said = told()
        if said is None:  # a launcher may end the main process while it says what another one has said
            said = next(iter(noted_codes(note).values()), None)
    if said is not None:
        return said
    if stops.name is not None:  # before the trainer listened, so before there was anything to lose
        return ExitCode.STOPPED
    return code if 0 <= code < 128 else int(ExitCode.UNEXPECTED)


def _code_in(record: dict[str, Any]) -> int | None:
    return record["code"] if isinstance(record.get("code"), int) else None


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _in_use(output_dir: Path) -> bool:
    """Whether a trainer holds the run directory. Never called in the process that holds it: it would drop the lock."""
    try:
        with open(output_dir / ".lock", "rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock yet, or none on this file system
    return False


def launch_command(launch: Path | None, processes: int) -> list[str]:
    """The launcher's command line up to the script. Raises Halt(USAGE) for less than one process."""
    if processes < 1:
        raise Halt(ExitCode.USAGE, f"--processes is {processes}, must be at least 1")
    base = [sys.executable, str(LAUNCHER), "accelerate"]
    if launch is not None:
        return [*base, "--config_file", str(shipped.find(launch))]
    if processes == 1:
        one = ["--num_processes", "1", "--num_machines", "1"]
        return [*base, *one, "--mixed_precision", "no", "--dynamo_backend", "no"]
    if not (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()):
        # accelerate's CPU mode starts one process whatever it is told; torchrun starts as many as asked.
        return [sys.executable, str(LAUNCHER), "torchrun", "--standalone", "--nproc_per_node", str(processes)]
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    return [*base, *several, "--mixed_precision", "no", "--dynamo_backend", "no"]

