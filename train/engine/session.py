"""The running stage: what is trained, what it is trained on, what looks on, and how far the run is.

`open_session` makes all four at the point where the run stands; the loop changes what the owners say that it changes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.base.errors import ExitCode, Halt
from train.base.signals import StopFlag
from train.config import derived
from train.config.derived import Owners, Watching
from train.config.stage import CheckpointConfig, DataConfig, EmaConfig, OptimizerConfig
from train.data.dataset import TileDataset
from train.data.fetching import Fetching, fetching
from train.data.index import MARK
from train.data.loader import Loader
from train.data.selection import flips_note, masks_note, short_tiles_note
from train.data.shards import ShardReader
from train.engine import usable
from train.engine.processes import HANGS_AT, Watch
from train.engine.refusals import check_schedule
from train.engine.restore import expectations, restore, state_of
from train.engine.setup import Data, Machine, Model, make_optimizer, open_shares
from train.engine.step import Gradients, Rates, Trained, adopted_by_buckets
from train.engine.usable import Files
from train.model.networks import trained_parameters
from train.model.vae_file import LatentScale
from train.observe.heldout import HeldOut
from train.observe.metrics import Trace, read_metrics
from train.observe.previews import Previews
from train.observe.times import Times, Work, open_times, open_work
from train.observe.tracker import SPIKE_WINDOW, SpikeDetector, Tracker
from train.optim import collectives
from train.optim.collectives import Place
from train.optim.ema import Ema
from train.optim.loss_scale import LossScale, loss_scale
from train.optim.optimizers import shapes_of
from train.optim.zero1 import Shares
from train.recipe import schedule
from train.recipe.optimizer_state import checkpoint_bytes
from train.recipe.order import Plan
from train.recipe.timesteps import Law
from train.storage import space
from train.storage.checkpoint import Progress
from train.storage.rundir import RunDir
from train.storage.saver import Saver, available_host_bytes

if TYPE_CHECKING:
    from train.optim.fsdp2 import FullShards
    from train.optim.offload import HostMasters

log = logging.getLogger("anix")
Parameters = Mapping[str, torch.nn.Parameter]  # trained ones by canonical name


@dataclass(frozen=True)
class TrainingData:
    """The images in plan order, how this process gets its tiles of them, and from what timesteps are drawn."""

    plan: Plan
    loader: Loader
    seed: int
    law: Law
    fetching: Fetching | None  # of shards that lie in a store

    def close(self) -> None:
        """End the processes that read."""
        self.loader.close()
        if self.fetching is not None:
            self.fetching.close()


@dataclass(frozen=True)
class Observers:
    """What looks at the run and changes nothing of it; 0 steps: never."""

    tracker: Tracker
    trace: Trace | None  # on the main process, with tracking.trace
    spikes: SpikeDetector
    times: Times
    work: Work
    previews: Previews
    previews_every_steps: int
    previews_first: bool
    held_out: HeldOut
    held_out_every_steps: int
    held_out_first: bool


@dataclass
class Run:
    """Where the run is, how far, and who may end it. `progress`, `update_s` and `settled` change with every update."""

    folder: RunDir
    place: Place
    progress: Progress
    last_step: int
    stop: StopFlag
    watch: Watch  # over the other processes
    saver: Saver | None  # on the main process
    checkpoint: CheckpointConfig
    grace_s: float  # between SIGTERM and SIGKILL
    state: Mapping[str, Any]  # what state.json says beside progress and loss scale
    files: Files  # what it leaves behind
    update_s: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)  # when a checkpoint was begun last
    settled: torch.cuda.Event | None = None  # on a card: the last update is applied there too
    # Held while the weights are between two updates: nothing may be saved.
    stepping: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Session:
    """A running stage, by owner."""

    trained: Trained
    data: TrainingData
    observers: Observers
    run: Run


def open_session(
    owners: Owners, run: RunDir, stop: StopFlag, machine: Machine, data: Data, model: Model, watch: Watch | None = None
) -> Session:
    """Everything the loop owns, at the point where the run stands. `watch`: none for a process by itself."""
    place, plan, networks = machine.place, data.plan, model.networks
    learning, feeding, watching, keeping = owners.trained, owners.data, owners.observers, owners.run
    running, settings, identity = learning.running, learning.rates.optimizer, keeping.identity
    # What a setting can still spoil comes before the checkpoint is read and before files are opened.
    rates_at = open_rates(learning.rates, plan, warns=place.is_main)
    latent_scale = LatentScale.of(model.source.configs["vae"])
    previews = Previews(watching, model.components, networks, place, model.diffusion, model.source)
    held_out = HeldOut(
        watching, data.folder, data.held_out, data.tokenizer, networks, place,
        diffusion=model.diffusion, scale=latent_scale, together=model.shards is not None,
    )  # fmt: skip
    masters, shares = model.masters, model.shards or open_shares(running.sharding, networks, place)
    parameters = trained_parameters(networks) if masters is None else masters.parameters
    files = usable.files_of(keeping.identity, keeping.origin, model.source, data.index, plan)
    optimizer = make_optimizer(settings, schedule.peaks(settings), networks, masters or shares, strict=machine.strict)
    ema = open_average(learning.ema, parameters)
    expected = expectations(identity, data, model.source, parameters, ema)
    if place.is_main:
        check_room(run, plan, parameters, shares, running.optimizer, keeping.checkpoint, files, average=ema is not None, masters=masters)
        notes = (short_tiles_note(owners.images, plan), masks_note(owners.images, data.index), flips_note(data.index) if owners.images.flip else None)
        for note in filter(None, notes):
            log.info(note)
    loaded = restore(
        run, expected, networks, optimizer, ema, data.index, model.shards, masters,
        name=running.optimizer, verify=keeping.checkpoint.verify, is_main=place.is_main,
    )  # fmt: skip
    progress = loaded.progress if loaded else Progress()
    if place.is_main and watching.held_out_every_steps:
        held_out.remember(run.path)
    images = partial(TileDataset, seed=feeding.seed, data=feeding.data, noise=feeding.noise, scale=latent_scale, masked=feeding.masked)
    scale = loss_scale(running.precision, loaded.state.get("scaler") if loaded else None)
    loader = open_loader(images, feeding.data, machine, data, progress.step)
    in_store = (Path(data.folder) / MARK).is_file()
    fetched = fetching(data.folder, data.index, data.held_out, plan, progress.step) if in_store else None
    return Session(
        open_trained(settings, machine, model, optimizer, shares, ema, scale, rates_at, rounding_seed=learning.rounding_seed),
        TrainingData(plan, loader, feeding.seed, loader.dataset.law, fetched),
        open_observers(
            watching, run, place, open_tracker(watching, run, place, plan, progress), previews, held_out,
            times=open_times(watching.tracking, run.path, place.device, progress.step, is_main=place.is_main),
            work=open_work(model.costs, place.device, place.world),
        ),
        Run(
            folder=run,
            place=place,
            progress=progress,
            last_step=plan.total_updates,
            stop=stop,
            watch=limited(watch or Watch(None, 0, 1), machine),
            saver=open_saver(run, keeping.checkpoint, plan, stop) if place.is_main else None,
            checkpoint=keeping.checkpoint,
            grace_s=keeping.grace_s,
            state=state_of(identity.hash, expected, loaded, place.world, model.execution, run.done),
            files=files,
        ),
    )


def limited(watch: Watch, machine: Machine) -> Watch:
    """The watch, which ends a hanging update of a card before NCCL does: that saves nothing and leaves no exit.json."""
    if machine.place.device.type == "cuda":
        watch.limit_s = HANGS_AT * machine.collective_timeout_s
    return watch


def open_rates(rates: derived.Rates, plan: Plan, *, warns: bool) -> Rates:
    """The stage's schedule over the length of its run, refused if it means something else than it says."""
    check_schedule(rates, plan)
    warning = schedule.long_warmup(rates.schedule, total_updates=plan.total_updates)
    if warning and warns:
        log.warning("%s", warning)
    cycle = schedule.cycle_length(rates.schedule, epoch_updates=plan.cycle_updates)
    return partial(
        schedule.rates_at, peaks=schedule.peaks(rates.optimizer), config=rates.schedule, cycle_updates=cycle,
        total_updates=plan.total_updates, rules=rates.optimizer.groups,
    )  # fmt: skip


def open_average(settings: EmaConfig, parameters: Parameters) -> Ema | None:
    """The average of the weights that `ema.decay` asks for."""
    return Ema(dict(parameters), settings.decay, settings.every_steps, settings.device) if settings.decay else None


def open_trained(
    settings: OptimizerConfig,
    machine: Machine,
    model: Model,
    optimizer: torch.optim.Optimizer,
    shares: Shares | FullShards | None,
    ema: Ema | None,
    scale: LossScale,
    rates_at: Rates,
    *,
    rounding_seed: int | None,
) -> Trained:
    """The networks with what makes and applies their gradients. A collective: every process has the same weights then."""
    return Trained(
        gradients=open_gradients(machine, model),
        diffusion=model.diffusion,
        optimizer=optimizer,
        optimizer_name=settings.name,
        parameters=trained_parameters(model.networks) if model.masters is None else model.masters.parameters,
        masters=model.masters,
        ema=ema,
        shares=shares,
        scale=scale,
        rates_at=rates_at,
        max_grad_norm=settings.max_grad_norm,
        rounding_seed=rounding_seed,
    )


def check_room(
    run: RunDir,
    plan: Plan,
    parameters: Parameters,
    shares: Shares | FullShards | None,
    optimizer: str,
    settings: CheckpointConfig,
    files: Files | None = None,
    *,
    average: bool,
    masters: HostMasters | None = None,
) -> None:
    """Halt(MISMATCH) naming all that the disk and the host lack. `optimizer`: its name; `average`: an EMA is kept.

    Room for the checkpoints that stay for ever may still be made while the run goes on: its lack is a warning.
    """
    weights = "bf16" if any(parameter.element_size() == 2 for parameter in parameters.values()) else "fp32"
    one_bytes = checkpoint_bytes(optimizer, shapes_of(parameters.values()), weights=weights, average=average)
    gathered = shares.gathered_bytes(optimizer, parameters, one_bytes) if shares is not None else 0
    found = (
        space.lacking_space(run, one_bytes, settings),
        _host_lacks(shares.name if shares is not None else "none", gathered),
        offload_lacks(masters.pending_bytes(optimizer) if masters is not None else 0),
    )
    if problems := [problem for problem in found if problem]:
        raise Halt(ExitCode.MISMATCH, "\n".join(problems))
    warning = space.permanent_warning(
        run, one_bytes, settings, updates=plan.total_updates, updates_per_epoch=plan.updates_per_epoch,
        files_bytes=usable.missing_bytes(run.path, files, parameters.values(), average=average) if files is not None else 0,
    )  # fmt: skip
    if warning:
        log.warning(warning)


def _host_lacks(sharding: str, need: int) -> str | None:
    """What is wrong when the main process's host cannot take the `need` bytes that shares are gathered into at a save."""
    have = available_host_bytes()
    if have >= need:
        return None
    return (
        f"optimizer.sharding: {sharding} gathers {need / 1e9:.1f} GB of state in the main process's host memory at every save, and "
        f"{have / 1e9:.1f} GB are available; use none, or a host with more memory"
    )


def offload_lacks(need: int) -> str | None:
    """What is wrong when the host cannot take the `need` bytes of gradients and state that masters there bring beside them."""
    have = available_host_bytes()
    if have >= need:
        return None
    return (
        f"optimizer.offload: host needs {need / 1e9:.1f} GB of host memory beside the weights for gradients and optimizer state, and "
        f"{have / 1e9:.1f} GB are available; use a host with more memory, or optimizer.offload: none"
    )


def open_observers(
    watching: Watching, run: RunDir, place: Place, tracker: Tracker, previews: Previews, held_out: HeldOut,
    *, times: Times, work: Work,
) -> Observers:  # fmt: skip
    """What looks at the run, at the point where its metrics stand."""
    return Observers(
        tracker=tracker,
        trace=Trace(run.path) if watching.tracking.trace and place.is_main else None,
        spikes=SpikeDetector(recent_losses(run.metrics) if place.is_main else ()),
        times=times,
        work=work,
        previews=previews,
        previews_every_steps=watching.previews_every_steps,
        previews_first=watching.previews_first,
        held_out=held_out,
        held_out_every_steps=watching.held_out_every_steps,
        held_out_first=watching.held_out_first,
    )


def recent_losses(metrics: Path) -> list[float]:
    """The losses that metrics.jsonl ends with, so that a resumed run is not blind to spikes at first."""
    records = read_metrics(metrics)[-SPIKE_WINDOW :] if metrics.is_file() else []
    return [record["loss"] for record in records if isinstance(record.get("loss"), float)]


def open_tracker(watching: Watching, run: RunDir, place: Place, plan: Plan, progress: Progress) -> Tracker:
    """metrics.jsonl, the bar, and what else the config names; silent on other than the main process."""
    return Tracker(
        run.path,
        watching.tracking,
        is_main=place.is_main,
        run_name=watching.identity.stage,
        config_flat=watching.identity.flat,
        total_steps=plan.total_updates,
        resume_step=progress.step,
    )


def open_loader(
    images: Callable[..., TileDataset], settings: DataConfig, machine: Machine, data: Data, first_step: int
) -> Loader:
    """Latents, noise and captions of this process's tiles, from the plan step reached."""
    last_step = data.plan.total_updates
    dataset = images(data.index, data.plan, ShardReader(data.folder), data.tokenizer, total_updates=last_step)
    return Loader(
        dataset, settings, machine.place.device, tiles=machine.tiles_here, first_step=first_step, last_step=last_step
    )


def open_gradients(machine: Machine, opened: Model) -> Gradients:
    """DDP around the one module, or plain module and flat buffer when the order of sums must not vary."""
    place, networks, shards = machine.place, opened.networks, opened.shards
    parameters = list((trained_parameters(networks) if opened.masters is None else opened.masters.parameters).values())
    if machine.strict:
        groups = collectives.pair_groups(place.world, machine.collective_timeout_s)
        return Gradients(networks, parameters, place, strict_groups=groups, virtual_per_rank=machine.virtual_per_rank)
    if place.world == 1:
        return Gradients(networks, parameters, place)
    control = collectives.control_group(place.world, machine.collective_timeout_s)
    if shards is not None:
        return Gradients(networks, parameters, place, control=control, shards=shards)
    adopted_by_buckets(parameters)
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; accelerate and older torch know the old name only.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = machine.accelerator.prepare_model(networks)
    return Gradients(model, parameters, place, control=control)


def open_saver(run: RunDir, settings: CheckpointConfig, plan: Plan, stop: StopFlag) -> Saver:
    """Background writer of checkpoints; one per epoch is kept for ever unless the config says otherwise."""
    every = space.permanent_every(settings, plan.updates_per_epoch)
    return Saver(run, settings, permanent_every=every, stopping=lambda: stop.asked)


@contextlib.contextmanager
def closing(session: Session) -> Iterator[Session]:
    """Ends workers, writer thread and trackers however the run ends."""
    try:
        yield session
    finally:
        session.data.close()
        if session.run.saver is not None:
            session.run.saver.finish()
        if session.observers.trace is not None:
            session.observers.trace.close()
        session.observers.times.close()
        session.observers.tracker.close()
