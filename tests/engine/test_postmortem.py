"""What a failed run leaves: the last collectives of every process, named in its exit record."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks

from train.config.stage import BatchConfig, LaunchConfig
from train.engine import postmortem, processes, setup
from train.storage.rundir import RunDir, open_run_dir


def fail_after_three(rank: int, world: int, folder: str, port: int) -> dict[str, Any]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = open_run_dir(folder, "pretrain", rank=rank)
    run.met = False
    with processes.joining(run, lambda code, reason: None):
        setup.open_machine(BatchConfig(micro=1, effective=world), LaunchConfig())
    with processes.watching(rank, world, run=run) as watch:
        for size in (3, 5, 7):
            dist.all_reduce(torch.ones(size))
        watch.written()
    run.write_exit(9, "failed", "a collective did not end", 4)
    return {name: os.environ[name] for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")}


def test_the_last_collectives_are_written_and_named_in_the_exit_record(tmp_path: Path) -> None:
    """The variables must stand before the group is made: torch reads them once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    found = run_ranks(2, fail_after_three, tmp_path / "ranks", str(folder), port, joined=False)
    assert found[0] == {"TORCH_FR_DUMP_TEMP_FILE": f"{folder}/flight_recorder.nccl.", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    for rank, name in enumerate(("exit.json", "exit.1.json")):
        record = json.loads((folder / name).read_text())
        assert record["flight_recorder"] == f"flight_recorder.{rank}.json"
        entries = json.loads((folder / record["flight_recorder"]).read_text())["entries"]
        sizes = [entry["input_sizes"] for entry in entries if entry["profiling_name"].endswith("all_reduce")]
        assert sizes[-3:] == [[[3]], [[5]], [[7]]]


def test_what_the_user_set_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    postmortem.record_collectives(RunDir(tmp_path, "pretrain", 0))
    beside = f"{tmp_path}/flight_recorder.nccl."
    assert os.environ == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_FR_DUMP_TEMP_FILE": beside, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": beside,
    }  # fmt: skip


def test_a_new_start_removes_what_the_last_one_left(tmp_path: Path) -> None:
    open_run_dir(tmp_path, "pretrain").close()
    left = ["exit.json", "flight_recorder.1.json", "memory_snapshot.0.pickle"]
    for name in (*left, "flight_recorder.of.mine.json"):
        (tmp_path / name).write_text("{}")
    open_run_dir(tmp_path, "pretrain").close()
    assert not any((tmp_path / name).exists() for name in left) and (tmp_path / "flight_recorder.of.mine.json").exists()
