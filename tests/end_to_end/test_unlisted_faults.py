"""Faults that no list names: the rules that decide the listed ones decide these."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import UPDATES, Lab
from safetensors.numpy import save as save_arrays
from stages import Stage, result

from train.base.errors import ExitCode, Halt
from train.engine import step as engine_step
from train.engine.step import bad_step
from train.observe.metrics import MetricsFile
from train.optim.loss_scale import loss_scale
from train.storage import rundir
from train.storage.rundir import open_run_dir
from train.testing.chaos import kills

# --- the run directory before the start ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DONE", "config.yaml", "metrics.jsonl", "exit.json", "attempts.json", "run.json", "trace.txt", ".lock"]
)
def test_a_folder_under_the_name_of_a_file_is_told_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(Halt) as caught:
        open_run_dir(tmp_path / "run", "s")
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert str(tmp_path / "run") in caught.value.message


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(Halt) as caught:
        open_run_dir(tmp_path / "run", "s")
    assert caught.value.code == ExitCode.CANNOT_WRITE
    assert (tmp_path / "precious").read_text() == "x"


def test_a_lock_file_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    tmp_path.joinpath(".lock").write_text("pid 999999999 on host elsewhere, since yesterday\n")
    open_run_dir(tmp_path, "s").close()


def test_checkpoints_may_lie_on_another_device(tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk2"
    elsewhere.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    open_run_dir(tmp_path / "run", "s").close()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "checkpoints").write_text("x")
    with pytest.raises(Halt) as caught:
        open_run_dir(tmp_path / "file", "s")
    assert caught.value.code == ExitCode.CANNOT_WRITE


@pytest.mark.parametrize("text", ['{"count": "many"}', '{"count": NaN}', '{"count": null, "config_hash": 3}', "[]", "\0"])
def test_a_damaged_attempts_file_is_no_reason_to_refuse(text: str, tmp_path: Path) -> None:
    run = open_run_dir(tmp_path, "s")
    (tmp_path / "attempts.json").write_text(text)
    run.check_attempts("h")
    run.count_attempt(1, "boom", 3, "h")
    assert json.loads((tmp_path / "attempts.json").read_text())["count"] == 1
    run.close()


def test_a_reason_that_is_not_utf8_does_not_hide_itself(tmp_path: Path) -> None:
    run = open_run_dir(tmp_path, "s")
    assert run.write_exit(1, "failed", "cannot read pictures/\udcff.png", 3)
    assert json.loads((tmp_path / "exit.json").read_text())["reason"].startswith("cannot read pictures/")
    run.close()


# --- logs ----------------------------------------------------------------------------------------------


def test_metrics_go_on_after_a_full_disk_and_a_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    file = MetricsFile(path)
    real = file._file

    class Full:
        def write(self, data: bytes) -> int:
            real.write(data[:5])  # the disk takes a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def truncate(self, size: int) -> int:
            return real.truncate(size)

    file._file = Full()  # type: ignore[assignment]
    file.append('{"step": 2}')
    file.append('{"step": 3}')
    assert path.read_bytes() == b'{"step": 1}\n'
    file._file = real
    file.append('{"step": 4}')
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_bad_update_is_refused_even_where_its_record_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = open_run_dir(tmp_path, "s")
    monkeypatch.setattr(engine_step, "write_json", full)
    halt = bad_step(run, step=3, updates=3, tiles=(), timesteps=[], losses=[], grad_norm=float("nan"))
    assert halt.code == ExitCode.NON_FINITE
    assert "No space left" in halt.message
    run.close()


# --- whole runs in this process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(dataset: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("unlisted"), dataset, base_model)
    assert stage.run(ANIX_FAULT="control@4:term") == ExitCode.STOPPED
    return stage


def again(stopped: Stage, tmp_path: Path) -> tuple[Path, str]:
    folder = Path(shutil.copytree(stopped.output, tmp_path / "run"))
    return folder, f"output_dir={folder}"


@pytest.mark.parametrize("damage", ["torn metrics", "no metrics", "torn trace", "nonsense in trace", "no trace"])
def test_damaged_logs_never_stop_a_resume(damage: str, stopped: Stage, straight: Path, tmp_path: Path) -> None:
    folder, output = again(stopped, tmp_path)
    metrics, trace = folder / "metrics.jsonl", folder / "trace.txt"
    match damage:
        case "torn metrics":
            metrics.write_bytes(metrics.read_bytes() + b'{"step": 6, "loss": 0.')
        case "no metrics":
            metrics.unlink()
        case "torn trace":
            trace.write_bytes(trace.read_bytes() + b"5 64x6")
        case "nonsense in trace":
            trace.write_bytes(trace.read_bytes() + b"\xff\xff\nnonsense\n")
        case "no trace":
            trace.unlink()
    assert stopped.run(output) == ExitCode.DONE, stopped.message
    found, wanted = result(folder) if trace.exists() else {}, result(straight)
    for name in ("checkpoint", "model.safetensors", "optimizer.safetensors"):
        assert found[name] == wanted[name]
    if damage.endswith(("trace", "in trace")):
        assert found["metrics"] == wanted["metrics"]
    if damage in ("torn metrics", "torn trace", "nonsense in trace"):
        assert found["trace"] == wanted["trace"]


def test_clocks_that_jump_change_nothing(stopped: Stage, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = again(stopped, tmp_path)
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (4e9, 4e9))  # everything was written in the year 2096
    wall = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 1e5 * next(wall))  # and the clock runs backwards
    assert stopped.run(output) == ExitCode.DONE, stopped.message
    assert result(folder) == result(straight)


def test_an_unreadable_config_of_the_last_start_is_written_anew(stopped: Stage, straight: Path, tmp_path: Path) -> None:
    folder, output = again(stopped, tmp_path)
    (folder / "config.yaml").write_bytes(b"\xff\xfe\0" * 100)
    (folder / "selection.safetensors").unlink()
    assert stopped.run(output) == ExitCode.DONE, stopped.message
    assert result(folder) == result(straight)


THREE = np.arange(3)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff" * 50, (10**15).to_bytes(8, "little") + b"{}", save_arrays({"uid": THREE}),
        save_arrays({"uid": THREE, "image": THREE, "caption": THREE[:2]}),
        save_arrays({"uid": THREE.reshape(1, 3), "image": THREE.reshape(1, 3), "caption": THREE.reshape(1, 3)}),
        save_arrays(dict.fromkeys(("uid", "image", "caption"), np.zeros(3, np.float16))),
    ],
)  # fmt: skip
def test_a_damaged_note_of_the_selection_is_no_reason_to_refuse(data: bytes, stopped: Stage, tmp_path: Path) -> None:
    folder, output = again(stopped, tmp_path)
    (folder / "selection.safetensors").write_bytes(data)
    assert stopped.run(output) == ExitCode.DONE, stopped.message


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("config.yaml", errno.EROFS), ("config.yaml", errno.EDQUOT), ("selection.safetensors", errno.ENOSPC),
        ("DONE", errno.ENOSPC), ("lineage.json", errno.ENOSPC),
    ],
)  # fmt: skip
def test_whatever_cannot_be_written_is_exit_8(
    name: str, number: int, stopped: Stage, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = again(stopped, tmp_path)
    real = os.open

    def broken(path: Any, *arguments: Any, **named: Any) -> int:
        if os.fspath(path).endswith(f"/{name}.tmp"):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return real(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(rundir.os, "open", broken)
        assert stopped.run(output) == ExitCode.CANNOT_WRITE, stopped.message
    assert {"lineage.json": "/model"}.get(name, name) in stopped.message
    assert stopped.run(output) == ExitCode.DONE, stopped.message
    assert result(folder) == result(straight)


@pytest.mark.parametrize(("rank", "world"), [("x", "1"), ("-1", "1"), ("1", "1"), ("2", "2"), ("0", "many"), ("0", "")])
def test_a_launcher_that_counts_wrong_is_refused(rank: str, world: str, stopped: Stage, tmp_path: Path) -> None:
    assert stopped.run(f"output_dir={tmp_path / 'run'}", RANK=rank, WORLD_SIZE=world) == ExitCode.USAGE
    assert "RANK" in stopped.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["sample@*:raise=KeyError", "sample@*:enospc", "sample@*:oom", "sample@*:raise=ValueError"])
def test_previews_that_fail_never_end_a_run(fault: str, stopped: Stage, straight: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("steps: 2\nprompts:\n  - {text: 1girl, width: 64, height: 64, seed: 3}\n")
    folder, output = again(stopped, tmp_path)
    more = ("sampling.every_steps=3", f"sampling.prompts={prompts}")
    assert stopped.run(output, *more, ANIX_FAULT=fault) == ExitCode.DONE, stopped.message
    assert result(folder) == result(straight)


@pytest.mark.parametrize(
    "state", [{"scale": 0.0}, {"scale": 3.0}, {"scale": "much"}, {"sclae": 1.0}, {"scale": float("inf")}, {"good_updates": -1}]
)
def test_a_loss_scale_that_is_none_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(Halt) as caught:
        loss_scale("fp16", state)
    assert caught.value.code == ExitCode.MISMATCH


# --- several processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_that_hear_of_it_at_different_updates_stop_at_the_same_one(lab: Lab) -> None:
    fault = "backward@3:1:term;backward@4:0:term;control@4:1:term"
    assert lab.run("apart", world=2, fault=fault) == [85, 85]
    assert lab.exit("apart")["update"] == lab.exit("apart", 1)["update"] == max(kills.steps_of(lab.folder / "apart"))
    lab.must_equal_reference("apart", 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_terminal_that_goes_away_is_a_stop(lab: Lab) -> None:
    launch = lab.start("hup", fault="forward@*:sleep=0.05")
    lab.wait_for_update(launch, "hup", 3)
    launch.send(signal.SIGHUP)
    assert launch.wait() == [85]
    lab.must_equal_reference("hup")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_directory_that_turns_read_only_under_way_ends_with_8_and_loses_no_checkpoint(lab: Lab) -> None:
    """As root no permission denies: a file takes the place of the folder."""
    launch = lab.start("gone", "checkpoint.every_steps=1", fault="forward@6:sleep=2")
    lab.wait_for_update(launch, "gone", 6)
    time.sleep(0.3)  # the save of update 6
    folder = lab.folder / "gone" / "checkpoints"
    folder.rename(lab.folder / "gone" / "aside")
    folder.write_text("in the way")
    assert launch.wait() == [8], launch.text()
    assert lab.exit("gone")["code"] == 8
    folder.unlink()
    (lab.folder / "gone" / "aside").rename(folder)
    lab.must_equal_reference("gone")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_f1_the_whole_job_killed_at_any_time(lab: Lab, seed: int) -> None:
    """Five kills each: 20 in all, on one and two processes; at most the interval is done again."""
    import random

    draw, name = random.Random(seed), f"f1-{seed}"
    for _ in range(5):
        world = draw.choice((1, 2))
        launch = lab.start(name, world=world, fault="forward@*:sleep=0.02")
        time.sleep(draw.uniform(0.3, 2.0))
        launch.send(signal.SIGKILL)
        codes = launch.wait()
        if set(codes) == {0}:
            break
        assert set(codes) <= {-signal.SIGKILL, 0}
        lost = len(kills.metrics(lab.folder / name)) - max(kills.steps_of(lab.folder / name), default=0)
        assert lost <= 4
    lab.must_equal_reference(name)
    assert len(kills.metrics(lab.folder / name)) == UPDATES
