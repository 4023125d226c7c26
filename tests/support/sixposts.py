"""Six posts, told in every layout, and the records that each of them must give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from train.config.dataset import SourceConfig
from train.prepare.folders.files import read_image
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost, to_record
from train.prepare.tables.schemas import Quarantine

NAMES = {0: "general", 1: "artist", 3: "copyright", 4: "character", 5: "meta"}


def post_of(number: int) -> dict[str, Any]:
    return {
        "id": 1000 + number, "created_at": f"20{8 + number:02d}-12-31T23:30:00-05:00", "rating": "gsqegs"[number],
        "score": 10 * number - 5, "up_score": 10 * number, "down_score": -5, "fav_count": number,
        "image_width": 40 + number, "image_height": 50, "file_size": 0, "file_ext": "png", "md5": f"{number:032x}",
        "is_deleted": number == 4, "is_banned": False, "is_pending": False,
        "parent_id": 1000 if number == 5 else None, "has_children": number == 0,
        "tags": {
            "general": ["1girl", "long_hair", "^_^", 'say_"cheese"', "k-on!"], "character": [f"hero_{number}_(title)"],
            "copyright": ["title"], "artist": ["someone"], "meta": ["highres"],
        },
    }  # fmt: skip


POSTS = [post_of(number) for number in range(6)]


def picture(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(path)
    return path.read_bytes()


def api_post(post: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in post.items() if key != "tags"}
    return rest | {f"tag_string_{group}": " ".join(tags) for group, tags in post["tags"].items()}


def dump_post(post: dict[str, Any]) -> dict[str, Any]:
    """As in old dumps: text for numbers, a space inside the date, categories by number."""
    number = {name: key for key, name in NAMES.items()}
    rest = {key: value for key, value in post.items() if key != "tags"}
    rest |= {key: str(rest[key]) for key in ("id", "score", "image_width", "image_height", "file_size", "fav_count")}
    rest |= {"parent_id": str(post["parent_id"] or 0), "created_at": post["created_at"].replace("T", " ")}
    tags = [{"name": tag, "category": str(number[group])} for group, tags in post["tags"].items() for tag in tags]
    return rest | {"tags": tags}


def flat_post(post: dict[str, Any]) -> dict[str, Any]:
    return post | {f"tags_{group}": tags for group, tags in post["tags"].items()}


COLUMNS = {
    "id": "id", "created_at": "created_at", "rating": "rating", "score": "score", "up_score": "up_score",
    "down_score": "down_score", "fav_count": "fav_count", "width": "image_width", "height": "image_height",
    "file_size": "file_size", "file_ext": "file_ext", "md5": "md5", "is_deleted": "is_deleted",
    "is_banned": "is_banned", "is_pending": "is_pending", "parent_id": "parent_id", "has_children": "has_children",
    **{f"tags_{group}": f"tags_{group}" for group in NAMES.values()},
}  # fmt: skip


def records(source: SourceConfig) -> list[dict[str, Any]]:
    """Records by key; a refused post fails the test."""
    found = []
    for post in read_source(source):
        assert isinstance(post, RawPost), post
        row = to_record(post, source)
        assert not isinstance(row, Quarantine), row
        assert read_image(source, row["uri"], row["member"])[:4] == b"\x89PNG"
        found.append(row)
    return sorted(found, key=lambda row: row["key"])


def source(path: Path, adapter: str, **options: Any) -> SourceConfig:
    return SourceConfig(name="s", adapter=adapter, path=str(path), **options)  # type: ignore[arg-type]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]], but: tuple[str, ...] = ()) -> None:
    left_out = {"uri", "member", *but} | ({"raw_hash"} if but else set())
    for one, other in zip(found, expected, strict=True):
        for name in set(other) - left_out:
            assert one[name] == other[name], name


def pictures(folder: Path) -> None:
    for post in POSTS:
        picture(folder / f"{post['id']}.png")
