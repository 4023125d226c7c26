"""Intervals agree with formulas, judges with oracles: a classifier that knows brightness, one that knows colours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cliptokens import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxmodel import wd_model
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.prompts import QUALITY_PREFIX, Prompt, PromptsFile, checked
from train.observe.pictures import write_pictures
from train.prepare import tag
from train.tools.quality import intervals, judges, quality
from train.tools.report.page import write_page
from train.tools.tiny.draw import BACKGROUNDS, HAIR, SHIRTS, SKIN, Look, draw

ROOT = Path(__file__).resolve().parents[2]
Colour = tuple[int, int, int]


# ---- intervals


def test_interval_of_a_mean_is_the_analytic_one() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = intervals.mean(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low is not None
    assert found.high is not None
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        found = intervals.mean((random.random(60) < 0.3).astype(float))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert 180 <= held <= 198  # 190 expected, four sigma


def test_the_same_pictures_give_the_same_digits() -> None:
    parts, wholes = np.arange(30.0), np.arange(30.0) + 5
    assert intervals.ratio(parts, wholes) == intervals.ratio(parts, wholes)
    assert intervals.ratio(parts, wholes).value == pytest.approx(435 / 585)


def test_chunks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(0).random((50, 2))
    whole = intervals.resampled_sums(columns, draws=100)
    monkeypatch.setattr(intervals, "_CHUNK", 700)
    assert np.allclose(intervals.resampled_sums(columns, draws=100), whole, rtol=1e-12)


def test_pairs_take_out_what_makes_one_prompt_harder() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(0, 5, 100)
    before, after, ones = hard, hard + random.normal(0.5, 0.1, 100), np.ones(100)
    found = intervals.change((before, ones), (after, ones))
    assert found.value == pytest.approx((after - before).mean())
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.1
    assert 0.4 < found.low < found.high < 0.6


@given(st.lists(st.floats(-10, 10), max_size=12))
@settings(deadline=None)
def test_edges(values: list[float]) -> None:
    found = intervals.mean(values)
    assert found.pictures == len(values)
    assert (found.value is None) == (not values)
    assert (found.low is None) == (len(values) < 2)
    if found.low is not None and found.high is not None:
        assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert intervals.ratio([0.0] * len(values), [0.0] * len(values)).value is None


def test_shares_have_wilsons_interval() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):
        found = intervals.share(hits, trials)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert intervals.share(0, 0).value is None


def test_rare_wholes_leave_empty_resamples_out() -> None:
    found = intervals.ratio([1.0, 0, 0, 0], [1.0, 0, 0, 0])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


# ---- judges


def classifier(folder: Path, labels: Sequence[str], weight: torch.Tensor, bias: float, *, several: bool = False) -> Path:
    """A real ResNet whose layers hand the mean of each colour channel on, and a last layer of our choice."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    names = dict(enumerate(labels))
    config = ResNetConfig(
        embedding_size=3, hidden_sizes=[3], depths=[1], layer_type="basic", id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type="multi_label_classification" if several else None,
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "convolution" in name:
                tensor.zero_()
        embedder = model.resnet.embedder.embedder.convolution.weight
        for channel in range(3):
            embedder[channel, channel, 3, 3] = 1.0
        model.classifier[1].weight.copy_(weight)
        model.classifier[1].bias.fill_(bias)
    model.save_pretrained(folder)
    ConvNextImageProcessor(
        do_resize=False, do_rescale=True, do_normalize=False, crop_pct=1.0, size={"shortest_edge": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sigmoid(8 (brightness - 1/2)) as the probability of `hq`."""
    weight = torch.tensor([[0.0] * 3, [8 / 3] * 3])
    folder = classifier(tmp_path_factory.mktemp("score") / "bright", ["lq", "hq"], weight, 0.0)
    with torch.no_grad():
        from transformers import ResNetForImageClassification

        model = ResNetForImageClassification.from_pretrained(folder)
        model.classifier[1].bias.copy_(torch.tensor([0.0, -4.0]))
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`red_sky`, `green_sky`, `blue_sky`: each where its channel is above one half."""
    folder = tmp_path_factory.mktemp("tags") / "colours"
    return classifier(folder, ["red_sky", "green_sky", "blue_sky"], 20 * torch.eye(3), -10.0, several=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of the real class, eight numbers wide, for texts of up to 77 tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "small"
    tokenizer = small_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(4)
    config = CLIPConfig(
        text_config={**shape, **ids}, vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def samples(folder: Path, pictures: Sequence[tuple[str, Image.Image]], prefix: str = QUALITY_PREFIX) -> Path:
    """A folder as scripts/sample.py writes it."""
    prompts = [
        Prompt(text=text, width=image.width, height=image.height, seed=number)
        for number, (text, image) in enumerate(pictures)
    ]
    shown = checked(PromptsFile(prompts=prompts, quality_prefix=prefix, steps=2))
    write_pictures({"": [image for _, image in pictures]}, shown, folder, model_name="m")
    return folder


def plain(colour: Colour) -> Image.Image:
    """Portrait and landscape by brightness: the classifier of this file takes a picture in its own shape."""
    return Image.new("RGB", (64, 96) if sum(colour) % 2 else (96, 64), colour)


def test_the_score_is_the_oracles(brightness: Path, tmp_path: Path) -> None:
    greys = [0, 60, 128, 201, 255]
    folder = samples(tmp_path / "a", [(f"1girl, x{grey}", plain((grey,) * 3)) for grey in greys])
    stages = quality.stage_pictures([f"ft1={folder}"])
    judge = judges.open_aesthetic(str(brightness), "hq", "cpu")
    record = quality.measure(stages, aesthetic=judge)
    expected = [1 / (1 + math.exp(-8 * (grey / 255 - 0.5))) for grey in greys]
    stage = record["stages"]["ft1"]
    assert stage["statistics"]["aesthetic"]["value"] == pytest.approx(sum(expected) / 5, abs=1e-3)
    assert stage["aesthetic"]["quantiles"]["0.5"] == pytest.approx(expected[2], abs=1e-3)
    assert stage["aesthetic"]["histogram"] == [1, 1, 0, 0, 0, 1, 0, 0, 0, 2]  # 0.018 0.11 0.504 0.91 0.98
    shares = {word: one["value"] for word, one in stage["aesthetic"]["words"].items()}
    assert shares == {"very aesthetic": 0.4, "aesthetic": 0.2, "displeasing": 0, "very displeasing": 0.4}
    assert record["judges"]["aesthetic"]["model"].startswith("bright@")
    with pytest.raises(Halt, match=r"--aesthetic-label best: .* knows lq, hq") as caught:
        judges.open_aesthetic(str(brightness), "best")
    assert caught.value.code == ExitCode.USAGE


def test_tags_seen_and_asked(colours: Path, tmp_path: Path) -> None:
    """Red twice right, green shown blue, one that asks for two and shows one, one that asks for nothing known."""
    shown = [
        ("red sky, 1girl", (255, 0, 0)),
        ("red sky", (250, 20, 20)),
        ("green sky", (0, 0, 255)),
        ("blue sky, Red_Sky", (0, 0, 255)),
        ("night", (0, 255, 0)),
    ]
    folder = samples(tmp_path / "a", [(text, plain(colour)) for text, colour in shown])
    right = samples(tmp_path / "b", [(text, plain(colour)) for text, colour in (*shown[:2], ("green sky", (0, 255, 0)))])
    judge = judges.open_tagger(str(colours), 0.5, 0.5, "cpu")
    assert judge.tags == ("red sky", "green sky", "blue sky")
    record = quality.measure(quality.stage_pictures([f"a={folder}", f"b={right}"]), tagger=judge)
    a, b = record["stages"]["a"], record["stages"]["b"]
    assert a["statistics"]["tag_recall"]["value"] == 3 / 5
    assert a["statistics"]["tag_precision"]["value"] == 3 / 5
    by_tag = {
        name: (one["asked"], one["seen"], one["recall"]["value"], one["precision"]["value"])
        for name, one in a["by_tag"].items()
    }
    assert by_tag == {
        "red sky": (3, 2, 2 / 3, 1.0),
        "green sky": (1, 1, 0.0, 0.0),
        "blue sky": (1, 2, 1.0, 0.5),
    }
    assert b["statistics"]["tag_recall"]["value"] == 1.0
    (change,) = record["changes"]
    assert (change["from"], change["to"], change["pictures"]) == ("a", "b", 3)
    assert change["statistics"]["tag_recall"]["value"] == pytest.approx(1 - 2 / 3)


def test_a_single_label_classifier_sees_its_most_probable_class(brightness: Path) -> None:
    judge = judges.open_tagger(str(brightness), device="cpu")
    assert judge.see([plain((254,) * 3), plain((0, 0, 0))]).tolist() == [[False, True], [True, False]]


def test_clip_agrees_with_the_models_own_forward(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    random = np.random.default_rng(2)
    texts = ["1girl, smile", "night, rain", "cat", "dog", "1boy"]
    pictures = [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in texts]
    folder = samples(tmp_path / "a", list(zip(texts, pictures, strict=True)))
    record = quality.measure(quality.stage_pictures([f"a={folder}"]), clip=judges.open_clip(str(clip), "cpu"))
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), small_tokenizer()
    cosines = np.zeros((5, 5))
    with torch.no_grad():
        for row, image in enumerate(pictures):
            pixels = CLIPImageProcessor.from_pretrained(clip)(images=image, return_tensors="pt")["pixel_values"]
            for column, text in enumerate(texts):
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
                cosines[row, column] = float(logits / model.logit_scale.exp())
    found = record["stages"]["a"]["statistics"]
    assert found["clip"]["value"] == pytest.approx(np.diag(cosines).mean(), abs=1e-5)
    assert found["clip_first"]["value"] == (cosines.argmax(1) == np.arange(5)).mean()
    assert record["judges"]["clip"]["prompts_cut"] == 0


def test_prompts_too_long_for_clip_are_counted(clip: Path, tmp_path: Path) -> None:
    long = ", ".join(f"tag{number}" for number in range(40))
    folder = samples(tmp_path / "a", [(long, plain((9, 9, 9))), ("cat", plain((200, 9, 9)))])
    record = quality.measure(quality.stage_pictures([f"a={folder}"]), clip=judges.open_clip(str(clip), "cpu"))
    assert record["judges"]["clip"]["prompts_cut"] == 1


def test_wd_tagger_by_its_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "wd"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"weights")
    (folder / "selected_tags.csv").write_text("name,category\ngeneral,9\nlong_hair,0\nhero_(x),4\n^_^,0\n")

    class Session:
        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": "input"})]

        def run(self, _: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.tile(np.array([0.99, 0.4, 0.6, 0.2], np.float32), (len(feeds["input"]), 1))]

    monkeypatch.setattr(tag, "load_session", lambda folder, option: Session())
    judge = judges.open_tagger(str(folder))
    assert judge.tags == ("long hair", "hero (x)", "^ ^")  # no rating
    assert judge.see([plain((0, 0, 0))] * 2).tolist() == [[True, False, False]] * 2
    assert judges.open_tagger(str(folder), 0.35, 0.5).see([plain((0, 0, 0))]).tolist() == [[True, True, False]]
    assert judges.written(r"hero \(x\)") == "hero (x)"


def test_wd_tagger_on_the_real_runtime(tmp_path: Path) -> None:
    """A tagger of 0..255 BGR colours that sees red_sky above a mean of 128."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "wd"
    folder.mkdir()
    (folder / "selected_tags.csv").write_text("name,category\nblue_sky,0\ngreen_sky,0\nred_sky,0\n")
    weights = np.eye(3, dtype=np.float32) / 10
    (folder / "model.onnx").write_bytes(wd_model(weights, np.full(3, -12.8, np.float32)))
    judge = judges.open_tagger(str(folder), 0.5)
    shown = [Image.new("RGB", (64, 64), colour) for colour in ((255, 0, 0), (0, 200, 0), (0, 0, 0))]
    assert judge.see(shown).tolist() == [[False, False, True], [False, True, False], [False] * 3]


def test_the_drawn_world_through_the_same_door(tmp_path: Path) -> None:
    """Drawings carry the hair they are drawn with; the same ones under each other's prompts carry none of it."""
    looks = [
        Look(
            hair=hair, eyes="green", expression="smile", background=next(iter(BACKGROUNDS)), shirt=next(iter(SHIRTS)),
            hat=False, glasses=False, beard=False, long_hair=True, skin=next(iter(SKIN)), line=1.0, skill=0.6,
        )
        for hair in HAIR
    ]  # fmt: skip
    drawn = [(f"1girl, {look.hair} hair", draw(look, 96, 96, seed)) for seed, look in enumerate(looks)]
    turned = [(text, drawn[(number + 1) % len(drawn)][1]) for number, (text, _) in enumerate(drawn)]
    stages = quality.stage_pictures([f"bad={samples(tmp_path / 'a', turned)}", f"good={samples(tmp_path / 'b', drawn)}"])
    record = quality.measure(stages, tagger=judges.open_tagger(judges.DRAWN_WORLD))
    bad, good = (record["stages"][name]["statistics"]["tag_recall"]["value"] for name in ("bad", "good"))
    assert (bad, good) == (0.0, 1.0)
    assert record["changes"][0]["statistics"]["tag_precision"] == {"value": 1.0, "low": 1.0, "high": 1.0, "pictures": 6}


def test_nothing_is_fetched_and_the_fix_is_named(tmp_path: Path, brightness: Path) -> None:
    openers: list[tuple[str, Any]] = [
        ("--clip", judges.open_clip), ("--tagger", judges.open_tagger),
        ("--aesthetic", lambda given: judges.open_aesthetic(given, "hq")),
    ]  # fmt: skip
    for option, opened in openers:
        with pytest.raises(Halt, match=f"hf download openai/clip --local-dir models/clip, then {option}") as caught:
            opened("openai/clip")
        assert caught.value.code == ExitCode.USAGE
        with pytest.raises(Halt, match=rf"{option} .*config\.json"):
            opened(str(tmp_path))
    with pytest.raises(Halt, match="model_type 'resnet', needed is 'clip'"):
        judges.open_clip(str(brightness))
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text((brightness / "config.json").read_text())
    with pytest.raises(Halt, match=r"--aesthetic .*cannot be loaded") as caught:
        judges.open_aesthetic(str(torn), "hq")
    assert caught.value.code == ExitCode.MISMATCH


def test_stages_that_cannot_be_judged(tmp_path: Path) -> None:
    folder = samples(tmp_path / "a", [("cat", plain((1, 2, 3)))])
    for stages, words in (
        (["ft1=" + str(tmp_path / "none")], "is no folder"),
        ([f"ft1={folder}", f"ft1={folder}"], "given twice"),
        ([str(tmp_path)], "no pictures"),
    ):
        with pytest.raises(Halt, match=words):
            quality.stage_pictures(stages)


def test_a_run_directory_may_hold_an_equals_sign(tmp_path: Path) -> None:
    run = tmp_path / "lr=1e-5"
    samples(run / "samples" / "step-00000009", [("cat", plain((1, 2, 3)))])
    assert list(quality.stage_pictures([str(run), f"low={run / 'samples/step-00000009'}"])) == ["lr=1e-5", "low"]


# ---- script and report


def script(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
def test_script_and_report(brightness: Path, colours: Path, clip: Path, tmp_path: Path) -> None:
    dark = [(f"red sky, x{n}", plain((n, 0, 0))) for n in (200, 60, 90, 160)]
    light = [(f"red sky, x{n}", plain((254, n, n))) for n in (200, 60, 90, 160)]
    run = tmp_path / "ft1"
    stages = [f"base={samples(tmp_path / 'base', dark)}", run]
    samples(run / "samples" / "step-00000009", light)
    judged = ["--aesthetic", brightness, "--clip", clip, "--tagger", colours, "--threshold", 0.5, "--device", "cpu"]
    made = script("quality.py", *stages, *judged, "--out", tmp_path / "q.json")
    assert made.returncode == 0, made.stderr
    assert "base -> ft1 (same prompt and seed: 4)" in made.stdout
    assert "tags seen of those asked  1.000 [1.000, 1.000]" in made.stdout
    again = script("quality.py", *stages, *judged, "--out", tmp_path / "again.json", "--json")
    assert json.loads(again.stdout) == json.loads((tmp_path / "q.json").read_text())
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "q.json").read_bytes()
    page = write_page([run], tmp_path / "r.html", quality=tmp_path / "q.json").read_text()
    for words in ("Quality of the samples", "base → ft1", "CLIP cosine", "very aesthetic", "By tag", "red sky", "bright@"):
        assert words in page, words
    assert script("quality.py", *stages, "--out", tmp_path / "x.json").returncode == ExitCode.USAGE
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(Halt, match=r"no record of scripts/quality\.py"):
        write_page([run], tmp_path / "r.html", quality=tmp_path / "bad.json")
    record = json.loads((tmp_path / "q.json").read_text())
    del record["stages"]["ft1"]["by_tag"]["red sky"]["recall"]
    (tmp_path / "bad.json").write_text(json.dumps(record))
    with pytest.raises(Halt, match="no complete record") as caught:
        write_page([run], tmp_path / "r.html", quality=tmp_path / "bad.json")
    assert caught.value.code == ExitCode.USAGE
