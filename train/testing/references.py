"""Owner of a reference trainer's process, and the synthetic dataset both sides of benchmark A read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from train.data import index as ours
from train.data.index_writer import encoded, write_arrow
from train.recipe.buckets import make_buckets
from train.recipe.rng import uid_of
from train.testing.timing import Checkout

TAGS = [f"{word} {number}" for number in range(40) for word in ("long hair", "smile", "sky", "hat", "red eyes")]
TAGS_PER_CAPTION = 30
LINKS = 30_000  # pictures that share one empty file, by two names each: ext4 allows 65,000 names


class Reference:
    """A child process that runs one reference. Raises RuntimeError with the child's last words when it cannot start."""

    def __init__(self, checkout: Checkout) -> None:
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-W", "ignore", "-m", "train.testing.child", str(checkout.path)]
        self._child = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The child's answer to one request."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def close(self) -> None:
        """End the child."""
        self._child.communicate()

    def _read(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            _, errors = self._child.communicate()
            raise RuntimeError((errors.strip().splitlines() or ["the reference ended without a word"])[-1])
        return line


def write_index(
    folder: Path, images: int, shards: Sequence[tuple[str, int]] = (), bucket: tuple[int, int] | None = None
) -> None:
    """A prepared selection `bench` of synthetic images: in all 33 buckets without latents, or all in `bucket`.

    shards: (name, images) of the files in which the images lie, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    buckets = list(make_buckets()) if bucket is None else [bucket]
    sizes = np.array(buckets, dtype=np.int32)[chance.integers(len(buckets), size=images)]
    zeros = np.zeros(images, dtype=np.int32)
    keys = [f"bench:{number}" for number in range(images)]
    uids = np.array([uid_of(key) for key in keys], dtype=np.uint64)
    names = [name for name, count in shards for _ in range(count)] or ["none"] * images
    rows = np.concatenate([np.arange(count) for _, count in shards]) if shards else zeros
    offsets = pa.array(np.arange(images + 1, dtype=np.int32) * TAGS_PER_CAPTION)
    tags = pa.array(TAGS).take(pa.array(chance.integers(len(TAGS), size=images * TAGS_PER_CAPTION)))
    first = pa.array(np.arange(images + 1, dtype=np.int32))
    table = pa.table(
        {
            "key": pa.array(keys),
            "fixed_tags": encoded(pa.ListArray.from_arrays(first, pa.array(["1girl"]).take(pa.array(zeros)))),
            "flex_tags": encoded(pa.ListArray.from_arrays(offsets, tags)),
            "shard": encoded(pa.array(names)),
            "row": pa.array(rows.astype(np.int32)),
            "bucket_w": sizes[:, 0],
            "bucket_h": sizes[:, 1],
            "resized_w": sizes[:, 0],
            "resized_h": sizes[:, 1],
            "orig_w": sizes[:, 0],
            "orig_h": sizes[:, 1],
            "crop_top": zeros,
            "crop_left": zeros,
            "image_digest": uids,
            "caption_digest": uids,
        }
    )
    meta = {"version": ours.VERSION, "vae_id": "", "content": "mean", "buckets": ""}
    (folder / "dataset.json").write_text('{"schema_version": "1"}')
    whole = meta | {"sources": json.dumps(ours.source_hashes(folder, None))}
    write_arrow(folder / ours.INDEX, table, whole)
    selection = pa.table({"row": pa.array(np.arange(images, dtype=np.int32)), "uid": pa.array(uids)})
    told = {"version": ours.VERSION, "sources": json.dumps(ours.source_hashes(folder, "bench"))}
    write_arrow(folder / "index_bench.arrow", selection, told)


def write_metadata(folder: Path, images: int) -> tuple[Path, Path]:
    """Empty image and npz files and metadata with full paths and sizes: (original trainer's form, today's form)."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    buckets = list(make_buckets())
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for number in range(images):
        path = folder / f"{number}.jpg"
        if number % LINKS == 0:
            path.touch()
            first = path
        else:
            path.hardlink_to(first)  # a tenth of the time of a file of its own
        path.with_suffix(".npz").hardlink_to(first)
        size = buckets[int(chance.integers(len(buckets)))]
        caption = ", ".join(TAGS[int(tag)] for tag in chance.integers(len(TAGS), size=TAGS_PER_CAPTION))
        old[str(path)] = {"tags": f"1girl, ||| {caption}", "train_resolution": size}
        new[str(path)] = {"tags": f"1girl, ||| {caption}", "image_size": size}
    files = folder / "original.json", folder / "today.json"
    for file, content in zip(files, (old, new), strict=True):
        file.write_text(json.dumps(content))
    return files
