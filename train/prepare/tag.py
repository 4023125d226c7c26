"""Step `tag`."""

from __future__ import annotations

from train.prepare.settings import DatasetConfig


def run(settings: DatasetConfig) -> None:
    """Nothing yet."""
