"""One picture of the tiny world: the bust of a simple, original cartoon adult, drawn from a frozen description.

Everything is laid out in head radii around a head centre that depends only on the picture's size, so a checker
knows where the hair of any picture is without looking for it (`hair_boxes`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

Colour = tuple[int, int, int]

# The hues stay clearly apart, because the checker names a picture's hair by the nearest of them.
# Far apart in the committed VAE's latents, where a tiny model draws all colours nearer to each other than they are; the
# night is no darker than black hair, which it would else give to everything.
HAIR: dict[str, Colour] = {
    "black": (20, 18, 26),
    "blonde": (242, 206, 84),
    "red": (204, 28, 32),
    "aqua": (74, 220, 255),
    "blue": (34, 50, 160),
    "white": (238, 239, 245),
}
# Of characters that no post of the world shows (train/tools/tiny/character.py); the committed VAE gives it back as it is, as
# it does no green of this size.
NEW_HAIR: dict[str, Colour] = {"pink": (240, 120, 190)}
_ANY_HAIR = HAIR | NEW_HAIR
# No hair colour's word is used for anything else, so that a bag of words tells the hair; eyes and clothes share theirs.
EYES: dict[str, Colour] = {
    "brown": (120, 70, 30),
    "green": (30, 160, 70),
    "purple": (130, 60, 190),
    "orange": (235, 130, 20),
    "yellow": (225, 190, 30),
}
SHIRTS: dict[str, Colour] = {
    "orange_shirt": (232, 134, 46),
    "green_shirt": (70, 170, 100),
    "grey_jacket": (128, 132, 140),
    "brown_jacket": (122, 84, 56),
    "purple_sweater": (128, 82, 168),
}
# Top and bottom of the backdrop; a gradient between them.
BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {
    "sky": ((150, 203, 246), (214, 236, 252)),
    "sunset": ((236, 130, 92), (250, 208, 140)),
    "night": ((62, 62, 120), (104, 96, 150)),
    "beach": ((176, 222, 240), (232, 212, 160)),
    "forest": ((120, 160, 110), (74, 112, 76)),
    "grey_background": ((196, 196, 200), (196, 196, 200)),
}
SKIN: dict[str, Colour] = {"": (246, 212, 184), "tan": (222, 170, 126), "dark_skin": (146, 98, 70)}
HAT: Colour = (104, 72, 128)
_INK: Colour = (40, 30, 40)
_OVERSAMPLE = 3  # drawn larger and averaged down, because ImageDraw does not antialias


@dataclass(frozen=True)
class Look:
    """What is visible in one picture; names are keys of the tables above, `skill` is 0 (clumsy) to 1 (polished)."""

    hair: str
    eyes: str
    expression: str
    background: str
    shirt: str
    hat: bool
    glasses: bool
    beard: bool
    long_hair: bool
    skin: str
    line: float
    skill: float


def head_of(width: int, height: int) -> tuple[float, float, float]:
    """(centre x, centre y, head radius) in pixels of a picture of this size."""
    return width / 2, 0.46 * height, 0.29 * min(width, height)


def hair_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) pixel boxes that hold only hair: the strands beside the cheeks, never under a hat."""
    centre_x, centre_y, radius = head_of(width, height)
    top, bottom = centre_y - 0.35 * radius, centre_y + 0.45 * radius
    boxes = []
    for side in (-1, 1):
        near, far = centre_x + side * 1.08 * radius, centre_x + side * 1.36 * radius
        boxes.append((round(min(near, far)), round(top), round(max(near, far)), round(bottom)))
    return boxes


def draw(look: Look, width: int, height: int, seed: int) -> Image.Image:
    """An RGB picture of width x height pixels; equal arguments give equal pixels."""
    jitter = random.Random(seed)
    scale = _OVERSAMPLE
    image = Image.new("RGB", (width * scale, height * scale))
    pen = ImageDraw.Draw(image)
    centre_x, centre_y, radius = (scale * v for v in head_of(width, height))
    centre_x += jitter.uniform(-0.02, 0.02) * radius
    centre_y += jitter.uniform(-0.02, 0.02) * radius
    ink = max(1, round(look.line * (0.4 + 0.6 * look.skill) * radius * 0.06))
    _backdrop(image, pen, look, jitter)
    place = _Place(pen, centre_x, centre_y, radius, ink)
    _hair_behind(place, look)
    _body(place, look, image.height)
    _face(place, look)
    _hair_before(place, look)
    _features(place, look)
    if look.hat:
        _hat(place)
    return _finish(image.resize((width, height), Image.Resampling.BOX), look)


@dataclass(frozen=True)
class _Place:
    """A pen whose coordinates are head radii from the head's centre."""

    pen: ImageDraw.ImageDraw
    x: float
    y: float
    radius: float
    ink: int

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        r = self.radius
        return self.x + left * r, self.y + top * r, self.x + right * r, self.y + bottom * r

    def points(self, pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(self.x + u * self.radius, self.y + v * self.radius) for u, v in pairs]

    def oval(self, box: tuple[float, float, float, float], fill: Colour, outline: bool = True) -> None:
        self.pen.ellipse(self.box(*box), fill=fill, outline=_INK if outline else None, width=self.ink)

    def shape(self, pairs: list[tuple[float, float]], fill: Colour) -> None:
        points = self.points(pairs)
        self.pen.polygon(points, fill=fill)
        self.pen.line([*points, points[0]], fill=_INK, width=self.ink, joint="curve")


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (max(0, min(255, round(c * factor))) for c in colour)
    return red, green, blue


def _backdrop(image: Image.Image, pen: ImageDraw.ImageDraw, look: Look, jitter: random.Random) -> None:
    top, bottom = BACKGROUNDS[look.background]
    for y in range(image.height):
        share = y / max(1, image.height - 1)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True))
        pen.line([(0, y), (image.width, y)], fill=colour)
    if look.background == "night":
        size = max(2, image.width // 90)
        for _ in range(14):
            x, y = jitter.randrange(image.width), jitter.randrange(image.height)
            pen.ellipse((x, y, x + size, y + size), fill=(240, 240, 200))
    elif look.background == "sunset":
        side = 0.3 * min(image.size)
        pen.ellipse((0.04 * image.width, 0.1 * image.height, 0.04 * image.width + side, 0.1 * image.height + side),
                    fill=(255, 236, 170))


def _hair_behind(place: _Place, look: Look) -> None:
    colour = _ANY_HAIR[look.hair]
    end = 1.75 if look.long_hair else 0.75
    place.oval((-1.48, -1.5, 1.48, 1.1), colour)
    place.shape([(-1.46, -0.2), (-1.46, end), (-0.7, end), (-0.7, 0.6), (0.7, 0.6), (0.7, end), (1.46, end),
                 (1.46, -0.2)], colour)
    place.pen.rectangle(place.box(-1.38, -0.4, 1.38, 0.62), fill=colour)


def _body(place: _Place, look: Look, bottom: int) -> None:
    shirt, floor = SHIRTS[look.shirt], (bottom - place.y) / place.radius + 0.2
    place.shape([(-0.3, 0.8), (0.3, 0.8), (0.34, 1.6), (-0.34, 1.6)], _shade(SKIN[look.skin], 0.92))
    place.shape([(-0.45, 1.32), (0.0, 1.7), (0.45, 1.32), (1.25, 1.66), (1.55, floor), (-1.55, floor), (-1.25, 1.66)],
                shirt)
    if look.shirt.endswith("jacket"):
        place.pen.line(place.points([(0.0, 1.7), (0.0, floor)]), fill=_INK, width=place.ink)


def _face(place: _Place, look: Look) -> None:
    skin = SKIN[look.skin]
    place.oval((-0.94, -0.98, 0.94, 1.08), skin)
    if look.beard:
        place.pen.pieslice(place.box(-0.9, -0.7, 0.9, 1.06), 25, 155, fill=_shade(_ANY_HAIR[look.hair], 0.8))
        place.oval((-0.55, -0.2, 0.55, 0.72), skin, outline=False)


def _hair_before(place: _Place, look: Look) -> None:
    colour = _ANY_HAIR[look.hair]
    place.pen.pieslice(place.box(-1.2, -1.42, 1.2, 0.95), 190, 350, fill=colour)
    place.shape([(-1.1, -0.45), (-0.6, -0.62), (-0.15, -0.3), (0.3, -0.66), (0.7, -0.4), (1.1, -0.45), (0.8, -1.1),
                 (0.0, -1.36), (-0.8, -1.1)], colour)
    place.pen.polygon(place.points([(-1.06, -0.5), (-0.62, -0.68), (0.3, -0.72), (1.06, -0.5), (0.78, -1.06),
                                    (0.0, -1.3), (-0.78, -1.06)]), fill=colour)
    if look.skill > 0.75:  # the polish that the curated selections have and the rest lacks
        glow = tuple(round(c + 0.55 * (255 - c)) for c in colour)
        place.pen.arc(place.box(-0.95, -1.25, 0.95, 0.5), 215, 300, fill=glow, width=max(2, round(0.1 * place.radius)))


def _features(place: _Place, look: Look) -> None:
    for side in (-1, 1):
        x = 0.4 * side
        if look.expression == "closed_eyes":
            place.pen.arc(place.box(x - 0.22, -0.12, x + 0.22, 0.2), 200, 340, fill=_INK, width=2 * place.ink)
        else:
            place.oval((x - 0.22, -0.16, x + 0.22, 0.2), (255, 255, 255))
            place.oval((x - 0.15, -0.14, x + 0.15, 0.18), EYES[look.eyes], outline=False)
            place.oval((x - 0.06, -0.05, x + 0.06, 0.09), (15, 12, 18), outline=False)
        tilt = {"angry": 0.12, "surprised": -0.08}.get(look.expression, 0.0)
        place.pen.line(place.points([(x - 0.22, -0.32 - tilt * -side), (x + 0.22, -0.32 + tilt * -side)]),
                       fill=_INK, width=2 * place.ink)
        if look.glasses:
            place.pen.ellipse(place.box(x - 0.33, -0.27, x + 0.33, 0.32), outline=_INK, width=2 * place.ink)
    if look.glasses:
        place.pen.line(place.points([(-0.08, 0.0), (0.08, 0.0)]), fill=_INK, width=2 * place.ink)
    _mouth(place, look.expression)


def _mouth(place: _Place, expression: str) -> None:
    ink = 2 * place.ink
    if expression in ("smile", "closed_eyes"):
        place.pen.arc(place.box(-0.3, 0.2, 0.3, 0.62), 20, 160, fill=_INK, width=ink)
    elif expression == "open_mouth":
        place.oval((-0.24, 0.4, 0.24, 0.72), (170, 50, 60))
    elif expression == "surprised":
        place.oval((-0.11, 0.42, 0.11, 0.68), (120, 40, 50))
    elif expression == "angry":
        place.pen.arc(place.box(-0.26, 0.5, 0.26, 0.85), 200, 340, fill=_INK, width=ink)
    else:
        place.pen.line(place.points([(-0.2, 0.54), (0.2, 0.54)]), fill=_INK, width=ink)


def _hat(place: _Place) -> None:
    place.shape([(-0.95, -0.82), (-0.8, -1.6), (0.8, -1.6), (0.95, -0.82)], HAT)
    place.pen.rectangle(place.box(-0.93, -1.05, 0.93, -0.88), fill=_shade(HAT, 0.6))
    place.oval((-1.5, -0.95, 1.5, -0.62), HAT)


def _finish(image: Image.Image, look: Look) -> Image.Image:
    """Clumsy pictures are blurred and flat; the score of their post says the same."""
    weakness = max(0.0, 0.5 - look.skill) * 2
    if weakness <= 0:
        return image
    radius = weakness * 0.014 * math.sqrt(image.width * image.height)
    return ImageEnhance.Contrast(image.filter(ImageFilter.GaussianBlur(radius))).enhance(1 - 0.25 * weakness)
