"""The table of another trainer's options, and its block rates over every tensor of SDXL's U-Net."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from train.base.errors import Halt
from train.config import schema
from train.config.dataset import DatasetConfig
from train.config.stage import GroupConfig, StageConfig
from train.model import sdxl
from train.recipe import groups
from train.tools.convert import options
from train.tools.convert.optimizers import block_groups

ROOT = Path(__file__).parents[2]
NAMES = json.loads((ROOT / "tests/golden/convert/sd_scripts_options.json").read_text())["options"]


def test_every_option_of_its_trainers_has_a_row() -> None:
    """Names recorded from the parsers of both of its generations."""
    wanted = {name for names in NAMES.values() for name in names}
    assert len(wanted) > 200 and wanted - options.known() == set()
    assert all(all(options.row(name)) or options.row(name)[0] != options.NO_KEY for name in options.known()), "a reason for each"


def test_keys_that_the_table_names_are_keys() -> None:
    ours = {*schema.keys_of(StageConfig), *(key.replace("[]", "") for key in schema.keys_of(DatasetConfig))}
    sections = {key.rsplit(".", 1)[0] for key in ours} | {key.split(".")[0] for key in ours}
    for name in sorted(options.known()):
        for part in re.split(r", | of ", options.row(name)[0]):
            key = part.split(":")[0].removesuffix(".*")
            if key != options.NO_KEY and "." in key:
                assert key in ours or key in sections or key.removesuffix(".") in sections, (name, key)


def test_the_page_is_this_table() -> None:
    assert options.markdown() in (ROOT / "docs/from_sd_scripts.md").read_text(), "scripts/convert.py options"


def test_block_rates_reach_the_tensors_of_their_block() -> None:
    """Against the original's own rule, which reads a block's number out of the single file's names."""
    links = sdxl.links(sdxl.STANDARD, ("unet",))
    names = [link.folder[0] for link in links]
    assert len(names) == 1680
    made = block_groups([10.0 + block for block in range(23)], 1.0)
    rules = [GroupConfig(**rule) for rule in made]
    groups.decided(names, rules)  # each pattern fits something
    for link in links:
        rest = link.single.removeprefix("model.diffusion_model.").split(".")
        start = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}[rest[0]]
        block = start + (int(rest[1]) if start not in (0, 22) else 0)
        rule = groups.rule_of(link.folder[0], rules)
        assert rule is not None and rule.lr == 10.0 + block, link.single
        assert sum(groups.rule_of(link.folder[0], [one]) is not None for one in rules) == 1, "one pattern, so that order says nothing"


@pytest.mark.parametrize("rates", ["1e-6,2e-6", [1.0] * 22, ["x"] * 23, 3, [-1.0] * 23])
def test_block_rates_that_are_not_23(rates: object) -> None:
    with pytest.raises(Halt, match=r"block_lr is .*, must be 23 numbers"):
        block_groups(rates, 1e-6)
