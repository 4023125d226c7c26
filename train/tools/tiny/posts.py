"""What the tiny world's posts say: looks, tags, scores and dates of picture `i` of a world, from a seed alone.

The numbers have structure on purpose. Skill is one hidden number per post: it decides how polished the picture is,
and the score (within the rating) and the aesthetic score follow it, so that a selection by either is a selection of
visibly better pictures. Some combinations of hair, eyes and backdrop are never drawn (`HELD_OUT`): prompts for those
show whether a model composes tags or remembers pictures.
"""

from __future__ import annotations

import datetime
import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from train.tools.tiny.draw import BACKGROUNDS, EYES, HAIR, SHIRTS, SKIN, Look

Combination = tuple[str, str, str]  # hair, eyes, background

HELD_OUT_COUNT = 48
EXPRESSIONS = ("smile", "open_mouth", "surprised", "angry", "expressionless", "closed_eyes")
# Width x height before prepare; each ratio lands in one of three buckets of the tiny configs, some only after a crop.
SIZES = ((200, 300), (216, 324), (192, 256), (224, 224), (256, 256), (200, 220), (300, 200), (324, 216), (256, 192))
_SIZE_WEIGHTS = (10, 8, 6, 10, 8, 6, 10, 8, 6)
FORMATS = ("png", "jpg", "webp")
DELETED, BANNED, COPIES = (37, 141, 305, 498), (72, 411), (120, 266, 390, 555)  # posts that prepare must leave out

# name, series, hair, eyes, count tag: adults by trade, made up for this world
CHARACTERS = (
    ("ostrava_(harbor_lights)", "harbor_lights", "blue", "green", "1girl"),
    ("bosun_(harbor_lights)", "harbor_lights", "white", "purple", "1boy"),
    ("marrow_(harbor_lights)", "harbor_lights", "red", "brown", "1boy"),
    ("doctor_sorrel", "quiet_ward", "aqua", "brown", "1girl"),
    ("nurse_tamar", "quiet_ward", "black", "brown", "1girl"),
    ("professor_lind", "quiet_ward", "blonde", "green", "1boy"),
    ("pilot_quill", "paper_skies", "white", "yellow", "1girl"),
    ("engineer_vesna", "paper_skies", "red", "orange", "1girl"),
    ("colonel_ash", "paper_skies", "black", "orange", "1boy"),
    ("baker_juno", "paper_skies", "blonde", "brown", "1other"),
)
# name, weight of the outline
ARTISTS = (("inkwell_anna", 0.7), ("broad_nib", 1.5), ("kettle_studio", 1.0), ("paper_moth", 0.8), ("tin_brush", 1.25))
BACKGROUND_TAGS = {
    "sky": ("sky", "outdoors"), "sunset": ("sunset", "outdoors"), "night": ("night_sky", "night"),
    "beach": ("beach", "outdoors"), "forest": ("forest", "outdoors"), "grey_background": ("grey_background",),
}
# Score by share of the posts of a rating, the quantiles booru scores have (10, 25, 50, 75, 85, 95 %).
_SCORE_KNOTS = {
    "g": ((0.0, -2), (0.1, 1), (0.25, 3), (0.5, 7), (0.75, 14), (0.85, 19), (0.95, 33), (1.0, 90)),
    "s": ((0.0, -2), (0.1, 1), (0.25, 4), (0.5, 9), (0.75, 20), (0.85, 31), (0.95, 62), (1.0, 160)),
}
_FIRST_ID, _FIRST_DAY, _DAYS = 1_000_003, datetime.date(2006, 1, 15), 6880  # to November 2024


@dataclass(frozen=True)
class Post:
    """One post: what to draw, where, and the metadata fields except those that only the written file has."""

    number: int
    look: Look
    width: int
    height: int
    extension: str
    copy_of: int | None
    aesthetic: float  # 0..1, as a classifier of aesthetics would give it
    fields: dict[str, Any]


@dataclass(frozen=True)
class CheckPrompt:
    """A prompt for a combination that was never drawn, and the hair its picture must have."""

    text: str
    hair: str
    width: int
    height: int
    seed: int


def _choose_held_out() -> tuple[Combination, ...]:
    """48 combinations, hair colours in turn, fixed for every world: they do not depend on the world's seed."""
    pick = random.Random("held out")
    hairs = list(HAIR)
    chosen: list[Combination] = []
    while len(chosen) < HELD_OUT_COUNT:
        candidate = (hairs[len(chosen) % len(hairs)], pick.choice(list(EYES)), pick.choice(list(BACKGROUNDS)))
        if candidate not in chosen:
            chosen.append(candidate)
    return tuple(chosen)


HELD_OUT = _choose_held_out()


def check_prompts() -> list[CheckPrompt]:
    """The 48 prompts of the tag-following check, one for each held-out combination."""
    pick = random.Random("check prompts")
    sizes = ((64, 96), (64, 64), (96, 64))
    prompts = []
    for number, (hair, eyes, background) in enumerate(HELD_OUT):
        tags = [pick.choice(("1girl", "1boy")), "original", "solo", f"{hair}_hair", f"{eyes}_eyes"]
        tags += [pick.choice(("long_hair", "short_hair")), pick.choice(EXPRESSIONS[:5])]
        tags += [pick.choice(list(SHIRTS)), *BACKGROUND_TAGS[background], "looking_at_viewer", "portrait"]
        tags += ["hat"] if pick.random() < 0.3 else []
        text = ", ".join(tag.replace("_", " ") for tag in tags)
        prompts.append(CheckPrompt(text, hair, *sizes[number % len(sizes)], seed=1000 + number))
    return prompts


def make_post(seed: int, number: int, count: int) -> Post:
    """Post `number` of a world of `count` posts; a pure function of its arguments."""
    if number in COPIES:
        original = make_post(seed, number - 1, count)
        fields = original.fields | _identity(number, count)
        return Post(number, original.look, original.width, original.height, original.extension, number - 1,
                    original.aesthetic, fields)
    pick = random.Random(f"post {seed} {number}")
    named = pick.choice(CHARACTERS) if pick.random() < 0.35 else None
    look, count_tag, artist = _look(pick, named)
    width, height = pick.choices(SIZES, _SIZE_WEIGHTS)[0]
    rating = pick.choices(("g", "s"), (65, 35))[0]
    fields = _identity(number, count) | {"rating": rating} | _scores(pick, rating, look.skill)
    fields |= _tags(pick, look, count_tag, named, artist, fields["score"])
    aesthetic = round(min(0.999, max(0.001, 0.05 + 0.9 * look.skill + pick.gauss(0, 0.04))), 4)
    return Post(number, look, width, height, pick.choices(FORMATS, (3, 5, 2))[0], None, aesthetic, fields)


def _look(pick: random.Random, named: tuple[str, ...] | None) -> tuple[Look, str, str]:
    while True:
        hair, eyes = (named[2], named[3]) if named else (pick.choice(list(HAIR)), pick.choice(list(EYES)))
        background = pick.choice(list(BACKGROUNDS))
        if (hair, eyes, background) not in HELD_OUT:
            break
    count_tag = named[4] if named else pick.choices(("1girl", "1boy", "1other"), (5, 4, 1))[0]
    artist, line = pick.choice(ARTISTS)
    look = Look(
        hair=hair, eyes=eyes, expression=pick.choice(EXPRESSIONS), background=background,
        shirt=pick.choice(list(SHIRTS)), hat=pick.random() < 0.3, glasses=pick.random() < 0.2,
        beard=count_tag == "1boy" and pick.random() < 0.4, long_hair=pick.random() < 0.5,
        skin=pick.choices(list(SKIN), (5, 2, 2))[0], line=line, skill=pick.random(),
    )
    return look, count_tag, artist


def _identity(number: int, count: int) -> dict[str, Any]:
    """Id, dates and state flags: ids and days rise together, so that the year of a post is spread over all ranges."""
    pick = random.Random(f"identity {number} {count}")
    day = _FIRST_DAY + datetime.timedelta(days=number * _DAYS // max(1, count - 1))
    hour, minute, second, thousandth = (pick.randrange(n) for n in (24, 60, 60, 1000))
    clock = f"{hour:02d}:{minute:02d}:{second:02d}.{thousandth:03d}-05:00"
    return {
        "id": _FIRST_ID + 7 * number, "created_at": f"{day.isoformat()}T{clock}",
        "is_deleted": number in DELETED, "is_banned": number in BANNED, "is_pending": False, "is_flagged": False,
        "parent_id": None, "has_children": False, "source": "", "uploader_id": 1 + pick.randrange(40),
    }


def _scores(pick: random.Random, rating: str, skill: float) -> dict[str, Any]:
    """Scores whose quantiles within a rating are those of the knots, because skill is uniform and moved only a bit."""
    share = min(1.0, max(0.0, skill + pick.gauss(0, 0.03)))
    knots = _SCORE_KNOTS[rating]
    for (low_share, low), (high_share, high) in itertools.pairwise(knots):
        if share <= high_share:
            # up, so that scores at most T are exactly the share below T's knot
            score = math.ceil(low + (high - low) * (share - low_share) / (high_share - low_share))
            break
    down = pick.randrange(3) if score >= 0 else -score + pick.randrange(2)
    return {"score": score, "up_score": score + down, "down_score": -down, "fav_count": max(0, round(1.4 * score))}


def _tags(pick: random.Random, look: Look, count_tag: str, named: tuple[str, ...] | None, artist: str,
          score: int) -> dict[str, Any]:
    general = [count_tag, "solo", f"{look.hair}_hair", "long_hair" if look.long_hair else "short_hair", look.expression]
    general += [] if look.expression == "closed_eyes" else [f"{look.eyes}_eyes", "looking_at_viewer"]
    general += [look.shirt, *BACKGROUND_TAGS[look.background], "portrait"]
    general += [tag for tag, worn in (("hat", look.hat), ("glasses", look.glasses), ("beard", look.beard)) if worn]
    general += [look.skin] if look.skin else []
    meta = [tag for tag, holds in (("lowres", look.skill < 0.2), ("highres", look.skill > 0.5),
                                   ("absurdres", look.skill > 0.8)) if holds]
    meta += ["commentary_request"] if pick.random() < 0.2 else []
    groups = {"general": sorted(general), "character": [named[0]] if named else [],
              "copyright": [named[1] if named else "original"], "artist": [artist], "meta": sorted(meta)}
    fields: dict[str, Any] = {"tag_string": " ".join(sorted(tag for group in groups.values() for tag in group))}
    for name, group in groups.items():
        fields[f"tag_string_{name}"] = " ".join(group)
        fields[f"tag_count_{name}"] = len(group)
    return fields | {"tag_count": sum(map(len, groups.values()))}
