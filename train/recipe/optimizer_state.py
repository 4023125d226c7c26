"""What an optimizer keeps of a parameter, by shape: the one formula of memory, checkpoints and what a resume accepts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

Shape = tuple[int, ...]

# bitsandbytes' own defaults, pinned in `optim.optimizers` because the saved state's shapes depend on them: parameters
# below the limit keep fp32 moments, the others one scale per block.
MIN_8BIT_VALUES, BLOCK_8BIT = 4096, 256
# Per value of a large parameter; adafactor's go by rows and columns, and so do came's second moments beside this.
MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "lion": 4, "lion8bit": 1, "prodigy": 16, "came": 4, "schedulefree": 8}
GROUP_SHAPES: dict[str, dict[str, Shape]] = {"prodigy": {"d": (), "d_max": (), "step": (), "d_numerator": (1,)}}  # numbers for all that trains
GROUP_NUMBERS = {"schedulefree": ("step", "weight_sum", "lr_max")}  # numbers of each group


def state_shapes(name: str, shape: Shape) -> dict[str, Shape]:
    """State key -> shape that optimizer `name` keeps for a parameter after a step; host numbers have shape ()."""
    if name == "adamw":
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if name == "adafactor":
        if len(shape) < 2:
            return {"step": (), "RMS": (), "exp_avg_sq": shape}
        return {"step": (), "RMS": (), "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
    if name == "lion":
        return {"exp_avg": shape}
    if name == "schedulefree":
        return {"z": shape, "exp_avg_sq": shape}
    if name == "prodigy":
        return {"s": shape, "p0": shape, "exp_avg": shape, "exp_avg_sq": shape}
    if name == "came":
        if len(shape) < 2:
            return {"RMS": (), "exp_avg": shape, "exp_avg_sq": shape}
        rows, columns = shape[:-1], shape[:-2] + shape[-1:]
        factors = {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns, "exp_avg_res_row": rows, "exp_avg_res_col": columns}
        return {"RMS": (), "exp_avg": shape, **factors}
    numbers = ("1",) if name == "lion8bit" else ("1", "2")
    moments: dict[str, Shape] = {"step": ()} | {f"state{number}": shape for number in numbers}
    if math.prod(shape) < MIN_8BIT_VALUES:
        return moments
    blocks = (-(-math.prod(shape) // BLOCK_8BIT),)
    return moments | {f"qmap{number}": (256,) for number in numbers} | {f"absmax{number}": blocks for number in numbers}


def state_bytes(name: str, shapes: Iterable[Shape]) -> int:
    """Bytes of state that optimizer `name` keeps for parameters of these shapes after a step, at most."""
    total = 0
    for shape in shapes:
        in_8_bit = name.endswith("8bit") and math.prod(shape) >= MIN_8BIT_VALUES
        for key, kept in state_shapes(name, shape).items():
            size = 8 if not kept else 1 if in_8_bit and key.startswith("state") else 4
            total += size * math.prod(kept)
    return total


def checkpoint_bytes(name: str, shapes: Collection[Shape], *, weights: str, average: bool) -> int:
    """Bytes of tensors in a checkpoint of parameters of these shapes: `weights` fp32 or bf16, state, fp32 average.

    Schedule-free there is an average too, with the weights that train beside it.
    """
    values = sum(map(math.prod, shapes))
    return values * (2 if weights == "bf16" else 4) + state_bytes(name, shapes) + (4 * values if average or name in GROUP_NUMBERS else 0)
