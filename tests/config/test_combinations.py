"""What combines: every pair of settings is refused by both names, or trains a tiny stage."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from launches import launch
from stages import Stage, losses

from train.base.errors import ExitCode, Halt
from train.config import combinations
from train.config.combinations import REFUSED, SETTINGS
from train.config.stage import load_stage

PAGE = Path(__file__).parents[2] / "docs/combinations.md"
PASSED = [pair for pair in combinations.pairs() if combinations.why_refused(*pair) is None]
NEEDS = {"model.float8": "torchao", "optimizer.name: adamw8bit or lion8bit": "bitsandbytes", "adapter.type": "peft",
         "optimizer.name: lion or another": "pytorch_optimizer"}  # fmt: skip


def words(*names: str) -> list[str]:
    return [word for name in names for word in SETTINGS[name].words]


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == combinations.markdown(), "scripts/show.py combinations > docs/combinations.md"


def test_rows_speak_of_settings_once() -> None:
    assert {name for pair in REFUSED for name in pair} <= set(SETTINGS)
    assert len({frozenset(pair) for pair in REFUSED}) == len(REFUSED)
    assert set(map(frozenset, REFUSED)) <= set(map(frozenset, combinations.pairs()))


@pytest.mark.parametrize("pair", REFUSED, ids=" + ".join)
def test_a_pair_is_refused_by_both_names(pair: tuple[str, str]) -> None:
    with pytest.raises(Halt) as caught:
        load_stage(["configs/pretrain.yaml"], ["model.train_text_encoders=false", "optimizer.text_encoder_lr=null", *words(*pair)])
    assert caught.value.code == ExitCode.USAGE
    for name in pair:
        assert name.split(" or ")[0] in caught.value.message


@pytest.mark.parametrize("pair", PASSED, ids=" + ".join)
def test_any_other_pair_is_a_config_that_loads(pair: tuple[str, str]) -> None:
    config = load_stage(["configs/pretrain.yaml"], words(*pair))
    assert all(SETTINGS[name].value(config) for name in pair)  # the words choose what the row asks about


def test_one_of_a_pair_alone_is_not_refused() -> None:
    for name in SETTINGS:
        config = load_stage(["configs/pretrain.yaml"], words(name))
        assert [other for other in SETTINGS if SETTINGS[other].value(config) and other != "ema.decay"] == [name] or name == "ema.decay"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own imports and tensors
@pytest.mark.parametrize("pair", PASSED, ids=" + ".join)
def test_a_pair_trains(pair: tuple[str, str], base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """Three updates on as many processes as the pair needs, stopped after the second and gone on with."""
    for name in pair:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            pytest.skip(f"{name} needs {NEEDS[name]}")
    world = 2 if any("sharding" in name for name in pair) else 1
    stage, changes = Stage(tmp_path, dataset, base_model), (*words(*pair), "max_updates=3")
    assert launch(stage, world, *changes, fault="control@2:term") == [85] * world, stage.message
    assert launch(stage, world, *changes) == [0] * world, stage.message
    assert len(losses(stage.output)) == 3
    assert all(map(math.isfinite, losses(stage.output)))
