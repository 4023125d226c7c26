"""Before the first update: every shape of the run once forward and backward, so memory runs out now or never.

Shape legend: B images of a tile (or of the part in which it is executed), C H W latent, N text chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from train.base.errors import ExitCode, Halt
from train.config.stage import StageConfig
from train.diffusion.objective import Batch, image_losses
from train.engine.loop import Session
from train.model.text import TagTokenizer
from train.optim import collectives, optimizers
from train.optim.zero1 import Shares
from train.recipe.order import Plan, Tile
from train.storage import space
from train.storage.rundir import RunDir
from train.storage.saver import available_host_bytes

log = logging.getLogger("anix")
Parameters = Mapping[str, torch.nn.Parameter]  # trained ones by canonical name


def shapes_to_try(plan: Plan, device: torch.device) -> list[tuple[int, int]]:
    """Buckets to run: all of them where memory is the card's, the one with the largest tile where it is the host's."""
    images = plan.largest_tiles
    largest_first = sorted(plan.buckets, key=lambda size: (-size[0] * size[1] * images[size], size))
    return largest_first if device.type == "cuda" else largest_first[:1]


def run(session: Session, tokenizer: TagTokenizer) -> None:
    """`check`, between two chances to stop that all processes take alike."""
    stop_if_asked = partial(collectives.stop_if_asked, device=session.place.device, step=session.progress.step)
    stop_if_asked(session.stop.asked)
    check(session, tokenizer)
    stop_if_asked(session.stop.asked)


def check(session: Session, tokenizer: TagTokenizer) -> int:
    """Forward and backward of each shape with the longest caption; the peak in bytes (0 on a CPU).

    The optimizer's state and the partial sums of `strict`, which do not exist before the first step, are stood in for by
    an allocation of their size.
    Gradients are dropped afterwards and no generator is touched. Raises Halt(OUT_OF_MEMORY) naming the bucket. Returns
    between two buckets when a stop was asked for: the caller's next agreed stop ends all processes.
    """
    device, model = session.place.device, session.gradients.model
    target = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    on_gpu = device.type == "cuda"
    pending_bytes = pending_state_bytes(session) + session.gradients.partial_sums_bytes if on_gpu else 0
    reserve = torch.empty(pending_bytes, dtype=torch.uint8, device=device)
    for width, height in shapes_to_try(session.plan, device):
        if session.stop.asked:
            break
        images = -(-session.plan.largest_tiles[width, height] // session.diffusion.split)
        part = synthetic_part(width, height, images, tokenizer, session.config.data.max_tokens).to(device)
        try:
            image_losses(target, part, session.diffusion).sum().backward()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise Halt(
                ExitCode.OUT_OF_MEMORY,
                f"bucket {width}x{height} with {images} images does not fit the memory: {error}; "
                "raise batch.split, set model.gradient_checkpointing=full, or use an overlay of configs/memory/",
            ) from error
        finally:
            session.gradients.clear()
    del reserve
    return torch.cuda.max_memory_allocated(device) if on_gpu else 0


def pending_state_bytes(session: Session) -> int:
    """Optimizer state that this process's first step will allocate; 0 when a checkpoint has brought it."""
    if session.optimizer.state:
        return 0
    held = [parameter for group in session.optimizer.param_groups for parameter in group["params"]]
    return optimizers.state_bytes(session.config.optimizer.name, held)


def check_room(config: StageConfig, run: RunDir, plan: Plan, parameters: Parameters, shares: Shares | None) -> None:
    """Halt(MISMATCH) naming all that the disk and the host lack; before anything of the run directory is changed.

    Room for the checkpoints that stay for ever may still be made while the run goes on: its lack is a warning.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    averages = sum(4 * parameter.numel() for parameter in parameters.values()) if config.ema.decay else 0
    one_bytes = weights + averages + optimizers.state_bytes(config.optimizer.name, parameters.values())
    found = (space.lacking_space(run, one_bytes, config.checkpoint), _host(config, parameters, shares))
    if problems := [problem for problem in found if problem]:
        raise Halt(ExitCode.MISMATCH, "\n".join(problems))
    warning = space.permanent_warning(
        run, one_bytes, config.checkpoint, updates=plan.total_updates, updates_per_epoch=plan.updates_per_epoch
    )
    if warning:
        log.warning(warning)


def _host(config: StageConfig, parameters: Parameters, shares: Shares | None) -> str | None:
    """What is wrong when the main process's host cannot take the optimizer state that ZeRO-1 gathers at a save."""
    if shares is None:
        return None
    mine = shares.mine(parameters)
    others = [parameter for name, parameter in parameters.items() if name not in mine]
    need, have = optimizers.state_bytes(config.optimizer.name, others), available_host_bytes()
    if have >= need:
        return None
    return (
        f"optimizer.sharding: zero1 gathers {need / 1e9:.1f} GB of optimizer state in the main process's host "
        f"memory at every save, and {have / 1e9:.1f} GB are available; use none, or a host with more memory"
    )


def synthetic_part(width: int, height: int, images: int, tokenizer: TagTokenizer, max_tokens: int) -> Batch:
    """A batch of that shape with the longest possible caption; values are fixed and unimportant."""
    shape = (images, 4, height // 8, width // 8)
    ids_1, ids_2 = tokenizer.chunk_ids([tokenizer.eos - 2] * max_tokens, max_tokens)
    noise_BCHW = torch.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)
    rows = np.zeros(images, dtype=np.int64)
    return Batch(
        latents_BCHW=noise_BCHW.flip(0) * 0.5,
        noise_BCHW=noise_BCHW,
        input_noise_BCHW=noise_BCHW,
        timesteps_B=torch.full((images,), 500),
        ids_1_BN77=torch.from_numpy(ids_1).expand(images, -1, -1).clone(),
        ids_2_BN77=torch.from_numpy(ids_2).expand(images, -1, -1).clone(),
        size_B6=torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(images, -1).clone(),
        slots_B=torch.arange(images),
        step=-1,
        tile=Tile(width, height, 0, rows, rows.astype(np.uint64), rows),
        tags_dropped=0,
    )
