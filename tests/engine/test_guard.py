"""Decisions before damage: what is recorded, what counts as a spike, whose weights differ."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.base.errors import ExitCode, Halt
from train.engine.step import bad_step, may_apply
from train.observe import tracker
from train.optim import collectives
from train.recipe.order import Tile
from train.storage import rundir


def tiles():
    def tile(number, rows):
        n = len(rows)
        return Tile(64, 96, number, np.array(rows), np.arange(n, dtype=np.uint64) + number, np.zeros(n, np.int64))

    return [tile(0, [3, 4]), tile(1, [7])]


def test_bad_step_is_json_and_exact(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s")
    losses = [float(np.float32(0.1)), float("nan"), float("-inf")]
    numbers = {"timesteps": np.array([1, 22, 333]), "losses": losses, "grad_norm": float("inf"), "scale": 2.0}
    halt = bad_step(run, step=7, updates=6, tiles=tiles(), **numbers)
    assert halt.code == ExitCode.NON_FINITE
    assert "update 7" in halt.message
    assert "0000000000000001@0 t 22 (nan)" in halt.message
    assert "t 1 (" not in halt.message
    back = json.loads((tmp_path / "bad_step.json").read_text(), parse_constant=pytest.fail)
    assert back["grad_norm"] == "inf"
    assert [s["loss"] for s in back["slots"]] == [losses[0], "nan", "-inf"]
    assert [(s["tile"], s["row"], s["t"]) for s in back["slots"]] == [(0, 3, 1), (0, 4, 22), (1, 7, 333)]
    run.close()


def test_only_rank_0_leaves_the_file(tmp_path):
    run = rundir.open_run_dir(tmp_path, "s", rank=1)
    halt = bad_step(
        run, step=1, updates=1, tiles=tiles(), timesteps=[0] * 3, losses=[0.0] * 3, grad_norm=float("nan")
    )
    assert "the gradient" in halt.message
    assert not (tmp_path / "bad_step.json").exists()


def test_spike_is_six_sigma_and_nothing_less():
    history = [1.0, 3.0] * 64  # mean 2, sample deviation sqrt(128/127)
    sigma = (128 / 127) ** 0.5
    assert tracker.spike_sigmas(history, 2 + 5.99 * sigma) is None
    assert tracker.spike_sigmas(history, 2 + 6.01 * sigma) == pytest.approx(6.01)
    assert tracker.spike_sigmas([100.0] * 50 + history, 2 + 6.01 * sigma) is not None  # only the last 128 count
    assert tracker.spike_sigmas(history[:7], 1e9) is None
    assert tracker.spike_sigmas(history, float("nan")) is None
    assert tracker.spike_sigmas([0.5] * 20, 0.5) is None
    assert tracker.spike_sigmas([0.0] * 20, 0.0) is None


def test_the_detector_remembers_128_losses_and_forgets_older_ones():
    detector = tracker.SpikeDetector([1.0, 1.1] * 10)
    assert detector.check(1.05) is None
    assert "sigma above the last 21" in detector.check(50.0)
    for _ in range(128):
        detector.check(1.0)
    assert len(detector.history) == 128
    assert detector.check(2.0) is not None


def test_ordinary_noise_gives_no_false_alarm():
    draw = random.Random(3)
    losses = [draw.gauss(0.1, 0.02) for _ in range(3000)]
    assert not [i for i in range(50, 3000) if tracker.spike_sigmas(losses[:i], losses[i])]


@pytest.mark.parametrize(
    ("losses", "norm", "expected"),
    [(True, 1.0, True), (False, 1.0, False), (True, float("inf"), False), (True, float("nan"), False)],
)
def test_weights_change_only_when_everything_is_finite(losses, norm, expected):
    assert may_apply(losses, norm) is expected


def test_a_checksum_sees_every_single_bit():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        tensor = (torch.rand(6) * 100).to(dtype)
        before = collectives.checksums({"t": tensor})
        raw = tensor.view(torch.uint8)
        for position in range(len(raw)):
            for bit in range(8):
                raw[position] ^= 1 << bit
                assert collectives.checksums({"t": tensor}) != before
                raw[position] ^= 1 << bit
    assert collectives.checksums({}).shape == (0,)
    assert collectives.checksums({"s": torch.tensor(1.0), "e": torch.zeros(0)}).tolist() == [0, 0x3F800000]


def test_one_process_has_no_peer_to_differ_from():
    collectives.check_replicas({"a": torch.ones(3)}, 1)


def _replica(rank: int, where: str, out) -> None:
    store = dist.FileStore(where, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    tensors = {"same": torch.arange(5.0), "zero": torch.tensor([0.0])}
    collectives.check_replicas(tensors, 1)
    if rank == 1:
        tensors["zero"] = torch.tensor([-0.0])  # equal as a number, other bits
    try:
        collectives.check_replicas(tensors, 2)
    except Halt as halt:
        out.put((rank, int(halt.code), halt.message))
    dist.destroy_process_group()


def test_two_processes_find_one_differing_bit(tmp_path):
    context = mp.get_context("fork")
    out = context.Queue()
    processes = [context.Process(target=_replica, args=(r, str(tmp_path / "store"), out)) for r in (0, 1)]
    for process in processes:
        process.start()
    found = sorted(out.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert [(rank, code) for rank, code, _ in found] == [(0, 9), (1, 9)]
    assert "1 of 2 tensors, such as zero" in found[0][2]
