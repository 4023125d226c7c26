"""From what was seen to a recipe: every line of the three files with its reason. A pure function of the facts; no torch.

What has a source names it: `card` is a base's model card; `lora.yaml` and `ft1.yaml` are the shipped configs; the rest is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from train.base.errors import ExitCode, Halt
from train.model import memory
from train.recipe.rng import uid_of
from train.tools.new.facts import Base, Captions, Facts, Machine

EPOCHS = 10  # of every stage of Animagine 3.0 and 3.1 (cards); of an adapter: ten files to choose from
FULL_FROM = 2000  # pictures: the smallest set of a published finetune (3.1: 2,000 to 15,000 likely; 3.0: 2,500)
_VISITS, _MOST_VISITS = 1600, 100  # of all pictures together, and of each: lora.yaml's 40 pictures at up to 40 epochs
# GiB that an adapter's update takes at 1024x1024, rank 16, by how it runs; docs/adapters.md, held by a test.
ADAPTER_GIB = {"16bit": 9.9, "nf4": 6.8}
_ROOMY_GIB = 14.0  # an adapter on four pictures at once, 12.5 GiB, fits with that
_LEAST_HELD = 20  # pictures below which each one is needed for training


@dataclass(frozen=True)
class Line:
    """One line of a file: key with its sections, value, and why."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Course:
    """What the stage is, before its keys: how it trains, how much, how long."""

    goal: str
    goal_why: str
    adapter: bool
    why: str  # of training an adapter, or the whole U-Net
    nf4: bool
    weights: str  # fp32 | bf16
    images: int  # that train, once each
    held: int
    share: float
    visits: int  # an epoch, repeats included
    repeats: int  # that new.py adds
    epochs: int
    micro: int
    effective: int

    @property
    def updates(self) -> int:
        """About so many: short tiles make some more."""
        return max(1, self.visits * self.epochs // self.effective)


def course(facts: Facts) -> Course:
    """The stage as a whole. Raises Halt(MISMATCH) where no way fits the card."""
    count = pictures_of(facts)
    goal, goal_why = _goal(facts, count)
    adapter, why, nf4, weights = _way(facts, goal, count)
    share, held = held_out(facts.own.captions.keys, count)
    images = count - held
    own = kohya_visits(facts)
    seen = images if own is None else max(1, round(own * images / max(count, 1)))
    repeats = 1
    if (adapter or not facts.base.standard) and own is None:
        repeats = max(1, round(min(_MOST_VISITS, max(EPOCHS, _VISITS / images)) / EPOCHS))
    epochs = EPOCHS if own is None else max(2, min(2 * EPOCHS, round(_VISITS / seen)))
    micro, effective = _batch(goal, images, adapter=adapter, standard=facts.base.standard)
    return Course(goal, goal_why, adapter, why, nf4, weights, images, held, share, seen * repeats, repeats, epochs, micro, effective)


def pictures_of(facts: Facts) -> int:
    """Pictures that a set of these facts will hold, about."""
    layout, captions = facts.own.layout, facts.own.captions
    good = len(captions.keys) if captions.whole and captions.keys else max(layout.pictures, captions.looked) - captions.excluded
    return max(1, good - facts.own.pictures.doubles)


def kohya_visits(facts: Facts) -> int | None:
    """Visits an epoch that kohya's folders ask for."""
    layout = facts.own.layout
    if layout.keys.get("repeats") != "kohya":
        return None
    inside = sum(layout.folders.values())
    return sum(int(name.partition("_")[0]) * count for name, count in layout.folders.items()) + max(0, layout.pictures - inside)


def _goal(facts: Facts, count: int) -> tuple[str, str]:
    captions = facts.own.captions
    if facts.asked.goal is not None:
        return facts.asked.goal, "as asked (--goal)"
    if count >= FULL_FROM:
        return "continue", f"{count:,} pictures: as many as a published finetune has"
    if captions.characters and captions.characters[0][1] >= 0.9:
        return "character", f"{captions.characters[0][0]} is on {captions.characters[0][1]:.0%} of the pictures"
    if captions.artists and captions.artists[0][1] >= 0.9:
        return "style", f"{captions.artists[0][0]} drew {captions.artists[0][1]:.0%} of the pictures"
    if captions.trigger is not None:
        return "character", f"all captions share the name {captions.trigger!r}"
    if len(facts.own.layout.folders) > 1:
        return "concept", f"{len(facts.own.layout.folders)} folders, each of something else"
    return "style", "the captions share no name, so what is common to the pictures is how they look"


def _way(facts: Facts, goal: str, count: int) -> tuple[bool, str, bool, str]:
    """(an adapter?, why, its base in 4 bit?, how the weights lie)."""
    machine, usable = facts.machine, facts.machine.free_gib * memory.USABLE_SHARE
    if not facts.base.standard:
        return False, "the base is far smaller than SDXL: trained whole in minutes", False, "fp32"
    needs = {weights: _full_gib(machine, weights) for weights in ("fp32", "bf16")}
    fitting = [weights for weights, need in needs.items() if need <= usable and (weights == "fp32" or machine.bf16)]
    if goal == "continue" and fitting:
        why = f"{count:,} pictures: the whole U-Net trains, {needs[fitting[0]]:.1f} GiB of {machine.free_gib:g} with one picture at once"
        return False, why + ("" if fitting[0] == "fp32" else ", in 16-bit weights"), False, fitting[0]
    name = f"{machine.gpu or 'this machine'}, {machine.free_gib:g} GiB free"
    lead = f"{count:,} pictures teach something new without moving the rest" if goal != "continue" else (
        f"the whole U-Net wants {needs['bf16']:.1f} GiB: too much for {name}")  # fmt: skip
    if usable >= ADAPTER_GIB["16bit"]:
        return True, f"{lead}; it wants {ADAPTER_GIB['16bit']} GiB, {name}", False, "fp32"
    if usable >= ADAPTER_GIB["nf4"]:
        return True, f"{lead}; {name}: the base in 4 bit wants {ADAPTER_GIB['nf4']} GiB, in 16 bit {ADAPTER_GIB['16bit']}", True, "fp32"
    raise Halt(
        ExitCode.MISMATCH,
        f"{name}: the smallest way to train SDXL, an adapter on a base in 4 bit, wants {ADAPTER_GIB['nf4']} GiB and may take "
        f"{memory.USABLE_SHARE:.0%} of what is free: name another card with --gpu or --memory-gib",
    )


def _full_gib(machine: Machine, weights: str) -> float:
    """GiB of the whole U-Net's update with one picture at once, everything recomputed."""
    setup = memory.Setup(trains_text=False, optimizer="adafactor", precision="bf16" if machine.bf16 else "fp16", weights=weights)
    return memory.predict(setup, (1024, 1024), 1, 0).total / memory.GIB


def held_out(keys: Iterable[str], count: int) -> tuple[float, int]:
    """(share, pictures) held out of training: about one in twenty, at least two, at most 256; by the hash of the key alone."""
    if count < _LEAST_HELD:
        return 0.0, 0
    wanted = min(256, max(2, count // 20))
    hashes = sorted(uid_of(key) / 2**64 for key in keys)
    if len(hashes) <= wanted:  # not all keys are known
        share = wanted / count
        return float(f"{share:.1g}"), round(count * float(f"{share:.1g}"))
    share = math.ceil(hashes[wanted - 1] * 1000 + 1e-9) / 1000
    return share, sum(one < share for one in hashes)


def _batch(goal: str, images: int, *, adapter: bool, standard: bool) -> tuple[int, int]:
    """(pictures of a tile, pictures of an update)."""
    if goal == "continue" and not adapter and standard:
        for least, micro, effective in ((20_000, 12, 96), (FULL_FROM, 12, 48), (200, 4, 16)):
            if images >= least:
                return micro, effective
    micro = 1 if images < 8 else 2 if images < 20 else 4
    return micro, micro


def objective(base: Base) -> tuple[str, bool]:
    """(prediction, zero terminal SNR) that the stage goes on with."""
    prediction = base.prediction or "epsilon"
    return prediction, bool(base.zero_terminal_snr) and prediction == "v"


def vocabulary(facts: Facts) -> tuple[str, str]:
    """(name, why) of the base's words."""
    if facts.asked.vocabulary is not None:
        return facts.asked.vocabulary, "as asked (--vocabulary)"
    if facts.base.vocabulary is not None:
        return facts.base.vocabulary, f"the base's own words: {facts.base.vocabulary_mark} says so"
    return "animagine31", "its files do not say which words the base knows: this project's are taken; --vocabulary NAME says another"


def wants_words(captions: Captions) -> bool:
    """Whether anything of the set becomes one of the vocabulary's words."""
    return bool(captions.rated or captions.scored or captions.dated)


def lines_of(*parts: Iterable[Line | None]) -> Iterator[Line]:
    """The lines of several parts, without those that say nothing."""
    for part in parts:
        yield from (line for line in part if line is not None)
