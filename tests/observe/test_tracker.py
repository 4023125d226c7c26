"""metrics.jsonl is complete whatever happens to disks, trackers and networks; logging never waits."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faketrackers import Fake, fake_wandb, services
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.config.stage import TrackingConfig
from train.observe import trackers
from train.observe.metrics import MetricsFile, read_metrics
from train.observe.tracker import SpikeDetector, StarvationWatch, Tracker, loss_by_decile, spike_sigmas
from train.observe.trackers import Queued, flatten


def tracker(folder: Path, *, total: int = 5, resume: int = 0, **options: Any) -> Tracker:
    return Tracker(
        folder, TrackingConfig(**options), is_main=True, run_name="test", config_flat={"batch.micro": 2},
        total_steps=total, resume_step=resume,
    )  # fmt: skip


def test_one_line_per_update_flushed_at_once(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    for update in range(1, 4):
        run.log({"step": update, "update": update, "loss": torch.tensor(0.5), "images": np.int64(4), "skipped": False})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == update
    run.close()
    assert json.loads(lines[0]) == {"step": 1, "update": 1, "loss": 0.5, "images": 4, "skipped": False}


def test_memory_of_the_card_is_told_once_an_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peaks = {"peak_reserved_bytes": 72 * 2**30, "peak_allocated_bytes": 63 * 2**30}
    run = tracker(tmp_path)
    with caplog.at_level("INFO", logger="anix"):
        for update, epoch in enumerate((0, 0, 1, 1, 1), 1):
            run.log({"step": update, "update": update, "epoch": epoch, **peaks})
    run.close()
    told = "72.0 GiB of GPU memory reserved, 63.0 GiB allocated at most (12% lost)"
    assert [record.getMessage() for record in caplog.records] == [f"epoch {epoch}: {told}" for epoch in (0, 1)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = Tracker(
        tmp_path, TrackingConfig(wandb="online"), is_main=False, run_name="x", config_flat={}, total_steps=1
    )
    run.log({"update": 1})
    run.alert("x")
    run.images(1, [])
    run.close()
    assert not list(tmp_path.iterdir())


def test_lines_of_a_resumed_run_follow_and_a_torn_one_is_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"update": 1}\n{"update": 2}\n{"upda')
    run = tracker(tmp_path, resume=2)
    run.log({"update": 3})
    run.close()
    assert [r["update"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"update": 1}\n{"update": 2}\n{"update": 3}\n'


def test_values_json_has_no_word_for(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.log({"update": 1, "loss": float("nan"), "grad_norm": float("inf"), "loss_by_decile": [None, 0.1]})
    run.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"update": 1, "loss": "nan", "grad_norm": "inf", "loss_by_decile": [None, 0.1]}
    ]


def test_full_disk_loses_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    real = file._file

    class Full:
        """Writes half of what it is given, then fails, as a full disk does."""

        def write(self, data: bytes) -> int:
            real.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    file.append('{"update": 1}')
    file._file = Full()  # type: ignore[assignment]
    file.append('{"update": 2}')
    file.append('{"update": 3}')
    assert (tmp_path / "metrics.jsonl").read_text() == '{"update": 1}\n'
    file._file = real
    file.append('{"update": 4}')
    file.close()
    assert [r["update"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len([r for r in caplog.records if "tried again" in r.message]) == 1


def test_a_tracker_gets_everything_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    asked = fake_wandb(monkeypatch, sent)
    picture = tmp_path / "00.png"
    run = tracker(tmp_path, wandb="offline")
    run.log({"update": 1})
    run.alert("loss spike")
    run.images(1, [picture])
    run.close()
    assert [m["kind"] for m in sent[:-1]] == ["metrics", "alert", "images"]
    assert sent[2]["files"] == [str(picture)]
    assert (sent[-1], asked) == ("closed", ["offline"])


@pytest.mark.parametrize("fault", ["open: exit", "open: raise", "write: raise", "write: exit"])
def test_a_failing_tracker_goes_offline_with_one_warning(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Any] = []
    asked = fake_wandb(monkeypatch, sent, fault, "")
    run = tracker(tmp_path, wandb="online", total=20)
    for update in range(20):
        run.log({"step": update, "update": update})
    run.close(10)
    assert asked == ["online", "offline"]
    assert len(caplog.records) == 1
    assert "going on with wandb offline" in caplog.text
    assert "second line" not in caplog.text
    assert [message["record"]["update"] for message in sent[:-1]] == list(range(20))


def test_what_a_tracker_that_is_given_up_lost_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = fake_wandb(monkeypatch, [], "open: raise")
    run = tracker(tmp_path, wandb="online", total=20)
    for update in range(20):
        run.log({"step": update, "update": update})
        time.sleep(0.002)
    run.close(10)
    assert asked == ["online", "offline"]
    assert "going on with metrics.jsonl alone" in caplog.text
    assert "20 messages were not delivered" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 20


@pytest.mark.parametrize("fault", ["open: hang", "write: hang", "close: hang"])
def test_a_hanging_tracker_costs_neither_time_nor_lines(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, [], fault)
    monkeypatch.setattr(trackers, "QUEUE_LENGTH", 8)
    monkeypatch.setattr(trackers, "KILL_S", 0.2)
    aborted: list[int] = []
    monkeypatch.setattr(trackers, "kill_wandb", lambda: aborted.append(1))
    run = tracker(tmp_path, total=500, wandb="offline")
    spent = []
    for update in range(1, 501):
        before = time.perf_counter()
        run.log({"step": update, "update": update, "pad": "x" * 1000})
        spent.append(time.perf_counter() - before)
    before = time.monotonic()
    run.close(timeout_s=1.0)
    assert time.monotonic() - before < 5
    assert aborted == [1]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 500
    assert sorted(spent)[250] < 0.002
    assert max(spent) < 0.5  # generous: other processes share the cores
    if fault != "close: hang":
        assert "messages were not delivered; metrics.jsonl is complete" in caplog.text


def test_putting_costs_microseconds() -> None:
    queued = Queued([("fake", lambda: Fake("open: hang"))])
    record = {"update": 1, "loss": 0.1}
    best = 1.0
    for _ in range(10_000):  # more than the queue takes
        before = time.perf_counter()
        queued.put({"kind": "metrics", "record": record})
        best = min(best, time.perf_counter() - before)
    assert queued.waiting() + queued.dropped == 10_000
    assert best < 20e-6


def test_injected_faults_stay_in_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ANIX_FAULT", "track@2:raise=ConnectionError")
    fake_wandb(monkeypatch, [])
    run = tracker(tmp_path, wandb="offline")
    for update in range(1, 4):
        run.log({"step": update, "update": update})
    run.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert "ConnectionError" in caplog.text


def test_random_states_are_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, [])
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    run = tracker(tmp_path, wandb="offline", tensorboard=True)
    run.log({"update": 1, "loss": 0.1})
    run.alert("x")
    run.close()
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    assert before == after


def test_a_wandb_that_cannot_run_costs_tensorboard_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    asked = fake_wandb(monkeypatch, [], "open: exit")
    monkeypatch.setattr(trackers, "TensorBoard", lambda settings: Fake("", sent))
    run = tracker(tmp_path, wandb="offline", tensorboard=True)
    run.log({"step": 1, "update": 1})
    run.close()
    assert asked == ["offline", "offline"]
    assert [message if message == "closed" else message["record"]["update"] for message in sent] == [1, "closed"]


def test_secrets_are_masked_in_alerts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-a-secret")
    run = tracker(tmp_path)
    run.alert("failed with canary-of-a-secret")
    run.close()
    assert "canary-of-a-secret" not in capsys.readouterr().err


def test_flatten() -> None:
    assert flatten({"a": 1, "b": [2, None, {"c": 3}], "d": None}) == {"a": 1, "b/0": 2, "b/2/c": 3}


def test_deciles_literal() -> None:
    deciles = loss_by_decile([0, 99, 100, 999], [1.0, 3.0, 5.0, 7.0])
    assert deciles == [2.0, 5.0, None, None, None, None, None, None, None, 7.0]


@given(st.lists(st.tuples(st.integers(0, 999), st.floats(0, 10)), min_size=1, max_size=50))
def test_deciles_keep_the_sum(pairs: list[tuple[int, float]]) -> None:
    timesteps, losses = [t for t, _ in pairs], [x for _, x in pairs]
    counts = [sum(t // 100 == d for t in timesteps) for d in range(10)]
    total = sum((mean or 0.0) * n for mean, n in zip(loss_by_decile(timesteps, losses), counts, strict=True))
    assert total == pytest.approx(sum(losses))


def test_starvation_is_said_once_a_while() -> None:
    watch = StarvationWatch(window=10, limit=0.25, quiet=100)
    assert [watch.see(0.1, 1.0) for _ in range(30)] == [None] * 30
    said = [text for _ in range(100) if (text := watch.see(0.5, 1.0))]
    assert len(said) == 1
    assert "50%" in said[0]
    assert "data.workers" in said[0]


def test_a_starving_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tracker(tmp_path, total=60)
    for update in range(1, 61):
        waited = {"data_wait_s": 0.0005 if update > 3 else 0.0}
        time.sleep(0.01 if update % 10 == 0 else 0.0)  # previews: their time is not the update's
        run.log({"step": update, "update": update, **waited}, update_s=0.001)
    run.close()
    assert capsys.readouterr().err.count("data.workers") == 1


def test_the_bar_tells_what_a_run_is_judged_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tracker(tmp_path, total=10, resume=5)
    run._bar.mininterval = 0.0
    record = {"loss": 0.125, "lr_unet": 1e-5, "lr_text_encoder": 5e-6, "grad_norm": 0.5, "images_per_s": 3.0}
    run.log({"step": 6, "update": 5, "epoch": 0.5, "skipped": 1, **record})
    time.sleep(0.05)
    run.log({"step": 7, "update": 6, "epoch": 0.6, "skipped": 1, **record})
    run.close()
    shown = capsys.readouterr().err.splitlines()[-1]
    for words in ("test:  70%", "7/10", "epoch 0.6,", "loss 0.1250", "lr 1.00e-05", "te 5.00e-06", "norm 0.500",
                  "img/s 3.00", "skipped 1", "mem "):  # fmt: skip
        assert words in shown, shown
    assert re.search(r"\[00:00<00:\d\d", shown), "elapsed and remaining time"


def test_where_stderr_is_no_terminal_the_bar_is_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tracker(tmp_path, total=2)
    run._bar.mininterval = 0.0
    for update in (1, 2):
        run.log({"step": update, "update": update, "loss": 0.5})
    run.alert("something")
    run.close()
    written = capsys.readouterr().err
    assert "\r" not in written
    assert written.endswith("\n")
    assert "WARNING: something" in written.splitlines()
    assert [line for line in written.splitlines() if not line.strip()] == []


def test_a_line_costs_little(tmp_path: Path) -> None:
    """1 % of the fastest update there is (0.1 s, the tiny model) would be 1 ms."""
    run = tracker(tmp_path, total=2000)
    record = {"loss": 0.1, "lr_unet": 1e-5, "grad_norm": 0.5, "images_per_s": 3.0, "loss_by_decile": [0.1] * 10}
    best = 1.0
    for update in range(1, 2001):
        before = time.perf_counter()
        run.log({"step": update, "update": update, "data_wait_s": 0.0, **record})
        best = min(best, time.perf_counter() - before)
    run.close()
    assert best < 0.001
    print(f"log: {best * 1e6:.0f} us at best")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_real_wandb(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Online means a server that refuses connections: the run ends offline, complete."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(trackers, "INIT_S", 4.0)
    ending = sys.exit, sys.excepthook
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    run = tracker(tmp_path, wandb=mode)
    run.log({"step": 1, "update": 1, "loss": 0.5})
    run.close(60)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    assert ending == (sys.exit, sys.excepthook)
    assert services() == []
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert ("going on with wandb offline" in caplog.text) == (mode == "online")
    assert "not delivered" not in caplog.text
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"0123456789" * 4 not in written


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_of_wandb_that_dies_or_stands_still(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracker(tmp_path, total=400, wandb="offline")
    run.log({"step": 1, "update": 1})
    deadline = time.monotonic() + 30
    while run.undelivered() and time.monotonic() < deadline:
        time.sleep(0.05)
    (service,) = services()
    service.send_signal(number)
    for update in range(2, 400):
        run.log({"step": update, "update": update, "pad": "x" * 10_000})
    before = time.monotonic()
    run.close(15.0 if number == signal.SIGKILL else 2.0)
    assert time.monotonic() - before < 20
    assert services() == []
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 399
    if number == signal.SIGKILL:
        assert "going on with wandb offline" in caplog.text
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.slow
def test_a_resumed_run_is_the_same_one_at_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb draws over `update`, so that lines from before the kill may be sent again."""
    sent: list[dict[str, Any]] = []
    real = trackers.flatten
    monkeypatch.setattr(trackers, "flatten", lambda record: sent.append(real(record)) or sent[-1])
    for first, resume in ((1, 0), (2, 1)):
        run = tracker(tmp_path, wandb="offline", resume=resume)
        for update in (first, first + 1):
            run.log({"step": update, "update": update, "loss": 0.5})
        run.close(60)
    number = (tmp_path / "wandb_id.txt").read_text().strip()
    # two runs begun in one second: wandb puts a -1 behind the second
    assert [folder.name.split("-")[3] for folder in (tmp_path / "wandb").glob("offline-run-*")] == [number] * 2
    assert [record["update"] for record in sent] == [1, 2, 2, 3]


@pytest.mark.slow
def test_pictures_of_several_sizes_in_wandb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "00.png", tmp_path / "01.png"]
    for file, size in zip(files, ((64, 96), (96, 64)), strict=True):
        Image.new("RGB", size).save(file)
    run = tracker(tmp_path, wandb="offline")
    run.log({"step": 1, "update": 1, "loss": 0.5})
    run.images(1, files)
    run.close(60)
    assert "sizes do not match" not in capfd.readouterr().err
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples/*.png"))) == 2


@pytest.mark.slow
def test_real_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tracker(tmp_path, tensorboard=True)
    run.log({"step": 1, "update": 1, "loss": 0.5, "loss_by_decile": [0.25, None]})
    run.close(60)
    (events,) = (tmp_path / "tensorboard").iterdir()
    code = (
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E; import sys; "
        "e = E(sys.argv[1]); e.Reload(); print(e.Scalars('loss'), e.Scalars('loss_by_decile/0'), e.Tags()['tensors'])"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(events)], capture_output=True, text=True, check=True)
    assert "step=1, value=0.5" in shown.stdout
    assert "value=0.25" in shown.stdout
    assert "config/batch.micro" in shown.stdout


def test_spike_is_six_sigma_and_nothing_less():
    history = [1.0, 3.0] * 64  # mean 2, sample deviation sqrt(128/127)
    sigma = (128 / 127) ** 0.5
    assert spike_sigmas(history, 2 + 5.99 * sigma) is None
    assert spike_sigmas(history, 2 + 6.01 * sigma) == pytest.approx(6.01)
    assert spike_sigmas([100.0] * 50 + history, 2 + 6.01 * sigma) is not None  # only the last 128 count
    assert spike_sigmas(history[:7], 1e9) is None
    assert spike_sigmas(history, float("nan")) is None
    assert spike_sigmas([0.5] * 20, 0.5) is None
    assert spike_sigmas([0.0] * 20, 0.0) is None


def test_the_detector_remembers_128_losses_and_forgets_older_ones():
    detector = SpikeDetector([1.0, 1.1] * 10)
    assert detector.check(1.05) is None
    assert "sigma above the last 21" in detector.check(50.0)
    for _ in range(128):
        detector.check(1.0)
    assert len(detector.history) == 128
    assert detector.check(2.0) is not None


def test_ordinary_noise_gives_no_false_alarm():
    draw = random.Random(3)
    losses = [draw.gauss(0.1, 0.02) for _ in range(3000)]
    assert not [i for i in range(50, 3000) if spike_sigmas(losses[:i], losses[i])]
