"""Held-out images in real stages: no stage ever draws one, on any number of processes, and looking changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import torch
from launches import launch
from stages import Stage, opened, result
from torch.backends.cuda import flash_sdp_enabled, math_sdp_enabled, mem_efficient_sdp_enabled

from train.base.errors import ExitCode, Halt
from train.data.index import Index
from train.data.shards import ShardReader
from train.engine import loop, trial
from train.model import speed
from train.observe.heldout import FILE, leak
from train.prepare.tables.schemas import SELECT

# torch hides it itself, unless warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")

SHARE = "validation.share=0.3"
PROMPTS = "steps: 2\nprompts:\n  - {text: 1girl, width: 64, height: 64, seed: 3}\n"


@pytest.fixture(scope="module")
def curated(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with selections that shrink from stage to stage, as the recipe's do."""
    folder = tmp_path_factory.mktemp("curated") / "set"
    shutil.copytree(dataset, folder)
    index = pq.read_table(folder / "index.parquet")
    whole = pq.read_table(folder / "select_pretrain.parquet")
    selections = {"pretrain": whole, "ft1": whole.slice(0, 22), "ft2": whole.slice(4, 14)}
    selections = {name: table.cast(SELECT) for name, table in selections.items()}
    synthetic.build_index(folder, index, selections, {"vae_id": "", "content": "sample", "buckets": "t"})
    return folder


def drawn(stage: Stage, *overrides: str) -> tuple[set[int], set[int], int]:
    """(uids that the plan of a whole stage draws, uids held out, selected images)."""
    with opened(stage, SHARE, "epochs=4", *overrides) as session:
        steps = range(session.data.plan.total_updates)
        trained = {uid for step in steps for tile in session.data.plan.update(step) for uid in tile.uids.tolist()}
        held = set(session.observers.held_out.index.uids.tolist())
        return trained, held, len(trained | held)


def test_no_stage_draws_an_image_that_any_stage_holds_out(
    curated: Path, base_model: Path, tmp_path: Path
) -> None:
    found = {name: drawn(Stage(tmp_path / name, curated, base_model, name)) for name in ("pretrain", "ft1", "ft2")}
    assert [images for _, _, images in found.values()] == [26, 22, 14]
    held = set().union(*(one for _, one, _ in found.values()))
    assert held == found["pretrain"][1]
    assert 0 < len(held) < 26
    for trained, _, _ in found.values():
        assert not trained & held
    assert found["ft2"][1] < held


def test_every_stage_can_measure_the_images_of_the_last(curated: Path, base_model: Path, tmp_path: Path) -> None:
    last = drawn(Stage(tmp_path / "ft2", curated, base_model, "ft2"))[1]
    trained, held, _ = drawn(Stage(tmp_path / "pretrain", curated, base_model), "validation.select=ft2")
    assert held == last
    assert not trained & last
    with pytest.raises(Halt, match="no selection 'ft9'") as caught:
        drawn(Stage(tmp_path / "typo", curated, base_model), "validation.select=ft9")
    assert caught.value.code == ExitCode.MISMATCH


def test_a_predecessor_that_held_out_less_is_named(curated: Path, base_model: Path, tmp_path: Path) -> None:
    first = Stage(tmp_path, curated, base_model)
    first.output.mkdir(parents=True)
    (first.output / "config.yaml").write_text(first.yaml.read_text())
    second = Stage(tmp_path, curated, first.output, "ft1")
    second.output.mkdir(parents=True)
    (second.output / "config.yaml").write_text(second.yaml.read_text() + "validation: {share: 0.3}\n")
    share = float(SHARE.partition("=")[2])
    assert leak(second.output, 0.0) is None
    found = leak(second.output, share)
    assert found is not None
    assert str(first.output) in found
    folder, single = second.output / "model", second.output / "ft1.safetensors"  # handed on as files
    folder.mkdir()
    shutil.copy(second.output / "config.yaml", folder / "training.yaml")
    single.write_bytes(b"")
    for start in (folder, single):
        assert str(first.output) in (leak(start, share) or ""), start


def looked_at(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_that_look_train_the_same_bits_as_one_that_does_not(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    """Weights, trace and metrics: so the loss by timestep is the mean over both processes' images."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(PROMPTS)
    alone, looking, both = (Stage(tmp_path / name, dataset, base_model) for name in ("alone", "looking", "both"))
    changes = (SHARE, "batch.determinism=strict")
    look = ("validation.every_steps=4", "validation.at_start=true", "sampling.every_steps=4", "sampling.at_start=true",
            f"sampling.prompts={prompts}", "ema.decay=0.9")  # fmt: skip
    assert alone.run(*changes, "ema.decay=0.9") == ExitCode.DONE, alone.message
    assert looking.run(*changes, *look) == ExitCode.DONE, looking.message
    assert launch(both, 2, *changes, *look) == [0, 0], both.message
    assert result(looking.output) == result(both.output) == result(alone.output)
    assert looked_at(both.output) == looked_at(looking.output)
    assert looked_at(both.output)[0]["step"] == 0
    for step in ("step-00000000", "step-00000004"):
        assert sorted(path.name for path in (both.output / "samples" / step).iterdir()) == ["00-ema.png", "00.png", "grid.png"]
    held = json.loads((both.output / FILE).read_text())
    assert set(held) == set(looked_at(both.output)[0]["losses"])
    assert {one["key"].partition(":")[0] for one in held.values()} == {"test"}
    assert all(one["strata"][:3] == ["quality/masterpiece", "rating/safe", "year/newest"] for one in held.values())
    assert {one["strata"][3] for one in held.values()} <= set(looked_at(both.output)[0]["strata"])
    trained = {line.split()[2] for line in (both.output / "trace.txt").read_text().splitlines()}
    assert not trained & set(held)
    deciles = [value for line in synthetic.metrics(both.output) for value in line["loss_by_decile"] if value]
    assert deciles


def test_a_conversion_is_measured_where_it_starts_from_and_once(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    changes = (SHARE, "max_updates=2", "validation.every_steps=2", "loss.prediction=flow", "loss.convert=true")
    assert stage.run(*changes, ANIX_FAULT="control@0:term") == ExitCode.STOPPED, stage.message
    first = looked_at(stage.output)
    assert [record["step"] for record in first] == [0]
    shutil.rmtree(stage.output / "checkpoints")  # as if it had been killed before the first one
    assert stage.run(*changes) == ExitCode.DONE, stage.message
    found = looked_at(stage.output)
    assert [record["step"] for record in found] == [0, 2]
    assert found[0] == first[0]
    assert found[0]["strata"].keys() == found[1]["strata"].keys() >= {"timestep/000-249", "timestep/750-999"}
    assert found[0]["losses"] != found[1]["losses"]


@pytest.mark.parametrize("fault", ["optimizer@3:term", "sample@4:term", "export@*:term"])
def test_a_stop_at_the_end_leaves_the_last_look_to_the_next_start(
    fault: str, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(PROMPTS)
    stage = Stage(tmp_path, dataset, base_model)
    changes = (SHARE, "max_updates=4", "validation.every_steps=2", "sampling.every_steps=2",
               f"sampling.prompts={prompts}")  # fmt: skip
    assert stage.run(*changes, ANIX_FAULT=fault) == ExitCode.STOPPED, stage.message
    assert not (stage.output / "DONE").exists()
    assert stage.run(*changes) == ExitCode.DONE, stage.message
    assert {record["step"] for record in looked_at(stage.output)} == {2, 4}
    pictures = sorted(path.name for path in (stage.output / "samples" / "step-00000004").iterdir())
    assert pictures == ["00.png", "grid.png"]


def test_a_share_that_empties_a_bucket_is_named_and_not_the_preparation(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("validation.share=0.7", "batch.min_bucket=2") == ExitCode.MISMATCH
    assert "validation.share 0.7 leaves buckets with fewer images" in stage.message
    assert "batch.min_bucket=null" in stage.message
    assert "rerun prepare" not in stage.message


def test_an_image_that_trains_twice_an_epoch_is_measured_once(curated: Path, base_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(curated, folder)
    once = pq.read_table(folder / "select_pretrain.parquet").cast(SELECT)
    column = once.schema.get_field_index("repeats")
    twice = once.set_column(column, once.schema.field(column), pa.array([2] * len(once), pa.int16()))
    index = pq.read_table(folder / "index.parquet")
    meta = {"vae_id": "", "content": "sample", "buckets": "t"}
    found = {}
    for name, table in (("once", once), ("twice", twice)):
        synthetic.build_index(folder, index, {"pretrain": table}, meta)
        found[name] = drawn(Stage(tmp_path / name, folder, base_model))
    assert found["twice"][1] == found["once"][1]
    assert len(found["twice"][0]) == 2 * len(found["once"][0])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many graphs there are, with model.compile through a backend that runs each as it was traced."""
    monkeypatch.setattr(speed, "compile_blocks", partial(speed.compile_blocks, backend="eager"))
    torch._dynamo.reset()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
def test_looking_adds_no_graph_to_those_of_the_training(
    graphs: Callable[[], int], dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    """33 shapes of held-out batches, short ones among them, and a preview: each would cost graphs of the training's blocks."""
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(PROMPTS)
    shapes = [(64 + 32 * (n % 6), 64 + 32 * (n // 6)) for n in range(33)]
    other = synthetic.make_dataset(tmp_path / "set", [2 + n % 2 for n in range(33)], buckets=shapes)
    look = ("validation.every_steps=1", "sampling.every_steps=1", f"sampling.prompts={prompts}", "data.workers=0")
    one_tile = ("model.compile=true", "max_updates=1", "batch.micro=4", "batch.effective=4")
    with opened(Stage(tmp_path, dataset, base_model), SHARE, *one_tile, *look) as session:
        held_out = session.observers.held_out
        held_out.index, held_out.reader = Index.open(other, "pretrain"), ShardReader(other)
        loop.run_updates(session)
        trained = graphs()
        assert trained > 0
        loop.look_when_due(session, last=True)
        assert graphs() == trained
        (record,) = looked_at(session.run.folder.path)
        assert len(record["losses"]) == sum(2 + n % 2 for n in range(33))
        assert list((session.run.folder.path / "samples/step-00000001").glob("00.png"))


def test_one_choice_of_attention_for_what_is_tried_trained_and_looked_at(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(PROMPTS)
    look = ("validation.every_steps=1", "sampling.every_steps=1", f"sampling.prompts={prompts}", "data.workers=0")
    with opened(Stage(tmp_path, dataset, base_model), SHARE, "model.attention=math", "max_updates=1", *look) as session:
        seen: list[tuple[bool, ...]] = []
        parameters = session.trained.parameters.values()
        session.trained.gradients.model.unet.register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda *_: seen.append((flash_sdp_enabled(), mem_efficient_sdp_enabled(), math_sdp_enabled()))
        )
        gradients: list[int] = []
        steps = (trial.check, loop.run_updates, partial(loop.look_when_due, last=True))
        found = []
        for step in steps:
            step(session)
            found.append(set(seen))
            gradients.append(sum(p.grad is not None for p in parameters))
            seen.clear()
        assert found == [{(False, False, True)}] * 3, "preflight, training, held-out loss and previews"
        assert gradients == [0, len(parameters), 0], "their memory is given back before anything is looked at"
        assert flash_sdp_enabled()
