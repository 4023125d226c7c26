"""Assembles what a stage trains with: processes, data, networks, optimizer, and the state of an interrupted run."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from train import checkpoint, fast, loop, optim, reduce, resume, rng, schedule, tensorfile, text, validation
from train.checkpoint import Progress
from train.checkpointing import set_checkpointing, set_text_checkpointing
from train.config import StageConfig, config_hash, flatten
from train.dataset import TileDataset, make_plan
from train.ema import Ema
from train.exits import ExitCode, Halt
from train.feed import Feed
from train.hub import LocalModel
from train.index import Index
from train.latents import ShardReader
from train.loop import Session
from train.models import (
    Components,
    Networks,
    cast_frozen,
    overlay,
    parameter_groups,
    set_train_mode,
    trained_parameters,
)
from train.noise import alphas_cumprod
from train.plan import Plan, check_buckets, plan_fingerprint, tiles_per_update
from train.previews import Previews
from train.rundir import RunDir
from train.scaler import loss_scale
from train.signals import StopFlag
from train.snapshot import Saver
from train.tracking import Tracker
from train.update import DTYPES, Diffusion, Gradients, Place

log = logging.getLogger("anix")


@dataclass(frozen=True)
class Machine:
    """The processes of this run and how the update's tiles divide among them."""

    place: Place
    accelerator: Accelerator
    tiles_here: range  # tiles of every update that this process runs
    virtual_per_rank: int  # strict only


@dataclass(frozen=True)
class Data:
    """The stage's images in plan order, and those held out."""

    index: Index
    held_out: Index
    plan: Plan
    tokenizer: text.TagTokenizer
    fingerprint: str  # of the plan


def open_machine(config: StageConfig) -> Machine:
    """Join the process group. Raises Halt(MISMATCH) when the tiles do not divide among the processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = config.batch
    tiles, accumulation = tiles_per_update(batch.micro, batch.effective, world)
    if batch.accumulation not in (None, accumulation):
        raise Halt(
            ExitCode.MISMATCH,
            f"batch.accumulation {batch.accumulation} x micro {batch.micro} x {world} processes is not "
            f"batch.effective {batch.effective}: leave it null, or give {accumulation}",
        )
    strict = batch.determinism == "strict"
    virtual_per_rank = reduce.check_strict_world(tiles, world) if strict else 1
    if strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    timeout = datetime.timedelta(seconds=config.launch.collective_timeout_s)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast and loss scaling are ours: update.py, scaler.py
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    rank = accelerator.process_index
    place = Place(rank, accelerator.num_processes, accelerator.device)
    return Machine(place, accelerator, range(rank * accumulation, (rank + 1) * accumulation), virtual_per_rank)


def open_data(config: StageConfig, source: LocalModel) -> Data:
    """Selection, held-out split and plan. Raises Halt(MISMATCH) for a dataset that is not prepared for this."""
    index = Index.open(config.data.path, config.selection)
    held = validation.held_out(index.uids, config.validation.share)
    kept, held_out = index.select(~held), index.select(held)
    counts = Counter(zip(kept.bucket_w.tolist(), kept.bucket_h.tolist(), strict=True))
    check_buckets(counts, config.batch.min_bucket or config.batch.micro)
    plan = make_plan(kept, config)
    if source.tokenizers is None:
        raise Halt(ExitCode.USAGE, f"{source.path} has no tokenizers: set model.tokenizers")
    tokenizer = text.load_tag_tokenizer(source.tokenizers)
    fingerprint = plan_fingerprint(
        seed=config.seed,
        tile_images=config.batch.micro,
        tiles_per_update=config.tiles_per_update,
        remainder=config.batch.remainder,
        min_bucket=config.batch.min_bucket or config.batch.micro,
        dataset=index.fingerprint,
        selection=kept.selection_hash,
        tokenizers=tokenizer.identity(),
    )
    return Data(kept, held_out, plan, tokenizer, fingerprint)


def open_networks(config: StageConfig, components: Components, machine: Machine) -> Networks:
    """The trained module on its device, with the memory and speed options of the config."""
    settings = config.model
    networks = Networks(
        components,
        train_text_encoders=settings.train_text_encoders,
        context=settings.context,
        pooled_projection=settings.pooled_projection,
    )
    set_checkpointing(networks.unet, settings.gradient_checkpointing)
    if settings.train_text_encoders:
        for encoder in (networks.text_encoder, networks.text_encoder_2):
            set_text_checkpointing(encoder, settings.gradient_checkpointing != "none")
    cast_frozen(networks, DTYPES[config.precision])
    networks.to(machine.place.device)
    if settings.channels_last:
        fast.to_channels_last(networks.unet)
    if settings.float8:
        fast.to_float8(networks.unet)
    if settings.compile:
        fast.compile_blocks(networks.unet)
    set_train_mode(networks)
    return networks


def make_optimizer(config: StageConfig, networks: Networks) -> torch.optim.Optimizer:
    """AdamW or Adafactor over one group per trained network."""
    peaks = loop.peaks(config)
    groups = [
        (name, list(parameters.values()), peaks[name]) for name, parameters in parameter_groups(networks).items()
    ]
    return optim.make_optimizer(groups, config.optimizer)


def expectations(
    config: StageConfig, data: Data, source: LocalModel, networks: Networks, ema: Ema | None
) -> resume.Expectations:
    """What a checkpoint of this run must have been written under, and what the next one says about itself."""
    model = tensorfile.specs(trained_parameters(networks))
    return resume.Expectations(
        stage=config.stage,
        config=flatten(config),
        held={
            "data.path": f"{data.index.fingerprint}/{data.index.selection_hash}",
            "model.init_from": source.sha256,
            "model.tokenizers": data.tokenizer.identity(),
        },
        facts={"dataset": data.index.fingerprint, "plan": data.fingerprint, "parent": source.sha256},
        notes={"canary": rng.canary(config.seed), "threads": torch.get_num_threads(), "versions": versions()},
        tensors={"model": model, "optimizer": None} | ({"ema": model} if ema is not None else {}),
        accept=config.resume.accept,
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
    *,
    is_main: bool,
) -> checkpoint.Loaded | None:
    """Load the newest sound checkpoint into the networks, the optimizer and the average; None for a new run."""
    resume.check_accept(expected.accept, expected.config)
    loaded = checkpoint.load_newest(run, expected, verify=config.checkpoint.verify)
    if loaded is None:
        return None
    overlay(networks, loaded.tensors("model"), loaded.path / "model.safetensors")
    optim.load_state_tensors(
        optimizer,
        trained_parameters(networks),
        loaded.tensors("optimizer"),
        name=config.optimizer.name,
        source=loaded.path,
    )
    if ema is not None:
        ema.load(loaded.tensors("ema"))
    if is_main:
        resume.cut_metrics(run.metrics, loaded.progress.step)
        resume.cut_trace(run.path / "trace.txt", loaded.progress.step)
        log.info("resuming after update %d from %s", loaded.progress.step, loaded.path)
        if loaded.comparison.warned or loaded.comparison.accepted:
            log.warning("settings changed since the checkpoint:\n%s", loaded.comparison.table())
    return loaded


def open_session(
    config: StageConfig,
    run: RunDir,
    machine: Machine,
    data: Data,
    source: LocalModel,
    components: Components,
    networks: Networks,
    stop: StopFlag,
) -> Session:
    """Everything the loop owns, at the point where the run stands."""
    place, plan = machine.place, data.plan
    optimizer = make_optimizer(config, networks)
    parameters = trained_parameters(networks)
    ema = Ema(parameters, config.ema.decay, config.ema.every_steps, config.ema.device) if config.ema.decay else None
    expected = expectations(config, data, source, networks, ema)
    loaded = restore(run, expected, networks, optimizer, ema, config, is_main=place.is_main)
    progress = loaded.progress if loaded else Progress()
    history = [*(loaded.state.get("history", []) if loaded else []), [progress.step, place.world]]
    cycle_updates = schedule.cycle_length(
        config.schedule, images=plan.images, effective=config.batch.effective
    )
    schedule.check(
        config.schedule,
        {f"optimizer.{group}_lr": peak for group, peak in loop.peaks(config).items() if group != "text_encoder_2"},
        cycle_updates=cycle_updates,
        total_updates=plan.total_updates,
        epochs=config.epochs,
    )

    def state(session: Session) -> dict[str, Any]:
        return expected.to_state() | {
            "scaler": session.scale.to_state(),
            "history": history,
            "config_hash": config_hash(config),
            "accepted": [str(d) for d in loaded.comparison.accepted] if loaded else [],
        }

    return Session(
        config=config,
        place=place,
        plan=plan,
        feed=open_feed(config, machine, data, source, progress.step),
        gradients=open_gradients(machine, networks, strict=config.batch.determinism == "strict"),
        diffusion=Diffusion(
            alphas_cumprod(config.noise.zero_terminal_snr).to(place.device),
            config.noise,
            config.loss,
            config.precision,
            1 if config.batch.split == "auto" else int(config.batch.split),
        ),
        optimizer=optimizer,
        parameters=parameters,
        ema=ema,
        tracker=Tracker(
            run.path,
            config.tracking,
            is_main=place.is_main,
            run_name=config.stage,
            config_flat=flatten(config),
            total_updates=plan.total_updates,
            resume_update=progress.updates,
        ),
        saver=open_saver(config, run, plan, stop) if place.is_main else None,
        stop=stop,
        run=run,
        state=state,
        previews=Previews(config, components, networks, place),
        validate=lambda session: None,
        progress=progress,
        scale=loss_scale(config.precision, loaded.state.get("scaler") if loaded else None),
        cycle_updates=cycle_updates,
        last_step=plan.total_updates,
    )


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
        scaling=float(source.configs["vae"]["scaling_factor"]),
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


def open_gradients(machine: Machine, networks: Networks, *, strict: bool) -> Gradients:
    """DDP around the one module, or plain module and flat buffer when the order of sums must not vary."""
    place = machine.place
    parameters = list(trained_parameters(networks).values())
    if strict:
        return Gradients(
            networks,
            parameters,
            place,
            strict_groups=reduce.pair_groups(place.world),
            virtual_per_rank=machine.virtual_per_rank,
        )
    model = machine.accelerator.prepare_model(networks) if place.world > 1 else networks
    return Gradients(model, parameters, place)


def open_saver(config: StageConfig, run: RunDir, plan: Plan, stop: StopFlag) -> Saver:
    """Background writer of checkpoints; one per epoch is kept for ever unless the config says otherwise."""
    every = config.checkpoint.permanent_every_steps or max(plan.updates_per_epoch, 1)
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
