"""When too much is in quarantine, or a finished step found something that must not go unnoticed: exit 7 at the end.

A step writes all it can first; `prepare.py all` goes on to the report and ends with the code of the first complaint.
"""

from __future__ import annotations

from collections import Counter

import pyarrow.parquet as pq

from train.exits import ExitCode, Halt
from train.prepare.settings import DatasetConfig, dataset_dir
from train.prepare.units import merge_quarantine, read_manifest


class Complaint(Halt):
    """The step finished and wrote its table; the data is not as it should be. `all` runs the other steps first."""

    def __reduce__(self) -> tuple[type[Complaint], tuple[ExitCode, str]]:
        return Complaint, (self.code, self.message)


def judge(settings: DatasetConfig, step: str) -> None:
    """Print the step's quarantine counts. Raises Complaint(MISMATCH) when errors exceed max_quarantine_fraction."""
    dataset = dataset_dir(settings)
    path = dataset / "quarantine.parquet"
    table = pq.read_table(path) if path.exists() else merge_quarantine(dataset)
    rows = [row for row in table.select(["step", "kind", "reason"]).to_pylist() if row["step"] == step]
    counts = Counter(row["reason"] for row in rows)
    if counts:
        print(f"{step}: in quarantine: " + ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items())))
    errors = sum(row["kind"] == "error" for row in rows)
    manifest = read_manifest(dataset, "records")
    total = manifest["rows"] if manifest else 0
    if errors > settings.max_quarantine_fraction * total:
        raise Complaint(
            ExitCode.MISMATCH,
            f"{step}: {errors} of {total} records are broken, more than max_quarantine_fraction "
            f"{settings.max_quarantine_fraction:g}: see {path} for each file and reason",
        )
