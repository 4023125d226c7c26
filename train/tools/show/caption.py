"""One caption as the networks get it: tags, draws, ids per chunk for both encoders, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config import source_rules
from train.model import text
from train.model.text import Overflow, TagTokenizer
from train.recipe import captions, rng


def load(folder: Path | None) -> TagTokenizer:
    """Tokenizers of a folder with tokenizer/ and tokenizer_2/, or of one tokenizer folder; None = the shipped ones."""
    if folder is None or (folder / "tokenizer").is_dir():
        return text.load_tag_tokenizer(folder)
    return TagTokenizer(text.load_tokenizer(folder))


def report(
    caption: str,
    tokenizer: TagTokenizer,
    *,
    draws: int = 0,
    separator: str = captions.SEPARATOR,
    max_tokens: int = 225,
    overflow: Overflow = "tag",
    seed: int = 0,
) -> dict[str, Any]:
    """The caption as written, and as shuffled in the epochs 0 .. draws-1 of an image named by the caption itself."""
    if (problem := source_rules.separator_problem(separator)) is not None:
        raise Halt(ExitCode.USAGE, f"--separator is {separator!r}: {problem}")
    if draws < 0:
        raise Halt(ExitCode.USAGE, f"--draws is {draws}, must be at least 0")
    if (found := len(captions.parts(caption, separator)) - 1) > 1:  # as at ingest: the rest would leak into a tag
        raise Halt(ExitCode.USAGE, f"the caption holds {found} separators {separator}: one at most")
    fixed, flex = captions.split(caption, separator)
    drawn = [
        captions.draw(fixed, flex, captions.DrawOptions(), seed=seed, uid=rng.uid_of(caption), epoch=epoch, update=0)
        for epoch in range(draws)
    ]
    return {
        "caption": caption,
        "fixed": fixed,
        "flex": flex,
        **_encoded(fixed, flex, tokenizer, max_tokens, overflow),
        "draws": [
            {"epoch": epoch, **_encoded(*tags, tokenizer, max_tokens, overflow)} for epoch, tags in enumerate(drawn)
        ],
    }


def _encoded(
    fixed: Sequence[str], flex: Sequence[str], tokenizer: TagTokenizer, max_tokens: int, overflow: Overflow
) -> dict[str, Any]:
    tags = [*fixed, *flex]
    ids, lost = tokenizer.fit(fixed, flex, max_tokens, overflow)
    ids_1, ids_2 = tokenizer.chunk_ids(ids, max_tokens)
    return {
        "text": captions.join(tags),
        "tokens": len(tokenizer.content_ids(tags)),
        "tokens_kept": len(ids),
        "tags_cut": tags[len(tags) - lost :],
        "encoder_1": ids_1.tolist(),
        "encoder_2": ids_2.tolist(),
    }
