"""kill -9 at random moments of `prepare all`, with 1 or 2 processes drawn anew each time: the same bytes in the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from preparedset import prepare, settings_of, write_posts, write_vae

KILLS = 20


@pytest.mark.slow
def test_killed_and_restarted_is_byte_identical(tmp_path: Path) -> None:
    write_posts(tmp_path / "pictures", 16)
    write_vae(tmp_path / "vae")
    prepare(settings_of(tmp_path))
    straight = _hashes(tmp_path)
    shutil.move(tmp_path / "data", tmp_path / "straight")
    command = [sys.executable, str(Path(__file__).parents[1] / "support/preparedset.py"), str(tmp_path), "11", str(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["hits"] >= KILLS // 2, "the kills came too late to test anything"
    assert _hashes(tmp_path) == straight
    left = [path for path in (tmp_path / "data").rglob("*") if path.suffix == ".tmp" or path.name in (".peers", ".parsed-0", ".parsed-1")]
    assert left == [], "half-written files of killed processes are still there"


def _hashes(folder: Path) -> dict[str, str]:
    """Every table, shard and index; report and scratch files are left out."""
    found = (path for ending in ("parquet", "safetensors", "arrow") for path in (folder / "data").rglob(f"*.{ending}"))
    found = (path for path in found if not path.name.startswith(".") and ".parsed" not in str(path))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
