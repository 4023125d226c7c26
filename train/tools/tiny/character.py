"""Pictures of somebody new with a text beside each, as people bring them: a character whom the world's posts never show.

Her hair has a colour that the tiny base has never seen on a head, and no text names it: only her name can bring it back.
"""

from __future__ import annotations

import random
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.base.files import replace_file
from train.tools.tiny.draw import BACKGROUNDS, SHIRTS, Look, draw
from train.tools.tiny.posts import BACKGROUND_TAGS, EXPRESSIONS, SIZES, CheckPrompt

NAME, HAIR, EYES = "mirelle", "aqua", "orange"
PROMPTS = 48
_MARK = 0.8  # skill: a clean drawing


def write_character(folder: Path, images: int, seed: int) -> int:
    """Draw `images` pictures NNN.png with NNN.txt into `folder`; how many are new.

    Raises Halt: MISMATCH where others lie there, CANNOT_WRITE.
    """
    try:
        return _write(folder, images, seed)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"{folder}: {error.strerror}") from error


def _write(folder: Path, images: int, seed: int) -> int:
    names = [f"{number:03d}" for number in range(images)]
    if folder.is_dir() and (others := sorted(path.name for path in folder.iterdir() if path.stem not in names)):
        raise Halt(ExitCode.MISMATCH, f"{folder} holds {others[0]} and {len(others) - 1} other files: choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for number, name in enumerate(names):
        text, picture = folder / f"{name}.txt", folder / f"{name}.png"
        pick = random.Random(f"{NAME} {seed} {number}")
        look, (width, height) = _look(pick), pick.choice(SIZES)
        if not picture.exists():
            draw(look, width, height, seed * 1_000_003 + number).save(picture)
            drawn += 1
        if not text.exists():
            replace_file(text, caption(look) + "\n")
    return drawn


def caption(look: Look) -> str:
    """Her name and what changes from picture to picture; her hair and eyes are not named, so that the name takes them in."""
    tags = [NAME, "1girl", "solo", "long_hair" if look.long_hair else "short_hair", look.expression, look.shirt]
    tags += [*BACKGROUND_TAGS[look.background], "looking_at_viewer", "portrait", *(["hat"] if look.hat else [])]
    return ", ".join(tag.replace("_", " ") for tag in tags)


def _look(pick: random.Random) -> Look:
    return Look(
        hair=HAIR, eyes=EYES, expression=pick.choice(EXPRESSIONS[:5]), background=pick.choice(list(BACKGROUNDS)),
        shirt=pick.choice(list(SHIRTS)), hat=pick.random() < 0.2, glasses=False, beard=False, long_hair=pick.random() < 0.5,
        skin="", line=1.0, skill=_MARK,
    )  # fmt: skip


def character_prompts() -> list[CheckPrompt]:
    """48 prompts with her name, in three sizes; what else they ask for is drawn anew, and her hair is not named."""
    sizes = ((64, 96), (64, 64), (96, 64))
    looks = [_look(random.Random(f"{NAME} prompt {number}")) for number in range(PROMPTS)]
    return [CheckPrompt(caption(look), HAIR, *sizes[number % 3], seed=2000 + number) for number, look in enumerate(looks)]
