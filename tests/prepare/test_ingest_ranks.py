"""Ingest and label by two processes at once, and after kills: the same bytes as by one in peace."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
_CODE = """
import sys; sys.path.insert(0, {root!r})
from train.prepare import ingest, label
from train.config.dataset import load_settings
from train.prepare import ingest as module
module._SPILL_ROWS = 500; module.ROW_GROUP_ROWS = 300
settings = load_settings([{config!r}])
print("ready", flush=True)
ingest.run(settings); label.run(settings)
"""


def _config(folder: Path, posts: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(f"name: d\nroot: {folder}/out\nsources: [{{name: s, adapter: danbooru, path: {posts}}}]\n")
    return path


def _start(config: Path, rank: int, world: int) -> subprocess.Popen[str]:
    code = _CODE.format(root=str(ROOT), config=str(config))
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _end(process: subprocess.Popen[str]) -> int:
    """The exit code, the pipe closed."""
    process.communicate(timeout=120)
    return process.returncode


def _tables(folder: Path) -> dict[str, bytes]:
    dataset = folder / "out" / "d"
    paths = [*dataset.glob("records/*.parquet"), *dataset.glob("labels/*.parquet"), dataset / "quarantine.parquet"]
    return {str(path.relative_to(dataset)): path.read_bytes() for path in paths}


def test_two_processes_and_kills_change_no_byte(tmp_path: Path) -> None:
    posts = tmp_path / "posts.jsonl"
    draw = random.Random(5)
    with open(posts, "w") as file:
        for number in draw.sample(range(10_000), 3000):
            tags = " ".join(f"tag_{draw.randrange(500)}" for _ in range(20))
            file.write(json.dumps({"id": number, "rating": "g", "score": number % 90, "tag_string": tags}) + "\n")
        file.write("broken\n")
    alone = _start(_config(tmp_path / "alone", posts), 0, 1)
    assert _end(alone) == 0
    expected = _tables(tmp_path / "alone")
    assert len(expected) == 2 * 10 + 1

    both = [_start(_config(tmp_path / "both", posts), rank, 2) for rank in range(2)]
    assert [_end(process) for process in both] == [0, 0]
    assert _tables(tmp_path / "both") == expected

    killed = _config(tmp_path / "killed", posts)
    for _ in range(4):
        process = _start(killed, 0, 1)
        assert process.stdout is not None
        process.stdout.readline()  # the imports are done
        time.sleep(draw.uniform(0.05, 1.5))
        process.send_signal(signal.SIGKILL)
        _end(process)
    last = [_start(killed, rank, 2) for rank in range(2)]
    assert [_end(process) for process in last] == [0, 0]
    assert _tables(tmp_path / "killed") == expected
