"""How much a picture counts in the loss: its source's weight times the one of its own row."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from train.config.dataset import DatasetConfig


def weights(settings: DatasetConfig, source: pa.Array, own: pa.Array) -> pa.Array:
    """float32 of each picture; `source`: the name of its source, `own`: of its row (columns.weight), null = 1."""
    names, of_source = zip(*((config.name, config.weight) for config in settings.sources), strict=True)
    numbers = pc.index_in(source, value_set=pa.array(names, pa.string()))
    return pc.multiply(pa.array(of_source, pa.float64()).take(numbers), pc.fill_null(own, 1.0)).cast(pa.float32())


def by_source(settings: DatasetConfig, records: pa.Table) -> dict[str, tuple[int, float, float]]:
    """{source: (pictures, least, largest weight)} of every source whose pictures do not all weigh 1.

    `records`: columns source and weight.
    """
    source = records.column("source").combine_chunks().cast(pa.string())
    table = pa.table({"source": source, "weight": weights(settings, source, records.column("weight").combine_chunks())})
    found = table.group_by("source").aggregate([("weight", "count"), ("weight", "min"), ("weight", "max")]).to_pylist()
    told = {one["source"]: (one["weight_count"], one["weight_min"], one["weight_max"]) for one in found}
    return {name: told[name] for name in sorted(told) if told[name][1:] != (1.0, 1.0)}


def told(least: float, most: float) -> str:
    """`0.5`, or `0.5 to 2`."""
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"
