"""A small CLIP vocabulary: bytes, bytes at a word's end, merges learnt from the tiny world's tags, begin, end.

Built by counting alone, with ties in alphabetical order, so it is the same on every machine. It is CLIP's in all but
size: lower-cased, "</w>" at word ends, "!" is id 0, begin and end are the last two ids.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from train.model.clip_tokens import BOS, EOS, byte_letters
from train.tools.tiny.draw import SKIN
from train.tools.tiny.posts import ARTISTS, CHARACTERS, HELD_OUT_COUNT, check_prompts, make_post

_MERGES = 400
# Words that only captions and prompts have, not the posts: the card's special tags and negative prompt.
_SPECIAL = (
    "masterpiece, best quality, great quality, good quality, normal quality, low quality, worst quality, safe, "
    "sensitive, nsfw, explicit, newest, recent, mid, early, oldest, very aesthetic, aesthetic, displeasing, "
    "very displeasing, absurdres, highres, lowres, bad, text, error, fewer, extra, missing, jpeg artifacts, watermark, "
    "unfinished, chromatic aberration, signature, extra digits, artistic error, username, scan, abstract"
)


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order of rank)."""
    words = {_symbols(word): count for word, count in sorted(_corpus().items())}
    merges: list[tuple[str, str]] = []
    while len(merges) < _MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(symbols, best): count for symbols, count in words.items()}
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """A `CLIPTokenizer` folder, with the vocab.json and merges.txt that older transformers need."""
    from transformers import CLIPTokenizer

    vocabulary, merges = build_vocabulary()
    tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)
    tokenizer.save_pretrained(str(folder))
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _corpus() -> Counter[str]:
    """Words of a sample of posts, of every name, and of the special tags, with counts."""
    texts = [make_post(0, 1000 + number, 3000).fields["tag_string"] for number in range(400)]
    texts += [prompt.text for prompt in check_prompts()]
    texts += [" ".join([*character[:2]]) for character in CHARACTERS] + [name for name, _ in ARTISTS]
    texts += [_SPECIAL] * HELD_OUT_COUNT + list(SKIN)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower().replace("_", " ")))
    return words


def _symbols(word: str) -> tuple[str, ...]:
    return (*word[:-1], word[-1] + "</w>")


def _merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result, position = [], 0
    while position < len(symbols):
        if symbols[position : position + 2] == pair:
            result.append("".join(pair))
            position += 2
        else:
            result.append(symbols[position])
            position += 1
    return tuple(result)
