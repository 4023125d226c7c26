"""Row A9 of benchmark A: what logging and the hooks for previews cost an update at which no picture is due."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.engine import loop
from train.engine.session import Session
from train.testing.loop import MICRO, ROOT, TILES, WARM_UPDATES, tiny_session
from train.testing.timing import Timing, row

UPDATES_PER_REPEAT = 10  # half of them with hooks
TRACKERS_S = 90.0  # what wandb and TensorBoard get to start before anything is timed
LOOKING = (  # previews on, never due
    "tracking.wandb=offline", "sampling.every_steps=1000000",
    f"sampling.prompts={ROOT / 'configs' / 'tiny' / 'prompts.yaml'}",
)  # fmt: skip
Hook = Callable[..., None]


class Alternating:
    """Stands in for the loop's two hooks: every second update runs them, timed; the others run nothing."""

    def __init__(self, session: Session, log: Hook, after: Hook, updates: int) -> None:
        self.session, self.real_log, self.real_after = session, log, after
        self.left, self.on = updates, True
        self.whole = {"with hooks": Timing(), "without": Timing()}
        self.hooks = Timing()
        self._cpu = self._wall = 0.0
        self._began()

    def log(self, *given: Any) -> None:
        """In place of loop.log_update."""
        self._timed(self.real_log, given)

    def after(self, *given: Any) -> None:
        """In place of loop.after_update: closes this update's times and opens the next one's."""
        self._timed(self.real_after, given)
        times = self.whole["with hooks" if self.on else "without"]
        times.cpu_s.append(time.process_time() - self._started[0])
        times.wall_s.append(time.perf_counter() - self._started[1])
        if self.on:
            self.hooks.cpu_s.append(self._cpu)
            self.hooks.wall_s.append(self._wall)
        self.on, self.left = not self.on, self.left - 1
        if self.left <= 0:
            self.session.run.last_step = self.session.run.progress.step
        self._began()

    def _began(self) -> None:
        self._cpu = self._wall = 0.0
        self._started = time.process_time(), time.perf_counter()

    def _timed(self, hook: Hook, given: tuple[Any, ...]) -> None:
        if not self.on:
            return
        cpu, wall = time.process_time(), time.perf_counter()
        hook(*given)
        self._cpu += time.process_time() - cpu
        self._wall += time.perf_counter() - wall


def hooks_row(folder: Path, repeats: int) -> dict[str, Any]:
    """A9: updates with and without the hooks in turn, and the hooks by themselves."""
    with tiny_session(folder, *LOOKING) as session:
        real: dict[str, Hook] = {"log_update": loop.log_update, "after_update": loop.after_update}
        try:
            for updates in (WARM_UPDATES, repeats * UPDATES_PER_REPEAT):
                session.run.last_step = session.run.progress.step + 10**6  # no update is the last: at that one previews are due
                turns = Alternating(session, real["log_update"], real["after_update"], updates)
                for name, hook in zip(real, (turns.log, turns.after), strict=True):
                    setattr(loop, name, hook)
                loop.run_updates(session)
                _wait_for_trackers(session)
        finally:
            for name, hook in real.items():
                setattr(loop, name, hook)
    whole = statistics.median(turns.whole["without"].cpu_s)
    hooks = statistics.median(turns.hooks.cpu_s)
    ours, bare = (statistics.median(turns.whole[name].cpu_s) for name in ("with hooks", "without"))
    notes = {
        "hooks by themselves, ms CPU": round(hooks * 1000, 3),
        "hooks by themselves, ms wall": round(statistics.median(turns.hooks.wall_s) * 1000, 3),
        "share of the update, CPU time": f"{hooks / whole:.2%}",
        "difference of the medians": f"{(ours - bare) / bare:+.1%} (as noisy as the machine)",
        "includes": "metrics.jsonl, bar, queue to wandb's thread, loss by timestep, spike and starvation watch",
    }
    what = f"hooks of an update of {TILES} x {MICRO} images, tiny SDXL, wandb offline, previews on but not due"
    rounds = {name: timing.rounds(UPDATES_PER_REPEAT // 2) for name, timing in turns.whole.items()}
    return row("A9", what, "<= 1 % of the update", rounds, MICRO * TILES, notes=notes)


def _wait_for_trackers(session: Session) -> None:
    deadline = time.monotonic() + TRACKERS_S
    while session.observers.tracker.undelivered() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)  # its service still digests what it got
