"""What is set before libraries are loaded, and what the user has set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.base import environment

ROOT = Path(__file__).resolve().parents[2]


def test_one_thread_and_segments_that_grow() -> None:
    variables: dict[str, str] = {}
    environment.settle(variables)
    assert variables == {"OMP_NUM_THREADS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", environment.ALLOCATOR)
def test_the_users_own_allocator_setting_stays_alone(name: str) -> None:
    variables = {name: "max_split_size_mb:512", "OMP_NUM_THREADS": "4"}
    environment.settle(variables)
    assert variables == {name: "max_split_size_mb:512", "OMP_NUM_THREADS": "4"}


def test_a_training_sets_it_before_numpy_and_torch_are_loaded() -> None:
    program = (
        "import json, os, sys; sys.argv = ['train/run.py']\n"
        "class Watch:\n"
        "    seen = {}\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'numpy', 'omegaconf'):\n"
        "            self.seen.setdefault(name, os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))\n"
        "watch = Watch(); sys.meta_path.insert(0, watch)\n"
        "import train.run, train.engine.setup\n"
        "print(json.dumps(watch.seen))"
    )
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == dict.fromkeys(("omegaconf", "numpy", "torch"), "expandable_segments:True")
