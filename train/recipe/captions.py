"""Captions as lists of tags (fixed, flex, tail) and prose, and what one image's caption is in one epoch.

Order of operations as in the original trainer: dropout of the whole caption, token warmup, shuffle of the flex tags,
dropout of single flex tags. Fixed and tail tags and sentences are never moved, dropped or cut at commas, and the
separator never reaches the text. The tail follows the flex tags, prose follows the tail.
Imports the standard library, our errors and our generator only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.recipe import captions, rng
from train.recipe.rng import Stream

SEPARATOR = "|||"  # of our own tables and texts; captions that arrive with another one are rewritten at ingest


KINDS = ("tags", "tags_prose", "prose")  # what of a picture's caption an epoch may show
_TAIL, _PROSE = f"\t{SEPARATOR} ", "\t"  # how a line of a stored caption begins that is no line of tags
Tags = tuple[list[str], list[str], list[str]]  # fixed, flex, tail


@dataclass(frozen=True)
class Caption:
    """All that is said of one picture: its tags, other ways to tag it, and texts that describe it."""

    fixed: Sequence[str] = ()
    flex: Sequence[str] = ()
    tail: Sequence[str] = ()
    prose: Sequence[str] = ()  # several: one is drawn
    variants: Sequence[Tags] = ()  # further captions of tags, one of which may be drawn in the place of the first


@dataclass(frozen=True)
class Drawn:
    """What one picture's caption is in one epoch; the text is fixed, flex, tail, prose, joined with commas."""

    fixed: list[str]
    flex: list[str]
    tail: list[str]
    prose: list[str]
    kind: str = "tags"
    variant: int = 0  # of the captions of tags
    text: int = 0  # of the prose

    @property
    def after(self) -> list[str]:
        """What follows the flex tags."""
        return [*self.tail, *self.prose]


@dataclass(frozen=True)
class DrawOptions:
    """What is drawn from a caption; the defaults draw nothing but the shuffle, as the recipe does."""

    shuffle: bool = True
    tag_dropout: float = 0.0  # probability for each flex tag alone
    caption_dropout: float = 0.0  # probability for the whole caption
    caption_dropout_every_epochs: int = 0  # every N-th epoch (the N-th, 2N-th, ...) without captions; 0 = off
    warmup_min: int = 1  # flex tags kept at update 0
    warmup_updates: int = 0  # updates until all flex tags are kept; 0 = off
    protect: frozenset[str] = frozenset()  # flex tags that neither warmup nor dropout leaves out
    trigger: str | None = None  # opens every caption that is not dropped
    mix: Mapping[str, float] = field(default_factory=dict)  # shares of KINDS; empty = all that there is


def protected(said: Sequence[str] | str) -> frozenset[str]:
    """The tags of a list, or of a text file with one on each line. Raises Halt(USAGE) for a file that cannot be read, and for other values."""
    if isinstance(said, str):
        try:
            said = Path(said).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeError) as error:
            raise Halt(ExitCode.USAGE, f"data.protect is {said!r}, a list of tags or a text file of them: {error}") from error
    if not isinstance(said, list | tuple) or not all(isinstance(tag, str) for tag in said):
        raise Halt(ExitCode.USAGE, f"data.protect is {said!r}, must be a list of tags, or a text file with one on each line")
    tags = [stripped for tag in said if (stripped := tag.strip().rstrip(","))]
    return frozenset([*tags, *(tag.replace("_", " ") for tag in tags)])  # as sites write them, and as captions do


def protect_identity(said: Sequence[str] | str) -> str | None:
    """sha256 of the tags of a file, because its path says nothing of them; None for a list, which stands in the config."""
    return hashlib.sha256("\n".join(sorted(protected(said))).encode()).hexdigest() if isinstance(said, str) else None


def separator_regex(separator: str) -> str:
    """Matches the separator; one that is a word only where it stands as one: `sep` is no part of `separate`."""
    before = r"(?<!\w)" if re.match(r"\w", separator) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", separator) else ""
    return before + re.escape(separator) + after


def parts(text: str, separator: str = SEPARATOR, most: int = 0) -> list[str]:
    """The text cut at its first `most` separators (0 = at all of them), one part more than there were."""
    return re.split(separator_regex(separator), text, maxsplit=most)


def split(text: str, separator: str = SEPARATOR) -> tuple[list[str], list[str]]:
    """(fixed tags, flex tags): split at the first separator, then at commas; stripped, empty ones left out.

    Without a separator every tag is flex. A second separator is refused where captions are read in, not here.
    """
    fixed, *flex = parts(text, separator, 1)
    return (tags_of(fixed), tags_of(flex[0])) if flex else ([], tags_of(text))


def tags_of(text: str) -> list[str]:
    """The tags that commas part, stripped, without empty ones."""
    return [stripped for tag in text.split(",") if (stripped := tag.strip())]


def join(tags: Sequence[str]) -> str:
    """The text the tokenizer gets."""
    return ", ".join(tags)


def render(fixed: Sequence[str], flex: Sequence[str], tail: Sequence[str] = (), prose: Sequence[str] = ()) -> str:
    """The written form `1girl, miku, ||| smile`, with a tail `1girl, miku, ||| smile ||| masterpiece`, each text of prose below.

    It starts `, ||| ` without fixed tags; without tail and prose `split` reads it back.
    """
    after = f" {SEPARATOR} {join(tail)}" if tail else ""
    return "\n".join([f"{join(fixed)}, {SEPARATOR} {join(flex)}{after}", *prose])


def stored(tags: Sequence[tuple[str, Sequence[str]]], prose: Sequence[str]) -> str:
    """One text of a record's captions: (line of fixed and flex tags, tail) of each, then each text of prose.

    A caption of fixed and flex tags alone is its line.
    """
    lines = [line + (f"\n{_TAIL}{join(tail)}" if tail else "") for line, tail in tags]
    return "\n".join([*(lines or [""]), *(_PROSE + text for text in prose)])


def read_stored(text: str) -> tuple[list[Tags], list[str]]:
    """(captions of tags, prose) of a stored text; the first caption of tags may be empty."""
    tags: list[Tags] = []
    prose: list[str] = []
    for line in text.split("\n"):
        if line.startswith(_TAIL) and tags:
            tags[-1][2].extend(tags_of(line[len(_TAIL) :]))
        elif line.startswith(_PROSE):
            prose.append(line[len(_PROSE) :])
        else:
            tags.append((*split(line), []))
    return tags, prose


def written_variant(tags: Tags) -> str:
    """A further caption of tags as one cell of a table: a line for each part."""
    return "\n".join(map(join, tags))


def read_variant(text: str) -> Tags:
    """What `written_variant` wrote."""
    fixed, flex, tail = (tags_of(line) for line in text.split("\n"))
    return fixed, flex, tail


def draw_captions(
    captions: Sequence[Caption],
    options: DrawOptions,
    *,
    seed: int,
    uids: Sequence[int],
    epochs: Sequence[int],
    update: int,
) -> list[Drawn]:
    """What each of many images is called: `draw_many` of the caption that stream CAPTION_KIND chooses.

    A kind that a picture has nothing for gives what there is: its tags, or its prose.
    """
    picks = [_picked(one, options, seed, uid, epoch) for one, uid, epoch in zip(captions, uids, epochs, strict=True)]
    pairs = [(one.fixed, one.flex) for one in picks]
    drawn = draw_many(pairs, options, seed=seed, uids=uids, epochs=epochs, update=update)
    result = []
    for pick, (fixed, flex), uid, epoch in zip(picks, drawn, uids, epochs, strict=True):
        if _caption_dropped(options, seed, uid, epoch):
            result.append(Drawn([], [], [], [], pick.kind, pick.variant, pick.text))
            continue
        if options.trigger and options.trigger not in (*fixed, *flex, *pick.tail):
            fixed = [options.trigger, *fixed]
        result.append(Drawn(fixed, flex, pick.tail, pick.prose, pick.kind, pick.variant, pick.text))
    return result


def _picked(caption: Caption, options: DrawOptions, seed: int, uid: int, epoch: int) -> Drawn:
    """The kind and the variant of this image in this epoch, nothing shuffled yet."""
    tagged = bool(caption.fixed or caption.flex or caption.tail)
    ways: list[Tags] = [(list(caption.fixed), list(caption.flex), list(caption.tail)), *caption.variants]
    texts, kind, variant, text = list(caption.prose), "tags", 0, 0
    if texts or len(ways) > 1:  # else nothing is drawn
        of_kind, of_tags, of_text = (int(word) for word in rng.words(seed, Stream.CAPTION_KIND, uid, epoch, 3))
        variant, text = of_tags * len(ways) >> 32, of_text * max(len(texts), 1) >> 32
        if texts:
            kind = _kind(options.mix, of_kind) if tagged else "prose"
    fixed, flex, tail = ways[variant] if kind != "prose" else ([], [], [])
    return Drawn(fixed, flex, tail, texts[text : text + 1] if kind != "tags" else [], kind, variant, text)


def _kind(mix: Mapping[str, float], word: int) -> str:
    total, below = sum(mix.values()), 0.0
    for kind in KINDS:
        below += mix.get(kind, 0.0)
        if word * total < below * 2.0**32:
            return kind
    return "tags_prose"  # without a mix: all that is there


def draw(
    fixed: Sequence[str], flex: Sequence[str], options: DrawOptions, *, seed: int, uid: int, epoch: int, update: int
) -> tuple[list[str], list[str]]:
    """(fixed, flex) of one image in one epoch; both empty when the whole caption is dropped.

    `update` is the plan step, used by the warmup alone. The same arguments always give the same tags.
    """
    return draw_many([(fixed, flex)], options, seed=seed, uids=[uid], epochs=[epoch], update=update)[0]


def draw_many(
    captions: Sequence[tuple[Sequence[str], Sequence[str]]],
    options: DrawOptions,
    *,
    seed: int,
    uids: Sequence[int],
    epochs: Sequence[int],
    update: int,
) -> list[tuple[list[str], list[str]]]:
    """`draw` of many images at once: what the images of a tile are called."""
    kept_always = [{n for n, tag in enumerate(flex) if tag in options.protect} if options.protect else () for _, flex in captions]
    orders: list[list[int]] = [
        sorted({*range(_warm_count(len(flex), options, update)), *always})
        for (_, flex), always in zip(captions, kept_always, strict=True)
    ]
    if options.tag_dropout > 0:
        # by the place before the shuffle, so that what is dropped does not depend on whether it is on
        least = rng.threshold(options.tag_dropout)
        most = max((order[-1] + 1 for order in orders if order), default=0)
        words = rng.words_many(seed, Stream.TAG_DROP, uids, epochs, most).tolist()
        kept = [
            {place for place in order if own[place] >= least or place in always}
            for order, own, always in zip(orders, words, kept_always, strict=True)
        ]
    if options.shuffle:
        orders = rng.shuffled_many(orders, seed, uids, epochs)
    if options.tag_dropout > 0:
        orders = [[place for place in order if place in own] for order, own in zip(orders, kept, strict=True)]
    return [
        ([], []) if _caption_dropped(options, seed, uid, epoch) else (list(fixed), [flex[place] for place in order])
        for (fixed, flex), order, uid, epoch in zip(captions, orders, uids, epochs, strict=True)
    ]


def _caption_dropped(options: DrawOptions, seed: int, uid: int, epoch: int) -> bool:
    every = options.caption_dropout_every_epochs
    if every > 0 and (epoch + 1) % every == 0:  # the original counts epochs from 1
        return True
    if options.caption_dropout <= 0:
        return False
    return int(rng.words(seed, Stream.CAPTION_DROP, uid, epoch, 1)[0]) < rng.threshold(options.caption_dropout)


def _warm_count(count: int, options: DrawOptions, update: int) -> int:
    """Flex tags kept at this update: from `warmup_min`, linearly to all."""
    if update >= options.warmup_updates or count <= options.warmup_min:
        return count
    return update * (count - options.warmup_min) // options.warmup_updates + options.warmup_min


def plain_tags(text: str, separator: str = captions.SEPARATOR) -> list[str]:
    """The tags of a prompt, a prefix or a negative prompt, in order: separators mean nothing here but a comma."""
    return captions.split(text.replace(separator, ","), separator)[1]
