"""new.py from end to end: look, decide, write, price."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig, load_settings
from train.config.prompts import load_prompts
from train.config.stage import load_stage
from train.config.vocabulary import load_vocabulary
from train.tools.convert.toml import name_of
from train.tools.estimate import estimate, page
from train.tools.new import base, captions, layout, machine, pictures, told
from train.tools.new.decide import Course, Line, course, vocabulary
from train.tools.new.decide_data import buckets, dataset_lines
from train.tools.new.decide_prompts import prompt_lines
from train.tools.new.decide_stage import stage_lines
from train.tools.new.facts import Asked, Base, Facts, Set
from train.tools.new.write import as_yaml, write_all


@dataclass(frozen=True)
class Wish:
    """The command line."""

    pictures: Path
    base: str
    out: Path | None = None
    gpu: str | None = None
    memory_gib: float | None = None
    goal: str | None = None
    prior: Path | None = None
    trigger: str | None = None
    vocabulary: str | None = None
    tagger: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What was decided: the lines of each file, and the stage as a whole."""

    course: Course
    files: dict[str, list[Line]]


def look(wish: Wish) -> Facts:
    """Everything that decides. Raises Halt(USAGE, MISMATCH) for what cannot be trained on or from."""
    name = name_of(wish.pictures.resolve())
    out = (wish.out or Path("runs") / name).absolute()
    asked = Asked(str(out), name_of(out) if wish.out else name, wish.goal, wish.trigger, wish.vocabulary, wish.tagger, wish.license)
    known = base.look(wish.base, *base.find(wish.base))
    return Facts(
        asked=asked, base=known, machine=machine.look(wish.gpu, wish.memory_gib, out, small=not known.standard),
        own=_set(wish.pictures, "own", known), prior=_set(wish.prior, "prior", known) if wish.prior else None,
    )  # fmt: skip


def _set(place: Path, name: str, known: Base) -> Set:
    found = layout.layouts(place)
    if len(found) > 1:
        raise Halt(ExitCode.USAGE, f"{place} names {len(found)} folders: scripts/convert.py makes a dataset.yaml of it, with all of them")
    read, made_of, rows = captions.look(found[0], name)
    count = max(read.pictures, len(rows))
    source = SourceConfig(**{"name": name, **read.keys})
    seen = pictures.look(source, [row for row in rows if row["hard_exclusion"] is None], known.side_px, buckets(known))
    return Set(dataclasses.replace(read, pictures=count), made_of, seen)


def decide(facts: Facts) -> Recipe:
    """The files' lines. Pure."""
    chosen = course(facts)
    words = load_vocabulary(vocabulary(facts)[0])
    return Recipe(chosen, {
        "dataset.yaml": list(dataset_lines(facts, chosen)), "train.yaml": list(stage_lines(facts, chosen)),
        "prompts.yaml": list(prompt_lines(facts, words)),
    })  # fmt: skip


def make(wish: Wish, command: str) -> list[str]:
    """Look, decide and write; the lines to print. `command`: how the tools are called, `anix` or `python scripts/`."""
    facts = look(wish)
    recipe = decide(facts)
    out = Path(facts.asked.out)
    texts = {name: as_yaml(told.head_of(name, facts, recipe.course), lines) for name, lines in recipe.files.items()}
    texts["README.md"] = told.readme(facts, recipe.course, command)
    lines = write_all(out, texts)
    return [*told.seen(facts), "", *told.decided(facts, recipe.course), "", *lines, "", *_price(wish, out, recipe.course), "",
            *told.next_step(out, command)]  # fmt: skip


def _price(wish: Wish, out: Path, chosen: Course) -> list[str]:
    """The planner's own words; what it refuses is told, the files stand. Raises Halt for a config that does not load."""
    load_settings([out / "dataset.yaml"])
    load_prompts(out / "prompts.yaml")
    stage = load_stage([out / "train.yaml"])
    prepared = (out / "set" / "dataset.json").is_file()
    request = estimate.Request(images=None if prepared else chosen.visits, gpu=wish.gpu, memory_gib=wish.memory_gib)
    try:
        plan = estimate.plan_stage(stage.start, request)
    except Halt as halt:
        return [f"plan: {halt.message}"]
    return [page.describe(plan), *(f"error: {problem}" for problem in page.problems(plan))]
