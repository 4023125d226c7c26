"""R10: at least 30 bad captions and metadata records in one pass over one dataset: each named with place and reason."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ingests import BAD_CAPTIONS, BAD_LINES, BAD_POSTS, GOOD, run, write_picture

from train.config.dataset import DatasetConfig, SourceConfig

BAD_ROWS = {  # of a CSV table with the columns id and tags
    "too few cells": b"2", "too many cells": b"3,x,y", "not utf-8": b"4,\xff", "no id": b",none",
}  # fmt: skip


def test_every_bad_record_is_named_in_one_pass(tmp_path: Path) -> None:
    assert len(BAD_POSTS) + len(BAD_LINES) + len(BAD_CAPTIONS) + len(BAD_ROWS) >= 30
    (tmp_path / "posts.jsonl").write_text("\n".join(json.dumps(post) for post in BAD_POSTS.values()))
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(BAD_LINES.values()) + b"\n" + json.dumps(GOOD).encode())
    for name, data in BAD_CAPTIONS.items():
        write_picture(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_bytes(data)
    (tmp_path / "table.csv").write_bytes(b"id,tags\n" + b"\n".join([*BAD_ROWS.values(), b"9,fine"]) + b"\n")
    columns = {"id": "id", "tags": "tags"}
    sources = [
        SourceConfig("posts", "danbooru", str(tmp_path / "posts.jsonl")),
        SourceConfig("lines", "danbooru", str(tmp_path / "lines.jsonl")),
        SourceConfig("pictures", "sidecar", str(tmp_path / "pictures"), assume_rating="g"),
        SourceConfig("table", "table", str(tmp_path / "table.csv"), columns=columns, tag_separator=" "),
    ]
    started = time.monotonic()
    records, quarantine = run(
        DatasetConfig(name="d", root=str(tmp_path / "out"), sources=sources, max_quarantine_fraction=1.0)
    )
    assert time.monotonic() - started < 60
    assert set(records) == {"lines:1", "table:9"}
    found: dict[str, int] = {}
    for entry in quarantine:
        source = entry["key"].partition(":")[0]
        found[source] = found.get(source, 0) + 1
        assert entry["reason"]
        assert entry["message"]
    wanted = {"posts": len(BAD_POSTS), "lines": len(BAD_LINES), "pictures": len(BAD_CAPTIONS), "table": len(BAD_ROWS)}
    assert found == wanted
