"""Metrics of a run: metrics.jsonl (the source of truth), a progress bar, and wandb and TensorBoard beside it.

wandb and TensorBoard live behind bounded queues in threads (train/observe/trackers.py).
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from train.base.secrets import mask, mask_settings
from train.config.stage import TrackingConfig
from train.observe.metrics import MetricsFile
from train.observe.trackers import Queued, close_trackers, open_trackers

log = logging.getLogger("anix")

DECILES = 10


class Tracker:
    """Owner of a run's metrics. On other than the main process every method does nothing.

    `log` costs well under a millisecond. A metrics.jsonl that cannot be written (disk full) is kept in memory
    and tried again at the next update: losing pictures of a run is better than losing the run.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tracking: TrackingConfig,
        *,
        is_main: bool,
        run_name: str,
        config_flat: Mapping[str, Any],
        total_steps: int,
        resume_step: int = 0,
    ) -> None:
        self.is_main = is_main
        self._trackers: list[Queued] = []
        if not is_main:
            return
        self._metrics = MetricsFile(Path(run_dir) / "metrics.jsonl")
        self._bar = _make_bar(run_name, total_steps, resume_step)
        self._starvation = StarvationWatch()
        self._epoch: Any = None
        settings = {
            "run_dir": str(Path(run_dir).resolve()),
            "project": mask_settings(tracking.project or "anix"),
            "name": mask_settings(tracking.name or run_name),
            "config": {key: mask_settings(_plain(value)) for key, value in config_flat.items()},
        }
        self._trackers = open_trackers(tracking, settings)

    def log(self, record: Mapping[str, Any], *, update_s: float = 0.0) -> None:
        """Append one update's record: step, update, epoch, images, loss, lr_unet, ... (numbers, text, lists).

        Its `data_wait_s` is watched as a share of the time `update_s` that the update itself took, without previews
        and validation (0 = not known): a training that starves for data says so.
        """
        if not self.is_main:
            return
        plain = {key: _plain(value) for key, value in record.items()}
        self._metrics.append(json.dumps(plain))
        self._send({"kind": "metrics", "record": plain})
        if plain.get("epoch") != self._epoch and plain.get("peak_reserved_bytes"):
            log.info("epoch %s: %s", plain["epoch"], memory_line(plain["peak_reserved_bytes"], plain["peak_allocated_bytes"]))
        self._epoch = plain.get("epoch")
        starving = self._starvation.see(plain.get("data_wait_s") or 0.0, update_s)
        if starving:
            self.alert(starving)
        self._bar.set_postfix_str(_postfix(plain), refresh=False)
        # Steps of the plan, not updates applied: a skipped update is a step less to go.
        self._bar.update(max(int(plain.get("step", self._bar.n + 1)) - self._bar.n, 0))

    def validation(self, record: Mapping[str, Any]) -> None:
        """Append a held-out measurement (`update`, `loss`, `strata`, ...) to validation.jsonl."""
        if not self.is_main:
            return
        plain = _plain(record)
        try:
            file = MetricsFile(self._metrics.path.with_name("validation.jsonl"))
            file.append(json.dumps(plain))
            file.close()
        except OSError as error:  # a measurement is not worth the run
            log.warning("validation.jsonl cannot be written: %s", error)
        shown = {key: value for key, value in plain.items() if key not in ("update", "step", "losses")}
        self._send({"kind": "metrics", "record": {"update": plain["update"], "validation": shown}})

    def alert(self, text: str) -> None:
        """One line above the bar, and in the trackers. Secrets are masked."""
        if not self.is_main:
            return
        from tqdm import tqdm

        tqdm.write(f"WARNING: {mask(text)}", file=sys.stderr)
        self._send({"kind": "alert", "text": mask(text)})

    def images(self, step: int, files: Sequence[str | Path]) -> None:
        """Hand picture files that exist on disk to the trackers."""
        if self.is_main:
            self._send({"kind": "images", "step": step, "files": [str(Path(file).resolve()) for file in files]})

    def undelivered(self) -> int:
        """Messages that the trackers have not taken yet."""
        return sum(one.waiting() for one in self._trackers)

    def close(self, timeout_s: float | None = None) -> None:
        """Finish the bar and the file; wait at most `timeout_s` (30 s) for the trackers, then end them."""
        if not self.is_main:
            return
        self._bar.close()
        self._metrics.close()
        close_trackers(self._trackers, timeout_s)
        self._trackers = []

    def _send(self, message: Mapping[str, Any]) -> None:
        for one in self._trackers:
            one.put(message)


def loss_by_decile(
    timesteps: Iterable[int], losses: Iterable[float], low: int = 0, high: int = 1000
) -> list[float | None]:
    """Mean loss of an update's images in each tenth of the timestep range; None where no image fell."""
    sums, counts = [0.0] * DECILES, [0] * DECILES
    for timestep, loss in zip(timesteps, losses, strict=True):
        decile = min(max((int(timestep) - low) * DECILES // (high - low), 0), DECILES - 1)
        sums[decile] += float(loss)
        counts[decile] += 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


class StarvationWatch:
    """Tells when the training waits for its data: a share above `limit` over `window` updates, said once a while."""

    def __init__(self, *, window: int = 50, limit: float = 0.25, quiet: int = 1000) -> None:
        self.window, self.limit, self.quiet = window, limit, quiet
        self._wait_s = self._whole_s = 0.0
        self._count = 0
        self._mute = 0

    def see(self, wait_s: float, update_s: float) -> str | None:
        """Count one update that took `update_s`, `wait_s` of it waiting; an alert text when it is time for one."""
        self._wait_s, self._whole_s, self._count = self._wait_s + wait_s, self._whole_s + update_s, self._count + 1
        self._mute = max(self._mute - 1, 0)
        if self._count < self.window:
            return None
        share = self._wait_s / self._whole_s if self._whole_s > 0 else 0.0
        self._wait_s = self._whole_s = 0.0
        self._count = 0
        if share <= self.limit or self._mute:
            return None
        self._mute = self.quiet
        waited = f"the last {self.window} updates waited {share:.0%} of their time for data"
        return f"{waited}: raise data.workers or data.prefetch"


class LogLines:
    """The bar where stderr is no terminal: a line every half minute. Returned carriages would make the whole log one
    line, which viewers cut or hold back, and glue warnings to it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.encoding = stream, getattr(stream, "encoding", "ascii")

    def write(self, text: str) -> int:
        """Whole lines; what only clears or moves is dropped."""
        for line in text.replace("\r", "\n").split("\n"):
            if line.strip():
                self.stream.write(f"{line.rstrip()}\n")
        return len(text)

    def flush(self) -> None:
        """Pass it on."""
        self.stream.flush()


def _make_bar(run_name: str, total_steps: int, resume_step: int) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no helper thread: the process may still fork data workers
    seen = sys.stderr.isatty()
    return tqdm(
        total=total_steps,
        initial=resume_step,
        desc=run_name,
        unit="update",
        dynamic_ncols=True,
        mininterval=0.2 if seen else 30.0,  # a log file does not want ten lines a second
        file=sys.stderr if seen else LogLines(sys.stderr),
    )


def _postfix(record: Mapping[str, Any]) -> str:
    shown = []
    for key, label, form in (
        ("epoch", "epoch", "{:.4g}"),
        ("loss", "loss", "{:.4f}"),
        ("lr_unet", "lr", "{:.2e}"),
        ("lr_text_encoder", "te", "{:.2e}"),
        ("grad_norm", "norm", "{:.3f}"),
        ("images_per_s", "img/s", "{:.2f}"),
    ):
        value = record.get(key)
        if isinstance(value, int | float):
            shown.append(f"{label} {form.format(value)}")
    if record.get("skipped"):
        shown.append(f"skipped {record['skipped']}")
    return ", ".join([*shown, f"mem {memory_bytes() / 2**30:.1f}G"])


def memory_line(reserved_bytes: int, allocated_bytes: int) -> str:
    """What the allocator holds and how much of it was ever in use: the rest is lost to fragmentation."""
    lost = 1 - allocated_bytes / max(reserved_bytes, 1)
    return f"{reserved_bytes / 2**30:.1f} GiB of GPU memory reserved, {allocated_bytes / 2**30:.1f} GiB allocated at most ({lost:.0%} lost)"


def memory_bytes() -> int:
    """Peak memory of the GPU where one is in use, else this process's resident peak."""
    torch = sys.modules.get("torch")  # never imported for this
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain(value: Any) -> Any:
    """`value` as JSON knows it; non-finite numbers as text, since JSON has no word for them."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, int) else str(value)


SPIKE_SIGMAS = 6.0


SPIKE_WINDOW = 128  # updates


_SPIKE_LEAST = 8  # losses before anything can be called unusual


def spike_sigmas(history: Collection[float], loss: float) -> float | None:
    """How many standard deviations `loss` lies above the last 128 losses, if that is a spike, else None.

    A spike (6 sigma) is reported and counted; the run goes on unchanged. `history` excludes `loss`.
    """
    window = [value for value in list(history)[-SPIKE_WINDOW:] if math.isfinite(value)]
    if len(window) < _SPIKE_LEAST or not math.isfinite(loss):
        return None
    mean = math.fsum(window) / len(window)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in window) / (len(window) - 1))
    deviation = max(deviation, abs(mean) * 1e-6)  # equal losses: rounding is not a spike
    sigmas = (loss - mean) / deviation if deviation > 0 else 0.0
    return sigmas if sigmas > SPIKE_SIGMAS else None


class SpikeDetector:
    """Owner of the last losses. A resumed run may hand in those of its `metrics.jsonl`."""

    def __init__(self, history: Iterable[float] = ()) -> None:
        self.history = deque(history, maxlen=SPIKE_WINDOW)
        self.sigmas: float | None = None  # of the last loss, if it was a spike

    def check(self, loss: float) -> str | None:
        """What is unusual about this update's loss, else None; then it counts as seen."""
        self.sigmas, seen = spike_sigmas(self.history, loss), len(self.history)
        self.history.append(loss)
        return None if self.sigmas is None else f"loss {loss:.4g} lies {self.sigmas:.1f} sigma above the last {seen}"
