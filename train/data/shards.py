"""Packed latents: one safetensors file per at most 1,024 images of one bucket, memory-mapped, random access.

Stored unscaled, as the VAE gives them. Shape legend: N images of a shard, B images read, C channels (4, or 8 for
mean and log-variance), H W latent rows and columns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from train.base.errors import ExitCode, Halt
from train.base.files import read_json, replacing
from train.data.index import MARK
from train.data.published import Published
from train.storage import tensor_files
from train.storage.state_files import DTYPE_NAMES, DTYPES

SHARD_IMAGES = 1024
TENSOR = "latents"


def write_shard(path: Path, latents_NCHW: torch.Tensor, meta: Mapping[str, str]) -> None:
    """Write one immutable shard atomically: temporary name, fsync, rename. `meta` goes into the header."""
    latents = latents_NCHW.detach().cpu().contiguous()
    kind = DTYPE_NAMES[latents.dtype], latents.shape
    # Sorted, as in the shards of every earlier set: the same pictures give the same bytes.
    header, _ = tensor_files.header({TENSOR: kind}, meta, sort_keys=True)
    with replacing(path, peers=True) as tmp:
        tensor_files.stream(tmp, (header, memoryview(latents.reshape(-1).view(torch.uint8).numpy().data)))


def read_meta(path: Path) -> dict[str, str]:
    """The header's metadata of a shard."""
    _, _, _, meta = _header(path)
    return meta


class ShardReader:
    """Reads rows of shards below a dataset directory. Maps are opened on first use, so it may be sent to workers."""

    def __init__(self, dataset_dir: str | Path) -> None:
        self.folder = Path(dataset_dir)
        # Shards that are not here are read there.
        self.published = Published.of(self.folder) if (self.folder / MARK).is_file() else None
        self._maps: dict[str, tuple[torch.Tensor, int]] = {}  # latents, bytes of their file
        self._wanted_vae: str | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "published": self.published, "_maps": {}, "_wanted_vae": None}

    def read(self, shards: Sequence[str], rows: Sequence[int]) -> torch.Tensor:
        """fp32 [B,C,H,W], image k from `shards[k]` at `rows[k]`.

        Raises Halt(MISMATCH) naming shard and row when one is missing, cut off or not finite: never zeros.
        """
        parts = [self._row(shard, row) for shard, row in zip(shards, rows, strict=True)]
        if len({tuple(part.shape) for part in parts}) > 1:
            raise Halt(ExitCode.MISMATCH, f"{self.folder}: shards {sorted(set(shards))} hold different shapes")
        batch_BCHW = torch.empty((len(parts), *parts[0].shape), dtype=torch.float32)
        for image_CHW, part in zip(batch_BCHW, parts, strict=True):
            image_CHW.copy_(part)  # from the map and to fp32 in one pass
        # One pass instead of three: what is not finite stays so in a sum, and finite 16-bit values cannot overflow it.
        if not math.isfinite(float(batch_BCHW.sum())):
            for shard, row, part in zip(shards, rows, parts, strict=True):
                if not bool(torch.isfinite(part.float()).all()):
                    raise Halt(
                        ExitCode.MISMATCH,
                        f"{self.folder / shard} row {row} is not finite: delete that shard and run "
                        "scripts/prepare.py latents again",
                    )
        return batch_BCHW

    def _row(self, shard: str, row: int) -> torch.Tensor:
        if self.published is not None and not (self.folder / shard).is_file():  # not yet fetched, or gone from the cache
            data, dtype, shape = self.published.row(shard, row)
            if dtype not in DTYPES or len(data) != math.prod(shape) * DTYPES[dtype].itemsize:
                raise Halt(ExitCode.MISMATCH, f"{self.folder / shard} row {row} does not hold {shape} in {dtype}: publish the set again")
            return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(*shape)
        if shard not in self._maps:
            self._maps[shard] = self._open(shard)
        latents_NCHW, size = self._maps[shard]
        self._refuse_cut(shard, size)
        if not 0 <= row < len(latents_NCHW):
            raise Halt(ExitCode.MISMATCH, f"{self.folder / shard} has {len(latents_NCHW)} rows, row {row} is asked for")
        return latents_NCHW[row]

    def _refuse_cut(self, shard: str, size: int) -> None:
        """To read beyond the end of a file that became shorter under its map would kill the process (SIGBUS)."""
        try:
            now = os.stat(self.folder / shard).st_size
        except OSError as error:
            raise Halt(ExitCode.MISMATCH, f"latents {self.folder / shard} went away: {error.strerror}") from error
        if now != size:
            raise Halt(
                ExitCode.MISMATCH,
                f"latents {self.folder / shard} had {size} bytes and now have {now}: they are damaged, or are being "
                "made anew; run scripts/prepare.py latents to its end",
            )

    def _open(self, shard: str) -> tuple[torch.Tensor, int]:
        path = self.folder / shard
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise Halt(ExitCode.MISMATCH, f"index names shard {shard!r} outside the dataset directory")
        start, shape, dtype, meta = _header(path)
        if self._wanted_vae is None:
            self._wanted_vae = (read_json(self.folder / "dataset.json") or {}).get("latents", {}).get("vae_id", "")
        if self._wanted_vae and meta.get("vae_id", self._wanted_vae) != self._wanted_vae:
            raise Halt(
                ExitCode.MISMATCH,
                f"{path} was made by VAE {meta['vae_id'][:12]}, the dataset is of {self._wanted_vae[:12]}: run "
                "scripts/prepare.py latents again",
            )
        # Not numpy's map, which keeps a file descriptor: a large set has more shards than a process may open files.
        # Private, so torch may believe that it could write to it.
        size = path.stat().st_size
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return mapped[start:].view(dtype).view(shape), size


def _header(path: Path) -> tuple[int, tuple[int, ...], torch.dtype, dict[str, str]]:
    """(start of the data, shape, dtype, metadata), checked against the file's size."""
    try:
        start, metadata, entries = tensor_files.header_of(path)
        entry = entries[TENSOR]
        if len(entry.shape) != 4 or len(entries) != 1:
            raise ValueError(f"holds tensors of shapes {[list(one.shape) for one in entries.values()]}")
        return start, entry.shape, DTYPES[entry.dtype], metadata
    except (OSError, ValueError, KeyError) as error:
        raise Halt(
            ExitCode.MISMATCH, f"latents {path} are missing or damaged ({error}): run scripts/prepare.py latents again"
        ) from error
