"""scripts/show.py: the reports agree with the card's and the definition's rows, and --json prints JSON alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinysdxl
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode, Halt
from train.model import single_file
from train.model.text import size_vector
from train.tools.show import dispatch, inputs, model

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = (1024 * 1024, 512, 2048, 64)

ROWS = [  # size, bucket, resized, actual (top, left), kohya (top, left), original (h, w), target (h, w), kept
    ("1500x2000", "896x1152", "896x1195", [21, 0], [0, 16], [2000, 1500], [1152, 896], 0.964),
    ("1920x1080", "1344x768", "1365x768", [0, 10], [6, 0], [1080, 1920], [768, 1344], 0.985),
    ("2480x3508", "832x1216", "860x1216", [0, 14], [19, 0], [3508, 2480], [1216, 832], 0.967),
    ("1000x1000", "1024x1024", "1024x1024", [0, 0], [0, 0], [1000, 1000], [1024, 1024], 1.0),
    ("3000x1000", "1728x576", "1728x576", [0, 0], [0, 0], [1000, 3000], [576, 1728], 1.0),
    ("4096x512", "2048x512", "4096x512", [0, 1024], [128, 0], [512, 4096], [512, 2048], 0.5),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_buckets_of_the_table(row: tuple[Any, ...]) -> None:
    size, bucket, resized, actual, kohya, original, target, kept = row
    report = inputs.buckets(size, *DEFAULTS)
    assert (report["bucket"], report["resized"], report["buckets"]) == (bucket, resized, 33)
    assert report["crop_top_left"] == {"actual": actual, "kohya": kohya, "zero": [0, 0]}
    assert (report["original_hw"], report["target_hw"]) == (original, target)
    assert report["kept"] == pytest.approx(kept, abs=5e-4)
    width, height = map(int, size.split("x"))
    target_w, target_h = map(int, bucket.split("x"))
    assert report["time_ids"]["kohya"] == list(size_vector(width, height, *kohya, target_w, target_h))


@pytest.mark.parametrize("size", ["", "10", "0x5", "5x0", "axb", "-1x5", "1500x2000x3"])
def test_bad_sizes_are_refused(size: str) -> None:
    with pytest.raises(Halt, match="--size") as caught:
        inputs.buckets(size, *DEFAULTS)
    assert caught.value.code == ExitCode.USAGE


def test_model_report_of_every_kind(tmp_path: Path) -> None:
    folder = tinysdxl.write(tmp_path / "model")
    single_file.to_single_file(
        folder, tmp_path / "m.safetensors", metadata={"modelspec.license": "CC0", "x": "a\x1b[2J"}
    )
    for path, kind in ((folder, "folder"), (tmp_path / "m.safetensors", "single_file")):
        report = model.report(path)
        assert report["kind"] == kind
        assert report["architecture"] != "SDXL"
        assert report["networks"]["unet"]["dtypes"] == {"F32": report["networks"]["unet"]["tensors"]}
    assert (report["license"], report["training"]) == ("CC0", None)
    assert "\x1b" not in "\n".join(dispatch.lines(report))
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-8])
    with pytest.raises(Halt, match="truncated"):
        model.report(tmp_path / "bad.safetensors")
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, unet)
    with pytest.raises(Halt, match=r"not finite .* in 1 tensors: .*conv_in\.bias"):
        model.report(folder)


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "scripts/show.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_json_is_one_object_and_nothing_else() -> None:
    done = script("buckets", "--size", "1500x2000", "--json")
    assert json.loads(done.stdout)["bucket"] == "896x1152"
    assert done.stdout.count("\n") == 1
    assert script("buckets", "--size", "1500").returncode == ExitCode.USAGE


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` leaves it
    line = [sys.executable, str(ROOT / "scripts/show.py"), "buckets"]
    shown = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (shown.returncode, shown.stderr) == (0, "")


def test_json_stays_json_whatever_a_file_claims(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch.show({"updates": float("nan"), "title": "\ud800", "tag": "東"}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"updates": "NaN", "title": "\ud800", "tag": "東"}


def test_lines_nest_and_fold() -> None:
    report = {"short": [1, 2], "long": [{"a": "x" * 120}], "object": {"k": ["y" * 60, "z" * 60]}}
    assert list(dispatch.lines(report)) == [
        "short: [1, 2]", "long:", "  -", f"    a: {'x' * 120}", "object:", "  k:", f"    - {'y' * 60}", f"    - {'z' * 60}",
    ]  # fmt: skip
