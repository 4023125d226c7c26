"""Which prompts give away a caption of the training set: `new.py` draws some of its prompts from captions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from train.base.errors import Halt
from train.data.index import Index
from train.recipe.captions import tags_of
from train.recipe.tag_policy import AESTHETIC_TAGS, QUALITY_TAGS, RATING_TAGS, YEAR_RANGES

# Words that prompts and captions have in common because the recipe puts them there.
_LABELS = {*QUALITY_TAGS, *AESTHETIC_TAGS, "absurdres", *(name for name, _, _ in YEAR_RANGES), *(tag for tags in RATING_TAGS.values() for tag in tags)}
_FEWEST_TAGS = 3  # fewer tell of no one picture
_MANY_TAGS = 8  # so many of one picture's are told even where it has many more
_SHORTEST_TEXT = 20


def given_away(prompts: Iterable[str], folder: Path, stage: str) -> set[str] | None:
    """Those of `prompts` that are a caption of the set, whole or in good part; None where the set cannot be read."""
    try:
        index = Index.open(folder, stage)
    except (Halt, OSError):
        return None
    asked = {prompt: (_own_tags(tags_of(prompt)), _plain(prompt)) for prompt in prompts}
    found: set[str] = set()
    for i in range(len(index)):
        said = index.record(i)
        ways = [(said.fixed, said.flex, said.tail), *said.variants]
        tags = [_own_tags([tag for part in way for tag in part]) for way in ways]
        texts = [plain for text in said.prose if len(plain := _plain(text)) >= _SHORTEST_TEXT]
        for prompt, (own, text) in asked.items():
            if prompt not in found and (any(_is_of(own, one) for one in tags) or any(one in text for one in texts)):
                found.add(prompt)
    return found


def _is_of(prompt: set[str], caption: set[str]) -> bool:
    """All tags of the prompt but one, a trigger, are the picture's, and they are many or half of what it has."""
    shared = len(prompt & caption)
    return shared >= max(_FEWEST_TAGS, len(prompt) - 1) and (shared >= _MANY_TAGS or 2 * shared >= len(caption))


def _own_tags(tags: Iterable[str]) -> set[str]:
    return {plain for tag in tags if (plain := _plain(tag)) not in _LABELS}


def _plain(text: str) -> str:
    return re.sub(r"[\s_]+", " ", text.lower()).strip(" .,")
