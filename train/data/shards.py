"""Packed latents: one safetensors file per at most 1,024 images of one bucket, memory-mapped, random access.

Stored unscaled, as the VAE gives them. Shape legend: N images of a shard, B images read, C channels (4, or 8 for
mean and log-variance), H W latent rows and columns.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from train.base.errors import ExitCode, Halt
from train.base.files import fsync_dir, read_json, write_all
from train.storage.weightfile import read_header

SHARD_IMAGES = 1024
TENSOR = "latents"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_shard(path: Path, latents_NCHW: torch.Tensor, meta: Mapping[str, str]) -> None:
    """Write one immutable shard atomically: temporary name, fsync, rename. `meta` goes into the header."""
    latents = latents_NCHW.detach().cpu().contiguous()
    data = latents.view(torch.uint8).numpy().tobytes()
    entry = {"dtype": _NAMES[latents.dtype], "shape": list(latents.shape), "data_offsets": [0, len(data)]}
    text = json.dumps({"__metadata__": dict(meta), TENSOR: entry}, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(fd, len(text).to_bytes(8, "little") + text + data)
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.rename(tmp, path)
    except FileNotFoundError:  # a peer wrote the same shard and cleaned up
        if not path.exists():
            raise
    fsync_dir(path.parent)


def read_meta(path: Path) -> dict[str, str]:
    """The header's metadata of a shard."""
    _, _, _, meta = _header(path)
    return meta


class ShardReader:
    """Reads rows of shards below a dataset directory. Maps are opened on first use, so it may be sent to workers."""

    def __init__(self, dataset_dir: str | Path) -> None:
        self.folder = Path(dataset_dir)
        self._maps: dict[str, tuple[torch.Tensor, int]] = {}  # latents, bytes of their file
        self._wanted_vae: str | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_maps": {}, "_wanted_vae": None}

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
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 1 << 20:
                raise ValueError("no shard header")
            metadata, entries = read_header(file.read(length))
        entry = entries[TENSOR]
        if len(entry.shape) != 4 or entry.start != 0 or 8 + length + entry.end != size:
            raise ValueError(f"{size} bytes, the header describes {8 + length + entry.end}")
        return 8 + length, entry.shape, _DTYPES[entry.dtype], metadata
    except (OSError, ValueError, KeyError) as error:
        raise Halt(
            ExitCode.MISMATCH, f"latents {path} are missing or damaged ({error}): run scripts/prepare.py latents again"
        ) from error
