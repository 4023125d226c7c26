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
    left = ["exit.json", "flight_recorder.1.json", "memory_snapshot.0.json", "memory_snapshot.1.pickle"]  # the latter of older runs
    for name in (*left, "flight_recorder.of.mine.json"):
        (tmp_path / name).write_text("{}")
    open_run_dir(tmp_path, "pretrain").close()
    assert not any((tmp_path / name).exists() for name in left) and (tmp_path / "flight_recorder.of.mine.json").exists()


def test_the_cards_memory_is_written_as_json_that_torchs_viewer_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in a run directory runs code when it is read. A card's snapshot, as torch documents it, stands in for one."""
    from torch.cuda import _memory_viz

    block = {"size": 512, "requested_size": 500, "address": 4096, "state": "active_allocated", "frames": []}
    segment = {"device": 0, "address": 4096, "total_size": 512, "allocated_size": 512, "active_size": 512, "requested_size": 500,
               "stream": 0, "segment_type": "large", "blocks": [block]}  # fmt: skip
    event = {"action": "alloc", "addr": 4096, "size": 512, "stream": 0, "time_us": 1, "frames": [{"filename": "a.py", "line": 3, "name": "f"}]}
    snapshot = {"segments": [segment], "device_traces": [[event]], "allocator_settings": {}, "external_annotations": []}
    observers: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
    run = RunDir(tmp_path, "pretrain", 2)
    with postmortem.recorded_memory(run):
        observers[0](0, 1, 2, 3)
    assert run.aside["memory_snapshot"] == "memory_snapshot.2.json"
    read = json.loads((tmp_path / "memory_snapshot.2.json").read_text())
    assert read == snapshot
    assert "512.0B" in _memory_viz.segsum(read) and _memory_viz.trace_plot(read).startswith("\n<!DOCTYPE html>")
