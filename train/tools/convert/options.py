"""Every option of sd-scripts' SDXL trainers and of its dataset TOML as a table: our key, or why there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable

from train.tools.convert import keys

NO_KEY = "-"
# Of a dataset TOML, beside what stands in the other tables.
_PICTURES = {
    "image_dir": ("sources.path", ""), "metadata_file": ("sources.path", "adapter: sd_scripts"),
    "num_repeats": ("sources.repeats", ""), "batch_size": ("batch.micro", "one for the stage"),
    "class_tokens": ("sources.class_tokens", ""), "name": ("sources.name", ""),
    "alpha_mask": ("sources.mask: alpha", "with loss.mask"),
    "conditioning_data_dir": ("sources.mask", "the masks of loss.mask; nothing of a ControlNet"),
    "is_reg": ("sources.weight", "a source of its own, with the weight that prior_loss_weight had"),
}  # fmt: skip


def row(option: str) -> tuple[str, str]:
    """(our key or "-", what to know) of one option. Raises KeyError for a name that is not known."""
    if option in keys.DIRECT:
        return keys.DIRECT[option], ""
    if option in keys.CHOICES:
        ours, choices = keys.CHOICES[option]
        return ours, ", ".join(f"{theirs} = {value}" for theirs, value in choices.items())
    for table in (keys.SPECIAL, keys.ADAPTER, _PICTURES):
        if option in table:
            return table[option]
    if option in keys.DATASET:
        key, _, told = keys.DATASET[option].partition(" ")
        return key, told.strip("()")
    reason = keys.NO_COUNTERPART.get(option) or keys.NOT_CARRIED[option]
    seen = re.match(r"see ([a-z_]+\.[a-z0-9_]+(?:: [a-z0-9]+)?)[;, ]*(.*)", reason)  # not carried over, but there is a key
    return (seen[1], seen[2]) if seen else (NO_KEY, reason)


def known() -> set[str]:
    """Every option that a row can be made of."""
    tables: tuple[Iterable[str], ...] = (keys.DIRECT, keys.CHOICES, keys.SPECIAL, keys.ADAPTER, _PICTURES, keys.DATASET,
                                         keys.NO_COUNTERPART, keys.NOT_CARRIED)  # fmt: skip
    return {option for table in tables for option in table}


def markdown() -> str:
    """The table of docs/from_sd_scripts.md."""
    lines = ["| option | here | what to know |", "|---|---|---|"]
    for option in sorted(known()):
        ours, told = row(option)
        lines.append(f"| `{option}` | {ours if ours == NO_KEY else f'`{ours}`'} | {told} |")
    return "\n".join(lines) + "\n"
