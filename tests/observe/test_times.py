"""Parts of an update add up to it, what is waited for is communication, useful arithmetic counts against the right peak."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from train.config.stage import TrackingConfig
from train.model.memory import Setup
from train.observe.cards import card_of
from train.observe.metrics import read_metrics
from train.observe.times import Times, Work, open_times, open_work, peak_bytes
from train.recipe.order import Tile
from train.testing.loop import SMALL_BATCH, advance, tiny_session

CPU = torch.device("cpu")


def tile(width: int, height: int, images: int) -> Tile:
    rows = np.arange(images)
    return Tile(width, height, 0, rows, rows.astype(np.uint64), rows)


def test_a_run_measures_every_nth_update_and_traces_three(tmp_path: Path) -> None:
    with tiny_session(tmp_path, *SMALL_BATCH, "tracking.times_every=3", "tracking.profile_at=1") as session:
        advance(session, 5)
        records = read_metrics(session.run.folder.metrics)
        trace = session.run.folder.path / "profile" / "step-00000001.json.gz"
    assert ["seconds" in record for record in records] == [True, False, False, True, False]
    for record in records[::3]:
        parts = record["seconds"]
        assert set(parts) == {"data", "forward_backward", "optimizer"}  # one process: nothing is summed
        assert all(spent > 0 for spent in parts.values())
        assert sum(parts.values()) <= 3 * 2 / record["images_per_s"] * 1.001  # 3 tiles of 2 images
        assert parts["forward_backward"] > parts["data"]
    assert all(record["tflops"] is record["mfu"] is None for record in records)  # not SDXL's own networks
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum("optimizer" in str(event.get("name", "")).lower() and event.get("ph") == "X" for event in events) >= 3
    assert any("convolution" in str(event.get("name", "")) for event in events)


class Waits(nn.Module):
    """Backward of 0.1 s, summed over processes by a collective of 0.3 s."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> torch.Tensor:
        total = (self.weight * 2).sum()
        total.register_hook(lambda gradient: time.sleep(0.1))
        return total


def test_what_ddp_is_waited_for_is_communication(tmp_path: Path) -> None:
    def slow(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        threading.Timer(0.3, lambda: done.set_result(bucket.buffer())).start()
        return done

    slow.__annotations__.clear()  # DDP compares them with its classes, and here they are text
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Waits())
        model.register_comm_hook(None, slow)
        times = Times(CPU, 1)
        times.begin(0)
        total = model()
        times.mark_before_sum(total)
        total.backward()
        times.mark("communication")
    finally:
        dist.destroy_process_group()
    found = times.seconds()
    assert found is not None
    assert 0.1 <= found["forward_backward"] < 0.3 <= found["communication"]


def test_only_measured_updates_are_marked_and_a_step_behind_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = Times(CPU, 10)
    times.begin(11)
    times.mark("data")
    assert times.seconds() is None
    with caplog.at_level(logging.WARNING):
        open_times(TrackingConfig(profile_at=3), tmp_path, CPU, 8, is_main=True)
    assert "profile_at: 3 lies behind" in caplog.text


def test_a_trace_of_a_run_that_ends_early_is_kept_and_one_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "file"):
        (tmp_path / "file").write_text("no folder")
        times = Times(CPU, profile_at=0, folder=folder)
        times.begin(0)
        torch.ones(2).sum()
        times.close()
    assert (tmp_path / "profile" / "step-00000000.json.gz").stat().st_size > 0


def test_useful_arithmetic_and_its_share_of_the_peak() -> None:
    setup = Setup(trains_text=False, optimizer="adafactor", precision="bf16")
    tiles = [tile(1024, 1024, 16), tile(1024, 1024, 32)]
    told = Work(setup, 2, 312.0).rates(tiles, 10.0)  # (20,624,058,449,920 + 333,484,830,720) x 48 / 10 s / 2 cards
    assert told["tflops"] == pytest.approx(50.298, abs=1e-3)
    assert told["mfu"] == pytest.approx(50.298 / 312, abs=1e-5)
    assert Work(setup, 2, None).rates(tiles, 10.0)["mfu"] is None
    assert Work(None, 1, 312.0).rates(tiles, 10.0) == {"tflops": None, "mfu": None}
    assert Work(setup, 1, 312.0).rates([tile(1000, 1000, 1)], 1.0)["tflops"] is None
    assert open_work(setup, CPU, 1).peak_tflops is None
    assert set(peak_bytes(CPU).values()) == {None}


def test_cards_are_found_by_what_their_driver_says() -> None:
    named = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 790, "NVIDIA H200": 790, "NVIDIA GeForce RTX 4090": 165}
    assert {name: getattr(card_of(name), "peak_tflops", None) for name in named} == named
    assert card_of("Tesla T4") is None
