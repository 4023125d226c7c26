"""What new.py prints and the README of its folder: what was seen, what was decided, and what to run. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from train.prepare.tables.quarantine import too_many
from train.tools.new.decide import Course, objective, pictures, pictures_of, vocabulary
from train.tools.new.facts import Facts, Pictures, Set

_BROKEN = 0.02  # max_quarantine_fraction's default


def seen(facts: Facts) -> Iterator[str]:
    """One line for each thing looked at."""
    yield from _of_set("pictures", facts.own)
    if facts.prior is not None:
        yield from _of_set("prior", facts.prior)
    base, machine = facts.base, facts.machine
    prediction, zero = objective(base)
    size = "SDXL's own size" if base.standard else f"smaller than SDXL, made for {base.side_px}x{base.side_px}"
    told = "" if base.prediction else " (not said, the usual one)"
    yield f"base      {base.path}: {size}, predicts {prediction}{' with zero terminal SNR' if zero else ''}{told}; licence {base.license or 'not stated'}"
    name, why = vocabulary(facts)
    yield f"          words of {name}: {why}"
    where = f"{machine.gpu}, {machine.free_gib:g} GiB free ({machine.how})" if machine.gpu else f"the processor ({machine.how})"
    yield f"machine   {where}; {machine.cores} cores, {machine.host_gib:g} GiB of memory and {machine.disk_gb:g} GB of disk free"


def _of_set(title: str, found: Set) -> Iterator[str]:
    layout, captions, pictures = found.layout, found.captions, found.pictures
    yield f"{title:<9} {layout.keys['path']}: {layout.seen.get('adapter', '')}"
    if pictures.looked:
        some = "" if captions.whole and pictures.looked >= layout.pictures else f", of {pictures.looked:,} headers"
        least, _, most = pictures.areas_px
        yield f"          half above {pictures.median_px[0]}x{pictures.median_px[1]}{some}; {least / 1e6:.2g} to {most / 1e6:.2g} megapixels"
    told = [f"{pictures.unreadable} cannot be taken ({', '.join(pictures.reasons)})" + _stops(pictures)] if pictures.unreadable else []
    told += [f"{pictures.doubles} equal files, of which one is kept"] if pictures.doubles else []
    told += [f"{pictures.alike} of {pictures.compared} looked at are nearly like another (prepare reports them)"] if pictures.alike else []
    told += [f"{captions.refused} records cannot be read, the first: {captions.first_refusal}"] if captions.refused else []
    told += [f"{captions.excluded} are excluded for what their tags say, always"] if captions.excluded else []
    yield from (f"          {one}" for one in (*told, *layout.remarks))
    yield from (f"          {key}: {why}" for key, why in layout.seen.items() if key != "adapter")
    if captions.captioned:
        some = "" if captions.whole else f" of {captions.looked:,} looked at"
        kinds = f"{captions.tagged:,} with tags ({captions.tags_each} each), {captions.told:,} with sentences, {captions.both:,} with both"
        yield f"          captions{some}: {kinds}, at most {captions.tokens} tokens, about"
    if captions.trigger is not None:
        yield f"          name {captions.trigger!r}: {captions.trigger_why}"


def _stops(found: Pictures) -> str:
    """What too many broken pictures lead to."""
    if not too_many(found.unreadable, found.looked, _BROKEN):
        return ""
    return ": prepare stops at so many; remove them, or raise max_quarantine_fraction in dataset.yaml"


def decided(facts: Facts, course: Course) -> Iterator[str]:
    """What the files say, in a few lines."""
    yield f"goal      {course.goal}: {course.goal_why}"
    yield f"trains    {'an adapter (LoRA)' if course.adapter else 'the whole U-Net'}: {course.why}"
    if course.adapter and not facts.machine.peft:
        yield "          it needs peft, which is not installed here: pip install -e '.[lora]'"
    visits = f"{pictures(course.images)} x {course.repeats} x {course.epochs} epochs" if course.repeats > 1 else f"{course.visits:,} visits x {course.epochs} epochs"
    yield f"course    {visits}, {course.effective} an update: about {course.updates:,} updates" + (
        f"; {course.held:,} pictures held out" if course.held else f"; nothing is held out of {pictures(pictures_of(facts))}")  # fmt: skip


def next_step(out: Path, command: str) -> Iterator[str]:
    """The last lines."""
    yield f"{out}/README.md says what to run, and where everything will be. Next:"
    yield f"  {command}recipe{_py(command)} {out}"


def head_of(name: str) -> str:
    """The comment at a file's top."""
    what = {
        "dataset.yaml": "From your pictures to a training set: configs/dataset.yaml documents every key.",
        "train.yaml": "The one stage: docs/keys.md documents every key.",
        "prompts.yaml": "What is drawn before, while and after training; every prompt keeps its seed, so that the pictures compare.",
    }[name]
    return f"{what}\nWritten by new.py from what it saw, a reason beside each line. Edit as you like: an edited file is never written over."


def readme(facts: Facts, course: Course, command: str) -> str:
    """README.md of the folder."""
    out, py = facts.asked.out, _py(command)
    left = f"{facts.asked.name}-lora.safetensors" if course.adapter else f"{facts.asked.name}.safetensors"
    lines = [
        f"# {facts.asked.name}", "",
        *decided_as_list(facts, course), "",
        "## Three commands", "```bash",
        f"{command}plan{py} --config {out}/train.yaml --images {course.visits}   # what it costs; without --images once it is prepared",
        f"{command}recipe{py} {out}   # everything: prepares, draws before, trains, draws after, writes the report; run again, it goes on",
        f"{command}sample{py} --model {out}/run --prompts {out}/prompts.yaml --out {out}/samples/mine   # more pictures: --prompt \"...\"",
        "```", "",
        "| here | what it is |", "|---|---|",
        "| `dataset.yaml`, `train.yaml`, `prompts.yaml` | the recipe, a reason beside each line; edit them, new.py leaves edited files alone |",
        "| `set/` | the prepared set, with a page about it: `set/report.html` |",
        f"| `run/{left}` | what you came for |",
        "| `samples/before/`, `samples/after/` | the same prompts and seeds, of the base and of the result |",
        "| `report.html` | pictures, losses, settings, on one page |", "",
        "## What was seen", "```text", *seen(facts), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def decided_as_list(facts: Facts, course: Course) -> list[str]:
    """`decided`, as a list of Markdown."""
    return [f"- {' '.join(line.split())}" for line in decided(facts, course)]


def _py(command: str) -> str:
    return ".py" if command.endswith("/") else ""
