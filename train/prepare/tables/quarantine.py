"""When too much is in quarantine, or a finished step found something that must not go unnoticed: exit 7 at the end.

A step writes all it can first. `prepare.py all` stops there; the later steps can still be run one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.tables.schemas import Quarantine
from train.prepare.tables.units import merge_quarantine, read_manifest

FLOOR_RECORDS, FLOOR_SHARE = 2, 0.1  # of a set: see too_many


class Complaint(Halt):
    """The step finished and wrote its table; the data is not as it should be."""

    def __reduce__(self) -> tuple[type[Complaint], tuple[ExitCode, str]]:
        return Complaint, (self.code, self.message)


def too_many(count: float, total: float, share: float) -> bool:
    """Whether `count` of `total` breaks a limit that is a share of the total.

    In a small set a share stands for less than one record, so up to two are never too many, while they are a tenth of
    the set at most: two is what the usual 2 % allows of a hundred. A share of 0 means none.
    """
    floor = min(FLOOR_RECORDS, FLOOR_SHARE * total) if share > 0 else 0
    return count > max(share * total, floor)


def weigh(settings: DatasetConfig, step: str, errors: Sequence[Quarantine], total: int) -> None:
    """Print the first of a step's errors and where all are listed.

    Raises Complaint(MISMATCH) with the first three when they are more of all records than max_quarantine_fraction.
    """
    if not errors:
        return
    told, where = [f"{entry.key}: {entry.reason}: {entry.message}" for entry in errors[:3]], dataset_dir(settings)
    if too_many(len(errors), total, settings.max_quarantine_fraction):
        raise Complaint(
            ExitCode.MISMATCH,
            f"{step}: {len(errors)} of {total} records are broken, more than max_quarantine_fraction "
            f"{settings.max_quarantine_fraction:g}: see {where / 'quarantine.parquet'} for each; the first: {'; '.join(told)}",
        )
    more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
    print(f"{step}: set aside: {told[0]}{more}: scripts/show.py quarantine {where} lists them")


def judge(settings: DatasetConfig, step: str) -> None:
    """Print the step's quarantine counts. Raises Complaint(MISMATCH) when errors exceed max_quarantine_fraction."""
    dataset = dataset_dir(settings)
    path = dataset / "quarantine.parquet"
    table = pq.read_table(path) if path.exists() else merge_quarantine(dataset)
    rows = [row for row in table.to_pylist() if row["step"] == step]
    counts = Counter(row["reason"] for row in rows)
    if counts:
        print(f"{step}: in quarantine: " + ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items())))
    manifest = read_manifest(dataset, "records")
    errors = [Quarantine.of(row) for row in rows if row["kind"] == "error"]
    weigh(settings, step, errors, manifest["rows"] if manifest else 0)
