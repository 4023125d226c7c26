"""A caption as the networks get it: a text as it would be read, a picture's of a prepared set, or those of one update of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.base.errors import ExitCode, Halt
from train.config import source_rules
from train.config.dataset import SourceConfig
from train.data.index import Index
from train.prepare.posts.caption_remarks import CaptionTally
from train.prepare.posts.caption_text import BadCaption, caption_rules, read_caption
from train.recipe import captions, rng
from train.recipe.captions import Caption, Drawn, DrawOptions

if TYPE_CHECKING:
    from train.model.text import Overflow, TagTokenizer

MAX_TOKENS = 225
NAMED_UPDATES = 5  # of a picture that is not in the update asked for


def tokenizers_in(folder: Path | None) -> TagTokenizer:
    """Tokenizers of a folder with tokenizer/ and tokenizer_2/, or of one tokenizer folder; None = the shipped ones."""
    from train.model import text  # with torch, which the other reports do without

    if folder is None or (folder / "tokenizer").is_dir():
        return text.load_tag_tokenizer(folder)
    return text.TagTokenizer(text.load_tokenizer(folder))


def report(
    path: Path | None = None, text: str | None = None, *, key: str | None = None, update: int | None = None,
    tokenizers: Path | None = None, draws: int = 0, separator: str | None = None, max_tokens: int | None = None,
    overflow: Overflow | None = None, seed: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Parts, ids per chunk and what does not fit: of a text, of a set's picture, or of the pictures of a run's update.

    Texts and pictures of sets: as written, and as shuffled in the epochs 0 .. draws-1. Raises Halt(USAGE) for what does not go together.
    """
    given = {"--separator": separator, "--max-tokens": max_tokens, "--overflow": overflow, "--seed": seed, "--tokenizers": tokenizers}
    run = path is not None and (path / "config.yaml").is_file()
    if (path is None) == (text is None):
        raise Halt(ExitCode.USAGE, "give a caption as --text, or a run directory, or a prepared set: one of them")
    if run and path is not None:
        if told := [option for option, value in given.items() if value is not None] + ["--draws"] * bool(draws):
            raise Halt(ExitCode.USAGE, f"{', '.join(told)}: a run has its own")
        return _of_run(path, update, key)
    if update is not None:
        raise Halt(ExitCode.USAGE, f"--update {update} needs a run directory, which has a config.yaml")
    if draws < 0:
        raise Halt(ExitCode.USAGE, f"--draws is {draws}, must be at least 0")
    fitting = _Fitting(tokenizers_in(tokenizers), max_tokens or MAX_TOKENS, overflow or "tag", frozenset(), with_ids=True)
    if path is None:
        caption, of = read_text(text or "", captions.SEPARATOR if separator is None else separator), {"caption": text}
        uid = rng.uid_of(text or "")
    else:
        caption, of, uid = *_of_set(path, key), rng.uid_of(key or "")
    written = Drawn(list(caption.fixed), list(caption.flex), list(caption.tail), list(caption.prose))
    drawn = [
        captions.draw_captions([caption], DrawOptions(), seed=seed or 0, uids=[uid], epochs=[epoch], update=0)[0]
        for epoch in range(draws)
    ]
    ways = [dict(zip(("fixed", "flex", "tail"), way, strict=True)) for way in caption.variants]
    return {
        **of, **_parts(written), **({"variants": ways} if ways else {}), **fitting.told(written),
        "draws": [{"epoch": epoch, **_told_kind(caption, one), **fitting.told(one)} for epoch, one in enumerate(drawn)],
    }  # fmt: skip


def read_text(text: str, separator: str) -> Caption:
    """A text as the step `ingest` reads a caption file: fixed, flexible and tail tags, sentences. Raises Halt(USAGE)."""
    if (problem := source_rules.separator_problem(separator)) is not None:
        raise Halt(ExitCode.USAGE, f"--separator is {separator!r}: {problem}")
    rules = caption_rules(SourceConfig(name="text", on_second_separator="tail"), separator)
    try:
        found, _ = read_caption(text, rules, CaptionTally())
    except BadCaption as error:
        raise Halt(ExitCode.USAGE, str(error)) from error
    ways, prose = captions.read_stored(found)
    return Caption(*ways[0], prose, ways[1:])


def _of_set(folder: Path, key: str | None) -> tuple[Caption, dict[str, Any]]:
    stages = sorted(found.stem.removeprefix("index_") for found in folder.glob("index_*.arrow"))
    if not stages:
        raise Halt(ExitCode.MISMATCH, f"{folder} is neither a run directory nor a prepared set with an index")
    if key is None:
        raise Halt(ExitCode.USAGE, "--key is missing: which picture of the set, <source>:<id>")
    for index in (Index.open(folder, stage) for stage in stages):
        for row in np.flatnonzero(index.uids == np.uint64(rng.uid_of(key))).tolist():
            return index.record(row), {"set": str(folder), "key": key}
    raise Halt(ExitCode.USAGE, f"--key {key}: no stage of {folder} trains on it")


def _of_run(path: Path, update: int | None, key: str | None) -> dict[str, Any]:
    from train.config.stage import load_stage
    from train.data.dataset import TileDataset
    from train.data.selection import open_selection
    from train.data.shards import ShardReader
    from train.model import source, text
    from train.model.vae_file import LatentScale

    if update is None:
        raise Halt(ExitCode.USAGE, "--update is missing: of which update, counted from 0")
    config = load_stage([path / "config.yaml"], [f"output_dir={path}"])
    selection, feeding = open_selection(config.images), config.owners.data
    index, plan = selection.kept, selection.plan
    if not 0 <= update < plan.total_updates:
        raise Halt(ExitCode.USAGE, f"--update {update}: the run has updates 0 to {plan.total_updates - 1}")
    tokenizer = text.load_tag_tokenizer(source.resolve(config.origin.model, hashed=False).tokenizers)
    images = TileDataset(  # of which no latent is read
        index, plan, ShardReader(selection.folder), tokenizer, seed=feeding.seed, data=feeding.data, noise=feeding.noise,
        scale=LatentScale(1.0), total_updates=plan.total_updates,
    )  # fmt: skip
    fitting = _Fitting(tokenizer, images.max_tokens, images.overflow, images.options.protect, with_ids=key is not None)
    slots: list[dict[str, Any]] = []
    for tile in plan.update(update):
        for row, epoch, one in zip(tile.rows.tolist(), tile.epochs.tolist(), images.drawn(tile, update), strict=True):
            if key in (None, index.key(row)):
                told = {**_told_kind(index.record(row), one), **_parts(one), **fitting.told(one)}
                slots.append({"key": index.key(row), "epoch": epoch, **told})
    if key is not None and not slots:
        rows = [row for row in range(len(index)) if index.key(row) == key]
        found = (n for n in range(plan.total_updates) if any(np.isin(rows, tile.rows).any() for tile in plan.update(n)))
        updates = [str(number) for number, _ in zip(found, range(NAMED_UPDATES), strict=False)] if rows else []
        where = f"it is in {', '.join(updates)}" + (" ..." if len(updates) == NAMED_UPDATES else "") if updates else "the run has no such picture"
        raise Halt(ExitCode.USAGE, f"--key {key}: not in update {update}; {where}")
    return {"run": str(path), "update": update, "max_tokens": images.max_tokens, "pictures": slots}


def _parts(drawn: Drawn) -> dict[str, Any]:
    return {"fixed": drawn.fixed, "flex": drawn.flex, "tail": drawn.tail, "prose": drawn.prose}


def _told_kind(caption: Caption, drawn: Drawn) -> dict[str, Any]:
    """What was drawn of several: the kind, which of the captions of tags, which of the texts (from 0)."""
    told: dict[str, Any] = {"kind": drawn.kind} if caption.prose else {}
    told |= {"variant": drawn.variant} if caption.variants else {}
    return told | ({"text_of": drawn.text} if len(caption.prose) > 1 else {})


class _Fitting:
    """How a caption becomes ids: tokenizer and budget."""

    def __init__(
        self, tokenizer: TagTokenizer, max_tokens: int, overflow: Overflow, protect: frozenset[str], *, with_ids: bool
    ) -> None:
        self.tokenizer, self.max_tokens, self.overflow, self.protect, self.with_ids = tokenizer, max_tokens, overflow, protect, with_ids

    def told(self, one: Drawn) -> dict[str, Any]:
        """Text, tokens before and after the budget, what it cut, and where asked for the ids of both encoders."""
        tags = [*one.fixed, *one.flex, *one.after]
        fit: dict[str, Any] = {"after": one.after, "protect": self.protect}
        ids, _ = self.tokenizer.fit(one.fixed, one.flex, self.max_tokens, self.overflow, **fit)
        report: dict[str, Any] = {
            "text": captions.join(tags), "tokens": len(self.tokenizer.content_ids(tags)), "tokens_kept": len(ids),
            "tags_cut": self.tokenizer.lost(one.fixed, one.flex, self.max_tokens, self.overflow, **fit),
        }  # fmt: skip
        if self.with_ids:
            ids_1, ids_2 = self.tokenizer.chunk_ids(ids, self.max_tokens)
            report |= {"encoder_1": ids_1.tolist(), "encoder_2": ids_2.tolist()}
        return report

