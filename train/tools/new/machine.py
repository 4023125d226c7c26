"""The card that will train, as the planner knows it, and the memory, cores and disk around it. No torch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import psutil

from train.base.files import free_bytes
from train.tools.estimate.machines import find_gpu
from train.tools.new.facts import Machine

ASSUMED = "RTX-4090"  # where none is here and none is named: 24 GB, the commonest card that trains SDXL
# Cards of before Ampere compute bf16 slowly or not at all.
_NO_BF16 = re.compile(r"\b(T4|P4|P40|P100|V100|M40|K80)\b|GTX|TITAN|RTX[ -]?20\d\d|RTX[ -]?[345]000\b|QUADRO", re.IGNORECASE)


def look(gpu: str | None, memory_gib: float | None, out: Path, *, small: bool) -> Machine:
    """The machine; `small`: a base that a processor trains, where no card is named or here."""
    cores, host = os.cpu_count() or 1, psutil.virtual_memory().available / 2**30
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    around = {"cores": cores, "host_gib": round(host, 1), "disk_gb": round(free_bytes(folder) / 1e9, 1), "peft": importlib.util.find_spec("peft") is not None}
    card, how = find_gpu(gpu, memory_gib)
    if how.startswith("assumed"):
        if small and memory_gib is None:
            return Machine(gpu=None, free_gib=around["host_gib"], how="no card here", bf16=False, **around)
        card, how = find_gpu(ASSUMED, memory_gib)
        how = "assumed: none named and none here" + (", memory given" if memory_gib is not None else "")
    return Machine(gpu=card.name, free_gib=card.free_gib, how=how, bf16=_NO_BF16.search(card.name) is None, **around)
