"""What reading a source noticed and no single record shows: counted while it is read, printed once, or asked about.

Adapters and the walk `note` what they passed over or found elsewhere; `Census.see` looks at every record that was taken.
Reading has one place per process, so the census of the source that is being read is known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from train.config.dataset import SourceConfig

Kind = Literal["litter", "linked_home", "spelling", "ending", "categories", "one_tag", "missing", "escapes"]
_LINES: Mapping[Kind, str] = {
    "litter": "{n} leftovers of desktops, NAS and other programs, and hidden folders, are passed over (such as {example})",
    "linked_home": "{n} linked folders lead to folders of the same source: their files are read once, where they lie (such as {example})",
    "spelling": "{n} names are spelt otherwise on the disk, in letter case or composed letters (such as {example})",
    "ending": "{n} pictures have another ending on the disk than in the metadata (such as {example})",
    "one_tag": "{n} cells of tags are one tag each (such as {example}): see tag_separator",
    "missing": "{n} cells hold a printed missing value and count as empty (such as {example})",
    "escapes": "{n} posts have HTML escapes in their tags (such as {example}): adapter gelbooru reads them, or escape them back",
    "categories": "{n} groups of tags in posts have an unknown category and count as general (such as {example})",
}
# So many rated posts without one `g` are no chance: of random posts today, four in ten are g.
_ASK_MIXED = 10
_ASK_ONLY_S = 50  # a small folder of s alone is what a search for it finds
_FOUR_RATINGS_SINCE = 2023  # year; a post from then on was rated in four, whatever the source's other posts are
_POSTS = ("danbooru", "gelbooru", "e621", "danbooru2023", "deepghs")  # adapters whose records come with a date

_OPEN: list[Census] = []


def note(kind: Kind, example: str) -> None:
    """Count one thing of the source that is being read; the first example is printed."""
    if _OPEN:
        _OPEN[-1].counts[kind] += 1
        _OPEN[-1].examples.setdefault(kind, example)


class Census:
    """Counts over one source."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self.counts, self.examples = Counter[Kind](), dict[Kind, str]()
        self.records = self.undated = self.unread = self.newest = 0
        self.unread_example = ""
        self.ratings = Counter[str]()

    @contextmanager
    def open(self) -> Iterator[Census]:
        """Take what `note` counts meanwhile."""
        _OPEN.append(self)
        try:
            yield self
        finally:
            _OPEN.pop()

    def see(self, fields: Mapping[str, Any], scheme: str, row: Mapping[str, Any]) -> None:
        """One record that was taken, and the fields that it came from."""
        self.records += 1
        year = row["created_year"] or row["media_year"]
        if year is None and row["created_at"] is None:
            self.undated += 1
        elif year is None:
            self.unread += 1
            self.unread_example = self.unread_example or f"created_at {row['created_at']!r} of {row['key']}"
        else:
            self.newest = max(self.newest, year)
        rating = fields.get("rating")
        if scheme == "gsqe" and isinstance(rating, str) and row["rating"] is not None:
            self.ratings[rating.strip().lower()] += 1

    def lines(self) -> list[str]:
        """What is to be printed, one line per kind."""
        found = [_LINES[kind].format(n=count, example=self.examples[kind]) for kind, count in sorted(self.counts.items())]
        without = self.undated + self.unread
        if self.unread or (without and (without < self.records or self.source.adapter in _POSTS)):
            parts = [f"{self.undated} have no created_at"] if self.undated else []
            parts += [f"{self.unread} have one that cannot be read ({self.unread_example})"] if self.unread else []
            found.append(f"{without} of {self.records} records have no year, so no year tag: {', '.join(parts)}")
        if self._doubtful() and not self._must_ask():
            found.append(f"{self._counted()}: s is read as sensitive; where it means safe, set rating_scheme: sqe")
        return [f"ingest {self.source.name}: {line}" for line in found]

    def question(self) -> str | None:
        """What only the user can know: whether s means safe or sensitive."""
        if not self._must_ask():
            return None
        return (
            f"sources {self.source.name}: {self._counted()}: dumps from before 2022, and most sites but Danbooru, know three "
            "ratings, and their s means safe. Set rating_scheme: sqe (s is safe) or gsqe (s is sensitive) for this source"
        )

    def _doubtful(self) -> bool:
        asked = self.source.rating_scheme is None and self.source.adapter != "danbooru2023"  # its ratings are numbers
        four = any(self.ratings[word] for word in ("g", "general", "sensitive"))
        return asked and not four and self.ratings["s"] > 0 and self.newest < _FOUR_RATINGS_SINCE

    def _must_ask(self) -> bool:
        rated = self.ratings.total()
        return self._doubtful() and rated >= (_ASK_ONLY_S if rated == self.ratings["s"] else _ASK_MIXED)

    def _counted(self) -> str:
        shown = ", ".join(f"{count} {word}" for word, count in sorted(self.ratings.items()))
        return f"none of the {self.ratings.total()} rated posts is g ({shown})"

