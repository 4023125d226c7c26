"""The report holds what the runs hold, survives what they lack, and reaches for nothing outside itself."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from browser import Browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.prompts import Prompt, PromptsFile, checked
from train.observe.pictures import write_pictures
from train.observe.runs import config_differences, read_parameters, read_pictures, read_run
from train.tools.report.charts import bar_chart, extent, line_chart, log_ticks, number, smooth, thin, ticks
from train.tools.report.heldout import held_out_section, in_order
from train.tools.report.page import axis, write_page
from train.tools.report.samples import comparison, shared_tags, spaced, strips

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "img"}
HUGE, DEEP = "9" * 400, "[" * 100_000
PROMPTS = checked(
    PromptsFile(
        prompts=[
            Prompt(text="1girl, <b>smile</b>", width=64, height=96, seed=1),
            Prompt(text="1boy", width=96, height=64),
        ],
        steps=2,
    )
)


class Checker(HTMLParser):
    """Fails on unbalanced tags; collects addresses and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text())
    assert not checker.open
    for address in checker.addresses:
        assert address.startswith(("#", "data:image/jpeg;base64,")), address
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    return checker


def make_run(folder: Path, stage: str, level: float, *, updates: int = 120) -> Path:
    """A run directory with everything a finished stage leaves that the report reads."""
    run = folder / stage
    run.mkdir(parents=True)
    lines = []
    for update in range(1, updates + 1):
        loss = level * (0.3 + math.exp(-update / 30)) + 0.01 * math.sin(update * 7)
        lines.append(
            {"step": update, "update": update, "epoch": update / 60, "images": update * 16, "loss": loss,
             "lr_unet": 1e-5 * min(1, update / 20), "lr_text_encoder": 1e-5 if stage == "pretrain" else None,
             "grad_norm": 1 + math.cos(update), "images_per_s": 40.0, "skipped": 0, "data_wait_s": 0.1,
             "loss_by_decile": [loss * (1 + d / 10) for d in range(10)]}
        )  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = {f"{uid:016x}": level * (1 + uid / 10) for uid in range(8)}
    record = {"step": updates, "update": updates, "images": 8, "loss": level, "interval": 0.01, "losses": held,
              "strata": {"quality/best quality": {"images": 4, "loss": level * 0.9, "interval": 0.02},
                         "timestep/000-249": {"images": 8, "loss": level / 4, "interval": 0.01}}}  # fmt: skip
    high = {"timestep/000-249": {"images": 8, "loss": level, "interval": 0.01}}
    first = {**record, "step": 60, "update": 60, "loss": level * 2, "strata": {**record["strata"], **high}}
    (run / "validation.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(record) + "\n")
    strata = {uid: {"key": uid, "strata": ["quality/best quality"] if uid < f"{4:016x}" else []} for uid in held}
    (run / "held_out.json").write_text(json.dumps(strata))
    config = (ROOT / "configs" / f"{stage}.yaml").read_text()
    (run / "config.yaml").write_text(config)
    parent = {"stage": None, "sha256": "ab" * 32, "title": "base & more"}
    (run / "lineage.json").write_text(json.dumps(
        {"stage": stage, "parent": parent, "weights_sha256": stage[0] * 64, "seed": 31, "updates": updates,
         "images": 1920, "license": "Fair AI Public License 1.0-SD", "code_revision": "c0ffee" * 6 + "beef"}
    ))  # fmt: skip
    (run / "DONE").write_text("{}")
    for update in (60, 120):
        shade = int(255 * min(level, 1))
        pictures = [Image.new("RGB", (64, 96), (shade, update, 90)), Image.new("RGB", (96, 64), (90, shade, update))]
        averaged = {"-ema": pictures} if stage == "ft2" else {}
        write_pictures({"": pictures, **averaged}, PROMPTS, run / "samples" / f"step-{update:08d}", model_name=stage, update=update)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder, stage, level) for stage, level in (("pretrain", 0.9), ("ft1", 0.5), ("ft2", 0.4))]


def test_three_stages(runs: list[Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_pictures({"": [Image.new("RGB", (64, 96))]}, PROMPTS, base, model_name="base")
    out = write_page(runs, tmp_path / "new" / "report.html", extra_samples={"base": base})
    checker = parsed(out)
    for words in (
        "Summary", "Stage comparison", "pretrain", "ft2", "best quality", "base & more", "cosine_restarts",
        "optimizer.unet_lr", "pretrain → ft1", "pretrain → ft2", "update 60", "1girl, <b>smile</b>", "Fair AI Public License 1.0-SD",
        "Time spent waiting for data, %", "not trained", "ft2 (EMA)", "update 120 (EMA)",
    ):  # fmt: skip
        assert words in checker.text, words
    assert "−0.5400 ± " in checker.text  # paired change 0.9 -> 0.5 over factors 1 to 1.7, and over the best four:
    assert "best quality−0.4600 ± 0.0822 (4)" in checker.text  # t of 3 degrees: 3.182 x 0.0516 / 2
    # 3 runs x 2 prompts x 2 updates in strips, ft2 with its average; comparison: base has the first prompt only
    assert checker.tags.count("img") == 12 + 4 + 5 + 4
    assert checker.tags.count("svg") == 3 * 6 + 3 + 3 + 3
    # of every run its held-out loss by timestep, first to last
    assert "0.9000 (update 60) → 0.2250 (update 120)0.5000 (update 60) → 0.1250 (update 120)" in checker.text
    assert "b" in checker.tags
    assert "<b>smile" not in out.read_text()


def test_pictures_come_first_then_held_out_loss_then_the_rest(runs: list[Path], tmp_path: Path) -> None:
    checker = parsed(write_page(runs, tmp_path / "r.html"))
    names = ["Stage comparison", "Held-out loss", "Summary", "Samples over time", "Curves", "Configuration"]
    places = [checker.text.rindex(name) for name in names]  # the last time: the heading, not the table of contents
    assert places == sorted(places)


def test_what_the_first_stage_starts_from_is_a_column_of_its_own(runs: list[Path], tmp_path: Path) -> None:
    """Pictures of update 0 stand before the stages, and are no stage's newest."""
    first = tmp_path / "pretrain"
    shutil.copytree(runs[0], first)
    shutil.copytree(first / "samples/step-00000060", first / "samples/step-00000000")
    run = read_run(first)
    assert [picture.path.parent.name for picture in run.newest_pictures()] == ["step-00000120"] * 2
    page = comparison([run], {})
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["base", "pretrain"] * 2
    assert "sampling.at_start=true" not in page
    base = read_pictures(first / "samples/step-00000060", [])
    assert re.findall("<figcaption>(.*?)</figcaption>", comparison([run], {"base": base})) == ["base", "pretrain"] * 2
    only = replace(run, samples={0: run.samples[0]})
    assert only.newest_pictures() == []
    assert re.findall("<figcaption>(.*?)</figcaption>", comparison([only], {})) == ["base"] * 2


def test_a_run_alone_shows_its_pictures_and_how_to_get_the_others(runs: list[Path]) -> None:
    run = read_run(runs[0])
    page = comparison([run], {})
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["pretrain"] * 2
    assert "sampling.at_start=true" in page
    assert "report.py --samples NAME=DIR" in page
    none = comparison([replace(run, samples={})], {})
    assert "<img" not in none
    assert "sampling.every_steps" in none


def test_one_run_shows_its_whole_config(runs: list[Path], tmp_path: Path) -> None:
    checker = parsed(write_page(runs[:1], tmp_path / "r.html", title="A <title>"))
    assert "batch.micro" in checker.text
    assert "A <title>" in checker.text
    assert "model.compilefalse" in checker.text  # as the config spells it
    assert "data.selectnull" in checker.text


def test_why_a_run_ended_is_told(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "ft1"
    shutil.copytree(runs[1], run)
    for name in ("DONE", "metrics.jsonl"):
        (run / name).unlink()
    (run / "exit.json").write_text('{"code": 4, "status": "failed", "reason": "update 7: <the loss> is not finite"}')
    checker = parsed(write_page([run], tmp_path / "r.html"))
    assert "failed (code 4)" in checker.text
    assert "update 7: <the loss> is not finite" in checker.text
    assert "Summary" in checker.text
    assert "peak lr" not in checker.text, "a column of nothing"


def test_missing_and_damaged_pieces_are_notes(runs: list[Path], tmp_path: Path) -> None:
    empty, torn = tmp_path / "empty", tmp_path / "torn"
    empty.mkdir()
    shutil.copytree(runs[1], torn)
    with open(torn / "metrics.jsonl", "ab") as file:
        file.write(b'{"update": 121, "loss"\n\xff\xfe\n[1, 2]\n{"update": "x", "loss": "nan"}\n')
    (torn / "lineage.json").write_text("{broken")
    (torn / "config.yaml").write_text("stage: [")
    (torn / "validation.jsonl").write_text('{"update": 5}\n')
    (torn / "samples/step-00000120/00.png").write_bytes(b"no picture")
    (torn / "samples/step-x").mkdir()
    checker = parsed(write_page([empty, torn, runs[2]], tmp_path / "r.html"))
    for words in ("metrics.jsonl is missing", "lineage.json: unreadable", "config.yaml", "00.png: unreadable"):
        assert words in checker.text, words


def test_what_is_not_finite_is_left_out_and_told(runs: list[Path], tmp_path: Path) -> None:
    """A half-precision forward that overflows gives an image no loss; the two stages still compare on the others."""
    run = tmp_path / "ft1"
    shutil.copytree(runs[1], run)
    held = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    held |= {"loss": "nan", "interval": "nan", "losses": {**held["losses"], f"{0:016x}": "nan"}}
    held["strata"]["quality/best quality"] = {"images": 4, "loss": "nan", "interval": "nan"}
    (run / "validation.jsonl").write_text(json.dumps(held) + "\n")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 121, "update": 121, "loss": NaN, "grad_norm": Infinity, "loss_by_decile": [NaN]}\n')
    checker = parsed(write_page([runs[0], run], tmp_path / "r.html"))
    assert "held-out loss of update 120: 1 of 8 images not finite" in checker.text
    assert "(7)" in checker.text
    assert "nan" not in checker.text.lower()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("validation.jsonl", '{"step": 5, "loss": 0.5}'),
        ("validation.jsonl", '{"step": 5, "update": 5, "loss": 0.5, "losses": null, "strata": [], "images": "<b>"}'),
        ("validation.jsonl", '{"step": 5, "update": 5, "strata": {"quality/masterpiece": 3}}'),
        ("lineage.json", '{"ancestors": null, "parent": "x", "weights_sha256": "y"}'),
        ("lineage.json", '{"ancestors": [1, {"parent": []}], "weights_sha256": "y", "updates": NaN}'),
        ("lineage.json", '{"ancestors": [{"weights_sha256": {}}, {"stage": []}], "weights_sha256": ["a"]}'),
        ("lineage.json", f'{{"weights_sha256": {HUGE}, "updates": {HUGE}, "images": -{HUGE}, "seed": {HUGE}}}'),
        ("lineage.json", DEEP),
        ("exit.json", DEEP),
        ("config.yaml", DEEP),
        ("held_out.json", DEEP),
        ("validation.jsonl", DEEP),
        ("validation.jsonl", f'{{"update": 5, "loss": {HUGE}, "interval": {HUGE}, "losses": {{"1": {HUGE}}}}}'),
        ("validation.jsonl", f'{{"update": {HUGE}, "step": 5, "loss": 0.5}}'),
        ("metrics.jsonl", DEEP),
        ("metrics.jsonl", f'{{"step": 5, "update": {HUGE}, "loss": {HUGE}, "images": {HUGE}, "skipped": {HUGE}}}'),
        ("metrics.jsonl", f'{{"step": {HUGE}, "update": 5, "loss": 0.5}}'),
        ("metrics.jsonl", '{"update": 5, "loss": 1e308, "grad_norm": 1e308, "loss_by_decile": [1e308]}\n' * 3),
        ("metrics.jsonl", f'{{"update": 5, "loss": 0.5, "loss_by_decile": [{HUGE}, true]}}'),
    ],
    ids=lambda text: text[:20],
)
def test_records_of_another_shape_do_not_stop_the_page(name: str, body: str, runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "ft1"
    shutil.copytree(runs[1], run)
    (run / name).write_text(body + "\n")
    assert "Summary" in parsed(write_page([runs[0], run], tmp_path / "r.html")).text


def test_more_than_a_hundred_pictures_keep_their_order(tmp_path: Path) -> None:
    for place in (100, 0, 9, 10, 11, 99, 101):
        for suffix in ("", "-ema"):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{place:02d}{suffix}.png")
    names = [picture.path.stem for picture in read_pictures(tmp_path, [])]
    assert names == [f"{n:02d}{suffix}" for n in (0, 9, 10, 11, 99, 100, 101) for suffix in ("", "-ema")]


def test_a_preview_cut_short_hides_no_prompt(runs: list[Path], tmp_path: Path) -> None:
    """A stop in the last preview: what it lacks is shown as it was before."""
    run = tmp_path / "ft2"
    shutil.copytree(runs[2], run)
    for path in ("00-ema.png", "01.png", "01-ema.png"):
        (run / "samples/step-00000120" / path).unlink()
    read = read_run(run)
    assert [str(p.path.relative_to(run / "samples")) for p in read.newest_pictures()] == [
        "step-00000060/00.png", "step-00000060/01.png",
    ]  # fmt: skip
    assert {p.path.parent.name for p in read.newest_pictures(ema=True)} == {"step-00000060"}
    assert strips(read).count("<img") == 1 + 4
    assert strips(read).count("update 120") == 1


def test_losses_of_two_kinds_are_not_compared(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "ft2"
    shutil.copytree(runs[2], run)
    text = (run / "config.yaml").read_text().replace("noise:\n", "noise:\n  zero_terminal_snr: true\n")
    (run / "config.yaml").write_text(text + "loss:\n  prediction: v\n")
    body = held_out_section([read_run(path) for path in (*runs[:2], run)])
    assert "<th>pretrain → ft1</th>" in body
    assert "→ ft2</th>" not in body
    why = "their losses are not of one kind (they differ in loss.prediction and noise.zero_terminal_snr)"
    for pair in ("ft1 → ft2", "pretrain → ft2"):
        assert f"<p>{pair}: no change is shown, for {why}.</p>" in body
    alone = held_out_section([read_run(path) for path in (runs[1], run)])
    assert why in alone
    assert "Change on the images" not in alone
    (run / "config.yaml").unlink()  # an unknown setting is not a different one
    assert "→ ft2</th>" in held_out_section([read_run(path) for path in (runs[1], run)])


def test_two_runs_of_one_stage_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    slow, fast, other = tmp_path / "slow/ft1", tmp_path / "fast/ft1", tmp_path / "again"
    for copy in (slow, fast, other):
        shutil.copytree(runs[1], copy)
    checker = parsed(write_page([slow, fast, other, runs[2]], tmp_path / "r.html"))
    assert "slow/ft1 → fast/ft1" in checker.text
    assert "ft1 (again)" in checker.text
    assert "ft1 (again) → ft2" in checker.text


def test_no_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(Halt, match="nowhere") as caught:
        write_page([tmp_path / "nowhere"], tmp_path / "r.html")
    assert caught.value.code == ExitCode.USAGE


def test_a_prepared_set_in_the_place_of_a_run_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text("{}")
    with pytest.raises(Halt, match=r"set is no run directory: it holds none of run\.json"):
        write_page([tmp_path / "set"], tmp_path / "r.html")


def test_a_page_that_cannot_be_written(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, code in ((tmp_path, ExitCode.USAGE), (tmp_path / "file" / "r.html", ExitCode.CANNOT_WRITE)):
        with pytest.raises(Halt, match=re.escape(f"--out {out}")) as caught:
            write_page(runs[:1], out)
        assert caught.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_secrets_do_not_reach_the_page(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-of-a-secret")
    run = tmp_path / "ft1"
    shutil.copytree(runs[1], run)
    text = (run / "config.yaml").read_text().replace("title: ft1", "title: canary-of-a-secret")
    (run / "config.yaml").write_text(text)
    page = write_page([run], tmp_path / "r.html").read_text()
    assert "canary-of-a-secret" not in page
    assert "***" in page


def test_repeated_updates_count_once(tmp_path: Path) -> None:
    records = [{"step": s, "update": s, "loss": v} for s, v in ((1, 0.9), (2, 0.8), (2, 0.7), (3, 0.6))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_run(tmp_path).series("loss") == [(1, 0.9), (2, 0.7), (3, 0.6)]


def test_waiting_is_a_share_of_each_updates_time(runs: list[Path]) -> None:
    points = read_run(runs[0]).waiting()  # 16 images at 40 a second, a tenth of a second of it waiting
    assert len(points) == 120
    assert all(share == pytest.approx(25.0) for _, share in points)


def test_speed_memory_and_parts_of_an_update_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, "ft1", 0.1, updates=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for place, line in enumerate(lines):
        line |= {"tflops": 70.0 + place, "mfu": 0.25, "peak_allocated_bytes": 60 * 2**30, "peak_reserved_bytes": 66 * 2**30}
    lines[5]["seconds"] = {"data": 0.25, "forward_backward": 3.0}
    lines[9]["seconds"] = {"data": 0.75, "forward_backward": 3.5, "communication": 0.125}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = parsed(write_page([run], tmp_path / "report.html")).text
    for words in ("25.0%", "60.0 of 66.0", "80", "forward and backward, s", "0.500", "3.250", "0.125"):
        assert words in shown, words
    bare = parsed(write_page([make_run(tmp_path, "ft2", 0.1, updates=20)], tmp_path / "bare.html")).text
    assert "Time of an update" not in bare


def test_strata_from_best_to_worst() -> None:
    names = {"year/mid", "aesthetic/aesthetic", "quality/low quality", "rating/safe", "quality/masterpiece", "x/y",
             "year/newest", "aesthetic/very aesthetic", "rating/explicit"}  # fmt: skip
    assert in_order(names) == [
        "quality/masterpiece", "quality/low quality", "rating/safe", "rating/explicit", "year/newest", "year/mid",
        "aesthetic/very aesthetic", "aesthetic/aesthetic", "x/y",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "common"),
    [
        (["best, 1girl, hat", "best, 1girl, cat"], ["best", "1girl"]),
        (["best, 1girl", "best"], []),  # nothing would be left of the second
        (["1girl", "1boy"], []),
        (["alone, x"], []),
    ],
)
def test_tags_that_every_prompt_starts_with(prompts: list[str], common: list[str]) -> None:
    assert shared_tags(prompts) == common


def test_config_differences(runs: list[Path]) -> None:
    different = dict(config_differences([read_run(path) for path in runs]))
    assert different["optimizer.unet_lr"] == ["1e-05", "2e-06", "1e-06"]
    assert different["noise.offset"] == ["0", "0.0357", "0.0357"]
    assert "data.separator" not in different


def test_parameters_are_read_back() -> None:
    text = "1girl, smile\nsecond line\nNegative prompt: bad\nSteps: 28, Sampler: Euler a, Seed: 7, Size: 832x1216"
    prompt, facts = read_parameters(text)
    assert prompt == "1girl, smile\nsecond line"
    assert (facts["Seed"], facts["Size"]) == ("7", "832x1216")
    assert read_parameters("") == ("", {})
    assert read_parameters("just words") == ("just words", {})


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_are_few(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    assert len(marks) <= 7
    assert all(low - span * 1e-6 <= mark <= low + span * 1.000001 for mark in marks)


def test_ticks_literal() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.0, 0.05) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert log_ticks(0.03, 0.6) == pytest.approx([0.05, 0.1, 0.2, 0.5])
    assert log_ticks(1e-4, 1e3) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000])
    assert [number(x) for x in (0, 1e-5, 2.5e-6, 0.0333, 12, 90_990)] == [
        "0",
        "1e-5",
        "2.5e-6",
        "0.0333",
        "12",
        "90.99k",
    ]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=2000))
def test_thinning_keeps_the_extremes(values: list[float]) -> None:
    kept = thin([(float(i), v) for i, v in enumerate(values)])
    assert len(kept) <= 300
    assert {min(values), max(values)} <= {y for _, y in kept}
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.integers(1, 70))
def test_smoothing_is_the_mean_of_each_window(values: list[float], window: int) -> None:
    half = window // 2
    expected = [fmean(values[max(at - half, 0) : at + half + 1]) for at in range(len(values))]
    assert smooth(list(enumerate(values)), window) == [(at, pytest.approx(mean)) for at, mean in enumerate(expected)]


@pytest.mark.parametrize("spike", [1e18, 1e-18])
@pytest.mark.parametrize("updates", [20, 120, 5000])
def test_one_spike_flattens_nothing(updates: int, spike: float) -> None:
    points = [(float(at), 0.5 + 0.3 * math.exp(-at / 10)) for at in range(updates)]
    spiked = [(x, spike if x == 7 else y) for x, y in points]
    window = max(updates // 25, 1)
    far = window // 2 + 8
    assert smooth(spiked, window)[far:] == [(x, pytest.approx(y)) for x, y in smooth(points, window)[far:]]
    shown, clean = axis(spiked, smooth(spiked, window)), [y for _, y in smooth(points, window)]
    assert 0.05 <= min(shown) <= min(clean[far:])
    assert max(clean[far:]) <= max(shown) <= 8
    assert max(axis(points, smooth(points, window))) >= max(clean)


def test_a_short_or_empty_chart_shows_every_value() -> None:
    assert axis([], []) == []
    assert axis([(0.0, 1.0), (1.0, 2.0)], [(0.0, 1.0), (1.0, 2.0)]) == [1.0, 2.0, 1.0, 2.0]


def test_charts_of_nothing_and_of_one_point() -> None:
    assert "no data" in line_chart([], label="x")
    assert "no data" in bar_chart(["a"], [("n", "red", [None])], label="x")
    assert 'r="2.5"' in line_chart([("n", "red", [(1.0, 2.0)])], label="x", log=True)
    assert extent([3.0, 3.0])[0] < 3.0 < extent([3.0, 3.0])[1]
    assert smooth([(0, 1.0), (1, 2.0), (2, 6.0)], 3) == [(0, 1.5), (1, 3.0), (2, 4.0)]


@given(st.integers(1, 100), st.integers(2, 12))
def test_strips_keep_first_and_last(count: int, most: int) -> None:
    kept = spaced(list(range(count)), most)
    assert len(kept) == min(count, most)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert len(set(kept)) == len(kept)


def run_script(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_command_line(runs: list[Path], tmp_path: Path) -> None:
    made = run_script(*runs, "--out", tmp_path / "report.html")
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(tmp_path / "report.html")
    assert run_script(tmp_path / "none", "--out", tmp_path / "x.html").returncode == ExitCode.USAGE
    assert run_script(*runs, "--samples", "base", "--out", tmp_path / "x.html").returncode == ExitCode.USAGE
    twice = ["--samples", f"base={tmp_path}", "--samples", f"base={runs[0]}"]
    refused = run_script(*runs, *twice, "--out", tmp_path / "x.html")
    assert refused.returncode == ExitCode.USAGE
    assert f"the name base is given twice, first for {tmp_path}" in refused.stderr
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
def test_in_a_real_browser(runs: list[Path], tmp_path: Path) -> None:
    """Chromium lays the page out: every chart and picture has a size, nothing runs over the page's width."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    out = write_page(runs, tmp_path / "report.html")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1280,3000", f"--screenshot={tmp_path / 'page.png'}", out.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not re.search(r"Refused to|net::ERR", done.stderr)
    with Image.open(tmp_path / "page.png") as image:
        colours = image.convert("RGB").getcolors(image.width * image.height) or []
    seen = {colour for _, colour in colours}
    assert {(0x25, 0x63, 0xEB), (0xD9, 0x77, 0x06), (0x05, 0x96, 0x69)} <= seen  # a line of each of the three runs
    assert len(seen) > 50


@pytest.mark.slow
def test_it_is_whole_at_any_width_in_light_and_dark(runs: list[Path], tmp_path: Path) -> None:
    """Nothing runs over the page's width, nothing is asked for, nothing stands on the console, and dark is dark."""
    out = write_page(runs, tmp_path / "report.html")
    wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll,.pictures')).map(e => e.outerHTML.slice(0, 80))"
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=out.as_uri())
        browser.wait_for("document.readyState == 'complete' && !!document.querySelector('.prompt')")
        for scheme, colour in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 22, 28)")):
            browser.call("Emulation.setEmulatedMedia", media="screen", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert browser.evaluate(ground) == colour
            for width in (360, 1400):
                browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
                assert browser.evaluate(wide) == [], (width, scheme)
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
        assert browser.errors == []
    finally:
        browser.close()


@pytest.mark.slow
def test_long_values_stay_on_paper_and_long_prompts_in_their_column(runs: list[Path], tmp_path: Path) -> None:
    copies = []
    for run in runs:
        copies.append(tmp_path / run.name)
        shutil.copytree(run, copies[-1])
        place = f"/mnt/storage_volume_7/experiments/2026_11_29_reproduction_full/{run.name}_run_number_one"
        text = (copies[-1] / "config.yaml").read_text()
        (copies[-1] / "config.yaml").write_text(re.sub(r"(?m)^output_dir:.*$", f"output_dir: {place}", text))
        prompts = checked(PromptsFile(prompts=[Prompt(text="no_space_" * 40, width=64, height=96)]))
        pictures = [Image.new("RGB", (64, 96))]
        write_pictures({"": pictures}, prompts, copies[-1] / "samples/step-00000120", model_name="m", update=120)
    out = write_page(copies, tmp_path / "report.html")
    wide = "[...document.querySelectorAll('{}')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=out.as_uri())
        browser.wait_for("document.readyState == 'complete' && !!document.querySelector('.prompt')")
        assert browser.evaluate(wide.format(".prompt")) == []
        browser.call("Emulation.setEmulatedMedia", media="print")
        for width in (718, 1046):  # A4 upright and across, less the browser's margins
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False
            )
            assert browser.evaluate(wide.format("#configuration .scroll")) == []
    finally:
        browser.close()


def test_strata_stand_in_the_order_of_their_own_vocabulary() -> None:
    quality = {f"quality/{word}" for word in ("worst quality", "high quality", "masterpiece", "medium quality")}
    assert in_order(quality | {"rating/rating: explicit", "rating/rating: general", "year/late", "year/newest"}) == [
        "quality/masterpiece", "quality/high quality", "quality/medium quality", "quality/worst quality",
        "rating/rating: general", "rating/rating: explicit", "year/newest", "year/late",
    ]  # fmt: skip
    assert in_order({"quality/worst quality", "quality/great quality", "rating/nsfw", "rating/safe", "year/mid", "year/recent", "own/x"}) == [
        "quality/great quality", "quality/worst quality", "rating/safe", "rating/nsfw", "year/recent", "year/mid", "own/x",
    ]  # fmt: skip
