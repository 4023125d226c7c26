"""dataset.yaml: how the pictures become a training set. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from train.config.dataset import FailIfConfig
from train.config.source_rules import READS
from train.tools.new.decide import Course, Line, pictures, subject, vocabulary, wants_words
from train.tools.new.facts import Base, Facts, Set

SIZES = {"area_px": 1024 * 1024, "min_px": 512, "max_px": 2048, "step_px": 64}  # the recipe's 33
_SMALLER_PX = 768 * 768  # the second set of sizes, for pictures that cannot fill the first
_MANY = 0.1  # of the pictures
_PROCESSOR_PX = 64  # side of the square that a processor trains in minutes


def buckets(base: Base, gpu: str | None) -> dict[str, int]:
    """The table of training sizes of a base: the recipe's, or one around the square that a smaller base was made for.

    A processor takes four times as long for twice the side, so without a card that square is small.
    """
    if base.side_px >= 512:
        return SIZES | {"area_px": base.side_px**2}
    step = 32
    side = max(step, (base.side_px if gpu else min(base.side_px, _PROCESSOR_PX)) // step * step)
    return {"area_px": side * (side + step), "min_px": side, "max_px": 2 * side, "step_px": step}


def dataset_lines(facts: Facts, course: Course) -> Iterator[Line]:
    """Every line, in the order of the file."""
    asked, base, own = facts.asked, facts.base, facts.own
    yield Line("name", "set", f"the prepared set is {asked.out}/set")
    yield Line("root", asked.out)
    yield Line("seed", 31, "of frozen latents; any number")
    if base.tokenizers is not None:
        yield Line("tokenizers", base.tokenizers, "the base's, to count the tokens of the captions")
    if own.captions.separator not in (None, "|||"):
        yield Line("separator", own.captions.separator, "stands in the captions, behind the fixed tags")
    yield from _buckets(facts)
    yield from _source("sources.0", "own", own, course)
    if (word := bare_word(facts)) is not None:
        yield Line("sources.0.class_tokens", word, "no caption says what is shown: this is all of them; --trigger says another, --tagger DIR writes tags"
                   if word != "kohya" else "no captions: the folders' names behind their numbers")  # fmt: skip
    for number, layout in enumerate(own.others, 1):
        yield Line(f"sources.{number}.name", f"own{number}")
        yield from (Line(f"sources.{number}.{key}", value, layout.seen.get(key, "")) for key, value in layout.keys.items())
    if facts.prior is not None:
        yield from _prior(facts, course, f"sources.{len(own.others) + 1}")
    yield from _policy(facts)
    yield from _tagger(facts)
    yield Line("select.pretrain.min_bucket", course.micro, "smaller training sizes join the nearest shape: a tile of the stage")
    yield Line("latents.vae", base.path, "the base's own")
    if own.pictures.animated:
        yield Line("probe.animated", "first", f"{own.pictures.animated} moving pictures: their first frame is taken")
    yield from _report(facts)
    yield Line("workers", max(1, min(4, facts.machine.cores)), f"{facts.machine.cores} cores here")


def _buckets(facts: Facts) -> Iterator[Line]:
    seen, table = facts.own.pictures, buckets(facts.base, facts.machine.gpu)
    if table == SIZES:
        middle = f"half of the pictures are above {seen.median_px[0]}x{seen.median_px[1]}"
        if seen.half >= _MANY:
            yield Line("buckets.area_px", [table["area_px"], _SMALLER_PX], f"{seen.half:.0%} of the pictures would be enlarged much for the first: "
                       f"they train at about 768x768; {middle}")  # fmt: skip
        else:
            yield Line("buckets.area_px", table["area_px"], f"the base's 1024x1024; {middle}")
        return
    yield Line("buckets.area_px", table["area_px"], f"the base was made for {facts.base.side_px}x{facts.base.side_px}"
               + (f"; the processor trains {table['min_px']}x{table['min_px']} and like sizes in minutes" if table["min_px"] < facts.base.side_px else ""))
    for key in ("min_px", "max_px", "step_px"):
        if table[key] != SIZES[key]:
            yield Line(f"buckets.{key}", table[key])


def _source(place: str, name: str, found: Set, course: Course) -> Iterator[Line]:
    layout, captions = found.layout, found.captions
    yield Line(f"{place}.name", name, "first half of every picture's key")
    for key, value in layout.keys.items():
        yield Line(f"{place}.{key}", value, layout.seen.get(key, ""))
    if captions.both or captions.told:
        told = "all captions are" if captions.told == captions.captioned else f"{captions.told:,} of {captions.captioned:,} captions hold"
        yield Line(f"{place}.prose", "auto", f"{told} sentences, which are kept whole")
    if (keep := kept_in_front(found)) is not None and "keep_tokens" not in layout.keys:
        yield Line(f"{place}.keep_tokens", keep, f"{captions.trigger!r} stands there in every caption: it is not shuffled")
    if course.repeats > 1 and place == "sources.0":
        yield Line(f"{place}.repeats", course.repeats, f"visits of each picture an epoch: {course.images:,} x {course.repeats} x {course.epochs} epochs, "
                   f"about {course.visits * course.epochs:,} in all")  # fmt: skip


def kept_in_front(found: Set) -> int | None:
    """Tags that stand fixed at the front because the trigger is always one of the first two, and the adapter reads captions."""
    captions = found.captions
    if "keep_tokens" not in READS[found.layout.keys["adapter"]] or captions.trigger is None or captions.trigger_place is None or captions.separator is not None or captions.trigger_place > 1:
        return None
    return captions.trigger_place + 1


def bare_word(facts: Facts) -> str | None:
    """The caption of pictures that come without any: what the folder is called; None where there are captions or a tagger."""
    captions = facts.own.captions
    if captions.captioned or not captions.looked or facts.asked.tagger is not None:
        return None
    if facts.own.layout.folders:
        return "kohya"
    return facts.asked.trigger or facts.asked.folder.replace("_", " ").replace("-", " ")


def _prior(facts: Facts, course: Course, place: str) -> Iterator[Line]:
    assert facts.prior is not None
    layout, captions, own = facts.prior.layout, facts.prior.captions, course.visits - facts.prior.layout.pictures
    yield from _source(place, "prior", facts.prior, course)
    if captions.captioned < captions.looked:
        if "on_missing_caption" not in layout.keys:
            yield Line(f"{place}.on_missing_caption", "take")
        name = "kohya" if layout.folders else subject(facts.own.captions) or PurePath(layout.keys["path"]).stem.replace("_", " ")
        yield Line(f"{place}.class_tokens", name, f"{pictures(captions.looked - captions.captioned)} of the class without a caption: this is theirs")
    weight = min(1.0, max(0.1, round(own / max(1, layout.pictures), 2)))
    yield Line(f"{place}.weight", weight, f"pictures of the class, so that the rest of it stays as it is: {layout.pictures:,} of them beside {own:,} visits "
               "of your own; 1 = each counts as much as one of yours")  # fmt: skip


def _policy(facts: Facts) -> Iterator[Line]:
    name, why = vocabulary(facts)
    captions = facts.own.captions
    yield Line("policy.vocabulary", name, why)
    if wants_words(captions):
        told = [f"{count:,} have a {what}" for count, what in ((captions.rated, "rating"), (captions.scored, "score"), (captions.dated, "date")) if count]
        yield Line("policy.preset", "default", f"of {captions.looked:,} records {', '.join(told)}: they become the vocabulary's words")
    else:
        yield Line("policy.quality.source", "none", "no scores: no quality words are made up")


def _tagger(facts: Facts) -> Iterator[Line]:
    if facts.asked.tagger is None:
        return
    missing = facts.own.captions.looked - facts.own.captions.captioned
    yield Line("tag.source", "wd", f"{pictures(missing)} without a caption")
    yield Line("tag.model", facts.asked.tagger, "as asked (--tagger)")


def _report(facts: Facts) -> Iterator[Line]:
    captions = facts.own.captions
    bare = 1 - captions.captioned / max(captions.looked, 1)
    if bare > FailIfConfig().empty_captions and bare_word(facts) is None and facts.asked.tagger is None:
        yield Line("report.fail_if.empty_captions", 1.0, f"{bare:.0%} of the pictures have no caption of their own")
    rated = captions.rated / max(captions.looked, 1)
    if 0 < rated < 1 - FailIfConfig().missing_rating:
        yield Line("report.fail_if.missing_rating", 1.0, f"{1 - rated:.0%} of the records have no rating")
    if captions.looked and not captions.rated:
        yield Line("report.pictures", "all", "nothing is rated: your own pictures are shown on the page, which stays here")
