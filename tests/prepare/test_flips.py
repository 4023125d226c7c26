"""Mirror images as second latents: which pictures have one, what it is, and when a visit shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import synthetic
import torch
from launches import launch
from oddimages import drawn, encoded
from preparedset import prepare, settings_of, write_vae
from safetensors.torch import load_file
from stages import Stage, result, state
from tilesets import SEED, make

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, LatentsConfig
from train.config.stage import load_stage
from train.data.index import Index
from train.data.shards import ShardReader
from train.diffusion.objective import Batch
from train.prepare.choosing.facts import facts_of
from train.prepare.encoding.encoder import Encoder, find_vae
from train.prepare.encoding.flips import forbidding_tags
from train.prepare.encoding.shard_plan import Slot
from train.prepare.images.looks import cut_one
from train.prepare.latents import _jobs
from train.prepare.tables.schemas import SELECT
from train.recipe import rng
from train.recipe.rng import Stream
from train.tools.estimate.images import find_images

TAGS = ["1girl, solo", "1girl, English_text", "1girl, Asymmetrical legwear", "1girl, speech bubble", "1girl, hat", "1girl, single sock", "1girl, dress"]
PLAIN = {f"a:{number}.png" for number in (0, 4, 6)}


def settings(folder: Path, **latents: Any) -> DatasetConfig:
    text = {"sources": [{"name": "a", "adapter": "sidecar", "path": str(folder / "a")}], "select": {"pretrain": {"min_bucket": 1}},
            "latents": latents}  # fmt: skip
    (folder / "dataset.yaml").write_text(json.dumps(text))
    return settings_of(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of a width that the crop does not halve, prepared without flips, then with them."""
    folder = tmp_path_factory.mktemp("flips")
    write_vae(folder / "vae")
    (folder / "a").mkdir()
    for number, tags in enumerate(TAGS):
        (folder / "a" / f"{number}.png").write_bytes(encoded(drawn(151, 128, seed=number), "PNG"))
        (folder / "a" / f"{number}.txt").write_text(tags)
    return folder


def test_turned_on_nothing_is_encoded_twice_and_tags_forbid(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = world / "data/set"
    prepare(settings(world))
    before = {path: path.stat().st_mtime_ns for path in (data / "latents").glob("*.safetensors")}
    plain = Index.open(data, "pretrain")
    assert not plain.flips.any()
    capsys.readouterr()
    prepare(settings(world, flip="all"))
    assert "flips of 3 pictures; 4 have none for their tags (asymmetrical legwear 1, english text 1, single sock 1, speech bubble 1)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    index = Index.open(data, "pretrain")
    assert {index.key(row) for row in np.flatnonzero(index.flips).tolist()} == PLAIN
    assert index.fingerprint == plain.fingerprint  # runs that draw none go on
    assert json.loads((data / "report.json").read_text())["counts"]["flips"] == {"pictures": 3, "without": 4}
    rows = pq.read_table(data / "index.parquet").to_pylist()
    assert [row["key"] for row in rows if row["flip"]] == sorted(PLAIN)
    for flip in (row for row in rows if row["flip"]):
        twin = next(row for row in rows if row["key"] == flip["key"] and not row["flip"])
        assert flip["crop_left"] + twin["crop_left"] == twin["resized_w"] - twin["bucket_w"]
        assert flip["crop_left"] != twin["crop_left"]
    # again with a list of one's own: the shipped one does not count then
    prepare(settings(world, flip="all", flip_not=["hat"]))
    assert Index.open(data, "pretrain").flips.sum() == 6
    prepare(settings(world, flip="all"))


def test_a_flip_is_the_latent_of_the_mirrored_picture(world: Path) -> None:
    config = settings(world, flip="all", content="mean")
    prepare(config)
    data = world / "data/set"
    index, reader = Index.open(data, "pretrain"), ShardReader(data)
    vae = find_vae(str(world / "vae"))
    from train.model.networks import fill

    encoder = Encoder(fill("vae", vae.config, vae.weights, vae.file), "fp32", "mean", "fp16", 0, torch.device("cpu"))
    keys = pq.read_table(data / "select_pretrain.parquet").column("key").combine_chunks()
    facts = facts_of(config, keys)
    for row in np.flatnonzero(index.flips).tolist():
        slot = Slot("", 0, index.key(row), 0, int(index.bucket_w[row]), int(index.bucket_h[row]))
        picture = cut_one(next(_jobs(config, [slot], facts)))
        assert isinstance(picture, np.ndarray)
        shard, place = index.latent(row, flip=True)
        (mirrored,) = encoder.encode([picture[:, ::-1]], [0])
        assert mirrored is not None
        torch.testing.assert_close(reader.read([shard], [place])[0], mirrored.float(), rtol=2e-3, atol=2e-3)
        assert not torch.equal(reader.read(*([one] for one in index.latent(row)))[0], reader.read([shard], [place])[0])
    prepare(settings(world, flip="all"))


def test_half_of_the_visits_are_mirrored_by_the_plans_counters(world: Path) -> None:
    data = world / "data/set"
    tiles, plain = make(data, 1, 2, flip=True), make(data, 1, 2)
    reader, shown = ShardReader(data), 0
    for step in range(tiles.plan.total_updates):
        for number, tile in enumerate(tiles.plan.update(step)):
            batch, other = tiles[step, number], plain[step, number]
            assert isinstance(batch, Batch) and isinstance(other, Batch)
            for slot, (row, uid, epoch) in enumerate(zip(tile.rows.tolist(), tile.uids.tolist(), tile.epochs.tolist(), strict=True)):
                mirrored = rng.words(SEED, Stream.FLIP, uid, epoch, 1)[0] < 2**31 and bool(tiles.index.flips[row])
                shard, place = tiles.index.latent(row, flip=mirrored)
                assert torch.equal(batch.latents_BCHW[slot], reader.read([shard], [place])[0] * 0.13025)
                size, twin = batch.size_B6[slot].tolist(), other.size_B6[slot].tolist()
                left = int(tiles.index.resized_w[row]) - tile.width - twin[3]
                assert size == (twin if not mirrored else [*twin[:3], left, *twin[4:]])
                assert torch.equal(batch.noise_BCHW[slot], other.noise_BCHW[slot])
                shown += mirrored
    visits = tiles.plan.total_updates * 2
    assert 0 < shown <= visits * 3 / 7
    uids = np.arange(4000, dtype=np.uint64)
    assert (rng.first_words(SEED, Stream.FLIP, uids, 0)[:, 0] < rng.threshold(0.5)).mean() == pytest.approx(0.5, abs=0.04)


def test_the_plan_counts_their_room(world: Path) -> None:
    yaml = synthetic.stage_yaml(world / "stage.yaml", data=world / "data/set", model="x", output=world / "run")
    small = ["batch.micro=1", "batch.effective=1"]
    images = load_stage([yaml], small).images
    w, h = synthetic_bucket(world)
    assert find_images(images, "pretrain", None).latents_bytes == (7 + 3) * 4 * (w // 8) * (h // 8) * 2


def synthetic_bucket(world: Path) -> tuple[int, int]:
    index = Index.open(world / "data/set", "pretrain")
    (size,) = set(zip(index.bucket_w.tolist(), index.bucket_h.tolist(), strict=True))
    return int(size[0]), int(size[1])


def mirrored(dataset: Path, folder: Path, every: int = 3) -> Path:
    """The tests' set with flips of all but every n-th picture."""
    shutil.copytree(dataset, folder, dirs_exist_ok=True)
    index = pq.read_table(folder / "index.parquet")
    shards = index.column("shard").to_pylist()
    for shard in set(shards):
        latents = load_file(folder / shard)["latents"]
        synthetic.write_shard(folder / shard.replace("-00000", "-00001"), latents.flip(-1).contiguous(), {"vae_id": "test"})
    none = [n % every == 0 for n in range(len(index))]
    rows = [-1 if no else row for no, row in zip(none, index.column("row").to_pylist(), strict=True)]
    index = index.append_column("flip_shard", [["" if no else shard.replace("-00000", "-00001") for no, shard in zip(none, shards, strict=True)]])
    index = index.append_column("flip_row", synthetic.pa.array(rows, synthetic.pa.int32()))
    chosen = pq.read_table(folder / "select_pretrain.parquet").cast(SELECT)
    synthetic.build_index(folder, index, {"pretrain": chosen}, {"vae_id": "", "content": "sample", "buckets": "t"})
    return folder


def test_a_set_without_flips_is_refused_and_so_is_a_resume_with_others(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "none", dataset, base_model)
    assert stage.run("data.flip=true") == ExitCode.MISMATCH
    assert "holds no mirror images: set latents.flip: all" in stage.message
    data = mirrored(dataset, tmp_path / "set")
    stage = Stage(tmp_path / "some", data, base_model)
    assert stage.run("data.flip=true", ANIX_FAULT="control@1:term") == ExitCode.STOPPED
    mirrored(dataset, data, every=2)
    assert stage.run("data.flip=true") == ExitCode.MISMATCH
    assert "plan" in stage.message
    mirrored(dataset, data)
    assert stage.run("data.flip=true", "max_updates=2") == ExitCode.DONE, stage.message


@pytest.mark.long
def test_flips_on_1_and_2_processes_and_after_a_kill(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    data = mirrored(dataset, tmp_path / "set")
    alone, killed, plain = (Stage(tmp_path / name, data, base_model) for name in ("alone", "killed", "plain"))
    changes = ("batch.determinism=strict", "data.flip=true")
    assert alone.run(*changes) == ExitCode.DONE, alone.message
    assert launch(killed, 2, *changes, fault="control@6:1:kill") != [0, 0]
    assert launch(killed, 2, *changes) == [0, 0], killed.message
    assert state(killed.output)["history"][1][0] > 0
    assert result(killed.output) == result(alone.output)
    assert plain.run(changes[0]) == ExitCode.DONE, plain.message
    assert result(plain.output)["trace"] == result(alone.output)["trace"]
    assert result(plain.output)["model.safetensors"] != result(alone.output)["model.safetensors"]


def test_patterns_and_what_is_no_list() -> None:
    shipped = forbidding_tags(LatentsConfig().flip_not)
    for tag in ("speech bubble", "english text", "asymmetrical gloves", "single thighhigh", "eyepatch"):
        assert shipped.fullmatch(tag), tag
    for tag in ("smile", "dress", "long hair", "texture", "singlet"):
        assert not shipped.fullmatch(tag), tag
    assert not forbidding_tags([]).fullmatch("")
    for bad in ("nowhere.yaml", [""], [3], {"a": 1}):
        with pytest.raises(Halt, match=r"latents\.flip_not") as caught:
            forbidding_tags(bad)
        assert caught.value.code == ExitCode.USAGE
