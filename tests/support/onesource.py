"""A set prepared from one source, with the tiny model of the fixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preparedset import prepare

from train.config.dataset import load_settings

MODEL = Path(__file__).parents[1] / "fixtures" / "c93b03a" / "model"


def prepared_from(folder: Path, source: dict[str, Any], **overrides: Any) -> Path:
    """`prepare all` over one source."""
    settings = {
        "name": "set", "root": str(folder / "data"), "seed": 5, "workers": 0, "sources": [source],
        "buckets": {"area_px": 6144, "min_px": 64, "max_px": 96, "step_px": 32}, "select": {"pretrain": {"min_bucket": 1}},
        "latents": {"vae": str(MODEL / "vae"), "batch": 4}, **overrides,
    }  # fmt: skip
    yaml = folder / "dataset.yaml"
    yaml.write_text(json.dumps(settings))  # JSON is YAML
    prepare(load_settings([yaml]))
    return folder / "data" / "set"
