"""Step `probe`: every file opened and decoded once; what is sound, how large, and what it looks like.

One pass reports every bad file with its reason and goes on. Files are only read.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from train.prepare import units
from train.prepare.decode import CONTRACT_VERSION, EXTENSIONS, Facts, Refused, decode
from train.prepare.files import UnsafePath, read_image, resolve_inside, source_root
from train.prepare.records import PROBE, RECORDS, Quarantine
from train.prepare.settings import DatasetConfig, ProbeConfig, SourceConfig, dataset_dir

UNIT_FILES = 2000
_COLUMNS = (
    "key", "source", "uri", "member", "file_ext", "width", "height", "is_deleted", "is_banned", "hard_exclusion",
    "raw_hash", "tags_general", "tags_meta", "tags_species",
)  # fmt: skip
Row = dict[str, Any]


def run(settings: DatasetConfig) -> None:
    """Make the probe table from the records."""
    folder = dataset_dir(settings)
    records = units.read_table(folder, "records", RECORDS, _COLUMNS)
    sources = {source.name: source for source in settings.sources}
    bounds = units.cut(len(records), UNIT_FILES)
    marks = [_fingerprint(records.slice(a, b - a), settings, sources) for a, b in bounds]
    units.run_units(folder, "probe", marks, lambda n: _unit(records.slice(bounds[n][0], bounds[n][1] - bounds[n][0]),
                                                              settings, sources))  # fmt: skip


def _fingerprint(rows: pa.Table, settings: DatasetConfig, sources: Mapping[str, SourceConfig]) -> str:
    """Of the rows, the settings, and size and time of the files: an edited file is probed again."""
    stamps = [_stamp(sources[source], uri) for source, uri in zip(*_pair(rows, "source", "uri"), strict=True)]
    wanted = [asdict(settings.probe), asdict(settings.exclude), CONTRACT_VERSION]
    return units.fingerprint(units.table_hash(rows), wanted, stamps)


def _pair(rows: pa.Table, *names: str) -> list[list[Any]]:
    return [rows.column(name).to_pylist() for name in names]


def _stamp(source: SourceConfig, uri: str) -> tuple[int, int]:
    try:
        info = os.stat(source_root(source) / uri)
        return info.st_size, info.st_mtime_ns
    except (OSError, ValueError):
        return -1, -1


def _unit(rows: pa.Table, settings: DatasetConfig, sources: Mapping[str, SourceConfig]) -> units.Result:
    probed: list[Row] = []
    quarantine: list[Quarantine] = []
    wanted = []
    for record in rows.to_pylist():
        if record["hard_exclusion"] is not None:
            continue  # counted at ingest; the file is never opened
        left_out = _excluded(record, settings)
        if left_out is not None:
            quarantine.append(left_out)
        else:
            wanted.append(record)
    for record, (row, problem) in zip(wanted, _probe_all(wanted, settings, sources), strict=True):
        probed.append({"key": record["key"], **row})
        if problem is not None:
            quarantine.append(Quarantine(record["key"], "probe", problem[0], problem[1], problem[2]))  # type: ignore[arg-type]
    return pa.Table.from_pylist(probed, schema=PROBE), quarantine


def _excluded(record: Row, settings: DatasetConfig) -> Quarantine | None:
    if record["is_deleted"] and settings.exclude.deleted:
        return Quarantine(record["key"], "probe", "deleted_post", "exclude.deleted")
    if record["is_banned"] and settings.exclude.banned:
        return Quarantine(record["key"], "probe", "banned_post", "exclude.banned")
    unwanted = set(settings.exclude.tags)
    tags = [*record["tags_general"], *record["tags_meta"], *record["tags_species"]] if unwanted else []
    hit = next((tag for tag in tags if tag in unwanted), None)
    return Quarantine(record["key"], "probe", "excluded_tag", f"exclude.tags: {hit}") if hit else None


def _probe_all(
    records: Sequence[Row], settings: DatasetConfig, sources: Mapping[str, SourceConfig]
) -> Iterator[tuple[Row, tuple[str, str, str] | None]]:
    one = partial(probe_one, settings=settings.probe)
    jobs = [(sources[record["source"]], record) for record in records]
    if settings.workers == 0 or len(jobs) < 2:
        yield from map(one, jobs)
        return
    with ProcessPoolExecutor(min(settings.workers, os.cpu_count() or 1)) as pool:
        yield from pool.map(one, jobs, chunksize=8)


def probe_one(
    job: tuple[SourceConfig, Row], settings: ProbeConfig
) -> tuple[Row, tuple[str, str, str] | None]:
    """(columns of the probe table, None or (reason, message, exception)) of one record. Raises nothing."""
    source, record = job
    where = f"{record['uri']}" + (f" ({record['member']})" if record["member"] else "")
    size, mtime_ns = _stamp(source, record["uri"])
    blank: Row = dict.fromkeys(PROBE.names[1:])
    blank |= {"status": "quarantined", "file_size": size if size >= 0 else None, "mtime_ns": mtime_ns}
    try:
        data = read_image(source, record["uri"], record["member"])
        with _time_limit(settings.timeout_s):
            image, facts = decode(data, settings)
            row = _describe(image, facts, data, record)
        return {**blank, **row, "status": "ok"}, None
    except Refused as refused:
        problem = (refused.reason, f"{where}: {refused}", "Refused")
    except UnsafePath as error:
        problem = ("outside_root", str(error), type(error).__name__)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        problem = ("missing_file", f"{where}: {error.strerror or error}", type(error).__name__)
    except TimeoutError:
        problem = ("decode_timeout", f"{where}: longer than probe.timeout_s {settings.timeout_s:g}", "TimeoutError")
    except (OSError, MemoryError, ValueError) as error:
        problem = ("truncated", f"{where}: cannot be read: {error}", type(error).__name__)
    return {**blank, "reason": problem[0]}, problem


def _describe(image: Image.Image, facts: Facts, data: bytes, record: Row) -> Row:
    named = Path(record["member"] or record["uri"]).suffix.lower().lstrip(".") or record["file_ext"]
    stated = (record["width"], record["height"])
    return {
        "reason": None,
        "width": image.width,
        "height": image.height,
        "mode": facts.mode,
        "has_alpha": facts.has_alpha,
        "n_frames": facts.frames,
        "exif_orientation": facts.exif_orientation,
        "ext_mismatch": not str(record["member"] or "").startswith("row:") and named not in EXTENSIONS[facts.format],
        "size_mismatch": None not in stated and stated not in (image.size, image.size[::-1]),
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixel_hash": hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest(),
        "phash": perceptual_hash(image),
        "file_size": len(data),
    }


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of the 8x8 lowest frequencies of the 32x32 grey picture lie above their median."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_DCT @ grey @ _DCT.T)[:8, :8]
    bits = (low > np.median(low)).flatten()
    return int(np.packbits(bits).view(">u8")[0])


def _dct_matrix(size: int) -> npt.NDArray[np.float64]:
    frequency, position = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix: npt.NDArray[np.float64] = 2 * np.cos(np.pi * frequency * (2 * position + 1) / (2 * size))
    return matrix


_DCT = _dct_matrix(32)


class _time_limit:  # noqa: N801
    """TimeoutError in this process's main thread after `seconds`; nothing elsewhere, where signals cannot be set."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        try:
            self.before: Any = signal.signal(signal.SIGALRM, _raise_timeout)
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
        except ValueError:
            self.before = None

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)


def _raise_timeout(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


def ok_files(folder: Path, columns: Sequence[str]) -> pa.Table:
    """Rows of the probe table whose file is sound."""
    table = units.read_table(folder, "probe", PROBE, list(dict.fromkeys([*columns, "status"])))
    return table.filter(pa.compute.equal(table.column("status"), "ok")).select(list(columns))


def resolve_path(source: SourceConfig, uri: str) -> Path:
    """The file of a record on disk."""
    return resolve_inside(source_root(source), uri)
