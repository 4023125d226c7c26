"""What combines: every pair of the settings that change how a stage computes is tested together or refused by both names.

The refusals of a stage (`stage_rules`) and `docs/combinations.md` are made from this table, and
`tests/config/test_combinations.py` runs every pair that it lets pass. A new setting is one line in `SETTINGS`; what was
not shown beside it is one line in `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config.stage import StageConfig


@dataclass(frozen=True)
class Setting:
    """One value of a key, or several that behave alike; `words` are the overrides that choose it alone."""

    key: str
    value: Callable[[StageConfig], str | None]  # as it is told; None = not chosen
    words: tuple[str, ...]


def _told(key: str, chosen: Callable[[StageConfig], object]) -> Callable[[StageConfig], str | None]:
    return lambda config: key if chosen(config) else None


def _sharding(*kinds: str) -> Callable[[StageConfig], str | None]:
    return lambda config: f"optimizer.sharding: {config.optimizer.sharding}" if config.optimizer.sharding in kinds else None


SETTINGS: Mapping[str, Setting] = {setting.key: setting for setting in (
    Setting("optimizer.sharding: fsdp2 or hsdp", _sharding("fsdp2", "hsdp"), ("optimizer.sharding=fsdp2",)),
    Setting("optimizer.sharding: zero1", _sharding("zero1"), ("optimizer.sharding=zero1",)),
    Setting("optimizer.offload: host", _told("optimizer.offload: host", lambda c: c.optimizer.offload == "host"), ("optimizer.offload=host",)),
    Setting("adapter.type", lambda c: f"adapter.type: {c.adapter.type}" if c.adapter.type != "none" else None, ("adapter.type=lora",)),
    Setting("batch.determinism: strict", _told("batch.determinism: strict", lambda c: c.batch.determinism == "strict"),
            ("batch.determinism=strict", "model.gradient_checkpointing=full", "batch.split=1")),
    Setting("model.weights: bf16", _told("model.weights: bf16", lambda c: c.model.weights == "bf16"), ("model.weights=bf16", "precision=bf16")),
    Setting("model.compile", _told("model.compile", lambda c: c.model.compile), ("model.compile=true",)),
    Setting("model.float8", _told("model.float8", lambda c: c.model.float8), ("model.float8=true", "precision=bf16")),
    Setting("model.channels_last", _told("model.channels_last", lambda c: c.model.channels_last), ("model.channels_last=true",)),
    Setting("optimizer.name: adafactor", _told("optimizer.name: adafactor", lambda c: c.optimizer.name == "adafactor"), ("optimizer.name=adafactor",)),
    Setting("optimizer.name: adamw8bit or lion8bit", lambda c: f"optimizer.name: {c.optimizer.name}" if c.optimizer.name.endswith("8bit") else None,
            ("optimizer.name=adamw8bit",)),
    Setting("optimizer.name: lion or another", lambda c: f"optimizer.name: {c.optimizer.name}" if c.optimizer.name
            not in ("adamw", "adafactor", "adamw8bit", "lion8bit") else None, ("optimizer.name=lion",)),
    Setting("ema.decay", _told("ema.decay", lambda c: c.ema.decay), ("ema.decay=0.9",)),
    Setting("ema.device: cpu", _told("ema.device: cpu", lambda c: c.ema.device == "cpu"), ("ema.decay=0.9", "ema.device=cpu")),
)}  # fmt: skip

_NOT_TRIED = "not tried together"
_SHARDS = "not tried together; use none or zero1"
_ONE_PROCESS = "masters in host memory are for one process, which shares nothing; remove one"
REFUSED: Mapping[tuple[str, str], str] = {
    ("optimizer.sharding: fsdp2 or hsdp", "batch.determinism: strict"): _SHARDS,
    ("optimizer.sharding: fsdp2 or hsdp", "model.weights: bf16"): _SHARDS,
    ("optimizer.sharding: fsdp2 or hsdp", "model.compile"): _SHARDS,
    ("optimizer.sharding: fsdp2 or hsdp", "model.float8"): _SHARDS,
    ("optimizer.sharding: fsdp2 or hsdp", "model.channels_last"): _SHARDS,  # torch: shards must be contiguous
    ("optimizer.sharding: fsdp2 or hsdp", "optimizer.name: adamw8bit or lion8bit"): _SHARDS,  # its blocks of 256 would follow the cuts
    ("optimizer.sharding: fsdp2 or hsdp", "optimizer.name: lion or another"): _SHARDS,
    ("optimizer.sharding: fsdp2 or hsdp", "ema.device: cpu"): _SHARDS,
    ("optimizer.offload: host", "optimizer.sharding: fsdp2 or hsdp"): _ONE_PROCESS,
    ("optimizer.offload: host", "optimizer.sharding: zero1"): _ONE_PROCESS,
    ("optimizer.offload: host", "adapter.type"): _NOT_TRIED,
    ("optimizer.offload: host", "model.weights: bf16"): _NOT_TRIED,
    ("optimizer.offload: host", "model.compile"): _NOT_TRIED,
    ("optimizer.offload: host", "model.float8"): _NOT_TRIED,
    ("optimizer.offload: host", "model.channels_last"): _NOT_TRIED,
    ("optimizer.offload: host", "optimizer.name: adamw8bit or lion8bit"): _NOT_TRIED,
    ("optimizer.offload: host", "optimizer.name: lion or another"): _NOT_TRIED,
    ("adapter.type", "optimizer.sharding: fsdp2 or hsdp"): _NOT_TRIED,
    ("adapter.type", "model.weights: bf16"): _NOT_TRIED,
    ("adapter.type", "model.compile"): _NOT_TRIED,
    ("adapter.type", "model.float8"): _NOT_TRIED,
    ("adapter.type", "model.channels_last"): _NOT_TRIED,
    ("batch.determinism: strict", "model.weights: bf16"): "its rounding would have to draw the same bits on any number of processes",
    ("model.channels_last", "optimizer.name: adamw8bit or lion8bit"): "bitsandbytes puts weights back into the plain layout and leaves its "
    "moments in the other: remove one",
}  # fmt: skip


OPEN = [  # pairs that are allowed and were not seen to train together: take one off when its test has passed
    *({"model.float8", other} for other in SETTINGS),
    *({"model.compile", other} for other in (
        "optimizer.name: adafactor", "optimizer.name: adamw8bit or lion8bit", "optimizer.name: lion or another", "ema.decay", "ema.device: cpu",
    )),
]  # fmt: skip


def refusal(one: str) -> Callable[[StageConfig], str | None]:
    """A rule of `stage_rules`: what the setting `one` refuses of a stage, in one sentence for each reason; None = nothing."""

    def rule(config: StageConfig) -> str | None:
        chosen = SETTINGS[one].value(config)
        if chosen is None:
            return None
        found: dict[str, list[str]] = {}
        for (first, second), why in REFUSED.items():
            if first == one and (other := SETTINGS[second].value(config)) is not None:
                found.setdefault(why, []).append(other)
        return "; ".join(f"{chosen} refuses {' and '.join(others)}: {why}" for why, others in found.items()) or None

    return rule


RULES = tuple(refusal(one) for one in dict.fromkeys(first for first, _ in REFUSED))


def why_refused(one: str, other: str) -> str | None:
    """The reason for which two settings are refused together, None where they are tested together."""
    return REFUSED.get((one, other)) or REFUSED.get((other, one))


def alternatives(one: str, other: str) -> bool:
    """Whether two settings are values of one key, so that nobody can choose both."""
    return one.split(":")[0] == other.split(":")[0]


def pairs() -> Iterator[tuple[str, str]]:
    """Every two settings that a config can hold at once."""
    return (pair for pair in combinations(SETTINGS, 2) if not alternatives(*pair))


def markdown() -> str:
    """`docs/combinations.md`."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# What combines"
    yield ""
    yield "Made by `scripts/show.py combinations > docs/combinations.md` from `train/config/combinations.py`; a test holds it."
    yield "yes = both together train, stop and resume a tiny stage (`tests/config/test_combinations.py -m long`); open = allowed, but"
    yield "nobody has yet seen that test pass (float8 wants torchao, compiled blocks minutes each); a number = refused before the start, by"
    yield "both names, for the reason below."
    yield ""
    reasons = list(dict.fromkeys(REFUSED.values()))
    names = list(SETTINGS)
    yield "| |" + "".join(f" `{name}` |" for name in names[1:])
    yield "|---|" + "---|" * (len(names) - 1)
    for row, one in enumerate(names[:-1]):
        cells = ["" if column <= row else _cell(one, other, reasons) for column, other in enumerate(names)][1:]
        yield f"| `{one}` |" + "".join(f" {cell} |" for cell in cells)
    yield ""
    yield from (f"{number}. {why}" for number, why in enumerate(reasons, 1))


def _cell(one: str, other: str, reasons: list[str]) -> str:
    if alternatives(one, other):
        return "-"
    if (why := why_refused(one, other)) is not None:
        return str(reasons.index(why) + 1)
    return "open" if {one, other} in OPEN else "yes"
