"""Death at every system call of save and retention: the newest checkpoint is the old or the new one, never torn."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.config.stage import CheckpointConfig
from train.storage import checkpoint, manifest, rundir
from train.storage.checkpoint import Progress
from train.storage.resume import Expectations

EXPECT = Expectations("s", {})
CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")  # of the os module
TRACED = ("mkdir", "openat", "write", "fsync", "rename", "unlink", "unlinkat", "rmdir")


def save(run: rundir.RunDir, step: int) -> None:
    tensors = {"model": {"w": torch.full((8,), float(step))}, "optimizer": {"w/exp_avg": torch.zeros(8)}}
    checkpoint.save(run, Progress(step, step), tensors, EXPECT.to_state(), CheckpointConfig(keep=2))


def fresh(path: Path) -> Path:
    """A run with steps 10 and 20, so that saving 30 commits, then removes 10."""
    run = rundir.open_run_dir(path, "s")
    save(run, 10)
    save(run, 20)
    run.close()
    return path


def in_child(path: Path, before: Callable[[], None]) -> int:
    """Fork, open the run, call `before`, save step 30; the pid."""
    pid = os.fork()
    if pid == 0:
        try:
            run = rundir.open_run_dir(path, "s")
            before()
            save(run, 30)
        finally:
            os._exit(0)
    return pid


def restart(path: Path) -> int:
    """What a restart finds: the step resumed from. Then the next save must work as if nothing had happened."""
    for entry in (path / "checkpoints").iterdir():
        if manifest.step_of(entry.name) is not None:
            manifest.verify(entry)  # nothing torn ever carries a checkpoint's name
    run = rundir.open_run_dir(path, "s")
    loaded = checkpoint.load_newest(run, EXPECT)
    rundir.remove_leftovers(run.path)
    assert not [n for n in os.listdir(run.checkpoints) if manifest.step_of(n) is None]
    assert loaded.problems == ()
    assert float(loaded.tensors("model")["w"][0]) == loaded.progress.step
    save(run, 30)
    save(run, 40)
    assert checkpoint.load_newest(run, EXPECT).progress.step == 40
    assert sorted(os.listdir(run.checkpoints)) == ["step-00000030", "step-00000040"]
    run.close()
    return loaded.progress.step


def count_calls(at: int | None) -> Callable[[], None]:
    """Count the state-changing calls of the os module; leave without cleaning up instead of making number `at`."""

    def arm() -> None:
        made = 0

        def counted(real: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal made
                if made == at:
                    os._exit(77)
                made += 1
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))

    return arm


def test_death_before_every_file_system_call(tmp_path):
    resumed: list[int] = []
    while True:
        path = fresh(tmp_path / f"r{len(resumed)}")
        pid = in_child(path, count_calls(len(resumed)))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        resumed.append(restart(path))
        if code == 0:
            break
        assert code == 77
    assert len(resumed) > 25
    assert resumed == sorted(resumed)  # before the commit 20, from then on 30
    assert set(resumed) == {20, 30}


# --- the same with the kernel as witness ---------------------------------------------------------------


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    probe = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True)
    return probe.returncode == 0


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is missing or not allowed")


def traced_save(path: Path, log: Path, inject: str | None) -> int:
    """Exit status of a child that saves step 30 under strace, which may kill it at one system call."""
    gate_in, gate_out = os.pipe()
    ready_in, ready_out = os.pipe()

    def wait_at_gate() -> None:
        os.write(ready_out, b"r")
        os.read(gate_in, 1)

    pid = in_child(path, wait_at_gate)
    os.read(ready_in, 1)
    for end in (gate_in, ready_in, ready_out):
        os.close(end)
    command = ["strace", "-y", "-o", str(log), "-e", f"trace={','.join(TRACED)}", "-p", str(pid)]
    if inject:
        command[1:1] = ["-e", f"inject={inject}"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while (line := tracer.stderr.readline()) and "attached" not in line:
            pass
        os.write(gate_out, b"g")
        os.close(gate_out)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        tracer.stderr.close()
        tracer.wait(30)


@needs_strace
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigkill_at_every_system_call(tmp_path):
    assert traced_save(fresh(tmp_path / "all"), tmp_path / "log", None) == 0
    calls = Counter(re.findall(r"^(\w+)\(", (tmp_path / "log").read_text(), re.MULTILINE))
    points = [(name, k) for name, count in calls.items() for k in range(1, count + 1)]
    assert len(points) >= 30
    seen = Counter()
    for name, k in points:
        path = fresh(tmp_path / f"{name}{k}")
        status = traced_save(path, tmp_path / "log", f"{name}:signal=KILL:when={k}")
        assert status == -signal.SIGKILL, (name, k)
        seen[restart(path)] += 1
    print(f"{len(points)} system calls, each killed once: {dict(seen)}")
    assert set(seen) == {20, 30}


@needs_strace
def test_files_are_synced_before_the_directory_before_the_commit_before_the_parent(tmp_path):
    path = fresh(tmp_path / "run")
    assert traced_save(path, tmp_path / "log", None) == 0
    events = []
    for line in (tmp_path / "log").read_text().splitlines():
        if found := re.match(r"(fsync|rename|rmdir|unlink\w*)\((.*)\)\s+= 0", line):
            names = re.findall(r"checkpoints(?:/([\w.\-/]*))?[\">]", found[2])
            events.append((found[1], *names))
    tmp, old = "step-00000030.tmp", "step-00000010"
    synced = [f"{tmp}/{n}" for n in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")]
    assert events[:7] == [
        *[("fsync", name) for name in synced],
        ("fsync", tmp),
        ("rename", tmp, "step-00000030"),
        ("fsync", ""),
    ]
    assert events[7] == ("rename", old, f"{old}.del")  # retention begins only now
    assert not [e for e in events[8:] if e[0] == "rename"]


def test_kill_inside_retention_leaves_a_del_that_the_next_start_removes(tmp_path):
    path = fresh(tmp_path / "run")
    shutil.copytree(path / "checkpoints" / "step-00000010", path / "checkpoints" / "step-00000010.del")
    (path / "checkpoints" / "step-00000010.del" / "manifest.json").unlink()
    assert restart(path) == 20
