"""Which tensor is in which group, what is refused, and the rates of groups."""

from __future__ import annotations

import pytest

from train.base.errors import Halt
from train.config.stage import GroupConfig, OptimizerConfig, ScheduleConfig
from train.recipe import groups, schedule

NAMES = ("unet.conv_in.weight", "unet.down_blocks.1.attentions.0.proj_in.weight", "unet.mid_block.attentions.0.proj_in.weight",
         "text_encoder.text_model.embeddings.token_embedding.weight", "text_encoder_2.text_projection.weight")  # fmt: skip


def optimizer(*rules: GroupConfig, **more: float) -> OptimizerConfig:
    return OptimizerConfig(name="adamw", unet_lr=1e-5, text_encoder_lr=2e-6, groups=list(rules), **more)  # type: ignore[arg-type]


def test_the_last_pattern_that_fits_decides() -> None:
    rules = [GroupConfig("unet.*", 1e-6), GroupConfig("unet.down_blocks.*.attentions.*", 0), GroupConfig("text_encoder_2.*", None, 0.5)]
    assert [groups.group_of(name, rules) for name in NAMES] == [
        "unet.*", "unet.down_blocks.*.attentions.*", "unet.*", "text_encoder", "text_encoder_2: text_encoder_2.*",
    ]  # fmt: skip
    assert [groups.trains(name, rules) for name in NAMES] == [True, False, True, True, True]
    assert groups.decided(NAMES, rules)["unet.*"] == [NAMES[0], NAMES[2]]


@pytest.mark.parametrize(("rules", "told"), [
    ((GroupConfig("unet.downblocks.1.attentions.0.proj_in.*", 0),), "nearest is 'unet.down_blocks.1.attentions.0.proj_in.weight'"),
    ((GroupConfig("unet.mid_block.*", 1e-6), GroupConfig("unet.*", 0)), "'unet.mid_block.*' decides nothing, because 'unet.*'"),
    ((GroupConfig("*", 0),), "leaves nothing to train"),
])  # fmt: skip
def test_patterns_that_decide_nothing_are_named(rules: tuple[GroupConfig, ...], told: str) -> None:
    with pytest.raises(Halt, match="optimizer") as refused:
        groups.decided(NAMES, rules)
    assert told in refused.value.message


def test_rates_by_group_against_literal_arithmetic() -> None:
    config = optimizer(GroupConfig("unet.mid*", 4e-6, 0.5), GroupConfig("unet.conv_in.*", 0), GroupConfig("text*", None, 0.25), text_encoder_2_lr=1e-6)
    peaks = schedule.peaks(config)
    assert peaks == {
        "unet": 1e-5, "text_encoder": 2e-6, "text_encoder_2": 1e-6, "unet.mid*": 4e-6, "unet: text*": 1e-5,
        "text_encoder: text*": 2e-6, "text_encoder_2: text*": 1e-6,
    }  # fmt: skip
    for updates, factor in ((0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)):  # linear over 4 updates multiplies every group
        rates = schedule.rates_at(
            updates, peaks=peaks, config=ScheduleConfig(name="linear"), cycle_updates=1, total_updates=4, rules=config.groups
        )
        wanted = {"unet": 1e-5 * factor, "text_encoder_2": 1e-6 * factor, "unet.mid*": 4e-6 * factor if updates < 2 else 0}
        wanted["text_encoder: text*"] = 2e-6 if updates == 0 else 0
        assert {name: rates[name] for name in wanted} == pytest.approx(wanted)


def test_a_schedule_multiplies_a_groups_rate_and_its_floor() -> None:
    config = optimizer(GroupConfig("unet.mid*", 1e-6))
    found = schedule.rates_at(
        4, peaks=schedule.peaks(config), config=ScheduleConfig(name="linear", min_lr=2e-6), cycle_updates=1, total_updates=4, rules=config.groups
    )
    assert found["unet"] == pytest.approx(2e-6)
    assert found["unet.mid*"] == pytest.approx(2e-7)
