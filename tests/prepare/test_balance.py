"""Boost and balance against counted tags: who is visited how often, what the report says, and how long an epoch is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oddimages import drawn, encoded
from preparedset import prepare, settings_of, write_vae

from train.base.errors import ExitCode, Halt
from train.config import derived
from train.config.dataset import BalanceConfig, DatasetConfig
from train.config.stage import NoiseConfig
from train.prepare.choosing.balance import balanced
from train.prepare.select import selection_path, stored
from train.tools.estimate.images import find_images

STEPS = ("ingest", "probe", "score", "tag", "dedupe", "label", "select")
PEOPLE = ["alice"] * 9 + ["bob"] * 4 + ["carol"] * 1 + ["bob carol"] * 1 + [""] * 3  # alice 9, bob 5, carol 2, nobody 3


def posts(folder: Path) -> Path:
    """18 posts of four sizes; who is in them as in PEOPLE."""
    (folder / "pictures").mkdir(parents=True)
    for number, people in enumerate(PEOPLE):
        (folder / "pictures" / f"{number}.png").write_bytes(encoded(drawn(96, 128, seed=number), "PNG"))
        post = {
            "id": number, "file_ext": "png", "rating": "g", "score": number, "image_width": 96, "image_height": 128,
            "created_at": "2020-05-05T10:00:00.000+00:00", "tag_string_general": f"solo tag_{number % 2}",
            "tag_string_character": people, "tag_string_copyright": "", "tag_string_artist": "", "tag_string_meta": "",
        }  # fmt: skip
        (folder / "pictures" / f"{number}.json").write_text(json.dumps(post))
    return folder


def settings(folder: Path, **select: Any) -> DatasetConfig:
    text = json.dumps({"sources": [{"name": "booru", "adapter": "danbooru", "path": str(folder / "pictures")}],
                       "select": {"pretrain": {"min_bucket": 1} | select}})  # fmt: skip
    (folder / "dataset.yaml").write_text(text)
    return settings_of(folder)


def visits(made: DatasetConfig) -> dict[int, int]:
    import pyarrow.parquet as pq

    rows = pq.read_table(selection_path(Path(made.root) / made.name, "pretrain")).to_pylist()
    return {int(row["key"].split(":")[1].removesuffix(".json")): row["repeats"] for row in rows}


def seen(repeats: dict[int, int]) -> Counter[str]:
    """Visits an epoch of each person, counted here."""
    found: Counter[str] = Counter()
    for number, times in repeats.items():
        found.update(dict.fromkeys(PEOPLE[number].split(), times))
    return found


def test_a_boost_multiplies_where_all_its_predicates_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boost = [{"where": ["tags_character has alice", "tags_general has tag_0"], "times": 5}, {"where": ["tags has tag_0"], "times": 2}]
    made = settings(posts(tmp_path), boost=boost, repeats=3)
    prepare(made, *STEPS)
    wanted = {n: 3 * (5 if who == "alice" and n % 2 == 0 else 1) * (1 if n % 2 else 2) for n, who in enumerate(PEOPLE)}
    assert visits(made) == wanted
    assert f"54 visits an epoch became {sum(wanted.values())}" in capsys.readouterr().out


def test_rare_people_are_raised_to_the_number_and_no_further(tmp_path: Path) -> None:
    made = settings(posts(tmp_path), balance={"by": "character", "to": 7, "most": 3})
    prepare(made, *STEPS)
    repeats = visits(made)
    # carol 2 pictures, at most 3 times each: 6. That raises bob, who is also in one of them, from 5 to 7.
    assert seen(repeats) == {"alice": 9, "bob": 7, "carol": 6}
    assert all(repeats[n] == 1 for n, who in enumerate(PEOPLE) if who in ("alice", "", "bob"))
    assert repeats[13] == repeats[14] == 3
    told = stored(Path(made.root) / made.name, "pretrain")["mixed"]["balance"]
    assert told["shown"] == [["carol", 2, 6], ["bob", 5, 7], ["alice", 9, 9]]
    assert (told["values"], told["raised"], told["short"], told["without"]) == (3, 2, 1, 3)


def test_balance_counts_what_repeats_and_boost_made(tmp_path: Path) -> None:
    boost = [{"where": ["tags_character has carol"], "times": 4}]
    made = settings(posts(tmp_path), boost=boost, balance={"by": "character", "to": 10})
    prepare(made, *STEPS)
    # carol 2 x 4 = 8 and bob 4 + 4 = 8; the picture of both may be raised for either.
    found = seen(visits(made))
    assert found["alice"] == 10 and 10 <= found["bob"] <= 11 and 10 <= found["carol"] <= 11
    assert visits(made)[13] >= 4 and stored(Path(made.root) / made.name, "pretrain")["mixed"]["before"] == 18
    before = selection_path(Path(made.root) / made.name, "pretrain").read_bytes()
    selection_path(Path(made.root) / made.name, "pretrain").unlink()
    prepare(made, "select")
    assert selection_path(Path(made.root) / made.name, "pretrain").read_bytes() == before


class _Valued:
    """Only the values of some rows: what `balanced` asks candidates for."""

    def __init__(self, values: list[list[str]]) -> None:
        self.of = values

    def values(self, name: str, rows: np.ndarray) -> list[list[str]]:
        return [self.of[row] for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_every_value_reaches_its_number_or_its_limit_and_none_is_overshot_alone(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = [[f"v{v}" for v in set((random.pareto(1.0, random.integers(0, 3)) * 3).astype(int).clip(0, 30))] for _ in range(120)]
    start = random.integers(1, 4, len(values))
    config = BalanceConfig("character", to=int(random.integers(1, 40)), most=int(random.integers(1, 6)))
    now, told, _ = balanced(_Valued(values), config, np.arange(len(values)), start)  # type: ignore[arg-type]
    assert (now >= start).all() and (now <= start * config.most).all()
    before, after = Counter[str](), Counter[str]()
    for mine, a, b in zip(values, start.tolist(), now.tolist(), strict=True):
        before.update(dict.fromkeys(mine, a))
        after.update(dict.fromkeys(mine, b))
    assert all(after[v] >= min(config.to, config.most * before[v]) for v in before)
    assert all(n == s for mine, n, s in zip(values, now, start, strict=True) if not mine or all(before[v] >= config.to for v in mine))
    assert {v: (a, b) for v, a, b in told["shown"]} == {v: (before[v], after[v]) for v in before}


def test_the_plans_epoch_is_as_long_as_the_visits(tmp_path: Path) -> None:
    write_vae(tmp_path / "vae")
    made = settings(posts(tmp_path), balance={"by": "character", "to": 7, "most": 3})
    prepare(made)
    order = derived.Order(seed=1, tile_images=2, tiles_per_update=1, epochs=2, remainder="carry", max_updates=None)
    images = derived.Images(
        noise=NoiseConfig(),
        folder=str(Path(made.root) / made.name), selection="pretrain", separator=None, held_out_share=0.0,
        held_out_selection="pretrain", min_bucket=None, average="images", flip=False, masked=False, protect=(), order=order,
    )  # fmt: skip
    found = find_images(images, "pretrain", None)
    assert found.count == sum(visits(made).values()) == 22
    assert found.plan is not None and found.plan.updates_per_epoch == 11
    assert "18 pictures" in found.source
    report = json.loads((Path(made.root) / made.name / "report.json").read_text())
    assert report["counts"]["mixed"]["pretrain"]["after"] == 22


@pytest.mark.parametrize(
    ("select", "named"),
    [
        ({"boost": [{"where": ["tag has x"], "times": 2}]}, "select.pretrain.boost[0].where: there is no column 'tag'"),
        ({"balance": {"by": "charakter", "to": 5}}, "select.pretrain.balance.by: there is no column 'charakter'"),
        ({"boost": [{"where": ["tags has solo"], "times": 30000}, {"where": ["tags has solo"], "times": 2}]}, "boost and balance make 60000 visits"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_by_its_key(tmp_path: Path, select: dict[str, Any], named: str) -> None:
    with pytest.raises(Halt, match=named.replace("[", r"\[").replace("]", r"\]")) as told:
        prepare(settings(posts(tmp_path), **select), *STEPS)
    assert told.value.code in (ExitCode.USAGE, ExitCode.MISMATCH)


def test_what_does_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boost = [{"where": ["tags_character has zed"], "times": 5}]
    prepare(settings(posts(tmp_path), boost=boost, balance={"by": "artist", "to": 5}), *STEPS)
    out = capsys.readouterr().out
    assert "no picture that may be selected has 'zed'" in out and "balance: raises nothing: no picture has any artist" in out


def test_a_boost_without_predicate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Halt, match=r"select\.pretrain\.boost\[0\]\.where is empty"):
        settings(posts(tmp_path), boost=[{"where": [], "times": 2}])
