"""Activation checkpointing of the SDXL U-Net, block by block: what is recomputed in the backward pass, what is kept.

Checkpointing everything costs about 26 % more arithmetic at 1024x1024; the 1280-channel blocks alone are three
quarters of that. So blocks are exempted in a fixed order, cheapest memory first, and a card takes as many steps as
it has room for (`train.model.memory` predicts the room).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from train.base.errors import ExitCode, Halt
from train.model.memory import STEPS_OF_MODE

# Cumulative: step n keeps the activations of every block named in the first n entries, and recomputes the others.
# The order is finest gain first; all but the last entry gain nearly the same memory per recomputed FLOP.
CHECKPOINT_STEPS: tuple[tuple[str, ...], ...] = (
    ("mid_block",),
    ("down_blocks.2",),
    ("up_blocks.0",),
    ("down_blocks.1", "up_blocks.1"),
    ("down_blocks.0", "up_blocks.2"),
)
# Dropout is refused (`train.model.networks`), so no block draws: the generators' states, two reads a block, stay alone.
_CHECKPOINT = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
MODES = ("full", "partial", "none", "auto")


def exempt_steps_of(mode: str, exempt_steps: int | None = None) -> int:
    """Number of `CHECKPOINT_STEPS` to exempt: 0 for full, 5 for none, else `exempt_steps` (partial: 3 when None).

    `auto` must have been resolved by the caller (`train.model.memory.choose`), because only it knows the free memory.
    Raises Halt(USAGE) on an unknown mode, an unresolved auto, or a count outside 0..5.
    """
    if mode in ("full", "none"):
        return STEPS_OF_MODE[mode]
    if mode not in MODES:
        raise Halt(ExitCode.USAGE, f"model.gradient_checkpointing is {mode!r}; choose one of {', '.join(MODES)}")
    if exempt_steps is None:
        if mode == "auto":
            raise Halt(ExitCode.USAGE, "model.gradient_checkpointing: auto was not resolved to a number of steps")
        return STEPS_OF_MODE["partial"]  # every 1280-channel block is kept: 8 % recomputed instead of 26 %
    if not 0 <= exempt_steps <= len(CHECKPOINT_STEPS):
        raise Halt(ExitCode.USAGE, f"checkpointing steps must be 0..{len(CHECKPOINT_STEPS)}, not {exempt_steps}")
    return exempt_steps


def set_checkpointing(unet: Any, mode: str, exempt_steps: int | None = None) -> int:
    """Set which blocks of a diffusers U-Net recompute in backward; the number of exempted steps in force (0..5).

    unet: a `UNet2DConditionModel`. Blocks a smaller topology lacks are skipped. Non-reentrant checkpoints, so it
    works with frozen inputs, under DDP, and may be called again at any time.
    """
    steps = exempt_steps_of(mode, exempt_steps)
    unet.disable_gradient_checkpointing()
    if steps == len(CHECKPOINT_STEPS):
        return steps
    unet.enable_gradient_checkpointing(_CHECKPOINT)
    exempt = tuple(name for step in CHECKPOINT_STEPS[:steps] for name in step)
    for name, module in unet.named_modules():
        inside = any(name == block or name.startswith(block + ".") for block in exempt)
        if inside and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return steps


def set_text_checkpointing(encoder: Any, on: bool) -> None:
    """Turn checkpointing of every layer of a transformers text encoder on or off (it acts in train mode only)."""
    # transformers 5.2x renamed the pair and warns about the old names; 5.17 has only the old ones.
    prefix = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(encoder, f"{prefix}_checkpointing_enable")(_CHECKPOINT.keywords)
    else:
        getattr(encoder, f"{prefix}_checkpointing_disable")()
