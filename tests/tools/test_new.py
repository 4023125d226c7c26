"""new.py: what it sees in a folder, what it decides, and that it leaves edited files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from newfolders import ANIMAGINE, card
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.dataset import load_settings
from train.config.prompts import load_prompts
from train.config.stage import load_stage
from train.tools.new import captions
from train.tools.new import told as told_of
from train.tools.new.make import Wish, decide, facts_of, make

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data/tiny_world/model"


def drawn(folder: Path, count: int, caption: str = "mirelle, 1girl, solo, {n} hair, smile", size: tuple[int, int] = (96, 64)) -> Path:
    """Pictures of different colours, each with a text beside it."""
    folder.mkdir(parents=True)
    for n in range(count):
        Image.effect_noise(size, 40 + n).convert("RGB").save(folder / f"{n:04d}.png")
        if caption:
            (folder / f"{n:04d}.txt").write_text(caption.format(n=n))
    return folder


@pytest.mark.skipif(not TINY.is_dir(), reason="needs the tiny world")
def test_a_folder_becomes_a_recipe_and_edited_files_stay(tmp_path: Path) -> None:
    pictures, out = drawn(tmp_path / "mirelle", 24), tmp_path / "out"
    wish = Wish(pictures, str(TINY), out)
    said = make(wish, "python scripts/")
    assert said[-1] == f"  python scripts/recipe.py {out}"
    dataset, stage, prompts = load_settings([out / "dataset.yaml"]), load_stage([out / "train.yaml"]), load_prompts(out / "prompts.yaml")
    assert (dataset.root, dataset.name, dataset.sources[0].path) == (str(out), "set", str(pictures))
    assert (stage.output_dir, stage.data.path, stage.data.trigger) == (str(out / "run"), str(out / "set"), "mirelle")
    assert stage.sampling.prompts == str(out / "prompts.yaml")
    assert any("mirelle" in prompt.text for prompt in prompts.prompts)

    edited = (out / "train.yaml").read_text().replace("epochs: ", "epochs: 1")
    (out / "train.yaml").write_text(edited)
    (pictures / "0000.txt").unlink()
    said = make(wish, "python scripts/")
    assert (out / "train.yaml").read_text() == edited
    assert "written anew" in next(line for line in said if line.startswith(f"{out}/dataset.yaml"))
    assert str(out / "cache/new/train.yaml") in next(line for line in said if line.startswith(f"{out}/train.yaml"))


def test_a_folder_of_results_inside_the_pictures_is_refused(tmp_path: Path) -> None:
    pictures = drawn(tmp_path / "own", 3)
    for out in (pictures, pictures / "recipe"):
        with pytest.raises(Halt, match="lies in the folder of the pictures") as stopped:
            facts_of(Wish(pictures, out=out), ANIMAGINE, card("RTX-4090", 23.0))
        assert stopped.value.code == ExitCode.USAGE


@pytest.mark.parametrize(("files", "told"), [
    ({}, "holds no picture and no list of pictures"), ({"a.mp4": b"", "b.json": b"{}"}, r"\(1 video files, 1 JSON files of no known kind\)"),
    ({"a.png": b"no picture", "b.png": b"neither"}, None),
])  # fmt: skip
def test_folders_with_nothing_to_train_on(tmp_path: Path, files: dict[str, bytes], told: str | None) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if told is not None:
        with pytest.raises(Halt, match=told):
            facts_of(Wish(folder, out=tmp_path / "out"), ANIMAGINE, card("RTX-4090", 23.0))
        return
    facts = facts_of(Wish(folder, out=tmp_path / "out"), ANIMAGINE, card("RTX-4090", 23.0))
    assert facts.own.pictures.unreadable == 2
    assert any("2 cannot be taken (2 unidentified): prepare stops at so many" in line for line in told_of.seen(facts))


def test_many_pictures_are_sampled_by_name_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every n-th: numbered names would all be of one kind, and what they share would seem to be what all share."""
    folder = drawn(tmp_path / "own", 200, "1girl, name{n}, smile")
    for n in range(200):
        (folder / f"{n:04d}.txt").write_text(f"1girl, kind{n % 20}, smile")
    monkeypatch.setattr(captions, "LOOK_RECORDS", 10)
    facts = facts_of(Wish(folder, out=tmp_path / "out"), ANIMAGINE, card("RTX-4090", 23.0))
    assert (facts.own.layout.pictures, facts.own.captions.whole, facts.own.captions.trigger) == (200, False, None)
    assert 3 < facts.own.captions.looked < 30
    assert any(line.strip().startswith(f"captions of {facts.own.captions.looked} looked at") for line in told_of.seen(facts))


def test_a_trigger_beside_pictures_of_the_class_is_refused(tmp_path: Path) -> None:
    wish = Wish(drawn(tmp_path / "own", 3), out=tmp_path / "out", prior=drawn(tmp_path / "class", 3, "1girl"), trigger="vesna")
    with pytest.raises(Halt, match="--trigger vesna beside --prior would open the captions of the class too"):
        decide(facts_of(wish, ANIMAGINE, card("RTX-4090", 23.0)))
