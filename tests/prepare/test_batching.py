"""Pictures go through a model as many at once as fit: halved and gone on, nothing lost, nothing done twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.prepare import ingest, probe, score
from train.prepare.encoding.batching import AUTO, Batches, own_device
from train.prepare.encoding.encoder import Encoder
from train.prepare.tables import units
from train.prepare.tables.schemas import AESTHETIC

MESSAGES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
)


class Holds:
    """A model that takes `most` pictures and notes what it was given."""

    def __init__(self, most: int, error: BaseException) -> None:
        self.most, self.error, self.runs = most, error, list[int]()

    def __call__(self, items: Sequence[int]) -> list[int]:
        if len(items) > self.most:
            raise self.error
        self.runs.append(len(items))
        return [2 * item for item in items]


@pytest.mark.parametrize("error", MESSAGES)
def test_auto_goes_on_with_half_and_remembers(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    batches, model = Batches("auto", "score.batch", "cuda"), Holds(20, error)
    assert batches.through(model, range(100)) == [2 * item for item in range(100)]
    assert model.runs == [16] * 6 + [4]  # 64 and 32 did not fit
    assert batches.through(model, range(17)) == [2 * item for item in range(17)]
    assert model.runs[7:] == [16, 1]
    said = capsys.readouterr().out
    assert "score.batch: 64 pictures at once do not fit the memory, going on with 32" in said
    assert batches.told("score").startswith("score: 117 images, ") and "16 at once" in batches.told("score")


def test_a_number_is_kept_and_one_that_does_not_fit_is_named() -> None:
    batches = Batches(8, "latents.batch", "cpu")
    with pytest.raises(Halt, match=r"latents.batch: 8 pictures at once .* set latents.batch: auto") as halt:
        batches.through(Holds(4, MemoryError("x")), range(8))
    assert halt.value.code == ExitCode.OUT_OF_MEMORY
    with pytest.raises(Halt, match=r"one alone does not fit: tag\.device: cpu"):
        Batches("auto", "tag.batch", "cpu").through(Holds(0, MemoryError("x")), range(AUTO["cpu"]))
    with pytest.raises(RuntimeError, match="shape"):  # another error is not taken for one of memory
        Batches("auto", "tag.batch", "cpu").through(Holds(0, RuntimeError("shape mismatch")), range(3))


def test_every_process_has_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("auto", 5).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert own_device("cpu", 3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [own_device(name, rank).index for name, rank in (("auto", 1), ("cuda", 6), ("cuda:0", 3))] == [1, 2, 0]


def test_the_fault_hook_stands_in_for_a_card_in_latents(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    encoder = Encoder(vae, "fp32", "mean", "fp16", 1, torch.device("cpu"))
    pictures = [np.full((16, 16, 3), 40 * number, np.uint8) for number in range(6)]

    def encode(part: Sequence[np.ndarray]) -> list[torch.Tensor | None]:
        return encoder.encode(part, list(range(len(part))))

    whole = encode(pictures)
    monkeypatch.setenv("ANIX_FAULT", "encode_vae@6:oom")
    batches = Batches("auto", "latents.batch", "cpu")
    halved = batches.through(encode, pictures)
    assert batches.size == 3 and "going on with 3" in capsys.readouterr().out
    assert all(torch.allclose(one, other, atol=1e-3) for one, other in zip(whole, halved, strict=True) if one is not None and other is not None)
    assert len(halved) == 6 and None not in halved


def test_the_fault_hook_stands_in_for_a_card_in_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        Image.new("RGB", (20, 10), (50 * number,) * 3).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("smile")
    settings = DatasetConfig(name="d", root=str(tmp_path / "out"), sources=[SourceConfig("s", "sidecar", str(tmp_path))], workers=0)
    ingest.run(settings)
    probe.run(settings)
    seen: list[int] = []

    def predict(images: list[Image.Image]) -> list[tuple[float]]:
        seen.append(len(images))
        return [(float(np.asarray(image).mean()),) for image in images]

    def row(key: str, value: float | None) -> dict[str, Any]:
        return {"key": key, "model": "m", "preproc_hash": "p", "score": value}

    monkeypatch.setenv("ANIX_FAULT", "predict@5:oom")
    step = units.Step(dataset_dir(settings), "aesthetic", AESTHETIC, "c", ("records", "probe"))
    score.run_model(settings, step, Batches("auto", "score.batch", "cpu"), predict, row, "score")
    assert seen == [2, 2, 1]
    scores = units.read_table(dataset_dir(settings), "aesthetic", ["score"])["score"].to_pylist()
    assert scores == [0.0, 50.0, 100.0, 150.0, 200.0]
    said = capsys.readouterr().out
    assert "going on with 2" in said and "score: 5 images, " in said and "images/s" in said
