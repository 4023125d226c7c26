"""Benchmark A: our data path, loop and checkpoints on the CPU, beside the reference trainers where they are found.

Sides of a row run in turn (A B A B), each several times; medians of CPU and wall time; a row whose repeats spread by
more than 30 % is marked noisy and never reported as met; what takes milliseconds is repeated for half a second within
each, or a scheduler's whim would be the spread. Nothing here is asserted in tests: machines differ.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPEATS = 5
NOISY_SPREAD = 0.30
LEAST_S = 0.5  # of one repeat, wall time
CHECKOUTS = {  # environment variable: (repository, commit of the published figures)
    "SDSCRIPTS_ORIGINAL_DIR": ("cagliostrolab/sd-scripts", "a8cf5157"),
    "SDSCRIPTS_DIR": ("kohya-ss/sd-scripts", "48d368fa"),
    "DIFFUSERS_DIR": ("huggingface/diffusers", "58eb52c0"),
}


@dataclass
class Timing:
    """Repeats of one side: CPU seconds of the process (and its reaped children) and wall seconds."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Medians, and the spread of the wall times over their median."""
        wall = statistics.median(self.wall_s)
        spread = (max(self.wall_s) - min(self.wall_s)) / wall if wall else 0.0
        return {
            "cpu_s": statistics.median(self.cpu_s),
            "wall_s": wall,
            "spread": round(spread, 3),
            "repeats": len(self.wall_s),
        }


    def rounds(self, size: int) -> Timing:
        """Means over `size` repeats after one another: short ones as fewer and longer ones."""
        return Timing(*([statistics.fmean(s[i : i + size]) for i in range(0, len(s), size)] for s in (self.cpu_s, self.wall_s)))


@dataclass(frozen=True)
class Checkout:
    """A reference trainer on this disk."""

    path: Path
    repository: str
    commit: str
    expected: bool  # the commit of the published figures


def interleave(sides: Mapping[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, Timing]:
    """Run every side once per round. A side may return (cpu_s, wall_s) measured elsewhere, or None to be timed here."""
    timings = {name: Timing() for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            told = run()
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            cpu_s, wall_s = told if isinstance(told, tuple) else spent
            timings[name].cpu_s.append(cpu_s)
            timings[name].wall_s.append(wall_s)
    return timings


def lasting(run: Callable[[], Any], least_s: float = LEAST_S) -> Callable[[], tuple[float, float]]:
    """A side that does `run` again and again for `least_s`, and tells the mean (cpu_s, wall_s) of one."""

    def repeated() -> tuple[float, float]:
        count, wall, cpu = 0, time.perf_counter(), time.process_time()
        while count == 0 or time.perf_counter() - wall < least_s:
            run()
            count += 1
        return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count

    return repeated


def row(
    ident: str, what: str, goal: str, timings: Mapping[str, Timing], items: Mapping[str, int] | int = 1, **more: Any
) -> dict[str, Any]:
    """One row of the result: medians and items per CPU second of each side, and the ratio of ours to each other."""
    counts = {name: items if isinstance(items, int) else items[name] for name in timings}
    sides = {
        name: timing.report() | {"items": counts[name], "items_per_s": counts[name] / timing.report()["cpu_s"]}
        for name, timing in timings.items()
    }
    ratios = {
        f"ours / {name}": round(sides["ours"]["items_per_s"] / side["items_per_s"], 2)
        for name, side in sides.items()
        if name != "ours" and "ours" in sides
    }
    noisy = [name for name, side in sides.items() if side["spread"] > NOISY_SPREAD]
    return {"id": ident, "what": what, "goal": goal, "sides": sides, "ratios": ratios, "noisy": noisy, **more}


def skipped(ident: str, what: str, why: str) -> dict[str, Any]:
    """A row that could not be measured here."""
    return {"id": ident, "what": what, "skipped": why}


def find_checkout(variable: str) -> Checkout | None:
    """The reference that an environment variable points to, or None."""
    folder = os.environ.get(variable, "")
    repository, wanted = CHECKOUTS[variable]
    if not folder or not Path(folder).is_dir():
        return None
    commit = commit_of(Path(folder))
    return Checkout(Path(folder), repository, commit[:8], commit.startswith(wanted))


def commit_of(folder: Path) -> str:
    """The commit of a checkout; "unknown" where it is none, or where there is no git."""
    try:
        asked = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def why_skipped(variable: str) -> str:
    """What to do about a reference that is not here."""
    return f"skipped: set {variable} to a checkout of {CHECKOUTS[variable][0]}"


def machine() -> dict[str, Any]:
    """Where and when: date, processor, load, versions, our commit."""
    import torch

    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    here = Path(__file__).resolve().parents[2]
    checkouts = {variable: find_checkout(variable) for variable in CHECKOUTS}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": f"{os.cpu_count()} x {model}",
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit_of(here)[:7],
        "references": {
            variable: "absent"
            if found is None
            else f"{found.repository}@{found.commit}"
            + ("" if found.expected else f" (warning: published figures are of {CHECKOUTS[variable][1]})")
            for variable, found in checkouts.items()
        },
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def describe(result: Mapping[str, Any]) -> str:
    """The rows as text: what was measured, medians, ratios, goal."""
    where = result["machine"]
    lines = [f"{where['date']}  {where['cpu']}  load {where['load_average']}  commit {where['commit']}"]
    for name, told in where["references"].items():
        lines.append(f"  {name}: {told}")
    for entry in result["rows"]:
        lines.append(f"{entry['id']:4} {entry['what']}")
        if "skipped" in entry:
            lines.append(f"       {entry['skipped']}")
            continue
        for name, side in entry["sides"].items():
            mark = "  noisy" if name in entry["noisy"] else ""
            lines.append(
                f"       {name:24} {side['wall_s']:10.4f} s wall {side['cpu_s']:10.4f} s cpu "
                f"{side['items_per_s']:12,.1f} per cpu second{mark}"
            )
        for name, ratio in entry["ratios"].items():
            lines.append(f"       {name}: {ratio:g}x")
        lines += [f"       {key}: {value}" for key, value in entry.get("notes", {}).items()]
        lines.append(f"       goal: {entry['goal']}")
    if seconds := result.get("seconds"):
        lines.append("seconds: " + ", ".join(f"{name} {spent:g}" for name, spent in seconds.items()))
    return "\n".join(lines)
