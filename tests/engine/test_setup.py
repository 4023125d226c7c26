"""What a stage trains with: the group of processes has what the config says."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from stages import clean_process

from train.config.stage import BatchConfig, LaunchConfig
from train.engine import setup


def timeout_of_the_group(rank: int, world: int, port: int, seconds: float) -> float:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    setup.open_machine(BatchConfig(micro=1, effective=world), LaunchConfig(collective_timeout_s=seconds))
    found: float = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return found


@pytest.mark.parametrize("seconds", [600.0, 30.0])
def test_the_group_has_the_timeout_that_is_configured(seconds: float, tmp_path: Path) -> None:
    """600 s is the default here and accelerate's own, which it does not pass on: the group had 1,800."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_ranks(2, timeout_of_the_group, tmp_path, port, seconds, joined=False) == [seconds, seconds]


def test_strict_fills_no_new_tensor() -> None:
    """torch would write NaN into every one of them, which costs traffic and changes no bit of what is computed."""
    with clean_process({}):
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        setup.open_machine(BatchConfig(micro=1, effective=1, determinism="strict"), LaunchConfig())
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
