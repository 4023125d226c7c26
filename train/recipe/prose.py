"""Which parts of a caption are sentences, so that no comma cuts them. A pure function of the text; standard library only.

People mix lists of tags with descriptions in one file, and nothing marks which is which. What looks like both is read as
tags, as before; a source says better by its key `prose`.
"""

from __future__ import annotations

import re

# Words that sentences are made of, and that few names and tags hold.
_GLUE = frozenset(
    ["a", "an", "the", "is", "are", "was", "were", "has", "have", "he", "she", "it", "they", "his", "her", "their", "its",
     "there", "this", "that", "who", "which", "while", "and"]
)  # fmt: skip
_VERBAL = _GLUE - {"the", "and", "that"}  # a title may be made of those
_END = re.compile(r"[.!?][\"')\]]*\s*\Z")
_INNER_END = re.compile(r"[a-z0-9)\"'][.!?][\"')]*\s+(?=[A-Z\"'(])")
_EASTERN = re.compile("[。！？]")
_LEAST_WORDS, _WORDS_WITHOUT_END = 3, 6


def prose_reason(text: str) -> str | None:
    """Why a text is prose: `eastern`, `ended` or `wordy`; None for tags.

    eastern: an ideographic full stop. ended: it begins as a sentence, ends as one, and every second of the pieces that
    commas part has a word that sentences are made of. wordy: it has no end, but six words, two in each
    piece on average, and such a word for each.
    """
    text = text.strip()
    if _EASTERN.search(text) and len(text) >= 8:
        return "eastern"
    words = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text.lower())
    if len(words) < _LEAST_WORDS or "_" in text:
        return None
    pieces = [piece for piece in text.split(",") if piece.strip()]
    glue = sum(word in _GLUE for word in words)
    if (_END.search(text) or _INNER_END.search(text)) and text.lstrip("\"'(")[:1].isupper() and 2 * glue >= max(len(pieces), 2):
        return "ended"
    verbal = any(word in _VERBAL for word in words)
    return "wordy" if len(words) >= _WORDS_WITHOUT_END and verbal and glue >= max(len(pieces), 2) and len(words) >= 2 * len(pieces) else None


def parted(line: str) -> tuple[str, str]:
    """(tags, prose) of one line: all of it, or sentences before or after a list of tags."""
    reason = prose_reason(line)
    ended = _END.search(line) is not None
    if reason == "eastern" or (reason == "ended" and ended):
        return "", line.strip()
    for comma in re.finditer(r"[,;]\s*|\s{2,}", line):  # tags, then sentences
        rest = line[comma.end() :]
        if reason != "ended" and rest[:1].isupper() and prose_reason(rest) == "ended":
            return line[: comma.start()].strip(" ,"), rest.strip()
    for end in reversed(list(re.finditer(r"[.!?][\"')]*\s+", line))):  # sentences, then tags
        head, rest = line[: end.end()], line[end.end() :].strip(" ,")
        if not ended and "," in rest and not rest[:1].isupper() and prose_reason(head) == "ended" and prose_reason(rest) is None:
            return rest, head.strip()
    return ("", line.strip()) if reason else (line, "")
