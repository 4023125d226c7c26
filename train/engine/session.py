"""The running stage: the state of an interrupted run restored, and everything the loop owns made from the config."""

from __future__ import annotations

import contextlib
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from train.base.errors import ExitCode, Halt
from train.base.signals import StopFlag
from train.config.schema import flatten
from train.config.stage import StageConfig, config_hash
from train.data.dataset import TileDataset
from train.data.index import Index, changes_since, save_selection
from train.data.loader import Feed
from train.data.selection import short_tiles_note
from train.data.shards import ShardReader
from train.diffusion.noise import alphas_cumprod
from train.diffusion.objective import Diffusion
from train.engine import finished, trial
from train.engine.loop import Session
from train.engine.refusals import check_schedule
from train.engine.setup import Data, Execution, Machine, make_optimizer, open_shares
from train.engine.step import Gradients
from train.model.networks import Components, Networks, overlay, trained_parameters
from train.model.source import LocalModel
from train.observe.heldout import HeldOut
from train.observe.previews import Previews
from train.observe.tracker import SPIKE_WINDOW, SpikeDetector, Tracker, read_metrics
from train.optim import collectives, optimizers
from train.optim.collectives import Place
from train.optim.ema import Ema
from train.optim.loss_scale import loss_scale
from train.recipe import rng, schedule
from train.recipe.order import Plan
from train.storage import checkpoint, resume, space, tensorfile
from train.storage.checkpoint import Progress
from train.storage.rundir import RunDir, remove_leftovers
from train.storage.saver import Saver

log = logging.getLogger("anix")
SELECTION = "selection.safetensors"  # beside config.yaml: which images and captions this run trains on


def expectations(
    config: StageConfig, data: Data, source: LocalModel, networks: Networks, ema: Ema | None
) -> resume.Expectations:
    """What a checkpoint of this run must have been written under, and what the next one says about itself."""
    model = tensorfile.specs(trained_parameters(networks))
    return resume.Expectations(
        stage=config.stage,
        config=resume.without_secrets(flatten(config)),
        held={
            "data.path": f"{data.index.fingerprint}/{data.index.selection_hash}",
            "model.init_from": source.sha256,
            "model.vae": data.vae,
            # Pins: a wrong one was refused before, a right one changes nothing.
            "model.init_sha256": source.sha256,
            "model.vae_sha256": data.vae,
            "model.tokenizers": data.tokenizer.identity(),
        },
        facts={"dataset": data.index.fingerprint, "plan": data.fingerprint, "parent": source.sha256},
        notes={"canary": rng.canary(config.seed), "threads": torch.get_num_threads(), "versions": versions()},
        tensors={"model": model, "optimizer": None} | ({"ema": model} if ema is not None else {}),
        accept=config.resume.accept,
        defaults=flatten(StageConfig()),
    )


def versions() -> dict[str, str]:
    """What decides a run's last bits beside the hardware."""
    import diffusers
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {"diffusers": diffusers.__version__, "transformers": transformers.__version__}


def restore(
    run: RunDir,
    expected: resume.Expectations,
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    config: StageConfig,
    index: Index,
    *,
    is_main: bool,
) -> checkpoint.Loaded | None:
    """Load the newest sound checkpoint into the networks, the optimizer and the average; None for a new run."""
    resume.check_accept(expected.accept, expected.config)
    changes = changes_since(run.path / SELECTION, index)
    try:
        loaded = checkpoint.load_newest(run, expected, verify=config.checkpoint.verify)
    except Halt as halt:
        raise Halt(halt.code, halt.message + (f"\nThe dataset changed: {changes}" if changes else "")) from halt
    if loaded is None:
        if is_main:
            begin(run, index, None)
        return None
    if loaded.progress.updates and loaded.manifest.files["optimizer.safetensors"].tensors == 0:
        raise Halt(ExitCode.MISMATCH, f"{loaded.path}: {loaded.progress.updates} updates, and no optimizer state")
    overlay(networks, loaded.tensors("model"), loaded.path / "model.safetensors")
    optimizers.load_state_tensors(
        optimizer,
        trained_parameters(networks),
        loaded.tensors("optimizer"),
        name=config.optimizer.name,
        source=loaded.path,
    )
    if ema is not None:
        ema.load(loaded.tensors("ema"))
    if is_main:
        begin(run, index, loaded)
        log.info("resuming after update %d from %s", loaded.progress.step, loaded.path)
        if loaded.comparison.warned or loaded.comparison.accepted:
            log.warning("settings changed since the checkpoint:\n%s", loaded.comparison.table())
    return loaded


def begin(run: RunDir, index: Index, loaded: checkpoint.Loaded | None) -> None:
    """The first writes of a start, once nothing can refuse it any more: what an earlier start left over is cleared.

    A run killed before its first checkpoint has logged updates that will come again.
    """
    step = loaded.progress.step if loaded else 0
    remove_leftovers(run.path)
    save_selection(run.path / SELECTION, index)
    resume.cut_metrics(run.metrics, step)
    resume.cut_trace(run.path / "trace.txt", step)
    resume.cut_metrics(run.path / "validation.jsonl", step)


def open_session(
    config: StageConfig,
    run: RunDir,
    machine: Machine,
    data: Data,
    source: LocalModel,
    components: Components,
    networks: Networks,
    execution: Execution,
    stop: StopFlag,
) -> Session:
    """Everything the loop owns, at the point where the run stands."""
    place, plan = machine.place, data.plan
    # What a setting can still spoil comes before the checkpoint is read and before files are opened.
    cycle = check_schedule(config, plan)
    warning = schedule.long_warmup(config.schedule, total_updates=plan.total_updates)
    if warning and place.is_main:
        log.warning("%s", warning)
    previews = Previews(config, components, networks, place)
    held_out = HeldOut(config, data.held_out, data.tokenizer, networks, place, scaling=scaling_factor(source))
    parameters, shares = trained_parameters(networks), open_shares(config, networks, place)
    optimizer = make_optimizer(config, networks, shares)
    ema = Ema(parameters, config.ema.decay, config.ema.every_steps, config.ema.device) if config.ema.decay else None
    expected = expectations(config, data, source, networks, ema)
    if place.is_main:
        trial.check_room(config, run, plan, parameters, shares)
        if note := short_tiles_note(config, plan):
            log.info(note)
    loaded = restore(run, expected, networks, optimizer, ema, config, data.index, is_main=place.is_main)
    progress = loaded.progress if loaded else Progress()
    if place.is_main and config.validation.every_steps:
        held_out.remember(run.path)
    gradients = open_gradients(config, machine, networks)
    return Session(
        config=config,
        place=place,
        plan=plan,
        feed=open_feed(config, machine, data, source, progress.step),
        gradients=gradients,
        diffusion=open_diffusion(config, place, execution),
        optimizer=optimizer,
        parameters=parameters,
        ema=ema,
        tracker=open_tracker(config, run, place, plan, progress),
        saver=open_saver(config, run, plan, stop) if place.is_main else None,
        stop=stop,
        run=run,
        state=state_of(config, expected, loaded, place, execution, run.done),
        previews=previews,
        held_out=held_out,
        progress=progress,
        scale=loss_scale(config.precision, loaded.state.get("scaler") if loaded else None),
        cycle_updates=cycle,
        last_step=plan.total_updates,
        shares=shares,
        spikes=SpikeDetector(recent_losses(run.metrics) if place.is_main else ()),
    )


def recent_losses(metrics: Path) -> list[float]:
    """The losses that metrics.jsonl ends with, so that a resumed run is not blind to spikes at first."""
    records = read_metrics(metrics)[-SPIKE_WINDOW :] if metrics.is_file() else []
    return [record["loss"] for record in records if isinstance(record.get("loss"), float)]


def state_of(
    config: StageConfig,
    expected: resume.Expectations,
    loaded: checkpoint.Loaded | None,
    place: Place,
    execution: Execution,
    done: Mapping[str, Any] | None,
) -> Callable[[Session], dict[str, Any]]:
    """What state.json says beside the progress: settings, hashes, loss scale, and where the run was (re)started."""
    earlier = loaded.state.get("history", []) if loaded else []
    history = [*earlier, [loaded.progress.step if loaded else 0, place.world]]
    # Those of earlier resumes too: the checkpoint that is loaded next knows the new settings only.
    accepted = list(loaded.state.get("accepted", [])) if loaded else []
    accepted += [f"step {loaded.progress.step}: {found}" for found in loaded.comparison.accepted] if loaded else []
    extended = list(loaded.state.get("extended", [])) if loaded else []
    extended += finished.went_on(loaded.progress.step, done, loaded.comparison) if loaded else []

    def state(session: Session) -> dict[str, Any]:
        return expected.to_state() | {
            "scaler": session.scale.to_state(),
            "history": history,
            "config_hash": config_hash(config),
            "accepted": accepted,
            "extended": extended,
            "execution": asdict(execution),  # what auto picked
        }

    return state


def open_diffusion(config: StageConfig, place: Place, execution: Execution) -> Diffusion:
    """Noise schedule, noise offset and loss of the stage, and how the forward pass runs."""
    return Diffusion(
        alphas_T=alphas_cumprod(config.noise.zero_terminal_snr).to(place.device),
        noise=config.noise,
        loss=config.loss,
        precision=config.precision,
        split=execution.split,
        attention=config.model.attention,
        deterministic=config.batch.determinism == "strict",
        channels_last=config.model.channels_last,
    )


def open_tracker(config: StageConfig, run: RunDir, place: Place, plan: Plan, progress: Progress) -> Tracker:
    """metrics.jsonl, the bar, and what else the config names; silent on other than the main process."""
    return Tracker(
        run.path,
        config.tracking,
        is_main=place.is_main,
        run_name=config.stage,
        config_flat=flatten(config),
        total_steps=plan.total_updates,
        resume_step=progress.step,
    )


def scaling_factor(source: LocalModel) -> float:
    """Factor between the VAE's latents and what the U-Net sees (SDXL: 0.13025)."""
    return float(source.configs["vae"]["scaling_factor"])


def open_feed(config: StageConfig, machine: Machine, data: Data, source: LocalModel, first_step: int) -> Feed:
    """Latents, noise and captions of this process's tiles, from the plan step reached."""
    dataset = TileDataset(
        data.index,
        data.plan,
        ShardReader(config.data.path),
        data.tokenizer,
        seed=config.seed,
        data=config.data,
        noise=config.noise,
        scaling=scaling_factor(source),
        total_updates=data.plan.total_updates,
    )
    return Feed(
        dataset,
        config.data,
        machine.place.device,
        tiles=machine.tiles_here,
        first_step=first_step,
        last_step=data.plan.total_updates,
    )


def open_gradients(config: StageConfig, machine: Machine, networks: Networks) -> Gradients:
    """DDP around the one module, or plain module and flat buffer when the order of sums must not vary."""
    place = machine.place
    parameters = list(trained_parameters(networks).values())
    if config.batch.determinism == "strict":
        return Gradients(
            networks,
            parameters,
            place,
            strict_groups=collectives.pair_groups(place.world, config.launch.collective_timeout_s),
            virtual_per_rank=machine.virtual_per_rank,
        )
    if place.world == 1:
        return Gradients(networks, parameters, place)
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; accelerate and older torch know the old name only.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = machine.accelerator.prepare_model(networks)
    control = collectives.control_group(place.world, config.launch.collective_timeout_s)
    return Gradients(model, parameters, place, control=control)


def open_saver(config: StageConfig, run: RunDir, plan: Plan, stop: StopFlag) -> Saver:
    """Background writer of checkpoints; one per epoch is kept for ever unless the config says otherwise."""
    every = space.permanent_every(config.checkpoint, plan.updates_per_epoch)
    return Saver(run, config.checkpoint, permanent_every=every, stopping=lambda: stop.asked)


@contextlib.contextmanager
def closing(session: Session) -> Iterator[Session]:
    """Ends workers, writer thread and trackers however the run ends."""
    try:
        yield session
    finally:
        session.feed.close()
        if session.saver is not None:
            session.saver.finish()
        session.tracker.close()
