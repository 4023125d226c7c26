"""CLIP's tokenizers, shipped with the project: what a single file means, which carries none.

SDXL's two tokenizers have one vocabulary, made of CLIP's public list of merges (assets/, MIT), and differ in the
token they pad with. A model with another number of rows in its token embedding has tokenizers of its own.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

ASSET = Path(__file__).parent / "assets" / "clip_merges.txt.gz"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PADS = {"tokenizer": EOS, "tokenizer_2": "!"}  # as SDXL's folder declares them
ROWS = 49408  # of the token embedding: bytes, bytes at a word's end, merges, begin and end


def merges() -> list[tuple[str, str]]:
    """CLIP's merges in order of rank."""
    lines = gzip.decompress(ASSET.read_bytes()).decode("utf-8").splitlines()
    return [(first, second) for first, _, second in (line.partition(" ") for line in lines)]


def byte_letters() -> list[str]:
    """One printable letter per byte, in CLIP's order: printable ASCII and Latin-1 first, then stand-ins."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    stand_ins = [chr(256 + number) for number in range(256 - len(printable))]
    return [chr(byte) for byte in printable] + stand_ins


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters, pairs = byte_letters(), merges()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs), BOS, EOS]
    return {token: number for number, token in enumerate(tokens)}, pairs


def tokenizer(name: str) -> Any:
    """CLIPTokenizer of encoder 1 ("tokenizer") or encoder 2 ("tokenizer_2")."""
    from transformers import CLIPTokenizer

    vocabulary, pairs = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(pairs), pad_token=PADS[name], model_max_length=77)


def unlike(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the shipped tokenizers do not go with these encoders, or None where they do."""
    rows = {int(configs[encoder].get("vocab_size", ROWS)) for encoder in ("text_encoder", "text_encoder_2")}
    if rows == {ROWS}:
        return None
    counts = " and ".join(str(number) for number in sorted(rows))
    return f"its token embeddings have {counts} rows, CLIP's tokenizers {ROWS} tokens"
