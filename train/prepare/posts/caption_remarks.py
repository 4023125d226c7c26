"""What is said once per source about its captions: what was joined or left out, and what they look like but are not read as."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from train.config.dataset import SourceConfig
from train.recipe.captions import SEPARATOR

_NEARLY_ALL = 0.9
_FEW = 0.01  # of the captions: a tag may look like a sentence by chance
_LIKELY = ("，", "、", "；", ";", "|", "\t")  # between tags, in files that people bring
_MARK = re.compile(r"(?<![^\s,])(([^\w\s,.!?])\2+)(?![^\s,])")  # two or more of a sign, alone between tags
_SENTENCE = frozenset(
    ["a", "an", "the", "of", "in", "on", "with", "and", "is", "are", "at", "to", "his", "her", "their", "this", "that",
     "from", "by", "for"]
)  # fmt: skip


@dataclass
class CaptionTally:
    """Counts over the captions of one source."""

    captions: int = 0  # that are not empty
    several_lines: int = 0
    separated: int = 0
    sentences: int = 0  # with sentences that commas part: prose is none
    prose: int = 0  # of which sentences are kept whole
    mixed: int = 0  # of those, with tags and sentences on one line
    texts: int = 0  # of prose
    variants: int = 0  # captions of tags beyond the first of a picture
    escapes: int = 0  # captions with backslashes before brackets
    likely: Counter[str] = field(default_factory=Counter)  # of captions that are one tag: what might part more of them
    marks: Counter[str] = field(default_factory=Counter)  # of captions without separator: what might be one
    beside: Counter[str] = field(default_factory=Counter)  # endings of texts beside captions that are not read
    without: Counter[str] = field(default_factory=Counter)  # the same beside pictures that are taken without a caption

    def add_picture(self, beside: str | None, *, taken_without: bool) -> None:
        """One picture; `beside` is the ending of a text next to it that is not read."""
        if beside is not None:
            (self.without if taken_without else self.beside)[beside] += 1

    def add_prose(self, texts: Sequence[str], *, mixed: bool, ways: int, tagged: bool) -> None:
        """One picture's texts of prose, and how many captions of tags it has."""
        self.captions += not tagged
        self.prose += bool(texts)
        self.texts += len(texts)
        self.mixed += mixed
        self.variants += max(ways - 1, 0)

    def add(self, parts: Sequence[str], *, several: bool, single: bool) -> None:
        """One caption, parted at its separators; `single`: none of the parts has more than one tag."""
        if not any(parts):
            return
        self.captions += 1
        self.several_lines += several
        self.separated += len(parts) > 1
        self.sentences += any(map(_is_prose, parts))
        self.escapes += any("\\(" in part or "\\[" in part for part in parts)
        if len(parts) == 1:
            self.marks.update({found[1] for found in _MARK.finditer(parts[0])})
        if single and (likely := next(filter(None, map(likely_separator, parts)), None)) is not None:
            self.likely[likely] += 1


def likely_separator(text: str) -> str | None:
    """What parts the tags of a text without commas, as far as one can tell; None for a tag or a sentence."""
    found = next((mark for mark in _LIKELY if mark in text), None)
    words = text.split()
    spaced = len(words) > 1 and ("_" in text or (len(words) > 2 and _SENTENCE.isdisjoint(text.lower().split())))
    return found or (" " if spaced else None)


def _is_prose(text: str) -> bool:
    """Whether a text holds a sentence: a full stop, and words that no tags are made of."""
    return (". " in text or text.rstrip().endswith((".", "!", "?"))) and len(_SENTENCE.intersection(text.lower().split())) > 1


def remarks(tally: CaptionTally, source: SourceConfig, separator: str) -> Iterator[str]:
    """One sentence each, with the key that changes it."""
    if tally.several_lines and source.caption_lines == "first":
        yield f"{tally.several_lines} captions go on beyond line 1, which caption_lines: first does not read"
    elif tally.several_lines:
        yield f'{tally.several_lines} captions have several lines, which are joined with ", " (caption_lines: join)'
    enough = max(_NEARLY_ALL * tally.captions, 1)
    for mark, count in tally.likely.most_common(1):
        if count >= enough and mark != source.tag_separator:
            yield (
                f"{count} of {tally.captions} captions hold no comma and are read as one tag each: "
                f"if {mark!r} is what stands between tags, set tag_separator: {mark!r}"
            )
    for mark, count in tally.marks.most_common(1):
        if count >= enough and mark != separator:
            yield f"{count} of {tally.captions} captions hold {mark}: if fixed tags end there, set separator: {mark!r}"
    if tally.prose:
        yield (
            f"{tally.prose} of {tally.captions} captions hold sentences ({tally.mixed} of them beside tags on one line), {tally.texts} texts in all, "
            f"which are kept whole and follow the tags (prose: {source.prose}; none reads them as tags)"
        )
    if tally.variants:
        yield f"{tally.variants} lines are further captions of a picture's tags, of which one is drawn each time (caption_lines: variants)"
    if tally.sentences > _FEW * tally.captions:
        yield (
            f"{tally.sentences} of {tally.captions} captions hold sentences: commas part them as they part tags, and a stage with "
            "data.shuffle_tags: true changes the order of the parts"
        )
    if tally.escapes and not source.escaped:
        yield f"{tally.escapes} captions hold backslashes before brackets, which are trained as they stand (escaped: true takes them away)"
    idle = [key for key, plain in (("keep_tokens", 0), ("caption_lines", "join")) if getattr(source, key) != plain]
    if idle and not tally.captions:
        yield f"no caption was found, so {' and '.join(idle)} changes nothing"
    elif source.keep_tokens and tally.captions == tally.separated:
        yield f"every caption holds the separator {separator!r}, so keep_tokens changes nothing"
    if separator != SEPARATOR and tally.captions and not tally.separated:
        yield f"none of {tally.captions} captions holds the separator {separator!r}"
    for counts, what in ((tally.beside, "have"), (tally.without, "are taken without a caption but have")):
        for ending, count in counts.items():
            yield f"{count} pictures {what} a {ending} beside them, which is not read (caption_ext names what is)"
