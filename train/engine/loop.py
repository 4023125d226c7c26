"""The training loop of a stage: learning rate, gradients, decision, step, record, save. Nothing else.

Position and learning rate come from two integers, the plan step and the updates applied; so a resumed loop is the
same loop.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.signals import grace_warning
from train.engine import usable
from train.engine.processes import GRACE_S
from train.engine.session import Run, Session
from train.engine.step import Outcome, bad_step, bad_step_record, compute_update, may_apply, not_finite
from train.observe.times import peak_bytes
from train.observe.tracker import loss_by_decile
from train.optim import collectives, optimizers, schedule_free
from train.recipe.order import Tile
from train.storage import checkpoint
from train.storage.checkpoint import Progress
from train.storage.saver import Saver

GARBAGE_STEPS = 50  # plan steps between two searches for garbage

log = logging.getLogger("anix")


def train(session: Session) -> None:
    """Run the updates that are left; one that fails leaves in good order. What failed is raised."""
    watch = session.run.watch
    watch.step, watch.met = session.run.progress.step, True  # every group of processes exists
    session.run.saved_at = time.monotonic()
    watch.rescue = partial(rescue, session, wait_s=GRACE_S)
    try:
        with seldom_collected():
            look_first(session)
            leave_files(session)  # those that an earlier start did not come to
            run_updates(session)
    except BaseException as error:
        leave(session, error)
        raise


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Inside, Python looks for garbage when it is told to alone: one process that stops for it holds up all the others.

    What exists before is left out of every search.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def run_updates(session: Session) -> Progress:
    """Train from the progress reached to the last plan step. Raises Halt(STOPPED) after a signal, saved."""
    trained, data, run, times = session.trained, session.data, session.run, session.observers.times
    while run.progress.step < run.last_step:
        step, updates, started = run.progress.step, run.progress.updates, time.perf_counter()
        times.begin(step)

        # Learning rate: a closed form of the updates applied, the same on every machine and after every resume.
        rates = trained.rates_at(updates)
        optimizers.set_lrs(trained.optimizer, rates)

        # Gradients of the plan's next update, clipped; one read tells every process the same.
        tiles = data.plan.update(step)
        images = sum(len(tile.rows) for tile in tiles)
        run.watch.updating_at = time.monotonic()
        outcome = compute_update(
            trained.gradients,
            data.loader.next_update(),
            diffusion=trained.diffusion,
            scale=trained.scale,
            images=images,
            tiles_here=len(data.loader.tiles),
            tiles_in_update=len(tiles),
            step=step,
            max_grad_norm=trained.max_grad_norm,
            stop_asked=lambda: run.stop.asked,
            save_due=partial(save_due, run),
            times=times,
        )
        run.watch.updating_at = None
        applied = may_apply(outcome.losses_finite, outcome.grad_norm)
        if not applied and not trained.scale.enabled:
            raise refuse_update(session, step, tiles, outcome)

        # The step itself. An overflow of fp16 skips it: the plan moves on, the learning rate does not.
        if applied and run.saver is not None:
            run.saver.before_step()  # a background save may still be copying the weights
        run.stepping.acquire()  # and stays taken where the step fails
        if applied:
            faults.at("optimizer", step)
            trained.step(updates, times)
            run.settled = torch.cuda.current_stream().record_event() if run.place.device.type == "cuda" else None
        trained.scale = trained.scale.after(overflowed=not applied)
        run.progress = Progress(step + 1, updates + applied, run.progress.skipped + (not applied), run.progress.images + images)
        run.watch.step = run.progress.step
        run.stepping.release()
        if trained.scale.exhausted:
            raise refuse_update(session, step, tiles, outcome)

        # Record, look, save.
        run.update_s = time.perf_counter() - started
        log_update(session, tiles, outcome, rates)
        times.end(step, last=run.progress.step >= run.last_step)
        after_update(session, outcome)
    return run.progress


def after_update(session: Session, outcome: Outcome) -> None:
    """Previews, validation, checkpoints and the agreed stop, each when it is due; those of the end: see `conclude`."""
    run, done = session.run, session.run.progress.step
    saver, last, shards = run.saver, done >= run.last_step, session.trained.gradients.shards
    every_steps = run.checkpoint.every_steps if run.checkpoint.every_minutes is None else 0
    if not last:
        look_when_due(session)
    if done % GARBAGE_STEPS == 0:
        gc.collect()
    if done in run.files.epochs:
        save(session, whole=True)
        leave_files(session)
    if outcome.stop_asked and not last:
        save(session, now=True)
        raise Halt(ExitCode.STOPPED, f"stopped by a signal after update {done}; saved: the same command goes on")
    if (done % every_steps == 0 if every_steps else outcome.save_due) and not last:
        run.saved_at = time.monotonic()
        save(session)
    if saver is not None:
        if run.progress.updates and not saver.reserved and shards is None and done + every_steps < run.last_step:
            saver.reserve(session.trained.tensors_here())  # the optimizer's state exists since the first update
        saver.raise_failures()
        report_saves(session, saver)


def save_due(run: Run) -> bool:
    """Whether `checkpoint.every_minutes` have passed by the main process's clock, which all follow."""
    minutes = run.checkpoint.every_minutes
    return run.place.is_main and minutes is not None and time.monotonic() - run.saved_at >= 60 * minutes


def look_first(session: Session) -> None:
    """What the stage starts from, once: pictures of the parent's weights, and their held-out loss under the stage's objective."""
    seen, run = session.observers, session.run
    if run.progress.step == 0:
        look(session, seen.previews_first, seen.held_out_first)


def look_when_due(session: Session, *, last: bool = False) -> None:
    """Previews and held-out loss of the weights of now; at the end both are due."""
    seen, done = session.observers, session.run.progress.step
    look(session, *(
        bool(every) and (last or done % every == 0 or done in session.run.files.epochs)
        for every in (seen.previews_every_steps, seen.held_out_every_steps)
    ))  # fmt: skip


def look(session: Session, previews: bool, held_out: bool) -> None:
    """Look at the weights of now, which changes nothing of them."""
    seen, run, done = session.observers, session.run, session.run.progress.step
    if previews or held_out:
        session.trained.gradients.clear()  # 10 to 13 GB that nobody needs any more, and a VAE does
    trained = session.trained.optimizer
    looks = (previews or held_out) and optimizers.keeps_average(trained)
    with schedule_free.averaged(trained) if looks else contextlib.nullcontext():
        if previews:
            gathered = session.trained.networks_whole()  # with shards a collective, so before anybody is waited for
            with run.watch.main_only("previews"):
                seen.previews.write(done, session.trained.ema, seen.tracker, run.stop, gathered)
            gc.collect()  # a pipeline refers to itself, and may hold a second U-Net
        if held_out:
            seen.held_out.measure(done, run.progress.updates, seen.tracker, run.stop)


def leave_files(session: Session) -> None:
    """Usable files of the epochs that are done (`export.every_epochs`), on the main process while the others wait.

    A stop leaves them to the next start; where they cannot be written, `checkpoint.on_full_disk` decides.
    """
    run = session.run
    if not run.files.epochs:
        return

    def poll() -> None:
        if run.stop.asked:
            raise InterruptedError("a stop was asked for")

    with run.watch.main_only("files of an epoch"):
        if not run.place.is_main:
            return
        try:
            for name in usable.leave_epochs(run.folder.path, run.files, run.progress.step, poll):
                log.info("usable file of an epoch: %s", run.folder.path / name)
        except InterruptedError:
            log.info("the file of an epoch is left to the next start")
        except Halt as halt:
            if halt.code != ExitCode.CANNOT_WRITE or checkpoint.ends_when_full(run.checkpoint):
                raise
            session.observers.tracker.alert(f"the file of an epoch is not written: {halt.message}")


def conclude(session: Session) -> None:
    """Save the last update, then look at it. A stop cuts the look short, and the next start takes it again."""
    run = session.run
    save(session, now=True, permanent=True)
    look_when_due(session, last=True)
    collectives.stop_if_asked(run.stop.asked, run.place.device, run.progress.step)


def save(session: Session, *, now: bool = False, permanent: bool = False, whole: bool = False) -> None:
    """Save the present progress: in the background, or before returning with `now`, or with `whole`, where it may fail."""
    trained, run = session.trained, session.run
    trained.check_replicas(run.progress.step)
    tensors = trained.tensors()  # with shares a collective, so before anybody is waited for
    wait = now or whole or not run.checkpoint.background
    with run.watch.main_only("save") if wait else contextlib.nullcontext():
        if run.saver is None:
            return
        if whole:
            run.saver.save_whole(run.progress, tensors, state_now(session))
        elif now:
            run.saver.save_now(run.progress, tensors, state_now(session), permanent=permanent)
        else:
            run.saver.save(run.progress, tensors, state_now(session))


def state_now(session: Session) -> dict[str, Any]:
    """What state.json says beside the progress."""
    return {**session.run.state, "scaler": asdict(session.trained.scale)}


def leave(session: Session, error: BaseException) -> None:
    """After the loop failed: the main process saves the last completed update, by itself. Then the caller re-raises.

    A failed collective is raised here as what became of the other process. Nothing is saved from differing replicas.
    """
    reason = session.run.watch.failed(error)
    over = isinstance(error, Halt) and error.code in (ExitCode.STOPPED, ExitCode.CANNOT_WRITE)
    if not over and not isinstance(reason, collectives.ReplicasDiffer):
        rescue(session)
    if reason is not error:
        raise reason from error


def rescue(session: Session, *, wait_s: float = 0.0) -> None:
    """Save the last completed update without any collective; where that cannot be, exit.json says what is lost, and why.

    Also called from beside a main thread that does not come back from a collective: it may be applying the update for
    `wait_s` longer, and it goes no further until this process ends. On a card all its later work stands behind that
    collective, so the weights are read on a stream that waits for their update alone.
    """
    trained, run = session.trained, session.run
    if run.saver is None or run.progress.step == 0:
        return
    device, stream = run.place.device, None
    try:
        if not run.stepping.acquire(timeout=wait_s):
            raise RuntimeError("its successor was being applied")
        if trained.shares is not None:
            raise RuntimeError(f"with optimizer.sharding: {trained.shares.name} the state is spread over the processes")
        if run.settled is not None:
            stream = torch.cuda.Stream(device)
            stream.wait_event(run.settled)
        with torch.cuda.stream(stream):  # None: a no-op
            run.saver.save_now(run.progress, trained.tensors(), state_now(session))
    except Exception as failure:  # the first error is the one to report
        lost = f"update {run.progress.step} cannot be saved after a failure: {failure}"
        run.folder.aside["lost"] = lost
        log.warning("%s. The last checkpoint stays valid", lost)


def report_saves(session: Session, saver: Saver) -> None:
    """Say what became of the saves that ended, and whether a stop would leave time for one."""
    tracker, run = session.observers.tracker, session.run
    for report in saver.reports():
        if report.path is None:
            tracker.alert(f"checkpoint of step {report.step} not written: {report.reason}")
            continue
        warning = grace_warning(run.update_s, report.write_s, run.grace_s)
        if warning:
            tracker.alert(warning)


def refuse_update(session: Session, step: int, tiles: tuple[Tile, ...], outcome: Outcome) -> Halt:
    """What to raise for an update that must not be applied; the weights are those of the update before."""
    return bad_step(
        session.run.folder,
        step=step,
        updates=session.run.progress.updates,
        tiles=tiles,
        timesteps=session.data.law.timesteps(session.data.seed, tiles),
        losses=outcome.losses_G.tolist(),
        grad_norm=outcome.grad_norm,
        scale=session.trained.scale.scale,
    )


def log_update(session: Session, tiles: tuple[Tile, ...], outcome: Outcome, rates: dict[str, float]) -> None:
    """One line of metrics.jsonl; everything but what `OF_THE_MACHINE` lists is the same for any number of processes."""
    data, seen, run, progress = session.data, session.observers, session.run, session.run.progress
    timesteps = data.law.timesteps(data.seed, tiles)
    if seen.trace is not None:
        seen.trace.write(progress.step - 1, tiles, timesteps)
    seconds = seen.times.seconds()
    spike = seen.spikes.check(outcome.mean_loss)
    shown = f"scripts/show.py step {run.folder.path} --update {progress.step - 1}"
    if spike:
        seen.tracker.alert(f"step {progress.step}: {spike}; its images: {shown}")
    if not outcome.losses_finite:  # fp16 alone comes here with such a loss, as the scaler of the original went on
        bad, named = not_finite(bad_step_record(progress.step - 1, tiles, timesteps, outcome.losses_G.tolist())["slots"])
        seen.tracker.alert(f"update {progress.step - 1} skipped: the loss of {bad} images is not finite. {named}; {shown}")
    seen.tracker.log(
        {
            "step": progress.step,
            "update": progress.updates,
            "epoch": data.plan.epoch_of(progress.step - 1),
            "images": progress.images,
            "loss": outcome.mean_loss,
            "lr_unet": rates["unet"],
            "lr_text_encoder": rates.get("text_encoder"),
            "grad_norm": outcome.grad_norm,
            "images_per_s": len(outcome.losses_G) / run.update_s,
            **seen.work.rates(tiles, run.update_s),
            **peak_bytes(run.place.device),
            "data_wait_s": round(data.loader.wait_s, 6),
            "skipped": progress.skipped,
            "tags_cut": outcome.tags_cut,
            "loss_scale": session.trained.scale.scale,
            "loss_by_decile": loss_by_decile(timesteps.tolist(), outcome.losses_G.tolist()),
            **({"seconds": seconds} if seconds else {}),
            **({"spike_sigmas": seen.spikes.sigmas} if spike else {}),
        },
        update_s=run.update_s,
    )
