"""Tags that name nothing: what many pictures show, whoever or whatever is in them. Pure."""

from __future__ import annotations

import itertools
import re

from train.recipe.tag_policy import AESTHETIC_TAGS, COUNT_TAGS, QUALITY_TAGS, RATING_TAGS, Policy, spaced

# Tags that many pictures share by chance: what a name is not.
_COMMON = re.compile(
    r"solo|no humans|(?:an?|the) .*|(?:\w+[ -])*(?:hair|eyes|background|skin|shirt|dress|skirt|jacket|sweater|hat|body|shot|view|smile|mouth|gloves|shoes|boots|bangs)"
    r"|looking .*|standing|sitting|smile|blush|portrait|upper body|full body|close-?up|outdoors|indoors|day|night|sky|original|highres|absurdres"
    r"|anime|illustration|photo|artwork|drawing|\d+k|year \d+|newest|recent|mid|early|oldest|old|score_.*|rating[:_ ].*|source_.*|.*quality"
)
_GENERIC = frozenset(
    [spaced(tag, Policy()) for tag in COUNT_TAGS]
    + [*QUALITY_TAGS, *AESTHETIC_TAGS, *itertools.chain.from_iterable(RATING_TAGS.values()), "general", "questionable"]
)


def counts_or_judges(tag: str) -> bool:
    """Whether a tag counts who is there, or is a word of quality or rating."""
    return tag.lower() in _GENERIC or tag == "solo"


def is_generic(tag: str) -> bool:
    """Whether a tag says what many pictures show, so that it names nothing."""
    return tag.lower() in _GENERIC or _COMMON.fullmatch(tag.lower()) is not None
