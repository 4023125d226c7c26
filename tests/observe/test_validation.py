"""The held-out split leaks nothing, and a measurement is the same for any stage, order and number of processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cliptokens import small_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from train.base.errors import ExitCode, Halt
from train.data.selection import held_out
from train.model.text import TagTokenizer
from train.model.vae_file import LatentScale
from train.observe import validation
from train.observe.validation import (
    Making,
    batches,
    chosen,
    evaluate,
    fixed_noise,
    fixed_timesteps,
    make_batch,
    paired_change,
    strata_of,
    summary,
    t_975,
)
from train.recipe.captions import Caption
from train.recipe.rng import uid_of

LABELS = [
    {"quality": "best quality", "rating_tags": ["explicit", "nsfw"], "year": "newest", "aesthetic": None},
    {"quality": "low quality", "rating_tags": ["safe"], "year": None, "aesthetic": "aesthetic"},
]


class Images:
    """What validation reads of an Index, in memory."""

    def __init__(self, keys: list[str], content: str = "sample") -> None:
        self.keys, self.content = keys, content
        self.uids = np.array([uid_of(key) for key in keys], dtype=np.uint64)
        wide = np.array([int(uid) % 3 == 0 for uid in self.uids])
        self.bucket_w, self.bucket_h = np.where(wide, 64, 32), np.where(wide, 32, 64)
        self.orig_w, self.orig_h = self.bucket_w * 2, self.bucket_h * 2
        self.crop_top = self.crop_left = np.zeros(len(keys), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def named(self, i: int) -> str:
        return self.keys[i]

    def latent(self, i: int, *, flip: bool = False) -> tuple[str, int]:
        return f"{self.bucket_w[i]}", int(self.uids[i] % 1000)

    def record(self, i: int) -> Caption:
        return Caption(*self.caption(i))

    def caption(self, i: int) -> tuple[list[str], list[str]]:
        return ["1girl"], ["girl", self.keys[i]]

    def labels(self, i: int) -> dict[str, Any]:
        return LABELS[int(self.uids[i]) % 2]


class Reader:
    def __init__(self, channels: int = 4) -> None:
        self.channels = channels

    def read(self, shards: list[str], rows: list[int]) -> torch.Tensor:
        height, width = (4, 8) if shards[0] == "64" else (8, 4)
        filled = [torch.full((self.channels, height, width), float(row)) for row in rows]
        return torch.stack(filled)


def keys(count: int) -> list[str]:
    return [f"danbooru:{number}" for number in range(count)]


def loss_of(batch: Any) -> torch.Tensor:
    """Depends on everything that must be fixed."""
    parts = (
        (batch.latents_BCHW + batch.noise_BCHW).mean((1, 2, 3)),
        batch.timesteps_B / 1000,
        batch.ids_1_BN77.sum((1, 2)),
    )
    return sum(part.float() for part in parts) + batch.size_B6.sum(1)  # type: ignore[return-value]


def measure(images: Images, **options: Any) -> dict[str, Any]:
    arguments: Any = (images, Reader(8 if images.content == "moments" else 4), TagTokenizer(small_tokenizer()))
    record = evaluate(loss_of, *arguments, Making(LatentScale(0.13025)), micro=options.pop("micro", 4),
                      device=torch.device("cpu"), **options)  # fmt: skip
    assert record is not None
    return record


class Damaged(Reader):
    """Cannot read some rows of the shards."""

    def __init__(self, rows: set[int]) -> None:
        super().__init__()
        self.rows = rows

    def read(self, shards: list[str], rows: list[int]) -> torch.Tensor:
        if self.rows & set(rows):
            raise Halt(ExitCode.MISMATCH, f"row {rows[0]} is not finite")
        return super().read(shards, rows)


@pytest.mark.parametrize("bad", [(0,), (2, 3, 7), tuple(range(9))])
def test_an_image_that_cannot_be_read_is_left_out_and_named(bad: tuple[int, ...]) -> None:
    images, tokens = Images(keys(9)), TagTokenizer(small_tokenizer())
    broken = Damaged({int(images.uids[i] % 1000) for i in bad})
    options: Any = {"micro": 4, "device": torch.device("cpu")}
    with pytest.raises(Halt, match="not finite") as halted:
        evaluate(loss_of, images, broken, tokens, Making(LatentScale(0.13025)), **options)  # type: ignore[arg-type]
    assert halted.value.message.split(": row")[0] in {images.keys[i] for i in bad}
    found = evaluate(loss_of, images, broken, tokens, Making(LatentScale(0.13025)), skip_unreadable=True, **options)  # type: ignore[arg-type]
    assert found is not None
    assert found["unreadable"] == [f"{images.uids[i]:016x}" for i in bad]
    whole = measure(images)
    assert "unreadable" not in whole
    assert found["losses"] == {uid: loss for uid, loss in whole["losses"].items() if uid not in found["unreadable"]}
    assert found["images"] == 9 - len(bad)


def test_split_known_answers() -> None:
    """uids of the published examples: 9b31... of danbooru:1 (0.606 of the range), e660... of danbooru:6814120 (0.9)."""
    uids = np.array([uid_of("danbooru:1"), uid_of("danbooru:6814120")], dtype=np.uint64)
    assert held_out(uids, 0.6).tolist() == [False, False]
    assert held_out(uids, 0.61).tolist() == [True, False]
    assert held_out(uids, 0.95).tolist() == [True, True]
    assert held_out(uids, 0.0).tolist() == [False, False]


@given(st.permutations(range(60)), st.floats(0, 0.99), st.floats(0, 0.99))
def test_split_depends_on_the_key_alone(order: list[int], share: float, other: float) -> None:
    uids = np.array([uid_of(f"x:{number}") for number in range(60)], dtype=np.uint64)
    mask = held_out(uids, share)
    assert np.array_equal(held_out(uids[order], share), mask[order])
    assert np.array_equal(held_out(uids[10:20], share), mask[10:20])  # another stage's smaller selection
    small, large = sorted((share, other))
    assert not np.any(held_out(uids, small) & ~held_out(uids, large))


def test_split_share_of_many() -> None:
    uids = np.array([uid_of(key) for key in keys(20_000)], dtype=np.uint64)
    assert abs(held_out(uids, 0.05).mean() - 0.05) < 0.006  # 4 sigma


def test_repeats_follow_their_image() -> None:
    uids = np.array([uid_of(key, repeat) for key in keys(300) for repeat in range(3)], dtype=np.uint64)
    images = np.repeat(np.arange(300), 3)
    mask = held_out(uids, 0.3, images).reshape(300, 3)
    assert mask.any()
    assert np.array_equal(mask.all(1), mask.any(1))
    assert np.array_equal(mask[:, 0], held_out(uids[::3], 0.3))


@pytest.mark.parametrize("share", [-0.1, 1.0, 5.0, math.nan])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(Halt, match=r"validation\.share") as caught:
        held_out(np.zeros(1, dtype=np.uint64), share)
    assert caught.value.code == ExitCode.USAGE


def test_fewer_images_are_part_of_more() -> None:
    uids = Images(keys(50)).uids
    assert set(chosen(uids, 5)) < set(chosen(uids, 20))
    assert len(chosen(uids, 500)) == 50


@given(st.integers(0, 40), st.integers(1, 7))
def test_batches_hold_every_image_once_and_one_bucket(count: int, micro: int) -> None:
    images: Any = Images(keys(count))
    runs = list(batches(images, micro))
    assert sorted(int(row) for run in runs for row in run) == list(range(count))
    for run in runs:
        assert 1 <= len(run) <= micro
        assert len(set(images.bucket_w[run])) == 1


def test_everything_of_an_image_is_fixed() -> None:
    """Neither the batch size nor the other images change what one image is measured with."""
    whole = measure(Images(keys(20)))
    assert measure(Images(keys(20)), micro=1)["losses"] == whole["losses"]
    assert measure(Images(list(reversed(keys(20)))))["losses"] == whole["losses"]
    part = measure(Images(keys(7)))["losses"]
    assert part == {uid: whole["losses"][uid] for uid in part}
    assert len({round(value, 6) for value in whole["losses"].values()}) > 10


def test_streams_are_the_validations_own() -> None:
    uid = uid_of("danbooru:1")
    assert fixed_noise(uid, (4, 2, 2)).shape == (4, 2, 2)
    assert (
        fixed_noise(uid, (4, 2, 2))[0, 0, 0] != validation.rng.normals(0, validation.rng.Stream.NOISE, uid, 0, (1,))[0]
    )
    times = fixed_timesteps(np.arange(4000, dtype=np.uint64))
    assert times.min() >= 0
    assert times.max() <= 999
    assert abs(times.mean() - 499.5) < 20


def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(validation.dist, "all_reduce", lambda tensor: parts.append(tensor.clone()))
    images = Images(keys(30))
    for rank in range(3):
        measure(images, rank=rank, world=3)
    total = sum(parts)[:30]  # type: ignore[index]
    assert total.tolist() == [measure(images)["losses"][f"{uid:016x}"] for uid in images.uids.tolist()]
    assert all(((one != 0).sum() < 30) for one in parts)


def test_a_stop_discards_the_measurement() -> None:
    arguments: Any = (Images(keys(9)), Reader(), TagTokenizer(small_tokenizer()), Making(LatentScale(1.0)))
    record = evaluate(loss_of, *arguments, micro=2, device=torch.device("cpu"), stop=lambda: True)
    assert record is None


def test_moments_use_the_mean() -> None:
    images: Any = Images(keys(6), content="moments")
    rows = next(batches(images, 4))
    batch = make_batch(images, Reader(8), TagTokenizer(small_tokenizer()), rows, Making(LatentScale(0.5)))  # type: ignore[arg-type]
    assert batch.latents_BCHW.shape[1] == 4
    assert batch.latents_BCHW[0, 0, 0, 0] == float(images.uids[rows[0]] % 1000) * 0.5


def test_strata() -> None:
    assert strata_of(LABELS[0], 0) == ["quality/best quality", "rating/explicit", "year/newest", "timestep/000-249"]
    assert strata_of(LABELS[1], 250) == ["quality/low quality", "rating/safe", "aesthetic/aesthetic", "timestep/250-499"]
    assert strata_of({}, 999) == ["timestep/750-999"]


def test_summary_literal() -> None:
    uids = np.array([1, 2, 3], dtype=np.uint64)
    record = summary(uids, np.array([1.0, 2.0, 6.0]), [LABELS[0], LABELS[0], LABELS[1]])
    assert record["loss"] == 3.0
    assert record["interval"] == pytest.approx(4.3027 * math.sqrt(7 / 3))  # t with 2 degrees of freedom
    assert record["strata"]["quality/best quality"]["loss"] == 1.5
    assert record["strata"]["rating/safe"] == {"images": 1, "loss": 6.0, "interval": None}
    assert record["losses"]["0000000000000003"] == 6.0
    bands = [one for name, one in record["strata"].items() if name.startswith("timestep/")]
    assert sum(one["images"] for one in bands) == 3
    assert sum(one["images"] * one["loss"] for one in bands) == pytest.approx(9.0)


def test_quantiles_of_students_t() -> None:
    table = {1: 12.706, 2: 4.303, 4: 2.776, 5: 2.571, 6: 2.447, 10: 2.228, 30: 2.042, 100: 1.984, 10**6: 1.960}
    for freedom, known in table.items():
        assert t_975(freedom) == pytest.approx(known, rel=2e-3)


def test_paired_change() -> None:
    before, after = {"a": 1.0, "b": 5.0, "c": 3.0}, {"a": 0.5, "b": 4.5, "d": 9.0}
    assert paired_change(before, after) == {"images": 2, "loss": -0.5, "interval": 0.0}
    assert paired_change({"a": 1.0}, {"b": 1.0}) is None


class Told(Images):
    """Images of which some have sentences, some further captions of tags, one sentences alone."""

    EVERY = (
        Caption(["1girl"], ["hat"]), Caption(["1girl"], ["hat"], ["grainy"], ["She has a hat.", "A hat."]),
        Caption(prose=["A boat."]), Caption(["1girl"], ["hat"], variants=[(["1boy"], ["cap"], ["old"]), ([], ["x"], [])]),
        Caption(["1girl"], ["hat"], [], ["Both."], [([], ["cap"], [])]),
    )  # fmt: skip

    def record(self, i: int) -> Caption:
        return self.EVERY[i % len(self.EVERY)]

    def select(self, which: Any) -> Told:
        return Told([self.keys[i] for i in which])


def test_each_kind_of_caption_is_measured_on_the_pictures_that_have_it() -> None:
    """A loss that is the caption alone: as literal sums over those whose caption of that kind it is."""
    images, tokens = Told(keys(10)), TagTokenizer(small_tokenizer())

    def loss_of(batch: Any) -> torch.Tensor:
        return batch.ids_1_BN77.double().sum((1, 2))  # type: ignore[no-any-return]

    def ids(*tags: str) -> float:
        return float(tokens.chunk_ids(tokens.content_ids(tags), 225)[0].sum())

    def measured(**options: Any) -> dict[str, Any]:
        record = evaluate(loss_of, images, Reader(), tokens, Making(LatentScale(1.0)), device=torch.device("cpu"), **options)  # type: ignore[arg-type]
        assert record is not None
        return record

    plain, tailed = ids("1girl", "hat"), ids("1girl", "hat", "grainy")
    written = [plain, ids("1girl", "hat", "grainy", "She has a hat."), ids("A boat."), plain, ids("1girl", "hat", "Both.")]
    record = measured(micro=4)
    assert record["loss"] == pytest.approx(sum(written) / 5)
    wanted = {
        "tags": [tailed, plain, plain], "tags_prose": [written[1], written[4]], "prose": [ids("She has a hat."), ids("A boat."), ids("Both.")],
        "variant": [ids("1boy", "cap", "old"), ids("cap")],
    }  # fmt: skip
    found = {name: one for name, one in record["strata"].items() if name.startswith("caption/")}
    assert {name: (one["images"], one["loss"]) for name, one in found.items()} == {
        f"caption/{kind}": (2 * len(values), pytest.approx(sum(values) / len(values))) for kind, values in wanted.items()
    }
    assert measured(micro=1)["strata"] == measured(micro=3)["strata"] == record["strata"]
    assert not [name for name in measure(Images(keys(9)))["strata"] if name.startswith("caption/")], "plain sets: nothing more is measured"
