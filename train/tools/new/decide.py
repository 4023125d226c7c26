"""From what was seen to a recipe: every line of the three files with its reason. A pure function of the facts; no torch.

What has a source names it: `card` is a base's model card; `lora.yaml` and `ft1.yaml` are the shipped configs; the rest is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from train.base.errors import ExitCode, Halt
from train.model import memory
from train.recipe.captions import tags_of
from train.recipe.rng import uid_of
from train.tools.new.facts import Base, Captions, Facts, Machine
from train.tools.new.words import counts_or_judges, is_generic

EPOCHS = 10  # of every stage of Animagine 3.0 and 3.1 (cards); of an adapter: ten files to choose from
FULL_FROM = 2000  # pictures: the smallest set of a published finetune (3.1: 2,000 to 15,000 likely; 3.0: 2,500)
_VISITS, _MOST_VISITS = 1600, 100  # of all pictures together, and of each: lora.yaml's 40 pictures at up to 40 epochs
_VISITS_SMALL = 3200  # of a base far smaller than SDXL: measured, 40 pictures of the drawn world
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
    offload: bool  # fp32 weights in host memory
    images: int  # that train, once each
    held: int
    share: float
    visits: int  # an epoch, repeats and those of the class included
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
    way = _way(facts, goal, count)
    adapter = way.adapter
    share, held = held_out(facts.own.captions.keys, count)
    images = count - held
    own = asked_visits(facts)
    seen = images if own is None else max(1, round(own * images / max(count, 1)))
    repeats, wanted = 1, _VISITS if facts.base.standard else _VISITS_SMALL
    if (adapter or not facts.base.standard) and own is None:
        repeats = max(1, round(min(_MOST_VISITS, max(EPOCHS, wanted / images)) / EPOCHS))
    epochs = EPOCHS if own is None else max(2, min(2 * EPOCHS, round(wanted / seen)))
    micro, effective = _batch(goal, count, adapter=adapter, standard=facts.base.standard)
    visits = seen * repeats + (facts.prior.layout.pictures if facts.prior is not None else 0)
    return Course(
        goal, goal_why, adapter, way.why, way.nf4, way.weights, way.offload, images, held, share, visits, repeats, epochs, micro, effective
    )


def pictures(count: int) -> str:
    """A number of pictures in words."""
    return f"{count:,} picture{'s' if count != 1 else ''}"


def pictures_of(facts: Facts) -> int:
    """Pictures that a set of these facts will hold, about."""
    layout, captions = facts.own.layout, facts.own.captions
    good = len(captions.keys) if captions.whole and captions.keys else max(layout.pictures, captions.looked) - captions.excluded
    return max(1, good - (facts.own.pictures.doubles if captions.whole else 0))


def asked_visits(facts: Facts) -> int | None:
    """Visits an epoch that the layout asks for: kohya's folders, or the repeats of a TOML; None where it asks for none."""
    own, others = facts.own.layout, facts.own.others
    layouts = [(own, own.pictures - sum(one.pictures for one in others)), *((one, one.pictures) for one in others)]
    if all("repeats" not in layout.keys for layout, _ in layouts):
        return None
    inside = sum(own.folders.values())
    folders = sum(int(name.partition("_")[0]) * count for name, count in own.folders.items())
    numbered = sum(count * layout.keys.get("repeats", 1) for layout, count in layouts if layout.keys.get("repeats") != "kohya")
    return max(1, folders + numbered + sum(count for layout, count in layouts if layout.keys.get("repeats") == "kohya") - inside)


def _goal(facts: Facts, count: int) -> tuple[str, str]:
    captions = facts.own.captions
    if facts.asked.goal is not None:
        return facts.asked.goal, "as asked (--goal)"
    if count >= FULL_FROM:
        return "continue", f"{pictures(count)}: as many as a published finetune has"
    if captions.characters and captions.characters[0][1] >= 0.9:
        return "character", f"{captions.characters[0][0]} is on {captions.characters[0][1]:.0%} of the pictures"
    if captions.artists and captions.artists[0][1] >= 0.9:
        return "style", f"{captions.artists[0][0]} drew {captions.artists[0][1]:.0%} of the pictures"
    if captions.trigger is not None:
        return "character", f"all captions share the name {captions.trigger!r}"
    if len(facts.own.layout.folders) > 1:
        return "concept", f"{len(facts.own.layout.folders)} folders, each of something else"
    return "style", "the captions share no name, so what is common to the pictures is how they look"


@dataclass(frozen=True)
class _Way:
    adapter: bool
    why: str
    nf4: bool = False
    weights: str = "fp32"
    offload: bool = False


def _way(facts: Facts, goal: str, count: int) -> _Way:
    machine, usable = facts.machine, facts.machine.free_gib * memory.USABLE_SHARE
    if not facts.base.standard:
        return _Way(False, "the base is far smaller than SDXL: trained whole in minutes")
    name = f"{machine.gpu or 'this machine'}, {machine.free_gib:g} GiB free"
    lead = f"{pictures(count)} teach something new without moving the rest"
    if goal == "continue":
        if (whole := _whole(machine, name, f"{pictures(count)}: the whole U-Net trains")) is not None:
            return whole
        lead = f"the whole U-Net does not fit {name}"
    if usable >= ADAPTER_GIB["16bit"]:
        return _Way(True, f"{lead}; it wants {ADAPTER_GIB['16bit']} GiB: {name}")
    if usable >= ADAPTER_GIB["nf4"]:
        return _Way(True, f"{lead}; {name}: the base in 4 bit wants {ADAPTER_GIB['nf4']} GiB, in 16 bit {ADAPTER_GIB['16bit']}", nf4=True)
    raise Halt(
        ExitCode.MISMATCH,
        f"{name}: the smallest way to train SDXL, an adapter on a base in 4 bit, wants {ADAPTER_GIB['nf4']} GiB and may take "
        f"{memory.USABLE_SHARE:.0%} of what is free: name another card with --gpu or --memory-gib",
    )


def _whole(machine: Machine, name: str, lead: str) -> _Way | None:
    """How the whole U-Net fits the card: as the recipe, with its weights on the host, in 16-bit weights; None = not at all."""
    usable = machine.free_gib * memory.USABLE_SHARE
    setup = memory.Setup(trains_text=False, optimizer="adafactor", precision="bf16" if machine.bf16 else "fp16")
    host, bits = replace(setup, offload=True), replace(setup, weights="bf16")
    need, need_host, need_bits = (memory.predict(one, (1024, 1024), 1, 0).total / memory.GIB for one in (setup, host, bits))
    wants_gib = memory.host_bytes(host) / memory.GIB
    if need <= usable:
        return _Way(False, f"{lead}; {need:.1f} GiB with one picture at once: {name}")
    if need_host <= usable and wants_gib <= machine.host_gib:
        return _Way(False, f"{lead}; {name}: its fp32 weights lie on the host, {wants_gib:.0f} of {machine.host_gib:g} GiB there; same numbers, only slower", offload=True)
    if need_bits <= usable and machine.bf16:
        short = f", and the host has {machine.host_gib:g} GiB of the {wants_gib:.0f} that fp32 weights there want" if need_host <= usable else ""
        return _Way(False, f"{lead}, in 16-bit weights, {need_bits:.1f} GiB: {name}{short}", weights="bf16")
    return None


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
    micro = 1 if images < 8 else 2 if images < 20 else 4 if standard or images < 32 else 8
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


def subject(captions: Captions) -> str | None:
    """The usual count word of the captions: what is shown, by its class."""
    first = [tag for text in captions.examples for tag in tags_of(text)[:3] if is_generic(tag) and tag[:1].isdigit()]
    return max(set(first), key=lambda tag: (first.count(tag), tag)) if first else None


def described(captions: Captions, goal: str) -> list[str]:
    """Tags that most captions hold beside a name: they would learn what it is to mean."""
    if captions.trigger is None or captions.trigger_place is None or goal not in ("character", "concept"):
        return []
    return [tag for tag, _, _ in captions.shared if tag != captions.trigger and not counts_or_judges(tag)]


def wants_words(captions: Captions) -> bool:
    """Whether anything of the set becomes one of the vocabulary's words."""
    return bool(captions.rated or captions.scored or captions.dated)

