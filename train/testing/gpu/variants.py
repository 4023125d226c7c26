"""The variants of benchmark B: settings, and what we predict for each before anything is run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from train.model import memory
from train.model.memory import GIB, Setup
from train.tools.estimate.estimate import MODES

BUCKET = (832, 1216)
H200_TFLOPS = 790  # measured: an 8192^3 bf16 product on random data; datasheet 989


@dataclass(frozen=True)
class Variant:
    """One row: a stage of the recipe under one set of speed options."""

    name: str
    stage: int  # 1 = both encoders train, AdamW; 2 = U-Net alone, Adafactor
    micro: int
    accumulation: int
    exempt_steps: int = 0  # 0 = full checkpointing .. 5 = none
    style: str = "ours"  # ours | diffusers | sd_scripts: whose loop
    precision: str = "bf16"
    channels_last: bool = False
    compile: bool = False
    float8: bool = False
    strict: bool = False  # batch.determinism: deterministic kernels, one order of sums
    updates: int = 3  # the first warms up
    expected_mfu: float = 0.26  # of 790 TFLOP/s, written down before the first run; nobody has measured it

    @property
    def images(self) -> int:
        """Images per update."""
        return self.micro * self.accumulation

    @property
    def label(self) -> str:
        """Name and stage."""
        return f"{self.name}/{self.stage}"

    def setup(self) -> Setup:
        """For the memory prediction."""
        return Setup(self.stage == 1, "adamw" if self.stage == 1 else "adafactor", self.precision)


def _both(name: str, **options: Any) -> list[Variant]:
    return [Variant(name, 1, 16, 3, **options), Variant(name, 2, 48, 1, **options)]


VARIANTS: list[Variant] = [
    *_both("ref_diffusers", style="diffusers", expected_mfu=0.24),
    *_both("ref_sdscripts", style="sd_scripts", precision="fp16", expected_mfu=0.24),
    *_both("plain", expected_mfu=0.26),
    *_both("cl", channels_last=True, expected_mfu=0.27),
    Variant("partial_16_down2_mid", 1, 16, 3, 2, channels_last=True, expected_mfu=0.29),
    Variant("partial_8_1280", 1, 8, 6, 3, channels_last=True, expected_mfu=0.31),
    Variant("none_8", 1, 8, 6, 5, channels_last=True, expected_mfu=0.33),
    Variant("partial_16_1280", 2, 16, 3, 3, channels_last=True, expected_mfu=0.32),
    Variant("none_12", 2, 12, 4, 5, channels_last=True, expected_mfu=0.34),
    *_both("compile", compile=True, expected_mfu=0.30),
    *_both("cl_compile", channels_last=True, compile=True, expected_mfu=0.32),
    Variant("none_8_compile", 1, 8, 6, 5, channels_last=True, compile=True, expected_mfu=0.40),
    Variant("none_12_compile", 2, 12, 4, 5, channels_last=True, compile=True, expected_mfu=0.40),
    Variant("fp8", 1, 8, 6, 5, channels_last=True, compile=True, float8=True, expected_mfu=0.44),
    # Against `plain`, what strict costs; against each other, whether it keeps its promise: `bits` must be equal.
    *_both("strict", strict=True, updates=4, expected_mfu=0.25),
    *_both("strict_again", strict=True, updates=4, expected_mfu=0.25),
]


# What a borrowed quarter of an hour of a card holds: first what answers most. Call one is stage 1 with both references and
# the first row of stage 2, call two the rest of stage 2. Seconds below are estimates; nothing has run on a card yet.
CALLS: dict[int, tuple[str, ...]] = {
    1: ("plain/1", "none_8/1", "ref_sdscripts/1", "none_12/2", "ref_diffusers/1", "none_8_compile/1"),
    2: ("none_12_compile/2", "ref_diffusers/2"),
}
CALL_S = {1: 420.0, 2: 180.0}
FIRST_MINUTE_S, IMPORT_S, PROBE_S, BUILD_S, COMPILE_S = 60.0, 20.0, 5.0, 10.0, {1: 100.0, 2: 75.0}


def expected_s(variant: Variant) -> float:
    """Seconds of a row in a process that runs: networks, updates at the predicted speed (the first half as long again), graphs."""
    update_s = variant.images / prediction(variant)["predicted_images_per_s"]
    return BUILD_S + (variant.updates + 0.5) * update_s + COMPILE_S[variant.stage] * variant.compile


def own_process(variant: Variant) -> bool:
    """Compiled rows leave graphs and settings behind, strict ones kernels: no other row follows them."""
    return variant.compile or variant.strict


@dataclass(frozen=True)
class Planned:
    """One thing that a call does, and how long it is expected to take."""

    what: str
    seconds: float


def plan(chosen: Sequence[Variant], *, first_minute: bool) -> list[Planned]:
    """What is done, in order: the first minute on the card, rows that share a process, then those that do not.

    Rows keep the order in which they are given; the first of a process pays for its imports and the probe.
    """
    steps = [Planned("first minute: train, checkpoint, kill, resume", FIRST_MINUTE_S)] if first_minute else []
    shared = False
    for variant in chosen:
        starts = own_process(variant) or not shared
        shared = shared or not own_process(variant)
        steps.append(Planned(variant.label, expected_s(variant) + (IMPORT_S + PROBE_S) * starts))
    return steps


def tiny(variant: Variant) -> Variant:
    """The same variant with two images at a time, for checking the driver."""
    return replace(
        variant, micro=2, accumulation=min(variant.accumulation, 2), updates=3, compile=False, float8=False
    )


def prediction(variant: Variant) -> dict[str, float]:
    """images_per_s on an H200 and peak GiB, predicted; and the hardware's limit for it."""
    setup = variant.setup()
    useful = memory.image_flops(setup, *BUCKET)
    done = memory.image_flops(setup, *BUCKET, variant.exempt_steps)
    peak = memory.predict(setup, BUCKET, variant.micro, variant.exempt_steps)
    return {
        "predicted_images_per_s": round(variant.expected_mfu * H200_TFLOPS * 1e12 / useful, 1),
        "hardware_limit_images_per_s": round(H200_TFLOPS * 1e12 / done, 1),
        "predicted_gib": round(peak.total / GIB, 1),
        "useful_tflop": useful / 1e12,
        "executed_tflop": done / 1e12,
    }


def describe_variant(variant: Variant) -> dict[str, Any]:
    """Settings and prediction as JSON values."""
    more = {"checkpointing": MODES[variant.exempt_steps], "dtype": variant.precision}
    return asdict(variant) | more | {"optimizer": variant.setup().optimizer} | prediction(variant)
