"""The optimizer of an sd-scripts training TOML: its arguments, the rates of both encoders, one rate for each block of the U-Net."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.stage_rules import ARGS
from train.tools.convert import keys
from train.tools.convert.kinds import number

_LEVELS = 3  # of SDXL's U-Net, down and up
_UP_LAYERS = 3  # resnets of an up block; a down block has two and a downsampler


def arguments(theirs: Mapping[str, Any], key: str) -> dict[str, Any]:
    """["weight_decay=0.1", "betas=0.9,0.99"] as values. Raises Halt(USAGE) naming the key."""
    found = {}
    items = theirs.get(key) or []
    if not isinstance(items, list):
        raise Halt(ExitCode.USAGE, f'{key} is {items!r}, must be a list of texts such as ["weight_decay=0.1"]')
    for item in items:
        name, _, text = str(item).partition("=")
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            value = text.strip()
        found[name.strip()] = list(value) if isinstance(value, tuple) else value
    return found


def optimizer(theirs: Mapping[str, Any], config: dict[str, Any], notes: dict[str, str]) -> None:
    """Fill in `optimizer.*` and name what has no counterpart. Raises Halt(USAGE) naming the key."""
    kind = str(theirs.get("optimizer_type") or "AdamW")
    for key, meant in (("use_lion_optimizer", "Lion"), ("use_8bit_adam", "AdamW8bit")):  # older words for the same
        kind = meant if theirs.get(key) else kind
    word = kind.lower().rsplit(".", 1)[-1]  # a class with its module: "pytorch_optimizer.CAME"
    name = keys.OPTIMIZERS.get(word)
    if name is None:
        notes["optimizer_type"] = f"{kind} has no counterpart: choose optimizer.name"
    else:
        config["optimizer.name"] = name
        if word.startswith("paged"):
            config["optimizer.paged"] = True
    given = {**keys.DEFAULT_ARGUMENTS.get(word, {}), **arguments(theirs, "optimizer_args")}
    args = dict(_argument(name or "", keys.RENAMED.get(key, key), value, config, notes) for key, value in given.items())
    args.pop("", None)
    if args:
        config["optimizer.args"] = args
    _encoder_rates(theirs, config, notes)
    if theirs.get("block_lr"):
        config["optimizer.groups"] = block_groups(theirs["block_lr"], theirs.get("learning_rate", keys.DEFAULT_LR))


def _argument(kind: str, name: str, value: Any, config: dict[str, Any], notes: dict[str, str]) -> tuple[str, Any]:
    """(name, value) of what belongs into optimizer.args; ("", None) where it went elsewhere or was named."""
    if name in ("relative_step", "warmup_init") and value is True:
        notes[f"optimizer_args {name}"] = (
            "True (the original's default) discards the learning rate: no counterpart, optimizer.unet_lr is used"
        )
    elif name in ARGS.get(kind, ()):
        return name, value
    elif name == "betas" and "beta3" in ARGS.get(kind, ()) and isinstance(value, list) and len(value) == 3:
        config["optimizer.betas"] = value[:2]
        return "beta3", value[2]
    elif name in keys.ARGUMENTS:
        config[f"optimizer.{name}"] = value
    else:
        notes[f"optimizer_args {name}"] = "no counterpart"
    return "", None


def _encoder_rates(theirs: Mapping[str, Any], config: dict[str, Any], notes: dict[str, str]) -> None:
    rates = [theirs.get(key) for key in ("learning_rate_te1", "learning_rate_te2")]
    if not theirs.get("train_text_encoder"):
        if any(rates):
            notes["learning_rate_te1"] = "ignored by the original: the text encoders are not trained"
        return
    one, two = (theirs.get("learning_rate", keys.DEFAULT_LR) if rate is None else rate for rate in rates)
    config["optimizer.text_encoder_lr"] = one
    if one != two:
        config["optimizer.text_encoder_2_lr"] = two


def block_groups(rates: Any, plain: Any) -> list[dict[str, Any]]:
    """`optimizer.groups` for the 23 rates of `block_lr`; blocks with the U-Net's own rate need none.

    Raises Halt(USAGE) where it is not 23 numbers.
    """
    items = rates.split(",") if isinstance(rates, str) else rates
    found = [number(item) for item in items] if isinstance(items, list) else []
    patterns = _blocks()
    if len(found) != len(patterns) or any(rate is None or rate < 0 for rate in found):
        raise Halt(ExitCode.USAGE, f"block_lr is {rates!r}, must be {len(patterns)} numbers of at least 0")
    return [{"match": pattern, "lr": rate} for rate, block in zip(found, patterns, strict=True) if rate != number(plain) for pattern in block]


def _blocks() -> list[tuple[str, ...]]:
    """Patterns over canonical names for each of the original's blocks: embeddings, 9 down, 3 middle, 9 up, the end."""
    down = [("unet.conv_in.*",)]
    for level in range(_LEVELS):
        down += [(f"unet.down_blocks.{level}.resnets.{i}.*", *((f"unet.down_blocks.{level}.attentions.{i}.*",) if level else ())) for i in (0, 1)]
        down += [(f"unet.down_blocks.{level}.downsamplers.*",)] if level < _LEVELS - 1 else []
    middle = [("unet.mid_block.resnets.0.*",), ("unet.mid_block.attentions.*",), ("unet.mid_block.resnets.1.*",)]
    up = []
    for level in range(_LEVELS):
        with_attention = level < _LEVELS - 1
        for i in range(_UP_LAYERS):
            block = [f"unet.up_blocks.{level}.resnets.{i}.*", *([f"unet.up_blocks.{level}.attentions.{i}.*"] if with_attention else [])]
            up.append((*block, *([f"unet.up_blocks.{level}.upsamplers.*"] if with_attention and i == _UP_LAYERS - 1 else [])))
    return [("unet.time_embedding.*", "unet.add_embedding.*"), *down, *middle, *up, ("unet.conv_norm_out.*", "unet.conv_out.*")]
