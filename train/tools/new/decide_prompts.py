"""prompts.yaml: what is drawn before, while and after training, so that the pictures compare. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.config.prompts import NEGATIVE, QUALITY_PREFIX
from train.config.vocabulary import Vocabulary
from train.prepare.posts.caption_text import KOHYA_FOLDER
from train.recipe.captions import join, tags_of
from train.tools.new.decide import Line, described, objective, subject, vocabulary
from train.tools.new.decide_data import bare_word, buckets
from train.tools.new.facts import Facts

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


def prompt_lines(facts: Facts, goal: str, words: Vocabulary) -> Iterator[Line]:
    """Every line, in the order of the file."""
    name, _ = vocabulary(facts)
    way = _WAYS.get(name, _OTHER)
    yield Line("sampler", way.sampler, way.why)
    yield Line("steps", way.steps)
    yield Line("guidance", way.guidance)
    prediction, zero = objective(facts.base)
    if prediction == "v" and zero:
        yield Line("guidance_rescale", 0.7, "its paper's value for zero terminal SNR (arXiv 2305.08891)")
    known = facts.asked.vocabulary is not None or facts.base.vocabulary is not None or not facts.base.standard
    prefix, negative, why = _quality(name, words) if known else ("", "", "the base's own words are not known")
    yield Line("quality_prefix", prefix, f"{why}; put before every prompt")
    yield Line("negative", negative, why)
    sizes = facts.own.pictures.sizes[:3] or [(buckets(facts.base, facts.machine.gpu)["min_px"],) * 2]
    for number, (text, told) in enumerate(_texts(facts, goal)):
        width, height = sizes[number % len(sizes)]
        yield Line(f"prompts.{number}", {"text": text, "width": width, "height": height, "seed": 1000 + number}, told)


def _quality(name: str, words: Vocabulary) -> tuple[str, str, str]:
    if name == "animagine31":
        return QUALITY_PREFIX, NEGATIVE, "card of Animagine XL 3.1"
    known = [word for word in words.quality.words if word]
    tail = "quality" in words.order.tail
    return join(known[:2]) if not tail else "", join(known[-2:]), f"words of {name}" if known else f"{name} names none"


def _texts(facts: Facts, goal: str) -> Iterator[tuple[str, str]]:
    """(text, what it is): captions of the set, the trigger in another scene, and one without it."""
    captions = facts.own.captions
    looks = described(captions, goal)
    told = "caption of one of the pictures" + (f", without {', '.join(looks[:3])}, which the name shall bring" if looks else "")
    trigger = facts.asked.trigger or (captions.trigger if captions.trigger_place is not None else _bare(facts))
    texts = list(dict.fromkeys(captions.examples))
    chosen = [texts[number * len(texts) // min(_FROM_CAPTIONS, len(texts))] for number in range(min(_FROM_CAPTIONS, len(texts)))]
    for number, text in enumerate(dict.fromkeys(_short(text, trigger, looks) for text in chosen)):
        yield text, told if number == 0 else ""
    shown = [word] if (word := subject(captions)) is not None else []
    if trigger is not None:
        yield join([*shown, trigger]), "the name alone: what it has come to mean"
        yield join([*shown, trigger, "outdoors", "snow"]), "the name where the pictures do not show it"
    yield join([*(shown or ["1girl"]), "solo", "smile", "standing"]), "without the name: what should stay as it was"


def _short(text: str, trigger: str | None, looks: Sequence[str]) -> str:
    tags = [tag for tag in tags_of(text) if tag not in looks]
    if len(tags_of(text)) < 3:
        return text
    return join([*([trigger] if trigger and trigger not in tags else []), *tags[:_MOST_TAGS]])


def _bare(facts: Facts) -> str | None:
    """The word that stands for pictures without captions."""
    word = bare_word(facts)
    if word != "kohya":
        return word
    match = next(filter(None, map(KOHYA_FOLDER.fullmatch, facts.own.layout.folders)), None)
    return match["name"].replace("_", " ") if match else None
