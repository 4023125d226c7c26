"""The training loop of a stage: learning rate, gradients, decision, step, record, save. Nothing else.

Position and learning rate come from two integers, the plan step and the updates applied; so a resumed loop is the
same loop.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.signals import StopFlag, grace_warning
from train.config.stage import StageConfig
from train.data.loader import Feed
from train.diffusion.objective import Diffusion
from train.engine.processes import Watch
from train.engine.step import Gradients, Outcome, bad_step, compute_update, may_apply
from train.observe.heldout import HeldOut
from train.observe.previews import Previews
from train.observe.tracker import SpikeDetector, Tracker, loss_by_decile
from train.optim import collectives, optimizers, rounding
from train.optim.collectives import Place
from train.optim.ema import Ema
from train.optim.loss_scale import LossScale
from train.optim.zero1 import Shares
from train.recipe import rng
from train.recipe.order import Plan, Tile, trace_lines
from train.recipe.schedule import lr_at, peaks
from train.storage.checkpoint import Progress
from train.storage.rundir import RunDir
from train.storage.saver import Saver

log = logging.getLogger("anix")


@dataclass
class Session:
    """What a running stage owns. `progress`, `scale` and `update_s` change with every update, the rest stays."""

    config: StageConfig
    place: Place
    plan: Plan
    feed: Feed
    gradients: Gradients
    diffusion: Diffusion
    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]  # trained ones by canonical name
    ema: Ema | None
    tracker: Tracker
    saver: Saver | None  # on the main process
    stop: StopFlag
    run: RunDir
    state: Callable[[Session], dict[str, Any]]  # what state.json says beside the progress
    previews: Previews
    held_out: HeldOut
    progress: Progress
    scale: LossScale
    cycle_updates: int
    last_step: int
    shares: Shares | None = None  # ZeRO-1: which process steps which parameter
    update_s: float = 0.0
    watch: Watch = field(default_factory=lambda: Watch(None, 0, 1))  # over the other processes
    stepping: bool = False  # the weights are between two updates: nothing may be saved
    spikes: SpikeDetector = field(default_factory=SpikeDetector)


def run_updates(session: Session) -> Progress:
    """Train from the progress reached to the last plan step. Raises Halt(STOPPED) after a signal, saved."""
    config, plan = session.config, session.plan
    while session.progress.step < session.last_step:
        step, started = session.progress.step, time.perf_counter()

        # Learning rate: a closed form of the updates applied, the same on every machine and after every resume.
        rates = learning_rates(config, session.progress.updates, session.cycle_updates)
        optimizers.set_lrs(session.optimizer, rates)

        # Gradients of the plan's next update, clipped; one read tells every process the same.
        tiles = plan.update(step)
        images = sum(len(tile.rows) for tile in tiles)
        outcome = compute_update(
            session.gradients,
            session.feed.next_update(),
            diffusion=session.diffusion,
            scale=session.scale,
            images=images,
            tiles_here=len(session.feed.tiles),
            tiles_in_update=len(tiles),
            step=step,
            max_grad_norm=config.optimizer.max_grad_norm,
            stop_asked=lambda: session.stop.asked,
        )
        applied = may_apply(outcome.losses_finite, outcome.grad_norm)
        if not outcome.losses_finite or (not applied and not session.scale.enabled):
            raise refuse_update(session, step, tiles, outcome)

        # The step itself. An overflow of fp16 gradients skips it: the plan moves on, the learning rate does not.
        if applied:
            if session.saver is not None:
                session.saver.before_step()  # a background save may still be copying the weights
            session.stepping = True
            faults.at("optimizer", step)
            if config.model.weights == "bf16":
                rounding.step(
                    session.optimizer, session.parameters, seed=config.seed, update=session.progress.updates
                )
            else:
                session.optimizer.step()
            if session.shares is not None:
                session.shares.spread(session.parameters)
            if session.ema is not None:
                session.ema.update(session.parameters, session.progress.updates + 1)
        session.scale = session.scale.after(overflowed=not applied)
        session.progress = session.progress.after(images, applied=applied)
        session.stepping, session.watch.step = False, session.progress.step
        if session.scale.exhausted:
            raise refuse_update(session, step, tiles, outcome)

        # Record, look, save.
        session.update_s = time.perf_counter() - started
        log_update(session, tiles, outcome, rates)
        after_update(session, outcome)
    return session.progress


def learning_rates(config: StageConfig, updates: int, cycle_updates: int) -> dict[str, float]:
    """Learning rate of every parameter group after `updates` applied updates."""
    return {
        group: lr_at(updates, peak=peak, config=config.schedule, cycle_updates=cycle_updates)
        for group, peak in peaks(config.optimizer).items()
    }


def after_update(session: Session, outcome: Outcome) -> None:
    """Previews, validation, checkpoints and the agreed stop, each when it is due; those of the end: see `conclude`."""
    config, done = session.config, session.progress.step
    last = done >= session.last_step
    if not last:
        look(session)
    if outcome.stop_asked and not last:
        save(session, now=True)
        raise Halt(ExitCode.STOPPED, f"stopped by a signal after update {done}; saved: the same command goes on")
    if done % config.checkpoint.every_steps == 0 and not last:
        save(session)
    if session.saver is not None:
        if session.progress.updates and not session.saver.reserved and done + config.checkpoint.every_steps < session.last_step:
            session.saver.reserve(tensors_here(session))  # the optimizer's state exists since the first update
        session.saver.raise_failures()
        report_saves(session, session.saver)


def look(session: Session, *, last: bool = False) -> None:
    """Previews and held-out loss of the weights of now when they are due; at the end both are."""
    config, done = session.config, session.progress.step
    if config.sampling.every_steps and (last or done % config.sampling.every_steps == 0):
        with session.watch.main_only("previews"):
            session.previews.write(done, session.ema, session.tracker, session.stop)
    if config.validation.every_steps and (last or done % config.validation.every_steps == 0):
        session.held_out.measure(done, session.progress.updates, session.tracker, session.stop)


def conclude(session: Session) -> None:
    """Save the last update, then look at it. A stop cuts the look short, and the next start takes it again."""
    save(session, now=True, permanent=True)
    look(session, last=True)
    collectives.stop_if_asked(session.stop.asked, session.place.device, session.progress.step)


def save(session: Session, *, now: bool = False, permanent: bool = False) -> None:
    """Save the present progress: in the background, or before returning with `now`."""
    collectives.check_replicas(session.parameters, session.progress.step)
    state = tensors(session)  # with ZeRO-1 a collective, so before anybody is waited for
    wait = now or not session.config.checkpoint.background
    with session.watch.main_only("save") if wait else contextlib.nullcontext():
        if session.saver is None:
            return
        if now:
            session.saver.save_now(session.progress, state, session.state(session), permanent=permanent)
        else:
            session.saver.save(session.progress, state, session.state(session))


def tensors(session: Session) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds beside its numbers; whole on the main process. With ZeRO-1 all must call it."""
    found = tensors_here(session)
    if session.shares is not None:
        found["optimizer"] = session.shares.gather(found["optimizer"])
    return found


def tensors_here(session: Session) -> dict[str, dict[str, torch.Tensor]]:
    """The part of `tensors` that this process has."""
    found = {"model": {name: parameter.detach() for name, parameter in session.parameters.items()}}
    found["optimizer"] = optimizers.state_tensors(session.optimizer, session.parameters)
    if session.ema is not None:
        found["ema"] = dict(session.ema.average)
    return found


def leave(session: Session, error: BaseException) -> None:
    """After the loop failed: the main process saves the last completed update, by itself. Then the caller re-raises.

    A failed collective is raised here as what became of the other process. No collective is called any more, and
    nothing is saved from inside the optimizer's step or from differing replicas. With ZeRO-1 the main process does not
    have the whole optimizer state, so the last regular checkpoint is what remains.
    """
    reason = session.watch.failed(error)
    lost = session.stepping or isinstance(reason, collectives.ReplicasDiffer) or session.progress.step == 0
    over = isinstance(error, Halt) and error.code in (ExitCode.STOPPED, ExitCode.CANNOT_WRITE)
    if session.saver is not None and session.shares is not None and not (lost or over):
        session.tracker.alert(
            f"update {session.progress.step} cannot be saved after a failure: with optimizer.sharding: zero1 the "
            "optimizer's state is spread over the processes. The last checkpoint stays valid"
        )
    elif session.saver is not None and not lost and not over:
        try:
            session.saver.save_now(session.progress, tensors(session), session.state(session))
        except Exception as failure:  # the first error is the one to report
            log.warning("the last completed update could not be saved: %s", failure)
    if reason is not error:
        raise reason from error


def report_saves(session: Session, saver: Saver) -> None:
    """Say what became of the saves that ended, and whether a stop would leave time for one."""
    for report in saver.reports():
        if report.path is None:
            session.tracker.alert(f"checkpoint of step {report.step} not written: {report.reason}")
            continue
        warning = grace_warning(session.update_s, report.write_s, session.config.launch.grace_s)
        if warning:
            session.tracker.alert(warning)


def refuse_update(session: Session, step: int, tiles: tuple[Tile, ...], outcome: Outcome) -> Halt:
    """What to raise for an update that must not be applied; the weights are those of the update before."""
    return bad_step(
        session.run,
        step=step,
        updates=session.progress.updates,
        tiles=tiles,
        timesteps=slot_timesteps(session, tiles),
        losses=outcome.losses_G.tolist(),
        grad_norm=outcome.grad_norm,
        scale=session.scale.scale,
    )


def slot_timesteps(session: Session, tiles: tuple[Tile, ...]) -> np.ndarray:
    """Timesteps of the update's slots in plan order, recomputed from the plan."""
    low, high = session.config.noise.timesteps
    uids = np.concatenate([tile.uids for tile in tiles])
    epochs = np.concatenate([tile.epochs for tile in tiles])
    return rng.timesteps(session.config.seed, uids, epochs, low, high)


def log_update(session: Session, tiles: tuple[Tile, ...], outcome: Outcome, rates: dict[str, float]) -> None:
    """One line of metrics.jsonl; everything but the two times is the same for any number of processes."""
    progress, images = session.progress, len(outcome.losses_G)
    timesteps = slot_timesteps(session, tiles)
    session.tracker.trace("".join(_trace(progress.step - 1, tiles, timesteps)))
    spike = session.spikes.check(outcome.mean_loss)
    if spike:
        shown = f"scripts/show.py step {session.run.path} --update {progress.step - 1}"
        session.tracker.alert(f"step {progress.step}: {spike}; its images: {shown}")
    session.tracker.log(
        {
            "step": progress.step,
            "update": progress.updates,
            "epoch": session.plan.epoch_of(progress.step - 1),
            "images": progress.images,
            "loss": outcome.mean_loss,
            "lr_unet": rates["unet"],
            "lr_text_encoder": rates.get("text_encoder"),
            "grad_norm": outcome.grad_norm,
            "images_per_s": images / session.update_s,
            "data_wait_s": round(session.feed.wait_s, 6),
            "skipped": progress.skipped,
            "tags_cut": outcome.tags_cut,
            "loss_scale": session.scale.scale,
            "loss_by_decile": loss_by_decile(timesteps.tolist(), outcome.losses_G.tolist()),
            **({"spike_sigmas": session.spikes.sigmas} if spike else {}),
        },
        update_s=session.update_s,
    )


def _trace(step: int, tiles: tuple[Tile, ...], timesteps: np.ndarray) -> Iterator[str]:
    start = 0
    for tile in tiles:
        yield trace_lines(step, tile, timesteps[start : start + len(tile.rows)])
        start += len(tile.rows)
