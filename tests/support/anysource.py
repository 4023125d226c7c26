"""The same few pictures in the layout of every adapter, with as little as people have: no separator, no rating, ..."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from oddimages import drawn, encoded

LACKS = ("nothing", "separator", "rating", "score", "date", "pictures", "tags")  # what a source is without
SIZES = ((64, 96), (96, 64), (64, 96), (96, 64), (64, 96))
_WORDS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
_TYPES = {"general": 0, "artist": 1, "character": 2, "copyright": 3, "meta": 4}  # of danbooru2023
Post = dict[str, Any]


def posts(lacks: str) -> list[Post]:
    """id, png, width, height, tags by group, caption, and where they are not lacking rating, score and created_at."""
    found = []
    for number in range(1 if lacks == "pictures" else len(SIZES)):
        width, height = SIZES[number]
        tags = {"general": ["smile", "long_hair", f"tag_{number}"], "character": ["hero_a"], "copyright": ["title"],
                "artist": ["someone"], "meta": ["highres"]}  # fmt: skip
        caption = f"1girl, hero a ||| smile, long hair, tag {number}"
        if lacks == "tags":  # one each
            tags, caption = {**{group: [] for group in tags}, "general": ["smile"]}, "smile"
        if lacks == "separator":
            caption = caption.replace(" |||", ",")
        about = {"rating": "gsqe"[number % 4], "score": 7 * number, "created_at": f"20{10 + number}-05-05T10:00:00+00:00"}
        about.pop({"date": "created_at"}.get(lacks, lacks), None)
        png = encoded(drawn(width, height, seed=number), "PNG")
        found.append({"id": number + 1, "png": png, "width": width, "height": height, "tags": tags, "caption": caption, **about})
    return found


def write(adapter: str, folder: Path, lacks: str) -> dict[str, Any]:
    """The source's keys beside `name`, of the layout written below `folder`."""
    folder.mkdir(parents=True)
    return {"adapter": adapter, "path": str(folder), **_LAYOUTS[adapter](folder, posts(lacks), lacks)}


def _pictures(folder: Path, found: list[Post], ending: str = "png") -> None:
    folder.mkdir(exist_ok=True)
    for post in found:
        (folder / f"{post['id']}.{ending}").write_bytes(post["png"])


def _about(post: Post) -> dict[str, Any]:
    return {key: post[key] for key in ("rating", "score", "created_at") if key in post}


def _api(post: Post) -> dict[str, Any]:
    tags = {f"tag_string_{group}": " ".join(words) for group, words in post["tags"].items()}
    return {"id": post["id"], "file_ext": "png", "image_width": post["width"], "image_height": post["height"],
            **_about(post), **tags}  # fmt: skip


def _danbooru(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    for post in found:
        (folder / f"{post['id']}.json").write_text(json.dumps(_api(post)))
    return {}


def _deepghs(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    pq.write_table(pa.Table.from_pylist([_api(post) for post in found]), folder / "metadata.parquet")
    return {}


def _table(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    tags = {f"tags_{group}": f"tags_{group}" for group in _TYPES}
    columns = {"id": "id", "uri": "file", **{key: key for key in _about(found[0])}, **tags}
    with open(folder / "posts.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns.values()))
        writer.writeheader()
        for post in found:
            words = {f"tags_{group}": " ".join(words) for group, words in post["tags"].items()}
            writer.writerow({"id": post["id"], "file": f"{post['id']}.png", **_about(post), **words})
    return {"path": str(folder / "posts.csv"), "columns": columns, "tag_separator": " "}


def _sidecar(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    for post in found:
        (folder / f"{post['id']}.txt").write_text(post["caption"])
    return {}


def _sd_scripts(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    halves = {f"{post['id']}.png": post["caption"].partition(", ") for post in found}
    metadata = {name: {"caption": first, "tags": rest} for name, (first, _, rest) in halves.items()}
    (folder / "meta.json").write_text(json.dumps(metadata))
    return {"path": str(folder / "meta.json")}


def _imagefolder(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    rows = [{"file_name": f"{post['id']}.png", "text": post["caption"], **_about(post)} for post in found]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"columns": {key: key for key in _about(found[0])}}


def _simpletuner(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder / "images", found)
    rows = [{"filename": f"{post['id']}.png", "caption": post["caption"], **_about(post)} for post in found]
    pq.write_table(pa.Table.from_pylist(rows), folder / "meta.parquet")
    columns = {"uri": "filename", "caption": "caption", **{key: key for key in _about(found[0])}}
    return {"path": str(folder / "meta.parquet"), "images": str(folder / "images"), "columns": columns}


def _webdataset(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    captions = lacks in ("separator", "tags")  # pairs of picture and .txt, else picture and post
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for post in found:
            about = post["caption"] if captions else json.dumps(_api(post))
            for ending, data in (("png", post["png"]), ("txt" if captions else "json", about.encode())):
                info = tarfile.TarInfo(f"{post['id']}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return {}


def _danbooru2023(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    words = sorted({(tag, group) for post in found for group, tags in post["tags"].items() for tag in tags})
    ids = {tag: 40 + number for number, (tag, _) in enumerate(words)}
    fields = ("id", "file_ext", "image_width", "image_height", *_about(found[0]))
    with sqlite3.connect(folder / "posts.db") as connection:
        connection.execute("CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT, type INTEGER, popularity INTEGER)")
        connection.executemany("INSERT INTO tag VALUES (?, ?, ?, 0)", [(ids[tag], tag, _TYPES[g]) for tag, g in words])
        connection.execute(f"CREATE TABLE post ({', '.join(fields)}, tag_list)")
        connection.execute("CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER)")
        for post in found:
            row = {**_api(post), **({"rating": "gsqe".index(post["rating"])} if "rating" in post else {})}
            connection.execute(f"INSERT INTO post VALUES ({', '.join('?' * len(fields))}, NULL)", [row[f] for f in fields])
            pairs = [(post["id"], ids[tag]) for tags in post["tags"].values() for tag in tags]
            connection.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
    connection.close()
    return {"path": str(folder / "posts.db")}


def _e621(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    rows = []
    for post in found:
        row = {"id": post["id"], "file": {"width": post["width"], "height": post["height"], "ext": "png"},
               "tags": {**post["tags"], "species": []}}  # fmt: skip
        row |= {"score": {"up": 1, "down": 0, "total": post["score"]}} if "score" in post else {}
        row |= {"rating": {"g": "s"}.get(post["rating"], post["rating"])} if "rating" in post else {}
        rows.append({**row, **{key: post[key] for key in ("created_at",) if key in post}})
    (folder / "page.json").write_text(json.dumps({"posts": rows}))
    return {}


def _gelbooru(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    _pictures(folder, found)
    rows = []
    for post in found:
        row = {"id": post["id"], "width": post["width"], "height": post["height"], "image": f"{post['id']}.png",
               "tags": " ".join(tag for tags in post["tags"].values() for tag in tags), "has_children": "false"}  # fmt: skip
        row |= {"rating": _WORDS[post["rating"]]} if "rating" in post else {}
        row |= {"score": post["score"]} if "score" in post else {}
        row |= {"created_at": f"Wed May 05 10:00:00 +0000 20{10 + post['id']}"} if "created_at" in post else {}
        rows.append(row)
    (folder / "posts.json").write_text(json.dumps({"post": rows}))
    return {"path": str(folder / "posts.json")}


def _huggingface(folder: Path, found: list[Post], lacks: str) -> dict[str, Any]:
    """Embedded in parquet as `datasets` writes it, classes as numbers."""
    import datasets

    rows = [{"image": {"bytes": post["png"], "path": f"{post['id']}.png"}, "text": post["caption"], **_about(post)} for post in found]
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "created_at": datasets.Value("string"),
             "rating": datasets.ClassLabel(names=list("gsqe")), "score": datasets.Value("int32")}  # fmt: skip
    features = datasets.Features({column: kinds[column] for column in rows[0]})
    (folder / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    return {"columns": {key: key for key in _about(found[0])}}


_LAYOUTS: dict[str, Callable[[Path, list[Post], str], dict[str, Any]]] = {
    "danbooru": _danbooru, "table": _table, "sidecar": _sidecar, "sd_scripts": _sd_scripts, "imagefolder": _imagefolder,
    "webdataset": _webdataset, "danbooru2023": _danbooru2023, "e621": _e621, "gelbooru": _gelbooru, "deepghs": _deepghs,
    "simpletuner": _simpletuner, "huggingface": _huggingface,
}  # fmt: skip
ADAPTERS = tuple(_LAYOUTS)
