"""Assembles what a stage trains with: processes, data, networks, optimizer, and the state of an interrupted run."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from train.config.derived import Images, Objective, Running, TrainedAs
from train.config.stage import BatchConfig, LaunchConfig, OptimizerConfig
from train.data.index import Index
from train.data.selection import open_selection, refuse_other_vae, vae_mark
from train.diffusion.noise import alphas_cumprod
from train.diffusion.objective import Diffusion, autocast
from train.model import memory, speed, text
from train.model.adapters import runs
from train.model.adapters import training as adapter
from train.model.networks import (
    Components,
    Networks,
    cast_frozen,
    freeze,
    parameter_groups,
    receive,
    set_train_mode,
    trained_parameters,
)
from train.model.recomputation import exempt_steps_of, set_checkpointing, set_text_checkpointing
from train.model.source import LocalModel, is_standard
from train.optim import optimizers, rounding, stepping
from train.optim.collectives import Place
from train.optim.offload import HostMasters
from train.optim.zero1 import Shares
from train.recipe import timesteps
from train.recipe.captions import protect_identity
from train.recipe.order import Plan, plan_fingerprint, share_of
from train.storage.saver import available_host_bytes
from train.storage.state_files import PRECISIONS

if TYPE_CHECKING:
    from train.optim.fsdp2 import FullShards

log = logging.getLogger("anix")
BUCKET_MB = 100  # DDP's default of 25 cuts the 13.5 GB of stage 1 into 540 sums, each with its launch and its wait


@dataclass(frozen=True)
class Machine:
    """The processes of this run and how the update's tiles divide among them."""

    place: Place
    accelerator: Accelerator
    tiles_here: range  # tiles of every update that this process runs
    virtual_per_rank: int  # strict only
    strict: bool  # sums in a fixed order
    collective_timeout_s: float


@dataclass(frozen=True)
class Execution:
    """How a tile runs: blocks that keep their activations (0 = recompute all .. 5 = none), parts, text encoders."""

    exempt_steps: int
    split: int
    text_checkpointing: bool


@dataclass(frozen=True)
class Model:
    """The predecessor's files, its networks with what they were built from, how tiles run through them, and the objective."""

    source: LocalModel
    components: Components
    networks: Networks
    execution: Execution
    diffusion: Diffusion
    costs: memory.Setup | None  # what an image costs is counted for SDXL's own networks only
    shards: FullShards | None  # FSDP2: which part of everything this process holds
    masters: HostMasters | None = None  # the trained weights themselves, where the networks hold copies of them


@dataclass(frozen=True)
class Data:
    """The stage's images in plan order, and those held out."""

    folder: str  # of the prepared dataset
    index: Index
    held_out: Index
    plan: Plan
    tokenizer: text.TagTokenizer
    fingerprint: str  # of the plan
    vae: str  # `vae_mark` of the stage's


def open_machine(batch: BatchConfig, launch: LaunchConfig) -> Machine:
    """Join the process group. Raises Halt(MISMATCH) when the tiles do not divide among the processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, virtual_per_rank = share_of(batch, world)
    if batch.strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else every new tensor is filled with NaN: traffic, and no other bit.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=launch.collective_timeout_s)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast and loss scaling are ours: step.py, loss_scale.py
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False, bucket_cap_mb=BUCKET_MB),
        ],
    )
    if accelerator.num_processes > 1:
        # accelerate passes on only what differs from its own default, which is not that of a gloo group.
        dist.distributed_c10d._set_pg_timeout(timeout)
    rank = accelerator.process_index
    place = Place(rank, accelerator.num_processes, accelerator.device)
    tiles_here = range(rank * accumulation, (rank + 1) * accumulation)
    return Machine(place, accelerator, tiles_here, virtual_per_rank, batch.strict, launch.collective_timeout_s)


def open_data(images: Images, source: LocalModel) -> Data:
    """Selection, held-out split and plan. Raises Halt(MISMATCH) for a dataset that is not prepared for this."""
    selection, order = open_selection(images), images.order
    refuse_other_vae(selection.folder, selection.index, source)
    kept = selection.kept
    tokenizer = text.load_tag_tokenizer(source.tokenizers)
    fingerprint = plan_fingerprint(
        seed=order.seed,
        tile_images=order.tile_images,
        tiles_per_update=order.tiles_per_update,
        remainder=order.remainder,
        min_bucket=images.min_bucket or order.tile_images,
        dataset=selection.index.fingerprint,
        selection=kept.selection_hash,
        tokenizers=tokenizer.identity(),
        version=selection.plan.version,
        law_file=timesteps.file_identity(images.noise),
        flips=kept.flips_hash if images.flip else None,
        protect=protect_identity(images.protect),
    )
    return Data(selection.folder, kept, selection.held_out, selection.plan, tokenizer, fingerprint, vae_mark(source))


def settle(running: Running, machine: Machine, plan: Plan, source: LocalModel) -> Execution:
    """How tiles are executed: the config's words, with `auto` settled by the memory that is free right now.

    The prediction knows SDXL's own architecture; for another, `auto` means full recomputation and whole tiles.
    """
    mode, split = running.checkpointing, running.split
    if "auto" not in (mode, split):
        return Execution(exempt_steps_of(mode), int(split), mode != "none")
    if not is_standard(source.configs):
        log.warning("auto settles for full checkpointing and whole tiles: this is not SDXL's own architecture")
        steps = 0 if mode == "auto" else exempt_steps_of(mode)
        return Execution(steps, 1 if split == "auto" else int(split), True)
    free, most = free_bytes(machine.place), max(plan.largest_tiles.values())
    choice = memory.settle(running, free, plan.buckets, machine.place.world, tile_images=most)
    log.info(
        "auto: %d blocks kept, tiles in %d parts; predicted peak %.1f GiB of %.1f usable",
        choice.exempt_steps,
        choice.split,
        choice.prediction.total / memory.GIB,
        choice.usable_bytes / memory.GIB,
    )
    return Execution(choice.exempt_steps, choice.split, choice.text_checkpointing)


def free_bytes(place: Place) -> int:
    """Memory that may still be taken on the device, the least of all processes."""
    if place.device.type == "cuda":
        free = torch.cuda.mem_get_info(place.device)[0]
    else:
        free = available_host_bytes() // place.world
    if place.world > 1:
        least = torch.tensor([free], dtype=torch.int64, device=place.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        free = int(least)
    return free


def open_model(
    running: Running, objective: Objective, machine: Machine, plan: Plan, source: LocalModel, components: Components
) -> Model:
    """The networks as the stage trains them, recomputing as much as memory asks for."""
    execution, told = settle(running, machine, plan, source), objective.trained_as
    networks = open_networks(running, told, components, execution)
    if running.adapter is not None and source.adapter is not None:
        runs.go_on_from(networks, source.adapter, source.path)
    shards = open_shards(running, networks, machine.place)
    masters = None
    if running.offload == "host":
        masters = HostMasters(networks, trained_parameters(networks), machine.place.device, PRECISIONS[running.precision])
    if any(parameter.is_meta for parameter in networks.parameters()):  # as handoff.open_source leaves them to several processes
        receive(networks, source, machine.place.device, (lambda whole, like: whole) if shards is None else shards.cut_one)
    elif shards is None:
        networks.to(machine.place.device)
    if running.attention in ("flash", "cudnn"):
        inputs = speed.attention_inputs(networks.unet, lambda: probe(networks, running.precision, told.max_tokens))
        speed.check_attention(inputs, running.attention)
    set_speed(networks, running)
    diffusion = Diffusion(
        alphas_T=alphas_cumprod(told.zero_terminal_snr).to(machine.place.device),
        noise=objective.noise,
        loss=objective.loss,
        precision=running.precision,
        split=execution.split,
        attention=running.attention,
        deterministic=machine.strict,
        channels_last=running.channels_last,
    )
    costs = memory.setup_of(running, machine.place.world) if is_standard(source.configs) else None
    return Model(source, components, networks, execution, diffusion, costs, shards, masters)


def open_networks(running: Running, told: TrainedAs, components: Components, execution: Execution) -> Networks:
    """The trained module, still on the host, with the memory options of the config."""
    networks = Networks(
        components,
        train_text_encoders=running.trains_text,
        context=told.context,
        pooled_projection=told.pooled_projection,
        timestep_embedding=told.timestep_embedding,
    )
    if running.adapter is not None:
        adapter.inject(networks, running.adapter, running.seed, PRECISIONS[running.precision], base=running.base)
    freeze(networks, running.groups)
    set_checkpointing(networks.unet, "partial", execution.exempt_steps)
    if running.trains_text:
        for encoder in (networks.text_encoder, networks.text_encoder_2):
            set_text_checkpointing(encoder, execution.text_checkpointing)
    cast_frozen(networks, PRECISIONS[running.precision])
    if running.weights == "bf16":
        rounding.to_16_bit(networks.parameters())
    return networks


def set_speed(networks: Networks, running: Running) -> None:
    """Layout, number format and compilation of the U-Net, then every module in training mode."""
    if running.channels_last:
        speed.to_channels_last(networks.unet)
    if running.float8:
        if not running.compile:
            log.warning("model.float8 without model.compile casts one by one and is slower than bf16: set model.compile=true")
        speed.to_float8(networks.unet)
    if running.compile:
        speed.compile_blocks(networks.unet)
    set_train_mode(networks)


def probe(networks: Networks, precision: str, max_tokens: int) -> None:
    """One forward as in training, as small as the architecture allows; its values mean nothing."""
    device = next(networks.parameters()).device
    side = 2 ** len(networks.unet.config.block_out_channels)  # every level halves it but the last
    ids_1_BN77 = torch.zeros(1, max_tokens // 75, 77, dtype=torch.int64, device=device)
    latents_BCHW = torch.zeros(1, 4, side, side, dtype=PRECISIONS[precision], device=device)
    timesteps_B, size_B6 = torch.tensor([500], device=device), torch.zeros(1, 6, device=device)
    with torch.no_grad(), autocast(device.type, precision):
        networks(latents_BCHW, timesteps_B, ids_1_BN77, ids_1_BN77, size_B6)


def make_optimizer(
    settings: OptimizerConfig,
    peaks: Mapping[str, float],
    networks: Networks,
    shares: Shares | FullShards | HostMasters | None,
    *,
    strict: bool,
) -> torch.optim.Optimizer:
    """The configured optimizer over its groups, or over this process's share of each."""
    groups = []
    for name, parameters in parameter_groups(networks, settings.groups).items():
        members = list((parameters if shares is None else shares.mine(parameters)).values())
        if members:
            groups.append((name, members, peaks[name]))
    # Beside a CPU the masters step as weights on it do, bit by bit; beside a card in one pass over the host's memory.
    fused = isinstance(shares, HostMasters) and shares.device.type == "cuda"
    optimizer = optimizers.make_optimizer(groups, settings, strict=strict, fused=fused)
    if isinstance(optimizer, stepping.Adafactor) and shares is not None:
        optimizer.group = shares.group
    return optimizer


def open_shards(running: Running, networks: Networks, place: Place) -> FullShards | None:
    """The networks cut into the processes' parts, unit by unit on the way to the device; None where they stay whole."""
    if running.sharding not in ("fsdp2", "hsdp") or place.world == 1:
        return None
    from train.optim import fsdp2  # loads a part of torch that nobody else needs

    mesh = fsdp2.open_mesh(running.sharding, place, running.shard_group, int(os.environ.get("LOCAL_WORLD_SIZE", place.world)))
    fsdp2.shard(networks, mesh, running.gather)
    return fsdp2.FullShards(mesh, place, plain_state=running.optimizer == "adafactor")


def open_shares(sharding: str, networks: Networks, place: Place) -> Shares | None:
    """Which process keeps which part of the optimizer's state; None when each keeps all of it."""
    if sharding != "zero1" or place.world == 1:
        return None
    return Shares(trained_parameters(networks), place)
