"""Strict gradient sums: the same bits for 1, 2 and 4 processes, whatever the numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forked import run_ranks
from torch import nn

from train.base.errors import ExitCode, Halt
from train.optim import collectives
from train.optim.collectives import BinaryCounter, FlatGradients, pair_groups, reduce_pairwise
from train.recipe.order import check_strict_world, virtual_ranks


def gradient(tile: int, size: int = 1000) -> torch.Tensor:
    """Numbers of very different magnitude, so that any other order of additions shows in the bits."""
    generator = torch.Generator().manual_seed(tile)
    return torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 6, (size,), generator=generator)


def strict_sum(rank: int, world: int, tiles: int) -> str:
    """sha256 of the sum of all tiles as the training makes it."""
    per_rank = tiles // world
    virtual_per_rank = check_strict_world(tiles, world)
    per_virtual = per_rank // virtual_per_rank
    groups = pair_groups(world)
    counter = BinaryCounter()
    for first in range(rank * per_rank, (rank + 1) * per_rank, per_virtual):
        partial = torch.zeros(1000)
        for tile in range(first, first + per_virtual):
            partial += gradient(tile)
        counter.push(partial)
    flat = counter.total()
    reduce_pairwise(flat, rank, groups)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("tiles", [4, 6, 8, 12])
def test_same_bits_for_every_world(tiles: int, tmp_path: Path) -> None:
    worlds = [w for w in (1, 2, 4) if w <= virtual_ranks(tiles)]
    found = {w: run_ranks(w, strict_sum, tmp_path / str(w), tiles) for w in worlds}
    assert len({digest for digests in found.values() for digest in digests}) == 1


def test_another_order_would_show() -> None:
    """The test data are sensitive: the plain order of sums gives other bits."""
    plain = torch.zeros(1000)
    for tile in range(8):
        plain += gradient(tile)
    assert hashlib.sha256(plain.numpy().tobytes()).hexdigest() != strict_sum(0, 1, 8)


def test_counter_is_the_balanced_tree() -> None:
    parts = [gradient(n) for n in range(4)]
    counter = BinaryCounter()
    for part in parts:
        counter.push(part.clone())
    assert torch.equal(counter.total(), (parts[0] + parts[1]) + (parts[2] + parts[3]))


@pytest.mark.parametrize(("tiles", "good"), [(6, (1, 2)), (12, (1, 2, 4)), (1, (1,)), (4, (1, 2, 4))])
def test_worlds_of_the_table(tiles: int, good: tuple[int, ...]) -> None:
    for world in (1, 2, 3, 4, 6):
        if world in good:
            assert check_strict_world(tiles, world) == virtual_ranks(tiles) // world
        else:
            with pytest.raises(Halt) as caught:
                check_strict_world(tiles, world)
            assert caught.value.code == ExitCode.MISMATCH
            assert ", ".join(map(str, good)) in caught.value.message


def test_gradients_live_in_the_flat_buffer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    model[0].to(memory_format=torch.channels_last)
    flat = FlatGradients(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 3, 4, 4)).sum().backward()
    flat.check()
    assert flat.flat.abs().sum() > 0
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert expected.abs().sum() == pytest.approx(flat.flat.abs().sum().item(), rel=1e-6)
    flat.zero()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model[2].weight.grad = None
    with pytest.raises(RuntimeError, match="left the flat buffer"):
        flat.check()


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
