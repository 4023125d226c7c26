"""Before the first update: every shape of the run once forward and backward, so memory runs out now or never.

Shape legend: B images of a tile (or of the part in which it is executed), C H W latent, N text chunks.
"""

from __future__ import annotations

import contextlib

import torch

from train.base.errors import ExitCode, Halt
from train.data.dataset import synthetic_part
from train.diffusion.objective import image_losses
from train.engine import postmortem
from train.engine.session import Session, Trained
from train.optim import collectives
from train.optim.optimizers import shapes_of
from train.recipe.optimizer_state import state_bytes
from train.recipe.order import Plan


def shapes_to_try(plan: Plan, device: torch.device) -> list[tuple[int, int]]:
    """Buckets to run: all of them where memory is the card's, the one with the largest tile where it is the host's."""
    images = plan.largest_tiles
    largest_first = sorted(plan.buckets, key=lambda size: (-size[0] * size[1] * images[size], size))
    return largest_first if device.type == "cuda" else largest_first[:1]


def run(session: Session) -> None:
    """`check`, between two chances to stop that all processes take alike."""
    run, device = session.run, session.run.place.device
    collectives.stop_if_asked(run.stop.asked, device, run.progress.step)
    with postmortem.recorded_memory(run.folder) if device.type == "cuda" else contextlib.nullcontext():
        check(session)
    collectives.stop_if_asked(run.stop.asked, device, run.progress.step)


def check(session: Session) -> int:
    """Forward and backward of each shape with the longest caption; the peak in bytes (0 on a CPU).

    The optimizer's state and the partial sums of `strict`, which do not exist before the first step, are stood in for by
    an allocation of their size.
    Gradients are dropped afterwards and no generator is touched. Raises Halt(OUT_OF_MEMORY) naming the bucket. Returns
    between two buckets when a stop was asked for: the caller's next agreed stop ends all processes.
    """
    trained, plan, dataset = session.trained, session.data.plan, session.data.loader.dataset
    device, gradients = session.run.place.device, trained.gradients
    on_gpu = device.type == "cuda"
    pending_bytes = pending_state_bytes(trained) + gradients.partial_sums_bytes if on_gpu and trained.masters is None else 0
    reserve = torch.empty(pending_bytes, dtype=torch.uint8, device=device)
    for width, height in shapes_to_try(plan, device):
        if gradients.shards is not None:  # all gather together, so all stop together
            collectives.stop_if_asked(session.run.stop.asked, device, session.run.progress.step)
        elif session.run.stop.asked:
            break
        images = -(-plan.largest_tiles[width, height] // trained.diffusion.split)
        part = synthetic_part(width, height, images, dataset.tokenizer, dataset.max_tokens).to(device)
        try:
            # Through the wrapper, whose buckets must fit too, and in the training's own attention, which a compiler keeps.
            with trained.diffusion.kernels(), gradients.alone():
                image_losses(gradients.model, part, trained.diffusion).sum().backward()
        except (torch.OutOfMemoryError, MemoryError) as error:
            host = "set optimizer.offload=host, " if trained.masters is None and session.run.place.world == 1 else ""
            raise Halt(
                ExitCode.OUT_OF_MEMORY,
                f"bucket {width}x{height} with {images} images does not fit the memory: {error}; "
                f"raise batch.split, set model.gradient_checkpointing=full, {host}or use an overlay of configs/memory/",
            ) from error
        finally:
            gradients.clear()
    del reserve
    return torch.cuda.max_memory_allocated(device) if on_gpu else 0


def pending_state_bytes(trained: Trained) -> int:
    """Optimizer state that this process's first step will allocate; 0 when a checkpoint has brought it."""
    if trained.optimizer.state:
        return 0
    held = [parameter for group in trained.optimizer.param_groups for parameter in group["params"]]
    shards = trained.gradients.shards
    return int(state_bytes(trained.optimizer_name, shapes_of(held)) * (1.0 if shards is None else shards.fraction))
