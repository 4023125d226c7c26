"""A caption as it arrives, made into the one form that our tables hold: a line of tags that commas part, `|||` once.

Whatever the source writes (several lines, another separator, spaces between tags, the first N tags fixed) is read here,
at ingest, and nowhere else. The hard exclusions see all of the text, also what the settings leave out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.posts.caption_remarks import CaptionTally
from train.recipe.captions import SEPARATOR, join, parts, render, separator_regex, stored, tags_of
from train.recipe.prose import parted

MAX_CAPTION_BYTES = 1 << 16
MAX_TAGS = 4096  # of one group or caption; the longest real posts have some hundreds
# Line breaks of any kind, NUL, and the other control characters: no tag holds one, and a terminal obeys them.
CONTROLS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED = re.compile(r"\\([()\[\]{}])")
_BAD_IN_CAPTION = re.compile(rf"(?![\t\r\n]){CONTROLS}")
_LINE_BREAK = re.compile(r"[\r\n]+")
_COMMAS = ("，", "、")  # of full width: whoever writes them writes plain ones beside them


TEXT_ENDINGS = frozenset(
    [".txt", ".text", ".caption", ".captions", ".cap", ".tags", ".tag", ".booru", ".prompt", ".wd14", ".desc", ".description"]
)  # of caption files, as tools write them


KOHYA_FOLDER = re.compile(r"(?P<number>[0-9]+)_(?P<name>.*\S.*)")  # 10_name: pictures below it are visited ten times an epoch


class BadCaption(ValueError):
    """A caption that cannot be taken as it is."""


@dataclass(frozen=True)
class CaptionRules:
    """What the settings say of the captions of one source."""

    separator: str
    tag_separator: str | None  # None = commas part the tags
    first_line: bool
    keep_tokens: int
    escaped: bool
    on_bad_tag: str
    on_second_separator: str
    bad_in_tag: re.Pattern[str]
    prose: str = "none"  # auto: sentences are looked for; all: every line is one; none: nothing is
    variants: bool = False  # each line is a caption of its own


def bad_in_tag(separator: str) -> re.Pattern[str]:
    """What no tag holds: a comma, our separator or the set's, a line break or another control character."""
    marks = sorted({separator_regex(SEPARATOR), separator_regex(separator)})
    return re.compile("|".join([",", *marks, CONTROLS]))


def caption_rules(source: SourceConfig, separator: str = SEPARATOR) -> CaptionRules:
    """The rules of a source. Where columns of tags are mapped `tag_separator` is theirs, and commas part the captions."""
    mapped = any(column == "tags" or column.startswith("tags_") for column in source.columns)
    return CaptionRules(
        separator, None if mapped else source.tag_separator, source.caption_lines == "first", source.keep_tokens,
        source.escaped, source.on_bad_tag, source.on_second_separator, bad_in_tag(separator),
        source.prose, source.caption_lines == "variants",
    )  # fmt: skip


def caption_endings(source: SourceConfig) -> tuple[str, ...]:
    """Endings of the source's caption files in small letters, with their dots, in their order."""
    said = source.caption_ext
    endings = [] if said is None else [said] if isinstance(said, str) else said
    return tuple(dict.fromkeys("." + ending.lower().lstrip(".") for ending in endings)) or (".txt",)


def caption_ending(source: SourceConfig) -> str:
    """The first of them, or the only one."""
    return caption_endings(source)[0]


def class_caption(source: SourceConfig, uri: str) -> str | None:
    """The caption of a picture that has none: `class_tokens`, or what kohya's folder of it is called; None = it stays without."""
    if source.class_tokens != "kohya":
        return source.class_tokens
    folders = [Path(os.path.abspath(source_root(source))).name, *uri.split("/")[:-1]]
    found = next(filter(None, map(KOHYA_FOLDER.fullmatch, reversed(folders))), None)
    return found["name"].replace("_", " ") if found else None


def read_caption(text: str | Sequence[str], rules: CaptionRules, tally: CaptionTally) -> tuple[str, str]:
    """(the captions as a record stores them, all that the hard exclusions must see) of a text, or of several, or of a JSON list of them.

    Lines of tags make one caption, or one each (`variants`); each line of sentences is a text of prose, and lines that
    follow each other are one where they are no variants. Raises BadCaption.
    """
    texts = [one for several in ([text] if isinstance(text, str) else text) for one in _listed(several)]
    lines = [_lines(one)[: 1 if rules.first_line else None] for one in texts]
    found = [[_parted(line, rules) for line in some] for some in lines]
    prose = [_sound(told, rules) for told in _told(found, rules)]
    tags = [[line for line, _ in some if line] for some in found]
    if len("".join(texts).encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES or not (prose or rules.variants):
        return _read_tags(texts, rules, tally)
    ways = [[line] for some in tags for line in some] if rules.variants else [["\n".join(some) for some in tags]]
    read = [_read_tags(way, rules, tally) for way in ways]
    tally.add_prose(prose, mixed=any(line and told for some in found for line, told in some), ways=len(read), tagged=any(one for one, _ in read))
    forms = [one for one, _ in read if one] or [""]
    whole = ", ".join(line for one in texts for line in _lines(one))
    return stored([(one, ()) for one in forms], prose), f"{whole}, {_BAD_IN_CAPTION.sub('', whole)}, {', '.join([*forms, *prose])}"


def _listed(text: str) -> list[str]:
    """The texts of a JSON list of captions; of anything else the text itself."""
    if text.lstrip("\ufeff \t\r\n")[:1] == "[" and len(text) <= MAX_CAPTION_BYTES:
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text.removeprefix("\ufeff"))
            if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
                return found
    return [text]


def _parted(line: str, rules: CaptionRules) -> tuple[str, str]:
    """(tags, prose) of one line; before a separator there are tags alone."""
    if rules.prose == "none" or (rules.prose == "auto" and rules.tag_separator not in (None, ",", ", ")):
        return line, ""
    marks = list(re.finditer(separator_regex(rules.separator), line))
    start = marks[-1].end() if marks else 0
    tags, told = ("", line[start:].strip()) if rules.prose == "all" else parted(line[start:])
    return (line[:start] + tags, told) if told else (line, "")


def _told(found: list[list[tuple[str, str]]], rules: CaptionRules) -> list[str]:
    """The texts of prose: of each text what follows each other, or each line."""
    lines = [[told for _, told in some if told] for some in found]
    return [told for some in lines for told in (some if rules.variants else [" ".join(some)]) if told]


def _sound(told: str, rules: CaptionRules) -> str:
    """Prose without what no text may hold. Raises BadCaption."""
    if rules.on_bad_tag != "error":
        told = _BAD_IN_CAPTION.sub("", told)
    if SURROGATE.search(told) or _BAD_IN_CAPTION.search(told):
        raise BadCaption("caption holds control characters or broken ones: see on_bad_tag")
    return " ".join((ESCAPED.sub(r"\1", told) if rules.escaped else told).split())


def _read_tags(text: Sequence[str], rules: CaptionRules, tally: CaptionTally) -> tuple[str, str]:
    """(the caption in our form, all that the hard exclusions must see) of lines of tags."""
    texts = list(text)
    if len("".join(texts).encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
        raise BadCaption(f"caption is longer than {MAX_CAPTION_BYTES} bytes")
    lines = [_lines(one) for one in texts]
    used = [line for some in lines for line in (some[:1] if rules.first_line else some)]
    plain = rules.tag_separator is None and all(len(some) <= 1 or rules.first_line for some in lines)
    checked = (", " if plain else "\n").join(used)
    if rules.on_bad_tag != "error":
        checked = _BAD_IN_CAPTION.sub("", checked)
    if SURROGATE.search(checked) or _BAD_IN_CAPTION.search(checked):
        raise BadCaption("caption holds control characters or broken ones: see on_bad_tag")
    pieces = parts(checked, rules.separator)
    several = max(map(len, lines), default=0) > 1
    plain = plain and not (rules.keep_tokens and len(pieces) == 1) and not _holds_mark(checked, pieces, rules)
    if plain and len(pieces) <= 2:  # a third piece, a tail, is stored in a line of its own
        count, caption = checked.count(",") + 1, SEPARATOR.join(pieces)
        single = not any("," in piece.strip(" ,") for piece in pieces)
    else:
        tags = [_tags(piece, rules) for piece in pieces]
        count, caption = sum(map(len, tags)), _rendered(tags, checked, rules)
        single = all(len(some) <= 1 for some in tags)
    if count > MAX_TAGS:
        raise BadCaption(f"caption has more than {MAX_TAGS} tags")
    tally.add(pieces, several=several, single=single)
    caption = ESCAPED.sub(r"\1", caption) if rules.escaped else caption
    whole = ", ".join(line for some in lines for line in some)
    if plain and whole == checked:
        return caption, caption
    # as it came and without what parts words in it: what hides a word in one shows in the other
    return caption, f"{whole}, {_BAD_IN_CAPTION.sub('', whole)}, {caption}"


def mended(tag: str, bad: re.Pattern[str], on_bad_tag: str) -> str | None:
    """A tag that holds what no tag may: None to drop it, or with `_` in the place of that."""
    return None if on_bad_tag == "drop" else re.sub(r"_{2,}", "_", bad.sub("_", tag)).strip("_ ")


def _lines(text: str) -> list[str]:
    lines = (line.strip() for line in _LINE_BREAK.split(text.removeprefix("\ufeff")))
    return [line for line in lines if line]


def _holds_mark(text: str, pieces: Sequence[str], rules: CaptionRules) -> bool:
    """Whether `|||` stands in a text whose separator is another one: in our form it would be one."""
    if rules.separator == SEPARATOR or SEPARATOR not in text:
        return False
    return rules.separator in SEPARATOR or any(SEPARATOR in piece for piece in pieces)


def _tags(text: str, rules: CaptionRules) -> list[str]:
    """The tags of one part, over its lines, mended where they hold what no tag may."""
    found = [tag for line in text.split("\n") for tag in _split_tags(line, rules.tag_separator)]
    if rules.separator == SEPARATOR and rules.tag_separator is None:
        return found
    kept = []
    for tag in found:
        if "," in tag or SEPARATOR in tag:
            if rules.on_bad_tag == "error":
                raise BadCaption(f"tag {tag!r} holds a comma or {SEPARATOR}, which are none of the separators set: see on_bad_tag")
            if not (tag := mended(tag, rules.bad_in_tag, rules.on_bad_tag) or ""):
                continue
        kept.append(tag)
    return kept


def _split_tags(line: str, separator: str | None) -> list[str]:
    """Tags of a line; a blank separator and commas of full width part them together with commas."""
    if separator is None or separator.strip() == ",":
        return tags_of(line)
    bare = separator.strip() or separator
    found = line.split(separator if re.search(r"\w", bare) else bare)
    if not separator.strip() or bare in _COMMAS:
        return [tag for piece in found for tag in tags_of(piece)]
    return [tag.strip() for tag in found if tag.strip()]


def _rendered(tags: list[list[str]], text: str, rules: CaptionRules) -> str:
    """Our form of a caption's parts. Raises BadCaption where they are too many."""
    if rules.separator != SEPARATOR and rules.separator in SEPARATOR and SEPARATOR in text:
        raise BadCaption(f"caption holds {SEPARATOR}, and the separator is {rules.separator}: mend it")
    if len(tags) == 1:
        fixed, flex = tags[0][: rules.keep_tokens], tags[0][rules.keep_tokens :]
        return render(fixed, flex) if fixed else join(flex)
    if len(tags) == 2:
        return render(tags[0], tags[1])
    if rules.on_second_separator == "fork":  # the first one parts, the others stay in the text
        return f"{join(tags[0])}, {SEPARATOR} " + f" {SEPARATOR} ".join(map(join, tags[1:]))
    if len(tags) == 3 and rules.on_second_separator == "suffix":
        return render([*tags[0], *tags[2]], tags[1])
    if len(tags) == 3 and rules.on_second_separator == "tail":
        return stored([(render(tags[0], tags[1]), tags[2])], ())
    raise BadCaption(f"caption holds {len(tags) - 1} separators {rules.separator}: set on_second_separator or mend it")
