"""prompts.yaml: what is drawn before, while and after training, so that the pictures compare. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.config.prompts import NEGATIVE, QUALITY_PREFIX
from train.config.vocabulary import Vocabulary
from train.recipe.captions import join, tags_of
from train.tools.new.decide import Line, objective, vocabulary
from train.tools.new.decide_data import buckets
from train.tools.new.decide_stage import bare_trigger
from train.tools.new.facts import Facts
from train.tools.new.words import is_generic

_FROM_CAPTIONS = 4  # prompts that are captions of the set
_MOST_TAGS = 24


@dataclass(frozen=True)
class _Way:
    sampler: str
    steps: int
    guidance: float
    why: str


# Cards; where a card gives a range, its middle.
_WAYS = {
    "animagine31": _Way("euler_a", 28, 7.0, "card of Animagine XL 3.1"), "animagine30": _Way("euler_a", 28, 7.0, "as 3.1; its card: 28 steps"),
    "animagine40": _Way("euler_a", 28, 5.0, "card: Euler a, 25 to 28 steps, 4 to 7"), "noobai": _Way("euler", 28, 4.5, "card: Euler, 28 to 35 steps, 4 to 5"),
    "pony": _Way("euler_a", 25, 7.0, "card: Euler a, 25 steps"),
}  # fmt: skip
_OTHER = _Way("euler_a", 28, 6.0, "a usual choice: the base's own is not known here")


def prompt_lines(facts: Facts, words: Vocabulary) -> Iterator[Line]:
    """Every line, in the order of the file."""
    name, _ = vocabulary(facts)
    way = _WAYS.get(name, _OTHER)
    yield Line("sampler", way.sampler, way.why)
    yield Line("steps", way.steps)
    yield Line("guidance", way.guidance)
    prediction, zero = objective(facts.base)
    if prediction == "v" and zero:
        yield Line("guidance_rescale", 0.7, "its paper's value for zero terminal SNR (arXiv 2305.08891)")
    prefix, negative, why = _quality(name, words)
    yield Line("quality_prefix", prefix, f"{why}; put before every prompt")
    yield Line("negative", negative, why)
    sizes = facts.own.pictures.sizes[:3] or [(buckets(facts.base)["min_px"],) * 2]
    for number, (text, told) in enumerate(_texts(facts)):
        width, height = sizes[number % len(sizes)]
        yield Line(f"prompts.{number}", {"text": text, "width": width, "height": height, "seed": 1000 + number}, told)


def _quality(name: str, words: Vocabulary) -> tuple[str, str, str]:
    if name == "animagine31":
        return QUALITY_PREFIX, NEGATIVE, "card of Animagine XL 3.1"
    known = [word for word in words.quality.words if word]
    tail = "quality" in words.order.tail
    return join(known[:2]) if not tail else "", join(known[-2:]), f"words of {name}" if known else f"{name} names none"


def _texts(facts: Facts) -> Iterator[tuple[str, str]]:
    """(text, what it is): captions of the set, the trigger in another scene, and one without it."""
    captions = facts.own.captions
    trigger = facts.asked.trigger or (captions.trigger if captions.trigger_place is not None else bare_trigger(facts))
    texts = list(captions.examples)
    chosen = [texts[number * len(texts) // min(_FROM_CAPTIONS, len(texts))] for number in range(min(_FROM_CAPTIONS, len(texts)))]
    for number, text in enumerate(dict.fromkeys(_short(text, trigger) for text in chosen)):
        yield text, "caption of one of the pictures" if number == 0 else ""
    subject = _subject(texts)
    if trigger is not None:
        yield join([*subject, trigger]), "the name alone: what it has come to mean"
        yield join([*subject, trigger, "outdoors", "snow"]), "the name where the pictures do not show it"
    yield join([*(subject or ["1girl"]), "solo", "smile", "standing"]), "without the name: what should stay as it was"


def _short(text: str, trigger: str | None) -> str:
    tags = tags_of(text)
    if len(tags) < 3:
        return text
    return join([*([trigger] if trigger and trigger not in tags else []), *tags[:_MOST_TAGS]])


def _subject(texts: Sequence[str]) -> list[str]:
    """The usual count word of the captions."""
    first = [tag for text in texts for tag in tags_of(text)[:3] if is_generic(tag) and tag[:1].isdigit()]
    return [max(set(first), key=lambda tag: (first.count(tag), tag))] if first else []
