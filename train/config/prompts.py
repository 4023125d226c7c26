"""The prompts file: which pictures a stage shows, and the inference settings they are made with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from train.base.errors import ExitCode, Halt
from train.config.key import key
from train.config.schema import all_problems, load_into
from train.config.sound import judged

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


@dataclass(frozen=True)
class Prompt:
    """One picture to make. `index` numbers the prompts of a file; with the seed it decides the noise."""

    text: str = key(MISSING, "what the picture shows")
    width: int = key(832, "of the picture in px, a multiple of 8", at_least=MIN_SIDE_PX, at_most=MAX_SIDE_PX)
    height: int = key(1216, "of the picture in px, a multiple of 8", at_least=MIN_SIDE_PX, at_most=MAX_SIDE_PX)
    seed: int = key(0, "of its noise, below 2^64", at_least=0)
    index: int = key(-1, "with the seed it decides the noise; -1 = its place in the file", at_least=-1)


@dataclass(frozen=True)
class PromptsFile:
    """Settings shared by all prompts of a file, and the prompts."""

    sampler: Sampler = key("euler_a", "one of the three that the picture's text names; default = the card's")
    steps: int = key(28, "card: fewer than 30", at_least=1, at_most=MAX_STEPS)
    guidance: float = key(7.0, "card: 5 to 7", at_least=0, at_most=100)
    guidance_rescale: float = key(0.0, "share of the guided prediction that is brought back to the deviation of the unguided one; 0 = off, 0.7 = of its paper, for v with zero terminal SNR", at_least=0, at_most=1)
    negative: str = key(NEGATIVE, "what the picture must not show; default = the card's")
    quality_prefix: str = key(QUALITY_PREFIX, "put before every text; default = the card's")
    prompts: list[Prompt] = key(list, "the pictures to make")


def load_prompts(path: str | Path, overrides: Sequence[str] = ()) -> PromptsFile:
    """The prompts file at `path`, complete and checked, each prompt numbered.

    Raises Halt(USAGE) naming the key (`prompts[2].width`) and the file.
    """
    try:
        return _numbered(load_into(PromptsFile, [path], overrides, [_problems]))
    except Halt as halt:
        prefix = "" if str(path) in halt.message else f"{path}: "
        raise Halt(halt.code, f"{prefix}{halt.message}") from halt


def checked(settings: PromptsFile) -> PromptsFile:
    """`settings` with numbered prompts, or Halt(USAGE) listing everything that is out of range."""
    if problems := all_problems(PromptsFile, asdict(settings), [_problems]):
        raise Halt(ExitCode.USAGE, "; ".join(problems))
    return _numbered(settings)


def _numbered(settings: PromptsFile) -> PromptsFile:
    numbered = [replace(p, index=number if p.index < 0 else p.index) for number, p in enumerate(settings.prompts)]
    return replace(settings, prompts=numbered)


def _problems(settings: PromptsFile) -> Iterator[str]:
    rules: list[Callable[[PromptsFile], str | None]] = [
        lambda s: None if 1 <= len(s.prompts) <= MAX_PROMPTS else
        f"prompts holds {len(s.prompts)} entries, must be 1 to {MAX_PROMPTS}",
        lambda s: _text_problem("negative", s.negative),
        lambda s: _text_problem("quality_prefix", s.quality_prefix),
    ]  # fmt: skip
    yield from judged(settings, rules)
    for number, prompt in enumerate(settings.prompts):
        rules_of_one: list[Callable[[Prompt], str | None]] = [
            lambda p: _text_problem("text", p.text),
            lambda p: f"width is {p.width}, must be a multiple of 8" if p.width % 8 else None,
            lambda p: f"height is {p.height}, must be a multiple of 8" if p.height % 8 else None,
            lambda p: None if p.seed < 2**64 else f"seed is {p.seed}, must be 0 to 2^64-1",
        ]
        yield from (f"prompts[{number}].{problem}" for problem in judged(prompt, rules_of_one))


def _text_problem(key: str, text: str) -> str | None:
    # A byte of the command line that is no UTF-8 arrives as half a surrogate pair: no tokenizer and no PNG takes it.
    return None if _is_utf8(text) else f"{key} holds what cannot be written as UTF-8"


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
