"""The memory-mapped index: what it says of each image, what it refuses, and that opening it stays cheap."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from indexes import META, built, index_of, row, selection_of
from synthetic import make_dataset

from train.base.errors import ExitCode, Halt
from train.data.index import Index
from train.data.index_writer import build_index
from train.recipe.captions import Caption
from train.recipe.rng import uid_of


def test_says_what_was_stored(tmp_path: Path) -> None:
    rows = [row("a:1"), row("a:2", fixed_tags=[], flex_tags=[], shard="latents/other.safetensors", row=0, year="newest")]
    index = Index.open(built(tmp_path, rows, ft=selection_of(("a:1", 1, 128, 96), ("a:2", 1, 128, 96))), "ft")
    assert [index.key(0), index.key(1)] == ["a:1", "a:2"]
    assert index.caption(0) == (["1girl"], ["smile", "hat"])
    assert index.caption(1) == ([], [])
    assert index.latent(1) == ("latents/other.safetensors", 0)
    assert index.labels(1) == {"quality": "best quality", "rating_tags": ["safe"], "year": "newest", "aesthetic": None}
    assert index.uids.tolist() == [uid_of("a:1"), uid_of("a:2")]
    numbers = ("orig_w", "orig_h", "bucket_w", "bucket_h", "resized_w", "resized_h", "crop_top", "crop_left")
    assert [int(getattr(index, name)[0]) for name in numbers] == [300, 200, 128, 96, 144, 96, 0, 8]
    assert index.vae_id == "v"


def test_repeats_have_own_uids_and_one_image(tmp_path: Path) -> None:
    chosen = selection_of(("a:1", 3, 128, 96), ("a:2", 1, 128, 96))
    index = Index.open(built(tmp_path, [row("a:1"), row("a:2", row=4)], ft=chosen), "ft")
    assert index.uids.tolist() == [uid_of("a:1"), uid_of("a:1", 1), uid_of("a:1", 2), uid_of("a:2")]
    assert [index.key(i) for i in range(4)] == ["a:1", "a:1", "a:1", "a:2"]
    assert len(set(index.images.tolist())) == 2


def test_two_stages_with_different_buckets(tmp_path: Path) -> None:
    rows = [row("a:1"), row("a:1", bucket_w=96, bucket_h=128, row=7)]
    built(tmp_path, rows, one=selection_of(("a:1", 1, 128, 96)), two=selection_of(("a:1", 1, 96, 128)))
    assert Index.open(tmp_path, "one").latent(0)[1] == 3
    assert Index.open(tmp_path, "two").latent(0)[1] == 7


def test_select_keeps_the_rows_together(tmp_path: Path) -> None:
    index = Index.open(make_dataset(tmp_path / "d"), "ft1")
    mask = np.arange(len(index)) % 3 == 1
    part = index.select(mask)
    assert [part.key(i) for i in range(len(part))] == [index.key(i) for i in np.flatnonzero(mask).tolist()]
    assert part.uids.tolist() == index.uids[mask].tolist()
    assert part.orig_w.tolist() == index.orig_w[mask].tolist()
    assert part.selection_hash != index.selection_hash


@pytest.mark.parametrize(
    "changes",
    [{"crop_left": 9}, {"content_hash": "other"}, {"flex_tags": ["hat", "smile"]}, {"fixed_tags": ["1girl", "smile"],
     "flex_tags": ["hat"]}, {"orig_w": 301}],
)  # fmt: skip
def test_fingerprint_sees_every_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    chosen = selection_of(("a:1", 1, 128, 96))
    one = Index.open(built(tmp_path / "one", [row("a:1")], ft=chosen), "ft").fingerprint
    other = Index.open(built(tmp_path / "two", [row("a:1", **changes)], ft=chosen), "ft").fingerprint
    moved = Index.open(built(tmp_path / "three", [row("a:1", row=9, shard="latents/x")], ft=chosen), "ft").fingerprint
    assert one != other
    assert one == moved  # where a latent lies is not what it is


@pytest.mark.parametrize(
    ("rating", "tags", "refused"),
    [("g", ["loli"], True), ("e", ["child"], True), (None, ["baby"], True), ("g", ["child"], False), ("s", ["hat"], False),
     ("g", ["child", "nsfw"], True)],
)  # fmt: skip
def test_last_gate(tmp_path: Path, rating: str | None, tags: list[str], refused: bool) -> None:
    rows = [row("a:1"), row("a:2", flex_tags=["smile", *tags], gate_rating=rating)]
    chosen = selection_of(("a:1", 1, 128, 96), ("a:2", 1, 128, 96))
    if refused:
        with pytest.raises(Halt, match="a:2 is hard-excluded") as halt:
            built(tmp_path, rows, ft=chosen)
        assert halt.value.code == ExitCode.MISMATCH
        assert not (tmp_path / "index.arrow").exists()
    else:
        assert len(Index.open(built(tmp_path, rows, ft=chosen), "ft")) == 2


@pytest.mark.parametrize(("from_caption", "refused"), [(True, True), (False, False)])
def test_last_gate_sees_the_fixed_tags_of_captions(tmp_path: Path, from_caption: bool, refused: bool) -> None:
    """Names are not split into words, but a separator or keep_tokens may fix anything."""
    rows = index_of([row("a:1"), row("a:2", fixed_tags=["1girl", "kid"], gate_rating="e")])
    rows = rows.append_column("gate_fixed", pa.array([True, from_caption]))
    chosen = {"ft": selection_of(("a:1", 1, 128, 96), ("a:2", 1, 128, 96))}
    if refused:
        with pytest.raises(Halt, match="a:2 is hard-excluded"):
            build_index(tmp_path, rows, chosen, META)
    else:
        build_index(tmp_path, rows, chosen, META)
        assert "gate_fixed" not in pa.ipc.open_file(tmp_path / "index.arrow").schema.names


def test_selected_without_latents_is_named(tmp_path: Path) -> None:
    with pytest.raises(Halt, match=r"1 images of selection ft have no latents, such as a:9: run scripts/prepare.py latents"):
        built(tmp_path, [row("a:1")], ft=selection_of(("a:1", 1, 128, 96), ("a:9", 1, 128, 96)))
    with pytest.raises(Halt, match="have no latents"):  # the key is there, in another bucket
        built(tmp_path, [row("a:1")], ft=selection_of(("a:1", 1, 96, 128)))


def test_not_prepared_stale_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(Halt, match=r"not a prepared dataset.*prepare.py all"):
        Index.open(tmp_path / "nothing", "ft")
    folder = built(tmp_path / "d", [row("a:1")], ft=selection_of(("a:1", 1, 128, 96)))
    with pytest.raises(Halt, match=r"no selection 'pretrain' \(it has ft\)"):
        Index.open(folder, "pretrain")
    pq.write_table(selection_of(("a:1", 2, 128, 96)), folder / "select_ft.parquet")
    with pytest.raises(Halt, match=r"select_ft.parquet changed after.*prepare.py latents") as halt:
        Index.open(folder, "ft")
    assert halt.value.code == ExitCode.MISMATCH
    folder = built(tmp_path / "e", [row("a:1")], ft=selection_of(("a:1", 1, 128, 96)))
    (folder / "index.arrow").write_bytes((folder / "index.arrow").read_bytes()[:-40])
    with pytest.raises(Halt, match="missing or damaged"):
        Index.open(folder, "ft")


def test_opening_reads_no_captions(tmp_path: Path) -> None:
    """200,000 images: well below the share of 0.8 s and 100 MB that a card-sized set may take."""
    count = 200_000
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * 35)
    tags = pa.array([f"tag {i}" for i in range(1000)]).take(pa.array(np.arange(count * 35) * 7919 % 1000))
    table = index_of([row("k")]).take(pa.array(np.zeros(count, dtype=np.int64)))
    keys = pa.array([f"k:{i:07d}" for i in range(count)])
    table = table.set_column(0, "key", keys)
    table = table.set_column(table.column_names.index("flex_tags"), "flex_tags", pa.ListArray.from_arrays(offsets, tags))
    ones = pa.array(np.ones(count, dtype=np.int16))
    chosen = pa.table({"key": keys, "repeats": ones, "bucket_w": table["bucket_w"], "bucket_h": table["bucket_h"]})
    (tmp_path / "dataset.json").write_text('{"schema_version": 1}')
    build_index(tmp_path, table, {"ft": chosen}, META)
    del table, tags
    before, started = _rss_mb(), time.process_time()
    index = Index.open(tmp_path, "ft")
    assert len(index.bucket_w) == count
    assert time.process_time() - started < 0.8
    assert _rss_mb() - before < 40
    assert index.caption(count - 1)[1][0] == f"tag {(count - 1) * 35 * 7919 % 1000}"


@pytest.mark.slow
def test_card_size(tmp_path: Path) -> None:
    """873,504 images: open within 2 s, and a worker that reads captions at random grows by 100 MB at most."""
    from train.testing.data import CARD_IMAGES, worker_memory
    from train.testing.references import write_index

    write_index(tmp_path, CARD_IMAGES)
    before, started = _rss_mb(), time.process_time()
    index = Index.open(tmp_path, "bench")
    assert len(index.bucket_w) == CARD_IMAGES
    assert time.process_time() - started < 2
    assert len(index.fingerprint) == 64
    assert index.select(np.ones(CARD_IMAGES, dtype=bool)) is index
    assert _rss_mb() - before < 100
    grown = worker_memory(index, workers=1, captions=60_000)
    assert grown["RSS growth per worker, MB"] < 100
    assert grown["PSS growth per worker, MB"] < 50


def test_fingerprint_of_the_header_is_the_computed_one(tmp_path: Path) -> None:
    index = Index.open(make_dataset(tmp_path / "d"), "ft1")
    assert index._meta["fingerprint"] == index.fingerprint
    everything = np.arange(len(index))
    assert index.select(everything).fingerprint == index.fingerprint  # computed from the rows
    assert index.select(everything[1:]).fingerprint != index.fingerprint


def _rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


PARTS = {"tail_tags": ["best"], "prose": ["A girl, who smiles."], "tag_variants": ["x\na, b\nc"]}


def with_parts(folder: Path, rows: list[dict[str, Any]]) -> Index:
    """The set of rows that may hold the columns of version 2."""
    table = index_of([{name: value for name, value in one.items() if name not in PARTS} for one in rows])
    for name in PARTS:
        table = table.append_column(name, pa.array([one.get(name) for one in rows], pa.list_(pa.string())))
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text('{"schema_version": 2}')
    pq.write_table(table, folder / "index.parquet")
    selection = selection_of(*((one["key"], 1, 128, 96) for one in rows))
    pq.write_table(selection, folder / "select_pretrain.parquet")
    build_index(folder, table, {"pretrain": selection}, META)
    return Index.open(folder, "pretrain")


def test_every_part_of_a_caption_is_read_back_and_changes_the_digest(tmp_path: Path) -> None:
    index = with_parts(tmp_path / "full", [row("a:1", **PARTS), row("a:2")])
    assert index.record(0) == Caption(["1girl"], ["smile", "hat"], ["best"], PARTS["prose"], [(["x"], ["a", "b"], ["c"])])
    assert index.record(1) == Caption(["1girl"], ["smile", "hat"], [], [], [])
    plain = built(tmp_path / "plain", [row("a:1"), row("a:2")], pretrain=selection_of(("a:1", 1, 128, 96), ("a:2", 1, 128, 96)))
    old = Index.open(plain, "pretrain")
    assert index.digests()[1][1] == old.digests()[1][1], "a caption without further parts keeps its digest"
    for name in PARTS:
        other = with_parts(tmp_path / name, [row("a:1", **{name: PARTS[name]}), row("a:2")])
        assert other.digests()[1][0] not in (index.digests()[1][0], old.digests()[1][0])


def test_columns_that_say_nothing_are_not_written(tmp_path: Path) -> None:
    index = with_parts(tmp_path / "one", [row("a:1"), row("a:2")])
    assert not {*PARTS, "weight"} & set(index._file.table.column_names)


@pytest.mark.parametrize(
    "parts",
    [{"flex_tags": ["nsfw", "kid"]}, {"tail_tags": ["kid"]}, {"prose": ["A kid, who smiles."]}, {"tag_variants": ["\nkid\n"]},
     {"tag_variants": ["\nhat\nkid"]}],
)  # fmt: skip
def test_the_last_gate_sees_every_part(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Halt, match="hard-excluded"):
        with_parts(tmp_path / "set", [row("a:1", gate_rating="q", **parts)])
