"""The drawn world: same bytes for a seed, structure in its posts, a checker that can tell right from wrong."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import itertools
import json
import random
from pathlib import Path

import pytest
from onepost import quality_tag
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.dataset import load_settings
from train.recipe import exclusions, tag_policy
from train.recipe.buckets import assign, make_buckets, place
from train.tools.tiny import posts as tiny_posts
from train.tools.tiny import world as tiny_world
from train.tools.tiny.check import Agreement, agreement, first_and_last_loss, hair_of, summary
from train.tools.tiny.draw import HAIR
from train.tools.tiny.posts import HELD_OUT, CheckPrompt, check_prompts, make_post

COUNT = 640
SMALL = 30


@pytest.fixture(scope="module")
def posts() -> list[tiny_posts.Post]:
    return [make_post(1, number, COUNT) for number in range(COUNT)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    assert tiny_world.write_world(folder, SMALL, 1)
    return folder


def files_of(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@functools.cache
def tiny_buckets() -> tuple[tuple[int, int], ...]:
    settings = load_settings(["configs/tiny/dataset.yaml"]).buckets
    return make_buckets(settings.area_px, settings.min_px, settings.max_px, settings.step_px)


def training_picture(post: tiny_posts.Post) -> Image.Image:
    """As prepare makes it: decoded, resized and cropped to the bucket of the tiny config."""
    image = Image.open(io.BytesIO(tiny_world.picture_bytes(post, 1))).convert("RGB")
    assert image.size == (post.width, post.height)
    spot = place(*image.size, assign(*image.size, tiny_buckets()))
    image = image.resize((spot.resized_w, spot.resized_h), Image.Resampling.LANCZOS)
    right, bottom = spot.crop_left + spot.bucket_w, spot.crop_top + spot.bucket_h
    return image.crop((spot.crop_left, spot.crop_top, right, bottom))


def test_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(world: Path, tmp_path: Path) -> None:
    tiny_world.write_world(tmp_path / "again", SMALL, 1)
    tiny_world.write_world(tmp_path / "other", SMALL, 2)
    assert files_of(tmp_path / "again") == files_of(world)
    assert files_of(tmp_path / "other") != files_of(world)


def test_a_complete_world_is_left_alone_and_a_hole_is_filled(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert not tiny_world.write_world(world, SMALL, 1)
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
    contents = files_of(world)
    next((world / "images").glob("*.png")).unlink()
    assert tiny_world.write_world(world, SMALL, 1)
    assert files_of(world) == contents


def test_another_world_in_the_folder_is_refused(world: Path) -> None:
    before = files_of(world)
    with pytest.raises(Halt, match="another world") as caught:
        tiny_world.write_world(world, SMALL, 2)
    assert caught.value.code == ExitCode.MISMATCH
    assert files_of(world) == before


def test_posts_carry_danbooru_fields_of_the_file_beside_them(world: Path) -> None:
    for path in (world / "images").glob("*.json"):
        post = json.loads(path.read_text())
        content = path.with_suffix("." + post["file_ext"]).read_bytes()
        assert post["media_asset"]["md5"] == hashlib.md5(content).hexdigest()
        assert Image.open(io.BytesIO(content)).size == (post["image_width"], post["image_height"])
        assert post["rating"] in "gs"
        assert post["score"] == post["up_score"] + post["down_score"]
        names = ("general", "character", "copyright", "artist", "meta")
        groups = [post[f"tag_string_{name}"].split() for name in names]
        assert sorted(tag for group in groups for tag in group) == post["tag_string"].split()
        assert post["tag_count"] == sum(map(len, groups))
    banned = tiny_world.post_json(make_post(1, tiny_posts.BANNED[0], COUNT), b"content")
    assert banned["is_banned"]
    assert "md5" not in banned
    assert "file_url" not in banned


def test_held_out_combinations_are_never_drawn() -> None:
    assert len(set(HELD_OUT)) == 48
    for seed in (1, 2, 3):
        drawn = {(post.look.hair, post.look.eyes, post.look.background)
                 for post in (make_post(seed, number, COUNT) for number in range(COUNT))}
        assert not drawn & set(HELD_OUT)
        assert {hair for hair, _, _ in drawn} == set(HAIR)


def test_a_hair_colours_word_stands_for_nothing_else(posts: list[tiny_posts.Post]) -> None:
    for post in posts:
        words = post.fields["tag_string"].replace("_", " ").split()
        assert [word for word in words if word in HAIR] == [post.look.hair]


def test_check_prompts_ask_once_for_each_held_out_combination() -> None:
    prompts = check_prompts()
    asked = collections.Counter(prompt.hair for prompt in prompts)
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 48
    assert max(asked.values()) - min(asked.values()) <= 1
    assert all(f"{prompt.hair} hair" in prompt.text for prompt in prompts)


def test_no_tag_touches_the_hard_exclusions(posts: list[tiny_posts.Post]) -> None:
    for post in posts:
        tags = post.fields["tag_string"].split()
        for rating in ("g", "s", "q", "e"):
            found = exclusions.excluded_by(
                rating=rating, tags=tags, characters=post.fields["tag_string_character"].split(), caption=" ".join(tags)
            )
            assert found is None


def test_scores_have_the_quantiles_of_the_quality_table(posts: list[tiny_posts.Post]) -> None:
    for rating, thresholds in {"g": (1, 3, 7, 14, 19, 33), "s": (1, 4, 9, 20, 31, 62)}.items():
        scores = [post.fields["score"] for post in posts if post.fields["rating"] == rating]
        assert len(scores) >= 200
        for wanted, threshold in zip((0.10, 0.25, 0.50, 0.75, 0.85, 0.95), thresholds, strict=True):
            assert sum(score <= threshold for score in scores) / len(scores) == pytest.approx(wanted, abs=0.07)


def test_better_scores_mean_visibly_more_skill(posts: list[tiny_posts.Post]) -> None:
    ordered = sorted((post for post in posts if post.fields["rating"] == "g"), key=lambda post: post.fields["score"])
    low, high = ordered[: len(ordered) // 4], ordered[-len(ordered) // 4 :]
    assert max(post.look.skill for post in low) < 0.5 < min(post.look.skill for post in high)

    def sharpness(post: tiny_posts.Post) -> float:
        grey = training_picture(post).convert("L")
        pixels = list(grey.get_flattened_data())
        return sum(abs(a - b) for a, b in itertools.pairwise(pixels)) / len(pixels)

    assert sum(map(sharpness, high[:12])) > 1.2 * sum(map(sharpness, low[:12]))


def test_pictures_land_in_several_buckets_in_three_formats(posts: list[tiny_posts.Post]) -> None:
    buckets = tiny_buckets()
    counts = collections.Counter(assign(post.width, post.height, buckets) for post in posts)
    assert set(counts) == {(64, 64), (64, 96), (96, 64)}
    assert min(counts.values()) >= 16
    assert {post.extension for post in posts} == {"png", "jpg", "webp"}
    assert any(post.width * post.height > 2 * 6144 for post in posts)


def test_the_checker_names_the_hair_of_drawn_pictures(posts: list[tiny_posts.Post]) -> None:
    sample = random.Random(1).sample(posts, 70)
    seen = [hair_of(training_picture(post)) for post in sample]
    right = sum(name == post.look.hair for name, post in zip(seen, sample, strict=True))
    assert right >= 69
    chance = sum(name == post.look.hair for name, post in zip(seen, sample[1:] + sample[:1], strict=True))
    assert chance < 25


def test_agreement_counts_right_and_wrong() -> None:
    red, blue = (Image.new("RGB", (128, 128), HAIR[name]) for name in ("red", "blue"))
    prompts = [CheckPrompt("", hair, 128, 128, 0) for hair in ("red", "blue", "red")]
    assert agreement([red, blue, blue], prompts) == Agreement(2, 3, {"red -> blue": 1})
    assert agreement([red, blue, blue], prompts).share == pytest.approx(2 / 3)


def test_summary_takes_the_means_of_first_and_last_fifty(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    losses = [1.0] * 50 + [0.5] * 20 + [0.1] * 50
    metrics.write_text("".join(json.dumps({"step": n, "update": n, "loss": x}) + "\n" for n, x in enumerate(losses)))
    updates, first, last = first_and_last_loss(metrics)
    assert (updates, first, last) == (120, pytest.approx(1.0), pytest.approx(0.1))
    assert "10.0x" in summary(tmp_path)


def test_the_aesthetic_table_has_every_key(world: Path) -> None:
    lines = (world / "aesthetic.csv").read_text().splitlines()
    ids = {json.loads(path.read_text())["id"] for path in (world / "images").glob("*.json")}
    assert lines[0] == "key,score"
    assert {line.split(",")[0] for line in lines[1:]} == {f"tiny:{number}" for number in ids}
    assert all(0 < float(line.split(",")[1]) < 1 for line in lines[1:])
    assert load_settings(["configs/tiny/dataset.yaml"]).sources[0].name == tiny_world.SOURCE


def test_quality_words_follow_the_shares(posts: list[tiny_posts.Post]) -> None:
    policy = tag_policy.preset("default")
    words = collections.Counter(
        quality_tag(post.fields["score"], post.fields["rating"], None, None, policy) for post in posts
    )
    assert set(words) >= {"masterpiece", "best quality", "great quality", "good quality", "normal quality",
                          "low quality", "worst quality"}
