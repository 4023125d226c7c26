"""The two calls on a card: within their minutes, nothing lost when cut, every part of the first minute judged. No time is asserted."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from train.base.errors import ExitCode, Halt
from train.model import speed
from train.testing import timing
from train.testing.gpu import driver, first_minute, updates, variants
from train.testing.gpu.variants import CALL_S, CALLS, Variant

PROBE = {"gpu": "Card", "peak_tflops": 800.0, "versions": {}}


def test_both_calls_fit_their_minutes_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert CALL_S == {1: 7 * 60, 2: 3 * 60}
    for call, names in CALLS.items():
        steps = variants.plan(driver.choose(names), first_minute=call == 1)
        assert sum(step.seconds for step in steps) <= CALL_S[call]
        assert [step.what for step in steps if "/" in step.what] == list(names)
    plain = next(variant for variant in variants.VARIANTS if variant.label == "plain/1")
    assert variants.expected_s(plain) == pytest.approx(10 + 3.5 * 48 / 9.8)  # networks, three updates and a half
    assert {"ref_diffusers/1", "ref_sdscripts/1", "none_8_compile/1"} <= set(CALLS[1])  # the goal beside what it is measured against
    shown = driver.describe_calls({2: variants.plan(driver.choose(CALLS[2]), first_minute=False)})
    assert "call 2: at most 180 s, 174 s expected" in shown and "none_12_compile/2" in shown


def told(found: dict[str, list[dict[str, Any]]]) -> Any:
    """In place of a process: the answers of each, which name the rows they were asked."""

    def answers(wanted: Sequence[Variant], deadline: float, *, tiny: bool) -> Iterator[dict[str, Any]]:
        yield {"probe": PROBE}
        for variant in wanted:
            yield from found.get(variant.label, [{"row": {"images_per_s": 10.0, "peak_gib": 70.0, "ms_optimizer": 12.0}}])

    return answers


def test_every_row_is_kept_as_soon_as_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_told", told({"none_8/1": [{"row": {"error": "exit -9"}, "died": True}]}))
    monkeypatch.setattr(first_minute, "run", lambda limit_s: {"error": None, "seconds": 40.0})
    kept: list[dict[str, Any]] = []
    result = driver.run(["plain/1", "none_8/1", "ref_sdscripts/1", "none_12_compile/2"], 1000, begins=True,
                        keep=lambda now: kept.append(json.loads(json.dumps(now))))  # fmt: skip
    assert [len(now["variants"]) for now in kept] == [0, 0, 1, 2, 2, 3, 3, 4]  # the first minute, then probes and rows
    assert kept[0]["first_minute"]["seconds"] == 40.0
    by_label = {f"{row['name']}/{row['stage']}": row for row in result["variants"]}
    assert list(by_label) == ["plain/1", "none_8/1", "ref_sdscripts/1", "none_12_compile/2"]
    assert by_label["none_8/1"]["error"] == "exit -9"  # took no other row with it
    assert by_label["plain/1"]["mfu_of_measured_peak"] == pytest.approx(10 * by_label["plain/1"]["useful_tflop"] / 800)
    assert "trained, killed, resumed" in driver.describe(result) and "1.00x" in driver.describe(result)
    first = tmp_path / "first.json"
    first.write_text(json.dumps(result))
    both = driver.run(["cl/1"], 1000, earlier=first)
    assert [row["name"] for row in both["variants"]] == ["plain", "none_8", "ref_sdscripts", "none_12_compile", "cl"]
    monkeypatch.setitem(PROBE, "gpu", "Other card")
    with pytest.raises(Halt, match="another card"):
        driver.run(["cl/1"], 1000, earlier=first)
    first.write_text("{}")
    with pytest.raises(Halt, match="no result"):
        driver.run(["cl/1"], 1000, earlier=first)


def test_what_does_not_fit_is_skipped_and_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_told", told({}))
    late = driver.run(["plain/1", "compile/1"], 80.0)["variants"]
    assert "skipped" not in late[0]
    assert "of the budget left" in late[1]["skipped"]
    assert [v.label for v in driver.choose(["plain", "none_8/1", "plain/1"])] == ["plain/1", "plain/2", "none_8/1"]
    with pytest.raises(Halt, match="no variant") as halt:
        driver.choose(["warp"])
    assert halt.value.code == ExitCode.USAGE
    monkeypatch.setitem(PROBE, "gpu", None)
    with pytest.raises(Halt, match="CUDA"):
        driver.run(["plain/1"], 80.0)


def child(folder: Path, body: str) -> str:
    """A program in place of python: `asked` is what it is asked."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\nimport json, os, signal, sys, time\nasked = json.loads(sys.argv[-1])\n{body}")
    file.chmod(0o755)
    return str(file)


def test_a_process_that_dies_or_is_cut_loses_the_row_in_progress_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        'print(json.dumps({"probe": {"gpu": "Card", "versions": {}}}), flush=True)\n'
        'for one in asked["variants"]:\n'
        '    print("a library speaks", flush=True)\n'
        '    if one["name"] == "none_8": print("no kernel image", file=sys.stderr); os._exit(3)\n'
        '    if one["name"] == "cl": time.sleep(60)\n'
        '    print(\'{"row": {"images_per_s": 9.0, "loss_last": NaN}}\', flush=True)\n'
    )
    monkeypatch.setattr(driver.sys, "executable", child(tmp_path, body))
    rows = driver.run(["plain/1", "none_8/1", "plain/2"], 300.0)["variants"]
    assert [(row["images_per_s"], row["error"]) for row in rows] == [(9.0, None), (None, "exit 3: no kernel image"), (9.0, None)]
    json.dumps(rows, allow_nan=False)  # what the file is written with
    monkeypatch.setattr(driver, "_expected", lambda variant, tiny: 0.0)
    monkeypatch.setattr(driver, "IMPORT_S", 0.0)
    monkeypatch.setattr(driver, "PROBE_S", 0.0)
    started = time.monotonic()
    rows = driver.run(["plain/1", "cl/1"], 8.0)["variants"]
    assert time.monotonic() - started < 50
    assert [row["error"] for row in rows] == [None, "stopped at the budget's end"]


def test_no_git_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert timing.commit_of(driver.ROOT) == "unknown"
    assert driver.run(["plain/1"], 1.0, dry_run=True)["machine"]["commit"] == "unknown"


def test_a_row_tells_its_optimizer_and_computes_as_the_stage_does(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out: list[int] = []
    monkeypatch.setattr(speed, "as_channels_last", lambda latents: laid_out.append(len(latents)) or latents)
    variant = variants.tiny(next(v for v in variants.VARIANTS if v.label == "cl/1"))
    row = updates.run(variant, tiny=True)
    assert len(laid_out) == variant.updates * variant.accumulation  # every input, as with model.channels_last
    assert min(row["ms_optimizer"], row["ms_forward_backward"], row["ms_data"]) > 0
    assert row["ms_optimizer"] + row["ms_forward_backward"] <= 1000 * row["update_s"]["max"]


def record(step: int, loss: float) -> str:
    return json.dumps({"step": step, "loss": loss}) + "\n"


@pytest.mark.parametrize(
    ("made", "twice", "wrong"),
    [
        (range(1, 13), {9: 0.5, 10: 0.501}, None),
        (range(1, 13), {9: 0.5, 10: 0.6}, "updates [10] have other losses"),
        (range(1, 13), {}, "did not resume from a checkpoint"),
        (range(1, 12), {9: 0.5}, "holds the updates"),
    ],
)
def test_the_first_minute_is_judged(tmp_path: Path, made: range, twice: dict[int, float], wrong: str | None) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(record(step, 0.5) for step in made))
    if twice:
        (tmp_path / "metrics.discarded.jsonl").write_text("".join(record(step, loss) for step, loss in twice.items()))
    found = first_minute.compare(tmp_path)
    assert found["error"] is None if wrong is None else wrong in found["error"]
    assert found["resumed_from"] == 8 or not twice


@pytest.mark.slow
@pytest.mark.long
def test_the_first_minute_goes_well_without_a_card() -> None:
    found = first_minute.run(600.0)
    assert found["error"] is None, found
    assert (found["exits"], found["resumed_from"], found["repeated"]) == ([-9, 0], 8, 2)
    assert os.environ.get("ANIX_FAULT") is None
