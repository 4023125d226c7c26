"""Benchmark B: the full-size training step on a card, in two calls of minutes that lose nothing when they are cut.

The caller hears of the result after everything that is finished: the first minute, the probe, every row. Rows that may share a
process do, since its start costs as much as a row; compiled and strict ones have one each, last.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.testing import timing
from train.testing.gpu import first_minute, variants
from train.testing.gpu.variants import (
    CALL_S,
    CALLS,
    H200_TFLOPS,
    IMPORT_S,
    PROBE_S,
    VARIANTS,
    Variant,
    describe_variant,
    expected_s,
    own_process,
)

ROOT = Path(__file__).resolve().parents[3]
Keep = Callable[[dict[str, Any]], object]


def command(arguments: argparse.Namespace, keep: Keep) -> tuple[dict[str, Any], str]:
    """(result, its text) of `bench.py gpu`: a call of the plan, or the rows that --only names."""
    if arguments.dry_run and not arguments.only:
        calls = {call: variants.plan(choose(names), first_minute=call == 1) for call, names in CALLS.items()}
        result: dict[str, Any] = {"calls": {call: [asdict(step) for step in steps] for call, steps in calls.items()}}
        return result | {"limits_s": CALL_S}, describe_calls(calls)
    only = arguments.only.split(",") if arguments.only else None
    budget = arguments.budget or CALL_S[arguments.call]
    result = run(
        only or CALLS[arguments.call], budget, begins=only is None and arguments.call == 1, probe_only=arguments.probe,
        tiny=arguments.tiny, dry_run=arguments.dry_run, earlier=arguments.earlier, keep=keep,
    )  # fmt: skip
    return result, describe(result)


def run(
    names: Sequence[str],
    budget_s: float,
    *,
    begins: bool = False,
    probe_only: bool = False,
    tiny: bool = False,
    dry_run: bool = False,
    earlier: Path | None = None,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """{"machine", "first_minute", "probe", "variants"}; what no longer fits the budget is a row with `skipped`.

    names: variants with or without the stage (`plain`, `plain/1`). begins: a tiny stage trains, is killed and resumes first.
    earlier: the JSON of a call before, whose rows come along, so that ratios exist although one call cannot hold all. `keep`
    hears of the result after every part. Raises Halt(USAGE) for an unknown name or an unreadable file, Halt(MISMATCH)
    without a CUDA device unless `tiny` or `dry_run`, and for an earlier call on another card.
    """
    chosen = choose(names)
    before = _earlier(earlier) if earlier is not None else None
    result: dict[str, Any] = {"machine": _machine(), "tiny": tiny, "probe": None, "variants": []}
    if dry_run:
        return result | {"variants": [describe_variant(variant) for variant in chosen]}
    deadline = time.monotonic() + budget_s
    if before is not None:
        again = {variant.label for variant in chosen}
        result["variants"] = [row for row in before["variants"] if f"{row['name']}/{row['stage']}" not in again]
        result["probe"] = before["probe"]
    if begins and not probe_only:
        result["first_minute"] = first_minute.run(min(deadline - time.monotonic(), 2 * variants.FIRST_MINUTE_S))
        keep(result)
    for group in [[]] if probe_only else groups(chosen):
        for answer in _answers(group, deadline, tiny=tiny):
            if "probe" in answer:
                _take_probe(result, answer["probe"], before, tiny=tiny or probe_only)
            else:
                result["variants"].append(answer["row"])
            keep(result)
    return result


def groups(chosen: Sequence[Variant]) -> list[list[Variant]]:
    """Rows by process, in the order in which processes start: those that share one first."""
    shared = [variant for variant in chosen if not own_process(variant)]
    alone = [[variant] for variant in chosen if own_process(variant)]
    first_alone = bool(chosen) and own_process(chosen[0])  # a call whose most valuable row needs a process of its own
    return [*alone, shared] if first_alone and shared else [*([shared] if shared else []), *alone]


def _take_probe(result: dict[str, Any], probed: dict[str, Any], before: dict[str, Any] | None, *, tiny: bool) -> None:
    if not probed.get("gpu") and not tiny:
        why = probed.get("error") or "--dry-run shows the plan, --tiny the driver"
        raise Halt(ExitCode.MISMATCH, f"bench.py gpu needs a CUDA device: {why}")
    if before is not None and before["probe"].get("gpu") != probed.get("gpu"):
        raise Halt(ExitCode.MISMATCH, f"--earlier was measured on {before['probe'].get('gpu')}, this is another card")
    result["probe"] = probed


def _answers(group: Sequence[Variant], deadline: float, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """{"probe": ...}, then {"row": ...} of each variant as its process tells it; of those that cannot be had, why.

    A process that dies takes the row in progress with it; the rest start in a new one.
    """
    left = list(group)
    asked_probe = True
    while left or asked_probe:
        wanted: list[Variant] = []
        for variant in left:
            if variant.float8 and importlib.util.find_spec("torchao") is None:
                yield {"row": _skipped(variant, "torchao is not installed: pip install -e '.[fast]'")}
                continue
            reserved = sum(_expected(one, tiny=tiny) for one in [*wanted, variant]) + (0.0 if tiny else IMPORT_S + PROBE_S)
            if deadline - time.monotonic() >= reserved:
                wanted.append(variant)
            else:
                yield {"row": _skipped(variant, f"{max(deadline - time.monotonic(), 0.0):.0f} s of the budget left, about {reserved:.0f} needed")}
        if group and not wanted:
            return
        told = _told(list(wanted), deadline, tiny=tiny)
        left = []
        for answer in told:
            if "probe" in answer:
                asked_probe, probed = False, answer["probe"]
                yield answer
                continue
            yield {"row": _row(wanted.pop(0), answer["row"], probed, tiny=tiny)}
            if answer.get("died"):
                left, wanted = wanted, []
                break
        asked_probe = False


def _told(wanted: Sequence[Variant], deadline: float, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """What the process says, line by line. One that dies or is out of time is an error of the row in progress."""
    made = [variants.tiny(variant) if tiny else variant for variant in wanted]
    asked = json.dumps({"variants": [asdict(variant) for variant in made], "tiny": tiny})
    command = [sys.executable, "-W", "ignore", "-m", "train.testing.gpu.updates", asked]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | dict(os.environ)
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [threading.Thread(target=_read, args=(child, lines), daemon=True),
               threading.Thread(target=lambda: errors.extend(child.stderr or []), daemon=True)]  # fmt: skip
    for reader in readers:
        reader.start()
    try:
        for number in range(len(made) + 1):
            answer = _next(lines, deadline)
            if answer is None:
                child.kill()
                child.wait()
                readers[1].join(5.0)
                last = next((line.strip() for line in reversed(errors) if line.strip()), "no output")
                why = "stopped at the budget's end" if time.monotonic() >= deadline else f"exit {child.returncode}: {last[:300]}"
                if number == 0:
                    yield {"probe": {"gpu": None, "versions": {}, "error": why}}
                yield {"row": {"error": why}, "died": True}
                return
            yield answer
    finally:
        child.kill()
        child.wait()
        for reader, pipe in zip(readers, (child.stdout, child.stderr), strict=True):
            reader.join(5.0)
            if pipe is not None and not reader.is_alive():  # a grandchild may hold it open
                pipe.close()


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    for line in child.stdout or []:
        lines.put(line)
    lines.put(None)


def _next(lines: queue.Queue[str | None], deadline: float) -> dict[str, Any] | None:
    """The next line that is an answer; None at the process's end or the deadline. NaN becomes text: it is no JSON."""
    while True:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            return None
        if line is None:
            return None
        try:
            answer: Any = json.loads(line, parse_constant=str)
        except ValueError:
            continue  # a library's own words
        if isinstance(answer, dict):
            return answer


def _expected(variant: Variant, *, tiny: bool) -> float:
    return 0.0 if tiny else expected_s(variant)


def _skipped(variant: Variant, why: str) -> dict[str, Any]:
    return describe_variant(variant) | {"error": None, "commit": _machine()["commit"], "images_per_s": None, "skipped": why}


def _row(variant: Variant, found: dict[str, Any], probed: dict[str, Any], *, tiny: bool) -> dict[str, Any]:
    """Settings and prediction beside what was found, and the shares of the card's peak."""
    row = describe_variant(variant) | {"error": None, "commit": _machine()["commit"], "images_per_s": None} | found
    if found.get("images_per_s") and not tiny:
        measured = probed.get("peak_tflops") or H200_TFLOPS
        done = found["images_per_s"] * row["executed_tflop"]
        useful = found["images_per_s"] * row["useful_tflop"]
        row |= {"mfu_of_measured_peak": useful / measured, "mfu_790": useful / H200_TFLOPS, "hfu": done / measured}
    return row


def _earlier(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        _ = found["probe"]["versions"], [row["name"] for row in found["variants"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Halt(ExitCode.USAGE, f"--earlier {path} is no result of bench.py gpu: {error}") from error
    return found


def choose(names: Sequence[str]) -> list[Variant]:
    """The named variants in the order of the names; a name without a stage means both."""
    known = {variant.name for variant in VARIANTS} | {variant.label for variant in VARIANTS}
    if unknown := [name for name in names if name not in known]:
        listed = ", ".join(dict.fromkeys(variant.name for variant in VARIANTS))
        raise Halt(ExitCode.USAGE, f"--only {unknown[0]} is no variant; choose from {listed}")
    found = [variant for name in names for variant in VARIANTS if name in (variant.name, variant.label)]
    return list({variant.label: variant for variant in found}.values())


def describe_calls(calls: dict[int, list[variants.Planned]]) -> str:
    """The plan with its seconds: what each call does, and when it should be through."""
    lines = []
    for call, steps in calls.items():
        lines.append(f"call {call}: at most {CALL_S[call]:.0f} s, {sum(step.seconds for step in steps):.0f} s expected (estimates)")
        spent = 0.0
        for step in steps:
            spent += step.seconds
            lines.append(f"  {step.what:50} {step.seconds:6.0f} s, done after {spent:4.0f} s")
    return "\n".join([*lines, "every line is kept as soon as it is measured; --call 2 --earlier FIRST.json keeps the ratios"])


def _machine() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "commit": timing.commit_of(ROOT)[:7]}


def describe(result: dict[str, Any]) -> str:
    """Variants as a table with ratios to both references of their stage, predictions beside results."""
    lines = [f"{result['machine']['date']}  commit {result['machine']['commit']}"]
    if found := result.get("first_minute"):
        lines.append(f"first minute: {found['error'] or 'trained, killed, resumed: equal'} ({found['seconds']:.0f} s)")
    if result["probe"]:
        told = {key: value for key, value in result["probe"].items() if key != "versions"}
        lines.append(f"probe: {told}")
    lines.append(
        "variant                 stage  images/s  predicted   limit     GiB predicted MFU/790  /diffusers /sd-scripts  ms fwd+bwd, optimizer"
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
            f"{_number(row.get('ms_forward_backward'), 0):>12}{_number(row.get('ms_optimizer'), 0):>7}"
            f"  {row.get('error') or row.get('skipped') or row.get('bits') or ''}"
        )
    return "\n".join(lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}x" if one and other else "-"
