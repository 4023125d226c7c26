"""Masks: from transparency or a folder to the shards beside the latents, to the batch and the loss; a set without is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import preparedset
import pytest
import torch
from losses import Says, batch
from oddimages import drawn
from PIL import Image
from preparedset import prepare, settings_of, write_vae
from stages import Stage
from tilesets import make

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig
from train.config.stage import LossConfig, NoiseConfig
from train.data.index import Index
from train.diffusion.noise import alphas_cumprod
from train.diffusion.objective import Batch, Diffusion, image_losses
from train.prepare.images.decode import means
from train.prepare.tables.quarantine import Complaint
from train.recipe.buckets import place


def test_the_masked_loss_is_the_mean_of_mask_times_error() -> None:
    """Predicted 0, 2 and 3 where the noise is 1: squares 1, 1 and 4 in 4 channels of 2 x 2 places."""
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.25]]]).unsqueeze(1)
    model = Says(torch.tensor([0.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 4, 2, 2))
    diffusion = Diffusion(alphas_cumprod(), NoiseConfig(), LossConfig(), "fp32")
    masked = replace(batch(None), masks_B1HW=masks)
    assert image_losses(model, masked, diffusion).tolist() == [1 / 4, 2.5 / 4, 4 * 0.25 / 4]
    weighed = replace(batch([2.0, 0.0, 0.5]), masks_B1HW=masks)
    assert image_losses(model, weighed, diffusion).tolist() == [2 / 4, 0.0, 0.5 * 4 * 0.25 / 4]
    huber = replace(diffusion, loss=LossConfig(type="huber", huber_c=0.5, huber_schedule="constant"))
    of_one, of_two = (2 * 0.5 * ((d * d + 0.25) ** 0.5 - 0.5) for d in (1, 2))
    torch.testing.assert_close(
        image_losses(model, masked, huber), torch.tensor([of_one / 4, 2.5 * of_one / 4, 0.25 * of_two / 4])
    )
    parts = [part.masks_B1HW for part in masked.parts(2)]
    assert [part.shape[0] for part in parts if part is not None] == [1, 2]
    assert torch.equal(torch.cat([part for part in parts if part is not None]), masks)


def test_a_mask_is_cut_as_its_picture_is_and_averaged_over_the_places_of_the_latents() -> None:
    grey = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[None] * 8, 24, axis=0), "L")  # 32 x 24, columns rise by 8
    plain = means(grey, place(32, 24, (32, 24)))
    assert plain.shape == (3, 4)
    np.testing.assert_allclose(plain, np.tile(np.array([28, 92, 156, 220]) / 255, (3, 1)))  # of 0..56, 64..120, ...
    cropped = means(grey, place(32, 24, (24, 24)))  # 4 columns go on each side
    np.testing.assert_allclose(cropped, np.tile(np.array([60, 124, 188]) / 255, (3, 1)))
    double = means(grey.resize((64, 48), Image.Resampling.NEAREST), place(32, 24, (24, 24)))  # a mask of another size
    np.testing.assert_allclose(double, cropped)


def half(width: int, height: int, right: bool) -> np.ndarray:
    """White on one half, black on the other."""
    grey = np.zeros((height, width), np.uint8)
    grey[:, width // 2 :] = 255 * right
    grey[:, : width // 2] = 255 * (not right)
    return grey


def write(folder: Path) -> None:
    """Sources cut (transparent left halves, the third without), shaped (masks in a folder beside, one missing), plain."""
    write_vae(folder / "vae")
    for source in ("cut", "shaped", "plain"):
        (folder / source).mkdir()
        for number in range(4):
            picture = drawn(128, 128, seed=number + 10 * ord(source[0]))
            if source == "cut" and number != 2:
                picture.putalpha(Image.fromarray(half(128, 128, right=True), "L"))
            picture.save(folder / source / f"{number}.png")
            (folder / source / f"{number}.txt").write_text(f"1girl, tag {number}")
    (folder / "shaped/masks").mkdir()  # in the source itself: no pictures to train on
    for number in range(3):
        Image.fromarray(half(64, 64, right=False), "L").save(folder / f"shaped/masks/{number}.{('png', 'bmp', 'webp')[number]}", lossless=True)


def settings(folder: Path, masks: bool = True, **overrides: str) -> DatasetConfig:
    said = {"cut": "alpha", "shaped": str(folder / "shaped/masks")} if masks else {}
    sources = [
        {"name": name, "adapter": "sidecar", "path": str(folder / name)} | ({"mask": said[name]} if name in said else {})
        for name in ("cut", "shaped", "plain")
    ]
    (folder / "dataset.yaml").write_text(json.dumps({"sources": sources, "select": {"pretrain": {"min_bucket": 1}}}))
    return settings_of(folder, **overrides)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    write(folder)
    prepare(settings(folder))
    return folder


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    for name in ("vae", "cut", "shaped", "plain", "data"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def masks_of(data: Path) -> dict[str, np.ndarray]:
    """The mask that training gets of each picture, by key."""
    tiles, found = make(data), {}
    tiles.masked = True
    for step in range(tiles.plan.total_updates):
        for number in range(len(tiles.plan.update(step))):
            one = tiles[step, number]
            assert isinstance(one, Batch) and one.masks_B1HW is not None
            assert one.masks_B1HW.shape == (len(one.tile.rows), 1, *one.latents_BCHW.shape[2:])
            for row, mask in zip(one.tile.rows.tolist(), one.masks_B1HW, strict=True):
                found[tiles.index.key(row)] = mask[0].numpy()
    return found


def test_from_the_source_to_the_batch(world: Path) -> None:
    found = masks_of(world / "data/set")
    sides = {"left": [1.0] * 8 + [0.0] * 8, "right": [0.0] * 8 + [1.0] * 8, "all": [1.0] * 16}
    wanted = {f"cut:{n}.png": "all" if n == 2 else "right" for n in range(4)}
    wanted |= {f"shaped:{n}.png": "left" if n < 3 else "all" for n in range(4)} | {f"plain:{n}.png": "all" for n in range(4)}
    assert {key: mask.tolist() for key, mask in found.items()} == {
        key: [sides[side]] * 16 for key, side in wanted.items()
    }
    index = Index.open(world / "data/set", "pretrain")
    assert index.masked is not None and int(index.masked.sum()) == 6
    plain = make(world / "data/set")[0, 0]
    assert isinstance(plain, Batch) and plain.masks_B1HW is None, "without loss.mask none is read"


def test_a_mirror_image_has_its_mask_mirrored(copy: Path) -> None:
    prepare(settings(copy, **{"latents.flip": "all"}), "latents")
    tiles, seen = make(copy / "data/set", flip=True), set()
    tiles.masked = True
    plain = masks_of(copy / "data/set")
    for step in range(tiles.plan.total_updates):
        for number, tile in enumerate(tiles.plan.update(step)):
            one = tiles[step, number]
            assert isinstance(one, Batch) and one.masks_B1HW is not None
            for row, flip, mask in zip(tile.rows.tolist(), tiles._flips(tile), one.masks_B1HW.numpy(), strict=True):
                key = tiles.index.key(row)
                assert (mask[0] == (plain[key][:, ::-1] if flip else plain[key])).all()
                seen.add((key.split(":")[0], flip))
    assert {("cut", True), ("cut", False), ("shaped", True), ("shaped", False)} <= seen


def test_what_changes_with_a_mask(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = copy / "data/set"
    capsys.readouterr()
    prepare(settings(copy))
    said = capsys.readouterr().out
    assert "3 pictures of cut have a mask, 1 have none and count whole" in said
    assert "3 pictures of shaped have a mask, 1 have none and count whole" in said
    latents = {path: path.stat().st_mtime_ns for path in (data / "latents").glob("*.safetensors")}
    kept = {path: path.stat().st_mtime_ns for path in (data / "masks").glob("*.safetensors")}
    assert kept
    before = Index.open(data, "pretrain")
    images = dict(zip(map(before.key, range(12)), before.digests()[0].tolist(), strict=True))
    Image.fromarray(np.zeros((64, 64), np.uint8), "L").save(copy / "shaped/masks/0.png")
    prepare(settings(copy), "latents")
    assert "1 masks are black all over" in capsys.readouterr().out
    after = Index.open(data, "pretrain")
    changed = dict(zip(map(after.key, range(12)), after.digests()[0].tolist(), strict=True))
    assert [key for key in images if images[key] != changed[key]] == ["shaped:0.png"]
    assert after.fingerprint != before.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (data / "latents").glob("*.safetensors")} == latents
    prepare(settings(copy, masks=False))
    without = (data / "index.arrow").read_bytes()
    assert Index.open(data, "pretrain").masked is None
    shutil.rmtree(data)
    prepare(settings(copy, masks=False))
    assert (data / "index.arrow").read_bytes() == without, "a set without masks is as before there were any"


def test_a_mask_that_cannot_be_used_is_named(copy: Path) -> None:
    Image.fromarray(half(64, 90, right=True), "L").save(copy / "shaped/masks/0.png")
    (copy / "shaped/masks/1.bmp").write_bytes(b"BM no picture")
    for _ in range(2):  # the second time nothing is made, and it is said again
        with pytest.raises(Complaint, match="2 masks cannot be used") as told:
            prepare(settings(copy), "latents")
        assert told.value.code == ExitCode.MISMATCH
        assert "shaped:0.png: 0.png: the mask is 64x90, its picture 128x128: another shape" in told.value.message
        assert "shaped:1.png" in told.value.message
    Image.fromarray(half(64, 64, right=True), "L").save(copy / "shaped/masks/0.png")
    (copy / "shaped/masks/1.bmp").unlink()
    prepare(settings(copy), "latents")
    found = masks_of(copy / "data/set")
    assert found["shaped:0.png"][0].tolist() == [0.0] * 8 + [1.0] * 8
    assert found["shaped:1.png"].min() == 1


def test_two_processes_make_the_same_masks(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy / "data/set"
    one = {path.name: path.read_bytes() for path in (data / "masks").iterdir()}
    shutil.rmtree(data / "masks")
    chosen = settings(copy)
    monkeypatch.setattr(preparedset, "prepare", lambda settings: prepare(settings, "latents"))
    children = [preparedset._start(chosen, rank, 2) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert {path.name: path.read_bytes() for path in (data / "masks").iterdir()} == one


def test_another_picture_in_the_place_of_an_unreadable_one_brings_its_own_mask(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = make(copy / "data/set", on_read_error="substitute")
    tiles.masked = True
    cut = next(row for row in range(12) if tiles.index.key(row) == "cut:0.png")
    whole, lost = tiles.reader.read, tiles.index.latent(cut)

    def read(shards: Sequence[str], rows: Sequence[int]) -> torch.Tensor:
        if lost in zip(shards, rows, strict=True):
            raise Halt(ExitCode.MISMATCH, "gone")
        return whole(shards, rows)

    monkeypatch.setattr(tiles.reader, "read", read)
    step, number = next((step, number) for step in range(tiles.plan.total_updates)
                        for number, tile in enumerate(tiles.plan.update(step)) if cut in tile.rows)  # fmt: skip
    one = tiles[step, number]
    assert isinstance(one, Batch) and one.masks_B1HW is not None and one.substituted == ("cut:0.png",)
    at = one.tile.rows.tolist().index(cut)
    latents = {tiles.index.key(row): tiles.scale.to_model(whole(*([value] for value in tiles.index.latent(row)))) for row in range(12)}
    taken = next(key for key, latent in latents.items() if torch.equal(latent[0], one.latents_BCHW[at]))
    assert taken != "cut:0.png"
    assert (one.masks_B1HW[at, 0].numpy() == masks_of(copy / "data/set")[taken]).all()


def test_a_set_without_masks_refuses_the_key(copy: Path, tmp_path: Path) -> None:
    import tinysdxl

    prepare(settings(copy, masks=False))
    stage = Stage(tmp_path / "stage", copy / "data/set", tinysdxl.write(tmp_path / "model"))
    assert stage.run("loss.mask=true", "model.vae=" + str(copy / "vae")) == ExitCode.MISMATCH
    assert "loss.mask: no picture that this stage trains on has a mask" in stage.message


@pytest.mark.parametrize(("mask", "adapter", "told"), [
    ("nowhere", "sidecar", r"sources cut\.mask: nowhere does not exist"), ("pictures", "huggingface", "no names to look for"),
])  # fmt: skip
def test_a_mask_that_cannot_be_is_refused_before_the_work(tmp_path: Path, mask: str, adapter: str, told: str) -> None:
    from train.config.dataset import check_paths, load_settings

    text = {"name": "x", "sources": [{"name": "cut", "adapter": adapter, "path": str(tmp_path), "mask": mask}]}
    (tmp_path / "dataset.yaml").write_text(json.dumps(text))
    with pytest.raises(Halt, match=told):
        check_paths(load_settings([tmp_path / "dataset.yaml"]))
