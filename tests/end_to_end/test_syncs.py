"""Reads of device values by the host: none per micro-step, one per update, in every stage and with every option.

On a CPU nothing waits, so what is counted are the calls that would wait on a GPU.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import Stage, opened
from torch.utils._python_dispatch import TorchDispatchMode
from updates import one_update

from train.config.stage import load_stage
from train.engine.session import Session
from train.engine.step import compute_update
from train.testing.loop import micro_step_syncs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# What decides the work of a micro-step, taken over from the shipped stages.
KEYS = ("noise.offset", "loss.prediction", "optimizer.name", "model.train_text_encoders", "model.gradient_checkpointing",
        "data.max_tokens", "optimizer.max_grad_norm", "model.context")  # fmt: skip


def of_shipped(name: str) -> tuple[str, ...]:
    """Overrides that make the test's stage work like a shipped one, in bf16."""
    config = load_stage([CONFIGS / f"{name}.yaml"])
    values: dict[str, Any] = {}
    for key in KEYS:
        section, _, field = key.partition(".")
        values[key] = getattr(getattr(config, section), field)
    changes = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    if not config.model.train_text_encoders:
        changes.append("optimizer.text_encoder_lr=null")
    return ("precision=bf16", *changes)


CASES = {
    "pretrain": of_shipped("pretrain"),
    "ft1": of_shipped("ft1"),
    "ft2": of_shipped("ft2"),
    "fp32": (),
    "average": ("ema.decay=0.9",),
    "min-snr": ("loss.min_snr_gamma=5",),
    "debiased, v": ("loss.debiased=true", "loss.prediction=v", "loss.convert=true"),
    "huber": ("loss.type=huber",),
    "more noise": ("noise.multires_iterations=4", "noise.input_perturbation=0.1", "noise.offset=0.1"),
    "split": ("batch.split=2",),
    "strict": ("batch.determinism=strict",),
    "channels_last": ("model.channels_last=true",),
    "average per micro-batch": ("loss.average=micro_batches",),
    "bf16 weights": ("precision=bf16", "model.weights=bf16"),
}


QUICK = ("pretrain", "ft1", "ft2", "average", "min-snr", "bf16 weights")


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*CASES, "fp16")
])  # fmt: skip
def test_no_read_per_micro_step_and_one_per_update(
    name: str, base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*of_shipped("pretrain"), "precision=fp16") if name == "fp16" else CASES[name]
    with opened(Stage(tmp_path, dataset, base_model), *changes) as session:
        assert micro_step_syncs(session) == {}
        assert reads_of_one_update(session, monkeypatch) == {"cpu": 1}


def test_no_number_of_the_host_is_copied_after_the_last_tile(
    base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor made of the host's numbers reaches a card by a copy from pageable memory, which waits like a read."""
    made: list[str] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "lift_fresh" in str(func):
                made.append(str(func))
            return func(*args, **(kwargs or {}))

    with opened(Stage(tmp_path, dataset, base_model), *CASES["bf16 weights"]) as session, contextlib.ExitStack() as stack:

        def watch(point: str, *_: Any) -> None:
            if point == "control":
                stack.enter_context(Made())

        monkeypatch.setattr("train.base.faults.at", watch)
        assert one_update(session).losses_finite
        torch.tensor([1.0])
    assert len(made) == 1, "the last line's, which shows that it is seen"


class Host(torch.Tensor):
    """What `.cpu()` gave: reading it again costs nothing."""


class Reads(TorchDispatchMode):
    """Counts values read from tensors that did not come through `.cpu()`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def note(self, name: str) -> None:
        self.found[name] = self.found.get(name, 0) + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select")) and not isinstance(
            args[0], Host
        ):
            self.note(name)
        return func(*args, **(kwargs or {}))


def reads_of_one_update(session: Session, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """By kind, from the first tile to the clipped gradients and the agreed control vector."""
    tiles = session.data.plan.update(0)
    batches = list(session.data.loader.next_update())
    reads, original = Reads(), torch.Tensor.cpu

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        reads.note("cpu")
        return original(tensor).as_subclass(Host)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with reads:
        outcome = compute_update(
            session.trained.gradients, iter(batches), diffusion=session.trained.diffusion, scale=session.trained.scale,
            images=sum(len(tile.rows) for tile in tiles), tiles_here=len(tiles), tiles_in_update=len(tiles), step=0,
            max_grad_norm=1.0, stop_asked=lambda: False,
        )  # fmt: skip
    monkeypatch.undo()
    assert outcome.losses_finite and outcome.grad_norm > 0
    return reads.found


def test_the_count_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(3.0)
    with Reads() as reads:
        tensor.sum().item()
        float(tensor.as_subclass(Host)[1])
    assert reads.found == {"aten._local_scalar_dense.default": 1}
