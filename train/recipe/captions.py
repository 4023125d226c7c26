"""Captions as two lists of tags, fixed and flex, and what one image's caption is in one epoch.

Order of operations as in the original trainer: dropout of the whole caption, token warmup, shuffle of the flex tags,
dropout of single flex tags. Fixed tags are never moved or dropped, and the separator never reaches the text.
Imports the standard library and our generator only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from train.recipe import captions, rng
from train.recipe.rng import Stream

SEPARATOR = "|||"  # of our own tables and texts; captions that arrive with another one are rewritten at ingest


@dataclass(frozen=True)
class DrawOptions:
    """What is drawn from a caption; the defaults draw nothing but the shuffle, as the recipe does."""

    shuffle: bool = True
    tag_dropout: float = 0.0  # probability for each flex tag alone
    caption_dropout: float = 0.0  # probability for the whole caption
    caption_dropout_every_epochs: int = 0  # every N-th epoch (the N-th, 2N-th, ...) without captions; 0 = off
    warmup_min: int = 1  # flex tags kept at update 0
    warmup_updates: int = 0  # updates until all flex tags are kept; 0 = off


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


def render(fixed: Sequence[str], flex: Sequence[str], separator: str = SEPARATOR) -> str:
    """The written form `1girl, miku, ||| smile`; it starts `, ||| ` without fixed tags and `split` reads it back."""
    return f"{join(fixed)}, {separator} {join(flex)}"


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
    orders: list[list[int]] = [list(range(_warm_count(len(flex), options, update))) for _, flex in captions]
    if options.tag_dropout > 0:
        # by the place before the shuffle, so that what is dropped does not depend on whether it is on
        least = rng.threshold(options.tag_dropout)
        words = rng.words_many(seed, Stream.TAG_DROP, uids, epochs, max(map(len, orders), default=0)).tolist()
        kept = [{place for place in order if own[place] >= least} for order, own in zip(orders, words, strict=True)]
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
