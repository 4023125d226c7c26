"""`key=value` on the command line that means an item of a list, in dataset and stage configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import load_settings
from train.config.stage import load_stage

ROOT = Path(__file__).resolve().parents[2]
TWO = """
name: x
sources:
  - {name: a, adapter: danbooru, path: somewhere, columns: {score: points}}
  - {name: b, adapter: danbooru, path: "${oc.env:ANIX_DATA,elsewhere}"}
select: {pretrain: {}, "0": {min_bucket: 3}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "d.yaml").write_text(TWO)
    return tmp_path / "d.yaml"


def test_an_item_is_changed_and_the_rest_stays(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANIX_DATA", raising=False)
    settings = load_settings([config], ["sources.1.adapter=sidecar", "sources[0].path=there", "sources.1.repeats=kohya"])
    assert [(s.name, s.adapter, s.path, s.repeats) for s in settings.sources] == [
        ("a", "danbooru", "there", 1), ("b", "sidecar", "elsewhere", "kohya"),
    ]  # fmt: skip
    assert settings.sources[0].columns == {"score": "points"}
    assert load_settings([config], ["sources.0.columns.md5=hash"]).sources[0].columns == {"score": "points", "md5": "hash"}


def test_a_later_override_counts_from_an_earlier_one(config: Path) -> None:
    assert load_settings([config], ["exclude.tags=[a, b]", "exclude.tags.1=c"]).exclude.tags == ["a", "c"]


def test_a_number_that_is_a_name_stays_one(config: Path) -> None:
    settings = load_settings([config], ["select.0.repeats=3"])
    assert (settings.select["0"].repeats, settings.select["0"].min_bucket, len(settings.sources)) == (3, 3, 2)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sources.2.adapter=sidecar", r"sources\.2: sources is a list of 2, .* sources\.0 to sources\.1"),
        ("sources.-1.adapter=sidecar", r"sources\.-1: sources is a list of 2"),
        ("sources.adapter=sidecar", r"sources\.adapter: sources is a list of 2"),
        ("sources.0.adaptr=sidecar", r"unknown key sources\[0\]\.adaptr: did you mean sources\[0\]\.adapter"),
        ("sources.0=sidecar", r"sources\[0\] must hold keys and values"),
        ("exclude.tags.0=comic", r"exclude\.tags=\[\.\.\.\]"),
        ("select=[]", r"select=\[\] do not go together"),
        ("name=" + 101 * "x", r"name is 'x+': .* at most 100"),
        ("sources.0.name=" + 300 * "x", r"sources\[0\]\.name is 'x+': .* at most 100"),
        ("buckets.area_px=-5", r"buckets\.area_px is -5, must be at least 1"),
        ("sources.0.path=${oc.env:HOME}", r"sources\.0\.path: .* is refused"),
    ],
)
def test_what_is_no_item_is_bad_usage(config: Path, override: str, told: str) -> None:
    with pytest.raises(Halt, match=told) as halt:
        load_settings([config], [override])
    assert halt.value.code == ExitCode.USAGE


def test_stage_configs_too() -> None:
    more = ["data.path=d", "model.init_from=m", "noise.timesteps=[0, 1000]", "noise.timesteps.1=900"]
    assert list(load_stage([ROOT / "configs/ft1.yaml"], more).noise.timesteps) == [0, 900]
    with pytest.raises(Halt, match=r"noise\.timesteps\.2: noise\.timesteps is a list of 2") as halt:
        load_stage([ROOT / "configs/ft1.yaml"], [*more, "noise.timesteps.2=5"])
    assert halt.value.code == ExitCode.USAGE


@pytest.mark.parametrize(
    "text",
    ["###", "||", "@@@", "%%", "---", "&&&", "***", ">>>", "!!!", "|", " ", ";", "`", ":", "my set #2", "a: b", "\U0001f600"],
)
def test_a_text_is_taken_as_it_was_typed(config: Path, text: str) -> None:
    """YAML would read a comment, a block or a map there: nothing at all, half of it, or an error about a scanner."""
    settings = load_settings([config], ["sources.1.adapter=sidecar", f"sources.1.tag_separator={text}"])
    assert settings.sources[1].tag_separator == text


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_nothing_and_numbers_are_what_yaml_says(config: Path, text: str) -> None:
    settings = load_settings([config], ["separator='#'", f"sources.0.dictionary={text}", "sources.0.escaped=true"])
    assert (settings.separator, settings.sources[0].dictionary, settings.sources[0].escaped) == ("#", None, True)


def test_an_open_bracket_or_quote_is_bad_usage(config: Path) -> None:
    with pytest.raises(Halt, match="cannot be read"):
        load_settings([config], ["exclude.tags=[a"])


@pytest.mark.parametrize("override", ["probe=[a]", "select=[]", "report.fail_if=[1]", "exclude=[comic]"])
def test_a_list_in_the_place_of_a_section_is_bad_usage(override: str) -> None:
    """The shipped file holds these sections, and OmegaConf answers the merge with a bare TypeError."""
    with pytest.raises(Halt, match=override.partition("=")[0]) as halt:
        load_settings([ROOT / "configs" / "dataset.yaml"], [override])
    assert halt.value.code == ExitCode.USAGE


@pytest.mark.parametrize("key", ["batch.micro", "batch.effective", "batch.split"])
def test_no_picture_at_once_is_bad_usage(key: str) -> None:
    with pytest.raises(Halt, match=f"{key} is 0, must be at least 1"):
        load_stage([ROOT / "configs" / "ft1.yaml"], [f"{key}=0"])
