"""Values recorded from the trainer's own code, with origin and commit: numbers, so that our side is held without a checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from train.model import text
from train.testing.parity import data_rows, inputs, number_rows
from train.testing.parity.checkout import Checkout, ask
from train.testing.parity.inputs import Switches

EVERY = 8  # of an embedding's 320 values: a changed frequency shows in all of them
CORNER = 4  # columns of each channel's first row, of noise
# around every restart of the released run's curve, the rest spread
UPDATES = tuple(sorted({0, 1, 2, 9_098, 9_099, 9_100, *(4_549 + 9_099 * n // 2 + d for n in range(0, 8, 2) for d in (0, 1)),
                        *range(1_777, inputs.UPDATES, 1_531)}))[:40]  # fmt: skip


def record(config: Switches, checkout: Checkout, work: Path, origin: str) -> dict[str, Any]:
    """The trainer's answers, as JSON takes them, with what they were asked."""
    tokenizer = text.load_tag_tokenizer(None)
    texts = inputs.texts(tokenizer)
    cache = inputs.write_tokenizers(work / "tokenizers")
    asked = {"buckets": inputs.BUCKETS, "sizes": inputs.sizes(), "captions": inputs.captions(), "texts": texts, "tokenizers": str(cache)}
    data = ask(checkout, "data", work / "data", facts=asked)
    numbers = ask(checkout, "numbers", work / "numbers", tensors=number_rows.given(), facts={"noises": number_rows.NOISES})
    steps = number_rows.their_steps(config, checkout, work)
    rates = {name: number_rows.their_rates(case, checkout, work).tensors["rates"] for name, case in number_rows.curves(config).items()}
    return {
        "origin": origin, "commit": checkout.commit, "date": checkout.date,
        "python": data.facts["python"], "packages": data.facts["packages"],
        "timesteps": list(inputs.TIMESTEPS),
        "embedding": {str(shift): embedding(numbers.tensors[f"embedding.{shift}"]) for shift in (0, 1)},
        "updates": list(UPDATES), "rates": {name: [values[k].item() for k in UPDATES] for name, values in rates.items()},
        "placements": [[*size, *placed] for size, placed in zip(inputs.sizes(), data.facts["placed"], strict=True)],
        "captions": [{**one, "theirs": theirs} for one, theirs in zip(inputs.captions(), data.facts["captions"], strict=True)],
        "ids": [
            {"text": one, "ids_1": a.tolist(), "ids_2": b.tolist()}
            for one, a, b in zip(texts, data.tensors["ids_1"], data.tensors["ids_2"], strict=True)
        ],
        "noise": {name: corner(numbers.tensors[f"noise.{name}"]) for name in ("offset", "adaptive")},
        "noisy": {name: corner(numbers.tensors[f"noisy.{name}"]) for name in ("plain", "offset", "fp16", "bf16")},
        "optimizer_inputs": {name: values.tolist() for name, values in inputs.optimizer_tensors().items()},
        "optimizers": {name: values.tolist() for name, values in steps.items()},
    }  # fmt: skip


def embedding(values: torch.Tensor) -> list[list[float]]:
    """Every `EVERY`-th value of each timestep."""
    return [[round(value, 7) for value in row] for row in values[:, ::EVERY].tolist()]


def corner(values: torch.Tensor) -> list[list[list[float]]]:
    """The first columns of each channel's first row."""
    picked: list[list[list[float]]] = values[:, :, 0, :CORNER].float().tolist()
    return picked


def write(file: Path, recorded: dict[str, Any]) -> None:
    """One line for each entry of the first level and each of its items, so that a change shows where it is."""
    parts = []
    for name, value in recorded.items():
        if isinstance(value, list) and value and isinstance(value[0], list | dict):
            items = ",\n".join(json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in value)
            parts.append(f"{json.dumps(name)}: [\n{items}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def our_data(recorded: dict[str, Any], config: Switches) -> data_rows.Data:
    """Our side of what was recorded of the data."""
    return data_rows.ours(config, [one["text"] for one in recorded["ids"]])
