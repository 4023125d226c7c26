"""A tile as tensors: each slot against its definition, whatever plan it stands in; reads that fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from safetensors.torch import load_file
from tilesets import SEED, make

from train.base.errors import ExitCode, Halt
from train.config.stage import NoiseConfig
from train.data.dataset import TileDataset, _draw_moments, draw_options
from train.data.shards import write_shard
from train.diffusion.objective import Batch
from train.model.vae_file import LatentScale
from train.recipe import rng
from train.recipe.captions import draw
from train.recipe.order import Tile
from train.recipe.rng import Stream

TENSORS = ("latents_BCHW", "noise_BCHW", "timesteps_B", "ids_1_BN77", "ids_2_BN77", "size_B6")


def batch_of(dataset: TileDataset, step: int, number: int) -> Batch:
    found = dataset[step, number]
    assert isinstance(found, Batch), found
    return found


def slots(dataset: TileDataset) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """(uid, epoch) to the tensors of that slot, over the whole plan."""
    found = {}
    for step in range(dataset.plan.total_updates):
        for number, tile in enumerate(dataset.plan.update(step)):
            batch = batch_of(dataset, step, number)
            for i, key in enumerate(zip(tile.uids.tolist(), tile.epochs.tolist(), strict=True)):
                assert key not in found
                found[key] = {name: getattr(batch, name)[i] for name in TENSORS}
    return found


def test_latents_of_a_shifted_vae_are_shifted(dataset: Path) -> None:
    tiles = make(dataset, scale=LatentScale(0.5, mean=(-1.0, 0.0, 0.5, 2.0)))
    batch = batch_of(tiles, 0, 0)
    shard, place = tiles.index.latent(int(batch.tile.rows[0]))
    stored = load_file(dataset / shard)["latents"][place].float()
    wanted = torch.stack([(channel - mean) * 0.5 for channel, mean in zip(stored, (-1.0, 0.0, 0.5, 2.0), strict=True)])
    assert torch.equal(batch.latents_BCHW[0], wanted)


def test_a_slot_is_its_image_its_noise_and_its_caption(dataset: Path) -> None:
    tiles = make(dataset, noise=NoiseConfig(offset=0.0357), tag_dropout=0.3)
    options = draw_options(tiles.data, tiles.plan.total_updates)
    for step in (0, 3, 8):
        slot = 0
        for number, tile in enumerate(tiles.plan.update(step)):
            batch = batch_of(tiles, step, number)
            assert (batch.step, batch.tile.number, batch.substituted) == (step, tile.number, ())
            assert np.array_equal(batch.tile.uids, tile.uids)
            assert batch.slots_B.tolist() == list(range(slot, slot + len(tile.rows)))
            slot += len(tile.rows)
            for i, (row, uid, epoch) in enumerate(
                zip(tile.rows.tolist(), tile.uids.tolist(), tile.epochs.tolist(), strict=True)
            ):
                shard, place = tiles.index.latent(row)
                assert rng.uid_of(tiles.index.key(row)) == uid
                assert torch.equal(batch.latents_BCHW[i], load_file(dataset / shard)["latents"][place].float() * 0.13025)
                shape = tuple(batch.latents_BCHW.shape[1:])
                assert shape == (4, tile.height // 8, tile.width // 8)
                channel = rng.normals(SEED, Stream.NOISE_OFFSET, uid, epoch, (4,)).reshape(4, 1, 1)
                noise = rng.normals(SEED, Stream.NOISE, uid, epoch, shape) + np.float32(0.0357) * channel
                assert np.array_equal(batch.noise_BCHW[i].numpy(), noise)
                fixed, flex = draw(*tiles.index.caption(row), options, seed=SEED, uid=uid, epoch=epoch, update=step)
                content, _ = tiles.tokenizer.fit(fixed, flex, 225, "tag")
                ids_1, ids_2 = tiles.tokenizer.chunk_ids(content, 225)
                assert np.array_equal(batch.ids_1_BN77[i].numpy(), ids_1)
                assert np.array_equal(batch.ids_2_BN77[i].numpy(), ids_2)
                index = tiles.index
                assert batch.size_B6[i].tolist() == [index.orig_h[row], index.orig_w[row], index.crop_top[row],
                                                     index.crop_left[row], tile.height, tile.width]  # fmt: skip


def test_a_slot_does_not_depend_on_the_plan_around_it(dataset: Path) -> None:
    here = slots(make(dataset, 2, 4))
    for micro, tiles in ((1, 3), (3, 2), (6, 1)):
        there = slots(make(dataset, micro, tiles))
        both = here.keys() & there.keys()
        assert len(both) > 60
        for key in both:
            assert all(torch.equal(here[key][name], there[key][name]) for name in TENSORS)


def test_an_image_meets_other_noise_and_order_in_another_epoch(dataset: Path) -> None:
    found = slots(make(dataset))
    uids = {uid for uid, _ in found}
    for uid in uids:
        times = [found[uid, epoch] for epoch in range(3) if (uid, epoch) in found]
        assert len(times) >= 2
        assert not torch.equal(times[0]["noise_BCHW"], times[1]["noise_BCHW"])
        assert torch.equal(times[0]["latents_BCHW"], times[1]["latents_BCHW"])


def test_parts_hold_the_tile_in_order(dataset: Path) -> None:
    batch = batch_of(make(dataset, 6, 1), 0, 0)
    assert batch.parts(1) == [batch]
    for count, sizes in ((2, [3, 3]), (3, [2, 2, 2]), (4, [1, 2, 1, 2]), (9, [1] * 6)):
        parts = batch.parts(count)
        assert sorted(len(part.slots_B) for part in parts) == sorted(sizes)
        for name, tensor in batch.tensors().items():
            assert torch.equal(torch.cat([part.tensors()[name] for part in parts]), tensor)
        assert all(part.tile is batch.tile for part in parts)


@pytest.mark.parametrize("mode", ["zero", "kohya"])
def test_crop_conditioning_modes(mode: str, dataset: Path) -> None:
    plain, other = make(dataset), make(dataset, crop_conditioning=mode)
    for number in range(4):
        a, b = batch_of(plain, 0, number), batch_of(other, 0, number)
        assert torch.equal(a.size_B6[:, [0, 1, 4, 5]], b.size_B6[:, [0, 1, 4, 5]])
        if mode == "zero":
            assert not b.size_B6[:, 2:4].any()


def test_input_perturbation_changes_only_what_is_added(dataset: Path) -> None:
    plain = batch_of(make(dataset), 0, 0)
    other = batch_of(make(dataset, noise=NoiseConfig(input_perturbation=0.1)), 0, 0)
    assert torch.equal(plain.noise_BCHW, other.noise_BCHW)
    assert plain.input_noise_BCHW is None, "one tensor to pin and to copy where both are equal"
    assert "input_noise_BCHW" not in plain.tensors() and "input_noise_BCHW" in other.tensors()
    assert 0.05 < float((other.input_noise_BCHW - other.noise_BCHW).std()) < 0.15


def test_moments_give_a_fresh_sample_per_epoch() -> None:
    uids, epochs = np.arange(1, 401, dtype=np.uint64), np.zeros(400, dtype=np.int64)
    tile = Tile(64, 64, 0, np.zeros(400, dtype=np.int64), uids, epochs)
    mean = torch.full((400, 4, 8, 8), 2.0)
    moments = torch.cat([mean, torch.full_like(mean, -2.0)], dim=1)
    drawn = _draw_moments(moments, SEED, tile)
    assert drawn.mean() == pytest.approx(2.0, abs=0.01)
    assert drawn.std() == pytest.approx(float(np.exp(-1.0)), rel=0.01)
    assert torch.equal(drawn, _draw_moments(moments, SEED, tile))
    later = Tile(64, 64, 0, tile.rows, uids, epochs + 1)
    assert not torch.equal(drawn, _draw_moments(moments, SEED, later))
    wild = torch.cat([mean, torch.full_like(mean, 1e9)], dim=1)
    assert torch.isfinite(_draw_moments(wild, SEED, tile)).all()


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> Path:
    """The dataset with NaN in the latents of the 64x64 images in rows 3 and 4."""
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    shard = folder / "latents/64x64-00000.safetensors"
    latents = load_file(shard)["latents"].clone()
    latents[3, 1, 2, 5] = float("nan")
    latents[4] = float("inf")
    write_shard(shard, latents, {"vae_id": "test"})
    return folder


def test_an_unreadable_image_stops_with_its_shard_and_row(damaged: Path) -> None:
    tiles = make(damaged)
    refused = [tiles[step, number] for step in range(4) for number in range(4)]
    halts = [found for found in refused if isinstance(found, Halt)]
    assert halts
    assert {halt.code for halt in halts} == {ExitCode.MISMATCH}
    assert all("64x64-00000.safetensors row" in halt.message for halt in halts)
    assert {halt.message.split(" row ")[1].split()[0] for halt in halts} == {"3", "4"}
    assert {halt.message.split(": ")[0] for halt in halts} == {"test:64x64/3", "test:64x64/4"}
    assert all("data.on_read_error=substitute" in halt.message for halt in halts)


def test_a_substitute_is_the_next_image_of_the_bucket_under_the_slots_own_key(damaged: Path, dataset: Path) -> None:
    sound, mended = make(dataset), make(damaged, on_read_error="substitute")
    index = sound.index
    in_bucket = [row for row in range(len(index)) if (index.bucket_w[row], index.bucket_h[row]) == (64, 64)]
    by_uid = sorted(in_bucket, key=lambda row: int(index.uids[row]))
    bad = {f"test:64x64/{n}" for n in (3, 4)}
    replaced: set[str] = set()
    for step in range(sound.plan.total_updates):
        for number, tile in enumerate(sound.plan.update(step)):
            a, b = batch_of(sound, step, number), batch_of(mended, step, number)
            for name in TENSORS[1:]:
                assert torch.equal(getattr(a, name), getattr(b, name)), "noise, timestep and caption are the slot's"
            keys = [index.key(row) for row in tile.rows.tolist()]
            assert set(b.substituted) == bad & set(keys)
            replaced |= set(b.substituted)
            for i, row in enumerate(tile.rows.tolist()):
                place = row
                while index.key(place) in bad:
                    place = by_uid[(by_uid.index(place) + 1) % len(by_uid)]
                shard, at = index.latent(place)
                wanted = load_file(dataset / shard)["latents"][at].float() * 0.13025
                assert torch.equal(b.latents_BCHW[i], wanted)
    assert replaced == bad


def test_nothing_readable_left_is_a_refusal(damaged: Path) -> None:
    shard = damaged / "latents/64x64-00000.safetensors"
    write_shard(shard, torch.full((12, 4, 8, 8), float("nan"), dtype=torch.float16), {"vae_id": "test"})
    tiles = make(damaged, on_read_error="substitute")
    found = [tiles[0, number] for number in range(4)]
    halts = [halt for halt in found if isinstance(halt, Halt)]
    assert halts
    assert "64x64" in halts[0].message
    assert "test:64x64/" in halts[0].message
    assert "on_read_error" not in halts[0].message, "it is substitute already"


def test_latents_of_another_size_are_named(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(dataset, folder)
    write_shard(folder / "latents/64x64-00000.safetensors", torch.zeros(12, 4, 8, 16).half(), {"vae_id": "test"})
    tiles = make(folder)
    halts = [found for number in range(4) if isinstance(found := tiles[0, number], Halt)]
    assert halts
    assert halts[0].code == ExitCode.MISMATCH
    assert "64x64" in halts[0].message
    assert "prepare.py latents" in halts[0].message


def test_a_missing_shard_is_named(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(dataset, folder)
    (folder / "latents/64x96-00000.safetensors").unlink()
    tiles = make(folder)
    halts = [f for step in range(3) for n in range(4) if isinstance(f := tiles[step, n], Halt)]
    assert halts
    assert all("64x96-00000.safetensors" in halt.message for halt in halts)


def test_long_captions_are_cut_and_counted(tmp_path: Path) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (4,), buckets=((64, 64),))
    long = make(data, 2, 1, max_tokens=75)
    batch = batch_of(long, 0, 0)
    assert tuple(batch.ids_1_BN77.shape) == (2, 1, 77)
    assert batch.tags_dropped == 0
    wide = batch_of(make(data, 2, 1, max_tokens=225), 0, 0)
    assert tuple(wide.ids_1_BN77.shape) == (2, 3, 77)
    assert torch.equal(wide.ids_1_BN77[:, :1], batch.ids_1_BN77)


def test_stratified_timesteps_are_dealt_over_the_update_whoever_makes_its_tiles(dataset: Path) -> None:
    """The oracle: the slots of an update, ordered by their second word, get a part of [0, 1000) each; the first is the place in it."""
    tiles = make(dataset, noise=NoiseConfig(stratified=True))
    other = make(dataset, noise=NoiseConfig(stratified=True))  # of a process that makes the last tiles alone
    for step in range(tiles.plan.total_updates):
        plan = tiles.plan.update(step)
        found = torch.cat([batch_of(tiles, step, number).timesteps_B for number in range(len(plan))]).tolist()
        slots = [(int(uid), int(epoch)) for tile in plan for uid, epoch in zip(tile.uids, tile.epochs, strict=True)]
        words = [rng.words(SEED, Stream.TIMESTEP, uid, epoch, 2).tolist() for uid, epoch in slots]
        order = sorted(range(len(slots)), key=lambda slot: (words[slot][1], slots[slot][0]))
        wanted = [0] * len(slots)
        for part, slot in enumerate(order):
            wanted[slot] = ((part * 2**32 + words[slot][0]) // len(slots)) * 1000 >> 32
        assert found == wanted
        last = len(plan) - 1
        assert batch_of(other, step, last).timesteps_B.tolist() == wanted[-len(plan[last].rows) :]
