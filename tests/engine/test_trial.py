"""What is tried before the first update: every shape, once, without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stages import Stage, opened
from tilesets import make

from train.base.errors import ExitCode, Halt
from train.data.dataset import synthetic_part
from train.diffusion.objective import Batch
from train.engine import trial
from train.engine.trial import shapes_to_try


def test_the_card_tries_every_bucket_and_the_host_the_largest(dataset: Path) -> None:
    plan = make(dataset).plan
    on_card = shapes_to_try(plan, torch.device("cuda"))
    assert sorted(on_card) == [(64, 64), (64, 96), (96, 64)]
    assert on_card[-1] == (64, 64)
    assert shapes_to_try(plan, torch.device("cpu")) == on_card[:1]


def test_the_part_has_the_real_shapes_and_the_longest_caption(dataset: Path) -> None:
    tiles = make(dataset)
    real = next(b for n in range(4) if (b := tiles[0, n]).tile.width == 96)  # type: ignore[union-attr]
    part = synthetic_part(96, 64, 2, tiles.tokenizer, 225)
    for name, tensor in real.tensors().items():  # type: ignore[union-attr]
        assert part.tensors()[name].shape == tensor.shape, name
        assert part.tensors()[name].dtype == tensor.dtype, name
    eos = tiles.tokenizer.eos
    assert (part.ids_1_BN77 == eos).sum() == 2 * 3, "one end mark per chunk: no padding at all"
    assert torch.isfinite(part.noise_BCHW).all()


def test_it_leaves_nothing_behind(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    with opened(Stage(tmp_path, dataset, base_model)) as session:
        before = {name: p.detach().clone() for name, p in session.trained.parameters.items()}
        state = torch.get_rng_state()
        trial.check(session)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], p) for name, p in session.trained.parameters.items())
        assert all(p.grad is None or not p.grad.any() for p in session.trained.parameters.values())
        assert not session.trained.optimizer.state


def test_a_disk_that_will_be_too_small_is_a_warning_and_the_run_goes_on(
    base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Stage(tmp_path / name, dataset, base_model) for name in ("first", "second"))
    with caplog.at_level("WARNING", logger="anix"):
        assert first.run("max_updates=1") == ExitCode.DONE, first.message
        assert "kept for ever" not in caplog.text
        one = sum(file.stat().st_size for file in (first.output / "checkpoints/step-00000001").iterdir())
        monkeypatch.setattr("train.storage.space.free_bytes", lambda path: 4 * one)
        often = ("checkpoint.every_steps=1", "checkpoint.permanent_every_steps=1")
        assert second.run("max_updates=4", *often) == ExitCode.DONE, second.message
    assert "4 more checkpoints will be kept for ever (checkpoint.permanent_every_steps: 1)" in caplog.text


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_shape_that_does_not_fit_is_named(
    kind: type[Exception], base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_big(*_: object) -> None:
        raise kind("no more")

    monkeypatch.setattr(trial, "image_losses", too_big)
    with opened(Stage(tmp_path, dataset, base_model), "batch.split=2") as session:
        with pytest.raises(Halt, match=r"bucket \d+x\d+ with 1 images") as halted:
            trial.check(session)
        assert halted.value.code == ExitCode.OUT_OF_MEMORY


def test_out_of_memory_late_ends_with_its_code(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("max_updates=3", ANIX_FAULT="forward@1:oom") == ExitCode.OUT_OF_MEMORY
    assert "gradient_checkpointing" in stage.message


def test_a_stop_is_seen_between_two_buckets(
    base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, ...]] = []

    def losses(model: object, part: Batch, diffusion: object) -> torch.Tensor:
        tried.append(tuple(part.latents_BCHW.shape))
        session.run.stop.ask("SIGTERM")
        return torch.zeros(2, requires_grad=True)

    monkeypatch.setattr(trial, "shapes_to_try", lambda plan, device: list(plan.buckets))
    monkeypatch.setattr(trial, "image_losses", losses)
    with opened(Stage(tmp_path, dataset, base_model)) as session:
        assert len(session.data.plan.buckets) > 1
        trial.check(session)
        assert len(tried) == 1
