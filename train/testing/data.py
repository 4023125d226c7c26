"""Rows A1 to A3 of benchmark A: index to first batch, captions to token ids, latents from disk to a tensor."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.data.index import Index
from train.data.shards import ShardReader, write_shard
from train.model.text import TagTokenizer, load_tag_tokenizer
from train.recipe.captions import DrawOptions, draw_many, split
from train.recipe.order import Plan
from train.testing.references import TAGS, Reference, write_index, write_metadata
from train.testing.timing import find_checkout, interleave, lasting, row, skipped, why_skipped

CARD_IMAGES = 873_504
REFERENCE_IMAGES = 100_000
CAPTIONS, COMPARED = 10_000, 500
LATENTS, BATCH = 2_000, 16
DROPS = 8  # cold reads in one repeat: one takes 0.05 s
WORKERS, WORKER_CAPTIONS = 4, 20_000
_OLD, _NEW = "SDSCRIPTS_ORIGINAL_DIR", "SDSCRIPTS_DIR"
_OPTIONS = DrawOptions(
    shuffle=True, tag_dropout=0.0, caption_dropout=0.0, caption_dropout_every_epochs=0, warmup_min=1, warmup_updates=0
)


def index_rows(folder: Path, repeats: int, scale: float = 1.0) -> list[dict[str, Any]]:
    """A1: from a path to the ids of the first batch. `scale` shrinks every size, for tests."""
    large, small = int(CARD_IMAGES * scale), int(REFERENCE_IMAGES * scale)
    write_index(folder / "large", large)
    write_index(folder / "small", small)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lasting(lambda: _open_first_batch(folder / "small")),
        "ours, card size": lambda: _open_first_batch(folder / "large"),
    }
    found = {variable: find_checkout(variable) for variable in (_OLD, _NEW)}
    rows = [skipped("A1", "index to first batch", why_skipped(v)) for v, checkout in found.items() if checkout is None]
    rss_kb: dict[str, int] = {}
    with contextlib.ExitStack() as processes:
        if any(found.values()):
            old, new = write_metadata(folder / "images", small)
            for checkout, metadata in zip(found.values(), (old, new), strict=True):
                if checkout is not None:
                    reference = processes.enter_context(contextlib.closing(Reference(checkout)))
                    sides[checkout.repository] = _index_side(reference, metadata, checkout.repository, rss_kb)
        timings = interleave(sides, repeats)
    items = dict.fromkeys(timings, small) | {"ours, card size": large}
    notes: dict[str, Any] = {"peak RSS of a reference, MB": {name: kb // 1024 for name, kb in rss_kb.items()}}
    notes |= worker_memory(Index.open(folder / "large", "bench"))
    goal = "<= 2 s and >= 100x the original; per worker < 50 MB PSS and <= 100 MB RSS more"
    what = f"index to first batch, {small:,} images ({large:,} at card size)"
    return [row("A1", what, goal, timings, items, notes=notes), *rows]


def _open_first_batch(folder: Path) -> list[str]:
    index = Index.open(folder, "bench")
    plan = Plan(
        index.uids, index.bucket_w, index.bucket_h, seed=1, tile_images=16, tiles_per_update=1, epochs=1, max_updates=1
    )
    return [index.key(row) for row in plan.update(0)[0].rows.tolist()]


def _index_side(reference: Reference, metadata: Path, name: str, rss_kb: dict[str, int]) -> Callable[[], Any]:
    def once() -> tuple[float, float]:
        told = reference.ask(do="index", metadata=str(metadata), image_dir=str(metadata.parent))
        assert len(told["first"]) > 0, name
        rss_kb.setdefault(name, told["rss_kb"])  # of the first: later ones find memory that is already there
        return told["cpu_s"], told["wall_s"]

    return once


def worker_memory(index: Index, workers: int = WORKERS, captions: int = WORKER_CAPTIONS) -> dict[str, Any]:
    """Largest growth of forked workers that look up sizes, latents and captions of images drawn at random."""
    grown = []
    for worker in range(workers):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, json.dumps(_walk(index, worker, min(captions, len(index)))).encode())
            os._exit(0)
        os.close(write)
        grown.append(json.loads(os.read(read, 4096)))
        os.waitpid(child, 0)
        os.close(read)
    return {f"{kind} growth per worker, MB": round(max(one[kind] for one in grown), 1) for kind in ("RSS", "PSS")}


def _walk(index: Index, seed: int, captions: int) -> dict[str, float]:
    """Peak growth in MB while reading as a training worker does."""
    before, most = _memory_mb(), {"RSS": 0.0, "PSS": 0.0}
    for number, image in enumerate(np.random.default_rng(seed).integers(0, len(index), captions).tolist()):
        assert index.caption(image)[1] and index.latent(image) and index.key(image)
        assert all(column[image] >= 0 for column in (index.orig_w, index.orig_h, index.crop_top, index.crop_left))
        if number % 997 == 0 or number == captions - 1:
            now = _memory_mb()
            most = {kind: max(most[kind], now[kind] - before[kind]) for kind in most}
    return most


def _memory_mb() -> dict[str, float]:
    """Resident and proportional set size of this process."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    sizes = {words[0]: int(words[1]) / 1024 for words in lines}
    return {"RSS": sizes["Rss:"], "PSS": sizes["Pss:"]}


def caption_rows(folder: Path, tokenizers: Path, repeats: int, count: int = CAPTIONS) -> list[dict[str, Any]]:
    """A2: shuffle behind the separator and ids for both encoders; ids of equal draws are compared."""
    chance = random.Random(0)
    texts = ["1girl, ||| " + ", ".join(chance.sample(TAGS, 30)) for _ in range(count)]
    file = folder / "captions.json"
    file.write_text(json.dumps(texts))
    tokenizer = load_tag_tokenizer(tokenizers)
    pairs = [split(text) for text in texts]
    checkout = find_checkout(_OLD)
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: _tokenize(tokenizer, pairs)}
    told: dict[str, Any] = {}
    if checkout is not None:
        reference = Reference(checkout)

        def theirs() -> tuple[float, float]:
            told.update(
                reference.ask(do="captions", captions=str(file), tokenizers=str(tokenizers), seed=1, returned=COMPARED)
            )
            return told["cpu_s"], told["wall_s"]

        sides[checkout.repository] = theirs
    timings = interleave(sides, repeats)
    notes: dict[str, Any] = {"tokenizers": tokenizers.name}
    rows = []
    if checkout is not None:
        reference.close()
        notes["ids equal for equal draws"] = f"{_equal_ids(tokenizer, told)} of {len(told['drawn'])}"
    else:
        rows = [skipped("A2", "captions", why_skipped(_OLD))]
    goal = ">= 10x, ids equal"
    return [row("A2", "caption shuffle + ids of both encoders", goal, timings, count, notes=notes), *rows]


def _tokenize(tokenizer: TagTokenizer, pairs: Sequence[tuple[list[str], list[str]]]) -> None:
    for start in range(0, len(pairs), BATCH):  # as the images of a tile
        captions = pairs[start : start + BATCH]
        uids = range(start, start + len(captions))
        drawn = draw_many(captions, _OPTIONS, seed=1, uids=uids, epochs=[0] * len(captions), update=0)
        tokenizer.chunk_ids_many([tokenizer.fit(fixed, flex, 225, "token")[0] for fixed, flex in drawn])


def _equal_ids(tokenizer: TagTokenizer, told: dict[str, Any]) -> int:
    equal = 0
    for text, ids in zip(told["drawn"], told["ids"], strict=True):
        content, _ = tokenizer.fit([], text.split(", "), 225, "token")
        mine = tokenizer.chunk_ids(content)
        equal += all(np.array_equal(one, other) for one, other in zip(mine, ids, strict=True))
    return equal


def latent_rows(folder: Path, repeats: int, count: int = LATENTS) -> list[dict[str, Any]]:
    """A3: batches of 16 in random order to one fp32 tensor; page cache warm, then dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    values = torch.from_numpy(chance.standard_normal((count, 4, 152, 104), dtype=np.float32))
    names = []
    for start in range(0, count, 1024):
        names.append(f"832x1216-{start:05d}.safetensors")
        write_shard(folder / names[-1], values[start : start + 1024].half(), {})
    files = [folder / f"{number}.npz" for number in range(count)]
    for file, latent in zip(files, values, strict=True):
        np.savez(file, latents=latent.numpy(), original_size=np.array([832, 1216]), crop_ltrb=np.zeros(4))
    order = chance.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH).tolist()
    reader = ShardReader(folder)

    def ours() -> None:
        for batch in order:
            reader.read([names[i // 1024] for i in batch], [i % 1024 for i in batch])

    checkout = find_checkout(_OLD)
    rows = [] if checkout else [skipped("A3", "latents", why_skipped(_OLD))]
    reference = Reference(checkout) if checkout else None
    for state in ("warm", "cold"):
        cold = state == "cold"
        shards = [folder / name for name in names]
        sides: dict[str, Callable[[], Any]] = {"ours": _after_drop(ours, shards) if cold else lasting(ours)}
        if checkout is not None and reference is not None:
            batches = [[str(files[i]) for i in batch] for batch in order]
            theirs = _npz_side(reference, batches)
            sides[checkout.repository] = _after_drop(theirs, files, times=1) if cold else theirs
        timings = interleave(sides, repeats)
        rows.append(row("A3", f"latents to a tensor, {state}", ">= 10x npz", timings, len(order) * BATCH))
    if reference is not None:
        reference.close()
    return rows


def _npz_side(reference: Reference, batches: list[list[str]]) -> Callable[[], tuple[float, float]]:
    def once() -> tuple[float, float]:
        told = reference.ask(do="latents", batches=batches)
        return told["cpu_s"], told["wall_s"]

    return once


def _after_drop(run: Callable[[], Any], paths: Sequence[Path], times: int = DROPS) -> Callable[[], tuple[float, float]]:
    """Mean of `run` over `times`, each after dropping `paths` from the page cache, which is not timed."""

    def once() -> tuple[float, float]:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        wall, cpu = time.perf_counter(), time.process_time()
        told = run()
        spent = time.process_time() - cpu, time.perf_counter() - wall
        return told if isinstance(told, tuple) else spent

    def mean() -> tuple[float, float]:
        cpu_s, wall_s = zip(*(once() for _ in range(times)), strict=True)
        return statistics.fmean(cpu_s), statistics.fmean(wall_s)

    return mean
