"""The run directory: one owner, atomic files, refusals before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.base import files
from train.base.errors import ExitCode, Halt
from train.base.secrets import mask
from train.storage import rundir

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from train.storage import rundir
run = rundir.open_run_dir(sys.argv[1], "s")
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(60)  # a data worker that outlives its owner
print("open", flush=True)
time.sleep(60)
"""


def start_holder(path, *more):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *more], cwd=ROOT, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout.readline() == "open\n"
    return process


def end_group(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_second_process_is_told_who_holds_the_lock(tmp_path):
    holder = start_holder(tmp_path / "r")
    try:
        start = time.monotonic()
        with pytest.raises(Halt) as caught:
            rundir.open_run_dir(tmp_path / "r", "s")
        assert time.monotonic() - start < 1
        assert caught.value.code == ExitCode.LOCKED
        assert f"pid {holder.pid} on host {os.uname().nodename}" in caught.value.message
    finally:
        end_group(holder)
    rundir.open_run_dir(tmp_path / "r", "s").close()  # free at once


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_owner(tmp_path):
    holder = start_holder(tmp_path / "r", "fork")
    try:
        holder.kill()
        holder.wait()
        rundir.open_run_dir(tmp_path / "r", "s").close()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_same_process_twice_is_refused_and_the_lock_survives(tmp_path):
    run = rundir.open_run_dir(tmp_path / "r", "s")
    with pytest.raises(Halt, match="already open in this process"):
        rundir.open_run_dir(tmp_path / "r", "s")
    code = "import sys; from train.storage import rundir; rundir.open_run_dir(sys.argv[1], 's')"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], cwd=ROOT, capture_output=True, text=True)
    assert "is in use by pid" in other.stderr
    run.close()
    run.close()
    rundir.open_run_dir(tmp_path / "r", "s").close()


def test_other_ranks_do_not_lock(tmp_path):
    first = rundir.open_run_dir(tmp_path / "r", "s")
    second = rundir.open_run_dir(tmp_path / "r", "s", rank=1)
    assert second.write_exit(9, "failed", "peer lost", 7)
    assert json.loads((tmp_path / "r" / "exit.1.json").read_text())["code"] == 9
    first.close()
    second.close()


def test_directory_below_a_regular_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    start = time.monotonic()
    with pytest.raises(Halt) as caught:
        rundir.open_run_dir(tmp_path / "file" / "run", "s")
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert "Not a directory" in caught.value.message
    assert time.monotonic() - start < 1


def test_opening_loads_nothing_heavy(tmp_path):
    code = (
        "import sys; from train.storage import rundir; rundir.open_run_dir(sys.argv[1], 's');"
        "print(*[m for m in ('torch', 'numpy', 'omegaconf', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "config only"])
def test_directory_of_another_stage(tmp_path, what):
    run = rundir.open_run_dir(tmp_path, "pretrain")
    run.write_config("stage: pretrain  # of the card\nseed: 31\n")
    run.close()
    if what == "checkpoint":
        (tmp_path / "checkpoints" / "step-00000010").mkdir()
    elif what == "metrics":
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        (tmp_path / "run.json").unlink()  # config.yaml alone still tells
    if what == "config only":  # refused start-ups leave no claim on a directory in which nothing was trained
        rundir.open_run_dir(tmp_path, "ft1").close()
        return
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(Halt, match="belongs to stage 'pretrain', this config is stage 'ft1'") as caught:
        rundir.open_run_dir(tmp_path, "ft1")
    assert caught.value.code == ExitCode.MISMATCH
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_done_is_returned_and_nothing_is_touched(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s")
    run.write_done({"updates": 12})
    run.close()
    (tmp_path / "left.tmp").write_text("x")
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = rundir.open_run_dir(tmp_path, "s")
    assert again.done == {"updates": 12}
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    again.close()


def test_leftovers_go_and_the_rest_stays(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s")
    run_id = run.run_id
    run.close()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    steps = tmp_path / "checkpoints"
    for name in ("step-00000001", "step-00000002.tmp", "step-00000003.del"):
        (steps / name).mkdir()
        (steps / name / "f").write_text("x")
    (steps / "step-00000004.tmp").symlink_to(outside)
    mine = ["notes.tmp", "notes.json.tmp", "old.del", "exit_notes.json"]  # the user's, whatever they are called
    left = ["exit.json.tmp", "exit.3.json.tmp", "config.yaml.tmp", ".s.safetensors.anix.tmp", "step-00000002.tmp",
            "step-00000003.del", "step-00000004.tmp", "step-00000005.manifest.tmp", "step-00000005.manifest.tmp.tmp"]  # fmt: skip
    (steps / "step-00000005.manifest.tmp").write_text("")
    (steps / "step-00000005.manifest.tmp.tmp").write_text("")
    for name in (*mine, *left[:4], "exit.json", "exit.3.json"):
        (tmp_path / name).write_text("{}")
    again = rundir.open_run_dir(tmp_path, "s")
    assert again.run_id == run_id
    assert {entry.name for entry in rundir.leftovers(tmp_path)} == set(left), "they stay until the run begins"
    rundir.remove_leftovers(tmp_path)
    assert [p.name for p in steps.iterdir()] == ["step-00000001"]
    assert (outside / "precious").exists()
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "run.json", "checkpoints", *mine}
    again.close()


@pytest.mark.parametrize("name", ["config.yaml", "model", "checkpoints/mine", "s.safetensors", "DONE", "exit.json"])
def test_somebodys_folder_is_no_run_directory(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine: 1\n")
    (tmp_path / "notes.tmp").write_text("mine")
    with pytest.raises(Halt, match=f"holds {name.partition('/')[0]} and is no run directory") as caught:
        rundir.open_run_dir(tmp_path, "s")
    assert caught.value.code == ExitCode.MISMATCH
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {name, "notes.tmp"}
    assert (tmp_path / name).read_text() == "mine: 1\n"


def test_a_folder_with_other_files_and_a_plan_is_taken(tmp_path):
    for name in ("plan.json", "lr.svg", "notes.txt"):
        (tmp_path / name).write_text("x")
    rundir.open_run_dir(tmp_path, "s").close()
    rundir.open_run_dir(tmp_path, "s").close()
    assert (tmp_path / "notes.txt").read_text() == "x"


def test_replace_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    monkeypatch.setattr(rundir.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}


def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "f.json")
    assert files.read_json(tmp_path / "f.json") is None
    for name in ("run.json", "config.yaml", "DONE", "validation.jsonl", "selection.safetensors"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(Halt, match=f"{name} is not a regular file"):
            rundir.open_run_dir(tmp_path / name, "s")


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\xff", b'{"a": 1', b"[" * 100_000])
def test_read_json_never_raises(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    assert files.read_json(tmp_path / "f") is None
    assert files.read_json(tmp_path) is None


def test_exit_record_masks_secrets_and_never_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "canary-7fd1")
    run = rundir.open_run_dir(tmp_path, "s")
    for name in ("step-00000008", "step-00000004", "step-00000012.tmp"):
        (run.checkpoints / name).mkdir()
    reason = "upload failed with canary-7fd1 at https://me:pw@example.org"
    assert run.write_exit(1, "failed", reason, 8)
    text = (tmp_path / "exit.json").read_text()
    assert "canary" not in text
    assert "pw" not in text
    record = json.loads(text)
    assert (record["code"], record["status"], record["update"]) == (1, "failed", 8)
    assert record["checkpoint"] == "checkpoints/step-00000008"
    run.close()
    gone = rundir.RunDir(tmp_path / "file" / "x", "s", 0)
    assert gone.write_exit(1, "failed", "", None) is False


def test_the_third_start_into_the_same_failure_is_refused(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s")
    for attempt in range(2):
        run.check_attempts("hash")
        run.count_attempt(1, f"KeyError: 'x' at 0x7f{attempt}", 8, "hash")
    with pytest.raises(Halt, match="2 starts in a row ended at update 8") as caught:
        run.check_attempts("hash")
    assert caught.value.code == ExitCode.MISMATCH
    run.check_attempts("other settings")
    run.check_attempts("hash", ["attempts"])
    run.check_attempts("hash")
    run.close()


def test_what_is_not_the_same_failure_is_not_counted(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s")
    for update in (8, 9, 8):
        run.count_attempt(1, "boom", update, "hash")
    for _ in range(5):
        run.count_attempt(85, "stopped", 8, "hash")
        run.count_attempt(8, "disk full", 8, "hash")
    run.check_attempts("hash")
    run.close()


def test_masking():
    env = {"WANDB_API_KEY": "a-long-value", "KEY": "1", "PATH": "/usr/bin"}
    assert mask("x a-long-value y 1 /usr/bin", env) == "x *** y 1 /usr/bin"
    assert mask("token hf_abcdefghij and " + "0123456789" * 4, {}) == "token *** and ***"
    digest = "ab" * 32
    assert mask(digest, {}) == digest  # sha256 are not secrets
    assert mask("http://u:p@h/x ftp://u@h", {}) == "http://***@h/x ftp://***@h"


def test_a_rank_that_never_met_the_main_one_leaves_no_record_in_what_may_be_anothers_directory(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s", rank=1)
    run.met = False
    assert not run.write_exit(85, "stopped", "before the first update", 0)
    assert not (tmp_path / "exit.1.json").exists()
    run.met = True
    assert run.write_exit(85, "stopped", "before the first update", 0)
