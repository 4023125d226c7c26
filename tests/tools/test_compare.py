"""show.py compare: distance and cosine by block against literal changes of a model; every kind of model file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.model import single_file
from train.observe import anymodel
from train.tools.show import compare, dispatch

UNET = "unet/diffusion_pytorch_model.safetensors"


def changed(model: Path, out: Path, factor: float, only: str = "") -> Path:
    """`model` with the U-Net's tensors whose name holds `only` times `factor`."""
    shutil.copytree(model, out)
    tensors = load_file(model / UNET)
    save_file({name: t * factor if only in name else t for name, t in tensors.items()}, out / UNET)
    return out


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.conv_in.weight", "unet.conv_in"),
        ("unet.time_embedding.linear_1.bias", "unet.time_embedding.linear_1"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.weight", "unet.down_blocks.1.attentions.0"),
        ("unet.mid_block.resnets.1.conv1.weight", "unet.mid_block.resnets.1"),
        ("text_encoder.text_model.encoder.layers.11.mlp.fc1.weight", "text_encoder.layers.11"),
        ("text_encoder_2.text_model.embeddings.token_embedding.weight", "text_encoder_2.embeddings"),
        ("text_encoder_2.text_projection.weight", "text_encoder_2.text_projection"),
        ("vae.decoder.up_blocks.2.resnets.0.norm1.weight", "vae.decoder.up_blocks.2"),
    ],
)
def test_block_of(name: str, block: str) -> None:
    assert compare.block_of(name) == block


def test_distance_and_cosine_of_a_literal_change(base_model: Path, tmp_path: Path) -> None:
    """A = 1.5 B in one block: half of B's length apart, in the same direction; elsewhere the same bits."""
    report = compare.report(changed(base_model, tmp_path / "a", 1.5, "down_blocks.1"), base_model)
    moved = {name for name, block in report["blocks"].items() if block["distance"]}
    assert moved
    assert all(name.startswith("unet.down_blocks.1.") for name in moved)
    for name in moved:
        assert (report["blocks"][name]["distance"], report["blocks"][name]["cosine"]) == pytest.approx((0.5, 1.0), abs=1e-7)
    still = report["blocks"]["unet.conv_in"]
    assert (still["distance"], still["cosine"], still["equal"]) == (0.0, 1.0, "2 of 2")
    assert 0 < report["networks"]["unet"]["distance"] < 0.5
    assert report["networks"]["vae"]["distance"] == 0.0


def test_against_a_base_directions_count(base_model: Path, tmp_path: Path) -> None:
    up, down, far = (changed(base_model, tmp_path / n, f) for n, f in (("up", 1.25), ("down", 0.75), ("far", 1.5)))
    against = compare.report(up, down, base_model)["networks"]["unet"]
    assert (against["a_moved"], against["b_moved"]) == pytest.approx((0.25, 0.25), abs=1e-6)
    assert (against["distance"], against["cosine"]) == pytest.approx((2.0, -1.0), abs=1e-6)
    along = compare.report(up, far, base_model)["networks"]["unet"]
    assert (along["distance"], along["cosine"]) == pytest.approx((0.5, 1.0), abs=1e-6)
    # Without movement there is no direction.
    none = compare.report(up, base_model, base_model)["networks"]["unet"]
    assert (none["b_moved"], none["distance"], none["cosine"]) == (0.0, None, None)


def test_against_an_oracle_over_random_changes(base_model: Path, tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        folders.append(tmp_path / str(seed))
        shutil.copytree(base_model, folders[-1])
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(base_model / UNET)
        save_file({n: t + torch.randn(t.shape, generator=generator) for n, t in tensors.items()}, folders[-1] / UNET)
    a, b, c = (np.concatenate([t.numpy().ravel() for t in load_file(f / UNET).values()]).astype(np.float64) for f in folders)
    found = compare.report(*folders)["networks"]["unet"]
    length = np.linalg.norm
    assert found["distance"] == pytest.approx(length(a - b) / length(b - c), rel=1e-6)
    assert found["cosine"] == pytest.approx((a - c) @ (b - c) / length(a - c) / length(b - c), rel=1e-6)
    assert found["a_moved"] == pytest.approx(length(a - c) / length(c), rel=1e-6)
    assert "equal" not in found


def test_run_checkpoint_folder_and_single_file_are_one_model(straight: Path, base_model: Path, tmp_path: Path) -> None:
    """And a run under way is its newest sound checkpoint over what it started from."""
    under_way = tmp_path / "under_way"
    shutil.copytree(straight, under_way)
    (under_way / "DONE").unlink()
    shutil.rmtree(under_way / "model")
    last, before = sorted((under_way / "checkpoints").iterdir())[-1:-3:-1]
    for other in (last, under_way):
        found = compare.report(straight, other)
        assert found["networks"]["unet"]["distance"] == 0.0, other
        assert found["networks"]["vae"]["distance"] < 2**-11, other  # never trained: a finished run has it from its export
    for other in (straight / "model", straight / "pretrain.safetensors"):  # rounded to fp16
        distance = compare.report(straight, other)["networks"]["unet"]["distance"]
        assert 0 < distance < 2**-11, other
    from_start = compare.report(straight, base_model)
    assert from_start["networks"]["unet"]["distance"] > 1e-3
    with open(last / "model.safetensors", "ab") as file:
        file.write(b"x")
    assert anymodel.open_any(under_way).path == before.absolute()
    with pytest.raises(Halt, match="must not be used") as caught:
        compare.report(last, straight)
    assert caught.value.code == ExitCode.NO_CHECKPOINT


def test_refusals(straight: Path, base_model: Path, tmp_path: Path) -> None:
    from train.tools.tiny.model import write_model

    write_model(tmp_path / "other")
    with pytest.raises(Halt, match="two architectures") as caught:
        compare.report(base_model, tmp_path / "other")
    assert caught.value.code == ExitCode.MISMATCH
    with pytest.raises(Halt, match="nothing_here") as caught:
        compare.report(base_model, tmp_path / "nothing_here")
    assert caught.value.code == ExitCode.USAGE
    bad = load_file(base_model / UNET)
    bad["conv_in.bias"][0] = torch.nan
    shutil.copytree(base_model, tmp_path / "bad")
    save_file(bad, tmp_path / "bad" / UNET)
    with pytest.raises(Halt, match=r"conv_in.*not finite"):
        compare.report(base_model, tmp_path / "bad")
    lone = tmp_path / "lone" / "checkpoints"
    shutil.copytree(max((straight / "checkpoints").iterdir()), lone / "step-00000009")
    with pytest.raises(Halt, match="without its run"):
        compare.report(lone / "step-00000009", straight)


def test_as_text(base_model: Path, tmp_path: Path) -> None:
    single_file.to_single_file(base_model, tmp_path / "m.safetensors")
    lines = list(dispatch.lines(compare.report(tmp_path / "m.safetensors", base_model)))
    assert '    unet.conv_in: {"distance": 0.0, "cosine": 1.0, "equal": "2 of 2"}' in [f"  {line}" for line in lines]
