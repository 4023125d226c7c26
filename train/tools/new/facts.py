"""What new.py has seen before it decides: plain values, so that deciding is a function of them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GOALS = ("character", "style", "concept", "continue")


@dataclass(frozen=True)
class Layout:
    """How pictures and their texts lie: the keys of a dataset source, and what was seen that says so."""

    keys: Mapping[str, Any]  # of `sources[]`, without name; adapter and path among them
    seen: Mapping[str, str]  # by key: what says so
    pictures: int  # files or rows
    folders: Mapping[str, int] = field(default_factory=dict)  # kohya's `10_name`: pictures in it
    remarks: tuple[str, ...] = ()  # what lies there beside that and is not taken
    separator: str | None = None  # of a dataset TOML


@dataclass(frozen=True)
class Captions:
    """What the captions are made of. Counts are of the records looked at."""

    looked: int = 0
    whole: bool = True  # all records were looked at
    captioned: int = 0
    tagged: int = 0
    told: int = 0  # with sentences
    both: int = 0
    several: int = 0  # with several texts or captions of tags, of which one is drawn each time
    separator: str | None = None  # mark between fixed and flexible tags
    tags_each: int = 0  # median
    tokens: int = 0  # that 95 of 100 captions stay below, about
    shared: tuple[tuple[str, float, int], ...] = ()  # (tag, share of captions, usual place) of those that most hold
    trigger: str | None = None  # as the captions are written
    trigger_place: int | None = None  # always there, counted from 0; None = here and there, or in sentences
    trigger_why: str = ""
    characters: tuple[tuple[str, float], ...] = ()  # of posts that say so
    artists: tuple[tuple[str, float], ...] = ()
    rated: int = 0
    scored: int = 0
    dated: int = 0
    unsafe: int = 0  # rated q or e
    excluded: int = 0  # by the hard exclusions
    refused: int = 0
    first_refusal: str = ""
    examples: tuple[str, ...] = ()  # captions to draw pictures from
    keys: tuple[str, ...] = ()  # of all records, where all were looked at


@dataclass(frozen=True)
class Pictures:
    """Sizes from the headers, and doubles."""

    looked: int = 0
    unreadable: int = 0
    reasons: tuple[str, ...] = ()
    median_px: tuple[int, int] = (0, 0)
    areas_px: tuple[int, int, int] = (0, 0, 0)  # tenth, median, largest tenth
    enlarged: float = 0.0  # share below the base's own area
    half: float = 0.0  # share below 9/16 of it
    extreme: int = 0  # beyond probe.max_aspect
    animated: int = 0
    sizes: tuple[tuple[int, int], ...] = ()  # training sizes, most pictures first
    doubles: int = 0  # equal files
    alike: int = 0  # looked alike
    compared: int = 0  # pictures whose pixels were looked at


@dataclass(frozen=True)
class Base:
    """What the model to start from is."""

    path: str
    asked: str  # as it was given
    side_px: int = 1024  # of the square it was made for
    standard: bool = True  # SDXL's own size
    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    vocabulary: str | None = None
    vocabulary_mark: str = ""
    license: str | None = None
    tokenizers: str | None = None
    conditioning: Mapping[str, Any] = field(default_factory=dict)  # keys of a stage that its training decided
    commit: str | None = None


@dataclass(frozen=True)
class Machine:
    """The card and what is around it."""

    gpu: str | None  # None = the processor trains
    free_gib: float
    how: str
    bf16: bool
    cores: int
    host_gib: float
    disk_gb: float
    peft: bool


@dataclass(frozen=True)
class Asked:
    """What the user said beside the folder."""

    out: str
    name: str  # of the stage and its files
    folder: str  # what the pictures' folder is called
    goal: str | None = None
    trigger: str | None = None
    vocabulary: str | None = None
    tagger: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Set:
    """One folder of pictures."""

    layout: Layout  # of its first source; pictures, folders and remarks of all
    captions: Captions
    pictures: Pictures
    others: tuple[Layout, ...] = ()  # its further sources


@dataclass(frozen=True)
class Facts:
    """All that decides."""

    asked: Asked
    base: Base
    machine: Machine
    own: Set
    prior: Set | None = None

    @property
    def beside(self) -> bool:
        """Whether pictures of the class are trained beside the user's own: what opens every caption would open theirs."""
        return self.prior is not None or any("weight" in layout.keys for layout in self.own.others)
