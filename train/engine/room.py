"""Whether disk and host have room for what the run will write; asked before anything of the run directory is changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from train.base.errors import ExitCode, Halt
from train.config.stage import CheckpointConfig
from train.optim.optimizers import shapes_of
from train.optim.zero1 import Shares
from train.recipe.optimizer_state import checkpoint_bytes, state_bytes
from train.recipe.order import Plan
from train.storage import space
from train.storage.rundir import RunDir
from train.storage.saver import available_host_bytes

log = logging.getLogger("anix")
Parameters = Mapping[str, torch.nn.Parameter]  # trained ones by canonical name


def check(
    run: RunDir,
    plan: Plan,
    parameters: Parameters,
    shares: Shares | None,
    optimizer: str,
    settings: CheckpointConfig,
    *,
    average: bool,
) -> None:
    """Halt(MISMATCH) naming all that the disk and the host lack. `optimizer`: its name; `average`: an EMA is kept.

    Room for the checkpoints that stay for ever may still be made while the run goes on: its lack is a warning.
    """
    weights = "bf16" if any(parameter.element_size() == 2 for parameter in parameters.values()) else "fp32"
    one_bytes = checkpoint_bytes(optimizer, shapes_of(parameters.values()), weights=weights, average=average)
    found = (space.lacking_space(run, one_bytes, settings), _host(optimizer, parameters, shares))
    if problems := [problem for problem in found if problem]:
        raise Halt(ExitCode.MISMATCH, "\n".join(problems))
    warning = space.permanent_warning(
        run, one_bytes, settings, updates=plan.total_updates, updates_per_epoch=plan.updates_per_epoch
    )
    if warning:
        log.warning(warning)


def _host(optimizer: str, parameters: Parameters, shares: Shares | None) -> str | None:
    """What is wrong when the main process's host cannot take the optimizer state that ZeRO-1 gathers at a save."""
    if shares is None:
        return None
    mine = shares.mine(parameters)
    others = [parameter for name, parameter in parameters.items() if name not in mine]
    need, have = state_bytes(optimizer, shapes_of(others)), available_host_bytes()
    if have >= need:
        return None
    return (
        f"optimizer.sharding: zero1 gathers {need / 1e9:.1f} GB of optimizer state in the main process's host "
        f"memory at every save, and {have / 1e9:.1f} GB are available; use none, or a host with more memory"
    )
