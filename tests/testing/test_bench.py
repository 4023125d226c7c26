"""The benchmarks' own parts: medians and noise, references found or skipped, real syncs counted, budget and errors.

No timing is asserted: machines differ, and these run on busy ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.testing import data, loop
from train.testing import timing as bench_timing
from train.testing.gpu import updates, variants
from train.testing.hooks import Alternating
from train.testing.loop import SMALL_BATCH, SyncCounter, micro_step_syncs, tiny_session
from train.testing.timing import Timing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_references(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in bench_timing.CHECKOUTS:
        monkeypatch.delenv(variable, raising=False)


def test_sides_take_turns_and_medians_decide() -> None:
    order: list[str] = []
    told = iter([(1.0, 10.0), (9.0, 90.0), (2.0, 10.0)])

    def ours() -> tuple[float, float]:
        order.append("ours")
        return next(told)

    timings = bench_timing.interleave({"ours": ours, "other": lambda: order.append("other")}, 3)
    assert order == ["ours", "other"] * 3
    report = timings["ours"].report()
    assert (report["cpu_s"], report["wall_s"], report["spread"]) == (2.0, 10.0, 8.0)


def test_short_work_is_repeated_within_a_repeat_and_short_repeats_are_put_together() -> None:
    done: list[int] = []
    cpu_s, wall_s = bench_timing.lasting(lambda: done.append(sum(range(20_000))), least_s=0.05)()
    assert len(done) > 2
    assert cpu_s * len(done) > 0
    assert 0.05 <= wall_s * len(done) < 5
    rounds = Timing([1.0, 2.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 10.0, 9.0]).rounds(2)
    assert (rounds.cpu_s, rounds.wall_s) == ([1.5, 4.0, 7.0], [3.0, 8.0, 9.0])
    assert rounds.report()["repeats"] == 3


def test_a_row_knows_ratios_and_noise() -> None:
    timings = {"ours": Timing([1.0], [1.0]), "slow": Timing([4.0, 4.0], [4.0, 8.0])}
    row = bench_timing.row("A0", "what", "goal", timings, {"ours": 200, "slow": 100})
    assert row["ratios"] == {"ours / slow": 8.0}
    assert row["noisy"] == ["slow"]
    assert "8x" in bench_timing.describe({"machine": bench_timing.machine(), "rows": [row]})


def test_a_missing_reference_is_named_with_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_timing.find_checkout("SDSCRIPTS_DIR") is None
    assert bench_timing.why_skipped("SDSCRIPTS_DIR") == "skipped: set SDSCRIPTS_DIR to a checkout of kohya-ss/sd-scripts"
    monkeypatch.setenv("SDSCRIPTS_DIR", str(tmp_path))
    found = bench_timing.find_checkout("SDSCRIPTS_DIR")
    assert found is not None
    assert not found.expected


def test_our_sides_of_the_data_rows_run_small(tmp_path: Path) -> None:
    from train.tools.tiny.tokenizer import EOS, write_tokenizer

    rows = data.index_rows(tmp_path / "index", 2, scale=0.002)
    assert rows[0]["sides"]["ours"]["items"] == 200
    for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):
        write_tokenizer(tmp_path / "model" / name, pad)
    rows += data.caption_rows(tmp_path, tmp_path / "model", 2, count=20)
    rows += data.latent_rows(tmp_path / "latents", 2, count=32)
    assert sum("skipped" in row for row in rows) == 4
    assert all(row["sides"]["ours"]["repeats"] == 2 for row in rows if "sides" in row)


def test_the_counter_sees_every_kind_of_host_read() -> None:
    tensor = torch.arange(4.0)
    with SyncCounter() as counter:
        tensor.sum().item()
        tensor.tolist()
        tensor.numpy()
        tensor[tensor > 1]
        float(tensor[0])
        bool(tensor[0] == 0)
        torch.nonzero(tensor)
    found = counter.found
    assert found["item"] == found["tolist"] == found["numpy"] == found["boolean index"] == 1
    assert found["__float__"] == found["__bool__"] == 1
    assert sum(count for name, count in found.items() if "local_scalar" in name) >= 3
    with SyncCounter() as counter:
        (tensor * 2).sum()
        tensor[torch.tensor([1, 2])]
    assert not counter.found
    assert torch.Tensor.item(tensor[1]) == 1.0  # restored


@pytest.mark.parametrize("overrides", [(), ("model.train_text_encoders=false", "optimizer.text_encoder_lr=null")])
def test_no_host_synchronisation_per_micro_step(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    with tiny_session(tmp_path, *SMALL_BATCH, *overrides) as session:
        assert micro_step_syncs(session) == {}


def test_variants_and_predictions() -> None:
    labels = [variant.label for variant in variants.VARIANTS]
    assert len(set(labels)) == len(labels)
    for variant in variants.VARIANTS:
        assert variant.images == 48
        told = variants.prediction(variant)
        assert told["predicted_gib"] <= 130  # of a 141 GB card
        assert told["predicted_images_per_s"] < told["hardware_limit_images_per_s"]
    limit = {v.label: variants.prediction(v)["hardware_limit_images_per_s"] for v in variants.VARIANTS}
    assert (limit["plain/1"], limit["none_8/1"]) == (pytest.approx(29.9, abs=0.1), pytest.approx(37.7, abs=0.1))
    assert (limit["plain/2"], limit["none_12/2"]) == (pytest.approx(31.2, abs=0.1), pytest.approx(39.2, abs=0.1))


def test_predictions_stand_in_the_benchmarks_page_before_the_run() -> None:
    lines = (ROOT / "BENCHMARKS.md").read_text().splitlines()
    for variant in variants.VARIANTS:
        told = variants.prediction(variant)
        numbers = [told[key] for key in ("predicted_images_per_s", "hardware_limit_images_per_s", "predicted_gib")]
        row = " | ".join(("", variant.name, str(variant.stage), *map(str, numbers), "")).strip()
        assert any(line.startswith(row) for line in lines), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_no_synchronisation_in_a_micro_step() -> None:
    for stage_number in (1, 2):
        variant = variants.tiny(next(v for v in variants.VARIANTS if v.label == f"cl/{stage_number}"))
        answer = updates.run(variant, tiny=True)
        assert answer["micro_step_sync"] == "", answer


@pytest.mark.slow
@pytest.mark.long
def test_a_variant_runs_end_to_end_on_the_tiny_model() -> None:
    chosen = "plain/1,ref_sdscripts/1,strict/1,strict_again/1"
    command = [sys.executable, "scripts/bench.py", "gpu", "--tiny", "--json", "--only", chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)["variants"]
    assert [row["error"] for row in rows] == [None] * 4
    assert rows[2]["bits"] and rows[2]["bits"] == rows[3]["bits"]
    assert all(row["images_per_s"] > 0 for row in rows)
    # same weights, inputs and loss on both sides: the reference differs in precision and host reads alone
    assert rows[0]["loss_first"] == pytest.approx(rows[1]["loss_first"], rel=0.05)


def test_hooks_run_at_every_second_update_and_are_timed_there() -> None:
    """Two hooks of 2 ms each, updates of 10 ms: what is measured is what was spent."""
    ran: list[str] = []

    def hook(name: str) -> Any:
        def run(*given: Any) -> None:
            ran.append(f"{name} {given[0]}")
            time.sleep(0.002)

        return run

    session: Any = SimpleNamespace(run=SimpleNamespace(last_step=100, progress=SimpleNamespace(step=0)))
    turns = Alternating(session, hook("log"), hook("after"), 6)
    while session.run.progress.step < session.run.last_step:
        session.run.progress.step += 1
        time.sleep(0.01)
        turns.log(session.run.progress.step)
        turns.after(session.run.progress.step)
    assert session.run.progress.step == 6
    assert ran == ["log 1", "after 1", "log 3", "after 3", "log 5", "after 5"]
    assert [len(timing.wall_s) for timing in (*turns.whole.values(), turns.hooks)] == [3, 3, 3]
    assert min(turns.hooks.wall_s) >= 0.004
    assert min(turns.whole["with hooks"].wall_s) >= 0.014
    assert min(turns.whole["without"].wall_s) >= 0.01


def test_the_stall_of_first_saves_is_measured_on_savers_that_have_not_saved(tmp_path: Path) -> None:
    row = loop.checkpoint_row(tmp_path, size=4_000_000)
    assert len(row["notes"]["each first stall over memcpy"]) == loop.SAVERS
    assert [save.split()[0] for save in row["notes"]["saves"]] == ["written"] * 2 * loop.SAVERS
