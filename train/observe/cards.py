"""Cards by name: memory that may be taken and the dense 16-bit peak, with where the number comes from. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A card: what may be allocated on it, and its dense 16-bit peak."""

    name: str
    free_gib: float
    peak_tflops: float
    peak_source: str = "datasheet"


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80GB", 79.0, 312),
        Gpu("A100-40GB", 39.0, 312),
        Gpu("H100-80GB", 79.0, 790, "as the H200's, whose chip it has; datasheet 989"),
        Gpu("H200", 139.0, 790, "measured: an 8192^3 bf16 product; datasheet 989"),
        Gpu("L40S", 44.0, 362),
        Gpu("A6000", 47.0, 155),
        Gpu("RTX-4090", 23.0, 165),
        Gpu("RTX-5090", 31.0, 210),
        Gpu("RTX-3090", 23.0, 71),
    )
}


def is_card(gpu: Gpu, reported: str) -> bool:
    """Whether a driver's name (NVIDIA A100-SXM4-80GB, NVIDIA GeForce RTX 4090) is that of `gpu`, whatever its memory."""
    model = gpu.name if gpu.name.startswith("RTX-") else gpu.name.split("-")[0]
    return re.search(rf"\b{model}\b", reported.replace("RTX ", "RTX-"), re.IGNORECASE) is not None


def card_of(reported: str) -> Gpu | None:
    """The card that a driver's name is of; None for one that is not in the table."""
    return next((gpu for gpu in GPUS.values() if is_card(gpu, reported)), None)
