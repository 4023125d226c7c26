"""Benchmark B: the full-size training step, one process per variant, within a time budget."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.testing.gpu.variants import H200_TFLOPS, VARIANTS, Variant, describe_variant, tiny

ROOT = Path(__file__).resolve().parents[3]
EXPECTED_S = {False: 60.0, True: 180.0}  # of one variant, by "compiled"; the first compilation dominates
PROBE_S = 90.0


def command(arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], object]) -> tuple[dict[str, Any], str]:
    """(result, its text) of `bench.py gpu`."""
    result = run(
        arguments.only.split(",") if arguments.only else None, arguments.budget,
        probe_only=arguments.probe, tiny=arguments.tiny, dry_run=arguments.dry_run, earlier=arguments.earlier,
    )  # fmt: skip
    return result, describe(result)


def run(
    only: Sequence[str] | None = None,
    budget_s: float = 560.0,
    *,
    probe_only: bool = False,
    tiny: bool = False,
    dry_run: bool = False,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """{"machine", "probe", "variants"}; what no longer fits the budget is a row with `skipped`.

    only: variant names, with or without the stage (`plain`, `plain/1`). earlier: the JSON of a call before, whose rows
    come along, so that ratios exist although one call cannot hold all variants. Raises Halt(USAGE) for an unknown
    name or an unreadable file, Halt(MISMATCH) without a CUDA device unless `tiny` or `dry_run`, and for an earlier
    call on another card.
    """
    chosen = choose(only)
    before = _earlier(earlier) if earlier is not None else None
    if dry_run:
        return {"machine": _machine(), "probe": None, "variants": [describe_variant(variant) for variant in chosen]}
    started = time.monotonic()
    probed = _child({"probe": True}, PROBE_S)
    result: dict[str, Any] = {"machine": _machine(), "probe": probed, "tiny": tiny, "variants": []}
    if probe_only:
        return result
    if not probed.get("gpu") and not tiny:
        raise Halt(
            ExitCode.MISMATCH, "bench.py gpu needs a CUDA device; --dry-run shows predictions, --tiny the driver"
        )
    if before is not None:
        if before["probe"].get("gpu") != probed.get("gpu"):
            raise Halt(
                ExitCode.MISMATCH, f"--earlier {earlier}: measured on {before['probe'].get('gpu')}, this is another card"
            )
        again = {variant.label for variant in chosen}
        result["variants"] += [row for row in before["variants"] if f"{row['name']}/{row['stage']}" not in again]
    for variant in chosen:
        left = budget_s - (time.monotonic() - started)
        result["variants"].append(_row(variant, left, probed, tiny=tiny))
    return result


def _earlier(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        _ = found["probe"]["versions"], [row["name"] for row in found["variants"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Halt(ExitCode.USAGE, f"--earlier {path} is no result of bench.py gpu: {error}") from error
    return found


def choose(only: Sequence[str] | None) -> list[Variant]:
    """The named variants in the table's order, or all."""
    if only is None:
        return VARIANTS
    known = {variant.name for variant in VARIANTS} | {variant.label for variant in VARIANTS}
    if unknown := [name for name in only if name not in known]:
        names = ", ".join(dict.fromkeys(variant.name for variant in VARIANTS))
        raise Halt(ExitCode.USAGE, f"--only {unknown[0]} is no variant; choose from {names}")
    return [variant for variant in VARIANTS if variant.name in only or variant.label in only]


def _row(variant: Variant, left_s: float, probed: dict[str, Any], *, tiny: bool) -> dict[str, Any]:
    row = describe_variant(variant) | {"error": None, "commit": _machine()["commit"]}
    expected = 5.0 if tiny else EXPECTED_S[variant.compile] * max(1.0, variant.updates / 10)
    if left_s < expected:
        return row | {
            "images_per_s": None,
            "skipped": f"{max(left_s, 0.0):.0f} s of the budget left, about {expected:.0f} needed",
        }
    if variant.float8 and "absent" in str(probed["versions"].get("torchao", "absent")):
        return row | {"images_per_s": None, "skipped": "torchao does not import: pip install -e '.[fast]'"}
    made = _shrunk(variant) if tiny else variant
    asked = {"variant": {name: getattr(made, name) for name in made.__dataclass_fields__}, "tiny": tiny}
    found = _child(asked, left_s)
    row |= {"images_per_s": None} | found
    if found.get("images_per_s") and not tiny:
        measured = probed.get("peak_tflops") or H200_TFLOPS
        done = found["images_per_s"] * row["executed_tflop"]
        useful = found["images_per_s"] * row["useful_tflop"]
        row |= {"mfu_of_measured_peak": useful / measured, "mfu_790": useful / H200_TFLOPS, "hfu": done / measured}
    return row


def _shrunk(variant: Variant) -> Variant:
    return tiny(variant)


def _child(asked: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """What one process answers; a crash or a timeout is an `error`."""
    command = [sys.executable, "-W", "ignore", "-m", "train.testing.gpu.updates", json.dumps(asked)]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | dict(os.environ)
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(limit_s, 1.0), env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit_s:.0f} s, the budget's end"}
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit {done.returncode}: {last[:300]}"}


def _machine() -> dict[str, Any]:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "commit": asked.stdout.strip() or "unknown"}


def describe(result: dict[str, Any]) -> str:
    """Variants as a table with ratios to both references of their stage, predictions beside results."""
    lines = [f"{result['machine']['date']}  commit {result['machine']['commit']}"]
    if result["probe"]:
        told = {key: value for key, value in result["probe"].items() if key != "versions"}
        lines.append(f"probe: {told}")
    lines.append(
        "variant                 stage  images/s  predicted   limit     GiB predicted MFU/790  /diffusers /sd-scripts"
    )
    references = {
        (row["stage"], row["name"]): row.get("images_per_s")
        for row in result["variants"]
        if row["name"].startswith("ref")
    }
    for row in result["variants"]:
        rate = row.get("images_per_s")
        ratios = [_ratio(rate, references.get((row["stage"], name))) for name in ("ref_diffusers", "ref_sdscripts")]
        lines.append(
            f"{row['name']:24}{row['stage']:5}{_number(rate):>10}{row['predicted_images_per_s']:>11}"
            f"{row['hardware_limit_images_per_s']:>8}{_number(row.get('peak_gib')):>8}{row['predicted_gib']:>10}"
            f"{_number(row.get('mfu_790'), 2):>8}{ratios[0]:>12}{ratios[1]:>12}"
            f"  {row.get('error') or row.get('skipped') or row.get('bits') or ''}"
        )
    return "\n".join(lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}x" if one and other else "-"
