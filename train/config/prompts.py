"""The prompts file: which pictures a stage shows, and the inference settings they are made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from train.base.errors import ExitCode, Halt
from train.config.schema import load_into

Sampler = Literal["euler_a", "euler", "dpmpp_2m"]
SAMPLER_TITLES: Mapping[Sampler, str] = {"euler_a": "Euler a", "euler": "Euler", "dpmpp_2m": "DPM++ 2M"}

# The card's nine sizes, width x height; all nine are training buckets.
CARD_SIZES = (
    (1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216),
    (1344, 768), (768, 1344), (1536, 640), (640, 1536),
)  # fmt: skip
QUALITY_PREFIX = "masterpiece, best quality, very aesthetic, absurdres"  # card
NEGATIVE = (  # card; round and square brackets are plain text to the tokenizer, as in diffusers
    "nsfw, lowres, (bad), text, error, fewer, extra, missing, worst quality, jpeg artifacts, low quality, watermark, "
    "unfinished, displeasing, oldest, early, chromatic aberration, signature, extra digits, artistic error, username, "
    "scan, [abstract]"
)
OUR_MARKS = ("RNG: Philox", "Noise index: ")  # in the last line of our pictures' text, together in nobody else's
MAX_STEPS, MIN_SIDE_PX, MAX_SIDE_PX, MAX_PROMPTS = 1000, 32, 8192, 1000
MULTIPLES = f"a multiple of 8 from {MIN_SIDE_PX} to {MAX_SIDE_PX}"


@dataclass(frozen=True)
class Prompt:
    """One picture to make. `index` numbers the prompts of a file; with the seed it decides the noise."""

    text: str = MISSING
    width: int = 832
    height: int = 1216
    seed: int = 0
    index: int = -1  # -1 = its place in the file


@dataclass(frozen=True)
class PromptsFile:
    """Settings shared by all prompts of a file, and the prompts."""

    sampler: Sampler = "euler_a"  # card
    steps: int = 28  # card: fewer than 30
    guidance: float = 7.0  # card: 5 to 7
    negative: str = NEGATIVE
    quality_prefix: str = QUALITY_PREFIX
    prompts: list[Prompt] = field(default_factory=list)


def load_prompts(path: str | Path, overrides: Sequence[str] = ()) -> PromptsFile:
    """The prompts file at `path`, complete and checked, each prompt numbered.

    Raises Halt(USAGE) naming the key (`prompts[2].width`) and the file.
    """
    try:
        return checked(load_into(PromptsFile, [path], overrides))
    except Halt as halt:
        prefix = "" if str(path) in halt.message else f"{path}: "
        raise Halt(halt.code, f"{prefix}{halt.message}") from halt


def checked(settings: PromptsFile) -> PromptsFile:
    """`settings` with numbered prompts, or Halt(USAGE) listing everything that is out of range."""
    problems = []
    if not 1 <= settings.steps <= MAX_STEPS:
        problems.append(f"steps is {settings.steps}, must be 1 to {MAX_STEPS}")
    if not 0 <= settings.guidance <= 100:
        problems.append(f"guidance is {settings.guidance}, must be 0 to 100")
    if not 1 <= len(settings.prompts) <= MAX_PROMPTS:
        problems.append(f"prompts holds {len(settings.prompts)} entries, must be 1 to {MAX_PROMPTS}")
    texts = {"negative": settings.negative, "quality_prefix": settings.quality_prefix}
    texts |= {f"prompts[{number}].text": prompt.text for number, prompt in enumerate(settings.prompts)}
    # A byte of the command line that is no UTF-8 arrives as half a surrogate pair: no tokenizer and no PNG takes it.
    problems += [f"{name} holds what cannot be written as UTF-8" for name, text in texts.items() if not _is_utf8(text)]
    for number, prompt in enumerate(settings.prompts):
        for side, pixels in (("width", prompt.width), ("height", prompt.height)):
            if not MIN_SIDE_PX <= pixels <= MAX_SIDE_PX or pixels % 8:
                problems.append(f"prompts[{number}].{side} is {pixels}, must be {MULTIPLES}")
        if not 0 <= prompt.seed < 2**64:
            problems.append(f"prompts[{number}].seed is {prompt.seed}, must be 0 to 2^64-1")
    if problems:
        raise Halt(ExitCode.USAGE, "; ".join(problems))
    numbered = [replace(p, index=number if p.index < 0 else p.index) for number, p in enumerate(settings.prompts)]
    return replace(settings, prompts=numbered)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
