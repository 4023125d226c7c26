"""Stages over buckets smaller than a tile: one picture, three, forty; the mean over images; the same on two processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import synthetic
import torch
from launches import launch
from stages import Stage, opened, result, state
from updates import gradients, one_update, relative

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.data.index import Index
from train.data.selection import make_plan, open_selection, short_tiles_note
from train.diffusion.objective import Batch, image_losses
from train.engine import trial
from train.model import memory
from train.model.memory import GIB
from train.recipe.order import plan_fingerprint
from train.tools.estimate import estimate
from train.tools.estimate import images as plan_images

BUCKETS = ((64, 64), (64, 96), (96, 64))
CARD = ("batch.micro=48", "batch.effective=48")  # ft1 and ft2


def seen(stage: Stage) -> Counter[str]:
    """Visits of each image, by uid."""
    return Counter(line.split()[2] for line in (stage.output / "trace.txt").read_text().splitlines())


@pytest.mark.parametrize(("counts", "per_epoch"), [((1,), 1), ((2, 1), 2), ((20, 14, 6), 3)])
def test_one_picture_three_or_forty_train_with_the_shipped_keys(
    counts: tuple[int, ...], per_epoch: int, base_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = synthetic.make_dataset(tmp_path / "set", counts, buckets=BUCKETS)
    stage = Stage(tmp_path, data, base_model, "ft1")
    with caplog.at_level("INFO", logger="anix"):
        assert stage.run(*CARD, "epochs=2", "checkpoint.every_steps=100") == ExitCode.DONE, stage.message
    visits = seen(stage)
    assert (len(visits), set(visits.values())) == (sum(counts), {2})
    lines = synthetic.metrics(stage.output)
    assert len(lines) == 2 * per_epoch
    assert [line["epoch"] for line in lines] == [0] * per_epoch + [1] * per_epoch
    assert lines[-1]["images"] == 2 * sum(counts)
    assert f"{len(counts)} of {len(counts)} buckets hold fewer images than a tile, 48 (batch.micro)" in caplog.text
    weighs = {1: None, 2: "a picture in a smaller one weighs 2 times as much as one in the largest, of 2",
              3: "a picture in a smaller one weighs 1.43 to 3.33 times as much as one in the largest, of 20"}[len(counts)]  # fmt: skip
    assert (weighs or "short tile an epoch") in caplog.text
    assert ("weighs" in caplog.text) == (weighs is not None), "a single tile has nothing to outweigh"


@pytest.mark.parametrize("changes", [(), ("batch.split=2",), ("batch.determinism=strict",), ("batch.split=4", "batch.determinism=strict")])
def test_an_update_with_a_short_tile_is_the_mean_over_its_images(
    changes: tuple[str, ...], base_model: Path, tmp_path: Path
) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (4, 3, 1), buckets=BUCKETS)
    with opened(Stage(tmp_path, data, base_model), "batch.micro=4", "batch.effective=12", *changes) as session:
        assert sorted(len(tile.rows) for tile in session.data.plan.update(0)) == [1, 3, 4]
        session.trained.gradients.clear()
        for number in range(3):
            batch = session.data.loader.dataset[0, number]
            assert isinstance(batch, Batch)
            (image_losses(session.trained.gradients.model, batch, session.trained.diffusion).sum() / 8).backward()
        wanted = gradients(session)
        outcome = one_update(session)
        assert len(outcome.losses_G) == 8
        assert (outcome.losses_G > 0).all(), "every image's loss arrives in its own slot"
        assert relative(gradients(session), wanted) < 1e-6


def test_each_shape_is_tried_with_as_many_images_as_its_tiles_have(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: dict[tuple[int, int], int] = {}

    def losses(model: object, part: Batch, diffusion: object) -> torch.Tensor:
        tried[part.tile.width, part.tile.height] = len(part.latents_BCHW)
        return torch.zeros(1, requires_grad=True)

    monkeypatch.setattr(trial, "image_losses", losses)
    data = synthetic.make_dataset(tmp_path / "set", (9, 3, 1), buckets=BUCKETS)
    shapes = trial.shapes_to_try
    with opened(Stage(tmp_path, data, base_model), "batch.micro=4", "batch.effective=4", "batch.split=2") as session:
        assert shapes(session.data.plan, torch.device("cuda")) == [(64, 96), (64, 64), (96, 64)], "3 images of 64x96 are more than 4"
        assert shapes(session.data.plan, torch.device("cpu")) == [(64, 96)]
        monkeypatch.setattr(trial, "shapes_to_try", lambda plan, device: shapes(plan, torch.device("cuda")))
        trial.check(session)
    assert tried == {(64, 64): 2, (64, 96): 2, (96, 64): 1}


def test_memory_is_planned_for_the_tiles_that_there_are() -> None:
    config = load_stage([Path(__file__).parents[2] / "configs/ft1.yaml"], ["batch.split=12"])
    whole = memory.settle(config.running, 139 * GIB, [(1024, 1024)])
    assert memory.settle(config.running, 139 * GIB, [(1024, 1024)], tile_images=48) == whole
    short = memory.settle(config.running, 139 * GIB, [(1024, 1024)], tile_images=5)  # 12 parts of at most 1 image
    assert short.prediction.activations == whole.prediction.activations // 4
    auto = load_stage([Path(__file__).parents[2] / "configs/ft1.yaml"], ["batch.split=auto", "model.gradient_checkpointing=auto"])
    assert memory.settle(auto.running, 46 * GIB, [(1024, 1024)], tile_images=1).split == 1


def test_what_the_start_says(base_model: Path, tmp_path: Path) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (16, 4, 2), buckets=BUCKETS)
    stage = Stage(tmp_path, data, base_model, "ft1")

    def note(*changes: str) -> str | None:
        images = load_stage([stage.yaml], list(changes)).images
        return short_tiles_note(images, open_selection(images).plan)

    assert note("batch.micro=2", "batch.effective=2") is None
    alone = note("batch.micro=8", "batch.effective=8") or ""
    assert "2 of 3 buckets hold fewer images than a tile, 8 (batch.micro)" in alone
    assert "64x96: 4, 96x64: 2" in alone
    assert alone.endswith("an update is one tile and averages over its images, so a picture in a smaller one weighs 2 to 4 times "
                          "as much as one in a full tile")  # fmt: skip
    assert "weighs" not in (note("batch.micro=8", "batch.effective=16") or "weighs")
    assert "micro_batches, so a picture" in (note("batch.micro=8", "batch.effective=16", "loss.average=micro_batches") or "")
    assert note("batch.micro=8", "batch.effective=8", "batch.remainder=keep") is None
    assert "never trains the 6 images" in (note("batch.micro=8", "batch.effective=8", "batch.remainder=drop") or "")


def test_a_number_refuses_smaller_buckets_and_null_takes_them(base_model: Path, tmp_path: Path) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (16, 4, 2), buckets=BUCKETS)
    stage = Stage(tmp_path, data, base_model)
    with pytest.raises(Halt, match=r"batch\.min_bucket is 4, .* 96x64 \(2 images\): set batch\.min_bucket=null") as halt:
        open_selection(load_stage([stage.yaml], ["batch.min_bucket=4"]).images)
    assert halt.value.code == ExitCode.MISMATCH
    for setting in ("batch.min_bucket=null", "batch.min_bucket=2"):
        assert open_selection(load_stage([stage.yaml], [setting]).images).plan.short_buckets == {(96, 64): 2}
    few = synthetic.make_dataset(tmp_path / "few", (3,), buckets=BUCKETS)
    with pytest.raises(Halt, match=r"3 images do not fill one update of 16 \(batch\.effective\): they make 1 of its 4 tiles"):
        open_selection(load_stage([stage.yaml], [f"data.path={few}"]).images)


def test_the_fingerprint_of_a_plan_that_does_not_change_is_that_of_before(base_model: Path, tmp_path: Path) -> None:
    """c93b03a wrote micro where batch.min_bucket is null; a plan with short tiles is another one than it made."""
    data = synthetic.make_dataset(tmp_path / "set", (16, 8, 2), buckets=BUCKETS)
    for micro, version in ((2, 1), (4, 2)):
        with opened(Stage(tmp_path / str(micro), data, base_model), f"batch.micro={micro}", f"batch.effective={2 * micro}") as session:
            index = Index.open(data, "pretrain")
            facts = {"dataset": index.fingerprint, "selection": index.selection_hash,
                     "tokenizers": session.data.loader.dataset.tokenizer.identity()}  # fmt: skip
            expected = plan_fingerprint(
                seed=31, tile_images=micro, tiles_per_update=2, remainder="carry", min_bucket=micro, version=version, **facts
            )
            assert session.run.state["facts"]["plan"] == expected


def test_the_planner_counts_short_tiles(base_model: Path, tmp_path: Path) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (9, 3, 1), buckets=BUCKETS)
    stage = Stage(tmp_path, data, base_model)
    start = load_stage([stage.yaml], ["batch.micro=4", "batch.effective=8", "epochs=7"]).start
    order = start.images.order
    plan = make_plan(Index.open(data, "pretrain"), order)
    images = plan_images.find_images(start.images, "pretrain", None)
    assert plan_images.lengths(order, images) == (plan.updates_per_epoch, plan.total_updates) == (2, 15)
    visits = sum(len(tile.rows) for update in range(15) for tile in plan.update(update))
    assert abs(plan_images.visits(order, images, 2, 15) - visits) <= 8
    report = estimate._bucket_report(start, images)
    assert report["short"] == {"64x96": 3, "96x64": 1}
    assert estimate.plan_stage(start, estimate.Request())["schedule"]["cycle_updates"] == plan.cycle_updates == 3
    with pytest.raises(Halt, match=r"batch\.min_bucket is 4"):
        plan_images.find_images(load_stage([stage.yaml], ["batch.micro=4", "batch.effective=8", "batch.min_bucket=4"]).images, "pretrain", None)


@pytest.mark.slow
@pytest.mark.parametrize("determinism", ["fast", "strict"])
def test_a_stopped_run_over_short_tiles_goes_on_as_the_straight_one(
    determinism: str, base_model: Path, tmp_path: Path
) -> None:
    data = synthetic.make_dataset(tmp_path / "set", (7, 3, 1), buckets=BUCKETS)
    straight, stopped = (Stage(tmp_path / name, data, base_model) for name in ("straight", "stopped"))
    changes = ("batch.micro=4", "batch.effective=8", f"batch.determinism={determinism}", "epochs=4")
    assert straight.run(*changes) == ExitCode.DONE, straight.message
    assert stopped.run(*changes, ANIX_FAULT="control@2:term") == ExitCode.STOPPED
    assert stopped.run(*changes) == ExitCode.DONE, stopped.message
    assert result(stopped.output) == result(straight.output)
    assert state(stopped.output)["facts"] == state(straight.output)["facts"]
    assert set(seen(straight).values()) <= {3, 4, 5}


@pytest.mark.slow
def test_two_processes_with_tiles_of_different_size_equal_one(base_model: Path, tmp_path: Path) -> None:
    """The divisor is the number of images of the whole update, however they lie."""
    data = synthetic.make_dataset(tmp_path / "set", (7, 3, 1), buckets=BUCKETS)
    for determinism in ("strict", "fast"):
        alone, both = (Stage(tmp_path / determinism / name, data, base_model) for name in ("alone", "both"))
        changes = ("batch.micro=4", "batch.effective=8", f"batch.determinism={determinism}", "epochs=4")
        assert alone.run(*changes) == ExitCode.DONE, alone.message
        assert launch(both, 2, *changes) == [0, 0], both.message
        if determinism == "strict":
            assert result(both.output) == result(alone.output)
        else:
            assert result(both.output)["trace"] == result(alone.output)["trace"]
            for one, two in zip(synthetic.metrics(alone.output), synthetic.metrics(both.output), strict=True):
                assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
                assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
