"""A stage on several processes."""

from __future__ import annotations

from stages import Stage

from train.testing.chaos.ranks import Ranks, warm_up


def launch(stage: Stage, world: int, *changes: str, fault: str = "") -> list[int]:
    """Exit codes of a launch on `world` gloo processes, forked from this one."""
    warm_up()
    logs = stage.output.parent / "logs"
    ranks = Ranks(stage.arguments(*changes), logs, world=world, env={"ANIX_FAULT": fault} if fault else {})
    codes = ranks.wait(180)
    stage.message = ranks.text()
    return codes
