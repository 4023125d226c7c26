"""Scores and tags from models: batches, identity, thresholds, and pictures that cannot be read any more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxmodel import wd_model
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, ScoreConfig, SourceConfig, TagConfig, dataset_dir, load_settings
from train.prepare import ingest, label, probe, score, tag
from train.prepare.tables.units import read_table
from train.prepare.tagging.policy import resolve
from train.recipe.tag_policy import preset

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = "tag_id,name,category,count\n1,general,9,0\n2,explicit,9,0\n3,smile,0,9\n4,long_hair,0,9\n5,hero_(x),4,9\n"


def world(folder: Path, tags: str = "", **more: Any) -> DatasetConfig:
    """Five pictures of rising brightness; the first has tags of its own."""
    source = folder / "in"
    source.mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (20, 10), (50 * number,) * 3).save(source / f"{number}.png")
        post = {"id": number, "rating": "g", "score": 1, "file_ext": "png", "tag_string": "own_tag" if number == 0 else tags}
        (source / f"{number}.json").write_text(json.dumps(post))
    return DatasetConfig(
        name="d", root=str(folder / "out"), sources=[SourceConfig("s", "danbooru", str(source))], workers=0,
        max_quarantine_fraction=1.0, **more,
    )  # fmt: skip


def _classifier(folder: Path) -> Path:
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit import ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8,
        id2label={0: "lq", 1: "hq"}, label2id={"lq": 0, "hq": 1},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_classifier(tmp_path: Path) -> None:
    model = _classifier(tmp_path / "tiny")
    config = world(tmp_path, score=ScoreConfig("hf_image_classification", model=str(model), batch=2, device="cpu"))
    ingest.run(config)
    probe.run(config)
    (tmp_path / "in" / "3.png").unlink()
    score.run(config)
    rows = read_table(dataset_dir(config), "aesthetic").to_pylist()
    assert [row["key"] for row in rows] == [f"s:{number}" for number in range(5)]
    values = [row["score"] for row in rows]
    assert values[3] is None  # named in the quarantine, not guessed
    assert all(0 < value < 1 for value in values if value is not None)
    assert len(set(values)) == 5
    assert all(value == float(np.float32(value)) for value in values if value is not None)
    assert {row["model"] for row in rows} == {f"tiny@{score.model_id(model).partition('@')[2]}"}
    one_by_one = dataclasses.replace(config, root=str(tmp_path / "again"))
    one_by_one = dataclasses.replace(one_by_one, score=dataclasses.replace(config.score, batch=1))
    ingest.run(one_by_one)
    probe.run(one_by_one)
    score.run(one_by_one)
    again = read_table(dataset_dir(one_by_one), "aesthetic").to_pylist()
    expected = [value for value in values if value is not None]
    assert [row["score"] for row in again] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(Halt, match=r"score\.label 'best': the model knows hq, lq") as stopped:
        score.load_classifier(dataclasses.replace(config.score, label="best"))
    assert stopped.value.code == ExitCode.USAGE


def test_a_classifier_without_one_size_scores_each_picture_as_if_alone(tmp_path: Path) -> None:
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification
    from transformers.models.vit import ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], id2label={0: "lq", 1: "hq"})
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    predict, _, _ = score.load_classifier(ScoreConfig("hf_image_classification", model=str(tmp_path), device="cpu"))
    images = [Image.new("RGB", size, (40 * n, 90, 10)) for n, size in enumerate([(64, 32), (32, 64), (64, 32), (48, 48)])]
    assert predict([]) == []
    assert predict(images) == pytest.approx([predict([image])[0] for image in images], abs=1e-6)
    assert len(set(predict(images))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("names", [{0: "hq"}, {0: "lq", 1: "hq"}])
def test_heads_of_sigmoids_give_the_probability_that_the_library_gives(tmp_path: Path, names: dict[int, str]) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    folder = _classifier(tmp_path)
    known = json.loads((folder / "config.json").read_text())
    known |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(known | {"problem_type": "multi_label_classification"}))
    model = AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True)
    model.config.problem_type = None if len(names) == 1 else "multi_label_classification"
    model.save_pretrained(folder)
    predict, _, _ = score.load_classifier(ScoreConfig("hf_image_classification", model=str(folder), device="cpu"))
    images = [Image.new("RGB", (16, 16), (70 * number, 9, 9)) for number in range(3)]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    library = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    expected = [next(found["score"] for found in library(image) if found["label"] == "hq") for image in images]
    assert predict(images) == pytest.approx(expected, abs=1e-6)
    assert max(expected) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_damaged_classifier_is_named(tmp_path: Path, name: str) -> None:
    folder = _classifier(tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(Halt, match=r"score\.model .* cannot be loaded") as stopped:
        score.load_classifier(ScoreConfig("hf_image_classification", model=str(folder), device="cpu"))
    assert stopped.value.code == ExitCode.MISMATCH


@pytest.mark.parametrize(
    ("text", "words"),
    [("key,score\ns:0,high\n", "high"), ("key\ns:0\n", "columns key and score"), ("key,score\ns:0,1\ns:0,2\n", "twice")],
)
def test_score_column_errors(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "scores.csv").write_text(text)
    config = world(tmp_path, score=ScoreConfig("column", path=str(tmp_path / "scores.csv")))
    ingest.run(config)
    with pytest.raises(Halt, match=words) as stopped:
        score.run(config)
    assert stopped.value.code == ExitCode.USAGE


class _Session:
    """Stands for an ONNX session: probabilities from the picture's brightness."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": "input"})]

    def run(self, _: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        pixels_BHWC = feeds["input"]
        self.shapes.append(pixels_BHWC.shape)
        middle = pixels_BHWC[:, 224, 224, 0] / 255
        return [np.stack([middle * 0, middle * 0 + 0.9, middle, middle * 0 + 0.3, middle * 0 + 0.6], 1)]


def test_tagger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "wd"
    model.mkdir()
    (model / "selected_tags.csv").write_text(VOCABULARY)
    (model / "model.onnx").write_bytes(b"weights")
    session = _Session()
    monkeypatch.setattr(tag, "load_session", lambda folder, option: session)
    config = world(tmp_path, tag=TagConfig("wd", model=str(model), batch=3))
    ingest.run(config)
    probe.run(config)
    tag.run(config)
    assert session.shapes == [(3, 448, 448, 3), (1, 448, 448, 3)]  # the tagged picture is left out
    rows = read_table(dataset_dir(config), "tags").to_pylist()
    assert [row["key"] for row in rows] == ["s:1", "s:2", "s:3", "s:4"]
    label.run(config)
    labels = {row["key"]: row for row in read_table(dataset_dir(config), "labels").to_pylist()}
    assert "own tag" in labels["s:0"]["flex_tags"]
    assert "smile" not in labels["s:1"]["flex_tags"]
    assert "smile" in labels["s:4"]["flex_tags"]
    # a character between the two thresholds is neither a character nor a general tag
    assert all("hero (x)" not in row["fixed_tags"] + row["flex_tags"] for row in labels.values())
    assert all("explicit" not in row["flex_tags"] for row in labels.values())
    lower = dataclasses.replace(config, tag=dataclasses.replace(config.tag, character_threshold=0.5))
    label.run(lower)
    labels = {row["key"]: row for row in read_table(dataset_dir(config), "labels").to_pylist()}
    assert labels["s:1"]["fixed_tags"] == ["hero (x)"]


def test_tagger_on_the_real_runtime(tmp_path: Path) -> None:
    """WD v3's interface end to end: NHWC float32 BGR in, sigmoids out; skipped without the extra `tag`."""
    runtime = pytest.importorskip("onnxruntime")
    model = tmp_path / "wd"
    model.mkdir()
    (model / "selected_tags.csv").write_text(VOCABULARY)
    # of blue alone, which comes first: general, explicit, smile, long_hair, hero_(x)
    weights = np.zeros((3, 5), np.float32)
    weights[0, 2:] = [0.1, -0.1, 0.02]
    (model / "model.onnx").write_bytes(wd_model(weights, np.array([-9, 9, -10, 10, -2], np.float32)))
    session = runtime.InferenceSession(str(model / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("input", ["batch_size", 448, 448, 3])]
    config = world(tmp_path, tag=TagConfig("wd", model=str(model), batch=3))
    for number in range(1, 5):
        blue = Image.new("RGB", (10, 10), (255 * (number % 2), 0, 50 * number))
        blue.save(tmp_path / "in" / f"{number}.png")
    ingest.run(config)
    probe.run(config)
    tag.run(config)
    rows = read_table(dataset_dir(config), "tags").to_pylist()
    assert [row["key"] for row in rows] == ["s:1", "s:2", "s:3", "s:4"]  # s:0 has a tag of its own
    for number, row in enumerate(rows, 1):
        logits = [9, 5 * number - 10, 10 - 5 * number, number - 2]
        expected = [1 / (1 + np.exp(-value)) for value in logits]
        names = ["explicit", "smile", "long_hair", "hero_(x)"]
        found = {entry["tag"]: entry["prob"] for entry in row["tags"]}
        wanted = {name: value for name, value in zip(names, expected, strict=True) if value > tag.FLOOR}
        assert found == pytest.approx(wanted, abs=1e-4)
    assert rows[0]["model"].startswith("wd@")
    label.run(config)
    labels = {row["key"]: row for row in read_table(dataset_dir(config), "labels").to_pylist()}
    assert {key: ("smile" in row["flex_tags"], "long hair" in row["flex_tags"]) for key, row in labels.items()} == {
        "s:0": (False, False), "s:1": (False, True), "s:2": (True, True), "s:3": (True, False), "s:4": (True, False),
    }  # fmt: skip
    # sigmoid(2) = 0.88 is above 0.85; sigmoid(1) = 0.73 lies between the thresholds and is nowhere
    assert [key for key, row in labels.items() if row["fixed_tags"]] == ["s:4"]
    assert labels["s:4"]["fixed_tags"] == ["hero (x)"]
    assert all("hero (x)" not in row["flex_tags"] for row in labels.values())
    (model / "model.onnx").write_bytes(b"no model")
    with pytest.raises(Halt, match=r"model\.onnx cannot be loaded") as stopped:
        tag.run(config)
    assert stopped.value.code == ExitCode.MISMATCH


def test_tagger_output_passes_the_hard_exclusions(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text('key,tags\ns:1,"smile, long_hair"\ns:2,"smile, loli"\n')
    config = world(tmp_path, tag=TagConfig("column", path=str(tmp_path / "tags.csv")))
    ingest.run(config)
    tag.run(config)
    label.run(config)
    labels = {row["key"]: row["flex_tags"] for row in read_table(dataset_dir(config), "labels").to_pylist()}
    assert labels["s:1"][1:3] == ["smile", "long hair"]
    assert "s:2" not in labels


def test_pixels_of_the_tagger() -> None:
    pixels = tag.tagger_pixels(Image.new("RGB", (100, 50), (10, 20, 30)))
    assert pixels.shape == (448, 448, 3)
    assert pixels[224, 224].tolist() == [30, 20, 10]  # BGR
    assert pixels[0, 0].tolist() == [255, 255, 255]


def test_missing_model_names_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(Halt, match=r"has no model\.onnx"):
        tag.load_session(tmp_path)


def test_shipped_config_documents_every_key() -> None:
    """Each key of the schema stands in configs/dataset.yaml, with a comment on its line or on its section's."""
    path = ROOT / "configs" / "dataset.yaml"
    settings = load_settings([path])
    defaults = DatasetConfig(name="mydata", sources=settings.sources, seed=31, select=settings.select)
    assert settings == defaults  # what is written is what holds without it
    lines = path.read_text().splitlines()

    def keys(value: Any) -> list[str]:
        found = []
        for field in dataclasses.fields(value):
            found.append(field.name)
            inner = getattr(value, field.name)
            if isinstance(inner, list) and inner and dataclasses.is_dataclass(inner[0]):
                inner = inner[0]
            if isinstance(inner, dict) and inner and dataclasses.is_dataclass(next(iter(inner.values()))):
                inner = next(iter(inner.values()))
            if dataclasses.is_dataclass(inner):
                found += keys(inner)
        return found

    for key in keys(settings):
        assert any(f"{key}:" in line.split("#")[0] for line in lines), key
    commented = [line for line in lines if ":" in line.split("#")[0] and not line.lstrip().startswith("#")]
    bare = [line for line in commented if "#" not in line and line[0] == " " and not line.rstrip().endswith(":")]
    assert all("tag:" in line or "tags_" in line or "min_bucket: 48" in line or "curated" in line for line in bare), bare


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("dataset.yaml")), ids=str)
def test_every_shipped_dataset_config_loads(path: Path) -> None:
    assert load_settings([path]).sources


def test_as_run_labels_bug_for_bug() -> None:
    path = ROOT / "configs" / "as_run" / "dataset.yaml"
    assert resolve(load_settings([path]).policy) == preset("animagine31")
