"""Folders as people bring them, drawn in plain colours, and the bases and cards that they meet: the matrix of new.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from train.tools.new.facts import Base, Machine

SIZES = ((700, 1000), (1000, 700), (840, 840))
TAGS = ("smile, forest, standing", "angry, city, night, rain", "closed eyes, beach", "open mouth, sky, sitting", "frown, library, reading")


def picture(file: Path, number: int, size: tuple[int, int] | None = None) -> None:
    """One plain picture: a bar at a place of its own, so that no two are alike."""
    width, height = size or SIZES[number % len(SIZES)]
    image = Image.new("L", (width, height), 250 - number % 200)
    at = number * 37 % (width - width // 8)
    image.paste(20 + number * 11 % 180, (at, 0, at + width // 8 + number % 5, height - number * 53 % (height // 2)))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, compress_level=1)


def pictures(folder: Path, count: int, text: Callable[[int], str] | None = None, ending: str = ".txt", size: tuple[int, int] | None = None) -> Path:
    """`count` pictures, each with a text beside it."""
    for number in range(count):
        picture(folder / f"{number:05d}.png", number, size)
        if text is not None:
            (folder / f"{number:05d}{ending}").write_text(text(number))
    return folder


def said(number: int) -> str:
    """A few tags."""
    return TAGS[number % len(TAGS)]


def sentence(number: int) -> str:
    """A description."""
    where = ("a forest", "the city", "a beach", "the library")[number % 4]
    return f"A painting of a quiet place where nobody is, with {where} behind it. The light is soft, and there is a bird in the sky."


def several(number: int) -> str:
    """Two descriptions of one picture, a line each."""
    where = ("a forest", "the city", "a beach")[number % 3]
    return f"A woman stands in {where} and looks at the sky.\nA woman is standing in {where}, she looks up at the sky."


def post(number: int, **other: object) -> dict[str, object]:
    """A Danbooru post."""
    fields = {
        "id": 1000 + number, "rating": "gs"[number % 2], "score": number % 40, "created_at": f"20{10 + number % 14}-03-01T00:00:00.000-05:00",
        "tag_string_general": "1girl solo " + said(number).replace(" ", "_").replace(",_", " "), "tag_string_artist": "paper_moth",
        "tag_string_character": "", "tag_string_copyright": "original", "tag_string_meta": "highres", "file_ext": "png",
        "image_width": 1024, "image_height": 1024,
    }  # fmt: skip
    return fields | other


def posts(folder: Path, count: int) -> Path:
    """Danbooru posts beside their pictures, as gallery-dl writes them."""
    for number in range(count):
        picture(folder / f"{number}.png", number)
        (folder / f"{number}.png.json").write_text(json.dumps(post(number)))
    return folder


def kohya(folder: Path, counts: Sequence[tuple[str, int]]) -> Path:
    """Folders called after repeats and class, without captions."""
    for name, count in counts:
        for number in range(count):
            picture(folder / name / f"{number}.png", number + 40 * int(name[0] == '4'))
    return folder


def metadata_json(folder: Path, count: int) -> Path:
    """sd-scripts' metadata: one object of pictures."""
    pictures(folder, count)
    told = {f"{number:05d}.png": {"tags": f"vesna, 1girl, {said(number)}", "caption": "a drawing"} for number in range(count)}
    (folder / "meta.json").write_text(json.dumps(told))
    return folder


def subsets(folder: Path, count: int) -> Path:
    """An sd-scripts dataset TOML of two folders and one of the class; the file itself."""
    pictures(folder / "own", count, lambda n: f"juno, 1girl, {said(n)}", ".caption")
    pictures(folder / "more", count // 2, lambda n: f"juno, 1girl, {said(n)}, hat", ".caption", (832, 1216))
    pictures(folder / "class", count, lambda n: f"1girl, {said(n)}", ".caption", (1024, 1024))
    (folder / "set.toml").write_text(
        '[general]\nresolution = 1024\nenable_bucket = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "own"\nnum_repeats = 4\n'
        '[[datasets.subsets]]\nimage_dir = "more"\nnum_repeats = 2\n[[datasets.subsets]]\nimage_dir = "class"\nis_reg = true\n'
    )
    return folder / "set.toml"


def image_folder(folder: Path, count: int) -> Path:
    """A Hugging Face image folder whose captions stand in a column of another name."""
    pictures(folder / "train", count)
    rows = [json.dumps({"file_name": f"{number:05d}.png", "prompt": f"inkwell style, 1boy, {said(number)}"}) for number in range(count)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def embedded(folder: Path, count: int) -> Path:
    """A parquet file that holds its pictures."""
    pictures(folder / "drawn", count)
    rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in sorted((folder / "drawn").iterdir())],
            "text": [f"broad nib, {said(number)}" for number in range(count)]}  # fmt: skip
    (folder / "set").mkdir()
    pq.write_table(pa.table(rows), folder / "set" / "train-00000-of-00001.parquet")
    return folder / "set"


ANIMAGINE = Base("models/animagine-xl-3.1", "cagliostrolab/animagine-xl-3.1", prediction="epsilon", zero_terminal_snr=False, vocabulary="animagine31",
                 vocabulary_mark="its name", license="Fair AI Public License 1.0-SD", tokenizers="models/animagine-xl-3.1", commit="a" * 40)  # fmt: skip
V4 = replace(ANIMAGINE, path="models/animagine-xl-4.0", asked="animagine-xl-4.0", vocabulary="animagine40", license="OpenRAIL++-M", commit=None)
NOOB = replace(V4, path="models/noob-vpred.safetensors", asked="noob-vpred.safetensors", prediction="v", zero_terminal_snr=True, vocabulary="noobai", license=None, tokenizers=None)
PONY = replace(NOOB, path="models/pony.safetensors", asked="pony.safetensors", prediction=None, zero_terminal_snr=None, vocabulary="pony")
UNKNOWN = replace(PONY, path="models/mine.safetensors", asked="mine.safetensors", vocabulary=None, vocabulary_mark="")
FLOW = replace(UNKNOWN, path="models/flow", asked="flow", prediction="flow", zero_terminal_snr=False)
SMALL = replace(ANIMAGINE, path="models/tiny", asked="tiny", side_px=64, standard=False, license="Apache-2.0", tokenizers="models/tiny", commit=None,
                conditioning={"data.max_tokens": 75})  # fmt: skip


def card(name: str | None, free_gib: float, *, bf16: bool = True, host_gib: float = 30.0) -> Machine:
    """A machine with one card, or none."""
    return Machine(name, free_gib, "given" if name else "no card here", bf16, 8, host_gib, 200.0, True)


@dataclass(frozen=True)
class Row:
    """One meeting of a folder, a base and a card. `wish`: what the user says beside the folder."""

    make: Callable[[Path], Path]
    base: Base
    machine: Machine
    wish: tuple[tuple[str, str], ...] = ()
    prior: Callable[[Path], Path] | None = None


MATRIX = {
    "one_picture": Row(lambda at: pictures(at / "ostrava", 1), SMALL, card(None, 20.0)),
    "five_caption": Row(lambda at: pictures(at / "five", 5, lambda n: f"bosun, 1boy, red hair, {said(n)}", ".caption"), ANIMAGINE, card("RTX-3060-8GB", 7.6)),
    "forty_tags": Row(lambda at: pictures(at / "forty", 40, lambda n: f"1girl, solo, mirelle, aqua hair, {said(n)}"), ANIMAGINE, card("RTX-4090", 23.0)),
    "forty_small": Row(lambda at: pictures(at / "marrow", 40, lambda n: f"marrow, 1boy, red hair, {said(n)}", size=(200, 300)), SMALL, card(None, 20.0)),
    "sentences": Row(lambda at: pictures(at / "places", 30, sentence), UNKNOWN, card("T4", 14.6, bf16=False)),
    "tags_and_sentences": Row(lambda at: pictures(at / "both", 60, lambda n: f"tamar, 1girl, {said(n)}\n{sentence(n)}"), NOOB, card("RTX-3090", 23.0)),
    "several_captions": Row(lambda at: pictures(at / "several", 24, several), FLOW, card("L40S", 44.0)),
    "two_files": Row(lambda at: pictures(pictures(at / "pair", 24, lambda n: f"sorrel, 1girl, {said(n)}"), 24, sentence, ".caption"), V4, card("A100-40GB", 39.0)),
    "blanks_between": Row(lambda at: pictures(at / "booru", 30, lambda n: f"tin_brush 1girl {said(n).replace(' ', '_').replace(',_', ' ')}"), PONY, card("RTX-4090", 23.0)),
    "separator": Row(lambda at: pictures(at / "marked", 30, lambda n: f"1girl, quill ### {said(n)}"), ANIMAGINE, card("RTX-4090", 23.0)),
    "kohya": Row(lambda at: kohya(at / "img", (("10_red cat", 12), ("4_blue dog", 20))), PONY, card("RTX-3060", 11.6)),
    "posts": Row(lambda at: posts(at / "moth", 80), V4, card("RTX-4090", 23.0)),
    "sd_scripts_json": Row(lambda at: metadata_json(at / "meta", 25), NOOB, card("A6000", 47.0), (("goal", "concept"),)),
    "sd_scripts_toml": Row(lambda at: subsets(at / "toml", 20), ANIMAGINE, card("RTX-4090", 23.0)),
    "image_folder": Row(lambda at: image_folder(at / "hf", 32), UNKNOWN, card("RTX-4090", 23.0), (("vocabulary", "illustrious"), ("license", "CC-BY-4.0"))),
    "parquet": Row(lambda at: embedded(at / "rows", 20), V4, card("RTX-5090", 31.0), (("goal", "style"),)),
    "prior": Row(lambda at: pictures(at / "own", 22, lambda n: f"lind, 1boy, {said(n)}"), ANIMAGINE, card("RTX-4090", 23.0), prior=lambda at: pictures(at / "men", 30)),
    "two_thousand": Row(lambda at: pictures(at / "many", 2000, said, size=(512, 640)), ANIMAGINE, card("A100-80GB", 79.0)),
    "continue_24gb": Row(lambda at: pictures(at / "few", 200, said, size=(768, 640)), V4, card("RTX-4090", 23.0), (("goal", "continue"),)),
    "continue_24gb_no_host": Row(lambda at: pictures(at / "few", 200, said, size=(768, 640)), V4, card("RTX-4090", 23.0, host_gib=12.0), (("goal", "continue"),)),
}  # fmt: skip
