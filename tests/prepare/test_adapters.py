"""The same six posts in every layout give the same records, as far as the layout carries the fields."""

from __future__ import annotations

import csv
import html
import io
import json
import sqlite3
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sixposts import (
    COLUMNS,
    NAMES,
    POSTS,
    api_post,
    dump_post,
    flat_post,
    picture,
    pictures,
    records,
    same,
    source,
)

from train.base.errors import ExitCode, Halt
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost
from train.prepare.tables.schemas import TAG_GROUPS, Quarantine


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of the layout that gallery-dl writes, checked against literals."""
    folder = tmp_path_factory.mktemp("perpost")
    for post in POSTS:
        picture(folder / f"danbooru_{post['id']}.png")
        (folder / f"danbooru_{post['id']}.png.json").write_text(json.dumps(api_post(post)))
    rows = records(source(folder, "danbooru"))
    assert [row["key"] for row in rows] == [f"s:{1000 + number}" for number in range(6)]
    third = rows[3]
    assert (third["rating"], third["score"], third["created_year"], third["width"]) == ("e", 25, 2011, 43)
    assert third["tags_general"] == ["1girl", "long_hair", "^_^", 'say_"cheese"', "k-on!"]
    assert third["tags_character"] == ["hero_3_(title)"]
    assert rows[4]["is_deleted"]
    assert rows[5]["parent_id"] == 1000
    return rows


def test_danbooru_array_lines_and_page(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    posts = [api_post(post) for post in POSTS]
    texts = {
        "array.json": json.dumps(posts), "indented.json": json.dumps(posts, indent=2),
        "lines.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, posts)), "page.json": json.dumps({"posts": posts}),
        "lines.json": "\n".join(map(json.dumps, posts)) + "\n",
    }  # fmt: skip
    for name, text in texts.items():
        folder = tmp_path / name.replace(".", "_")
        pictures(folder)
        (folder / name).write_text(text)
        same(records(source(folder / name, "danbooru")), expected)


def test_old_dump(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path)
    (tmp_path / "dump.json").write_text("\n".join(json.dumps(dump_post(post)) for post in POSTS))
    same(records(source(tmp_path, "danbooru")), expected)


def test_old_dump_with_three_ratings(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "dump.jsonl").write_text("\n".join(json.dumps(dump_post(post)) for post in POSTS))
    rows = records(source(tmp_path, "danbooru", rating_scheme="sqe"))
    assert [row["rating"] for row in rows] == ["g", "g", "q", "e", "g", "g"]


def test_table_parquet(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path)
    rows = [flat_post(post) for post in POSTS]
    for row in rows:
        del row["tags"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "posts.parquet", row_group_size=4)
    same(records(source(tmp_path / "posts.parquet", "table", columns=COLUMNS)), expected)


def test_table_csv_keeps_quotes(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path)
    with open(tmp_path / "posts.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, sorted(COLUMNS.values()))
        writer.writeheader()
        for post in POSTS:
            row = flat_post(post) | {f"tags_{group}": " ".join(tags) for group, tags in post["tags"].items()}
            writer.writerow({name: row[name] for name in COLUMNS.values()})
    found = records(source(tmp_path / "posts.csv", "table", columns=COLUMNS, tag_separator=" "))
    same(found, expected)


def test_table_text_tags_need_a_separator(tmp_path: Path) -> None:
    (tmp_path / "posts.csv").write_text("id,tags\n1,a b\n")
    with pytest.raises(Halt) as stopped:
        records(source(tmp_path / "posts.csv", "table", columns={"id": "id", "tags": "tags"}))
    assert stopped.value.code == ExitCode.USAGE
    assert "tag_separator" in stopped.value.message


def test_lists_that_a_table_holds_as_text(tmp_path: Path) -> None:
    cells = ['["long hair", "a, b"]', "[]", "['long hair', 'smile']", '["long hair" "smile"]', "[x], smile"]
    (tmp_path / "t.csv").write_text("id,tags\n" + "".join(f'{n},"{cell.replace(chr(34), 2 * chr(34))}"\n' for n, cell in enumerate(cells)))
    columns = {"id": "id", "tags": "tags"}
    told = source(tmp_path / "t.csv", "table", columns=columns, tag_separator=", ")
    found = [post if isinstance(post, Quarantine) else post.tags.get("general", []) for post in read_source(told)]
    assert found == [["long hair", "a, b"], [], ["long hair", "smile"], ["long hair", "smile"], ["[x]", "smile"]]


def test_imagefolder_metadata(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path / "train")
    lines = [json.dumps(flat_post(post) | {"file_name": f"{post['id']}.png"}) for post in POSTS]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    found = records(source(tmp_path, "imagefolder", columns=COLUMNS))
    same(found, expected)
    assert found[0]["uri"] == "train/1000.png"


def _embedded(tmp_path: Path) -> pa.Table:
    data = picture(tmp_path / "x.png")
    (tmp_path / "x.png").unlink()
    rows = [{k: v for k, v in flat_post(post).items() if k != "tags"} for post in POSTS]
    table = pa.Table.from_pylist(rows)
    return table.append_column("image", pa.array([{"bytes": data, "path": None}] * 6))


def test_imagefolder_parquet_with_embedded_images(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pq.write_table(_embedded(tmp_path), tmp_path / "train-00000.parquet", row_group_size=4)
    found = records(source(tmp_path, "imagefolder", columns=COLUMNS))
    same(found, expected)
    assert found[5]["member"] == "row:5:image"
    same(records(source(tmp_path / "train-00000.parquet", "table", columns=COLUMNS | {"image": "image"})), expected)


def test_saved_dataset(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    table = _embedded(tmp_path)
    path = str(tmp_path / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    same(records(source(tmp_path, "imagefolder", columns=COLUMNS)), expected)


def test_results_that_datasets_cached_beside_a_saved_dataset_are_no_data(tmp_path: Path) -> None:
    import datasets

    data = picture(tmp_path / "x.png")
    rows = {"image": [{"bytes": data, "path": None}] * 2, "text": ["a", "b"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"text": row["text"] + "!"})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    found = records(source(tmp_path / "saved", "imagefolder"))
    assert [(row["key"], row["caption"]) for row in found] == [
        (f"s:data-00000-of-00001.arrow#{number}", text) for number, text in enumerate("ab")
    ]


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_webdataset(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    data = picture(tmp_path / "x.png")
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for post in POSTS:
            _add(archive, f"{post['id']}.PNG", data)
            _add(archive, f"{post['id']}.json", json.dumps(api_post(post)).encode())
    same(records(source(tmp_path, "webdataset")), expected)


def test_webdataset_key_ends_at_the_first_dot(tmp_path: Path) -> None:
    data = picture(tmp_path / "x.png")
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        _add(archive, "dir.d/a.left.png", data)
        _add(archive, "dir.d/a.txt", b"1girl ||| smile")
    rows = records(source(tmp_path / "00000.tar", "webdataset"))
    assert [(row["key"], row["caption"]) for row in rows] == [("s:00000.tar/dir.d/a.left.png", "1girl ||| smile")]


def test_webdataset_metadata_without_a_picture_is_reported(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        _add(archive, "b.json", b"{}")
        _add(archive, "a.png", b"x")
        _add(archive, "a.txt", b"1girl ||| smile")
        _add(archive, "c.txt", b"1girl ||| hat")
    found = list(read_source(source(tmp_path / "00000.tar", "webdataset")))
    lost = [(entry.key, entry.reason) for entry in found if isinstance(entry, Quarantine)]
    assert lost == [("s:00000.tar/b.json", "missing_file"), ("s:00000.tar/c.txt", "missing_file")]
    assert len(found) == 3


def _database(path: Path, older: bool) -> None:
    types = {"general": 0, "artist": 1, "character": 2, "copyright": 3, "meta": 4}
    names = sorted({(tag, group) for post in POSTS for group, tags in post["tags"].items() for tag in tags})
    ids = {tag: 40 + number for number, (tag, _) in enumerate(names)}
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT, type INTEGER, popularity INTEGER)")
    connection.executemany("INSERT INTO tag VALUES (?, ?, ?, 0)", [(ids[tag], tag, types[g]) for tag, g in names])
    fields = [name for name in POSTS[0] if name != "tags" and name != "is_pending"]
    connection.execute(f"CREATE TABLE post ({', '.join(fields)}, tag_list)")
    connection.execute("CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER)")
    for post in POSTS:
        tags = [ids[tag] for tags in post["tags"].values() for tag in tags]
        row = [post[name] if name != "rating" else "gsqe".index(post["rating"]) for name in fields]
        listed = "".join(f"${_base36(tag)}#" for tag in tags) if older else None
        connection.execute(f"INSERT INTO post VALUES ({', '.join('?' * len(row))}, ?)", [*row, listed])
        if not older:
            pairs = [(post["id"], tag) for tag in tags]
            connection.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
    connection.commit()
    connection.close()


def _base36(number: int) -> str:
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return (_base36(number // 36) if number >= 36 else "") + digits[number % 36]


@pytest.mark.parametrize("older", [False, True])
def test_danbooru2023_sqlite(tmp_path: Path, expected: list[dict[str, Any]], older: bool) -> None:
    pictures(tmp_path)
    _database(tmp_path / "danbooru2023.db", older)
    same(records(source(tmp_path / "danbooru2023.db", "danbooru2023")), expected)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".db", *[".png"] * 6]  # no journal beside it


def test_danbooru2023_parquet_and_tars(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    data = picture(tmp_path / "x.png")
    _database(tmp_path / "d.db", older=False)
    connection = sqlite3.connect(tmp_path / "d.db")
    for table in ("post", "tag", "posttagrelation"):
        cursor = connection.execute(f"SELECT * FROM {table}")
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{table}.parquet")
    connection.close()
    for post in POSTS:
        with tarfile.open(tmp_path / f"data-{post['id'] % 1000:04d}.tar", "w") as archive:
            _add(archive, f"{post['id']}.png", data)
    found = records(source(tmp_path, "danbooru2023"))
    same(found, expected)
    assert (found[3]["uri"], found[3]["member"]) == ("data-0003.tar", "1003.png")


def test_e621(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path)
    posts = [
        {
            "id": post["id"], "created_at": post["created_at"], "rating": {"g": "s"}.get(post["rating"], post["rating"]),
            "score": {"up": post["up_score"], "down": -5, "total": post["score"]}, "fav_count": post["fav_count"],
            "file": {"width": post["image_width"], "height": 50, "ext": "png", "size": 0, "md5": post["md5"]},
            "flags": {"deleted": post["is_deleted"], "pending": False},
            "relationships": {"parent_id": post["parent_id"], "has_children": post["has_children"]},
            "tags": post["tags"] | {"species": ["gérbil"], "lore": [], "invalid": ["typo"]},
        }
        for post in POSTS
    ]  # fmt: skip
    (tmp_path / "page.json").write_text(json.dumps({"posts": posts}))
    found = records(source(tmp_path, "e621"))
    assert all(row["tags_species"] == ["gérbil"] for row in found)
    assert [row["rating"] for row in found] == ["g", "g", "q", "e", "g", "g"]  # s is safe there
    same(found, expected, but=("tags_species", "rating"))


def test_gelbooru_with_dictionary(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path)
    words = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
    posts = []
    for number, post in enumerate(POSTS):
        flat = " ".join(html.escape(tag) for tags in post["tags"].values() for tag in tags)
        posts.append(
            {
                "id": post["id"], "created_at": f"Wed Dec 31 23:30:00 -0500 20{8 + number:02d}", "md5": post["md5"],
                "score": post["score"], "width": post["image_width"], "height": 50, "image": f"{post['id']}.png",
                "rating": words[post["rating"]], "tags": flat, "parent_id": post["parent_id"] or 0,
                "has_children": str(post["has_children"]).lower(), "status": "deleted" if number == 4 else "active",
            }
        )  # fmt: skip
    (tmp_path / "posts.json").write_text(json.dumps({"@attributes": {"limit": 100}, "post": posts}))
    numbers = {name: number for number, name in NAMES.items()}
    with open(tmp_path / "tags.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "category", "count", "aliases"])
        for tag, group in sorted({(t, g) for post in POSTS for g, tags in post["tags"].items() for t in tags}):
            writer.writerow([tag, numbers[group], 1, ""])
    found = records(source(tmp_path / "posts.json", "gelbooru", dictionary=str(tmp_path / "tags.csv")))
    same(found, expected, but=("up_score", "down_score", "fav_count", "file_size"))
    plain = records(source(tmp_path / "posts.json", "gelbooru"))
    assert plain[0]["tags_general"][-1] == "highres"
    assert plain[0]["tags_character"] == []


def test_sidecar_and_sd_scripts_agree(tmp_path: Path) -> None:
    texts = {}
    for number, name in enumerate(["a.jpg.png", "a.JFIF", "b/c.d.png", "b/e.png", "f.Jpe", "g.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
        texts[name] = f"{number}girls, hero ||| smile, tag {number}"
        stem = name.rpartition(".")[0]
        (tmp_path / f"{stem}.txt").write_bytes(b"\xef\xbb\xbf" + texts[name].encode() + b"\r\n\r\n")
    sidecars = records(source(tmp_path, "sidecar"))
    assert {row["key"]: row["caption"] for row in sidecars} == {f"s:{name}": text for name, text in texts.items()}
    metadata = {
        name if "/" not in name else name.rpartition(".")[0]: dict(zip(("caption", "tags"), _halves(text), strict=True))
        for name, text in texts.items()
    }
    metadata[str(tmp_path / "g.png")] = metadata.pop("g.png")
    (tmp_path / "meta_cap.json").write_text(json.dumps(metadata))
    same(records(source(tmp_path / "meta_cap.json", "sd_scripts")), sidecars)
    (tmp_path / "windows.json").write_text(json.dumps({k.replace("/", "\\") if "b/" in k else k: v for k, v in metadata.items()}))
    same(records(source(tmp_path / "windows.json", "sd_scripts")), sidecars)
    lines = [json.dumps({"image_path": name, "caption": text}) for name, text in texts.items()]
    (tmp_path / "meta.jsonl").write_text("\n".join(lines))
    same(records(source(tmp_path / "meta.jsonl", "sd_scripts")), sidecars)


def _halves(text: str) -> tuple[str, str]:
    first, _, rest = text.partition(", ")
    return first, rest


@pytest.mark.parametrize("folder", ["", "images/"])
def test_deepghs(tmp_path: Path, expected: list[dict[str, Any]], folder: str) -> None:
    data = picture(tmp_path / "x" / "x.png")
    rows = [api_post(post) | {"created_at": datetime.fromisoformat(post["created_at"]).astimezone(UTC)} for post in POSTS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet", row_group_size=4)
    (tmp_path / folder).mkdir(exist_ok=True)
    for post in POSTS[:5]:
        with tarfile.open(tmp_path / f"{folder}{post['id'] % 1000:04d}.tar", "w") as archive:
            _add(archive, f"{post['id']}.png", data)
    picture(tmp_path / "1005.png")  # as a file
    found = records(source(tmp_path, "deepghs"))
    # parquet keeps the moment, not the offset it was written in
    same(found, expected, but=("created_at", "created_year"))
    assert [row["created_year"] for row in found] == [row["created_year"] + 1 for row in expected]
    assert (found[3]["uri"], found[3]["member"]) == (f"{folder}0003.tar", "1003.png")
    assert (found[5]["uri"], found[5]["member"]) == ("1005.png", None)


def test_deepghs_with_dates_as_text(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path)
    pq.write_table(pa.Table.from_pylist([api_post(post) for post in POSTS]), tmp_path / "posts.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    found = list(read_source(source(tmp_path, "deepghs")))
    assert [entry.key for entry in found if isinstance(entry, Quarantine)] == ["s:broken.parquet#0"]
    (tmp_path / "broken.parquet").unlink()
    same(records(source(tmp_path, "deepghs")), expected)


def test_simpletuner_is_as_sidecars(tmp_path: Path) -> None:
    texts = {"a.png": "1girl ||| smile", "b/c.png": "2girls ||| hat", "d.png": "a caption"}
    for name, text in texts.items():
        picture(tmp_path / "in" / name)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(text)
    sidecars = records(source(tmp_path / "in", "sidecar"))
    rows = [
        {"id": "a", "text": texts["a.png"], "other": "unused"}, {"id": "b/c.png", "text": texts["b/c.png"], "other": None},
        {"id": "d", "text": None, "other": texts["d.png"]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "meta.parquet")
    mapped = {"caption": "text", "fallback_caption": "other"}
    config = source(tmp_path / "meta.parquet", "simpletuner", images=str(tmp_path / "in"), columns=mapped)
    same(records(config), sidecars)
    pq.write_table(pa.table({"filename": ["a.png", None, "gone"], "caption": ["x", "y", "z"]}), tmp_path / "meta.parquet")
    config = source(tmp_path / "meta.parquet", "simpletuner", images=str(tmp_path / "in"))
    first, nameless, gone = read_source(config)
    assert isinstance(first, RawPost)
    assert (first.uri, first.caption) == ("a.png", "x")
    assert isinstance(nameless, Quarantine)
    assert "columns.uri" in nameless.message
    assert isinstance(gone, Quarantine)
    assert "no image gone.*" in gone.message


def test_every_group_is_a_list(expected: list[dict[str, Any]]) -> None:
    assert all(isinstance(row[f"tags_{group}"], list) for row in expected for group in TAG_GROUPS)
