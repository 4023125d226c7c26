"""What the captions of a source are made of, read as the step ingest reads them: the source's keys they ask for, and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.folders.walking import pictures
from train.prepare.ingest import read_source
from train.prepare.posts.caption_remarks import CaptionTally
from train.prepare.posts.caption_text import caption_rules
from train.prepare.posts.census import Census
from train.prepare.posts.normalise import RawPost, to_record
from train.prepare.sources import sidecar
from train.prepare.tables.schemas import Quarantine
from train.recipe import prose
from train.recipe.captions import SEPARATOR, Tags, join, read_stored
from train.recipe.tag_policy import COUNT_TAGS, Policy, spaced
from train.tools.new.facts import Captions, Layout
from train.tools.new.words import is_generic

LOOK_RECORDS = 4000  # beyond it about so many pictures of a folder, or the first records of a list
_NEARLY_ALL = 0.9
_EACH = 0.98  # of the captions: what all hold, a few slips apart
_MOST = 0.8  # of the captions: what belongs to what they show
_LEAST_SHARED = 3  # captions below which what all hold says nothing
_TOKENS_PER_TAG = 3.04  # with its comma; measured over real captions
_TOKENS_PER_WORD = 1.3  # of sentences; a usual figure
_MOST_EXAMPLES = 64


@dataclass
class Look:
    """Records of a source as they were read."""

    posts: list[RawPost] = field(default_factory=list)
    refused: list[Quarantine] = field(default_factory=list)
    whole: bool = True
    scheme: str | None = None  # rating scheme that the records leave open


@dataclass(frozen=True)
class Read:
    """One source as ingest reads it: its layout with the keys that its captions ask for, and its records."""

    layout: Layout
    source: SourceConfig
    rows: list[dict[str, Any]]
    refused: list[Quarantine]
    separated: int  # captions with the separator
    whole: bool


def read(layout: Layout, name: str) -> Read:
    """The records of a source, or some of many. Raises Halt(MISMATCH) where none can be taken."""
    seen = _posts(_source(layout.keys, name), layout.pictures)
    if not seen.posts and seen.refused:
        first = seen.refused[0]
        raise Halt(ExitCode.MISMATCH, f"{layout.keys['path']}: none of {len(seen.refused)} records can be taken, the first: {first.key}: {first.message}")
    layout = _with_keys(layout, seen, name)
    source = _source(layout.keys, name)
    rows, refused, tally = _records(seen.posts, source, layout.separator or SEPARATOR)
    return Read(layout, source, rows, [*seen.refused, *refused], tally.separated, seen.whole)


def _source(keys: Any, name: str) -> SourceConfig:
    return SourceConfig(**{"name": name, **keys})


def _posts(source: SourceConfig, count: int) -> Look:
    """Some posts of a source; what its adapter prints is for those who prepare it."""
    seen = Look()
    step = -(-count // LOOK_RECORDS) if source.adapter == "sidecar" else 1
    with contextlib.redirect_stdout(io.StringIO()), Census(source).open() as census:
        found = read_source(source)
        if step > 1:
            # by a hash of the name: every n-th of names that are numbered would be those of one kind
            some = (name for name in pictures(source, source_root(source)) if isinstance(name, str) and zlib.crc32(os.fsencode(name)) % step == 0)
            found = sidecar.captioned(source, some)
        for post in found:
            if isinstance(post, Quarantine):
                seen.refused.append(post)
            else:
                seen.posts.append(post)
            if len(seen.posts) + len(seen.refused) > LOOK_RECORDS + step:
                seen.whole = False
                break
        rules = caption_rules(source)
        for post in seen.posts:
            row = to_record(post, source, rules)
            if not isinstance(row, Quarantine):
                census.see(post.fields, post.scheme, row)
        seen.scheme = "gsqe" if census.question() else None
    seen.whole = seen.whole and step == 1
    return seen


def _records(posts: Sequence[RawPost], source: SourceConfig, separator: str) -> tuple[list[dict[str, Any]], list[Quarantine], CaptionTally]:
    rules, tally = caption_rules(source, separator), CaptionTally()
    made = [to_record(post, source, rules, tally) for post in posts]
    return [row for row in made if not isinstance(row, Quarantine)], [row for row in made if isinstance(row, Quarantine)], tally


def _with_keys(layout: Layout, look: Look, name: str) -> Layout:
    """What the captions look like and are not read as by default; a TOML has said it already."""
    keys, seen, separator = dict(layout.keys), dict(layout.seen), layout.separator
    _, _, tally = _records(look.posts, _source(keys, name), separator or SEPARATOR)
    enough = max(_NEARLY_ALL * tally.captions, 1)
    for mark, count in tally.marks.most_common(1):
        if count >= enough and separator is None:
            separator = mark
    for mark, count in tally.likely.most_common(1):
        if count >= enough and "tag_separator" not in keys and not keys.get("columns"):
            keys["tag_separator"], seen["tag_separator"] = mark, f"{count:,} of {tally.captions:,} captions hold no comma, and this between their tags"
    if tally.escapes >= enough / 2 and "escaped" not in keys:
        keys["escaped"], seen["escaped"] = True, f"{tally.escapes:,} captions hold backslashes before brackets"
    if "caption_lines" not in keys and (count := sum(map(_several, look.posts))) >= max(_NEARLY_ALL * tally.several_lines, 1) and count >= 2:
        keys["caption_lines"], seen["caption_lines"] = "variants", f"the lines of {count:,} captions tell the same picture in other words"
    if look.scheme is not None and "rating_scheme" not in keys:
        keys["rating_scheme"], seen["rating_scheme"] = look.scheme, "no post is rated g: s is taken as sensitive, the stricter reading; sqe = s means safe"
    return dataclasses.replace(layout, keys=keys, seen=seen, separator=separator)


def _several(post: RawPost) -> bool:
    """Whether the lines of a caption are captions of their own: alike in kind, and they share words without going on."""
    texts = [post.caption] if isinstance(post.caption, str) else list(post.caption or ())
    lines = [line.strip() for text in texts for line in re.split(r"[\r\n]+", text) if line.strip()]
    if len(lines) < 2 or len({prose.prose_reason(line) is None for line in lines}) > 1:
        return False
    bags = [set(re.findall(r"\w+", line.lower())) for line in lines]
    return all(len(one & other) >= 0.3 * min(len(one), len(other)) for one, other in itertools.combinations(bags, 2))


def facts(reads: Sequence[Read]) -> Captions:
    """What the captions of a set's sources are made of, together."""
    rows, refused = [row for one in reads for row in one.rows], [one for found in reads for one in found.refused]
    layout, mine = reads[0].layout, {one.source.name for one in reads if "weight" not in one.layout.keys}  # not those of the class
    safe = [row for row in rows if row["hard_exclusion"] is None]
    stored = [(row, *read_stored(row["caption"] or "")) for row in safe]
    lists = [[spaced(tag, Policy()) for tag in _tags(row, ways[0])] for row, ways, _ in stored]
    tagged, told = [bool(tags) for tags in lists], [bool(texts) for _, _, texts in stored]
    tokens = [_tokens(tags, texts) for tags, (_, _, texts) in zip(lists, stored, strict=True)]
    own = [(one, tags) for one, tags in zip(stored, lists, strict=True) if one[0]["source"] in mine]
    shared = _shared([tags for _, tags in own if tags])
    trigger, place, why = _trigger(shared, [" ".join(texts) for (_, _, texts), _ in own if texts])
    broken = [one for one in refused if one.kind == "error"]
    return Captions(
        looked=len(rows) + len(refused), whole=(whole := all(one.whole for one in reads)),
        captioned=sum(a or b for a, b in zip(tagged, told, strict=True)), tagged=sum(tagged), told=sum(told),
        both=sum(a and b for a, b in zip(tagged, told, strict=True)),
        several=sum(len(texts) > 1 or len(ways) > 1 for _, ways, texts in stored),
        separator=layout.separator or (SEPARATOR if any(one.separated for one in reads) else None),
        tags_each=int(statistics.median([len(tags) for tags in lists if tags] or [0])),
        tokens=sorted(tokens)[int(0.95 * (len(tokens) - 1))] if tokens else 0,
        shared=tuple(shared), trigger=trigger, trigger_place=place, trigger_why=why,
        characters=_most(safe, "tags_character"), artists=_most(safe, "tags_artist"),
        rated=sum(row["rating"] is not None for row in rows), unsafe=sum(row["rating"] in ("q", "e") for row in safe),
        scored=sum(row["score"] is not None or row["score_real"] is not None for row in rows),
        dated=sum((row["media_year"] or row["created_year"]) is not None for row in rows),
        excluded=len(rows) - len(safe), refused=len(broken),
        first_refusal=f"{broken[0].key}: {broken[0].message}" if broken else "",
        examples=tuple(_examples(own)), keys=tuple(row["key"] for row in safe) if whole else (),
    )  # fmt: skip


def _tags(row: dict[str, Any], way: Tags) -> list[str]:
    groups = [tag for group in ("character", "copyright", "artist", "general") for tag in row[f"tags_{group}"]]
    counts = [tag for tag in groups if tag in COUNT_TAGS]
    return [*way[0], *way[1], *way[2], *counts, *(tag for tag in groups if tag not in counts)]


def _tokens(tags: Sequence[str], texts: Sequence[str]) -> int:
    return round(len(tags) * _TOKENS_PER_TAG + max((len(text.split()) * _TOKENS_PER_WORD for text in texts), default=0))


def _shared(lists: Sequence[Sequence[str]]) -> list[tuple[str, float, int]]:
    """(tag, share, usual place) of the tags that most hold, the earliest first."""
    if len(lists) < _LEAST_SHARED:
        return []
    places: dict[str, list[int]] = {}
    for tags in lists:
        for place, tag in enumerate(dict.fromkeys(tags)):
            places.setdefault(tag, []).append(place)
    found = [(tag, len(where) / len(lists), int(statistics.median(where)), set(where)) for tag, where in places.items() if len(where) >= _MOST * len(lists)]
    return [(tag, share, place) for tag, share, place, _ in sorted(found, key=lambda one: (one[2], one[0]))]


def _trigger(shared: Sequence[tuple[str, float, int]], texts: Sequence[str]) -> tuple[str | None, int | None, str]:
    """(word, place, what says so): a tag that every picture has and that is no common one, else such a word of sentences."""
    for tag, share, place in shared:
        if share >= _EACH and not is_generic(tag):
            return tag, place, f"{'every caption' if share == 1 else f'{share:.0%} of the captions'} holds it, and it is no common tag"
    if len(texts) >= _LEAST_SHARED:
        bags = [set(re.findall(r"(?<![.!?] )(?<!^)\b(?:[A-Z][a-z]+|[a-z]*\d\w*|\w+_\w+|[b-df-hj-np-tv-xz]{3,})\b", text)) for text in texts]
        counts = Counter(word for bag in bags for word in bag)
        for word, count in counts.most_common(1):
            if count >= _EACH * len(texts):
                return word, None, f"{count:,} of {len(texts):,} descriptions name it"
    return None, None, ""


def _most(rows: Sequence[dict[str, Any]], column: str) -> tuple[tuple[str, float], ...]:
    counts = Counter(spaced(tag, Policy()) for row in rows for tag in set(row[column]))
    return tuple((tag, round(count / len(rows), 3)) for tag, count in counts.most_common(3))


def _examples(own: Sequence[tuple[tuple[dict[str, Any], list[Tags], list[str]], Sequence[str]]]) -> Iterator[str]:
    """Captions of pictures that are not rated q or e, evenly over the records."""
    fit = [(tags, texts) for (row, _, texts), tags in own if row["rating"] not in ("q", "e") and (tags or texts)]
    for tags, texts in fit[:: max(1, len(fit) // _MOST_EXAMPLES)][:_MOST_EXAMPLES]:
        yield join(tags) if tags else texts[0]
