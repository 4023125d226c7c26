"""R14: a process that hangs or leaves out any collective is noticed within the timeout + 5 s, with everybody's stacks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import Lab

import train
from train.engine import setup
from train.observe import validation
from train.optim import collectives, stepping
from train.testing.chaos import kills

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TIMEOUT_S = 5


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def hang_on_rank_1(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """The children inherit this: the function never gets to its collective on rank 1, from update 4 on."""
    real = getattr(module, name)

    def hanging(*arguments: Any, **named: Any) -> Any:
        import os

        if os.environ.get("RANK") == "1":
            time.sleep(3600)
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, hanging)


Spoil = Callable[[pytest.MonkeyPatch], None] | None
COLLECTIVES: dict[str, tuple[str, tuple[str, ...], Spoil]] = {  # fault, settings, what the children inherit
    "gradients, strict": ("reduce@5:1:skip", (), None),
    "gradients, fast": ("reduce@5:1:skip", ("batch.determinism=fast",), None),
    "gradients, hanging forward": ("forward@5:1:hang", ("batch.determinism=fast",), None),
    "control vector": ("control@5:1:skip", (), None),
    "control vector, hanging": ("control@5:1:hang", (), None),
    "replica checksums": ("", (), lambda patch: hang_on_rank_1(patch, collectives, "differing_replicas")),
    "validation": ("", ("validation.share=0.2", "validation.every_steps=2"),
                   lambda patch: hang_on_rank_1(patch, validation, "batches")),
    "shards, hanging forward": ("forward@5:1:hang", ("batch.determinism=fast", "optimizer.sharding=fsdp2"), None),
    "sums of shards": ("", ("batch.determinism=fast", "optimizer.sharding=fsdp2", "optimizer.name=adafactor"),
                       lambda patch: hang_on_rank_1(patch, stepping.Across, "sum")),
    "weights that one reads": ("", (), lambda patch: hang_on_rank_1(patch, setup, "receive")),
    "stop before the first update": ("", (), lambda patch: hang_on_rank_1(patch, collectives, "stop_if_asked")),
}  # fmt: skip


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_deadlock_ends_with_everybodys_stacks(lab: Lab, collective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, settings, spoil = COLLECTIVES[collective]
    if spoil is not None:
        spoil(monkeypatch)
    name = collective.replace(" ", "-").replace(",", "")
    limit = f"launch.collective_timeout_s={TIMEOUT_S}"
    codes = lab.run(name, limit, *settings, world=2, fault=fault, timeout_s=TIMEOUT_S)
    assert codes[0] == 9, lab.last.text()
    assert codes[1] == 9, lab.last.text()
    folder = lab.folder / name
    last = max(path.stat().st_mtime for path in (folder / "metrics.jsonl", folder / "config.yaml", folder / "run.json") if path.exists())
    took_s = (folder / "exit.json").stat().st_mtime - last
    assert took_s < TIMEOUT_S + 5 + 10, took_s  # and an update on a crowded machine
    for rank in (0, 1):
        assert 'File "' in lab.last.text(rank), f"no stack of rank {rank}"
    reason = json.loads((folder / "exit.json").read_text())["reason"]
    assert "update " in reason or "silent" in reason, reason
    assert max(kills.steps_of(folder), default=0) >= min(len(kills.metrics(folder)), 4)


def test_every_collective_of_ours_is_in_the_list() -> None:
    """A new call of torch.distributed must get a row above: these are the files that make one."""
    root = Path(train.__file__).parent
    users = {p.stem for p in root.rglob("*.py") if p.parent.name not in ("tools", "testing") and any(
        call in p.read_text() for call in ("dist.all_reduce(", "dist.broadcast(", "dist.barrier(", "dist.all_gather")
    )}  # fmt: skip
    assert users <= {"step", "collectives", "validation", "setup", "zero1", "heldout", "processes", "stepping", "networks"}, users
