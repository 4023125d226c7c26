"""new.py from end to end: look, decide, write, price."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.config import shipped
from train.config.dataset import load_settings
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
from train.tools.new.facts import Asked, Base, Facts, Machine, Set
from train.tools.new.write import as_yaml, write_all

_RECIPE_RUN, _RECIPE_BASE = Path("runs/ft2"), "cagliostrolab/animagine-xl-3.1"  # where no base is named: the recipe's own result


@dataclass(frozen=True)
class Wish:
    """The command line."""

    pictures: Path
    base: str | None = None
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
    asked = wish.base or (str(_RECIPE_RUN) if (_RECIPE_RUN / "DONE").is_file() else _RECIPE_BASE)
    known = base.look(asked, *base.find(asked))
    if wish.vocabulary is None and known.standard and known.vocabulary is None and sys.stdin.isatty():
        wish = dataclasses.replace(wish, vocabulary=_ask())
    return facts_of(wish, known, machine.look(wish.gpu, wish.memory_gib, _out(wish), small=not known.standard))


def _ask() -> str | None:
    """The one question: whose words the base knows, which its files do not say."""
    names = ", ".join(sorted(file.stem for file in (shipped.folder() / "vocabularies").glob("*.yaml")))
    return input(f"Whose words does this base know? {names}, or Enter where it is none of these: ").strip() or None


def facts_of(wish: Wish, known: Base, around: Machine) -> Facts:
    """The facts of the pictures, beside a base and a machine that are known."""
    out = _out(wish)
    if out.resolve().is_relative_to(wish.pictures.resolve()):
        raise Halt(ExitCode.USAGE, f"--out {out} lies in the folder of the pictures, where what it draws would be one of them: name another place")
    asked = Asked(
        str(out), name_of(out), wish.pictures.resolve().stem, wish.goal, wish.trigger, wish.vocabulary,
        str(Path(wish.tagger).resolve()) if wish.tagger else None, wish.license
    )
    table = buckets(known, around.gpu)
    own, prior = (_set(place, name, known.side_px, table) if place else None for place, name in ((wish.pictures, "own"), (wish.prior, "prior")))
    assert own is not None
    return Facts(asked, known, around, own, prior)


def _out(wish: Wish) -> Path:
    return (wish.out or Path("runs") / name_of(wish.pictures.resolve())).absolute()


def _set(place: Path, name: str, side_px: int, table: Mapping[str, int]) -> Set:
    reads = [captions.read(found, f"{name}{number or ''}") for number, found in enumerate(layout.layouts(place))]
    found = [(one.source, row) for one in reads for row in one.rows if row["hard_exclusion"] is None]
    every = [dataclasses.replace(one.layout, pictures=max(one.layout.pictures, len(one.rows))) for one in reads]
    whole = dataclasses.replace(
        every[0], pictures=sum(one.pictures for one in every), folders={name: count for one in every for name, count in one.folders.items()},
        remarks=tuple(dict.fromkeys(remark for one in every for remark in one.remarks)),
    )
    return Set(whole, captions.facts(reads), pictures.look(found, side_px, table), tuple(every[1:]))


def decide(facts: Facts) -> Recipe:
    """The files' lines. Pure."""
    chosen = course(facts)
    words = load_vocabulary(vocabulary(facts)[0])
    return Recipe(chosen, {
        "dataset.yaml": list(dataset_lines(facts, chosen)), "train.yaml": list(stage_lines(facts, chosen)),
        "prompts.yaml": list(prompt_lines(facts, chosen.goal, words)),
    })  # fmt: skip


def texts_of(facts: Facts, recipe: Recipe, command: str) -> dict[str, str]:
    """The folder's files. `command`: how the tools are called, `anix ` or `python scripts/`."""
    texts = {name: as_yaml(told.head_of(name), lines) for name, lines in recipe.files.items()}
    return texts | {"README.md": told.readme(facts, recipe.course, command)}


def make(wish: Wish, command: str) -> list[str]:
    """Look, decide and write; the lines to print."""
    facts = look(wish)
    recipe = decide(facts)
    out = Path(facts.asked.out)
    lines = write_all(out, texts_of(facts, recipe, command))
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
