"""The fault matrix on real runs: forked from one warm process, on one and two gloo ranks.

REF is an uninterrupted run; after every fault a plain restart must end in the same weights, optimizer state,
metrics and trace, bit for bit, unless the fault is one that must not be repeated.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lab import CANARY, UPDATES, Lab

from train.storage import space
from train.testing.chaos import kills, world
from train.tools.show import run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


# --- losing processes ----------------------------------------------------------------------------------


def test_f2_a_killed_rank_is_named_and_nothing_is_lost(lab):
    assert lab.run("f2", world=2, fault="backward@6:1:kill") == [9, -signal.SIGKILL]
    assert "update 6: rank 1 is gone" in lab.exit("f2")["reason"]
    assert max(kills.steps_of(lab.folder / "f2")) == 6  # the main process saved the last completed update by itself
    lab.must_equal_reference("f2")


def test_r13_the_survivor_leaves_within_ten_seconds(lab):
    launch = lab.start("r13", world=2)
    lab.wait_for_update(launch, "r13", 3)
    launch.send(signal.SIGKILL, 1)
    start = time.monotonic()
    assert launch.wait()[1] == -signal.SIGKILL
    assert time.monotonic() - start < 10


def test_f30_an_exception_on_one_rank_is_told_by_the_other(lab):
    assert lab.run("f30", world=2, fault="backward@6:1:raise=KeyError") == [1, 1]
    assert "rank 1 failed at update 6: KeyError" in lab.exit("f30")["reason"]
    assert "Traceback" in lab.last.text(1)
    lab.must_equal_reference("f30", 2)


@pytest.mark.parametrize("fault", ["reduce@5:1:skip", "forward@5:1:hang", "control@5:1:skip"])
def test_f29_a_deadlock_ends_within_the_timeout_with_all_stacks(lab, fault):
    name = "f29-" + fault.partition("@")[0]
    codes = lab.run(name, "launch.collective_timeout_s=5", world=2, fault=fault, timeout_s=5)
    assert codes == [9, 9]
    last_update, end = (lab.folder / name / file for file in ("metrics.jsonl", "exit.json"))
    took = end.stat().st_mtime - last_update.stat().st_mtime
    assert took < 5 + 5 + 10, took  # the timeout, what the promise allows, and an update on a crowded machine
    assert "update 5" in lab.exit(name)["reason"]
    for rank in (0, 1):
        assert 'File "' in lab.last.text(rank), f"no stack of rank {rank}"
    assert max(kills.steps_of(lab.folder / name)) >= 4


# --- being asked to stop -------------------------------------------------------------------------------


def test_f4_a_signal_to_one_rank_stops_all_at_the_same_update(lab):
    assert lab.run("f4", world=2, fault="backward@5:1:term") == [85, 85]
    assert lab.exit("f4")["update"] == lab.exit("f4", 1)["update"]
    assert max(kills.steps_of(lab.folder / "f4")) == lab.exit("f4")["update"] == len(kills.metrics(lab.folder / "f4"))
    lab.must_equal_reference("f4")


def test_f5_sigusr1_asks_the_scheduler_to_start_it_again(lab):
    launch = lab.start("f5", world=2)
    lab.wait_for_update(launch, "f5", 3)
    launch.send(signal.SIGUSR1)
    assert launch.wait() == [85, 85]
    record = lab.exit("f5")
    assert (record["code"], record["status"]) == (85, "requeue")
    assert record["checkpoint"] == f"checkpoints/step-{record['update']:08d}"
    lab.must_equal_reference("f5", 2)


def test_f6_a_second_interrupt_ends_at_once(lab):
    launch = lab.start("f6", fault="forward@6:0:sleep=30")
    lab.wait_for_update(launch, "f6", 6)
    launch.send(signal.SIGINT)
    time.sleep(2.5)
    assert not launch.poll()
    launch.send(signal.SIGINT)
    start = time.monotonic()
    assert launch.wait() == [85]
    assert time.monotonic() - start < 5  # it slept in steps of Python: a signal is seen at once
    assert "second time" in lab.exit("f6")["reason"]
    lab.must_equal_reference("f6")


# --- the disk ------------------------------------------------------------------------------------------


def test_f9_a_disk_full_once_costs_one_checkpoint(lab):
    assert lab.run("f9", fault="save.write@4:enospc") == [0]
    assert "step 4 not written" in lab.last.text()
    assert kills.compare_runs(lab.reference, lab.folder / "f9") == []


def test_f9_the_third_failure_in_a_row_is_exit_8(lab):
    assert lab.run("f9b", "checkpoint.every_steps=2", fault="save.write@*:enospc") == [8]
    assert "No space left" in lab.exit("f9b")["reason"]
    assert kills.steps_of(lab.folder / "f9b") == []
    lab.must_equal_reference("f9b")


def test_f10_a_disk_too_small_is_known_before_the_first_update(lab, monkeypatch):
    monkeypatch.setattr(space, "free_bytes", lambda path: 100_000)  # the children inherit it
    assert lab.run("f10") == [7]
    assert re.search(r"checkpoints need .* the disk has 100 kB", lab.exit("f10")["reason"])
    assert kills.metrics(lab.folder / "f10") == []


def test_f36_a_save_still_running_is_skipped_over_and_waited_for(lab):
    fault = "save.write@2:sleep=1.5"
    assert lab.run("f36", "checkpoint.every_steps=2", fault=fault) == [0]
    assert "still being written" in lab.last.text()
    assert kills.compare_runs(lab.reference, lab.folder / "f36") == []


# --- damage --------------------------------------------------------------------------------------------


def test_f12_to_f14_damaged_checkpoints(lab):
    assert lab.run("f12", fault="forward@9:exit=1") == [1]
    folder = lab.folder / "f12" / "checkpoints"
    assert sorted(kills.steps_of(lab.folder / "f12")) == [4, 8]
    model = folder / "step-00000008" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-100] ^= 4
    model.write_bytes(data)
    shutil.copytree(lab.folder / "f12", lab.folder / "f14")
    lab.must_equal_reference("f12")
    assert "step-00000008: model.safetensors: sha256" in lab.last.text()

    (lab.folder / "f14" / "checkpoints" / "step-00000004" / "manifest.json").write_text("")
    assert lab.run("f14") == [3]
    reason = lab.exit("f14")["reason"]
    assert "step-00000008: model.safetensors" in reason
    assert "step-00000004: manifest.json" in reason


def test_f15_other_settings_are_another_run(lab):
    assert lab.run("f15", fault="forward@5:exit=1") == [1]
    before = sorted(p.stat().st_mtime_ns for p in (lab.folder / "f15" / "checkpoints").rglob("*"))
    assert lab.run("f15", "seed=32", "optimizer.unet_lr=2e-3", "data.workers=1", "epochs=2") == [7]
    reason = lab.exit("f15")["reason"]
    for line in (
        "refuse    seed: checkpoint 31, now 32",
        "refuse    optimizer.unet_lr",
        "warn      epochs",
        "free      data.workers",
    ):
        assert line in reason
    assert sorted(p.stat().st_mtime_ns for p in (lab.folder / "f15" / "checkpoints").rglob("*")) == before
    lab.must_equal_reference("f15")


# --- data workers --------------------------------------------------------------------------------------


def test_f18_workers_prefetch_and_slowness_change_nothing(lab):
    assert lab.run("f18", "data.workers=2", "data.prefetch=3", fault="worker@3:sleep=0.3;read@6:sleep=0.2") == [0]
    assert kills.compare_runs(lab.reference, lab.folder / "f18") == []


def test_f19_a_killed_worker_is_replaced(lab):
    launch = lab.start("f19", "data.workers=1", fault="forward@4:0:sleep=1")
    lab.wait_for_update(launch, "f19", 4)
    for child in Path(f"/proc/{launch.pids[0]}/task/{launch.pids[0]}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert launch.wait() == [0], launch.text()
    assert kills.compare_runs(lab.reference, lab.folder / "f19") == []


def test_f19_a_worker_that_dies_every_time_ends_the_run_and_names_the_images(lab):
    assert lab.run("f19b", "data.workers=1", "data.prefetch=1", fault="worker@5:kill") == [1]
    assert re.search(r"images in flight: \S+ \(uid [0-9a-f]{16}\)", lab.exit("f19b")["reason"])
    lab.must_equal_reference("f19b")


# --- numbers -------------------------------------------------------------------------------------------


def test_f25_nan_on_one_rank_touches_no_weight_and_can_be_repeated(lab):
    assert lab.run("f25", world=2, fault="loss@7:1:nan") == [4, 4]
    bad = json.loads((lab.folder / "f25" / "bad_step.json").read_text())
    assert bad["step"] == 7
    assert [slot["loss"] == "nan" for slot in bad["slots"]] == [False] * 4 + [True] * 4
    assert max(kills.steps_of(lab.folder / "f25")) == 7  # update 6 was the last; its weights are kept
    again = lab.in_fork(run.step, lab.folder / "f25", 7, recompute=True)
    assert again["replayed_from"] == 7
    assert [s["loss"] for s in again["slots"]][:4] == [s["loss"] for s in bad["slots"]][:4]  # to the last bit
    assert [(s["uid"], s["t"]) for s in again["slots"]] == [(s["uid"], s["t"]) for s in bad["slots"]]
    lab.must_equal_reference("f25", 2)


def test_any_update_of_a_finished_run_can_be_looked_at_and_repeated(lab):
    logged = kills.metrics(lab.reference)
    again = lab.in_fork(run.step, lab.reference, 6, recompute=True)
    assert again["replayed_from"] == 0  # the kept checkpoints are 8 and 10: the whole way is gone again
    assert again["recomputed_loss"] == again["loss"] == logged[6]["loss"]
    assert again["recomputed_grad_norm"] == logged[6]["grad_norm"]
    traced = [line.split() for line in (lab.reference / "trace.txt").read_text().splitlines() if line.startswith("6 ")]
    assert [(s["bucket"], s["uid"], str(s["epoch"]), str(s["t"])) for s in again["slots"]] == [
        tuple(t[1:]) for t in traced
    ]
    report = lab.in_fork(run.checkpoint, lab.reference)
    assert (report["verified"], report["step"], report["permanent"]) == (True, UPDATES, True)


def test_f26_overflowing_gradients_end_fp32_at_once(lab):
    assert lab.run("f26", fault="loss@3:0:scale=1e38") == [4]
    assert "the gradient" in lab.exit("f26")["reason"]


def test_f27_a_spike_is_told_and_the_run_goes_on(lab):
    fault = "loss@9:0:scale=100"
    assert lab.run("f27", fault=fault) == [0]
    assert "sigma above" in lab.last.text()
    found = [record for record in kills.metrics(lab.folder / "f27") if "spike_sigmas" in record]
    assert [record["step"] for record in found] == [10]
    assert found[0]["spike_sigmas"] > 6
    # A resumed run knows the losses before: the same spikes, the same records.
    assert lab.run("f27b", fault=f"{fault};forward@9:exit=1") == [1]
    assert lab.run("f27b", fault=fault) == [0]
    assert kills.compare_runs(lab.folder / "f27", lab.folder / "f27b") == []


@pytest.mark.parametrize("determinism", ["strict", "fast"])
def test_a_gradient_that_is_not_finite_behind_finite_losses_touches_no_weight(lab, determinism):
    name, settings = f"f25-{determinism}", f"batch.determinism={determinism}"
    assert lab.run(name, settings, world=2, fault="backward@7:1:nan") == [4, 4]
    bad = json.loads((lab.folder / name / "bad_step.json").read_text())
    assert (bad["step"], bad["grad_norm"]) == (7, "nan")
    assert "the gradient" in lab.exit(name)["reason"]
    again = lab.in_fork(run.step, lab.folder / name, 7, recompute=True)
    losses = [slot["loss"] for slot in again["slots"]]
    assert losses == ([slot["loss"] for slot in bad["slots"]] if determinism == "strict" else pytest.approx(
        [slot["loss"] for slot in bad["slots"]], rel=1e-6))  # fmt: skip
    lab.must_equal_reference(name, 2, settings)


def test_f28_out_of_memory_late_loses_nothing(lab):
    assert lab.run("f28", fault="forward@6:0:oom") == [5]
    assert re.search(r"update 6: out of memory in bucket \d+x\d+ with 2 images", lab.exit("f28")["reason"])
    assert max(kills.steps_of(lab.folder / "f28")) == 6
    lab.must_equal_reference("f28")


# --- the run directory ---------------------------------------------------------------------------------


def test_f32_a_second_job_is_kept_out_and_the_first_does_not_notice(lab):
    first = lab.start("f32", fault="forward@3:0:sleep=2")
    lab.wait_for_update(first, "f32", 3)
    assert lab.run("f32") == [6]
    assert f"pid {first.pids[0]} on host" in lab.last.text()
    assert first.wait() == [0]
    assert kills.compare_runs(lab.reference, lab.folder / "f32") == []


def test_f33_the_third_start_into_the_same_crash_refuses(lab):
    fault = "forward@8:*:raise"
    assert lab.run("f33", fault=fault) == [1]
    assert lab.run("f33", fault=fault) == [1]
    assert lab.run("f33", fault=fault) == [7]
    assert "2 starts in a row ended at update 8" in lab.exit("f33")["reason"]
    assert lab.run("f33", "resume.accept=[attempts]") == [0]


def test_a_misspelt_key_is_exit_2_and_leaves_no_directory(lab):
    assert lab.run("usage", "batch.mikro=3") == [2]
    assert "batch.micro" in lab.last.text()
    assert not (lab.folder / "usage").exists()


def test_done_says_so_and_writes_nothing(lab):
    before = {str(p): p.stat().st_mtime_ns for p in lab.reference.rglob("*")}
    assert lab.run("reference") == [0]
    assert "already done" in lab.last.text()
    assert {str(p): p.stat().st_mtime_ns for p in lab.reference.rglob("*")} == before


def test_f11_an_output_that_cannot_be_written_is_told_before_the_heavy_imports(lab):
    (lab.folder / "file").write_text("x")
    start = time.monotonic()
    command = [sys.executable, "train/run.py", "--config", str(lab.yaml), f"output_dir={lab.folder / 'file' / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 8, done.stderr
    assert "output_dir" in done.stderr
    assert time.monotonic() - start < 5


# --- many random kills, and secrets -------------------------------------------------------------------


def test_r1_r2_r5_ten_random_kills_on_changing_world_sizes(lab):
    tally = kills.run_chaos(10, 20261125, lab.folder / "chaos", print)
    assert tally.problems == []
    assert tally.kills + tally.terms == 10
    assert tally.most_lost <= world.EVERY_STEPS
    assert tally.lost_on_term == 0


def test_a_launch_that_ends_before_its_first_line_has_lost_nothing(tmp_path):
    """The two lines without a checkpoint are those of a SIGKILL before; had the launch written them, they would count."""
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 13)))
    found = kills._stamp(tmp_path)
    assert kills._stamp(tmp_path) == found
    tallies = {}
    for began in (False, True):
        tallies[began] = kills.Tally()
        launch = SimpleNamespace(text=lambda: "what the ranks said")
        kills._count(tmp_path, signal.SIGTERM, [-15, 85], 12, tallies[began], launch, began=began)
    assert (tallies[False].problems, tallies[False].lost_on_term) == ([], 0)
    assert (len(tallies[True].problems), tallies[True].lost_on_term) == (1, 2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert kills._stamp(tmp_path) != found


def test_r12_no_secret_in_any_byte_written(lab):
    found = [path for path in lab.folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert found == []
