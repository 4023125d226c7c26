"""Ingest: every bad row is named with file, row and reason, nothing leaves the source root, nothing is touched."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingests import BAD_CAPTIONS, BAD_LINES, BAD_POSTS, GOOD, config, run, write_picture

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig, dataset_dir, load_settings
from train.prepare import ingest, label
from train.prepare.posts.normalise import RawPost, to_record
from train.prepare.sources import danbooru, e621, gelbooru
from train.prepare.tables.quarantine import Complaint
from train.prepare.tables.schemas import RECORDS, Quarantine, quarantine_table
from train.prepare.tables.units import read_table

ROOT = Path(__file__).resolve().parents[2]


def test_bad_posts_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    lines = []
    for number, case in enumerate(BAD_POSTS):
        lines += [json.dumps(BAD_POSTS[case]), json.dumps(GOOD | {"id": 1000 + number})]
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    records, quarantine = run(config(tmp_path, tmp_path / "posts.jsonl"))
    assert set(records) == {f"s:{1000 + number}" for number in range(len(BAD_POSTS))}
    found = {entry["message"].partition(":")[0]: (entry["kind"], entry["reason"]) for entry in quarantine}
    expected = {
        f"posts.jsonl row {2 * number}": ("error", "outside_root" if case.startswith("path") else "bad_record")
        for number, case in enumerate(BAD_POSTS)
    }
    assert found == expected


def test_bad_lines_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    lines = []
    for number, case in enumerate(BAD_LINES):
        lines += [BAD_LINES[case], json.dumps(GOOD | {"id": 1000 + number}).encode()]
    (tmp_path / "posts.jsonl").write_bytes(b"\n".join(lines))
    records, quarantine = run(config(tmp_path, tmp_path / "posts.jsonl"))
    assert set(records) == {f"s:{1000 + number}" for number in range(len(BAD_LINES))}
    assert {entry["key"] for entry in quarantine} == {f"s:posts.jsonl#{2 * n}" for n in range(len(BAD_LINES))}


@pytest.mark.parametrize("tail", [b', {"id": 2, ', b", nonsense]", b""])
def test_damaged_array_keeps_what_came_before(tmp_path: Path, tail: bytes) -> None:
    many = ", ".join(json.dumps(GOOD | {"id": number}) for number in range(900))  # several read chunks
    (tmp_path / "posts.json").write_bytes(b"[" + many.encode() + tail)
    records, quarantine = run(config(tmp_path, tmp_path / "posts.json"), cut=True)
    assert len(records) == 900
    assert len(quarantine) == 1
    assert "the rest of the file is not read" in quarantine[0]["message"]


def test_bytes_that_are_not_utf8_cost_one_post(tmp_path: Path) -> None:
    posts = [json.dumps(GOOD | {"id": number, "tag_string_general": f"x{number}"}) for number in range(4)]
    (tmp_path / "posts.json").write_bytes(f"[{', '.join(posts)}]".encode().replace(b"x2", b"\xff\xfe"))
    records, quarantine = run(config(tmp_path, tmp_path / "posts.json"))
    assert set(records) == {"s:0", "s:1", "s:3"}
    assert [(entry["key"], entry["reason"]) for entry in quarantine] == [("s:2", "bad_record")]


@pytest.mark.parametrize(("choice", "tags"), [("drop", ["a"]), ("replace", ["a", "foo_bar"])])
def test_on_bad_tag(tmp_path: Path, choice: str, tags: list[str]) -> None:
    (tmp_path / "posts.jsonl").write_text(json.dumps(GOOD | {"tag_string_general": "a foo,_bar"}))
    records, quarantine = run(config(tmp_path, tmp_path / "posts.jsonl", on_bad_tag=choice))
    assert records["s:1"]["tags_general"] == tags
    assert not quarantine


def test_escaped_only_where_declared(tmp_path: Path) -> None:
    (tmp_path / "posts.jsonl").write_text(json.dumps(GOOD | {"tags_character": ["hero_\\(title\\)", "\\m/"]}))
    for escaped, tags in ((False, ["hero_\\(title\\)", "\\m/"]), (True, ["hero_(title)", "\\m/"])):
        records, _ = run(config(tmp_path, tmp_path / "posts.jsonl", escaped=escaped))
        assert records["s:1"]["tags_character"] == tags


def test_equal_ids(tmp_path: Path) -> None:
    posts = [GOOD, GOOD, GOOD | {"id": 2}, GOOD | {"id": 2, "score": 9}, GOOD | {"id": 3}]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, posts)))
    config_ = config(tmp_path, tmp_path / "posts.jsonl")
    records, quarantine = run(config_)
    assert set(records) == {"s:1", "s:3"}
    assert [entry["key"] for entry in quarantine] == ["s:2", "s:2"]
    assert "row 2: same id with other content in posts.jsonl row 3" in quarantine[0]["message"]
    assert "row 3: same id with other content in posts.jsonl row 2" in quarantine[1]["message"]
    assert json.loads((dataset_dir(config_) / "dataset.json").read_text())["ingest"]["repeated"] == 1


def test_banned_post_without_file_is_a_record(tmp_path: Path) -> None:
    banned = {"id": 1, "rating": "g", "tag_string_general": "x", "is_banned": True}
    (tmp_path / "posts.jsonl").write_text(json.dumps(banned))
    records, _ = run(config(tmp_path, tmp_path / "posts.jsonl"))
    assert (records["s:1"]["is_banned"], records["s:1"]["md5"]) == (True, None)


def test_hard_exclusion_is_marked_counted_and_unlabelled(tmp_path: Path) -> None:
    posts = [GOOD, GOOD | {"id": 2, "tag_string_general": "loli"}, GOOD | {"id": 3, "rating": None, "tags_meta": ["kid"]}]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, posts)))
    config_ = config(tmp_path, tmp_path / "posts.jsonl")
    records, quarantine = run(config_)
    assert {key: row["hard_exclusion"] for key, row in records.items()} == {"s:1": None, "s:2": "R1", "s:3": "R2"}
    found = [(entry["key"], entry["kind"], entry["reason"], entry["message"]) for entry in quarantine]
    assert found == [("s:2", "excluded", "excluded_tag", "R1"), ("s:3", "excluded", "excluded_tag", "R2")]
    label.run(config_)
    assert read_table(dataset_dir(config_), "labels", ["key"]).to_pylist() == [{"key": "s:1"}]
    assumed = config(tmp_path, tmp_path / "posts.jsonl", assume_rating="g")
    assert run(assumed)[0]["s:3"]["hard_exclusion"] is None
    facts = json.loads((dataset_dir(assumed) / "dataset.json").read_text())
    assert facts["sources"][0]["assume_rating"] == "g"


def test_captions(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name, data in BAD_CAPTIONS.items():
        write_picture(source / f"{name}.png")
        (source / f"{name}.txt").write_bytes(data)
    write_picture(source / "none.png")
    write_picture(source / "empty.png")
    (source / "empty.txt").write_text("")
    write_picture(source / "a.png")
    write_picture(source / "a.jpg")
    (source / "a.txt").write_bytes(b"\xef\xbb\xbf1girl, ||| smile\r\nmore")
    records, quarantine = run(config(tmp_path, source, "sidecar", assume_rating="g"))
    assert {key: row["caption"] for key, row in records.items()} == {
        "s:a.jpg": "1girl, ||| smile, more", "s:a.png": "1girl, ||| smile, more", "s:empty.png": "",
    }  # fmt: skip
    reasons = {entry["key"]: entry["reason"] for entry in quarantine}
    assert reasons == {f"s:{name}.png": "bad_caption" for name in BAD_CAPTIONS} | {"s:none.png": "missing_caption"}


@pytest.mark.parametrize(
    ("choice", "fixed", "flex"),
    [("fork", ["a"], ["b ||| c"]), ("suffix", ["a", "c"], ["b"])],
)
def test_second_separator(tmp_path: Path, choice: str, fixed: list[str], flex: list[str]) -> None:
    write_picture(tmp_path / "in" / "x.png")
    (tmp_path / "in" / "x.txt").write_text("a ||| b ||| c")
    config_ = config(tmp_path, tmp_path / "in", "sidecar", on_second_separator=choice, assume_rating="g")
    run(config_)
    label.run(config_)
    row = read_table(dataset_dir(config_), "labels").to_pylist()[0]
    assert (row["fixed_tags"], row["flex_tags"]) == (fixed, flex)


def test_nothing_outside_the_root(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    write_picture(secret / "x.png")
    (secret / "x.txt").write_text("the secret")
    source = tmp_path / "in"
    write_picture(source / "ok.png")
    (source / "ok.txt").write_text("fine")
    (source / "link.png").symlink_to(secret / "x.png")
    (source / "folder").symlink_to(secret)
    write_picture(source / "text.png")
    (source / "text.txt").symlink_to(secret / "x.txt")
    (source / "loop").symlink_to(source)
    (source / "inside.png").symlink_to(source / "ok.png")
    (source / "inside.txt").write_text("also fine")
    write_picture(source / "line\nbreak.png")
    with open(os.path.join(os.fsencode(source), b"\xff.png"), "wb") as file:
        file.write(b"x")
    records, quarantine = run(config(tmp_path, source, "sidecar", assume_rating="g"))
    assert set(records) == {"s:ok.png", "s:inside.png"}
    assert {entry["key"]: entry["reason"] for entry in quarantine} == {
        "s:link.png": "outside_root", "s:folder/x.png": "outside_root", "s:text.txt": "outside_root",
        "s:text.png": "outside_root", "s:line\\nbreak.png": "bad_record", "s:\\udcff.png": "bad_record",
    }  # fmt: skip
    assert b"the secret" not in b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_hostile_tar(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as archive:
        for name in ("../up.png", "/abs.png", "ok.png", "ok.txt", "big.png", "big.txt", "nojson.png", "nojson.json"):
            data = {"ok.txt": b"fine", "big.txt": b"x" * 70_000, "nojson.json": b"{"}.get(name, b"\x89PNG")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    (tmp_path / "in" / "cut.tar").write_bytes((tmp_path / "in" / "a.tar").read_bytes()[:700])
    records, quarantine = run(config(tmp_path, tmp_path / "in", "webdataset", assume_rating="g"), cut=True)
    assert set(records) == {"s:a.tar/ok.png"}
    reasons = {entry["key"]: entry["reason"] for entry in quarantine}
    assert reasons == {
        "s:a.tar/../up.png": "outside_root", "s:a.tar//abs.png": "outside_root", "s:a.tar/link.png": "outside_root",
        "s:a.tar/hard.png": "outside_root", "s:a.tar/dev.png": "bad_record", "s:a.tar/big.png": "bad_caption",
        "s:a.tar/nojson.png": "bad_record", "s:cut.tar/../up.png": "outside_root",
    } | {key: "bad_record" for key in reasons if key == "s:cut.tar"}  # fmt: skip


def test_tables_with_bad_rows(tmp_path: Path) -> None:
    columns = {"id": "id", "tags": "tags"}
    (tmp_path / "a.csv").write_bytes(b'id,tags\n1,x y\n2\n3,x,y\n4,\xff\n5,"a\nb c"\n6,ok\n,none\n')
    records, quarantine = run(config(tmp_path, tmp_path / "a.csv", "table", columns=columns, tag_separator=" "))
    assert set(records) == {"s:1", "s:6"}  # a line break is no declared separator
    assert {entry["message"].partition(":")[0] for entry in quarantine} == {f"a.csv row {n}" for n in (1, 2, 3, 4, 6)}
    broken = pa.array([["x"], None, ["a,b"]])
    pq.write_table(pa.table({"id": [1, 2, 3], "tags": broken}), tmp_path / "b.parquet")
    records, quarantine = run(config(tmp_path, tmp_path / "b.parquet", "table", columns=columns))
    assert set(records) == {"s:1", "s:2"}
    assert "b.parquet row 2" in quarantine[0]["message"]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(Halt, match="no record, 1 in quarantine"):
        run(config(tmp_path, tmp_path / "b.parquet", "table", columns=columns))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"columns": {"tag": "x"}}, "columns names tag"), ({"columns": {"id": "id"}, "images": "nowhere"}, "nowhere")],
)
def test_config_errors(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    (tmp_path / "a.csv").write_text("id\n1\n")
    with pytest.raises(Halt, match=words) as stopped:
        run(config(tmp_path, tmp_path / "a.csv", "table", **options))
    assert stopped.value.code == ExitCode.USAGE


@pytest.mark.parametrize("name", ["a.csv", "b.parquet"])
def test_a_mapped_column_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    table = pa.table({"id": [1], "rating": ["g"], "tags": ["x"]})
    pyarrow.csv.write_csv(table, tmp_path / name) if name == "a.csv" else pq.write_table(table, tmp_path / name)
    columns = {"id": "id", "tags": "tags", "rating": "ratting"}
    with pytest.raises(Halt, match=r"columns\.rating is 'ratting'.* did you mean rating\?") as stopped:
        run(config(tmp_path, tmp_path / name, "table", columns=columns, tag_separator=" "))
    assert stopped.value.code == ExitCode.USAGE


def test_a_file_that_is_cut_off_is_a_complaint_whatever_its_share(tmp_path: Path) -> None:
    text = json.dumps([GOOD | {"id": number} for number in range(1000)])
    (tmp_path / "posts.json").write_text(text[: len(text) // 2])
    settings = config(tmp_path, tmp_path / "posts.json")
    for _ in range(2):  # the second run finds the sources as they were
        with pytest.raises(Complaint, match="1 of the files could not be read to the end") as stopped:
            ingest.run(settings)
        assert stopped.value.code == ExitCode.MISMATCH


def test_too_many_errors_finish_first(tmp_path: Path) -> None:
    (tmp_path / "posts.jsonl").write_text("\n".join([json.dumps(GOOD), "broken"]))
    config_ = dataclasses.replace(config(tmp_path, tmp_path / "posts.jsonl"), max_quarantine_fraction=0.02)
    with pytest.raises(Complaint, match=r"1 of 2 records .* posts.jsonl row 1") as stopped:
        ingest.run(config_)
    assert stopped.value.code == ExitCode.MISMATCH
    assert len(read_table(dataset_dir(config_), "records")) == 1


def test_user_files_stay_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_picture(source / "1.png")
    (source / "1.json").write_text(json.dumps(GOOD))
    before = {path: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) for path in source.iterdir()}
    records, _ = run(config(tmp_path, source))
    assert records["s:1"]["uri"] == "1.png"
    assert {p: (hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns) for p in source.iterdir()} == before


def test_schema_and_second_run(tmp_path: Path) -> None:
    posts = "\n".join(json.dumps(GOOD | {"id": number}) for number in range(30))
    (tmp_path / "posts.jsonl").write_text(posts)
    config_ = config(tmp_path, tmp_path / "posts.jsonl")
    run(config_)
    table = read_table(dataset_dir(config_), "records")
    assert table.schema.equals(RECORDS)
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    files = {path: path.read_bytes() for path in dataset_dir(config_).rglob("*.parquet")}
    run(config_)
    assert {path: path.read_bytes() for path in dataset_dir(config_).rglob("*.parquet")} == files


def test_unchanged_sources_are_not_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    write_picture(source / "1.png")
    (source / "1.json").write_text(json.dumps(GOOD))
    (source / "2.json").write_text("broken")
    config_ = config(tmp_path, source)
    first = run(config_)
    assert "nothing to do" not in capsys.readouterr().out
    assert run(config_) == first
    assert "nothing to do\ningest: 1 records, 1 bad_record" in capsys.readouterr().out
    strict = dataclasses.replace(config_, max_quarantine_fraction=0.1)
    with pytest.raises(Complaint):
        ingest.run(strict)  # the limit holds for a skipped run too
    changes = (
        lambda: (source / "2.json").write_text(json.dumps(GOOD | {"id": 2})),
        lambda: write_picture(source / "2.png"),
        lambda: (source / "1.json").unlink(),
        lambda: next((dataset_dir(config_) / "records").glob("*.parquet")).unlink(),
    )
    for change in changes:
        change()
        capsys.readouterr()
        run(config_)
        assert "nothing to do" not in capsys.readouterr().out
        run(config_)
        assert "nothing to do" in capsys.readouterr().out
    run(config(tmp_path, source, rating_scheme="sqe"))
    assert "nothing to do" not in capsys.readouterr().out


def test_several_spills_and_units_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_SPILL_ROWS", 7)
    monkeypatch.setattr(ingest, "ROW_GROUP_ROWS", 10)
    numbers = [(number * 37) % 101 for number in range(101)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(GOOD | {"id": n, "score": n}) for n in numbers))
    records, _ = run(config(tmp_path, tmp_path / "p.jsonl"))
    assert list(records) == sorted(f"s:{number}" for number in range(101))
    assert all(row["score"] == row["source_id"] for row in records.values())
    assert len(list((tmp_path / "out" / "d" / "records").glob("*.parquet"))) == 11


def test_memory_stays_small_on_hostile_files(tmp_path: Path) -> None:
    with open(tmp_path / "posts.jsonl", "wb") as file:
        file.write(json.dumps(GOOD).encode() + b"\n")
        for _ in range(200):
            file.write(b"[" + b"1," * (1 << 18))  # one line of 100 MB
        file.write(b"\n" + json.dumps(GOOD | {"id": 3}).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records, quarantine = run(config(tmp_path, tmp_path / "posts.jsonl"))
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert set(records) == {"s:1", "s:3"}
    assert "longer than" in quarantine[0]["message"]
    assert grown_mb < 256


def test_settings_name_the_key(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text("name: d\nsources: [{name: s, adapter: danbooru, path: x}]\n")
    assert load_settings([path], ["policy.preset=animagine31"]).policy.preset == "animagine31"
    for override, words in {
        "selct.ft1={}": "did you mean select",
        "policy.presett=default": "policy.preset",
        "exclude.hard=false": "unknown key exclude.hard",
        "select.ft1.whre=[]": r"unknown key select.ft1.whre: did you mean select.ft1.where\?",
        "select.ft1.quota.tota=3": "did you mean select.ft1.quota.total",
        "where=[]": r"did you mean select.\*.where\?",
        "sources=[{name: s, adaptr: danbooru, path: x}]": r"did you mean sources\[0\].adapter\?",
        "policy.quality.zzz=1": "policy.quality knows group_by, min_age_days",
        "name=../up": "name is",
        "policy.aesthetic.thresholds=[0.1,0.2,0.3]": "must fall",
        "dedupe.phash_distance=9": "phash_distance",
        "score.source=column": "score.path",
    }.items():
        with pytest.raises(Halt, match=f"(?i){words}") as stopped:
            load_settings([path], [override])
        assert stopped.value.code == ExitCode.USAGE


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "posts.jsonl").write_text(json.dumps(GOOD) + "\nbroken\n")
    (tmp_path / "c.yaml").write_text(
        f"name: d\nroot: {tmp_path}/out\nsources: [{{name: s, adapter: danbooru, path: {tmp_path}/posts.jsonl}}]\n"
    )
    call = [sys.executable, str(ROOT / "scripts" / "prepare.py")]

    def code(*arguments: str) -> int:
        return subprocess.run([*call, *arguments], cwd=tmp_path, capture_output=True, check=False).returncode

    assert code("ingest", "--config", "c.yaml") == 7
    assert code("ingest", "--config", "c.yaml", "max_quarantine_fraction=0.5") == 0
    assert code("label", "--config", "c.yaml", "polcy.preset=default") == 2


def test_pipes_and_devices_are_named_not_read(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_picture(source / "a.png")
    os.mkfifo(source / "a.txt")
    os.mkfifo(source / "b.png")
    (source / "c.json").symlink_to("/dev/zero")
    deep = source
    for _ in range(150):
        deep = deep / "d"
    write_picture(deep / "x.png")
    (deep / "x.txt").write_text("fine")
    records, quarantine = run(config(tmp_path, source, "sidecar", assume_rating="g"))
    assert [row["caption"] for row in records.values()] == ["fine"]
    assert {entry["key"]: entry["reason"] for entry in quarantine} == {
        "s:a.png": "bad_caption", "s:a.txt": "bad_record", "s:b.png": "bad_record", "s:c.json": "outside_root",
    }  # fmt: skip


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.just("\ud800"), st.just("1")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
_NAMES = [
    "id", "rating", "score", "created_at", "media_asset", "tags", "tag_string", "tags_meta", "tag_string_general", "md5",
    "file_ext", "file_name", "filename", "image_width", "file_size", "is_deleted", "parent_id", "file", "flags", "image",
]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    adapter=st.sampled_from([danbooru, e621, gelbooru]),
    good=st.booleans(),
    post=st.dictionaries(st.sampled_from(_NAMES), _JSON),
)
def test_any_json_is_a_record_or_a_reason(adapter: Any, good: bool, post: dict[str, Any]) -> None:
    value = ({"id": 5, "tags": "a b"} if good else {}) | post
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "posts.json").write_text(json.dumps(value))
        source = SourceConfig("s", "danbooru", folder)
        found = list(adapter.read(source))
    assert len(found) == 1 or "posts" in value or "post" in value
    rows = [to_record(post, source) if isinstance(post, RawPost) else post for post in found]
    kept = [row | {"place": "x"} for row in rows if not isinstance(row, Quarantine)]
    pa.RecordBatch.from_pylist(kept, schema=ingest._SPILL_SCHEMA)
    quarantine_table([row for row in rows if isinstance(row, Quarantine)])
