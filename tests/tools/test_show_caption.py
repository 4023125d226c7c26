"""scripts/show.py caption: the parts of a text, a set's picture and a run's update, their tokens, and what is cut."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import captionworld
import pytest
import synthetic
import tinysdxl
from cliptokens import TABLE, small_tokenizer

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage, to_yaml
from train.data.dataset import TileDataset
from train.data.selection import open_selection
from train.data.shards import ShardReader
from train.model.text import TagTokenizer
from train.model.vae_file import LatentScale
from train.tools.show import caption


def said(text: str, tokenizers: Path, **options: Any) -> dict[str, Any]:
    return caption.report(text=text, tokenizers=tokenizers, **options)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    small_tokenizer("!").save_pretrained(folder / "tokenizer_2")
    return folder


def test_caption_report(tokenizers: Path) -> None:
    tokenizer = caption.tokenizers_in(tokenizers)
    report = said("1girl, miku, vocaloid ||| smile, outdoors", tokenizers, draws=12)
    assert (report["fixed"], report["flex"]) == (["1girl", "miku", "vocaloid"], ["smile", "outdoors"])
    texts = {draw["text"] for draw in report["draws"]}
    assert texts == {"1girl, miku, vocaloid, smile, outdoors", "1girl, miku, vocaloid, outdoors, smile"}
    ids = tokenizer.tokenizer(report["text"], add_special_tokens=False)["input_ids"]
    assert report["encoder_1"][0][1 : 1 + len(ids)] == ids
    assert report["tokens"] == report["tokens_kept"] == len(ids)
    assert report["tags_cut"] == []
    assert "|" not in report["text"]


@pytest.mark.parametrize("count", [0, 1, 75, 76, 150])
def test_caption_ids_have_the_tables_pattern(count: int, tokenizers: Path) -> None:
    report = said("z" * count, tokenizers)  # one id per letter here
    tokenizer = TagTokenizer(small_tokenizer())
    for encoder, wanted in zip(("encoder_1", "encoder_2"), TABLE[count], strict=True):
        names = {49406: "B", 49407: "E", 0: "0"}
        ours = {tokenizer.bos: "B", tokenizer.eos: "E", 0: "0"}
        assert [[ours.get(i, "t") for i in row] for row in report[encoder]] == [
            [names.get(i, "t") for i in row] for row in wanted
        ]


def test_caption_names_what_is_cut(tokenizers: Path) -> None:
    flex = [f"tag{i:03}" for i in range(60)]
    report = said("1girl ||| " + ", ".join(flex), tokenizers, max_tokens=75)
    assert report["tokens_kept"] <= 75 < report["tokens"]
    assert report["tags_cut"] == flex[-len(report["tags_cut"]) :]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("a ||| b ||| c ||| d", {}, "3 separators"),
        ("a", {"separator": " "}, "--separator"),
        ("a, b", {"separator": ","}, "--separator"),
        ("a", {"draws": -1}, "--draws"),
    ],
)
def test_bad_captions_are_refused(text: str, options: dict[str, Any], words: str, tokenizers: Path) -> None:
    with pytest.raises(Halt, match=words) as caught:
        said(text, tokenizers, **options)
    assert caught.value.code == ExitCode.USAGE


def test_a_damaged_tokenizer_is_named(tokenizers: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizers / "tokenizer", tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        file.write_text("{")
    with pytest.raises(Halt, match="tokenizer is damaged") as caught:
        caption.tokenizers_in(tmp_path / "tokenizer")
    assert caught.value.code == ExitCode.MISMATCH


def test_a_text_has_four_parts(tokenizers: Path) -> None:
    report = said("my oc ||| standing, hat ||| grainy\nA boat lies on the river, and she looks at it.", tokenizers, draws=9)
    assert [report[part] for part in ("fixed", "flex", "tail", "prose")] == [
        ["my oc"], ["standing", "hat"], ["grainy"], ["A boat lies on the river, and she looks at it."],
    ]  # fmt: skip
    after = ", grainy, A boat lies on the river, and she looks at it."
    assert report["text"] == "my oc, standing, hat" + after
    assert {draw["text"] for draw in report["draws"]} == {f"my oc, standing, hat{after}", f"my oc, hat, standing{after}"}


def test_what_is_cut_is_named_where_a_tail_follows(tokenizers: Path) -> None:
    """One id per letter here: the last flexible tags go, the tail and the sentence stay until all are gone."""
    text = "oc ||| " + ", ".join(f"tag{number}" for number in range(15)) + " ||| grainy"
    report = said(text, tokenizers, max_tokens=75)
    kept = [tag for tag in report["flex"] if tag not in report["tags_cut"]]
    assert report["tags_cut"] == report["flex"][len(kept) :] != []
    assert report["tokens_kept"] == len("".join(f"{tag}," for tag in ["oc", *kept])) + len("grainy") <= 75
    told = said("oc ||| hat ||| " + "z" * 90, tokenizers, max_tokens=75)
    assert (told["tags_cut"], told["tokens_kept"]) == (["hat", "z" * 90], 75)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captionworld.write(tmp_path_factory.mktemp("world"))


def test_the_tail_of_a_vocabulary_reaches_the_set(world: Path, tokenizers: Path) -> None:
    report = caption.report(world, key="booru:3", tokenizers=tokenizers, draws=20)  # 21 points, rating e
    assert [report[part] for part in ("fixed", "flex", "tail", "prose")] == [
        ["someone 0", "original"], ["artist 3", "solo", "smile", "tag 3", "highres", "lewd"], ["great"], [],
    ]  # fmt: skip
    assert len({draw["text"] for draw in report["draws"]}) > 10
    assert {draw["text"].split(", ")[-1] for draw in report["draws"]} == {"great"}
    assert {tuple(draw["text"].split(", ")[:2]) for draw in report["draws"]} == {("someone 0", "original")}
    full = caption.report(world, key="texts:full.png", tokenizers=tokenizers)
    assert (full["tail"], full["prose"]) == (["grainy"], ["A boat lies on the river, and she looks at it."])


def test_what_pictures_got_at_an_update(world: Path, tokenizers: Path, tmp_path: Path) -> None:
    """Against the ids of the batch that training makes of the same update."""
    model = tinysdxl.write(tmp_path / "model")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / name, model / name, dirs_exist_ok=True)
    run = tmp_path / "run"
    run.mkdir()
    drawn = ["data.tag_dropout=0.3", "data.mix={tags: 1, tags_prose: 1, prose: 1}", "data.trigger=zz", "data.protect=[river]",
             "data.max_tokens=75", "batch.micro=2", "batch.effective=4", "epochs=2"]  # fmt: skip
    stage = synthetic.stage_yaml(tmp_path / "stage.yaml", data=world, model=model, output=run)
    config = load_stage([stage], drawn)
    (run / "config.yaml").write_text(to_yaml(config))
    selection = open_selection(config.images)
    dataset = TileDataset(
        selection.kept, selection.plan, ShardReader(world), caption.tokenizers_in(model), seed=config.seed, data=config.data,
        noise=config.noise, scale=LatentScale(1.0), total_updates=selection.plan.total_updates,
    )  # fmt: skip
    kinds, cut = set(), 0
    for update in range(selection.plan.total_updates):
        tiles = selection.plan.update(update)
        ids = [row for number in range(len(tiles)) for row in dataset.make(tiles, number, update).ids_1_BN77.tolist()]
        report = caption.report(run, update=update)
        assert len(report["pictures"]) == len(ids) == 4
        for slot, expected in zip(report["pictures"], ids, strict=True):
            whole = [*slot["fixed"], *slot["flex"], *slot["tail"], *slot["prose"]]
            fitted = [tag for tag in whole if tag not in slot["tags_cut"]]
            if not set(slot["tags_cut"]) & {"zz", *slot["tail"], *slot["prose"]}:  # those would be cut inside
                content = dataset.tokenizer.content_ids(fitted)
                assert (expected[0][1 : 1 + len(content)], slot["tokens_kept"]) == (content, len(content))
            assert slot["text"] == ", ".join([*slot["fixed"], *slot["flex"], *slot["tail"], *slot["prose"]])
            assert slot["fixed"][0] == "zz"
            kinds.add(slot.get("kind"))
            cut += len(slot["tags_cut"])
    assert {"tags", "tags_prose", "prose"} <= kinds and cut > 0
    found, first = caption.report(run, update=0)["pictures"][0]["key"], dataset.make(selection.plan.update(0), 0, 0)
    shown = caption.report(run, update=0, key=found)["pictures"][0]
    assert (shown["encoder_1"], shown["encoder_2"]) == (first.ids_1_BN77[0].tolist(), first.ids_2_BN77[0].tolist())
    for options, told in (
        ({"update": 0, "key": "texts:none.png"}, "the run has no such picture"), ({"update": 99}, "has updates 0 to"),
        ({"key": found}, "--update is missing"), ({"update": 0, "seed": 3}, "--seed: a run has its own"),
    ):  # fmt: skip
        with pytest.raises(Halt, match=told):
            caption.report(run, **options)  # type: ignore[arg-type]
    for update in range(selection.plan.total_updates):
        if found not in {slot["key"] for slot in caption.report(run, update=update)["pictures"]}:
            with pytest.raises(Halt, match=f"not in update {update}; it is in 0"):
                caption.report(run, update=update, key=found)


def test_what_is_neither_run_nor_set_is_refused(world: Path, tmp_path: Path) -> None:
    for path, options, told in (
        (tmp_path, {}, "neither a run directory nor a prepared set"), (world, {}, "--key is missing"),
        (world, {"key": "texts:none"}, "no stage of .* trains on it"), (world, {"update": 3}, "needs a run directory"),
        (None, {}, "one of them"), (world, {"text": "a"}, "one of them"),
    ):  # fmt: skip
        with pytest.raises(Halt, match=told):
            caption.report(path, **options)  # type: ignore[arg-type]
