"""A drawn world to train on: pictures of made-up cartoon adults with booru posts beside them, and a tiny SDXL.

Stands in for a real collection and a real base model, so that the whole recipe runs on a laptop CPU with nothing
downloaded. `write_world` draws it; the same seed gives the same bytes wherever Pillow is the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import PIL

from train.base.errors import ExitCode, Halt
from train.base.files import replace_file
from train.tools.tiny.draw import draw
from train.tools.tiny.posts import HELD_OUT_COUNT, Post, make_post

WORLD_VERSION = 6  # raise it when the drawing or the posts change: worlds of another version are refused
MARKER = "world.json"
_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 6}, "jpg": {"format": "JPEG", "quality": 92},
    "webp": {"format": "WEBP", "quality": 90, "method": 2},
}  # fmt: skip
SOURCE = "tiny"  # name of the source in configs/tiny/dataset.yaml, first half of every key


def write_world(folder: Path, images: int, seed: int) -> bool:
    """Draw the pictures and posts into `folder`/images; False when they were complete already.

    Raises Halt(MISMATCH) when the folder holds another world; its files are left alone.
    """
    wanted = {"version": WORLD_VERSION, "seed": seed, "images": images}
    marker = folder / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text())
        if {key: found.get(key) for key in wanted} != wanted:
            raise Halt(ExitCode.MISMATCH, f"{marker} describes another world ({found}); delete {folder} or choose "
                                          f"another --out")
        if all((folder / "images" / name).is_file() for name in found["files"]):
            return False
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    scores = ["key,score"]
    for number in range(images):
        post = make_post(seed, number, images)
        names += _write_post(folder / "images", post, seed)
        scores.append(f"{SOURCE}:{post.fields['id']},{post.aesthetic}")
    replace_file(folder / "aesthetic.csv", ("\n".join(scores) + "\n").encode())
    record = wanted | {"pillow": PIL.__version__, "held_out": HELD_OUT_COUNT, "files": names}
    replace_file(marker, (json.dumps(record, indent=1) + "\n").encode())
    return True


def picture_bytes(post: Post, seed: int) -> bytes:
    """The encoded picture of a post."""
    number = post.number if post.copy_of is None else post.copy_of
    buffer = io.BytesIO()
    draw(post.look, post.width, post.height, seed * 1_000_003 + number).save(buffer, **_FORMATS[post.extension])
    return buffer.getvalue()


def _write_post(folder: Path, post: Post, seed: int) -> list[str]:
    content = picture_bytes(post, seed)
    stem = str(post.fields["id"])
    replace_file(folder / f"{stem}.{post.extension}", content)
    replace_file(folder / f"{stem}.json", (json.dumps(post_json(post, content), indent=1) + "\n").encode())
    return [f"{stem}.{post.extension}", f"{stem}.json"]


def post_json(post: Post, content: bytes) -> dict[str, Any]:
    """The post as Danbooru's API gives it; a banned post lacks md5 and file_url there too."""
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    size = {"image_width": post.width, "image_height": post.height, "file_ext": post.extension,
            "file_size": len(content)}
    asset = {"id": post.fields["id"] + 500_000, "created_at": post.fields["created_at"], "md5": digest,
             "status": "active", **size}
    fields = post.fields | size | {"media_asset": asset}
    if not post.fields["is_banned"]:
        url = f"https://example.invalid/original/{digest[:2]}/{digest[2:4]}/{digest}.{post.extension}"
        fields |= {"md5": digest, "file_url": url, "large_file_url": url}
    return fields
