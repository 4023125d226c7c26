"""GPUs and speeds the planner knows: datasheet peaks, and how fast a full SDXL stage is expected to run on each."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.observe.cards import GPUS, Gpu, is_card


@dataclass(frozen=True)
class Speed:
    """Images per second on one card, and where the number comes from."""

    images_per_s: float
    source: str


DEFAULT_GPU = "A100-80GB"  # the card's machine had two
_ALIASES = {"A100": "A100-80GB", "H100": "H100-80GB", "4090": "RTX-4090", "3090": "RTX-3090", "5090": "RTX-5090"}
# Expected, not measured: middle of the range for eager kernels with full checkpointing, by trains_text.
_EXPECTED = {"A100-80GB": {True: 4.5, False: 4.5}, "H200": {True: 9.0, False: 9.0}, "H100-80GB": {True: 9.0, False: 9.0}}
_EXPECTED_MFU = 0.30  # of other cards' datasheet peak: what the A100 expectation amounts to
_UNKNOWN = f"unknown card, the {DEFAULT_GPU}'s assumed"
IMPLIED_BY_CARD = 3.4  # per A100, stage 1: 8,735,040 images in 15 days on two


def find_gpu(name: str | None, memory_gib: float | None) -> tuple[Gpu, str]:
    """(card, how it was chosen): the named one, else the one present, else the recipe's A100.

    memory_gib replaces its free memory. Raises Halt(USAGE) listing the known names.
    """
    if name is not None:
        known = {n.lower(): n for n in GPUS} | {alias.lower(): target for alias, target in _ALIASES.items()}
        if name.lower() not in known and memory_gib is not None:
            return Gpu(name, memory_gib, GPUS[DEFAULT_GPU].peak_tflops, _UNKNOWN), "given, memory given"
        if name.lower() not in known:
            raise Halt(
                ExitCode.USAGE, f"--gpu {name} is unknown; known: {', '.join(GPUS)}; any other with its --memory-gib"
            )
        gpu, how = GPUS[known[name.lower()]], "given"
    elif (present := _present()) is not None:
        gpu, how = present, "present"
    else:
        gpu, how = GPUS[DEFAULT_GPU], "assumed: none given and none here"
    if memory_gib is not None:
        gpu = Gpu(gpu.name, memory_gib, gpu.peak_tflops, gpu.peak_source)
        how += ", memory given"
    return gpu, how


def _present() -> Gpu | None:
    """The first GPU that nvidia-smi reports; asking torch would cost seconds and a CUDA context."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        name, free_mib = answer.strip().splitlines()[0].rsplit(",", 1)
        free_gib = float(free_mib) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    alike = [gpu for gpu in GPUS.values() if is_card(gpu, name)]
    closest = min(alike, key=lambda gpu: abs(gpu.free_gib - free_gib)) if alike else GPUS[DEFAULT_GPU]
    source = closest.peak_source if alike else _UNKNOWN
    return Gpu(name.strip(), free_gib, closest.peak_tflops, source)


def find_speed(
    gpu: Gpu,
    stage: str,
    *,
    trains_text: bool,
    flops_per_image: int,
    given: float | None,
    bench: Path | None,
    settings: Mapping[str, Any],
) -> Speed:
    """Images per second and card: given, else from a bench file, else the expectation, and says which.

    settings: those of the config under the bench rows' names; the row most like them is taken, of equals the fastest.
    """
    if given is not None:
        if not given > 0:
            raise Halt(ExitCode.USAGE, f"--images-per-s is {given}, must be above 0")
        return Speed(given, "given")
    if bench is not None:
        return _from_bench(bench, stage, 1 if trains_text else 2, settings, gpu)
    for name, by_stage in _EXPECTED.items():
        if is_card(GPUS[name], gpu.name):
            return Speed(by_stage[trains_text], "expected, nobody has measured it: eager kernels, full checkpointing")
    images = gpu.peak_tflops * 1e12 * _EXPECTED_MFU / flops_per_image
    return Speed(
        images, f"guess: {_EXPECTED_MFU:.0%} of {gpu.peak_tflops:g} TFLOP/s; measure with scripts/bench.py gpu"
    )


def _timed_rows(path: Path, bench_stage: int) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
        tiny = found.get("tiny", False)
        rows: list[dict[str, Any]] = [row for row in found["variants"] if row.get("stage") == bench_stage]
        timed = [{**row, "name": str(row["name"])} for row in rows if row.get("images_per_s")]
        if bad := [row["name"] for row in timed if not 0 < float(row["images_per_s"]) < math.inf]:
            raise ValueError(f"images_per_s of {bad[0]} must be above 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Halt(ExitCode.USAGE, f"--bench {path} is no file of scripts/bench.py gpu: {error}") from error
    if tiny:
        raise Halt(ExitCode.USAGE, f"--bench {path} was made with --tiny, which checks the driver and measures nothing")
    return timed


def _from_bench(path: Path, stage: str, bench_stage: int, settings: Mapping[str, Any], gpu: Gpu) -> Speed:
    timed = _timed_rows(path, bench_stage)
    if not timed:
        raise Halt(ExitCode.USAGE, f"--bench {path} has no timed variant for {stage} (bench stage {bench_stage})")
    # The reference rows are other trainers' settings, not something this configuration could run at.
    ours = [row for row in timed if not row["name"].startswith("ref_")] or timed
    other = {id(row): [key for key, value in settings.items() if row.get(key, value) != value] for row in ours}
    best = min(ours, key=lambda row: (len(other[id(row)]), -float(row["images_per_s"])))
    source = f"measured: {best['name']} in {path.name}, {best.get('gpu', 'GPU unnamed')}"
    model = next((known for known in GPUS.values() if is_card(known, gpu.name)), gpu)
    if best.get("gpu") and not is_card(model, str(best["gpu"])):
        source += f"; another card than {gpu.name}"
    if other[id(best)]:
        source += f"; this config differs in {', '.join(other[id(best)])}"
    return Speed(float(best["images_per_s"]), source)
