"""Where the time of updates goes: parts of an update by events, useful arithmetic against the card's peak, a profiler's trace.

Nothing here waits for the device but `seconds`, and that in updates that are measured alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.config.stage import TrackingConfig
from train.model import memory
from train.model.memory import Setup
from train.observe.cards import card_of
from train.recipe.order import Tile

log = logging.getLogger("anix")

PROFILED_UPDATES = 3
OF_THE_MACHINE = (  # what a line of metrics.jsonl says of the machine; all else is the same for any number of processes
    "images_per_s", "tflops", "mfu", "peak_allocated_bytes", "peak_reserved_bytes", "data_wait_s", "seconds",
)  # fmt: skip
TFLOP = 1e12


class Times:
    """Owner of an update's marks and of the profiler. Every `every`-th plan step is measured (0 = none).

    `mark(part)` ends a part: what passed since the mark before belongs to it. On a card marks are events in its stream, so
    a part is what the device spent or waited, not how long the host took to ask for it.
    """

    def __init__(self, device: torch.device, every: int = 0, *, profile_at: int | None = None, folder: Path | None = None) -> None:
        self.device, self.every, self.profile_at, self.folder = device, every, profile_at, folder
        self._marks: list[tuple[str, Any]] = []
        self._measured = False
        self._profiler: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Plan step `step` starts here."""
        self._measured = self.every > 0 and step % self.every == 0
        self._marks = [("", self._now())] if self._measured else []
        if self.folder is not None and self.profile_at == step:
            self._profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities()), record_shapes=True)
            self._profiler.start()

    def mark(self, part: str) -> None:
        """End of a stretch of `part` (data, forward_backward, communication, optimizer)."""
        if self._measured:
            self._marks.append((part, self._now()))

    def mark_before_sum(self, total: torch.Tensor) -> None:
        """For a backward from `total` at whose end gradients are summed over processes: mark where its own work ends.

        What DDP sums while backward still runs costs nothing; what is waited for afterwards is communication.
        """
        if self._measured:
            queue: Callable[..., None] = torch.autograd.Variable._execution_engine.queue_callback
            # Queued when backward starts, so it runs before DDP's own, which is queued by the last gradients and waits.
            total.register_hook(lambda _: queue(lambda: self.mark("forward_backward")))

    def seconds(self) -> dict[str, float] | None:
        """Seconds by part of the measured update; None between. Waits for the device."""
        if not self._measured:
            return None
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            spent = before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before
            found[part] = found.get(part, 0.0) + spent
        return {part: round(spent, 6) for part, spent in found.items()}

    def end(self, step: int, *, last: bool = False) -> None:
        """Plan step `step` is over, the run with `last`: a trace that is complete is written."""
        if self._profiler is not None and (last or step + 1 >= (self.profile_at or 0) + PROFILED_UPDATES):
            self._write(self._profiler)
            self._profiler = None

    def close(self) -> None:
        """The run ends, however it does: what was traced so far is written."""
        self.end(0, last=True)

    def _write(self, profiler: torch.profiler.profile) -> None:
        assert self.folder is not None
        file = self.folder / "profile" / f"step-{self.profile_at:08d}.json.gz"
        try:
            profiler.stop()
            file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
            log.info("profile of %d updates from step %s: %s (open it in ui.perfetto.dev)", PROFILED_UPDATES, self.profile_at, file)
        except (OSError, RuntimeError) as error:  # a trace is not worth the run
            log.warning("profile %s could not be written: %s", file, error)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def open_times(settings: TrackingConfig, run: Path, device: torch.device, first_step: int, *, is_main: bool) -> Times:
    """Those of a run, from `first_step` on; the main process alone measures and traces."""
    at = settings.profile_at
    if is_main and at is not None and at < first_step:
        log.warning("tracking.profile_at: %d lies behind this run, which goes on at step %d: nothing is traced", at, first_step)
    return Times(device, settings.times_every if is_main else 0, profile_at=at, folder=run if is_main else None)


OFF = Times(torch.device("cpu"))


@dataclass(frozen=True)
class Work:
    """Useful arithmetic of an update: what is recomputed does not count. `setup` is None for other than SDXL's own networks."""

    setup: Setup | None
    world: int
    peak_tflops: float | None  # of one card, 16 bit; None where it is not known

    def rates(self, tiles: Iterable[Tile], update_s: float) -> dict[str, float | None]:
        """TFLOP/s of one device, and as a share of its peak."""
        tiles = list(tiles)
        if self.setup is None or update_s <= 0 or any(tile.width % 32 or tile.height % 32 for tile in tiles):  # not counted
            return {"tflops": None, "mfu": None}
        flops = sum(len(tile.rows) * memory.image_flops(self.setup, tile.width, tile.height) for tile in tiles)
        tflops = flops / update_s / self.world / TFLOP
        return {"tflops": tflops, "mfu": tflops / self.peak_tflops if self.peak_tflops else None}


def open_work(setup: Setup | None, device: torch.device, world: int) -> Work:
    """Against the peak of the card that `device` is, which is said once with its source; none on a CPU or in fp32."""
    card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if setup is None or card is None or setup.precision == "fp32":  # the table's peaks are of 16-bit products
        return Work(setup, world, None)
    log.info("mfu counts against %g TFLOP/s of a %s (%s)", card.peak_tflops, card.name, card.peak_source)
    return Work(setup, world, card.peak_tflops)


def peak_bytes(device: torch.device) -> dict[str, int | None]:
    """Most device memory that tensors took and that torch kept, since the start; None on a CPU."""
    if device.type != "cuda":
        return {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
