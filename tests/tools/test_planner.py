"""plan.py: learning rates of the recipe to all digits, whole plans for the shipped configs, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import synthetic

from train.base.errors import ExitCode, Halt
from train.config.derived import Start
from train.config.stage import load_stage
from train.recipe.order import Plan
from train.tools.estimate import estimate, machines, page
from train.tools.estimate import images as plan_images
from train.tools.estimate.estimate import Request
from train.tools.estimate.images import Images

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
UPDATES = (0, 1, 4549, 4550, 9098, 9099, 90989)
A100 = Request(gpu="A100")


def stage(name: str, *overrides: str) -> Start:
    return load_stage([CONFIGS / name], overrides).start


@pytest.mark.parametrize(
    ("config", "rates", "cycles"),
    [
        (
            "pretrain.yaml",
            (
                "1e-06",
                "9.99999973e-06",
                "5.50077685e-06",
                "5.49922315e-06",
                "1.00000027e-06",
                "9e-06",
                "1.00000009e-06",
            ),
            (0, 0, 0, 0, 0, 1, 9),
        ),
        (
            "as_run/pretrain.yaml",
            (
                "1e-06",
                "9.99999893e-06",
                "1.00000027e-06",
                "8.99999976e-06",
                "1.00000095e-06",
                "8.1e-06",
                "1.00000004e-06",
            ),
            (0, 0, 0, 1, 1, 2, 19),
        ),
    ],
)
def test_learning_rates_of_the_recipe(config: str, rates: tuple[str, ...], cycles: tuple[int, ...]) -> None:
    plan = estimate.plan_stage(stage(config), Request(updates=UPDATES, gpu="A100"))
    assert plan["images"] == 873_504
    assert plan["images_source"] == "assumed: card"
    assert plan["updates_per_epoch"] == 9_099
    assert plan["total_updates"] == 90_990
    assert [f"{row['lr']:.9g}" for row in plan["lr"]] == list(rates)
    assert [row["text_encoder_lr"] for row in plan["lr"]] == [row["unet_lr"] for row in plan["lr"]]
    assert [row["cycle"] for row in plan["lr"]] == list(cycles)


def test_command_line_prints_one_json_object() -> None:
    command = [sys.executable, "scripts/plan.py", "--config", "configs/pretrain.yaml", "--json", "--gpu", "A100"]
    done = subprocess.run([*command, "--updates", "0,9099"], cwd=ROOT, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert [row["lr"] for row in plan["lr"]] == pytest.approx([1e-6, 9e-6])
    assert plan["memory"]["fits"] is True
    no_torch = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train.tools.estimate.estimate, train.tools.estimate.page; "
    no_torch += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", no_torch], check=False).returncode == 0


def test_what_does_not_fit_exits_7_with_the_plan_printed(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/plan.py", "--config", "configs/ft1.yaml", "--json", "--gpu", "4090"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.MISMATCH
    assert "batch.split: auto" in done.stderr
    plan = json.loads(done.stdout)
    assert plan == json.loads((tmp_path / "o" / "plan.json").read_text())
    assert (plan["memory"]["fits"], plan["memory"]["modes"]["full"]) == (False, pytest.approx(65.3, abs=0.1))
    curve = ElementTree.parse(tmp_path / "o" / "lr.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    lines = curve.findall(f".//{name}polyline")
    assert (curve.tag, len(lines)) == (f"{name}svg", 1)
    assert len(lines[0].attrib["points"].split()) > 100
    assert "ft1: " in "".join(curve.itertext())


def test_finetune_plan() -> None:
    plan = estimate.plan_stage(stage("ft1.yaml"), Request(images=13_680, gpu="H200", updates=(0, 1, 50, 99, 100)))
    assert (plan["updates_per_epoch"], plan["total_updates"]) == (285, 2_850)
    assert [row["lr"] for row in plan["lr"]] == pytest.approx([0, 2e-8, 1e-6, 1.98e-6, 2e-6])
    assert plan["batch"] == {"micro": 48, "accumulation": 1, "processes": 1, "effective": 48, "tiles_per_update": 1}
    assert plan["disk"]["checkpoint_bytes"] == pytest.approx(11.3e9, rel=0.01)
    assert estimate.plan_stage(stage("ft2.yaml"), Request(images=13_680, gpu="A100"))["total_updates"] == 4_275


def test_time_cost_and_their_origin(tmp_path: Path) -> None:
    given = estimate.plan_stage(
        stage("pretrain.yaml"), Request(gpu="A100", world=2, images_per_s=3.37, price_per_hour=2.0)
    )
    assert given["time"]["source"] == "given"
    assert given["time"]["gpu_hours"] == pytest.approx(720, rel=0.001)  # the card's 15 days on two cards
    assert given["time"]["wall_hours"] == pytest.approx(360, rel=0.001)
    assert given["time"]["cost"] == pytest.approx(1440, rel=0.001)
    assert given["time"]["mfu"] == pytest.approx(0.235, abs=0.001)
    rows = [
        {"name": "ref_sdscripts", "stage": 1, "images_per_s": 20.0},
        {"name": "plain", "stage": 1, "images_per_s": 6.0, "gpu": "NVIDIA A100"},
        {"name": "cl", "stage": 1, "images_per_s": 8.0, "gpu": "NVIDIA A100"},
        {"name": "cl", "stage": 2, "images_per_s": 9.0},
        {"name": "none_8", "stage": 1, "images_per_s": None},
    ]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"variants": rows}))
    measured = estimate.plan_stage(stage("pretrain.yaml"), Request(gpu="A100", bench=bench))["time"]
    assert (measured["images_per_s_per_gpu"], measured["source"]) == (8.0, "measured: cl in bench.json, NVIDIA A100")
    rows += [{"name": "cl_compile", "stage": 1, "images_per_s": 12.0, "compile": True, "channels_last": True}]
    rows += [{"name": "compile", "stage": 1, "images_per_s": 11.0, "compile": True, "channels_last": False}]
    bench.write_text(json.dumps({"variants": rows}))
    for overrides, told in (
        (("model.compile=true",), (11.0, "measured: compile in bench.json, GPU unnamed")),
        (("model.compile=true", "model.channels_last=true"), (12.0, "measured: cl_compile in bench.json, GPU unnamed")),
        (("model.compile=true", "model.float8=true"), (11.0, "measured: compile in bench.json, GPU unnamed")),
    ):
        asked = estimate.plan_stage(stage("pretrain.yaml", *overrides), Request(gpu="A100", bench=bench))["time"]
        assert (asked["images_per_s_per_gpu"], asked["source"]) == told
    bench.write_text(json.dumps({"variants": [rows[-1]]}))
    other = estimate.plan_stage(stage("pretrain.yaml"), Request(gpu="A100", bench=bench))["time"]
    assert other["source"].endswith("this config differs in compile")
    expected = estimate.plan_stage(stage("pretrain.yaml"), A100)["time"]
    assert "nobody has measured" in expected["source"]
    assert "guess" in estimate.plan_stage(stage("pretrain.yaml"), Request(gpu="L40S", memory_gib=79))["time"]["source"]
    bench.write_text("[]")
    with pytest.raises(Halt, match=r"--bench"):
        estimate.plan_stage(stage("pretrain.yaml"), Request(gpu="A100", bench=bench))


def test_memory_by_part_and_mode() -> None:
    report = estimate.plan_stage(stage("pretrain.yaml"), A100)["memory"]
    assert report["total_gib"] == pytest.approx(67, abs=0.6)
    assert sum(report["parts_gib"].values()) == pytest.approx(report["total_gib"], abs=0.05)
    assert report["modes"]["off mid, down 2"] == pytest.approx(109, abs=0.6)
    assert len(report["activation_bytes_per_image"]) == 33
    assert report["activation_bytes_per_image"]["1024x1024"][0] == 662_618_752
    assert report["activation_bytes_per_image"]["832x1216"][5] == 8_516_973_312
    auto = stage("pretrain.yaml", "model.gradient_checkpointing=auto", "batch.split=auto")
    chosen = estimate.plan_stage(auto, Request(gpu="H200"))["memory"]
    assert (chosen["checkpointing"], chosen["split"], chosen["images_at_once"]) == ("none", 2, 8)


def test_shared_optimizer_state_and_the_average_are_counted() -> None:
    """12.6 GiB less on each of two cards; the checkpoint stays whole, and holds the average wherever that lies."""
    alone, shared = (
        estimate.plan_stage(stage("pretrain.yaml", f"optimizer.sharding={how}"), Request(gpu="A100", world=2))
        for how in ("none", "zero1")
    )
    parts = [plan["memory"]["parts_gib"]["optimizer"] for plan in (alone, shared)]
    assert parts[0] - parts[1] == pytest.approx(12.6, abs=0.05)
    assert alone["disk"]["checkpoint_bytes"] == shared["disk"]["checkpoint_bytes"]
    averaged = estimate.plan_stage(stage("pretrain.yaml", "ema.decay=0.999", "ema.device=cpu"), A100)
    assert averaged["disk"]["checkpoint_bytes"] - alone["disk"]["checkpoint_bytes"] == pytest.approx(13.5e9, rel=0.01)
    assert averaged["memory"]["parts_gib"]["ema"] == 0


def test_a_disk_that_is_known_is_held_against_the_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = {gb: estimate.plan_stage(stage("pretrain.yaml"), Request(gpu="A100", disk_gb=gb))["disk"] for gb in (300, 600)}
    assert [free[gb]["fits"] for gb in (300, 600)] == [False, True]  # 13 checkpoints of 40.5 GB, 14 GB of export
    assert estimate.plan_stage(stage("pretrain.yaml"), A100)["disk"]["fits"] is None, "another machine's disk"
    command = [sys.executable, "scripts/plan.py", "--config", "configs/pretrain.yaml", "--gpu", "A100", "--disk-gb", "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.MISMATCH
    assert "do not fit the disk" in done.stderr and "300 GB free" in done.stdout


def test_options_that_change_numbers_are_named_with_their_limit() -> None:
    told = estimate.plan_stage(stage("pretrain.yaml", "model.compile=true", "batch.split=2"), A100)["tolerances"]
    assert {key: limit["loss"] for key, limit in told.items()} == {"batch.split": 1e-6, "model.compile": 1e-5}
    assert estimate.plan_stage(stage("pretrain.yaml"), A100)["tolerances"] == {}


def test_held_out_repeats_are_left_out_as_in_the_stage(tmp_path: Path) -> None:
    from train.data.index import Index
    from train.data.selection import held_out

    data = synthetic.make_dataset(tmp_path / "set", (40, 24))
    start = stage("pretrain.yaml", f"data.path={data}", "data.select=pretrain", "batch.micro=2", "batch.effective=4",
                   "validation.share=0.3", "epochs=2", "batch.min_bucket=1")  # fmt: skip
    index = Index.open(data, "pretrain")
    expected = int((~held_out(index.uids, 0.3, index.images)).sum())
    assert plan_images.find_images(start.images, "pretrain", None).count == expected


def test_prepared_buckets_are_counted_merged_and_dropped() -> None:
    counts = {(832, 1216): 40, (1024, 1024): 21, (1216, 832): 3}
    widths = np.repeat([b[0] for b in counts], list(counts.values()))
    heights = np.repeat([b[1] for b in counts], list(counts.values()))
    start = stage("pretrain.yaml", "batch.micro=4", "batch.effective=8", "batch.remainder=drop", "checkpoint.every_steps=5")
    plan = Plan(np.arange(64), widths, heights, seed=1, tile_images=4, tiles_per_update=2, epochs=10, remainder="drop")
    images = Images(64, "here", counts, plan)
    report = estimate._bucket_report(start, images)
    assert report["images"] == {"832x1216": 40, "1024x1024": 21, "1216x832": 3}
    assert report["short"] == {}, "what `drop` drops makes no tile"
    assert "drop never trains the 3 images of buckets smaller than batch.micro (1216x832: 3)" in report["short_note"]
    assert report["dropped_per_epoch"] == 0 + 1 + 3
    assert plan_images.lengths(start.images.order, images) == (plan.updates_per_epoch, plan.total_updates) == (7, 75)
    disk = estimate._disk_report(start, estimate.memory.setup_of(start.running), images, 7, 75, None)
    assert disk["latents_bytes"] == 8 * (104 * 152 * 43 + 128 * 128 * 21)
    assert disk["permanent_checkpoints"] == 11  # past each of ten multiples of 7, and the end


def test_a_small_model_gets_no_prediction(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"block_out_channels": [32, 32, 64]}')
    start = stage("pretrain.yaml", f"model.init_from={tmp_path}")
    plan = estimate.plan_stage(start, A100)
    report = plan["memory"]
    assert (plan["time"], plan["disk"]["checkpoint_bytes"]) == (None, None)
    assert "pretrain" in page.describe(plan)
    assert report["fits"] is None
    assert "[32, 32, 64]" in report["note"]


@pytest.mark.parametrize(
    ("overrides", "request_", "code", "text"),
    [
        (["data.path=data/mine"], A100, ExitCode.MISMATCH, "--images"),
        ([], Request(images=50, gpu="A100"), ExitCode.MISMATCH, "batch.effective"),
        ([], Request(images=0, gpu="A100"), ExitCode.USAGE, "--images"),
        ([], Request(gpu="Voodoo2"), ExitCode.USAGE, "A100-80GB"),
        ([], Request(gpu="A100", world=4), ExitCode.MISMATCH, "valid numbers of processes are 1, 2, 3, 6"),
        ([], Request(gpu="A100", updates=(90_990,)), ExitCode.USAGE, r"0\.\.90989"),
        ([], Request(gpu="A100", images_per_s=0.0), ExitCode.USAGE, "--images-per-s"),
        (["epochs=30"], A100, ExitCode.USAGE, "min_lr"),
    ],
)
def test_refusals(overrides: list[str], request_: Request, code: ExitCode, text: str) -> None:
    with pytest.raises(Halt, match=text) as halt:
        estimate.plan_stage(stage("pretrain.yaml", *overrides), request_)
    assert halt.value.code == code


def test_gpu_names_and_the_one_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machines.find_gpu("h200", None)[0].free_gib == 139
    assert machines.find_gpu("A100", 38.5)[0].free_gib == 38.5
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 23552'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    gpu, how = machines.find_gpu(None, None)
    assert (gpu.name, gpu.free_gib, gpu.peak_tflops, how) == ("NVIDIA GeForce RTX 4090", 23.0, 165, "present")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machines.find_gpu(None, None)[1].startswith("assumed")


# --- what a machine reports, what a benchmark file says, what makes no sense -------------------------------


@pytest.mark.parametrize(
    ("reported", "peak"),
    [
        ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 5090", 210),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H200", 790), ("NVIDIA H100 80GB HBM3", 790), ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4080", None), ("NVIDIA RTX 6000 Ada Generation", None), ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_the_card_present_gets_its_own_peak_or_is_called_unknown(
    reported: str, peak: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "{reported}, 23800"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    gpu, how = machines.find_gpu(None, None)
    assert (gpu.name, how) == (reported, "present")
    assert ("unknown card" in gpu.peak_source) == (peak is None)
    assert gpu.peak_tflops == (peak or 312)


def test_a_card_that_nobody_knows_is_planned_for_with_its_memory() -> None:
    assert machines.find_gpu("V100", 31.0)[0].free_gib == 31
    with pytest.raises(Halt, match="--memory-gib"):
        machines.find_gpu("V100", None)


def bench_file(folder: Path, **row: object) -> Path:
    known = {"name": "plain", "stage": 1, "images_per_s": 9.8, "gpu": "NVIDIA H200", "strict": False, "dtype": "fp16",
             "optimizer": "adamw"}  # fmt: skip
    file = folder / "bench.json"
    file.write_text(json.dumps({"variants": [known, {**known, **row}]}))
    return file


def test_measured_speeds_name_the_other_card_and_take_the_row_most_alike(tmp_path: Path) -> None:
    file = bench_file(tmp_path, name="strict", strict=True, images_per_s=9.4)

    def source(gpu: str, *overrides: str) -> str:
        plan = estimate.plan_stage(stage("pretrain.yaml", *overrides), Request(gpu=gpu, bench=file))
        return f"{plan['time']['images_per_s_per_gpu']} {plan['time']['source']}"

    assert source("H200").startswith("9.8 measured: plain")
    assert "another card" not in source("H200")
    assert "another card than A100-80GB" in source("A100")
    assert source("H200", "batch.determinism=strict").startswith("9.4 measured: strict")
    assert "optimizer" in source("H200", "optimizer.name=adamw8bit")


@pytest.mark.parametrize(
    "text",
    ['{"variants": null}', '{"variants": [3]}', '{"variants": [{"stage": 1, "images_per_s": 3}]}', "[]",
     '{"variants": [{"name": "plain", "stage": 1, "images_per_s": "fast"}]}',
     '{"variants": [{"name": "plain", "stage": 1, "images_per_s": -4}]}',
     '{"variants": [{"name": "plain", "stage": 1, "images_per_s": NaN}]}',
     '{"tiny": true, "variants": [{"name": "plain", "stage": 1, "images_per_s": 10.0}]}'],
)  # fmt: skip
def test_a_file_that_is_no_measurement_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(Halt, match=r"bench\.json") as caught:
        estimate.plan_stage(stage("pretrain.yaml"), Request(gpu="H200", bench=tmp_path / "bench.json"))
    assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("flag", "asked"),
    [
        ("--world", Request(world=0)), ("--world", Request(world=-2)), ("--memory-gib", Request(memory_gib=float("nan"))),
        ("--memory-gib", Request(memory_gib=-1)), ("--disk-gb", Request(disk_gb=float("nan"))),
        ("--price-per-hour", Request(price_per_hour=-2)), ("--images-per-s", Request(images_per_s=float("inf"))),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_name_their_flag(flag: str, asked: Request) -> None:
    with pytest.raises(Halt, match=flag) as caught:
        estimate.plan_stage(stage("pretrain.yaml"), asked)
    assert caught.value.code == ExitCode.USAGE


def test_processes_that_training_refuses_are_refused_here() -> None:
    for world, override in ((3, "batch.determinism=strict"), (2, "batch.accumulation=5")):
        with pytest.raises(Halt) as caught:
            estimate.plan_stage(stage("pretrain.yaml", override), Request(gpu="A100", world=world))
        assert caught.value.code == ExitCode.MISMATCH


def test_counts_follow_what_training_does() -> None:
    held = estimate.plan_stage(stage("pretrain.yaml", "validation.share=0.1"), A100)
    assert held["updates_per_epoch"] == 786_154 // 96
    assert "validation.share" in held["images_source"]
    as_run = estimate.plan_stage(stage("as_run/pretrain.yaml"), A100)
    assert as_run["schedule"]["updates_per_restart"] == 4549.5
    assert {4550, 9099, 13649} <= {row["update"] for row in as_run["lr"]}
    assert "cycle of 4,549.5 updates" in page.describe(as_run)
    average = estimate.plan_stage(stage("pretrain.yaml", "ema.decay=0.999"), A100)
    none = estimate.plan_stage(stage("pretrain.yaml"), A100)
    assert average["disk"]["export_bytes"] == none["disk"]["export_bytes"] * 3 // 2
    assert estimate.plan_stage(stage("pretrain.yaml", "ema.decay=0"), A100)["memory"] == none["memory"]
    asked = ("model.gradient_checkpointing=none", "batch.split=2")
    told = estimate.plan_stage(stage("pretrain.yaml", *asked), Request(gpu="H200", memory_gib=139.0))["memory"]
    assert told["text_encoders_checkpointed"] is False
    with pytest.raises(Halt, match="a card with more memory is needed"):
        estimate.memory.choose(estimate.memory.Setup(False, "adafactor", "bf16", "bf16"), 1 << 33, [(1024, 1024)], 16)


def test_short_tiles_repeats_and_moments_are_counted_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = stage("pretrain.yaml", "batch.micro=4", "batch.effective=8", "batch.remainder=keep")
    plan = Plan(
        np.arange(22), np.full(22, 1024), np.full(22, 1024), seed=1, tile_images=4, tiles_per_update=2, epochs=10,
        remainder="keep",
    )  # fmt: skip
    seen = sum(len(tile.rows) for update in range(plan.total_updates) for tile in plan.update(update))
    images = Images(22, "here", {(1024, 1024): 22}, plan, 12_345)
    assert plan_images.visits(start.images.order, images, plan.updates_per_epoch, plan.total_updates) == seen == 220
    setup = estimate.memory.setup_of(start.running)
    assert estimate._disk_report(start, setup, images, 3, 30, None)["latents_bytes"] == 12_345
