"""The data plan: known answers, an oracle in plain Python, and its promises over sizes, seeds and world sizes."""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.base.errors import ExitCode, Halt
from train.observe.metrics import trace_lines
from train.recipe import order as plan_module
from train.recipe import rng
from train.recipe.buckets import check_buckets, make_buckets, merge_small_buckets
from train.recipe.order import (
    Plan,
    divisors,
    duplicate_uids,
    plan_fingerprint,
    tiles_per_update,
    virtual_ranks,
)
from train.recipe.rng import Stream

CARD_IMAGES = 873_504
SIZES = [(512, 2048), (832, 1216), (1024, 1024), (1216, 832), (1536, 640)]
EXAMPLE = {(1024, 1024): 500, (832, 1216): 300, (1216, 832): 40, (576, 1792): 9, (512, 2048): 1}


def selection(counts: list[int]) -> tuple[np.ndarray, list[int], list[int]]:
    """uids, widths, heights of images numbered 1.. in buckets of the given sizes."""
    sizes = [size for size, count in zip(SIZES, counts, strict=False) for _ in range(count)]
    uids = np.array([rng.uid_of(f"t:{number}") for number in range(1, len(sizes) + 1)], dtype=np.uint64)
    return uids, [w for w, _ in sizes], [h for _, h in sizes]


def slots(plan: Plan) -> list[list[tuple[int, int]]]:
    """(uid, epoch) of every slot, per update."""
    return [
        [pair for tile in plan.update(s) for pair in zip(tile.uids.tolist(), tile.epochs.tolist(), strict=True)]
        for s in range(plan.total_updates)
    ]


def plain_plan(counts: list[int], seed: int, m: int, t: int, updates: int) -> list[list[list[tuple[int, int]]]]:
    """`carry` written straight from its definition: whole streams as Python lists."""
    uids, widths, heights = selection(counts)
    images = {}
    for uid, w, h in zip(uids.tolist(), widths, heights, strict=True):
        images.setdefault((w, h), []).append(uid)

    def key(stream, uid, epoch):
        word = rng.words(seed, stream, uid, epoch, 2).tolist()
        return word[0] << 32 | word[1]

    tiles, epoch, made = [], 0, dict.fromkeys(images, 0)
    streams = {size: [] for size in images}
    while len(tiles) < updates * t:
        ending = []
        for (w, h), members in sorted(images.items()):
            ordered = sorted(members, key=lambda uid, e=epoch: (key(Stream.ORDER, uid, e), uid))
            streams[w, h] += [(uid, epoch) for uid in ordered]
            size = min(m, len(members))
            while (made[w, h] + 1) * size <= len(streams[w, h]):
                number = made[w, h]
                tile_id = w << 48 | h << 32 | number
                slots = streams[w, h][number * size : (number + 1) * size]
                ending.append((key(Stream.TILE, tile_id, epoch), tile_id, slots))
                made[w, h] += 1
        tiles += [slots for _, _, slots in sorted(ending)]
        epoch += 1
    return [tiles[s * t : (s + 1) * t] for s in range(updates)]


def example_plan(**changes) -> Plan:
    uids = [rng.uid_of(f"danbooru:{number}") for number in range(1, 9)]
    arguments = {"seed": 31, "tile_images": 2, "tiles_per_update": 2, "epochs": 2} | changes
    return Plan(uids, [1024] * 5 + [832] * 3, [1024] * 5 + [1216] * 3, **arguments)


def test_known_plan_and_its_trace_hash():
    plan = example_plan()
    written, trace = [], ""
    for s in range(4):
        tiles = plan.update(s)
        written.append(
            " | ".join(
                " ".join(f"{row + 1}@{epoch}" for row, epoch in zip(tile.rows, tile.epochs, strict=True))
                for tile in tiles
            )
        )
        for tile in tiles:
            trace += trace_lines(s, tile, rng.timesteps(31, tile.uids, tile.epochs, 0, 1000))
    assert written == [
        "6@0 8@0 | 4@0 5@0",
        "1@0 2@0 | 4@1 1@1",
        "5@1 2@1 | 8@1 7@1",
        "3@0 3@1 | 7@0 6@1",
    ]
    assert hashlib.sha256(trace.encode()).hexdigest() == (
        "9c83d161f09d09189b8fd7abd260e1f0868797c207a1b9c90101ac77ad83339c"
    )
    assert [plan.epoch_of(s) for s in range(4)] == [0, 0, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=4), st.integers(0, 99), st.integers(1, 5), st.integers(1, 4))
def test_plan_equals_the_definition(counts, seed, m, t):
    """Buckets smaller than a tile, one epoch spanning tiles and more updates than images included."""
    uids, widths, heights = selection(counts)
    plan = Plan(uids, widths, heights, seed=seed, tile_images=m, tiles_per_update=t, epochs=3, max_updates=12)
    expected = plain_plan(counts, seed, m, t, plan.total_updates)
    for s in range(plan.total_updates):
        got = [list(zip(x.uids.tolist(), x.epochs.tolist(), strict=True)) for x in plan.update(s)]
        assert got == expected[s]
        for tile in plan.update(s):
            assert {(widths[row], heights[row]) for row in tile.rows} == {(tile.width, tile.height)}
            assert uids[tile.rows].tolist() == tile.uids.tolist()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(4, 40), min_size=1, max_size=5), st.integers(0, 99), st.sampled_from([(4, 1), (4, 2), (3, 3)])
)
def test_no_pair_twice_and_every_image_nine_to_eleven_times(counts, seed, shape):
    m, t = shape
    counts[-1] += -sum(counts) % (m * t)  # as the card's 873,504 = 9,099 x 96: no image is left over
    uids, widths, heights = selection(counts)
    plan = Plan(uids, widths, heights, seed=seed, tile_images=m, tiles_per_update=t, epochs=10)
    assert plan.total_updates == 10 * len(uids) // (m * t)
    seen = Counter(pair for update in slots(plan) for pair in update)
    assert max(seen.values()) == 1
    per_image = Counter(uid for uid, _ in seen)
    assert set(per_image) == set(uids.tolist())
    assert 9 <= min(per_image.values()) <= max(per_image.values()) <= 11


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=5), st.integers(0, 99), st.integers(2, 8), st.integers(1, 6),
    st.integers(1, 12), st.data(),
)  # fmt: skip
def test_every_image_is_seen_as_often_as_there_are_epochs_one_more_or_less(counts, seed, m, t, epochs, data):
    """Whatever its bucket, and whatever the tiles of an epoch leave over."""
    counts[data.draw(st.integers(0, len(counts) - 1))] = data.draw(st.integers(1, m - 1))  # one is smaller than a tile
    uids, widths, heights = selection(counts)
    tiles = sum(max(count / m, 1) for count in counts)
    same = {"seed": seed, "tile_images": m, "tiles_per_update": t, "epochs": epochs}
    if int(tiles / t + 1e-9) == 0:
        with pytest.raises(Halt, match=r"batch\.effective"):
            Plan(uids, widths, heights, **same)
        return
    plan = Plan(uids, widths, heights, **same)
    assert plan.updates_per_epoch == int(tiles / t + 1e-9)
    assert all(len(plan.update(s)) == t for s in range(plan.total_updates))
    seen = Counter(pair for update in slots(plan) for pair in update)
    assert max(seen.values()) == 1
    per_image = Counter(uid for uid, _ in seen)
    times = [per_image[uid] for uid in uids.tolist()]
    assert epochs - 1 <= min(times) <= max(times) <= epochs + 1
    assert plan.total_updates <= epochs * plan.cycle_updates, "a schedule's cycles are no more than the epochs"


# Recorded from train/recipe/order.py of c93b03a: updates per epoch, in all, sha256 of the whole trace.
BEFORE_SHORT_TILES = [
    ([61, 26, 13], 31, 3, 4, 5, "carry", None, 8, 40, "19073fe24bbd45cdcc48fafa3ec0b643e74e83874817ebf633bcd6926291a366"),
    ([16, 17, 47], 7, 16, 1, 10, "carry", None, 5, 50, "ed56055a922b917a1664cab6778d398f37c0692150e8e7d36b8b3bb2edbcb4c3"),
    ([40, 9, 4], 32, 4, 3, 6, "carry", None, 4, 24, "b5b63d0a1b7491b0f6213d00cccbb503f5acd2da7fc31f4534910575f0225fc4"),
    ([8], 5, 4, 4, 9, "carry", 7, 0, 7, "6beca50a5195e7a0fec9f38ebf639fc819386faca83d351fa8fc60a410bf8268"),
    ([7, 10, 24], 31, 4, 2, 4, "keep", None, 5, 22, "9a001bebee3c053ef0ed14886b1b095d3a6a23af8e738fbfdfa99d3d3dd9bfa1"),
    ([7, 10, 3], 31, 4, 2, 4, "keep", None, 3, 12, "7de082dd24e1dca40fd78f2469f48e93ebf168985412a1b1cfcb9a70ea6da069"),
    ([7, 10, 3], 31, 4, 1, 4, "drop", None, 3, 12, "ac9d136b419e018c4e5acd316456ea07d546459d0203bc3b5eb84e64674ced62"),
]  # fmt: skip


@pytest.mark.parametrize(("counts", "seed", "m", "t", "epochs", "remainder", "limit", "per_epoch", "total", "digest"), BEFORE_SHORT_TILES)  # fmt: skip
def test_plans_without_a_bucket_smaller_than_a_tile_are_those_of_before(
    counts, seed, m, t, epochs, remainder, limit, per_epoch, total, digest
):
    plan = Plan(
        *selection(counts), seed=seed, tile_images=m, tiles_per_update=t, epochs=epochs, remainder=remainder, max_updates=limit
    )
    assert (plan.updates_per_epoch, plan.total_updates, plan.version, plan.short_buckets) == (per_epoch, total, 1, {})
    assert plan.cycle_updates == max(1, sum(counts) // (m * t))
    trace = "".join(
        trace_lines(s, tile, rng.timesteps(seed, tile.uids, tile.epochs, 0, 1000)) for s in range(total) for tile in plan.update(s)
    )
    assert hashlib.sha256(trace.encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("counts", "m", "t", "per_epoch", "short"),
    [([1], 48, 1, 1, 1), ([1], 16, 1, 1, 1), ([2, 1], 48, 1, 2, 2), ([20, 1, 16, 3], 16, 1, 4, 2), ([20, 1, 16, 3], 16, 2, 2, 2),
     ([5, 12, 9, 14], 48, 1, 4, 4)],
)  # fmt: skip
def test_a_small_set_trains_a_tile_of_each_small_bucket_every_epoch(counts, m, t, per_epoch, short):
    uids, widths, heights = selection(counts)
    plan = Plan(uids, widths, heights, seed=31, tile_images=m, tiles_per_update=t, epochs=10)
    assert (plan.updates_per_epoch, plan.version) == (per_epoch, 2)
    assert plan.short_buckets == {size: count for size, count in zip(SIZES, counts, strict=False) if count < m}
    assert len(plan.short_buckets) == short
    tiles = [tile for s in range(plan.total_updates) for tile in plan.update(s)]
    for size, count in plan.short_buckets.items():
        mine = [tile for tile in tiles if (tile.width, tile.height) == size]
        assert len(mine) in (9, 10, 11)
        assert all(len(tile.rows) == count and len(set(tile.epochs.tolist())) == 1 for tile in mine), "an epoch's tile is whole"
    assert plan.largest_tiles == {size: min(m, count) for size, count in sorted(zip(SIZES, counts, strict=False))}


def test_a_plan_with_short_tiles_is_another_plan():
    uids, widths, heights = selection([20, 3])
    assert Plan(uids, widths, heights, seed=1, tile_images=4, tiles_per_update=1, epochs=1).version == 2
    assert Plan(uids, widths, heights, seed=1, tile_images=3, tiles_per_update=1, epochs=1).version == 1
    for remainder in ("keep", "drop"):  # their short tiles are those of before
        plan = Plan(uids, widths, heights, seed=1, tile_images=4, tiles_per_update=1, epochs=1, remainder=remainder)
        assert (plan.version, plan.short_buckets) == (1, {})


def test_the_order_of_the_arrays_does_not_matter():
    uids, widths, heights = selection([17, 30, 9])
    shuffle = np.random.Generator(np.random.PCG64(5)).permutation(len(uids))
    same = {"seed": 31, "tile_images": 4, "tiles_per_update": 2, "epochs": 4}
    one = Plan(uids, widths, heights, **same)
    other = Plan(uids[shuffle], np.array(widths)[shuffle], np.array(heights)[shuffle], **same)
    assert slots(one) == slots(other)


def test_any_update_from_cold_equals_the_walk_through():
    uids, widths, heights = selection([17, 30, 9])
    same = {"seed": 31, "tile_images": 4, "tiles_per_update": 3, "epochs": 6}
    walk = slots(Plan(uids, widths, heights, **same))
    warm = Plan(uids, widths, heights, **same)
    for s in [*reversed(range(len(walk))), 3, 20, 4]:
        for plan in (warm, Plan(uids, widths, heights, **same)):
            got = [p for tile in plan.update(s) for p in zip(tile.uids.tolist(), tile.epochs.tolist(), strict=True)]
            assert got == walk[s]


def test_another_seed_is_another_order():
    assert slots(example_plan()) != slots(example_plan(seed=32))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_only_slice_the_plan(world):
    """The trace over all ranks, each running its own tiles, is the same for every valid world size."""
    uids, widths, heights = selection([50, 61, 40])
    t, accumulation = tiles_per_update(2, 24, world)
    traces = []
    for rank in range(world):
        plan = Plan(uids, widths, heights, seed=31, tile_images=2, tiles_per_update=t, epochs=2)
        for s in range(plan.total_updates):
            for number in range(rank * accumulation, (rank + 1) * accumulation):
                tile = plan.update(s)[number]
                times = rng.timesteps(31, tile.uids, tile.epochs, 0, 1000)
                traces.append((s, number, trace_lines(s, tile, times)))
    expected = ""
    for s, tiles in enumerate(plain_plan([50, 61, 40], 31, 2, 12, plan.total_updates)):
        size = {uid: f"{w}x{h}" for uid, w, h in zip(uids.tolist(), widths, heights, strict=True)}
        for uid, epoch in (pair for tile in tiles for pair in tile):
            expected += f"{s} {size[uid]} {uid:016x} {epoch} {rng.timesteps(31, [uid], [epoch], 0, 1000)[0]}\n"
    assert "".join(lines for _, _, lines in sorted(traces)) == expected


@pytest.mark.parametrize(
    ("remainder", "sizes", "per_epoch", "total"),
    [
        ("carry", {4}, 5, 20),
        ("keep", {4, 3, 2}, 5, 4 * (2 + 3 + 6) // 2),  # 41 images in 11 tiles an epoch
        ("drop", {4}, 4, 4 * (1 + 2 + 6) // 2),
    ],
)
def test_remainders(remainder, sizes, per_epoch, total):
    """Buckets of 7, 10 and 24 images in tiles of 4, two per update."""
    uids, widths, heights = selection([7, 10, 24])
    plan = Plan(uids, widths, heights, seed=31, tile_images=4, tiles_per_update=2, epochs=4, remainder=remainder)
    assert (plan.updates_per_epoch, plan.total_updates) == (per_epoch, total)
    seen = Counter(pair for update in slots(plan) for pair in update)
    assert max(seen.values()) == 1
    assert {len(tile.rows) for s in range(total) for tile in plan.update(s)} == sizes
    by_epoch = [sum(epoch == e for _, epoch in seen) for e in range(4)]
    if remainder == "keep":
        assert by_epoch == [41] * 4
    if remainder == "drop":
        assert by_epoch == [36] * 4


def test_out_of_range_updates_are_refused():
    plan = example_plan()
    for s in (-1, plan.total_updates):
        with pytest.raises(IndexError, match=r"0\.\.3"):
            plan.update(s)


def test_too_few_images_need_max_updates():
    with pytest.raises(Halt, match=r"8 images do not fill one update of 16 \(batch\.effective\)") as caught:
        example_plan(tiles_per_update=8)
    assert caught.value.code == ExitCode.MISMATCH
    plan = example_plan(tiles_per_update=8, max_updates=5)
    assert (plan.updates_per_epoch, plan.total_updates) == (0, 5)
    assert max(Counter(pair for update in slots(plan) for pair in update).values()) == 1
    with pytest.raises(Halt, match=r"they make 2 of its 3 tiles \(batch\.micro 16\).*lower batch\.effective \(to 32 at most\)"):
        example_plan(tile_images=16, tiles_per_update=3)
    assert example_plan(max_updates=3).total_updates == 3
    assert example_plan(max_updates=300).total_updates == 4


def test_an_empty_selection_and_tiles_that_never_fill_are_refused():
    with pytest.raises(Halt, match=r"batch\.micro"):
        Plan([], [], [], seed=1, tile_images=2, tiles_per_update=1, epochs=1, max_updates=5)
    with pytest.raises(Halt, match=r"batch\.micro"):
        example_plan(tile_images=6, remainder="drop", max_updates=5)


def test_equal_uids_are_refused_by_position():
    assert duplicate_uids([5, 6, 5, 7, 6, 5]) == [(0, 2), (0, 5), (1, 4)]
    assert duplicate_uids([]) == duplicate_uids([3, 1, 2]) == []
    with pytest.raises(Halt, match="positions 1 and 3") as caught:
        Plan([1, 2, 3, 2], [64] * 4, [64] * 4, seed=1, tile_images=1, tiles_per_update=1, epochs=1)
    assert caught.value.code == ExitCode.MISMATCH


@pytest.mark.parametrize(
    ("micro", "effective", "world", "tiles", "accumulation"),
    [(16, 96, 2, 6, 3), (16, 96, 1, 6, 6), (16, 96, 6, 6, 1), (8, 96, 12, 12, 1), (48, 48, 1, 1, 1), (12, 48, 4, 4, 1)],
)
def test_tiles_per_update(micro, effective, world, tiles, accumulation):
    assert tiles_per_update(micro, effective, world) == (tiles, accumulation)


@pytest.mark.parametrize(
    ("micro", "effective", "world", "message"),
    [
        (
            10,
            96,
            1,
            r"batch\.micro 10 does not divide batch\.effective 96: use 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96",
        ),
        (16, 96, 4, r"processes are 1, 2, 3, 6; with 4 processes batch\.micro may be 1, 2, 3, 4, 6, 8, 12, 24$"),
        (48, 48, 2, r"processes are 1; with 2 processes batch\.micro may be 1, 2, 3, 4, 6, 8, 12, 24$"),
        (16, 96, 5, r"batch\.effective must be a multiple of 5$"),
    ],
)
def test_impossible_splits_list_the_valid_choices(micro, effective, world, message):
    with pytest.raises(Halt, match=message) as caught:
        tiles_per_update(micro, effective, world)
    assert caught.value.code == ExitCode.MISMATCH


def test_divisors_and_virtual_ranks():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert [virtual_ranks(tiles) for tiles in (6, 12, 1, 4, 48)] == [2, 4, 1, 4, 16]


def test_small_buckets_merge_as_in_the_example():
    merged = merge_small_buckets(EXAMPLE, 16)
    assert merged == {size: size for size in EXAMPLE} | {(576, 1792): (832, 1216), (512, 2048): (832, 1216)}
    sums = Counter()
    for size, final in merged.items():
        sums[final] += EXAMPLE[size]
    assert sorted(sums.values()) == [40, 310, 500]


def test_merge_ties():
    # equally near in ln(w/h): the larger area wins, then the smaller size
    assert merge_small_buckets({(100, 100): 1, (200, 100): 9, (100, 50): 9}, 2)[100, 100] == (200, 100)
    assert merge_small_buckets({(100, 100): 1, (200, 100): 9, (100, 200): 9}, 2)[100, 100] == (100, 200)
    # equally small: the smaller size goes first, and the other is then large enough
    assert merge_small_buckets({(64, 64): 1, (128, 128): 1}, 2) == {(64, 64): (128, 128), (128, 128): (128, 128)}
    assert merge_small_buckets({(64, 64): 1}, 16) == {(64, 64): (64, 64)}
    assert merge_small_buckets({(64, 64): 0, (128, 128): 5}, 2) == {(128, 128): (128, 128)}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(make_buckets()), st.integers(1, 60), min_size=1), st.integers(1, 50))
def test_merging_leaves_only_large_buckets_and_is_final(counts, least):
    merged = merge_small_buckets(counts, least)
    sums = Counter()
    for size, final in merged.items():
        sums[final] += counts[size]
    assert set(merged) == set(counts)
    assert len(sums) == 1 or min(sums.values()) >= least
    assert merge_small_buckets(sums, least) == {size: size for size in sums}
    check_buckets(sums, least)


def test_unmerged_small_buckets_are_refused_with_the_way_out():
    with pytest.raises(Halt) as caught:
        check_buckets(EXAMPLE, 16)
    assert caught.value.code == ExitCode.MISMATCH
    for part in ("512x2048 (1 images)", "576x1792 (9 images)", "select", "latents", "min_bucket=null", "batch.min_bucket=1 "):
        assert part in caught.value.message
    check_buckets(EXAMPLE, 1)
    check_buckets(EXAMPLE, None)
    check_buckets({(64, 64): 3}, 16)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(make_buckets()), st.integers(1, 60), min_size=1), st.integers(1, 50), st.floats(0, 1.5)
)
def test_merging_goes_only_where_it_may_and_leaves_a_bucket_that_finds_nothing(counts, least, reach):
    def may(bucket, target):
        return abs(np.log(bucket[0] / bucket[1]) - np.log(target[0] / target[1])) <= reach

    merged = merge_small_buckets(counts, least, may)
    sums, members = Counter(), {}
    for size, final in merged.items():
        assert may(size, final)
        assert merged[final] == final
        sums[final] += counts[size]
        members.setdefault(final, []).append(size)
    assert sum(sums.values()) == sum(counts.values())
    for final in sums:
        if sums[final] < least:  # every other bucket that is left is too far for one of its own
            assert all(any(not may(size, other) for size in members[final]) for other in sums if other != final)
    backwards = dict(reversed(list(counts.items())))
    assert merge_small_buckets(backwards, least, may) == merged


def test_fingerprint_is_canonical_and_sees_every_field():
    fields = {
        "seed": 31, "tile_images": 16, "tiles_per_update": 6, "remainder": "carry", "min_bucket": 16,
        "dataset": "d", "selection": "s", "tokenizers": "t",
    }  # fmt: skip
    text = (
        '{"T":6,"dataset":"d","m":16,"min_bucket":16,"plan_version":1,"remainder":"carry","seed":31,'
        '"selection":"s","tokenizers":"t"}'
    )
    assert plan_fingerprint(**fields) == hashlib.sha256(text.encode()).hexdigest()
    assert plan_fingerprint(**fields) != plan_fingerprint(**fields, version=2)
    hashes = {plan_fingerprint(**(fields | {name: 99})) for name in fields}
    assert len(hashes | {plan_fingerprint(**fields)}) == len(fields) + 1


def card_sized() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """873,504 images over the 33 buckets, most of them near the usual portrait and square."""
    table = np.array(make_buckets())
    share = np.exp(-((np.log(table[:, 0] / table[:, 1]) + 0.3) ** 2) / 0.18) + 0.0004
    counts = np.floor(share / share.sum() * CARD_IMAGES).astype(np.int64)
    counts[np.argmax(counts)] += CARD_IMAGES - counts.sum()
    bucket = np.repeat(np.arange(len(table)), counts)
    # SplitMix-like mixing gives distinct, spread uids without hashing 873,504 keys
    uids = (np.arange(1, CARD_IMAGES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(0x5DEECE66D)
    return uids, table[bucket, 0], table[bucket, 1]


@pytest.fixture(scope="module")
def card():
    return card_sized()


def card_plan(card, **changes) -> Plan:
    return Plan(*card, **({"seed": 31, "tile_images": 16, "tiles_per_update": 6, "epochs": 10} | changes))


def test_card_arithmetic(card):
    plan = card_plan(card)
    assert (plan.images, plan.updates_per_epoch, plan.total_updates) == (873_504, 9_099, 90_990)
    kept = card_plan(card, remainder="keep")
    dropped = card_plan(card, remainder="drop")
    assert 9_099 < kept.total_updates / 10 < 9_105
    assert 9_093 < dropped.total_updates / 10 < 9_099


@pytest.mark.parametrize("s", [0, 45_678, 90_989])
def test_card_plan_starts_in_two_seconds_from_any_update(card, s):
    started = time.process_time()
    plan_module.Plan(*card, seed=31, tile_images=16, tiles_per_update=6, epochs=10).update(s)
    assert time.process_time() - started < 2


def test_card_plan_takes_less_than_100_megabytes(card):
    tracemalloc.start()
    try:
        plan = card_plan(card)
        for s in (0, 9_098, 9_099, 45_678, *range(89_000, 90_990, 199)):
            plan.update(s)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_card_plan_shows_every_image_ten_times_give_or_take_one(card):
    plan = card_plan(card)
    seen = np.zeros((12, CARD_IMAGES), dtype=bool)
    for s in range(plan.total_updates):
        for tile in plan.update(s):
            assert not seen[tile.epochs, tile.rows].any()
            seen[tile.epochs, tile.rows] = True
    times = seen.sum(axis=0)
    assert times.sum() == 8_735_040
    assert (times.min(), times.max()) == (9, 11)
    assert (times == 10).mean() > 0.999
