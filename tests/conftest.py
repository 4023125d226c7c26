"""What trainer tests share: a base model, a prepared dataset and one uninterrupted run, each made once."""

from __future__ import annotations

import os

# Before any library is imported: 2 threads per process on 2 shared cores are slower than 1, and nothing is fetched.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ.pop("ANIX_FAULT", None)

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from standin import Hub


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest SDXL of the real classes, as a diffusers folder."""
    import tinysdxl

    return tinysdxl.write(tmp_path_factory.mktemp("base") / "model", "least")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 images in 3 buckets, prepared; never changed by a test."""
    import synthetic

    folder = tmp_path_factory.mktemp("data") / "set"
    return synthetic.make_dataset(folder, (12, 8, 6), buckets=((64, 64), (64, 96), (96, 64)))


@pytest.fixture(scope="session")
def straight(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining run of 9 updates that nobody interrupted."""
    from stages import Stage

    stage = Stage(tmp_path_factory.mktemp("straight"), dataset, base_model)
    assert stage.run() == 0, stage.message
    return stage.output


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback that the real client asks; nothing else can be reached."""
    import standin

    with standin.asked_by_this_process(tmp_path, monkeypatch) as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that parallel test processes end together; whole files stay whole."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
